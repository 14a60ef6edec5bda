"""Whether tensors hold numbers that may be read: not while PyTorch traces, transforms or fakes a computation."""

import torch

# torch 2.6 has none.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Whether torch.export traces the call."""
