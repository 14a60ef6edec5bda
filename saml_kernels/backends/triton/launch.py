"""From stages and tensors to launches: which stages share a body, what it is compiled for, which pointers it gets.

Launches are counted: tests and docs/gpu-kernels.md state how many a call takes.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton import schedule as scheduling
from saml_kernels.backends.triton.availability import INTERPRETED
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.kernels import mutual, product, quantize
from saml_kernels.backends.triton.kernels.activations import DEVICE_ACTIVATIONS, DeviceActivation
from saml_kernels.backends.triton.kernels.persistent import persistent_kernel
from saml_kernels.backends.triton.kernels.quantize import quantize_weight_kernel
from saml_kernels.backends.triton.kernels.weight_gradient import weight_gradient_kernel
from saml_kernels.backends.triton.schedule import Order, Slot
from saml_kernels.backends.triton.sharing import Varying, merged
from saml_kernels.backends.triton.stages import (
    InputGradient,
    Layer,
    MutualBackward,
    MutualOwnRow,
    MutualTable,
    ProductStage,
    ProductTile,
    Program,
    QuantizedLayer,
    QuantizeRows,
    Stage,
    WeightGradient,
)

LAUNCHES: Counter[str] = Counter()
"""Kernel name → launches in this process."""

BODIES: dict[type[Stage], Any] = {
    Layer: product.layer,
    InputGradient: product.input_gradient,
    QuantizedLayer: product.quantized_layer,
    QuantizeRows: quantize.quantize_rows,
    MutualOwnRow: mutual.mutual_own_row,
    MutualTable: mutual.mutual_table,
    MutualBackward: mutual.mutual_backward,
}
"""The device function of every kind of stage: run(STAGE, pointers, item, batch)."""


class Grouped(NamedTuple):
    """A batch's rows by scenario, as every launch takes them."""

    permutation: Tensor
    """(B,) int64: rows in stable order of their scenario."""
    offsets: Tensor
    """(M + 1,) int64: where each scenario's rows begin among the sorted ones."""
    counters: Tensor
    """int32 zeros, enough for any of the launches; each leaves them zero."""


@dataclass(frozen=True)
class Body:
    """Device code and the description it is compiled for, of one stage or of several that share it."""

    run: Any
    stage: Stage


@dataclass(frozen=True, eq=False)
class Launch:
    """What :func:`persistent_kernel` is compiled for. Equal only to itself, so that a call finds its kernel at once."""

    slots: Slot
    bodies: tuple[Body, ...]
    stages: int
    persistent: bool
    num_scenarios: int
    block_m: int
    items_per_step: int
    own_items_per_step: int
    any_rows_lag: int
    own_lag: int
    most_polls: int
    """Of a wait, before the launch gives up and reports; 0: no bound."""

    @functools.cached_property
    def cache_key(self) -> str:
        """Of Triton's cache: the description and the sources of the functions in it."""
        return _cache_key(self, self.bodies)


@dataclass(frozen=True)
class WeightSlot:
    """A weight's place among the tiles of a launch."""

    body: int
    first_tile: int
    by_scenario: int


@dataclass(frozen=True, eq=False)
class WeightLaunch:
    """What :func:`weight_gradient_kernel` is compiled for."""

    slots: WeightSlot
    bodies: tuple[Body, ...]
    stages: int
    num_scenarios: int
    tiles: int
    """Tiles of all weights and biases."""
    tile_elements: int
    """Elements of a tile's sum in scratch memory."""

    cache_key = functools.cached_property(lambda self: _cache_key(self, self.bodies))


class Sealed(tl.constexpr):
    """A part of a description: a constant of Triton's compiler, and in Python what it stands for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __len__(self) -> int:
        return len(self.value)


def sealed(part: Any) -> Any:
    """The part with everything inside it as Triton's compiler passes constants on."""
    if INTERPRETED:
        return part
    if isinstance(part, Varying | DeviceActivation):
        return Sealed(part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: sealed(getattr(part, field.name)) for field in dataclasses.fields(part)}
        return Sealed(dataclasses.replace(part, **fields))
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return Sealed(type(part)(*map(sealed, part)))
    if isinstance(part, tuple):
        return Sealed(tuple(map(sealed, part)))
    return part if callable(part) else Sealed(part)


