"""Rows in another order, and their gradients back in the old one."""

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
    """x[permutation] (B, K). On a GPU the derivative of indexing sorts and adds: there rows are taken both ways."""
    if not x.is_cuda:
        return x[permutation]
    rows: Tensor = _TakeRows.apply(x, permutation, inverse)
    return rows


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, permutation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
