"""Factors of foreign products rounded to another type: int8 and float8 with a scale per row, bfloat16 as it is.

As saml_kernels.reference.round_to: a scale takes the row's largest magnitude to the type's largest value. Rounded rows
are padded with zeros to whole vectors. Weights are rounded in every call that uses them: what changes a weight without
leaving a trace on the host (a replayed CUDA graph, an edit through ``.data``) can then not leave a stale copy behind.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saml_kernels.backends.triton.launching import launch
from saml_kernels.reference import SCALED_DTYPES

PADDING = 16
"""Rounded rows are as long as a multiple of this."""

# Addresses of a stage that rounds rows.
FIRST = tl.constexpr(0)
SECOND = tl.constexpr(1)
SCALE = tl.constexpr(3)
ROUNDED = tl.constexpr(5)


def padded_width(width: int) -> int:
    """Length of a rounded row."""
    return -(-width // PADDING) * PADDING


def largest(dtype: torch.dtype) -> float:
    """The type's largest value; 0 where nothing is scaled."""
    return SCALED_DTYPES.get(dtype, 0.0)


@triton.jit
def scaled(x, scale, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """x / scale in the rounded type."""
    if LARGEST == 0:
        return x.to(dtype)
    else:
        value = tl.div_rn(x, scale)
        if dtype == tl.int8:
            # Adding 1.5 · 2^23 leaves no bit below the unit: rounds to the nearest, ties to the even.
            value = (value + 12582912.0) - 12582912.0
        value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
        return value.to(dtype)


@triton.jit
def scale_of(magnitude, LARGEST: tl.constexpr):
    """magnitude / LARGEST, 1 for zeros."""
    return tl.where(magnitude > 0, tl.div_rn(magnitude, magnitude * 0 + LARGEST), 1.0)


@triton.jit
def load_pair(first, second, first_row, second_row, live, k, K1: tl.constexpr, K2: tl.constexpr):
    """(rows, columns) of [first ; second] in float32, zero outside."""
    x = tl.load(first + first_row[:, None] + k[None, :], mask=live[:, None] & (k < K1)[None, :], other=0.0)
    x = x.to(tl.float32)
    if K2 > 0:
        in_second = (k >= K1) & (k < K1 + K2)
        place = second + second_row[:, None] + (k - K1)[None, :]
        x += tl.load(place, mask=live[:, None] & in_second[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def round_rows_group(
    first,
    second,
    rounded,
    scale,
    first_row,
    second_row,
    rounded_row,
    scale_row,
    live,
    zero,
    K1: tl.constexpr,
    K2: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows of [first ; second] rounded, each with its scale."""
    factor = tl.zeros((ROWS,), tl.float32) + 1.0
    if LARGEST > 0:
        magnitude = tl.zeros((ROWS,), tl.float32)
        for block in range(0, WIDTH, COLUMNS):
            x = load_pair(first, second, first_row, second_row, live, zero + block + tl.arange(0, COLUMNS), K1, K2)
            magnitude = tl.maximum(magnitude, tl.max(tl.abs(x), 1))
        factor = scale_of(magnitude, LARGEST)
        tl.store(scale + scale_row, factor, mask=live)
    for block in range(0, WIDTH, COLUMNS):
        k = zero + block + tl.arange(0, COLUMNS)
        x = load_pair(first, second, first_row, second_row, live, k, K1, K2)
        value = scaled(x, factor[:, None], LARGEST, rounded.dtype.element_ty)
        tl.store(rounded + rounded_row[:, None] + k[None, :], value, mask=live[:, None] & (k < WIDTH)[None, :])


@triton.jit
def round_weight_kernel(
    w,
    rounded,
    scale,
    K: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """W (M, K, N) → Ŵ (M, N, WIDTH), k contiguous as 8-bit tensor cores want it, and scales (M, N)."""
    branch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    w += branch * (K * N)
    factor = tl.zeros((COLUMNS,), tl.float32) + 1.0
    if LARGEST > 0:
        magnitude = tl.zeros((COLUMNS,), tl.float32)
        for block in range(0, K, DEPTH):
            k = block + tl.arange(0, DEPTH)
            x = tl.load(w + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
            magnitude = tl.maximum(magnitude, tl.max(tl.abs(x.to(tl.float32)), 0))
        factor = scale_of(magnitude, LARGEST)
        tl.store(scale + branch * N + n, factor, mask=n < N)
    for block in range(0, WIDTH, DEPTH):
        k = block + tl.arange(0, DEPTH)
        x = tl.load(w + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        value = scaled(x.to(tl.float32), factor[None, :], LARGEST, rounded.dtype.element_ty)
        place = rounded + branch * (N * WIDTH) + k[:, None] + n[None, :] * WIDTH
        tl.store(place, value, mask=(k < WIDTH)[:, None] & (n < N)[None, :])


def round_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W (M, K, N) → Ŵ (M, N, K padded) of ``dtype``, scales (M, N) float32 (not written for an unscaled type)."""
    branches, k, n = weight.shape
    rounded = weight.new_empty(branches, n, padded_width(k), dtype=dtype)
    scale = weight.new_empty(branches, n, dtype=torch.float32)
    columns = 32
    launch(
        round_weight_kernel,
        (triton.cdiv(n, columns), branches),
        weight,
        rounded,
        scale,
        K=k,
        N=n,
        WIDTH=rounded.shape[2],
        LARGEST=largest(dtype),
        COLUMNS=columns,
        DEPTH=64,
        num_warps=4,
    )
    return rounded, scale
