"""What a kernel knows of the stages it runs at compile time, and how it looks them up.

A run of stages is one launch of :func:`saml_kernels.backends.triton.stage_kernel.stage_kernel`; every number that
follows from widths and options alone stands in its :class:`Tables`, one entry a stage, and addresses come as a flat
tuple of tensors, ``FIELDS`` a stage. So one code path serves every layer, and neither a batch size nor an address is
ever a reason to compile again.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import triton
import triton.language as tl

PRODUCT = tl.constexpr(0)
FOREIGN_PRODUCT = tl.constexpr(1)
ROUND_ROWS = tl.constexpr(2)
MUTUAL_OWN_ROW = tl.constexpr(3)
MUTUAL_TABLE = tl.constexpr(4)
MUTUAL_BACKWARD = tl.constexpr(5)

FIELDS = tl.constexpr(9)
"""Addresses a stage has; what stands where is said at the device function that reads them."""

NONE = tl.constexpr(0)
ELEMENT = tl.constexpr(1)
FLOAT32 = tl.constexpr(2)
"""Of an addend or a result: in the inputs' type, or in float32."""


@dataclass(frozen=True)
class Tables:
    """By name one entry a stage, or a single one where all are equal."""

    kind: tuple[int, ...]
    own: tuple[int, ...]
    """1: tiles of one scenario, whose branch is the stage's; 0: tiles of any rows."""
    items: tuple[int, ...]
    """Work items of a tile."""
    first_item: tuple[int, ...]
    """Of this stage among the items of one step."""
    first_own_item: tuple[int, ...]
    """As first_item, among the stages on tiles of one scenario."""
    lag: tuple[int, ...]
    """Steps by which a stage runs behind the first, so that what it waits for has long begun."""
    dependency_1: tuple[int, ...]
    dependency_2: tuple[int, ...]
    """Stages that must be done with the tile's rows, -1 for none."""
    shared: tuple[int, ...]
    """1: the auxiliary network's, one branch to which every row belongs."""
    column_tiles: tuple[int, ...]
    """Tiles of a product's columns; branches of a stage that rounds rows."""
    k1: tuple[int, ...]
    k2: tuple[int, ...]
    n: tuple[int, ...]
    a1_row: tuple[int, ...]
    a1_branch: tuple[int, ...]
    a1_gathered: tuple[int, ...]
    """1: rows stand in the caller's order; 0: sorted by scenario. Also of other operands."""
    a2_row: tuple[int, ...]
    a2_gathered: tuple[int, ...]
    w1_branch: tuple[int, ...]
    w1_start: tuple[int, ...]
    w1_step: tuple[int, ...]
    w2_branch: tuple[int, ...]
    w2_start: tuple[int, ...]
    w2_step: tuple[int, ...]
    bias: tuple[int, ...]
    out_type: tuple[int, ...]
    out_row: tuple[int, ...]
    out_branch: tuple[int, ...]
    out_gathered: tuple[int, ...]
    value: tuple[int, ...]
    """Forward: 1, the own rows are also written to a (B, n) matrix. Backward: 1, δ' reads V or A."""
    value_row: tuple[int, ...]
    value_branch: tuple[int, ...]
    value_gathered: tuple[int, ...]
    activation: tuple[int, ...]
    argument: tuple[int, ...]
    """1: δ's argument is written (forward) or read (backward)."""
    addend: tuple[int, ...]
    addend_row: tuple[int, ...]
    addend_branch: tuple[int, ...]
    addend_gathered: tuple[int, ...]
    gate: tuple[int, ...]
    """Width of a mutual unit's gate: d, or 1."""


T = TypeVar("T")


def tabulate(tables: type[T], entries: Sequence[dict[str, int]]) -> T:
    """Entries of stages, or of weights, as a dataclass of columns; what no entry names is 0."""

    def column(name: str) -> tuple[int, ...]:
        values = tuple(int(entry.get(name, 0)) for entry in entries)
        return values[:1] if len(set(values)) == 1 else values

    return tables(**{field.name: column(field.name) for field in dataclasses.fields(cast(Any, tables))})


@triton.constexpr_function
def column(tables: Any, name: str) -> Any:
    """One field of the tables."""
    return getattr(tables, name)


@triton.constexpr_function
def entry(tables: Any, name: str, stage: int) -> Any:
    """One field of one stage, where the stage is known at compile time."""
    values = getattr(tables, name)
    return values[0] if len(values) == 1 else values[stage]


@triton.constexpr_function
def occurs(tables: Any, name: str, *values: int) -> bool:
    """Whether any stage has one of ``values``."""
    return any(value in values for value in getattr(tables, name))


@triton.constexpr_function
def bits(values: tuple[int, ...]) -> int:
    """Bits an entry takes where all entries fit one word together, else 0."""
    width = max(values).bit_length()
    return width if min(values) >= 0 and width * len(values) < 63 else 0


@triton.constexpr_function
def packed(values: tuple[int, ...]) -> int:
    """All entries in one word, the first in the lowest bits."""
    width = max(values).bit_length()
    return sum(value << (width * place) for place, value in enumerate(values))


@triton.constexpr_function
def divided(values: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    """Every entry by ``divisor``, which divides it."""
    return tuple(value // divisor for value in values)


@triton.jit
def pick_value(VALUES: tl.constexpr, stage):
    """The stage's entry of several."""
    if bits(VALUES) > 0:
        # Flags and other small numbers: a shift instead of a choice a stage.
        word = tl.full((), packed(VALUES), tl.int64)
        return ((word >> (stage * bits(VALUES))) & ((1 << bits(VALUES)) - 1)).to(tl.int32)
    else:
        value = tl.zeros((), tl.int32)
        for s in tl.static_range(len(VALUES)):
            if stage == s:
                value = tl.full((), VALUES[s], tl.int32)
        return value


@triton.jit
def pick(TABLES: tl.constexpr, NAME: tl.constexpr, stage):
    """One field of a stage known at run time only; a constant where all stages agree."""
    values: tl.constexpr = column(TABLES, NAME)
    if len(values) == 1:
        only: tl.constexpr = values[0]
        return only
    else:
        return pick_value(values, stage)


@triton.jit
def pick_multiple(TABLES: tl.constexpr, NAME: tl.constexpr, stage, MULTIPLE: tl.constexpr):
    """As pick, where all entries are multiples of MULTIPLE: written as a product, the compiler sees that they are."""
    values: tl.constexpr = column(TABLES, NAME)
    if len(values) == 1:
        only: tl.constexpr = values[0]
        return only
    else:
        return pick_value(divided(values, MULTIPLE), stage) * MULTIPLE


@triton.jit
def address(
    base,
    places,
    FIELD: tl.constexpr,
    stage,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIELDS_EACH: tl.constexpr = FIELDS,
):
    """Where a stage's field stands among the FIELDS_EACH it has, as a pointer of base's type.

    Several addresses become one as an offset from ``base``: a choice between pointers would lose their alignment.
    """
    if STAGES == 1:
        return places[FIELD].to(base.dtype)
    else:
        bytes_each: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
        offset = tl.zeros((), tl.int64)
        for s in tl.static_range(STAGES):
            offset = tl.where(stage == s, places[s * FIELDS_EACH + FIELD].to(tl.int64), offset)
        # Subtracted after the choice: differences of all addresses would be computed ahead and occupy registers.
        offset = (offset - base.to(tl.int64)) // bytes_each
        if ALIGNED:
            offset = tl.multiple_of(offset, 16 // bytes_each)
        return base + offset
