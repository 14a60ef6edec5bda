"""All weight and bias gradients of a backward in one launch: dW_k = Σ [A1 ; A2]ᵀ dz over scenario k's rows (wgrad).

Every program sums one tile of one weight over one chunk of one scenario's rows. A scenario with more rows than a chunk
has several; each leaves its sum in a scratch slot, and the last one to end adds them in order. So every place has one
writer, nothing adds atomically, one large scenario does not hold up the others, and bits are the same in every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.product import elements_between, row_offset
from saml_kernels.backends.triton.kernels.scenario_tiles import Batch, chunk_of_scenario
from saml_kernels.backends.triton.kernels.values import divides, exists, pointer, possible, stage_value, value


class Scratch(NamedTuple):
    """Where chunks leave their sums, and count themselves."""

    sums: Any
    counters: Any
    tile: Any
    """Number among the tiles of the launch."""


@triton.jit(do_not_specialize=["rows", "chunk"])
def weight_gradient_kernel(pointers, sums, permutation, offsets, counters, rows, chunk, LAUNCH: tl.constexpr):
    """One tile of one weight, or a stretch of its bias, over one chunk of rows."""
    batch = Batch(permutation, offsets, None, rows, 0, 1.0)
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
    """Σ dz over a chunk, (BLOCK_N,), float64: rows may cancel, and their sum is then small against its terms.

    Only blocks are added in float64: converting every element costs registers, which spill in a float32 launch.
    """
    total = tl.zeros((STAGE.tile.block_n,), tl.float64)
    for row0 in range(rows.first, rows.end, STAGE.tile.block_k):
        row = row0 + tl.arange(0, STAGE.tile.block_k)
        mask = (row < rows.end)[:, None] & (n < N)[None, :]
        part = tl.load(dz + (row * N)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(part, 0).to(tl.float64)
    return total


class FactorRows(NamedTuple):
    """Rows of A1, or of what a tile has of [A1 ; A2]."""

    start: Any
    """Elements before the branch's first row."""
    stride: Any
    gathered: Any
    """1 where they are in the caller's order."""


@triton.jit
def rows_of_tile(STAGE: tl.constexpr, weight, branch, to_second, row_tile):
    """Of the factor that the tile belongs to; of the first one where tiles have rows of both."""
    VECTOR: tl.constexpr = STAGE.tile.vector
    start = branch * value(STAGE.first.branch_stride, weight)
    stride = value(STAGE.first.stride, weight)
    gathered = value(STAGE.first.gathered, weight)
    if exists(STAGE.k2) and STAGE.whole_tiles:
        of_second = row_tile * STAGE.tile.block_m >= value(STAGE.k1, weight)
        # In vectors, so that the compiler sees that what is chosen is a multiple of one.
        start = tl.where(of_second, to_second // VECTOR, start // VECTOR) * VECTOR
        stride = tl.where(of_second, value(STAGE.second.stride, weight) // VECTOR, stride // VECTOR) * VECTOR
        gathered = tl.where(of_second, value(STAGE.second.gathered, weight), gathered)
    return FactorRows(start, stride, gathered)


@triton.jit
def sum_of_products(STAGE: tl.constexpr, pointers, weight, dz, K, N, k, n, row_tile, branch, rows, batch):
    """Σ [A1 ; A2]ᵀ dz over a chunk, (BLOCK_M, BLOCK_N).

    Addresses move on from step to step, but those of gathered rows.
    """
    BLOCK_K: tl.constexpr = STAGE.tile.block_k
    gathered: tl.constexpr = possible(STAGE.first.gathered) or possible(STAGE.second.gathered)
    mixed: tl.constexpr = exists(STAGE.k2) and not STAGE.whole_tiles
    whole_columns: tl.constexpr = divides(STAGE.tile.block_n, STAGE.n)
    whole_rows: tl.constexpr = divides(STAGE.tile.block_m, STAGE.k1) and divides(STAGE.tile.block_m, STAGE.k2)
    K1 = value(STAGE.k1, weight)
    a = pointer(pointers.first, STAGE.given.first, weight, STAGE.tile.vector)
    to_second = tl.zeros((), tl.int64)
    if exists(STAGE.k2):
        to_second += elements_between(a, pointer(pointers.second, STAGE.given.second, weight, STAGE.tile.vector)) - K1
    first = rows_of_tile(STAGE, weight, branch, to_second, row_tile)
    row = rows.first + tl.arange(0, BLOCK_K)
    a_place = a + (first.start + (row * first.stride)[:, None] + k[None, :])
    dz_place = dz + ((row * N)[:, None] + n[None, :])
    a_step = tl.zeros((), tl.int64) + first.stride
    dz_step = tl.zeros((), tl.int64) + N
    total = tl.zeros((STAGE.tile.block_m, STAGE.tile.block_n), tl.float32)
    following = row
    if gathered:
        following = tl.load(batch.permutation + row, mask=row < rows.end, other=0)
    for row0 in range(rows.first, rows.end, BLOCK_K):
        row = row0 + tl.arange(0, BLOCK_K)
        inside = row < rows.end
        if gathered or mixed:
            caller = row
            if gathered:
                # Read a step ahead: an address that waits for a load would hold up the pipeline of tiles.
                caller = following
                following = tl.load(batch.permutation + row + BLOCK_K, mask=row + BLOCK_K < rows.end, other=0)
            place = first.start + (tl.where(first.gathered == 1, caller, row) * first.stride)[:, None]
            if mixed:
                second_row = to_second + row_offset(STAGE.second, weight, row, caller)
                place = tl.where((k < K1)[None, :], place, second_row[:, None])
            a_place = a + (place + k[None, :])
        a_mask = inside[:, None]
        if not whole_rows:
            a_mask = a_mask & (k < K)[None, :]
        dz_mask = inside[:, None]
        if not whole_columns:
            dz_mask = dz_mask & (n < N)[None, :]
        a_tile = tl.load(a_place, mask=a_mask, other=0.0)
        dz_tile = tl.load(dz_place, mask=dz_mask, other=0.0)
        total = tl.dot(tl.trans(a_tile), dz_tile, total, input_precision=STAGE.tile.precision)
        a_place += a_step * BLOCK_K
        dz_place += dz_step * BLOCK_K
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
            whole = tl.zeros(total.shape, total.dtype)
            first_slot = slot - rows.number.to(tl.int64) * step
            for _ in range(0, rows.count):
                whole += tl.load(first_slot + place)
                first_slot += step
            tl.store(gradient, whole, mask=mask)
            tl.store(counter, 0)
