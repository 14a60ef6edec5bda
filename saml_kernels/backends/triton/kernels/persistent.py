"""One kernel runs any list of stages: a layer in a launch, or a whole trunk in a single persistent one.

Work is cut into items, (stage, tile of rows, part), in an order in which whatever an item needs comes before it: step
by step, every stage one tile, later stages some steps behind (``lag``). Programs draw items from a counter, each its
next one before it does the present one. Of all items drawn, the first unfinished one is some program's present one, and
nothing it waits for can be behind it: the launch ends however many programs run at once. An item counts itself done
after its stores; what depends on it waits until all items of the tile have. A tile of one scenario (number u) ends at
row (u + 1)·BLOCK_M at most, so it needs tiles of any rows with numbers up to u only; a tile of any rows needs tiles of
one scenario with numbers up to u + M. The last program sets all counters back to zero.

Counters: the next item, programs at their end, what a stuck launch reports (``most_polls``), and from READY on stage by
stage the items done of every tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saml_kernels.backends.triton import schedule
from saml_kernels.backends.triton.kernels.scenario_tiles import (
    Batch,
    number_of_tiles,
    scenario_bounds,
    scenario_tile,
    tile_of_row,
)
from saml_kernels.backends.triton.kernels.values import possible, stage_value, value

TICKET = tl.constexpr(schedule.TICKET)
FINISHED = tl.constexpr(schedule.FINISHED)
STUCK = tl.constexpr(schedule.STUCK)
REPORT = tl.constexpr(schedule.REPORT)
READY = tl.constexpr(schedule.READY)


class Item(NamedTuple):
    """A piece of work: rows first to end of the sorted batch, of one stage."""

    stage: Any
    tile: Any
    part: Any
    """Number among the stage's items of the tile."""
    scenario: Any
    """Of all rows, where the stage runs on tiles of one."""
    first: Any
    end: Any
    """At most BLOCK_M rows on; first where there are none."""
    zero: Any
    """0, which the compiler does not know: what is counted from it stays inside the loop over items. Taken out of it,
    indices of every stage would occupy registers all the time."""


@triton.jit(do_not_specialize=["rows", "row0", "programs", "inverse_temperature"])
def persistent_kernel(
    pointers, permutation, offsets, counters, rows, row0, programs, inverse_temperature, LAUNCH: tl.constexpr
):
    """Rows row0 to row0 + rows of the sorted batch. ``pointers`` are those of every body of the launch."""
    bounds = scenario_bounds(offsets, rows, row0, LAUNCH.num_scenarios, LAUNCH.block_m)
    batch = Batch(permutation, offsets, bounds, rows, row0, inverse_temperature)
    tiles = (rows + LAUNCH.block_m - 1) // LAUNCH.block_m + LAUNCH.num_scenarios
    full_steps, total = count_items(batch, LAUNCH)
    number = draw(counters, LAUNCH)
    while number < total:
        item = locate(number, full_steps, batch, LAUNCH)
        number = draw(counters, LAUNCH) if LAUNCH.persistent else total
        if item.first < item.end:
            if LAUNCH.persistent:
                wait(counters, value(LAUNCH.slots.after_1, item.stage), item, batch, tiles, LAUNCH)
                wait(counters, value(LAUNCH.slots.after_2, item.stage), item, batch, tiles, LAUNCH)
            if LAUNCH.most_polls > 0 and is_stuck(counters):
                number = total
            else:
                run(pointers, item, batch, LAUNCH)
                if LAUNCH.persistent:
                    release(counters, item, tiles)
    if LAUNCH.persistent:
        reset(counters, programs, tiles, LAUNCH)


@triton.jit
def count_items(batch, LAUNCH: tl.constexpr):
    """Steps with items of all stages, as long as one on tiles of any rows has some, and items in all.

    After those steps come steps of stages on tiles of one scenario only.
    """
    full_steps = tl.zeros((), tl.int32)
    if possible(LAUNCH.slots.own, 0):
        full_steps += (batch.rows + LAUNCH.block_m - 1) // LAUNCH.block_m + LAUNCH.any_rows_lag
    own_steps = tl.zeros((), tl.int32)
    if possible(LAUNCH.slots.own, 1):
        own_steps += number_of_tiles(batch.bounds) + LAUNCH.own_lag
    total = full_steps * LAUNCH.items_per_step
    return full_steps, total + tl.maximum(own_steps - full_steps, 0) * LAUNCH.own_items_per_step


@triton.jit
def draw(counters, LAUNCH: tl.constexpr):
    """The number of the next item. Nothing is ordered by it, so it need not wait for earlier stores."""
    if LAUNCH.persistent:
        return tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    else:
        return tl.program_id(0)