def _cache_key(launch: Any, bodies: Any) -> str:
    functions: list[Any] = []
    for body in getattr(bodies, "value", bodies):
        functions.append(body.run)
        activation = getattr(body.stage, "activation", None)
        for each in getattr(activation, "choices", (activation,)):
            functions += [getattr(each, "forward", None), getattr(each, "backward", None)]
    return repr(launch) + "".join(function.cache_key for function in functions if function is not None)


class Planned(NamedTuple):
    """A launch of a program, with everything that does not depend on the batch."""

    launch: Launch
    names: tuple[str | None, ...]
    """Of its stages."""
    order: Order
    bindings: tuple["Binding", ...]
    options: dict[str, int]


class PlannedWeights(NamedTuple):
    """The launch of weight gradients, with everything that does not depend on the batch."""

    launch: WeightLaunch
    bindings: tuple["Binding", ...]
    tiles: int
    tile_elements: int
    options: dict[str, int]


class Binding(NamedTuple):
    """Which tensors a body gets."""

    pointers: Any
    """The NamedTuple of the stage's kind."""
    names: tuple[tuple[str, ...], ...]
    """Field by field, of the stages that have one."""

    def of(self, tensors: Mapping[str, Tensor]) -> Any:
        return self.pointers(*(tuple(tensors[name] for name in names) or None for names in self.names))


def run(
    program: Program,
    schedule: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    grouped: Grouped,
    rows: int,
    *,
    layer: Config | None = None,
    row0: int = 0,
    temperature: float = 1.0,
    num_scenarios: int,
    like: Tensor,
) -> None:
    """Launches a program on rows row0 to row0 + rows of the sorted batch.

    Args:
        tensors: by name, everything the stages read and write, contiguous; sorted rows count from row0.
        grouped: the whole batch's; enough counters (schedule.num_counters).
        layer: of layers of all branches that have a launch of their own; None: ``config``.
        like: any tensor of the inputs' type.
    """
    if rows == 0:
        return
    permutation, offsets, counters = grouped
    if row0:
        permutation = permutation[row0:]
    most = configs.multiprocessors(like.device.index or 0) * config.programs
    for launch, names, order, bindings, options in planned(
        program, schedule, config, tensors, num_scenarios, most, like, layer or config
    ):
        items = order.most_items(rows)
        if items == 0:
            continue
        programs = min(most, items) if len(order.slots) > 1 else items
        start(
            persistent_kernel,
            (programs,),
            tuple(binding.of(tensors) for binding in bindings),
            permutation,
            offsets,
            counters,
            rows,
            row0,
            programs,
            1.0 / temperature,
            LAUNCH=launch,
            device=like.device,
            **options,
        )
        if configs.most_polls() and launch.persistent:
            check_waits(counters, names)


class LaunchStuck(RuntimeError):
    """A launch whose items wait for what never comes, under the debug switch that bounds waits."""


def check_waits(counters: Tensor, names: Sequence[str | None]) -> None:
    """Waits for the launch of the stages ``names``, and says what it says where it gave up.

    Raises:
        LaunchStuck: an item has waited too long; which one, for what.
    """
    if counters.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    report = counters[: scheduling.READY].tolist()
    if report[scheduling.STUCK]:
        stage, tile, needed, present, waiting, of_tile = report[scheduling.REPORT : scheduling.READY]
        raise LaunchStuck(
            f"persistent_kernel gave up: after {configs.most_polls()} polls stage {names[waiting]}, tile {of_tile}, "
            f"still waited for stage {names[stage]}, tile {tile}: {needed} items needed, {present} present "
            f"({configs.DEBUG_WAITS} bounds every wait)"
        )


def planned(
    program: Program,
    schedule: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    num_scenarios: int,
    programs: int,
    like: Tensor,
    layer: Config,
) -> list[Planned]:
    """The launches of a program, made once for everything they depend on; ``layer`` as in :func:`run`."""
    aligned = tuple(starts_at_vectors(stage, tensors) for stage in program.stages)
    precision = dot_precision(like.dtype)
    key = schedule, config, layer, programs, like.dtype, aligned, precision, configs.most_polls()
    if key not in program.planned:
        starts = dict(zip(program.stages, aligned, strict=True))
        plans = program.planned[key] = []
        for stages in scheduling.split(program.stages, schedule):
            alone = len(stages) == 1 and isinstance(stages[0], Layer) and stages[0].own_launch
            own = layer if alone else config
            cut = _cut(stages, own, like.dtype, starts, precision)
            if configs.is_ragged(cut) and own.num_warps < configs.RAGGED_WARPS:
                own = dataclasses.replace(own, num_warps=configs.RAGGED_WARPS)
                cut = _cut(stages, own, like.dtype, starts, precision)
            plans.append(_plan(cut, own, num_scenarios, programs, like.dtype.itemsize))
    found: list[Planned] = program.planned[key]
    return found


