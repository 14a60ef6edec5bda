"""Layers of many operations on the Triton kernels, in Triton's interpreter: the reference's outputs and gradients.

TRITON_INTERPRET=1 pytest -m interpreter
"""

import pytest
import torch
from problems import FLOAT32_TOLERANCE, relative_error

from saml_kernels.backends.triton import availability
from saml_kernels.layers import GatedTowers, MixtureOfExperts, ProgressiveExperts, ScoreMixture

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

M, B, D = 2, 9, 3


class HMoE(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.bottom = MixtureOfExperts(2, D, (4,), M, "tanh", backend)
        self.mixture = ScoreMixture(M, 4, (3,), "tanh", backend=backend, weight_dim=D)

    def forward(self, x, prior, scenario):
        return self.mixture(self.bottom.views(x, scenario), scenario, weight_input=x + 0 * prior.sum())


class PLE(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.experts = ProgressiveExperts(M, D, ((4,), (3,)), activation="tanh", backend=backend)

    def forward(self, x, prior, scenario):
        return self.experts(x + 0 * prior.sum(), scenario)


@pytest.mark.parametrize(
    "build",
    [lambda backend: GatedTowers(M, D, 2, (4, 1), 3, "tanh", "identity", backend=backend), HMoE, PLE],
    ids=["GatedTowers", "HMoE", "ProgressiveExperts"],
)
def test_layers_are_the_references(build):
    layer, reference = build("triton"), build("reference")
    reference.load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(B, width, generator=generator) for width in (D, 2)]
    scenario = torch.randint(M, (B,), generator=generator)
    results = []
    for each in (layer, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = each(*leaves, scenario)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, (*leaves, *each.parameters()), cotangent)])
    assert all(relative_error(a, b) < FLOAT32_TOLERANCE for a, b in zip(*results, strict=True))
