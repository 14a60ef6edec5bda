"""Factors of foreign products in another type: int8 and float8 with a scale per row, bfloat16 as it is.

Dynamic quantisation of both factors (W8A8 where the type has 8 bits), as saml_kernels.reference.round_to: a scale takes
the row's largest magnitude to the type's largest value. Quantised rows are padded with zeros to whole vectors.
"""

import triton
import triton.language as tl


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
def largest_magnitude(x, axis: tl.constexpr):
    """The largest |x| along an axis, infinity where x has a NaN, which tl.max would pass over."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis)


@triton.jit
def scale_of(magnitude, LARGEST: tl.constexpr):
    """magnitude / LARGEST, 1 for zeros; NaN for infinity, so that the product is NaN whatever its factors are."""
    finite = tl.where(magnitude == float("inf"), float("nan"), magnitude)
    return tl.where(magnitude > 0, tl.div_rn(finite, tl.zeros_like(magnitude) + LARGEST), 1.0)


@triton.jit
def load_pair(STAGE: tl.constexpr, pointers, first_row, second_row, row_mask, k):
    """(rows, columns) of [A1 ; A2] in float32, zero outside."""
    mask = row_mask[:, None] & (k < STAGE.k1)[None, :]
    x = tl.load(pointers.first[0] + first_row[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if STAGE.k2 > 0:
        mask = row_mask[:, None] & ((k >= STAGE.k1) & (k < STAGE.k1 + STAGE.k2))[None, :]
        place = pointers.second[0] + second_row[:, None] + (k - STAGE.k1)[None, :]
        x += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def quantize_rows(STAGE: tl.constexpr, pointers, item, batch):
    """An item's rows of [A1 ; A2] quantised, each with its scale."""
    rows: tl.constexpr = STAGE.tile.rows
    block_k: tl.constexpr = STAGE.tile.columns
    view = (item.part % STAGE.views).to(tl.int64)
    begin = item.first + (item.part // STAGE.views) * STAGE.tile.item_rows
    for done in range(0, STAGE.tile.item_rows, rows):
        row = begin + done + tl.arange(0, rows)
        row_mask = row < item.end
        first_row = row
        second_row = row
        if STAGE.first.gathered:
            first_row = tl.load(batch.permutation + row, mask=row_mask, other=0)
        if STAGE.second.gathered:
            second_row = tl.load(batch.permutation + row, mask=row_mask, other=0)
        first_row = first_row * STAGE.first.stride + view * STAGE.first.branch_stride
        if STAGE.k2 > 0:
            second_row = second_row * STAGE.second.stride
        factor = tl.zeros((rows,), tl.float32) + 1.0
        if STAGE.largest > 0:
            magnitude = tl.zeros((rows,), tl.float32)
            for block in range(0, STAGE.width, block_k):
                k = item.zero + block + tl.arange(0, block_k)
                x = load_pair(STAGE, pointers, first_row, second_row, row_mask, k)
                magnitude = tl.maximum(magnitude, largest_magnitude(x, 1))
            factor = scale_of(magnitude, STAGE.largest)
            tl.store(pointers.scale[0] + row * STAGE.views + view, factor, mask=row_mask)
        out_row = row * (STAGE.views * STAGE.width) + view * STAGE.width
        for block in range(0, STAGE.width, block_k):
            k = item.zero + block + tl.arange(0, block_k)
            x = load_pair(STAGE, pointers, first_row, second_row, row_mask, k)
            quantized = scaled(x, factor[:, None], STAGE.largest, pointers.quantized[0].dtype.element_ty)
            place = pointers.quantized[0] + out_row[:, None] + k[None, :]
            tl.store(place, quantized, mask=row_mask[:, None] & (k < STAGE.width)[None, :])


@triton.jit
def quantize_weight_kernel(
    w,
    quantized,
    scale,
    K: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W (M, K, N) → Ŵ (M, N, WIDTH), k contiguous as 8-bit tensor cores want it, and scales (M, N)."""
    branch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w += branch * (K * N)
    factor = tl.zeros((BLOCK_N,), tl.float32) + 1.0
    if LARGEST > 0:
        magnitude = tl.zeros((BLOCK_N,), tl.float32)
        for block in range(0, K, BLOCK_K):
            k = block + tl.arange(0, BLOCK_K)
            x = tl.load(w + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
            magnitude = tl.maximum(magnitude, largest_magnitude(x.to(tl.float32), 0))
        factor = scale_of(magnitude, LARGEST)
        tl.store(scale + branch * N + n, factor, mask=n < N)
    for block in range(0, WIDTH, BLOCK_K):
        k = block + tl.arange(0, BLOCK_K)
        x = tl.load(w + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        value = scaled(x.to(tl.float32), factor[None, :], LARGEST, quantized.dtype.element_ty)
        place = quantized + branch * (N * WIDTH) + k[:, None] + n[None, :] * WIDTH
        tl.store(place, value, mask=(k < WIDTH)[:, None] & (n < N)[None, :])
