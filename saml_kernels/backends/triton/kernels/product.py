"""A tile of a product with its epilogue: a layer δ(bias + [A1 ; A2] W), or dgrad (addend + [A1 ; A2] Wᵀ) ∘ δ'(z).

Both factors of a concatenation run through one loop over k: two loops would take twice the shared memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.activations import activate, activate_backward
from saml_kernels.backends.triton.kernels.scenario_tiles import scenario_of
from saml_kernels.backends.triton.kernels.values import alone, exists, pointer, possible, value, varies


class Place(NamedTuple):
    """The tile of an item's result."""

    branch: Any
    """int64."""
    row: Any
    """(BLOCK_M,) int64, sorted rows."""
    caller: Any
    """(BLOCK_M,) the same in the caller's order; row where no operand is gathered."""
    row_mask: Any
    column_tile: Any
    n: Any
    """(BLOCK_N,) columns."""


@triton.jit
def place_of(STAGE: tl.constexpr, GATHERED: tl.constexpr, item, batch):
    """Which branch, rows and columns an item is for."""
    column_tiles = value(STAGE.tile.column_tiles, item.stage)
    column_tile = item.part % column_tiles
    first = item.first
    if STAGE.tile.row_parts > 1:
        first += (item.part // column_tiles % STAGE.tile.row_parts) * STAGE.tile.block_m
    branch = item.scenario
    if value(STAGE.own, item.stage) == 0:
        branch = item.part // (column_tiles * STAGE.tile.row_parts)
    row = first.to(tl.int64) + tl.arange(0, STAGE.tile.block_m)
    row_mask = row < item.end
    caller = row
    if GATHERED:
        caller = tl.load(batch.permutation + row, mask=row_mask, other=0)
    n = column_tile * STAGE.tile.block_n + tl.arange(0, STAGE.tile.block_n)
    return Place(branch.to(tl.int64), row, caller, row_mask, column_tile, n)


@triton.jit
def row_offset(ROWS: tl.constexpr, stage, sorted_row, caller):
    """Elements before each row of an operand."""
    row = sorted_row
    if varies(ROWS.gathered):
        row = tl.where(value(ROWS.gathered, stage) == 1, caller, sorted_row)
    elif ROWS.gathered:
        row = caller
    return row * value(ROWS.stride, stage)


@triton.jit
def result_offset(STAGE: tl.constexpr, ROWS: tl.constexpr, stage, place):
    """Elements before each place of a (B, n) or (B, M, n) operand's tile.

    Columns count from the tile's first, so that the compiler finds constant distances between addresses.
    """
    first_column = (place.column_tile * STAGE.tile.block_n).to(tl.int64)
    start = place.branch * value(ROWS.branch_stride, stage) + first_column
    return (row_offset(ROWS, stage, place.row, place.caller) + start)[:, None] + tl.arange(0, STAGE.tile.block_n)[
        None, :
    ]


@triton.jit
def result_mask(STAGE: tl.constexpr, N, place):
    columns = tl.arange(0, STAGE.tile.block_n)
    return place.row_mask[:, None] & (columns < N - place.column_tile * STAGE.tile.block_n)[None, :]


@triton.jit
def product(STAGE: tl.constexpr, TRANSPOSED: tl.constexpr, pointers, stage, place, N):
    """[A1 ; A2] W, or Wᵀ: the float32 sum of a tile, (BLOCK_M, BLOCK_N); zeros without factors."""
    total = tl.zeros((STAGE.tile.block_m, STAGE.tile.block_n), tl.float32)
    if exists(STAGE.first.k):
        total = add_product(STAGE, TRANSPOSED, pointers, stage, place, N, total)
    return total


@triton.jit
def add_product(STAGE: tl.constexpr, TRANSPOSED: tl.constexpr, pointers, stage, place, N, total):
    """total + [A1 ; A2] W, or Wᵀ."""
    K1 = value(STAGE.first.k, stage)
    K2 = value(STAGE.second.k, stage)
    a = pointer(pointers.first, STAGE.given.first, stage, STAGE.tile.vector)
    w = pointer(pointers.first_weight, STAGE.given.first_weight, stage, STAGE.tile.vector)
    a1_start = place.branch * value(STAGE.first.rows.branch_stride, stage)
    a1_row = row_offset(STAGE.first.rows, stage, place.row, place.caller)
    w1_start = place.branch * value(STAGE.first.weight.branch_stride, stage) + value(STAGE.first.weight.start, stage)
    w1_step = value(STAGE.first.weight.stride, stage)
    steps_1 = (K1 + STAGE.tile.block_k - 1) // STAGE.tile.block_k
    steps_2 = (K2 + STAGE.tile.block_k - 1) // STAGE.tile.block_k
    two: tl.constexpr = exists(STAGE.second.k)
    if two:
        # One base and a choice of offsets: a choice of pointers would not be known to be aligned.
        a2 = pointer(pointers.second, STAGE.given.second, stage, STAGE.tile.vector)
        w2 = pointer(pointers.second_weight, STAGE.given.second_weight, stage, STAGE.tile.vector)
        bytes_each: tl.constexpr = a.dtype.element_ty.primitive_bitwidth // 8
        a2_start = (a2.to(tl.int64) - a.to(tl.int64)) // bytes_each
        w2_start = (w2.to(tl.int64) - w.to(tl.int64)) // bytes_each
        w2_start += place.branch * value(STAGE.second.weight.branch_stride, stage)
        w2_start += value(STAGE.second.weight.start, stage)
        a2_row = row_offset(STAGE.second.rows, stage, place.row, place.caller)
        w2_step = value(STAGE.second.weight.stride, stage)
    for step in range(0, steps_1 + steps_2):
        k0 = step * STAGE.tile.block_k
        width = K1
        a_start = a1_start
        a_row = a1_row
        w_start = w1_start
        w_step = w1_step
        if two:
            of_second = step >= steps_1
            k0 = tl.where(of_second, step - steps_1, step) * STAGE.tile.block_k
            width = tl.multiple_of(tl.where(of_second, K2, K1), STAGE.tile.vector)
            a_start = tl.multiple_of(tl.where(of_second, a2_start, a1_start), STAGE.tile.vector)
            a_row = tl.where(of_second, a2_row, a1_row)
            w_start = tl.multiple_of(tl.where(of_second, w2_start, w1_start), STAGE.tile.vector)
            w_step = tl.multiple_of(tl.where(of_second, w2_step, w1_step), STAGE.tile.vector)
        k = k0 + tl.arange(0, STAGE.tile.block_k)
        a_tile = tl.load(
            a + (a_start + a_row[:, None] + k[None, :]),
            mask=place.row_mask[:, None] & (k < width)[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            w_index = (place.n.to(tl.int64) * w_step)[None, :] + k[:, None]
        else:
            w_index = (k.to(tl.int64) * w_step)[:, None] + place.n[None, :]
        w_tile = tl.load(w + (w_start + w_index), mask=(k < width)[:, None] & (place.n < N)[None, :], other=0.0)
        total = tl.dot(a_tile, w_tile, total, input_precision=STAGE.tile.precision)
    return total


@triton.jit
def own_rows(STAGE: tl.constexpr, stage, item, batch, place):
    """(BLOCK_M,) whether the branch is the row's own."""
    if possible(STAGE.own, 0):
        scenario = scenario_of(batch, batch.row0 + place.row, STAGE.num_scenarios)
    else:
        scenario = tl.zeros((STAGE.tile.block_m,), tl.int32) + item.scenario
    return (scenario == place.branch) | (value(STAGE.every_row_is_own, stage) == 1)


@triton.jit
def layer(STAGE: tl.constexpr, pointers, item, batch):
    """out = δ(z), z = bias + [A1 ; A2] W; own rows of δ(z) and z besides, where backward needs them."""
    stage = item.stage
    gathered: tl.constexpr = (
        possible(STAGE.first.rows.gathered)
        or possible(STAGE.second.rows.gathered)
        or possible(STAGE.out.gathered)
        or possible(STAGE.saved.gathered)
    )
    place = place_of(STAGE, gathered, item, batch)
    N = value(STAGE.n, stage)
    saves: tl.constexpr = possible(STAGE.saved.present) or possible(STAGE.preact.present)
    own = place.row_mask
    # Before the loop over k it takes fewer registers where numbers are constants, behind it where they are not:
    # 126 for 144 on sm_90 in the first case, no spill for 80 bytes in the second.
    if saves and alone(STAGE):
        own = own_rows(STAGE, stage, item, batch, place)
    z = product(STAGE, False, pointers, stage, place, N)
    bias = pointer(pointers.bias, STAGE.given.bias, stage, STAGE.tile.vector)
    z += tl.load(bias + place.branch * N + place.n, mask=place.n < N, other=0.0).to(tl.float32)[None, :]
    inside = result_mask(STAGE, N, place)
    if saves and not alone(STAGE):
        own = own_rows(STAGE, stage, item, batch, place)
    own = inside & own[:, None]
    if possible(STAGE.preact.present):
        preact = pointer(pointers.preact, STAGE.given.preact, stage, STAGE.tile.vector)
        keep = own & (value(STAGE.preact.present, stage) == 1)
        tl.store(preact + result_offset(STAGE, STAGE.preact, stage, place), z, mask=keep)
    v = activate(STAGE.activation, stage, z)
    if possible(STAGE.saved.present):
        saved = pointer(pointers.saved, STAGE.given.saved, stage, STAGE.tile.vector)
        keep = own & (value(STAGE.saved.present, stage) == 1)
        tl.store(saved + result_offset(STAGE, STAGE.saved, stage, place), v, mask=keep)
    out = pointer(pointers.out, STAGE.given.out, stage, STAGE.tile.vector)
    tl.store(out + result_offset(STAGE, STAGE.out, stage, place), v, mask=inside)


@triton.jit
def input_gradient(STAGE: tl.constexpr, pointers, item, batch):
    """out = dz = (addend + [A1 ; A2] Wᵀ) ∘ δ'(z), from the saved δ(z) or the preactivation z."""
    stage = item.stage
    gathered: tl.constexpr = (
        possible(STAGE.first.rows.gathered)
        or possible(STAGE.second.rows.gathered)
        or possible(STAGE.addend.gathered)
        or possible(STAGE.saved.gathered)
        or possible(STAGE.out.gathered)
    )
    place = place_of(STAGE, gathered, item, batch)
    N = value(STAGE.n, stage)
    dv = product(STAGE, True, pointers, stage, place, N)
    inside = result_mask(STAGE, N, place)
    if possible(STAGE.addend.present):
        offset = result_offset(STAGE, STAGE.addend, stage, place)
        if possible(STAGE.addend_float32, False):
            addend = pointer(pointers.addend, STAGE.given.addend, stage, STAGE.tile.vector)
            here = (value(STAGE.addend.present, stage) == 1) & (value(STAGE.addend_float32, stage) == 0)
            dv += tl.load(addend + offset, mask=inside & here, other=0.0).to(tl.float32)
        if possible(STAGE.addend_float32):
            addend = pointer(pointers.addend_float32, STAGE.given.addend_float32, stage, STAGE.tile.vector)
            here = (value(STAGE.addend.present, stage) == 1) & (value(STAGE.addend_float32, stage) == 1)
            dv += tl.load(addend + offset, mask=inside & here, other=0.0)
    v = dv
    if possible(STAGE.saved.present):
        saved = pointer(pointers.saved, STAGE.given.saved, stage, STAGE.tile.vector)
        here = inside & (value(STAGE.saved.present, stage) == 1)
        v = tl.load(saved + result_offset(STAGE, STAGE.saved, stage, place), mask=here, other=0.0).to(tl.float32)
    z = v
    if possible(STAGE.preact.present):
        preact = pointer(pointers.preact, STAGE.given.preact, stage, STAGE.tile.vector)
        here = inside & (value(STAGE.preact.present, stage) == 1)
        z = tl.load(preact + result_offset(STAGE, STAGE.preact, stage, place), mask=here, other=0.0).to(tl.float32)
    dz = activate_backward(STAGE.activation, stage, dv, v, z)
    offset = result_offset(STAGE, STAGE.out, stage, place)
    if possible(STAGE.out_float32):
        out = pointer(pointers.out_float32, STAGE.given.out_float32, stage, STAGE.tile.vector)
        tl.store(out + offset, dz, mask=inside & (value(STAGE.out_float32, stage) == 1))
    if possible(STAGE.out_float32, False):
        out = pointer(pointers.out, STAGE.given.out, stage, STAGE.tile.vector)
        tl.store(out + offset, dz, mask=inside & (value(STAGE.out_float32, stage) == 0))


@triton.jit
def quantized_layer(STAGE: tl.constexpr, pointers, item, batch):
    """out = δ(bias + s_row s_column (Â Ŵ)) where the branch is foreign to the row."""
    stage = item.stage
    place = place_of(STAGE, possible(STAGE.out.gathered), item, batch)
    N = value(STAGE.n, stage)
    K = value(STAGE.k, stage)
    # Quantised rows start at whole vectors and are padded to them.
    a = pointer(pointers.rows, STAGE.given.rows, stage, 16)
    w = pointer(pointers.weight, STAGE.given.weight, stage, 16)
    a += place.branch * value(STAGE.rows.branch_stride, stage)
    w += place.branch * (value(STAGE.n, stage) * K)
    a_row = place.row * value(STAGE.rows.stride, stage)
    if STAGE.scaled and a.dtype.element_ty == tl.int8:
        total = tl.zeros((STAGE.tile.block_m, STAGE.tile.block_n), tl.int32)
    else:
        total = tl.zeros((STAGE.tile.block_m, STAGE.tile.block_n), tl.float32)
    nothing = tl.zeros((), tl.float32).to(a.dtype.element_ty)
    for k0 in range(0, K, STAGE.tile.block_k):
        k = k0 + tl.arange(0, STAGE.tile.block_k)
        a_mask = place.row_mask[:, None] & (k < K)[None, :]
        a_tile = tl.load(a + (a_row[:, None] + k[None, :]), mask=a_mask, other=nothing)
        w_index = (place.n.to(tl.int64) * K)[None, :] + k[:, None]
        w_tile = tl.load(w + w_index, mask=(k < K)[:, None] & (place.n < N)[None, :], other=nothing)
        total = tl.dot(a_tile, w_tile, total, out_dtype=total.dtype)
    z = total.to(tl.float32)
    if STAGE.scaled:
        row_scale = pointer(pointers.scale, STAGE.given.scale, stage, 1)
        column_scale = pointer(pointers.weight_scale, STAGE.given.weight_scale, stage, 1)
        shared = value(STAGE.rows.branch_stride, stage) == 0
        row_scale += tl.where(shared, place.row, place.row * STAGE.num_scenarios + place.branch)
        z *= tl.load(row_scale, mask=place.row_mask, other=0.0)[:, None]
        z *= tl.load(column_scale + place.branch * N + place.n, mask=place.n < N, other=0.0)[None, :]
    bias = pointer(pointers.bias, STAGE.given.bias, stage, STAGE.tile.vector)
    z += tl.load(bias + place.branch * N + place.n, mask=place.n < N, other=0.0).to(tl.float32)[None, :]
    scenario = scenario_of(batch, batch.row0 + place.row, STAGE.num_scenarios)
    foreign = result_mask(STAGE, N, place) & (scenario != place.branch)[:, None]
    out = pointer(pointers.out, STAGE.given.out, stage, STAGE.tile.vector)
    v = activate(STAGE.activation, stage, z)
    tl.store(out + result_offset(STAGE, STAGE.out, stage, place), v, mask=foreign)