@triton.jit
def locate(number, full_steps, batch, LAUNCH: tl.constexpr):
    """What the item with a number is."""
    stage = tl.zeros((), tl.int32)
    full_items = full_steps * LAUNCH.items_per_step
    if number < full_items:
        step = number // LAUNCH.items_per_step
        part = number % LAUNCH.items_per_step
        for s in tl.static_range(1, LAUNCH.stages):
            stage += (part >= stage_value(LAUNCH.slots.first_item, s)).to(tl.int32)
        part -= value(LAUNCH.slots.first_item, stage)
    else:
        step = full_steps + (number - full_items) // max(LAUNCH.own_items_per_step, 1)
        part = (number - full_items) % max(LAUNCH.own_items_per_step, 1)
        for s in tl.static_range(LAUNCH.stages):
            if stage_value(LAUNCH.slots.own, s) == 1:
                stage = tl.where(part >= stage_value(LAUNCH.slots.first_own_item, s), s, stage)
        part -= value(LAUNCH.slots.first_own_item, stage)
    tile = step - value(LAUNCH.slots.lag, stage)
    scenario = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int64)
    end = tl.zeros((), tl.int64)
    if tile >= 0:
        if value(LAUNCH.slots.own, stage) == 1:
            scenario, first, end = scenario_tile(batch.bounds, tile, LAUNCH.num_scenarios, LAUNCH.block_m)
        else:
            first = tile.to(tl.int64) * LAUNCH.block_m
            end = tl.minimum(first + LAUNCH.block_m, batch.rows)
        end = tl.minimum(end, first + LAUNCH.block_m)
    return Item(stage, tile, part, scenario, first, end, tl.multiple_of(tl.minimum(number, 0), 256))


@triton.jit
def wait(counters, stage, item, batch, tiles, LAUNCH: tl.constexpr):
    """Returns when ``stage`` (-1: none) is done with the item's rows."""
    if stage >= 0:
        need = value(LAUNCH.slots.items, stage)
        own = value(LAUNCH.slots.own, stage)
        lowest = item.tile
        highest = item.tile
        if own != value(LAUNCH.slots.own, item.stage):
            if own == 1:
                lowest = tile_of_row(batch.bounds, item.first, LAUNCH.block_m)
                highest = tile_of_row(batch.bounds, item.end - 1, LAUNCH.block_m)
            else:
                lowest = (item.first // LAUNCH.block_m).to(tl.int32)
                highest = ((item.end - 1) // LAUNCH.block_m).to(tl.int32)
        ready = counters + READY + stage * tiles
        for tile in range(lowest, highest + 1):
            if LAUNCH.most_polls > 0:
                wait_or_report(counters, ready + tile, need, stage, tile, item, LAUNCH.most_polls)
            else:
                while tl.atomic_add(ready + tile, 0, sem="acquire") < need:
                    pass


@triton.jit
def wait_or_report(counters, ready, need, stage, tile, item, MOST: tl.constexpr):
    """Polls so often at most; then leaves in REPORT what is waited for, by whom, unless another program has."""
    present = tl.atomic_add(ready, 0, sem="acquire")
    polls = 1
    while (present < need) & (polls < MOST):
        present = tl.atomic_add(ready, 0, sem="acquire")
        polls += 1
    if present < need:
        if tl.atomic_add(counters + STUCK, 1) == 0:
            tl.store(counters + REPORT, stage)
            tl.store(counters + REPORT + 1, tile)
            tl.store(counters + REPORT + 2, need)
            tl.store(counters + REPORT + 3, present)
            tl.store(counters + REPORT + 4, item.stage)
            tl.store(counters + REPORT + 5, item.tile)


@triton.jit
def is_stuck(counters):
    """Whether any program has given up: what it should have done, others wait for in vain."""
    return tl.atomic_add(counters + STUCK, 0) > 0


@triton.jit
def run(pointers, item, batch, LAUNCH: tl.constexpr):
    """The item's work, by the body that serves its stage."""
    for b in tl.static_range(len(LAUNCH.bodies)):
        if value(LAUNCH.slots.body, item.stage) == b:
            LAUNCH.bodies[b].run(LAUNCH.bodies[b].stage, pointers[b], item, batch)


@triton.jit
def release(counters, item, tiles):
    """Counts the item as done, after the stores of all threads."""
    tl.debug_barrier()
    tl.atomic_add(counters + READY + item.stage * tiles + item.tile, 1, sem="release")


@triton.jit
def reset(counters, programs, tiles, LAUNCH: tl.constexpr):
    """The last program leaves all counters zero for the next launch."""
    tl.debug_barrier()
    if tl.atomic_add(counters + FINISHED, 1) == programs - 1 and not (LAUNCH.most_polls > 0 and is_stuck(counters)):
        used = tiles * LAUNCH.stages + READY
        for start in range(0, used, 1024):
            place = start + tl.arange(0, 1024)
            tl.store(counters + place, 0, mask=place < used)
