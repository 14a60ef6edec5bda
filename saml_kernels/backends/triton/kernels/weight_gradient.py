"""All weight and bias gradients of a backward in one launch: dW_k = Σ [A1 ; A2]ᵀ dz over scenario k's rows (wgrad).

Every program sums one tile of one weight over one chunk of one scenario's rows. A scenario with more rows than a chunk
has several; each leaves its sum in a scratch slot, and the last one to end adds them in order. So every place has one
writer, nothing adds atomically, one large scenario does not hold up the others, and bits are the same in every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.product import row_offset
from saml_kernels.backends.triton.kernels.scenario_tiles import Batch, chunk_of_scenario
from saml_kernels.backends.triton.kernels.values import exists, pointer, possible, stage_value, value


class Scratch(NamedTuple):
    """Where chunks leave their sums, and count themselves."""

    sums: Any
    counters: Any
    tile: Any
    """Number among the tiles of the launch."""


@triton.jit(do_not_specialize=["rows", "chunk"])
def weight_gradient_kernel(pointers, sums, permutation, offsets, counters, rows, chunk, LAUNCH: tl.constexpr):
    """One tile of one weight, or a stretch of its bias, over one chunk of rows."""
    batch = Batch(permutation, offsets, rows, 0, 1.0)
    tile = tl.program_id(0)
    weight = tl.zeros((), tl.int32)
    for s in tl.static_range(1, LAUNCH.stages):
        weight += (tile >= stage_value(LAUNCH.slots.first_tile, s)).to(tl.int32)
    by_scenario = value(LAUNCH.slots.by_scenario, weight)
    rows_of = chunk_of_scenario(batch, tl.program_id(1), chunk, by_scenario, LAUNCH.num_scenarios)
    if rows_of.scenario >= 0:
        inside = tile - value(LAUNCH.slots.first_tile, weight)
        for b in tl.static_range(len(LAUNCH.bodies)):
            if value(LAUNCH.slots.body, weight) == b:
                scratch = Scratch(sums, counters, tile)
                weight_gradient(LAUNCH.bodies[b].stage, LAUNCH, pointers[b], weight, inside, rows_of, batch, scratch)


@triton.jit
def weight_gradient(STAGE: tl.constexpr, LAUNCH: tl.constexpr, pointers, weight, inside, rows, batch, scratch):
    """The tile ``inside`` of a weight, or of its bias behind the last of them."""
    column_tiles = value(STAGE.tile.column_tiles, weight)
    row_tile = inside // column_tiles
    N = value(STAGE.n, weight)
    n = (inside % column_tiles) * STAGE.tile.block_n + tl.arange(0, STAGE.tile.block_n)
    branch = rows.scenario.to(tl.int64)
    dz = pointer(pointers.dz, STAGE.given.dz, weight, STAGE.tile.vector)
    if row_tile == value(STAGE.row_tiles, weight):
        bias_tile(STAGE, LAUNCH, pointers, weight, dz, N, n, branch, rows, scratch)
    else:
        weight_tile(STAGE, LAUNCH, pointers, weight, dz, N, n, row_tile, branch, rows, batch, scratch)


@triton.jit
def bias_tile(STAGE: tl.constexpr, LAUNCH: tl.constexpr, pointers, weight, dz, N, n, branch, rows, scratch):
    """Σ dz of a stretch of columns."""
    total = sum_of_dz(STAGE, dz, N, n, rows)
    d_bias = pointer(pointers.d_bias, STAGE.given.d_bias, weight, 1) + branch * N + n
    store_sum(d_bias, total, n < N, tl.arange(0, STAGE.tile.block_n), rows, scratch, LAUNCH)


@triton.jit
def weight_tile(
    STAGE: tl.constexpr, LAUNCH: tl.constexpr, pointers, weight, dz, N, n, row_tile, branch, rows, batch, scratch
):
    """Σ [A1 ; A2]ᵀ dz of a tile."""
    k = row_tile * STAGE.tile.block_m + tl.arange(0, STAGE.tile.block_m)
    K = value(STAGE.k1, weight) + value(STAGE.k2, weight)
    total = sum_of_products(STAGE, pointers, weight, dz, K, N, k, n, row_tile, branch, rows, batch)
    d_weight = pointer(pointers.d_weight, STAGE.given.d_weight, weight, STAGE.tile.vector) + branch * K * N
    d_weight += (k.to(tl.int64) * N)[:, None] + n[None, :]
    place = (tl.arange(0, STAGE.tile.block_m) * STAGE.tile.block_n)[:, None]
    place = place + tl.arange(0, STAGE.tile.block_n)[None, :]
    store_sum(d_weight, total, (k < K)[:, None] & (n < N)[None, :], place, rows, scratch, LAUNCH)


@triton.jit
def sum_of_dz(STAGE: tl.constexpr, dz, N, n, rows):
    """Σ dz over a chunk, (BLOCK_N,)."""
    total = tl.zeros((STAGE.tile.block_n,), tl.float32)
    for row0 in range(rows.first, rows.end, STAGE.tile.block_k):
        row = row0 + tl.arange(0, STAGE.tile.block_k)
        mask = (row < rows.end)[:, None] & (n < N)[None, :]
        total += tl.sum(tl.load(dz + (row * N)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32), 0)
    return total


@triton.jit
def sum_of_products(STAGE: tl.constexpr, pointers, weight, dz, K, N, k, n, row_tile, branch, rows, batch):
    """Σ [A1 ; A2]ᵀ dz over a chunk, (BLOCK_M, BLOCK_N)."""
    K1 = value(STAGE.k1, weight)
    a1 = pointer(pointers.first, STAGE.given.first, weight, STAGE.tile.vector)
    a1_start = branch * value(STAGE.first.branch_stride, weight)
    second_tile = row_tile * STAGE.tile.block_m >= K1
    if exists(STAGE.k2):
        bytes_each: tl.constexpr = a1.dtype.element_ty.primitive_bitwidth // 8
        a2 = pointer(pointers.second, STAGE.given.second, weight, STAGE.tile.vector)
        a2_start = (a2.to(tl.int64) - a1.to(tl.int64)) // bytes_each - K1
    total = tl.zeros((STAGE.tile.block_m, STAGE.tile.block_n), tl.float32)
    for row0 in range(rows.first, rows.end, STAGE.tile.block_k):
        row = row0 + tl.arange(0, STAGE.tile.block_k)
        row_mask = row < rows.end
        caller = row
        if possible(STAGE.first.gathered) or possible(STAGE.second.gathered):
            caller = tl.load(batch.permutation + row, mask=row_mask, other=0)
        place = a1_start + row_offset(STAGE.first, weight, row, caller)[:, None]
        if exists(STAGE.k2):
            other = a2_start + row_offset(STAGE.second, weight, row, caller)[:, None]
            if STAGE.whole_tiles:
                # A choice for the whole tile keeps the contiguity along k.
                place = tl.multiple_of(tl.where(second_tile, other, place), (1, STAGE.tile.vector))
            else:
                place = tl.where((k < K1)[None, :], place, other)
        a_tile = tl.load(a1 + (place + k[None, :]), mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
        mask = row_mask[:, None] & (n < N)[None, :]
        dz_tile = tl.load(dz + (row * N)[:, None] + n[None, :], mask=mask, other=0.0)
        total = tl.dot(tl.trans(a_tile), dz_tile, total, input_precision=STAGE.tile.precision)
    return total


@triton.jit
def store_sum(gradient, total, mask, place, rows, scratch, LAUNCH: tl.constexpr):
    """A chunk's sum to the gradient where it is the only one, else to its slot; the last chunk adds all, in order."""
    if rows.count == 1:
        tl.store(gradient, total, mask=mask)
    else:
        slot = scratch.sums + (rows.slot * LAUNCH.tiles + scratch.tile) * LAUNCH.tile_elements
        tl.store(slot + place, total)
        tl.debug_barrier()
        counter = scratch.counters + scratch.tile * LAUNCH.num_scenarios + rows.scenario
        if tl.atomic_add(counter, 1) == rows.count - 1:
            step: tl.constexpr = LAUNCH.tiles * LAUNCH.tile_elements
            whole = tl.zeros(total.shape, tl.float32)
            first_slot = slot - rows.number.to(tl.int64) * step
            for _ in range(0, rows.count):
                whole += tl.load(first_slot + place)
                first_slot += step
            tl.store(gradient, whole, mask=mask)
            tl.store(counter, 0)
