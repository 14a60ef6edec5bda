"""Sorted rows in tiles of one scenario: scenario k's rows are offsets[k] to offsets[k + 1].

Tiles are numbered scenario by scenario; there are at most cdiv(rows, BLOCK_M) + M of them, and tile u ends at row
(u + 1) · BLOCK_M at most. Rows count from ``batch.row0``, and ``batch.rows`` of them are there.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Batch(NamedTuple):
    """What a launch reads of the batch."""

    permutation: Any
    """(B,) int64: where each sorted row stands in the caller's order, from row0 on."""
    offsets: Any
    """(M + 1,) int64, of the whole batch."""
    bounds: Any
    """:class:`Bounds` of a launch whose tiles wait for each other."""
    rows: Any
    row0: Any
    inverse_temperature: Any


class Bounds(NamedTuple):
    """Scenarios as far as they are among the rows, (M padded,) int32 each: read once, kept in registers."""

    start: Any
    """First row."""
    stop: Any
    """Behind the last row."""
    first_tile: Any
    """Tiles of the scenarios before."""
    tiles: Any
    """Tiles of the scenario."""


@triton.constexpr_function
def padded(count: int, least: int = 1, most: int = 2**30) -> int:
    """The next power of two, as Triton's ranges want it."""
    return int(min(max(triton.next_power_of_2(count), least), most))


@triton.jit
def scenario_bounds(offsets, rows, row0, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """All scenarios' rows and tiles."""
    k = tl.arange(0, padded(M))
    start = tl.load(offsets + k, mask=k < M, other=0) - row0
    stop = tl.load(offsets + k + 1, mask=k < M, other=0) - row0
    start = tl.minimum(tl.maximum(start, 0), rows).to(tl.int32)
    stop = tl.minimum(tl.maximum(stop, 0), rows).to(tl.int32)
    tiles = (stop - start + (BLOCK_M - 1)) // BLOCK_M
    return Bounds(start, stop, tl.cumsum(tiles, 0) - tiles, tiles)


@triton.jit
def number_of_tiles(bounds):
    """Tiles of one scenario, of all scenarios together."""
    return tl.sum(bounds.tiles, 0)


@triton.jit
def scenario_tile(bounds, tile, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """(scenario, first row, end of the scenario's rows) of a tile. Past the last one the tile is empty."""
    here = (bounds.first_tile <= tile) & (tile < bounds.first_tile + bounds.tiles)
    scenario = tl.sum(tl.where(here, tl.arange(0, padded(M)), 0), 0)
    first = tl.sum(tl.where(here, bounds.start + (tile - bounds.first_tile) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(here, bounds.stop, 0), 0)
    return scenario, first.to(tl.int64), last.to(tl.int64)


@triton.jit
def tile_of_row(bounds, row, BLOCK_M: tl.constexpr):
    """The number of the tile, as scenario_tile counts them, that holds a row."""
    here = (bounds.start <= row) & (row < bounds.stop)
    tile = bounds.first_tile + (row.to(tl.int32) - bounds.start) // BLOCK_M
    return tl.sum(tl.where(here, tile, 0), 0)


@triton.jit
def scenario_of(batch, row, M: tl.constexpr):
    """The scenario of each of the sorted rows ``row``, which count from the whole batch's first."""
    k = tl.arange(0, padded(M))
    stop = tl.load(batch.offsets + k + 1, mask=k < M, other=0)
    passed = (row[:, None] >= stop[None, :]) & (k < M)[None, :]
    return tl.minimum(tl.sum(passed.to(tl.int32), 1), M - 1)


class Chunk(NamedTuple):
    """Some rows of one scenario whose sum one program takes."""

    scenario: Any
    """-1 past the last chunk."""
    first: Any
    end: Any
    number: Any
    """Number of the chunk among the scenario's."""
    count: Any
    """Chunks of the scenario."""
    slot: Any
    """Place of its sum, where the scenario has several chunks."""


@triton.jit
def chunk_of_scenario(batch, number, chunk, by_scenario, M: tl.constexpr):
    """The chunk ``number``: a scenario has max(1, cdiv(its rows, chunk)), numbered scenario by scenario.

    Chunks of scenarios with several have slots of their own, those of one scenario in a row. Without ``by_scenario``
    all rows are scenario 0's.
    """
    k = tl.arange(0, padded(M))
    start = tl.load(batch.offsets + k, mask=k < M, other=0)
    stop = tl.load(batch.offsets + k + 1, mask=k < M, other=0)
    present = k < M
    if by_scenario == 0:
        start = tl.where(k == 0, 0, start)
        stop = tl.where(k == 0, batch.rows, stop)
        present = k < 1
    counts = tl.where(present, tl.maximum((stop - start + chunk - 1) // chunk, 1), 0)
    end = tl.cumsum(counts, 0)
    slots = tl.where(counts > 1, counts, 0)
    first_slot = tl.cumsum(slots, 0) - slots
    scenario = tl.sum((end <= number).to(tl.int32), 0)
    here = k == scenario
    own = number - tl.sum(tl.where(here, end - counts, 0), 0)
    begin = tl.sum(tl.where(here, start, 0), 0) + own * chunk
    last = tl.sum(tl.where(here, stop, 0), 0)
    count = tl.sum(tl.where(here, counts, 0), 0)
    slot = tl.sum(tl.where(here, first_slot, 0), 0) + own
    scenario = tl.where(count > 0, scenario, -1)
    return Chunk(scenario, begin, tl.minimum(last, begin + chunk), own, count, slot)
