"""The attention of one target over short sequences, with backward in closed form.

Autograd's own backward of the formula keeps, fills and adds arrays of size (B, T, dim) for every product; here each
such gradient is written once.
"""

from typing import Any, cast

import torch
from torch import Tensor


def attend(probes: Tensor, sequence: Tensor, valid: Tensor) -> Tensor:
    """Weighted sums of a sequence: Σ_t α_t s_t of its first view, α the softmax of every view's own ⟨p, s_t⟩.

    Positions that are not valid carry no weight, and a row without a valid one gives zeros.

    Args:
        probes: p, (views, B, heads, dim).
        sequence: s, (views, B, T, dim).
        valid: (B, T) bool.

    Returns:
        (views, B, heads, dim).
    """
    # In the embeddings' type under autocast too: forward and backward have to agree on one.
    with torch.autocast(probes.device.type, enabled=False):
        return cast(Tensor, _Attend.apply(probes.to(sequence.dtype), sequence, valid))


def attend_formula(probes: Tensor, sequence: Tensor, valid: Tensor) -> Tensor:
    """What :func:`attend` computes, operation by operation."""
    valid = valid.unsqueeze(1)
    affinity = probes @ sequence.mT
    # A finite fill keeps a row without valid positions free of NaN, in its gradient too.
    affinity = affinity.masked_fill(~valid, torch.finfo(affinity.dtype).min)
    return (torch.softmax(affinity, dim=-1) * valid) @ sequence[0]


class _Attend(torch.autograd.Function):
    """Inside, (B, views·heads, T): the values are the same for all views, so that one product serves them all."""

    @staticmethod
    def forward(ctx: Any, probes: Tensor, sequence: Tensor, valid: Tensor) -> Tensor:
        views, _, heads, _ = probes.shape
        # bmm takes operands whose rows are not side by side, and results that are, one by one.
        probes = probes.contiguous()
        affinity = torch.stack([torch.bmm(p, s.mT) for p, s in zip(probes, sequence, strict=True)], dim=1)
        # Added, for a fill costs several times as much; half the smallest number, so that the sum is finite too.
        closed = sequence.new_zeros(valid.shape).masked_fill_(~valid, torch.finfo(sequence.dtype).min / 2)
        affinity = affinity.flatten(1, 2).add_(closed.unsqueeze(1))
        # A row without a valid position has weights all the same, and its sums are taken away.
        weight = torch.softmax(affinity, dim=-1)
        attended = valid.any(dim=1)[:, None, None].to(weight.dtype)
        sums = torch.bmm(weight, sequence[0]).mul_(attended)
        ctx.save_for_backward(probes, sequence, valid, weight, attended, sums)
        return sums.unflatten(1, (views, heads)).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        probes, sequence, valid, weight, attended, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph: the gradient itself must be differentiable.
            inputs = probes.view_as(probes), sequence.view_as(sequence)
            return *torch.autograd.grad(attend_formula(*inputs, valid), inputs, gradient, create_graph=True), None
        views, heads = probes.shape[0], probes.shape[2]
        # (B, views·heads, dim), zero where there is nothing to weigh.
        gradient = gradient.transpose(0, 1).flatten(1, 2) * attended
        # Through the softmax: ∂affinity_t = α_t (∂α_t − Σ_u α_u ∂α_u), ∂α_t = ⟨∂sum, s_t⟩, Σ_u α_u ∂α_u = ⟨∂sum, sum⟩.
        affinity = torch.bmm(gradient, sequence[0].mT)
        affinity.sub_((gradient * sums).sum(dim=-1, keepdim=True)).mul_(weight)
        affinity = affinity.unflatten(1, (views, heads))
        probes_gradient, sequence_gradient = torch.empty_like(probes), torch.empty_like(sequence)
        for view in range(views):
            torch.bmm(affinity[:, view], sequence[view], out=probes_gradient[view])
            torch.bmm(affinity[:, view].mT, probes[view], out=sequence_gradient[view])
        sequence_gradient[0].baddbmm_(weight.mT, gradient)
        return probes_gradient, sequence_gradient, None
