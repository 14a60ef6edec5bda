"""Stages by name, and how a list of them is launched: in one persistent launch, or cut into several.

A program follows from shapes and options alone and is made once; a call hands it tensors. Names of tensors are those of
docs/gpu-kernels.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.functions import IDENTITY
from saml_kernels.backends.triton.launching import Grouped, dot_precision, launch, padded
from saml_kernels.backends.triton.product import A1, A2, A_SCALE, ADDEND, ARGUMENT, BIAS, OUT, VALUE, W1, W2, W_SCALE
from saml_kernels.backends.triton.stage_kernel import READY, stage_kernel
from saml_kernels.backends.triton.tables import (
    ELEMENT,
    FIELDS,
    FLOAT32,
    FOREIGN_PRODUCT,
    PRODUCT,
    ROUND_ROWS,
    Tables,
    tabulate,
)


@dataclass(frozen=True)
class Matrix:
    """Rows of a named tensor: elements from row to row and from branch to branch, and the order of its rows."""

    name: str
    row: int
    branch: int = 0
    gathered: bool = False
    """Rows stand in the caller's order."""

    @staticmethod
    def shared(name: str, width: int, *, gathered: bool = False) -> "Matrix":
        """(B, width), the same for every branch."""
        return Matrix(name, width, 0, gathered)

    @staticmethod
    def by_branch(name: str, branches: int, width: int, *, gathered: bool = False) -> "Matrix":
        """(B, M, width)."""
        return Matrix(name, branches * width, width, gathered)


@dataclass(frozen=True)
class Weight:
    """A factor of a named weight (M, k, n) or (k, n): elements from branch to branch and line to line, its start."""

    name: str
    step: int
    branch: int = 0
    start: int = 0


@dataclass(frozen=True)
class Stage:
    """What all work items of one kind do. ``after`` names the stages it waits for, two at most."""

    name: str
    kind: int
    own: bool
    after: tuple[str, ...]
    parts: int
    """Branches that a tile of any rows has items for."""
    entries: tuple[tuple[str, int], ...]
    places: tuple[tuple[int, str], ...]
    own_launch: bool = False
    """The per-layer schedule gives it a launch of its own."""

    def entry(self, name: str) -> int:
        return dict(self.entries).get(name, 0)

    def items(self, config: Config) -> int:
        """Of one tile."""
        if self.kind in (PRODUCT.value, FOREIGN_PRODUCT.value):
            return self.parts * self.column_tiles(config)
        return self.parts * triton.cdiv(config.rows, config.item_rows)

    def column_tiles(self, config: Config) -> int:
        if self.kind == ROUND_ROWS.value:
            return self.parts
        return triton.cdiv(self.entry("n"), config.columns)


def product(
    name: str,
    n: int,
    out: Matrix,
    *,
    own: bool,
    after: Sequence[str] = (),
    first: tuple[Matrix, Weight, int] | None = None,
    second: tuple[Matrix, Weight, int] | None = None,
    bias: str | None = None,
    activation: int = IDENTITY.value,
    addend: Matrix | None = None,
    addend_float32: bool = False,
    out_float32: bool = False,
    value: Matrix | None = None,
    argument: str | None = None,
    parts: int = 1,
    shared: bool = False,
    own_launch: bool = False,
) -> Stage:
    """δ(bias + [A1 ; A2] W), or in a backward program (addend + [A1 ; A2] Wᵀ) ∘ δ'; a factor is rows, weight, k."""
    entries = {
        "n": n,
        "out_row": out.row,
        "out_branch": out.branch,
        "out_gathered": out.gathered,
        "out_type": FLOAT32.value if out_float32 else ELEMENT.value,
        "activation": activation,
        "shared": shared,
    }
    places = {OUT.value: out.name}
    for number, factor, rows_field, weight_field in ((1, first, A1, W1), (2, second, A2, W2)):
        if factor is None:
            continue
        rows, weight, k = factor
        places |= {rows_field.value: rows.name, weight_field.value: weight.name}
        entries |= {
            f"k{number}": k,
            f"a{number}_row": rows.row,
            f"a{number}_gathered": rows.gathered,
            f"w{number}_branch": weight.branch,
            f"w{number}_start": weight.start,
            f"w{number}_step": weight.step,
        }
        if number == 1:
            entries["a1_branch"] = rows.branch
    if bias is not None:
        entries["bias"] = 1
        places[BIAS.value] = bias
    if value is not None:
        entries |= {"value": 1, "value_row": value.row, "value_branch": value.branch, "value_gathered": value.gathered}
        places[VALUE.value] = value.name
    if argument is not None:
        entries["argument"] = 1
        places[ARGUMENT.value] = argument
    if addend is not None:
        entries |= {
            "addend": FLOAT32.value if addend_float32 else ELEMENT.value,
            "addend_row": addend.row,
            "addend_branch": addend.branch,
            "addend_gathered": addend.gathered,
        }
        places[ADDEND.value] = addend.name
    return _stage(name, PRODUCT.value, own, after, parts, entries, places, own_launch)


