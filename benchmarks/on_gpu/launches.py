"""The launches of a training step as the simulation takes them: stages cut, items in their order, bytes.

Built from the same tables as the kernels' own launches (trunk.py, configs.py, schedule.py), without a device.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch

from on_gpu import costs
from on_gpu.assembly import Cut, LaunchCode, Wanted
from on_gpu.chip import Chip
from on_gpu.costs import ITEMSIZE, TRIPS, Launched
from on_gpu.simulation import Cost, Task
from saml_kernels.backends.triton import configs, schedule
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.backends.triton.schedule import Item, Order
from saml_kernels.backends.triton.stages import ProductTile, Program, RowsTile, Stage, WeightGradient
from saml_kernels.backends.triton.trunk import TrunkShape, backward_program, forward_program, weight_program

LOCAL: Final = 256
"""D_local and D_global."""
WIDTHS: Final = (512, 256, 128)
SEED: Final = 0
BIASES: Final = "biases"
"""Stands for the stages' names in tasks that sum a bias's gradient."""


@dataclass(frozen=True)
class Plan:
    """A launch before it is known which code runs it."""

    title: str
    schedule: str | None
    """The forward's; None of backward, which is the same in both."""
    stages: tuple[Stage, ...]
    """Cut."""
    config: Config

    @property
    def waits(self) -> bool:
        """Whether its programs draw items from a counter and wait for each other's."""
        return len(self.stages) > 1 and not self.of_weights

    @property
    def of_weights(self) -> bool:
        """Whether it is the launch of weight gradients."""
        return isinstance(self.stages[0], WeightGradient)

    def wanted(self, M: int) -> Wanted:
        """The code it needs."""
        cuts = frozenset((str(stage.name), cut_of(stage)) for stage in self.stages)
        return Wanted(M, self.config.num_warps, self.config.num_stages, cuts)

    @property
    def tiles(self) -> str:
        """How its products are cut, its warps and stages of the pipeline, to be read."""
        cut = next(cut for cut in map(cut_of, self.stages) if len(cut) > 1)
        return f"{'×'.join(map(str, cut))}, {self.config.num_warps}, {self.config.num_stages}"


def cut_of(stage: Stage) -> Cut:
    """Of a stage that is cut, as the file of machine code has it."""
    if isinstance(stage.tile, ProductTile):
        return stage.tile.block_m, stage.tile.block_n, stage.tile.block_k
    assert isinstance(stage.tile, RowsTile)
    return (stage.tile.item_rows,)


def shape_of(M: int) -> TrunkShape:
    """The trunk that is modelled: relu, score "ratio", a mutual unit with a vector gate after layer 1."""
    gates = WIDTHS[0], *[0] * (len(WIDTHS) - 1)
    return TrunkShape(M, LOCAL, LOCAL, False, WIDTHS, WIDTHS, gates, ("relu",) * len(WIDTHS), "ratio")


@cache
def plans(choice: Choice, M: int) -> tuple[Plan, ...]:
    """Every launch of forward, in both schedules, and of backward, with the tiles of a choice."""
    shape = shape_of(M)
    found: list[Plan] = []
    for name in configs.SCHEDULES:
        for stages in schedule.split(forward_program(shape, save=True).stages, name):
            title = str(stages[0].name) if len(stages) == 1 else "rest of the forward"
            title = "forward" if name == "persistent" else title
            alone = len(stages) == 1 and stages[0].own_launch
            config = (choice.layer if alone else None) or choice.forward
            found.append(Plan(title, name, _cut(stages, config), config))
    chain = backward_program(shape, True, True).stages
    found.append(Plan("chain", None, _cut(chain, choice.backward), choice.backward))
    found.append(Plan("weights", None, tuple(_cut_weights(weight_program(shape), choice.weights)), choice.weights))
    return tuple(found)


def built_in(rows: int, M: int) -> Choice:
    """The choice for a batch where nothing was tuned."""
    return configs.built_in(configs.Bucket.of(rows, M, max(WIDTHS)), ITEMSIZE)


