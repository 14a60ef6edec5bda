"""Batches for tests of layers, and parameters away from their start."""

import torch

M, B, D = 3, 20, 5
TOLERANCE = 1e-10


def batch(seed=0, rows=B, width=D):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x, torch.randint(M, (rows,), generator=generator)


def randomised(module, seed=1):
    """Every parameter moved away from its start, where W_t = 1 would hide which factor is which."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module
