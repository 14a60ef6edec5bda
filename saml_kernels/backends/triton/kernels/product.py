"""A tile of a product with its epilogue: a layer δ(bias + [A1 ; A2] W), or dgrad (addend + [A1 ; A2] Wᵀ) ∘ δ'(z);
of a gate γ δ(z) ∘ gated, and its gradients.

Both factors of a concatenation run through one loop over k: the pipeline of loads does not run dry between them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.activations import activate, activate_backward
from saml_kernels.backends.triton.kernels.values import divides, exists, pointer, possible, value, varies


class Place(NamedTuple):
    """The tile of an item's result."""

    branch: Any
    """int64."""
    row: Any
    """(BLOCK_M,) int64, sorted rows, the item's last one at most."""
    caller: Any
    """(BLOCK_M,) the same in the caller's order; row where no operand is gathered."""
    row_mask: Any
    """(BLOCK_M,) False behind the item's last row."""
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
    # Rows behind the last are the last again: to read them needs no mask, and nobody stores what comes of them.
    row = tl.minimum(row, item.end - 1)
    caller = row
    if GATHERED:
        caller = tl.load(batch.permutation + row)
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
    if exists(STAGE.first.k) or exists(STAGE.second.k):
        total = add_product(STAGE, TRANSPOSED, pointers, stage, place, N, total)
    return total


@triton.jit
def factor_rows(FACTOR: tl.constexpr, stage, place):
    """(BLOCK_M,) elements before each row of A."""
    start = place.branch * value(FACTOR.rows.branch_stride, stage)
    return start + row_offset(FACTOR.rows, stage, place.row, place.caller)


@triton.jit
def factor_lines(FACTOR: tl.constexpr, stage, place, line):
    """Elements before lines of W."""
    start = place.branch * value(FACTOR.weight.branch_stride, stage) + value(FACTOR.weight.start, stage)
    return start + line.to(tl.int64) * value(FACTOR.weight.stride, stage)


@triton.jit
def elements_between(first, second):
    """From one tensor to another. A choice of pointers would not be known to be aligned."""
    bytes_each: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
    return (second.to(tl.int64) - first.to(tl.int64)) // bytes_each


@triton.constexpr_function
def whole_steps(stage: Any) -> bool:
    """Whether every step over k is a whole one."""
    return divides(stage.tile.block_k, stage.first.k) and divides(stage.tile.block_k, stage.second.k)