def candidates(rows: int, M: int) -> list[tuple[Plan, ...]]:
    """Of every launch: first as built in, then with the tiles of larger batches, then as tuning would try it."""
    buckets = [rows, *(bound for bound in configs.ROW_BUCKETS if bound > rows)]
    choices = [built_in(each, M) for each in buckets]
    kinds = [field.name for field in dataclasses.fields(Choice) if field.name != "schedule"]
    for part in kinds:
        tried: list[dict[str, Any]] = [{part: config} for config in configs.candidates(part, ITEMSIZE)]
        choices += [dataclasses.replace(choices[0], **each) for each in tried]
    of_launches = zip(*(plans(choice, M) for choice in choices), strict=True)
    return [_distinct(each, M) for each in of_launches]


def _distinct(each: Sequence[Plan], M: int) -> tuple[Plan, ...]:
    """The first plan of each cut."""
    found: dict[Wanted, Plan] = {}
    for plan in each:
        found.setdefault(plan.wanted(M), plan)
    return tuple(found.values())


def _cut(stages: Sequence[Stage], config: Config) -> tuple[Stage, ...]:
    return tuple(
        dataclasses.replace(stage, tile=configs.tile(stage, config, torch.bfloat16, True, "ieee")) for stage in stages
    )


def _cut_weights(program: Program, config: Config) -> Iterator[Stage]:
    for stage in program.stages:
        assert isinstance(stage, WeightGradient)
        tile = configs.weight_tile(stage, config, torch.bfloat16, True, "ieee")
        yield dataclasses.replace(stage, tile=tile, row_tiles=-(-(stage.k1 + stage.k2) // tile.block_m))


@cache
def batch(rows: int, M: int, distribution: str) -> tuple[int, ...]:
    """Offsets (M + 1) of a random batch; "zipf": scenario k is drawn with a probability ∝ 1 / (k + 1)."""
    weights = [1.0 if distribution == "uniform" else 1.0 / (k + 1) for k in range(M)]
    drawn = random.Random(SEED).choices(range(M), weights, k=rows)
    return 0, *itertools.accumulate(drawn.count(k) for k in range(M))


def programs_beside(plan: Plan, code: LaunchCode, chip: Chip) -> int:
    """Programs that run on a multiprocessor at a time."""
    fit = chip.beside(code.registers, code.shared_memory, code.num_warps)
    return max(1, min(plan.config.programs, fit) if plan.waits else fit)


def tasks(plan: Plan, code: LaunchCode, chip: Chip, offsets: Sequence[int]) -> list[Task]:
    """The launch's items in the order in which programs draw them; a tile is its stage's name and its number."""
    launched = Launched(code, chip, costs.gathered(code, plan.stages), plan.config.num_stages)
    if plan.of_weights:
        return list(_weight_tasks(plan, launched, offsets))
    return list(_item_tasks(plan, launched, offsets))


def _item_tasks(plan: Plan, launched: Launched, offsets: Sequence[int]) -> Iterator[Task]:
    M, chip = len(offsets) - 1, launched.chip
    most = chip.multiprocessors * plan.config.programs if plan.waits else 1
    names = [str(stage.name) for stage in plan.stages]
    order = schedule.order(plan.stages, [0] * len(plan.stages), plan.config.block_m, M, most)
    before = _around(plan, launched)
    done = Cost(latency=chip.fence) if plan.waits else Cost()
    cost = cache(lambda stage, rows, part: costs.item_cost(plan.stages[stage], launched, rows, part).then(done))
    last = -1
    for item, needs in _items(order, tuple(offsets), tuple(names)):
        # Numbers without rows are drawn, too.
        yield from [Task(before, Cost())] * (item.number - last - 1)
        last = item.number
        yield Task(
            before + chip.atomic_round_trip * len(needs),
            cost(item.stage, item.end - item.first, item.part),
            (names[item.stage], item.tile),
            needs,
            chip.atomic_round_trip,
        )


@cache
def _items(
    order: Order, offsets: tuple[int, ...], names: tuple[str, ...]
) -> list[tuple[Item, tuple[tuple[str, int], ...]]]:
    """Items in their order, and the tiles they wait for."""
    found: dict[tuple[int, int], tuple[tuple[str, int], ...]] = {}
    items = schedule.items(order, offsets)
    for item in items:
        if (item.stage, item.tile) not in found:
            needed = schedule.waits_for(order, item, offsets)
            found[item.stage, item.tile] = tuple((names[stage], tile) for stage, tile in needed)
    return [(item, found[item.stage, item.tile]) for item in items]


def begin(plan: Plan, chip: Chip) -> float:
    """Cycles before the first items of a launch with a counter."""
    return TRIPS.begin * chip.l2_round_trip + chip.atomic_round_trip if plan.waits else 0.0


def _around(plan: Plan, launched: Launched) -> float:
    """Cycles of the instructions around an item. The number of the next one is asked for before the item runs."""
    item = launched.code.item
    around = launched.issue(item.instructions) + launched.waited(item.barriers)
    return around + (0.0 if plan.waits else launched.chip.block_start)


def _weight_tasks(plan: Plan, launched: Launched, offsets: Sequence[int]) -> Iterator[Task]:
    """The grid (tiles, chunks): chunks of weights that there is one of for all scenarios are those of all rows."""
    rows, M = offsets[-1], len(offsets) - 1
    length = configs.chunk_rows(rows)
    before = _around(plan, launched) + launched.trips(TRIPS.chunk)
    by_scenario = list(_chunks(offsets, length))
    of_all = list(_chunks((0, rows), length))
    for number in range(-(-rows // length) + M):
        for stage in plan.stages:
            assert isinstance(stage, WeightGradient)
            chunks = by_scenario if stage.by_scenario else of_all
            yield from _of_weight(stage, launched, before, chunks[number] if number < len(chunks) else None)


def _of_weight(
    stage: WeightGradient, launched: Launched, before: float, chunk: tuple[int, int, bool] | None
) -> Iterator[Task]:
    """The tiles of a weight over a chunk, then those of its bias."""
    columns = getattr(stage.tile, "column_tiles", None) or 1
    if chunk is None:
        yield from [Task(before, Cost())] * (columns * ((stage.row_tiles or 0) + 1))
        return
    name = str(stage.name)
    tile = Task(before, costs.weight_cost(stage, launched, *chunk), (name, chunk))
    yield from [tile] * (columns * (stage.row_tiles or 0))
    yield from [Task(before, costs.bias_cost(stage, launched, *chunk), (BIASES, chunk))] * columns


def _chunks(offsets: Sequence[int], length: int) -> Iterator[tuple[int, int, bool]]:
    """(rows, chunks of its scenario, whether it is the last of them) of every chunk."""
    for start, stop in itertools.pairwise(offsets):
        count = max(1, -(-(stop - start) // length))
        for number in range(count):
            yield max(0, min(length, stop - start - number * length)), count, number == count - 1


def moved_bytes(plan: Plan, rows: int, M: int) -> int:
    """Bytes of all tensors that the launch reads or writes, each once."""
    sizes = tensor_bytes(rows, M)
    return sum(sizes[name] for name in {name for stage in plan.stages for name in stage.tensors() if name})


@cache
def tensor_bytes(rows: int, M: int) -> Mapping[str, int]:
    """Bytes of every tensor of forward and backward, by its name in trunk.py."""
    shape = shape_of(M)
    parameters: dict[str, tuple[int, ...]] = {}
    for layer, (d, a) in enumerate(zip(shape.widths, shape.aux_widths, strict=True)):
        gate = shape.gates[layer]
        parameters |= {
            f"branch_weight{layer}": (M, shape.own_input(layer)[1] + a, d),
            f"branch_bias{layer}": (M, d),
            f"aux_weight{layer}": (shape.aux_input(layer)[1], a),
            f"aux_bias{layer}": (a,),
            f"gate_weight{layer}": (M, d, gate),
            f"gate_bias{layer}": (M, gate),
        }
    own, aux = shape.widths[-1], shape.aux_widths[-1]
    top = shape.layers - 1
    inputs = dict.fromkeys(("x_local", "d_local"), shape.local_dim) | dict.fromkeys(
        ("x_global", "d_global"), shape.global_dim
    )
    outputs = {"own_output": own, "grad_own": own, f"aux{top}": aux, "grad_aux": aux}
    sizes = {name: ITEMSIZE * rows * width for name, width in (inputs | outputs).items()}
    for name, size in parameters.items():
        sizes[name] = sizes[f"d_{name}"] = ITEMSIZE * math.prod(size)
    sizes |= {f"alpha{layer}": 4 * rows * M for layer in range(shape.layers)}
    for program in (forward_program(shape, save=True), backward_program(shape, True, True)):
        for name, buffer in program.buffers.items():
            sizes[name] = rows * buffer.elements * (buffer.dtype or torch.bfloat16).itemsize
    return sizes
