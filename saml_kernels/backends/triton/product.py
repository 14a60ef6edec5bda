"""The one product kernel, C = δ(bias + [A1 ; A2] W): of all branches or own ones, forward and for input gradients."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.functions import activate, scenario_tile
from saml_kernels.backends.triton.launching import distance, dot_precision, launch, padded


# A batch size is never a reason to compile again.
@triton.jit(do_not_specialize=["rows", "second"])
def product_kernel(
    a,
    a_row,
    a_branch,
    second,
    second_row,
    w,
    w_branch,
    w_k,
    w_n,
    bias,
    c,
    c_row,
    c_branch,
    argument,
    offsets,
    rows,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    N: tl.constexpr,
    OWN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ARGUMENT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROUND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of C. Element (row, k) of A1 stands at a + row·a_row + branch·a_branch + k, of A2 at
    a + ``second`` + row·second_row + k.

    OWN: tiles of one scenario, which is the branch. Otherwise tiles of any rows, for every branch.
    """
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // column_tiles
    n = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    if OWN:
        branch, first, end = scenario_tile(offsets, tile, M, M_PADDED, ROWS)
    else:
        branch = tl.program_id(1)
        first = tile * ROWS
        end = rows
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    live = row < end
    branch = branch.to(tl.int64)
    a += branch * a_branch
    # A2 is one for all branches: counted from A1's branch it lies that much nearer.
    second -= branch * a_branch
    w += branch * w_branch

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # One loop over both factors: two would take twice the shared memory.
    steps_1: tl.constexpr = (K1 + DEPTH - 1) // DEPTH
    steps_2: tl.constexpr = (K2 + DEPTH - 1) // DEPTH
    for step in range(0, steps_1 + steps_2):
        of_second = step >= steps_1
        k0 = tl.where(of_second, step - steps_1, step) * DEPTH
        width = tl.where(of_second, K2, K1)
        start = tl.where(of_second, second, 0)
        stride = tl.where(of_second, second_row, a_row)
        w_row = tl.where(of_second, K1, 0)
        k = k0 + tl.arange(0, DEPTH)
        inside = k < width
        a_place = a + start + (row * stride)[:, None] + k[None, :]
        a_tile = tl.load(a_place, mask=live[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(
            w + ((w_row + k).to(tl.int64) * w_k)[:, None] + (n.to(tl.int64) * w_n)[None, :],
            mask=inside[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if ROUND:
            a_tile = a_tile.to(tl.bfloat16)
            w_tile = w_tile.to(tl.bfloat16)
        total = tl.dot(a_tile, w_tile, total, input_precision=PRECISION)

    if HAS_BIAS:
        total += tl.load(bias + branch * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & (n < N)[None, :]
    if HAS_ARGUMENT:
        tl.store(argument + (row * N)[:, None] + n[None, :], total, mask=mask)
    place = c + (row * c_row)[:, None] + branch * c_branch + n[None, :]
    if ACCUMULATE:
        total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, activate(total, ACTIVATION), mask=mask)


@dataclass(frozen=True)
class Factor:
    """A left factor (rows, k): the tensor whose storage it starts at, strides in elements, and its width."""

    tensor: Tensor
    row: int
    branch: int
    width: int

    @staticmethod
    def shared(tensor: Tensor) -> "Factor":
        """(B, k), read by every branch."""
        return Factor(tensor, tensor.shape[1], 0, tensor.shape[1])

    @staticmethod
    def by_branch(tensor: Tensor) -> "Factor":
        """(B, M, k), each branch reads its own."""
        return Factor(tensor, tensor.shape[1] * tensor.shape[2], tensor.shape[2], tensor.shape[2])


def product(
    first: Factor,
    second: Factor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    offsets: Tensor,
    activation: int,
    *,
    own: bool,
    argument: Tensor | None = None,
    accumulate: bool = False,
    transposed: bool = False,
    foreign_bfloat16: bool = False,
    out_row: int | None = None,
    out_branch: int = 0,
) -> None:
    """out = δ([out +] bias + [first ; second] W_k) in one launch.

    ``weight`` (M, K, N) contiguous, or (K, N), which is one branch; ``transposed``: W_kᵀ, first being (rows, N) then.
    ``own``: every row through the branch of its scenario, else all rows through all branches. ``out`` (B, N), or with
    ``out_row`` and ``out_branch`` strided by them. ``argument`` (B, N) receives δ's argument.
    """
    rows = first.tensor.shape[0]
    branches = weight.shape[0] if weight.dim() == 3 else 1
    k, n = weight.shape[-2:]
    w_k, w_n = n, 1
    if transposed:
        k, n, w_k, w_n = n, k, w_n, w_k
    config = configs.product(first.tensor.dtype)
    tiles = triton.cdiv(rows, config.rows) + (branches if own else 0)
    if rows == 0 or n == 0:
        return
    launch(
        product_kernel,
        (tiles * triton.cdiv(n, config.columns), 1 if own else branches),
        first.tensor,
        first.row,
        first.branch,
        0 if second is None else distance(first.tensor, second.tensor),
        0 if second is None else second.row,
        weight,
        weight.shape[-2] * weight.shape[-1],
        w_k,
        w_n,
        weight if bias is None else bias,
        out,
        out_row or n,
        out_branch,
        out if argument is None else argument,
        offsets,
        rows,
        M=branches,
        M_PADDED=padded(branches),
        K1=first.width,
        K2=0 if second is None else second.width,
        N=n,
        OWN=own,
        HAS_BIAS=bias is not None,
        HAS_ARGUMENT=argument is not None,
        ACCUMULATE=accumulate,
        ROUND=foreign_bfloat16 and first.tensor.dtype != torch.bfloat16,
        ACTIVATION=activation,
        PRECISION=dot_precision(first.tensor.dtype),
        ROWS=config.rows,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