def foreign_product(
    name: str,
    n: int,
    k: int,
    rows: Matrix,
    weight: str,
    bias: str,
    out: Matrix,
    *,
    after: Sequence[str],
    activation: int,
    parts: int,
) -> Stage:
    """δ(bias + s_row s_column (Â Ŵ)) of foreign branches, rows of their own scenario left alone."""
    entries = {
        "n": n,
        "k1": k,
        "a1_row": rows.row,
        "a1_branch": rows.branch,
        "w1_branch": n * k,
        "out_row": out.row,
        "out_branch": out.branch,
        "out_gathered": out.gathered,
        "out_type": ELEMENT.value,
        "activation": activation,
    }
    places = {
        A1.value: rows.name,
        A_SCALE.value: f"{rows.name}_scale",
        W1.value: weight,
        W_SCALE.value: f"{weight}_scale",
        BIAS.value: bias,
        OUT.value: out.name,
    }
    return _stage(name, FOREIGN_PRODUCT.value, False, after, parts, entries, places, True)


def rows_stage(
    name: str,
    kind: int,
    places: Mapping[int, str],
    entries: Mapping[str, int],
    *,
    own: bool,
    after: Sequence[str],
    parts: int = 1,
) -> Stage:
    """A stage that goes over rows and is no product."""
    return _stage(name, kind, own, after, parts, entries, places, False)


def _stage(
    name: str,
    kind: int,
    own: bool,
    after: Sequence[str],
    parts: int,
    entries: Mapping[str, int],
    places: Mapping[int, str],
    own_launch: bool,
) -> Stage:
    if len(after) > 2:
        raise ValueError(f"stage {name} waits for {len(after)} stages; the tables hold two")
    numbers = tuple((key, int(value)) for key, value in entries.items())
    return Stage(name, kind, own, tuple(after), parts, numbers, tuple(places.items()), own_launch)


@dataclass(frozen=True)
class Buffer:
    """A tensor (rows, *shape) that a program needs, without a ``dtype`` of the inputs' type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    of_all_branches: bool = False
    """(rows, M, width) or as large: what inference keeps for some rows at a time only."""
    temporary: bool = False
    """Backward does not read it."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


Plans = list[tuple[tuple[Stage, ...], "Arranged"]]
"""The launches of a program, with their tables."""


@dataclass(frozen=True, eq=False)
class Program:
    """Stages in an order in which each comes after what it waits for, and the buffers they write."""

    branches: int
    stages: tuple[Stage, ...]
    buffers: Mapping[str, Buffer]
    backward: bool = False
    score: int = 0
    keep: bool = True
    largest: float = 0.0
    """Of the rounded type, 0 where nothing is scaled."""
    plans: dict[tuple[str, Config, int, int], "Plans"] = field(default_factory=dict)

    def planned(self, schedule: str, config: Config, programs: int, vector: int) -> "Plans":
        """Launches with their tables; made once."""
        key = schedule, config, programs, vector
        if key not in self.plans:
            self.plans[key] = [
                (stages, arranged(stages, self.branches, config, programs if len(stages) > 1 else 1, vector))
                for stages in self.launches(schedule)
            ]
        return self.plans[key]

    def launches(self, schedule: str) -> tuple[tuple[Stage, ...], ...]:
        """The stages of every launch. Stages of one launch wait for each other on the device."""
        if schedule == "persistent":
            return (self.stages,) if self.stages else ()
        groups: list[list[Stage]] = []
        for stage in self.stages:
            alone = stage.own_launch or (groups and groups[-1][-1].own_launch)
            if alone or not groups:
                groups.append([])
            groups[-1].append(stage)
        return tuple(tuple(group) for group in groups)

    def allocate(self, like: Tensor, rows: int, given: Iterable[str] = ()) -> dict[str, Tensor]:
        """Fresh tensors for all buffers but those given."""
        given = set(given)
        return {
            name: like.new_empty((rows, *buffer.shape), dtype=buffer.dtype or like.dtype)
            for name, buffer in self.buffers.items()
            if name not in given
        }


def num_counters(stages: int, rows: int, branches: int, config: Config) -> int:
    """Counters of a persistent launch."""
    return READY.value + stages * (triton.cdiv(rows, config.rows) + branches)


@dataclass(frozen=True)
class Arranged:
    """A launch's compile-time side."""

    tables: Tables
    items_per_step: int
    own_items_per_step: int
    """Of stages on tiles of one scenario."""
    any_rows_lag: int
    own_lag: int
    """The largest of stages on tiles of any rows, and of one scenario."""
    multiple: int
    """Every width and stride is a multiple of so many elements."""


