"""In which order the work items of a list of stages are drawn, and which stages run in a launch together.

A launch cuts every stage's work into items (stage, tile of BLOCK_M rows, part). Items are numbered step by step: in
every step each stage has one tile, and a stage lags behind what it waits for by so many steps that all running programs
have drawn items in between. kernels/persistent.py says why no item can wait for one with a larger number.
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from saml_kernels.backends.triton.stages import ProductStage, ProductTile, QuantizeRows, RowsStage, RowsTile, Stage

TICKET = 0
FINISHED = 1
STUCK = 2
REPORT = 3
READY = REPORT + 6
"""Counters: the next item, programs at their end, programs that gave up waiting and what the first of them says (stage,
tile, items needed and present, the waiting item's stage and tile), and from READY on stage by stage the items done of
every tile."""


@dataclass(frozen=True)
class Slot:
    """A stage's place in the order of a launch's items."""

    own: int
    """1: runs on tiles of one scenario."""
    body: int
    """Number of the body that serves it."""
    items: int
    """Work items of a tile."""
    first_item: int
    """Number of its first item among those of a step."""
    first_own_item: int
    """The same in steps of stages on tiles of one scenario only."""
    lag: int
    """Steps by which it runs behind the first stage."""
    after_1: int
    after_2: int
    """Stages that must be done with an item's rows, -1 for none."""


@dataclass(frozen=True)
class Order:
    """The order of a launch's items."""

    slots: tuple[Slot, ...]
    block_m: int
    num_scenarios: int

    @property
    def items_per_step(self) -> int:
        return sum(slot.items for slot in self.slots)

    @property
    def own_items_per_step(self) -> int:
        """Items a step of stages on tiles of one scenario."""
        return sum(slot.items for slot in self.slots if slot.own)

    @property
    def any_rows_lag(self) -> int:
        """The largest lag of stages on tiles of any rows."""
        return max((slot.lag for slot in self.slots if not slot.own), default=0)

    @property
    def own_lag(self) -> int:
        """The largest lag of stages on tiles of one scenario."""
        return max((slot.lag for slot in self.slots if slot.own), default=0)

    def most_items(self, rows: int) -> int:
        """As many as there can be: tiles of one scenario are counted on the device."""
        tiles = -(-rows // self.block_m)
        any_rows = (self.items_per_step - self.own_items_per_step) * (tiles + self.any_rows_lag)
        return any_rows + self.own_items_per_step * (tiles + self.num_scenarios + self.own_lag)


def order(stages: Sequence[Stage], bodies: Sequence[int], block_m: int, num_scenarios: int, programs: int) -> Order:
    """The order of the items of ``stages``, which are cut; ``bodies`` has the number of each stage's body.

    Raises:
        ValueError: a stage comes before one that it waits for.
    """
    items = [items_of(stage, block_m) for stage in stages]
    cycles = [cycles_of(stage) for stage in stages]
    of_a_step = max(sum(map(operator.mul, items, cycles)), 1.0)
    number_of = {stage.name: number for number, stage in enumerate(stages)}
    # Every program has an item in hand and one drawn ahead. While an item runs, others finish so many steps.
    distances = [math.ceil(programs * (2 / max(sum(items), 1) + of_item / of_a_step)) for of_item in cycles]
    slots: list[Slot] = []
    for number, stage in enumerate(stages):
        # Stages of earlier launches are done.
        after = [number_of[name] for name in stage.after or () if name in number_of]
        if any(other >= number for other in after):
            raise ValueError(f"stage {stage.name} comes before what it waits for")
        # A tile of any rows waits for tiles of one scenario with numbers up to M above its own.
        behind = [slots[o].lag + distances[o] + (num_scenarios if slots[o].own and not stage.own else 0) for o in after]
        after += [-1] * (2 - len(after))
        slots.append(
            Slot(
                own=int(stage.own),
                body=bodies[number],
                items=items[number],
                first_item=sum(items[:number]),
                first_own_item=sum(slot.items for slot in slots if slot.own),
                lag=max(behind, default=0),
                after_1=after[0],
                after_2=after[1],
            )
        )
    return Order(tuple(slots), block_m, num_scenarios)


class Item(NamedTuple):
    """A piece of work of a launch."""

    number: int
    """In the order in which programs draw items."""
    stage: int
    tile: int
    part: int
    """Number among the stage's items of the tile."""
    first: int
    """First of its rows among the sorted ones."""
    end: int
    """Behind its last row."""


def items(order: Order, offsets: Sequence[int]) -> list[Item]:
    """A launch's items in the order of their numbers, as kernels/persistent.py draws and locates them.

    ``offsets`` (M + 1) says where each scenario's rows begin among the sorted ones. Numbers without rows are left out.
    """
    rows, block = offsets[-1], order.block_m
    any_rows = [(first, min(first + block, rows)) for first in range(0, rows, block)]
    own = [
        (first, min(first + block, end))
        for start, end in itertools.pairwise(offsets)
        for first in range(start, end, block)
    ]
    full_steps = len(any_rows) + order.any_rows_lag if any(not slot.own for slot in order.slots) else 0
    own_steps = len(own) + order.own_lag if any(slot.own for slot in order.slots) else 0
    found: list[Item] = []
    number = 0
    for step in range(max(full_steps, own_steps)):
        for stage, slot in enumerate(order.slots):
            if step >= full_steps and not slot.own:
                continue
            tile, bounds = step - slot.lag, own if slot.own else any_rows
            if 0 <= tile < len(bounds):
                found += [Item(number + part, stage, tile, part, *bounds[tile]) for part in range(slot.items)]
            number += slot.items
    return found


def waits_for(order: Order, item: Item, offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(stage, tile) of everything that must be done before the item runs."""
    slot, block = order.slots[item.stage], order.block_m
    for stage in (slot.after_1, slot.after_2):
        if stage < 0:
            continue
        tiles = [item.tile]
        if order.slots[stage].own != slot.own:
            tiles = [tile_of_row(offsets, row, block) for row in (item.first, item.end - 1)]
            if slot.own:
                tiles = [item.first // block, (item.end - 1) // block]
        yield from ((stage, tile) for tile in range(tiles[0], tiles[-1] + 1))


def tile_of_row(offsets: Sequence[int], row: int, block_m: int) -> int:
    """Number of the tile of one scenario that has a sorted row."""
    tiles = 0
    for start, end in itertools.pairwise(offsets):
        if row < end:
            return tiles + (row - start) // block_m
        tiles += -(-(end - start) // block_m)
    raise ValueError(f"row must be below {offsets[-1]}, got {row}")


def items_of(stage: Stage, block_m: int) -> int:
    """Work items of one tile of a stage that is cut."""
    if isinstance(stage, ProductStage):
        assert isinstance(stage.tile, ProductTile)
        return (stage.branches or 1) * (stage.tile.row_parts or 1) * (stage.tile.column_tiles or 1)
    assert isinstance(stage.tile, RowsTile)
    views = stage.views if isinstance(stage, QuantizeRows) else 1
    return views * -(-block_m // stage.tile.item_rows)


CYCLES_OF_ITEM = 4000.0
"""What an item costs before its first product, a guess: dependent round trips to memory."""
PRODUCTS_A_CYCLE = 2048.0
"""Of 16-bit factors, on a multiprocessor of an H100."""
CYCLES_OF_ELEMENT = 0.1
"""Of the streams (M, d) of a row that is no product's: instructions of docs/gpu-kernels.md over four a cycle."""


def cycles_of(stage: Stage) -> float:
    """About how long an item takes: only proportions matter, and only for how far stages lag behind each other."""
    if isinstance(stage, ProductStage):
        assert isinstance(stage.tile, ProductTile)
        return CYCLES_OF_ITEM + stage.tile.block_m * stage.tile.block_n * stage.depth / PRODUCTS_A_CYCLE
    assert isinstance(stage, RowsStage)
    assert isinstance(stage.tile, RowsTile)
    return CYCLES_OF_ITEM + CYCLES_OF_ELEMENT * stage.tile.item_rows * stage.row_elements


def split(stages: Sequence[Stage], schedule: str) -> tuple[tuple[Stage, ...], ...]:
    """The stages of every launch; those of one launch wait for each other on the device.

    ``schedule``: "persistent", one launch; "per_layer", stages that all branches run have launches of their own.
    """
    if schedule == "persistent":
        return (tuple(stages),) if stages else ()
    groups: list[list[Stage]] = []
    for stage in stages:
        alone = stage.own_launch or (groups and groups[-1][-1].own_launch)
        if alone or not groups:
            groups.append([])
        groups[-1].append(stage)
    return tuple(tuple(group) for group in groups)


def num_counters(stages: int, rows: int, num_scenarios: int, block_m: int) -> int:
    """Counters that a persistent launch of so many stages needs."""
    return READY + stages * (-(-rows // block_m) + num_scenarios)
