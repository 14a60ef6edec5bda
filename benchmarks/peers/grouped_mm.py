"""Rows grouped by scenario as in grouped.py, with torch._grouped_mm, which reads the groups' ends on the device.

Nothing waits for the device, so forward and backward can be captured in a CUDA graph. On a GPU torch._grouped_mm is one
kernel in bfloat16 only; in other types, and on the CPU, torch loops over the groups. Private to torch, as
torch._addmm_activation (relu in the product's epilogue) is. Widths
must be multiples of 16 bytes.
"""

from typing import Any

import torch
from torch import Tensor

from peers.permutation import take_rows
from peers.scoring import clamped_norm, ratio_weights
from saml_kernels import TrunkParams


def trunk(x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams) -> tuple[Tensor, Tensor]:
    """own (B, d_L), aux (B, a_L); see the package. M ≤ 256."""
    M = params.branch_weights[0].shape[0]
    # A byte is sorted in one pass; eight would take eight.
    t, permutation = torch.sort(scenario.to(torch.uint8), stable=True)
    t = t.long()
    rows = torch.arange(t.shape[0], device=t.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, rows)
    branches = torch.arange(M, device=t.device)
    ends = torch.searchsorted(t, branches + 1, out_int32=True)
    is_own = t[:, None] == branches

    aux, own = take_rows(x_global, permutation, inverse), take_rows(x_local, permutation, inverse)
    for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
        aux = torch.relu(torch.addmm(params.aux_biases[layer], aux, params.aux_weights[layer]))
        inputs = torch.cat([own, aux], dim=1)
        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if gate_weight is None or gate_bias is None:
            own = torch.relu(_GroupedLinear.apply(inputs, weight, bias, t, is_own, ends))
            continue
        streams, own = _EveryBranch.apply(inputs, weight, bias, rows, t, is_own, ends)
        dots = torch.bmm(streams, own[:, :, None]).squeeze(2)
        alpha = ratio_weights(dots / (clamped_norm(own)[:, None] * clamped_norm(streams)), is_own)
        gate = torch.sigmoid(_GroupedLinear.apply(own, gate_weight, gate_bias, t, is_own, ends))
        own = own + gate * torch.bmm(alpha[:, None], streams).squeeze(1)
    return take_rows(own, inverse, permutation), take_rows(aux, inverse, permutation)


class _GroupedLinear(torch.autograd.Function):
    """x W_t + b_t (B, N), rows (B, K) sorted by scenario t; group k ends before row ends[k]. W (M, K, N), b (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, t: Tensor, is_own: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, is_own, ends)
        return torch._grouped_mm(x, weight, offs=ends) + bias[t]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, is_own, ends = ctx.saved_tensors
        return (*_gradients(x, weight, is_own, ends, gradient), None, None, None)


class _EveryBranch(torch.autograd.Function):
    """relu(x W_k + b_k) of all branches (B, M, d), constants, and of the own branch (B, d), with gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, t: Tensor, is_own: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        M, K, d = weight.shape
        side_by_side = weight.permute(1, 0, 2).reshape(K, M * d)
        streams = torch._addmm_activation(bias.reshape(M * d), x, side_by_side).view(-1, M, d)
        own = streams[rows, t]
        ctx.save_for_backward(x, weight, is_own, ends, own)
        ctx.mark_non_differentiable(streams)
        return streams, own

    @staticmethod
    def backward(ctx: Any, _: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, is_own, ends, own = ctx.saved_tensors
        return (*_gradients(x, weight, is_own, ends, gradient * (own > 0)), None, None, None, None)


def _gradients(
    x: Tensor, weight: Tensor, is_own: Tensor, ends: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂x, ∂W, ∂b of the grouped product; the bias's as a product with the one-hot scenarios, in a fixed order."""
    return (
        torch._grouped_mm(gradient, weight.transpose(1, 2), offs=ends),
        torch._grouped_mm(x.t(), gradient, offs=ends),
        is_own.to(gradient.dtype).t() @ gradient,
    )