def _cut(
    stages: Sequence[Stage], config: Config, dtype: torch.dtype, starts: Mapping[Stage, bool], precision: str
) -> list[Stage]:
    return [
        dataclasses.replace(stage, tile=configs.tile(stage, config, dtype, starts[stage], precision))
        for stage in stages
    ]


def _plan(stages: Sequence[Stage], config: Config, num_scenarios: int, programs: int, itemsize: int) -> Planned:
    numbers, bodies, bindings = shared_bodies(stages)
    persistent = len(stages) > 1
    order = scheduling.order(stages, numbers, config.block_m, num_scenarios, programs if persistent else 1)
    launch = Launch(
        slots=sealed(merged(dict(enumerate(order.slots)))),
        bodies=sealed(bodies),
        stages=sealed(len(stages)),
        persistent=sealed(persistent),
        num_scenarios=sealed(num_scenarios),
        block_m=sealed(config.block_m),
        items_per_step=sealed(order.items_per_step),
        own_items_per_step=sealed(order.own_items_per_step),
        any_rows_lag=sealed(order.any_rows_lag),
        own_lag=sealed(order.own_lag),
        most_polls=sealed(configs.most_polls()),
    )
    return Planned(
        launch, tuple(stage.name for stage in stages), order, bindings, configs.launch_options(config, stages, itemsize)
    )


def shared_bodies(stages: Sequence[Stage]) -> tuple[list[int], tuple[Body, ...], tuple[Binding, ...]]:
    """The number of each stage's body, the bodies, and the tensors they get.

    Products that are cut alike and move in whole vectors share a body; every other stage has its own, in which all its
    numbers are constants.
    """
    groups: dict[Any, list[int]] = {}
    for number, stage in enumerate(stages):
        groups.setdefault(_sharing(stage) or number, []).append(number)
    numbers = [0] * len(stages)
    bodies: list[Body] = []
    bindings: list[Binding] = []
    for body, members in enumerate(groups.values()):
        for number in members:
            numbers[number] = body
        kind = type(stages[members[0]])
        columns = list(zip(*(stages[number].tensors() for number in members), strict=True))
        given = (tuple(n for n, name in zip(members, names, strict=True) if name is not None) for names in columns)
        described = {number: _described(stages[number]) for number in members}
        description = dataclasses.replace(merged(described), given=kind.pointers(*given))
        bodies.append(Body(BODIES.get(kind), description))
        bindings.append(Binding(kind.pointers, tuple(tuple(n for n in names if n is not None) for names in columns)))
    return numbers, tuple(bodies), tuple(bindings)


def _sharing(stage: Stage) -> Any:
    """Stages of one key share a body; None where a stage has its own."""
    if not isinstance(stage, ProductStage) or not isinstance(stage.tile, ProductTile):
        return None
    if not stage.tile.whole_vectors:
        return None
    # A tile with rows of both factors chooses row by row, and gathered rows have new addresses in every step, which
    # others need not.
    apart = isinstance(stage, WeightGradient) and (
        stage.whole_tiles is False,
        bool(stage.first.gathered or stage.second.gathered),
    )
    # Beside a gate's epilogue the others' would take registers.
    gate = isinstance(stage, Layer | InputGradient) and stage.gated.present
    return type(stage), dataclasses.replace(stage.tile, column_tiles=None), apart, gate


def _described(stage: Stage) -> Stage:
    """The stage as a kernel is compiled for it."""
    described = stage.described()
    if isinstance(described, Layer | InputGradient | QuantizedLayer):
        device: Any = DEVICE_ACTIVATIONS[described.activation]
        return dataclasses.replace(described, activation=device)
    return described


def starts_at_vectors(stage: Stage, tensors: Mapping[str, Tensor]) -> bool:
    """Whether every tensor of the stage starts at a whole vector of 16 bytes."""
    return all(tensors[name].data_ptr() % 16 == 0 for name in stage.tensors() if name is not None)