def arranged(stages: tuple[Stage, ...], branches: int, config: Config, programs: int, vector: int) -> Arranged:
    """Tables of a launch. A stage lags behind what it waits for until all programs have drawn items in between."""
    items = [stage.items(config) for stage in stages]
    per_step = sum(items)
    index = {stage.name: number for number, stage in enumerate(stages)}
    distance = triton.cdiv(programs, max(per_step, 1))
    lags: list[int] = []
    entries: list[dict[str, int]] = []
    for number, stage in enumerate(stages):
        # Stages of earlier launches are done.
        after = [index[name] for name in stage.after if name in index]
        if any(other >= number for other in after):
            raise ValueError(f"stage {stage.name} comes before what it waits for")
        # A tile of any rows waits for tiles of one scenario with numbers up to M above its own.
        lags.append(
            max(
                (lags[o] + distance + (branches if stages[o].own and not stage.own else 0) for o in after),
                default=0,
            )
        )
        after += [-1] * (2 - len(after))
        entries.append(
            dict(stage.entries)
            | {
                "kind": stage.kind,
                "own": stage.own,
                "items": items[number],
                "first_item": sum(items[:number]),
                "first_own_item": sum(items[o] for o in range(number) if stages[o].own),
                "lag": lags[-1],
                "dependency_1": after[0],
                "dependency_2": after[1],
                "column_tiles": stage.column_tiles(config),
            }
        )
    names = (
        *("k1", "k2", "n", "a1_row", "a1_branch", "a2_row", "w1_branch", "w1_start", "w1_step"),
        *("w2_branch", "w2_start", "w2_step", "out_row", "out_branch"),
        *("value_row", "value_branch", "addend_row", "addend_branch"),
    )
    whole = all(
        dict(stage.entries).get(name, 0) % vector == 0
        for stage in stages
        if stage.kind in (PRODUCT.value, FOREIGN_PRODUCT.value)
        for name in names
    )
    own = [number for number, stage in enumerate(stages) if stage.own]
    any_rows = [number for number, stage in enumerate(stages) if not stage.own]
    return Arranged(
        tabulate(Tables, entries),
        per_step,
        sum(items[number] for number in own),
        max((lags[number] for number in any_rows), default=0),
        max((lags[number] for number in own), default=0),
        vector if whole else 1,
    )


def run(
    program: Program,
    schedule: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    grouped: Grouped,
    rows: int,
    *,
    row0: int = 0,
    temperature: float = 1.0,
    base: Tensor,
) -> None:
    """Launches a program on rows row0 to row0 + rows of the sorted batch.

    Args:
        tensors: by name, everything the stages read and write, contiguous; sorted rows count from row0.
        grouped: the whole batch's; :func:`num_counters` counters at least.
        base: any tensor of the inputs' type.
    """
    if rows == 0:
        return
    permutation, offsets, counters = grouped
    float32 = counters.view(torch.float32)
    most = configs.multiprocessors(base.device.index or 0) * config.programs
    if row0:
        permutation = permutation[row0:]
    for stages, table in program.planned(schedule, config, most, 16 // base.element_size()):
        persistent = len(stages) > 1
        tiles = triton.cdiv(rows, config.rows)
        # As many as there can be: tiles of one scenario are counted on the device.
        items = (table.items_per_step - table.own_items_per_step) * (tiles + table.any_rows_lag)
        items += table.own_items_per_step * (tiles + program.branches + table.own_lag)
        if items == 0:
            continue
        programs = min(most, items) if persistent else items
        places, aligned = addresses(stages, tensors, base)
        aligned = aligned and table.multiple > 1
        launch(
            stage_kernel,
            (programs,),
            base,
            rounded_type(stages, tensors, base),
            float32,
            places,
            permutation,
            offsets,
            counters,
            rows,
            row0,
            programs,
            1.0 / temperature,
            TABLES=table.tables,
            STAGES=len(stages),
            PERSISTENT=persistent,
            ITEMS_PER_STEP=table.items_per_step,
            OWN_ITEMS_PER_STEP=table.own_items_per_step,
            ANY_ROWS_LAG=table.any_rows_lag,
            OWN_LAG=table.own_lag,
            M=program.branches,
            M_PADDED=padded(program.branches),
            SCORE=program.score,
            BACKWARD=program.backward,
            KEEP=program.keep,
            LARGEST=program.largest,
            PRECISION=dot_precision(base.dtype),
            ALIGNED=aligned,
            MULTIPLE=table.multiple if aligned else 1,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            ITEM_ROWS=min(config.item_rows, config.rows),
            GROUP_ELEMENTS=config.group_elements,
            WHOLE_ELEMENTS=config.whole_elements,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def addresses(stages: Sequence[Stage], tensors: Mapping[str, Tensor], base: Tensor) -> tuple[tuple[Tensor, ...], bool]:
    """FIELDS tensors a stage, and whether all start at whole vectors."""
    places: list[Tensor] = []
    for stage in stages:
        named = dict(stage.places)
        places += [tensors[named[number]] if number in named else base for number in range(FIELDS.value)]
    return tuple(places), all(tensor.data_ptr() % 16 == 0 for tensor in places)


def rounded_type(stages: Sequence[Stage], tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Some tensor of the type that foreign factors are rounded to."""
    for stage in stages:
        if stage.kind == FOREIGN_PRODUCT.value:
            return tensors[dict(stage.places)[A1.value]]
        if stage.kind == ROUND_ROWS.value:
            return tensors[dict(stage.places)[OUT.value]]
    return base
