"""What a work item costs: its instructions and barriers from machine code, its bytes and products from its shapes.

A product's main loop is paced by the slowest of instructions, tensor cores and tiles from L2, which overlap, and by
tiles that were not asked for early enough; what comes before and after it does not overlap with it. Round trips to L2
that depend on each other are counted in the kernels' code and stand in Trips.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from on_gpu.assembly import Count, LaunchCode
from on_gpu.chip import Chip
from on_gpu.simulation import Cost, overlapped
from saml_kernels.backends.triton.stages import (
    InputGradient,
    Layer,
    MutualBackward,
    MutualOwnRow,
    ProductTile,
    Rows,
    RowsTile,
    Stage,
    WeightGradient,
)

ITEMSIZE: Final = 2
"""Bytes of a bf16 number."""
SINGLE: Final = 4
"""Of a float32 one."""
PASSES: Final = 2
"""Of a mutual unit over the streams: cosines, then the mix."""


@dataclass(frozen=True)
class Trips:
    """Round trips to L2 of an item that wait for each other, as kernels/*.py have them."""

    begin: int = 1
    """Of a launch with a counter: offsets, which its programs keep; the first ticket besides."""
    permutation: int = 1
    """Where some operand of a body is in the caller's order."""
    fill: int = 1
    """The pipeline's first tiles."""
    epilogue: int = 1
    """Bias, scenario bounds, addend and saved values, asked for together."""
    block_of_rows: int = 1
    """A block of the streams, and what is read beside it; a mutual unit reads every block twice."""
    group: int = 1
    """A mutual unit's backward: the permutation, which α waits for."""
    bias_block: int = 1
    """BLOCK_K rows of dz for a bias: a loop without products, which the compiler does not pipeline."""
    chunk: int = 1
    """Offsets, before a chunk of a weight's gradient is found."""


TRIPS: Final = Trips()


@dataclass(frozen=True)
class Launched:
    """A launch's code on a chip."""

    code: LaunchCode
    chip: Chip
    gathered: frozenset[str]
    """Stages whose body serves one with an operand in the caller's order, so that its items read the permutation."""
    num_stages: int
    """Of the software pipeline."""

    def issue(self, instructions: float) -> float:
        """Cycles that the instructions of all warps take."""
        return instructions * self.code.num_warps / self.chip.schedulers

    def waited(self, barriers: float) -> float:
        """Cycles of latency."""
        return barriers * self.chip.barrier

    def trips(self, number: float) -> float:
        """Cycles of loads that wait for each other."""
        return number * self.chip.l2_round_trip

    def loop(self, steps: int, count: Count, products: float, moved: float, depth: int) -> Cost:
        """A loop with products.

        Args:
            steps: of the loop.
            count: a step's.
            products: multiplications of all steps.
            moved: bytes of all steps' tiles.
            depth: steps that pass between asking for a tile and using it.
        """
        l2 = moved / self.chip.l2_bytes
        issue, tensor = self.issue(steps * count.instructions), products / self.chip.products
        late = (self.trips(steps) + l2) / depth - max(issue, tensor, l2)
        return overlapped(issue, tensor, l2, latency=self.waited(steps * count.barriers) + max(0.0, late))

    def straight(self, count: Count, moved: float = 0.0) -> Cost:
        """Code without products, and its bytes."""
        return overlapped(
            issue=self.issue(count.instructions), l2=moved / self.chip.l2_bytes, latency=self.waited(count.barriers)
        )


def operands(stage: Stage) -> tuple[Rows, ...]:
    """Every operand of a stage whose rows may be in the caller's order."""
    factors = [getattr(getattr(stage, name, None), "rows", None) for name in ("first", "second")]
    others = [getattr(stage, name, None) for name in ("first", "second", "out", "saved", "addend", "gated")]
    return tuple(each for each in (*factors, *others) if isinstance(each, Rows))


def gathered(code: LaunchCode, stages: Sequence[Stage]) -> frozenset[str]:
    """Of one launch: stages that share a body with one that has an operand in the caller's order."""
    found = {str(stage.name) for stage in stages if any(rows.gathered for rows in operands(stage))}
    return frozenset(name for body in code.bodies if body.stages & found for name in body.stages)


def item_cost(stage: Stage, launched: Launched, rows: int, part: int) -> Cost:
    """An item's, from the moment it need not wait any more.

    Args:
        stage: which is cut.
        launched: the code that runs it.
        rows: of its tile.
        part: its number among those of the tile.

    Raises:
        TypeError: a kind of stage without a model.
    """
    if type(stage) not in KINDS:
        raise TypeError(f"there is no model of {type(stage).__name__}")
    return KINDS[type(stage)](stage, launched, rows, part)


def _product(stage: Layer | InputGradient, launched: Launched, rows: int, part: int) -> Cost:
    """Loads, products, epilogue, stores."""
    tile = stage.tile
    assert isinstance(tile, ProductTile)
    body = launched.code.body(str(stage.name))
    rows = max(0, min(tile.block_m, rows - part // (tile.column_tiles or 1) % tile.row_parts * tile.block_m))
    steps = sum(-(-factor.k // tile.block_k) for factor in (stage.first, stage.second))
    columns = min(tile.block_n, stage.n)
    depth = stage.first.k + stage.second.k
    trips = TRIPS.permutation * (str(stage.name) in launched.gathered) + TRIPS.fill * bool(steps) + TRIPS.epilogue
    products = steps * tile.block_m * tile.block_n * tile.block_k
    moved = ITEMSIZE * depth * (rows + columns)
    loop = launched.loop(steps, body.repeated, products, moved, max(1, launched.num_stages - 1))
    around = launched.straight(body.once, rows * columns * _epilogue_bytes(stage))
    return Cost(latency=launched.trips(trips)).then(loop).then(around)


def _epilogue_bytes(stage: Layer | InputGradient) -> float:
    """Bytes read and written for each number of the result. Own rows besides are one in M of a layer of all."""
    if isinstance(stage, Layer):
        own = 1.0 if stage.own or stage.every_row_is_own else 1.0 / stage.num_scenarios
        return ITEMSIZE * (1 + stage.gated.present + own * (stage.saved.present + stage.preact.present))
    read = ITEMSIZE * (stage.saved.present + stage.preact.present + stage.gated.present + stage.d_gated.present)
    added = (SINGLE if stage.addend_float32 else ITEMSIZE) * stage.addend.present
    return read + added + (SINGLE if stage.out_float32 else ITEMSIZE)


def _mutual(stage: MutualOwnRow | MutualBackward, launched: Launched, rows: int, part: int) -> Cost:
    """Groups of rows one after another; those without rows take as long as others."""
    tile = stage.tile
    assert isinstance(tile, RowsTile)
    body = launched.code.body(str(stage.name))
    rows = max(0, min(tile.item_rows, rows - part * tile.item_rows))
    assert body.block is not None
    groups, blocks = tile.item_rows / body.block[0], -(-stage.d // body.block[1])
    backward = isinstance(stage, MutualBackward)
    trips = PASSES * blocks * TRIPS.block_of_rows + TRIPS.group * backward
    streams = PASSES * ITEMSIZE * (stage.num_scenarios + 1) * stage.d
    alpha = SINGLE * stage.num_scenarios
    # dM in every pass, and dV_t.
    others = SINGLE * (PASSES + 1) * stage.d * backward
    gate_and_result = ITEMSIZE * (stage.gate_width * (PASSES if backward else 1) + stage.d)
    work = launched.straight(
        Count(tile.item_rows * body.repeated.instructions, tile.item_rows * body.repeated.barriers),
        rows * (streams + alpha + others + gate_and_result),
    )
    return Cost(latency=launched.trips(groups * trips)).then(work).then(launched.straight(body.once))


KINDS: Final[dict[type[Stage], Callable[[Any, Launched, int, int], Cost]]] = {
    Layer: _product,
    InputGradient: _product,
    MutualOwnRow: _mutual,
    MutualBackward: _mutual,
}


def weight_cost(stage: WeightGradient, launched: Launched, rows: int, chunks: int, last: bool) -> Cost:
    """A tile of a weight's gradient over a chunk of rows; with several chunks, the ``last`` adds all their sums."""
    tile = stage.tile
    assert isinstance(tile, ProductTile)
    body = launched.code.body(str(stage.name))
    steps = -(-rows // tile.block_k)
    gathered = str(stage.name) in launched.gathered
    products = steps * tile.block_m * tile.block_n * tile.block_k
    moved = ITEMSIZE * rows * (tile.block_m + min(tile.block_n, stage.n))
    loop = launched.loop(steps, body.repeated, products, moved, max(1, launched.num_stages - 1))
    trips = (TRIPS.permutation * gathered + TRIPS.fill) * bool(steps)
    result = tile.block_m * min(tile.block_n, stage.n)
    stored = launched.straight(body.once, result * (ITEMSIZE if chunks == 1 else SINGLE))
    return Cost(latency=launched.trips(trips)).then(loop).then(stored).then(_sums(launched, result, chunks, last))


def bias_cost(stage: WeightGradient, launched: Launched, rows: int, chunks: int, last: bool) -> Cost:
    """A stretch of a bias's gradient over a chunk of rows."""
    tile = stage.tile
    assert isinstance(tile, ProductTile)
    columns = min(tile.block_n, stage.n)
    blocks = -(-rows // tile.block_k)
    loop = launched.straight(Count(launched.chip.bias_block * blocks, 0), ITEMSIZE * rows * columns)
    waits = Cost(latency=launched.trips(TRIPS.bias_block * blocks))
    return waits.then(loop).then(_sums(launched, columns, chunks, last))


def _sums(launched: Launched, result: int, chunks: int, last: bool) -> Cost:
    """Counting a chunk, and for the last one reading and adding the sums of all, one after another."""
    if chunks == 1:
        return Cost()
    counted = Cost(latency=launched.chip.fence + launched.chip.atomic_round_trip)
    read = overlapped(l2=SINGLE * chunks * result / launched.chip.l2_bytes, latency=launched.trips(chunks))
    return counted.then(read) if last else counted
