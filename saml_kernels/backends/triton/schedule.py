"""In which order the work items of a list of stages are drawn, and which stages run in a launch together.

A launch cuts every stage's work into items (stage, tile of BLOCK_M rows, part). Items are numbered step by step: in
every step each stage has one tile, and a stage lags behind what it waits for by so many steps that all running programs
have drawn items in between. kernels/persistent.py says why no item can wait for one with a larger number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from saml_kernels.backends.triton.stages import ProductStage, ProductTile, QuantizeRows, RowsTile, Stage

TICKET = 0
FINISHED = 1
READY = 2
"""Counters: the next item, programs at their end, and from here on stage by stage the items done of every tile."""


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
    number_of = {stage.name: number for number, stage in enumerate(stages)}
    distance = -(-programs // max(sum(items), 1))
    slots: list[Slot] = []
    for number, stage in enumerate(stages):
        # Stages of earlier launches are done.
        after = [number_of[name] for name in stage.after or () if name in number_of]
        if any(other >= number for other in after):
            raise ValueError(f"stage {stage.name} comes before what it waits for")
        # A tile of any rows waits for tiles of one scenario with numbers up to M above its own.
        behind = [slots[o].lag + distance + (num_scenarios if slots[o].own and not stage.own else 0) for o in after]
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


def items_of(stage: Stage, block_m: int) -> int:
    """Work items of one tile of a stage that is cut."""
    if isinstance(stage, ProductStage):
        assert isinstance(stage.tile, ProductTile)
        return (stage.branches or 1) * (stage.tile.row_parts or 1) * (stage.tile.column_tiles or 1)
    assert isinstance(stage.tile, RowsTile)
    views = stage.views if isinstance(stage, QuantizeRows) else 1
    return views * -(-block_m // stage.tile.item_rows)


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
