"""The mutual unit's weights α in plain PyTorch, shared by the peers.

α_ij = softmax over j ≠ i of c_ij / Σ_{j≠i} c_ij; where |Σ| < 1e−6 all ratios are 0.
"""

import torch
from torch import Tensor

NORM_EPSILON = 1e-8
DEGENERATE_SUM = 1e-6


def clamped_norm(v: Tensor) -> Tensor:
    """max(‖v‖, ε) over the last dimension."""
    return torch.linalg.vector_norm(v, dim=-1).clamp_min(NORM_EPSILON)


def ratio_weights(cosine: Tensor, own: Tensor) -> Tensor:
    """α (..., M) from the cosines c (..., M); ``own`` is True at the entries j = i, where α is 0."""
    cosine = cosine.masked_fill(own, 0.0)
    total = cosine.sum(-1, keepdim=True)
    usable = total.abs() >= DEGENERATE_SUM
    ratio = torch.where(usable, cosine / torch.where(usable, total, 1.0), 0.0)
    return ratio.masked_fill(own, float("-inf")).softmax(-1)