def run_weight_gradients(
    gradients: Program,
    config: Config,
    tensors: Mapping[str, Tensor],
    grouped: Grouped,
    rows: int,
    *,
    num_scenarios: int,
    like: Tensor,
) -> None:
    """Writes all weight gradients in one launch.

    Args:
        tensors: by name, factors, dz and gradients, contiguous and of one type.
        grouped: :func:`num_weight_counters` counters at least.
        like: any tensor of that type.
    """
    launch, bindings, tiles, tile_elements, options = planned_weights(gradients, config, tensors, num_scenarios, like)
    chunk = configs.chunk_rows(rows)
    # Scenarios of more than one chunk have fewer than 2 chunks for every chunk's worth of rows.
    slots = 2 * rows // chunk if rows > chunk else 0
    sums = like.new_empty(max(1, slots * tiles * tile_elements), dtype=torch.float32)
    start(
        weight_gradient_kernel,
        (tiles, -(-rows // chunk) + num_scenarios),
        tuple(binding.of(tensors) for binding in bindings),
        sums,
        *grouped,
        rows,
        chunk,
        LAUNCH=launch,
        device=like.device,
        **options,
    )


def planned_weights(
    gradients: Program, config: Config, tensors: Mapping[str, Tensor], num_scenarios: int, like: Tensor
) -> PlannedWeights:
    """The launch of weight gradients, made once for everything it depends on."""
    aligned = tuple(starts_at_vectors(stage, tensors) for stage in gradients.stages)
    precision = dot_precision(like.dtype)
    key = config, like.dtype, aligned, precision
    if key not in gradients.planned:
        stages: list[WeightGradient] = []
        slots: list[WeightSlot] = []
        tiles = elements = 0
        for stage, starts in zip(gradients.stages, aligned, strict=True):
            assert isinstance(stage, WeightGradient)
            tile = configs.weight_tile(stage, config, like.dtype, starts, precision)
            row_tiles = -(-(stage.k1 + stage.k2) // tile.block_m)
            whole = stage.k1 % tile.block_m == 0 if stage.k2 else None
            stages.append(dataclasses.replace(stage, tile=tile, row_tiles=row_tiles, whole_tiles=whole))
            slots.append(WeightSlot(0, tiles, int(stage.by_scenario)))
            tiles += (row_tiles + 1) * (tile.column_tiles or 1)
            elements = max(elements, tile.block_m * tile.block_n)
        numbers, bodies, bindings = shared_bodies(stages)
        placed = {n: dataclasses.replace(slot, body=numbers[n]) for n, slot in enumerate(slots)}
        launch = WeightLaunch(*map(sealed, (merged(placed), bodies, len(stages), num_scenarios, tiles, elements)))
        options = configs.launch_options(config, stages, like.dtype.itemsize)
        gradients.planned[key] = PlannedWeights(launch, bindings, tiles, elements, options)
    found: PlannedWeights = gradients.planned[key]
    return found


def quantize_weight(weight: Tensor, quantized: Tensor, scale: Tensor, largest: float) -> None:
    """W (M, K, N) → Ŵ (M, N, K padded), scales (M, N) float32, which are not written where ``largest`` is 0."""
    branches, k, n = weight.shape
    columns = 32
    start(
        quantize_weight_kernel,
        (-(-n // columns), branches),
        weight,
        quantized,
        scale,
        K=k,
        N=n,
        WIDTH=quantized.shape[2],
        LARGEST=largest,
        BLOCK_N=columns,
        BLOCK_K=64,
        device=weight.device,
        num_warps=4,
    )


def start(kernel: Any, grid: Sequence[int], *arguments: Any, device: torch.device, **options: Any) -> None:
    """Launches ``kernel`` on a device unless the grid is empty.

    The grid follows from shapes: nothing waits for the device.
    """
    if not all(grid):
        return
    LAUNCHES[kernel.fn.__name__] += 1
    # Triton launches on the current device, whatever device the tensors are on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **options)


def dot_precision(dtype: torch.dtype) -> str:
    """How matrix units take float32 factors: as torch's own products do. Nothing to choose for 16-bit ones."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def num_weight_counters(gradients: Program, config: Config, dtype: torch.dtype, num_scenarios: int) -> int:
    """Counters of the weight gradients' launch, wherever their tensors start: one a tile and scenario."""
    return num_scenarios * max(
        sum(
            (-(-(stage.k1 + stage.k2) // tile.block_m) + 1) * (tile.column_tiles or 1)
            for stage in gradients.stages
            if isinstance(stage, WeightGradient)
            for tile in [configs.weight_tile(stage, config, dtype, starts, "ieee")]
        )
        for starts in (True, False)
    )