@triton.jit
def add_product(STAGE: tl.constexpr, TRANSPOSED: tl.constexpr, pointers, stage, place, N, total):
    """total + [A1 ; A2] W, or Wᵀ.

    Addresses move on from step to step, and behind the last step of the first factors to the second ones: of W there is
    one, whose lines go on; of Wᵀ there may be two.
    """
    BLOCK_K: tl.constexpr = STAGE.tile.block_k
    VECTOR: tl.constexpr = STAGE.tile.vector
    two: tl.constexpr = exists(STAGE.second.k)
    K1 = value(STAGE.first.k, stage)
    K2 = value(STAGE.second.k, stage)
    steps_1 = (K1 + BLOCK_K - 1) // BLOCK_K
    steps = steps_1 + (K2 + BLOCK_K - 1) // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    a = pointer(pointers.first, STAGE.given.first, stage, VECTOR)
    w = pointer(pointers.first_weight, STAGE.given.first_weight, stage, VECTOR)
    a_row = factor_rows(STAGE.first, stage, place)
    w_stride = value(STAGE.first.weight.stride, stage)
    if TRANSPOSED:
        w_line = factor_lines(STAGE.first, stage, place, place.n)
        w_place = w + (w_line[None, :] + k[:, None])
    else:
        w_place = w + (factor_lines(STAGE.first, stage, place, k)[:, None] + place.n[None, :])
    a_place = a + (a_row[:, None] + k[None, :])
    if two:
        a2 = pointer(pointers.second, STAGE.given.second, stage, VECTOR)
        a_jump = elements_between(a, a2) + factor_rows(STAGE.second, stage, place) - a_row
        if TRANSPOSED:
            w2 = pointer(pointers.second_weight, STAGE.given.second_weight, stage, VECTOR)
            w_jump = elements_between(w, w2) + factor_lines(STAGE.second, stage, place, place.n) - w_line
        if possible(STAGE.first.k, 0):
            a_place += (tl.where(steps_1 == 0, a_jump // VECTOR, 0) * VECTOR)[:, None]
            if TRANSPOSED:
                w_place += (tl.where(steps_1 == 0, w_jump // VECTOR, 0) * VECTOR)[None, :]
        # In vectors, from the last step of the first factors.
        a_jump = (a_jump - (steps_1 - 1) * BLOCK_K) // VECTOR
        if TRANSPOSED:
            w_jump = (w_jump - (steps_1 - 1) * BLOCK_K) // VECTOR
    left = tl.where(steps_1 > 0, K1, K2)
    for step in range(0, steps):
        if whole_steps(STAGE):
            a_tile = tl.load(a_place)
            if divides(STAGE.tile.block_n, STAGE.n):
                w_tile = tl.load(w_place)
            else:
                w_tile = tl.load(w_place, mask=(place.n < N)[None, :], other=0.0)
        else:
            a_tile = tl.load(a_place, mask=(k < left)[None, :], other=0.0)
            w_tile = tl.load(w_place, mask=(k < left)[:, None] & (place.n < N)[None, :], other=0.0)
        total = tl.dot(a_tile, w_tile, total, input_precision=STAGE.tile.precision)
        lines = tl.full((), BLOCK_K, tl.int32)
        if two:
            ends = step == steps_1 - 1
            # Written as a product, the compiler sees that addresses stay multiples of a vector.
            a_place += (tl.where(ends, a_jump, BLOCK_K // VECTOR) * VECTOR)[:, None]
            if TRANSPOSED:
                w_place += (tl.where(ends, w_jump, BLOCK_K // VECTOR) * VECTOR)[None, :]
            elif not whole_steps(STAGE):
                lines = tl.where(ends, left, BLOCK_K)
            left = tl.where(ends, K2, left - BLOCK_K)
        else:
            a_place += BLOCK_K
            left -= BLOCK_K
            if TRANSPOSED:
                w_place += BLOCK_K
        if not TRANSPOSED:
            w_place += lines.to(tl.int64) * w_stride
    return total


@triton.jit
def own_rows(batch, place):
    """(BLOCK_M,) whether the branch is the row's own: two bounds, as rows are sorted."""
    start = tl.load(batch.offsets + place.branch) - batch.row0
    end = tl.load(batch.offsets + place.branch + 1) - batch.row0
    return (place.row - start).to(tl.uint64) < (end - start).to(tl.uint64)


@triton.jit
def layer(STAGE: tl.constexpr, pointers, item, batch):
    """out = δ(z), or γ δ(z) ∘ gated, z = bias + [A1 ; A2] W; own rows of δ(z) and z where backward needs them."""
    stage = item.stage
    gathered: tl.constexpr = (
        possible(STAGE.first.rows.gathered)
        or possible(STAGE.second.rows.gathered)
        or possible(STAGE.out.gathered)
        or possible(STAGE.saved.gathered)
        or possible(STAGE.gated.gathered)
    )
    place = place_of(STAGE, gathered, item, batch)
    N = value(STAGE.n, stage)
    saves: tl.constexpr = possible(STAGE.saved.present) or possible(STAGE.preact.present)
    z = product(STAGE, False, pointers, stage, place, N)
    inside = result_mask(STAGE, N, place)
    own = inside
    if saves:
        own = inside & (own_rows(batch, place) | (value(STAGE.every_row_is_own, stage) == 1))[:, None]
    bias = pointer(pointers.bias, STAGE.given.bias, stage, STAGE.tile.vector)
    z += tl.load(bias + place.branch * N + place.n, mask=place.n < N, other=0.0).to(tl.float32)[None, :]
    if possible(STAGE.preact.present):
        preact = pointer(pointers.preact, STAGE.given.preact, stage, STAGE.tile.vector)
        keep = own & (value(STAGE.preact.present, stage) == 1)
        tl.store(preact + result_offset(STAGE, STAGE.preact, stage, place), z, mask=keep)
    v = activate(STAGE.activation, stage, z)
    if possible(STAGE.saved.present):
        saved = pointer(pointers.saved, STAGE.given.saved, stage, STAGE.tile.vector)
        keep = own & (value(STAGE.saved.present, stage) == 1)
        tl.store(saved + result_offset(STAGE, STAGE.saved, stage, place), v, mask=keep)
    if possible(STAGE.gated.present):
        gated = pointer(pointers.gated, STAGE.given.gated, stage, STAGE.tile.vector)
        offset = result_offset(STAGE, STAGE.gated, stage, place)
        v *= STAGE.gate_scale * tl.load(gated + offset, mask=inside, other=0.0).to(tl.float32)
    out = pointer(pointers.out, STAGE.given.out, stage, STAGE.tile.vector)
    tl.store(out + result_offset(STAGE, STAGE.out, stage, place), v, mask=inside)


@triton.jit
def input_gradient(STAGE: tl.constexpr, pointers, item, batch):
    """out = dz = (addend + [A1 ; A2] Wᵀ) ∘ δ'(z), from the saved δ(z) or the preactivation z; of a gate d_gated too."""
    stage = item.stage
    gathered: tl.constexpr = (
        possible(STAGE.first.rows.gathered)
        or possible(STAGE.second.rows.gathered)
        or possible(STAGE.addend.gathered)
        or possible(STAGE.saved.gathered)
        or possible(STAGE.out.gathered)
        or possible(STAGE.gated.gathered)
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
    if possible(STAGE.gated.present):
        dv *= STAGE.gate_scale
        d_gated = pointer(pointers.d_gated, STAGE.given.d_gated, stage, STAGE.tile.vector)
        tl.store(d_gated + result_offset(STAGE, STAGE.d_gated, stage, place), dv * v, mask=inside)
        gated = pointer(pointers.gated, STAGE.given.gated, stage, STAGE.tile.vector)
        offset = result_offset(STAGE, STAGE.gated, stage, place)
        dv *= tl.load(gated + offset, mask=inside, other=0.0).to(tl.float32)
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
    foreign = result_mask(STAGE, N, place) & ~own_rows(batch, place)[:, None]
    out = pointer(pointers.out, STAGE.given.out, stage, STAGE.tile.vector)
    v = activate(STAGE.activation, stage, z)
    tl.store(out + result_offset(STAGE, STAGE.out, stage, place), v, mask=foreign)
