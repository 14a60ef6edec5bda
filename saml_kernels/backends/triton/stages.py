"""The kinds of stages a trunk is made of: what each computes, which tensors it reads and writes, how it is cut.

A stage is a frozen dataclass that follows from shapes and options alone. It names its tensors; a call looks them up and
hands them to the kernel as the NamedTuple of pointers beside it. The same dataclass, without names, is the kernel's
compile-time description (sharing.py). ``None`` is a number or a tensor that nobody reads.

Rows are sorted by scenario unless they are ``gathered``. Stages that are ``own`` run on tiles of one scenario, whose
branch is theirs; the others on tiles of any rows, with a part for each of their ``branches``.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import torch

T = TypeVar("T")
host = functools.partial(dataclasses.field, metadata={"host": True})
"""A field that the kernel's description does not have: names, order, the split into launches."""


def without_host(part: T) -> T:
    """The part with None for every field that is the host's, also inside its fields."""
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(cast(Any, part)):
        value = getattr(part, each.name)
        if each.metadata.get("host"):
            changed[each.name] = None
        elif dataclasses.is_dataclass(value):
            changed[each.name] = without_host(value)
    return dataclasses.replace(cast(Any, part), **changed)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a tensor (B, width) or (B, M, width) stand."""

    tensor: str | None = host(default=None)
    stride: int | None = None
    """Elements from row to row."""
    branch_stride: int | None = None
    """Elements from branch to branch, 0 where all branches have the same rows."""
    gathered: bool | None = None
    """Rows stand in the caller's order and are reached through the permutation."""
    present: bool = True

    @staticmethod
    def shared(tensor: str, width: int, *, gathered: bool = False) -> "Rows":
        """(B, width), the same for every branch."""
        return Rows(tensor, width, 0, gathered)

    @staticmethod
    def by_branch(tensor: str, branches: int, width: int, *, gathered: bool = False) -> "Rows":
        """(B, M, width)."""
        return Rows(tensor, branches * width, width, gathered)


@dataclass(frozen=True)
class Weight:
    """Lines of a weight (M, k, n) or (k, n)."""

    tensor: str | None = host(default=None)
    stride: int | None = None
    """Elements from line to line."""
    branch_stride: int | None = None
    start: int | None = None
    """Elements before the first line that is read."""


@dataclass(frozen=True)
class Factor:
    """A product's two factors: k columns of the rows meet k lines of the weight."""

    rows: Rows
    weight: Weight
    k: int


NO_ROWS = Rows(present=False)
NO_FACTOR = Factor(NO_ROWS, Weight(), 0)


@dataclass(frozen=True)
class ProductTile:
    """How a product is cut: BLOCK_M rows by BLOCK_N columns, BLOCK_K steps of k at a time."""

    block_m: int
    block_n: int
    block_k: int
    vector: int
    """Elements of which every width, stride and address of the stage is a multiple."""
    whole_vectors: bool
    """These are 16 bytes."""
    column_tiles: int | None
    """Tiles of the result's columns."""
    row_parts: int
    """Tiles of rows in one tile of the launch."""
    precision: str
    """How matrix units take float32 factors: "tf32" or "ieee"."""


@dataclass(frozen=True)
class RowsTile:
    """How a stage that is no product is cut."""

    item_rows: int
    """Rows of a work item."""
    rows: int
    """Rows that are taken at a time."""
    columns: int
    """Columns of a row that are read at a time."""
    vector: int
    """Of these, what a thread reads at once."""


Tile = ProductTile | RowsTile


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What work items of one kind do. The fields here are the schedule's; a kind adds what its kernel needs."""

    pointers: ClassVar[type]
    """NamedTuple of the tensors a kernel gets; each field is a tuple over the stages that share the kernel's body."""

    name: str | None = host()
    own: bool
    """Runs on tiles of one scenario."""
    after: tuple[str, ...] | None = host(default=())
    """Names of the stages it waits for, two at most."""
    branches: int | None = host(default=1)
    """Branches that a tile of any rows has items for."""
    own_launch: bool | None = host(default=False)
    """The schedule "per_layer" gives it a launch of its own."""
    num_scenarios: int
    tile: Tile | None = None
    """How it is cut; None until it is planned (configs.py)."""
    given: Any = None
    """In a kernel's description, as ``pointers``: numbers of the stages that have the tensor."""

    def __post_init__(self) -> None:
        if isinstance(self.after, tuple) and len(self.after) > 2:
            raise ValueError(f"stage {self.name} waits for {len(self.after)} stages; a schedule holds two")

    def tensors(self) -> tuple[str | None, ...]:
        """Names of its tensors, in the order of ``pointers``."""
        raise NotImplementedError

    def described(self) -> Self:
        """The kernel's: without what only the host reads."""
        return without_host(self)


class ProductStage(Stage):
    """A stage that is a product with an epilogue."""

    def strides(self) -> tuple[int | None, ...]:
        """Every width and stride by which its addresses move in vectors."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """Columns of its result."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Columns of its first factors together."""
        raise NotImplementedError


class RowsStage(Stage):
    """A stage that is no product: every row for itself."""

    @property
    def row_elements(self) -> int:
        """What it reads of a row."""
        raise NotImplementedError


class LayerPointers(NamedTuple):
    first: Any
    first_weight: Any
    second: Any
    bias: Any
    out: Any
    saved: Any
    preact: Any
    gated: Any


@dataclass(frozen=True, kw_only=True)
class Layer(ProductStage):
    """out = δ(z), or γ δ(z) ∘ gated, z = bias + [A1 ; A2] W: a layer of a branch or the auxiliary network, a gate."""

    pointers: ClassVar[type] = LayerPointers

    first: Factor
    second: Factor = NO_FACTOR
    n: int
    bias: str | None = host()
    activation: str
    """Name of δ; "sigmoid" is a gate's."""
    out: Rows
    saved: Rows = NO_ROWS
    """Where own rows of δ(z) go besides, for backward."""
    preact: Rows = NO_ROWS
    """Where own rows of z go, for backward."""
    every_row_is_own: bool = False
    """Every row belongs to the branch: the auxiliary network has one, and on tiles of one scenario it is theirs."""
    gated: Rows = NO_ROWS
    """What δ(z) multiplies."""
    gate_scale: float = 1.0
    """γ."""

    def tensors(self) -> tuple[str | None, ...]:
        # Of a layer's weight both factors meet lines, one after another.
        factors = self.first.rows.tensor, self.first.weight.tensor, self.second.rows.tensor
        rows = self.out, self.saved, self.preact, self.gated
        return LayerPointers(*factors, self.bias, *(each.tensor for each in rows))

    def strides(self) -> tuple[int | None, ...]:
        rows = self.out, self.saved, self.preact, self.gated
        return (*_strides(self.first, self.second), self.n, *_steps(*rows))

    @property
    def columns(self) -> int:
        return self.n

    @property
    def depth(self) -> int:
        return self.first.k + self.second.k


class InputGradientPointers(NamedTuple):
    first: Any
    first_weight: Any
    second: Any
    second_weight: Any
    addend: Any
    addend_float32: Any
    saved: Any
    preact: Any
    out: Any
    out_float32: Any
    gated: Any
    d_gated: Any


@dataclass(frozen=True, kw_only=True)
class InputGradient(ProductStage):
    """out = (addend + [A1 ; A2] Wᵀ) ∘ δ'(z): dgrad. δ' follows from the saved δ(z), or from the preactivation z.

    Of a gate, whose result is γ δ(z) ∘ gated, the sum times γ ∘ gated; and d_gated is the sum times γ δ(z).
    """

    pointers: ClassVar[type] = InputGradientPointers

    first: Factor = NO_FACTOR
    second: Factor = NO_FACTOR
    n: int
    activation: str = "identity"
    addend: Rows = NO_ROWS
    addend_float32: bool | None = None
    saved: Rows = NO_ROWS
    """δ(z) of the own branch."""
    preact: Rows = NO_ROWS
    """z, where δ' needs it."""
    out: Rows
    out_float32: bool = False
    gated: Rows = NO_ROWS
    d_gated: Rows = NO_ROWS
    gate_scale: float = 1.0
    """γ."""

    def tensors(self) -> tuple[str | None, ...]:
        first, second, addend, out = self.first, self.second, self.addend.tensor, self.out.tensor
        added, added_float32 = (None, addend) if self.addend_float32 else (addend, None)
        written, written_float32 = (None, out) if self.out_float32 else (out, None)
        factors = first.rows.tensor, first.weight.tensor, second.rows.tensor, second.weight.tensor
        read = added, added_float32, self.saved.tensor, self.preact.tensor
        gate = self.gated.tensor, self.d_gated.tensor
        return InputGradientPointers(*factors, *read, written, written_float32, *gate)

    def strides(self) -> tuple[int | None, ...]:
        rows = self.out, self.addend, self.saved, self.preact, self.gated, self.d_gated
        return (*_strides(self.first, self.second), self.n, *_steps(*rows))

    @property
    def columns(self) -> int:
        return self.n

    @property
    def depth(self) -> int:
        return self.first.k + self.second.k


class QuantizeRowsPointers(NamedTuple):
    first: Any
    second: Any
    quantized: Any
    scale: Any


@dataclass(frozen=True, kw_only=True)
class QuantizeRows(RowsStage):
    """Rows of [A1 ; A2] in another type, each with a scale (int8, float8), zeros up to ``width``.

    ``quantized`` is (B, views, width), ``scale`` (B, views); there are M views where every branch has rows of its own.
    """

    pointers: ClassVar[type] = QuantizeRowsPointers

    first: Rows
    k1: int
    second: Rows = NO_ROWS
    k2: int = 0
    width: int
    views: int
    quantized: str | None = host()
    scale: str | None = host()
    largest: float
    """The type's largest value, 0 where nothing is scaled."""

    @property
    def row_elements(self) -> int:
        return self.width

    def tensors(self) -> tuple[str | None, ...]:
        return QuantizeRowsPointers(self.first.tensor, self.second.tensor, self.quantized, self.scale)


class QuantizedLayerPointers(NamedTuple):
    rows: Any
    scale: Any
    weight: Any
    weight_scale: Any
    bias: Any
    out: Any


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer(ProductStage):
    """out = δ(bias + s_row s_column (Â Ŵ)) of foreign branches; rows of a branch's own scenario are left alone.

    Â is (B, k) or (B, M, k) with scales (B,) or (B, M), Ŵ (M, n, k) with scales (M, n).
    """

    pointers: ClassVar[type] = QuantizedLayerPointers

    rows: Rows
    k: int
    n: int
    weight: str | None = host()
    bias: str | None = host()
    activation: str
    out: Rows
    scaled: bool
    itemsize: int
    """Bytes of a quantised number."""

    def tensors(self) -> tuple[str | None, ...]:
        rows, weight = self.rows.tensor, self.weight
        return QuantizedLayerPointers(rows, f"{rows}_scale", weight, f"{weight}_scale", self.bias, self.out.tensor)

    def strides(self) -> tuple[int | None, ...]:
        return (self.n, *_steps(self.out))

    @property
    def columns(self) -> int:
        return self.n

    @property
    def depth(self) -> int:
        return self.k


class MutualOwnRowPointers(NamedTuple):
    streams: Any
    gate: Any
    alpha: Any
    mutual: Any


@dataclass(frozen=True, kw_only=True)
class MutualOwnRow(RowsStage):
    """α_t and M_t = V_t + g_t ∘ Σ_{j≠t} α_tj V_j of every row's own branch t."""

    pointers: ClassVar[type] = MutualOwnRowPointers

    streams: Rows
    d: int
    gate: str | None = host()
    gate_width: int
    alpha: str | None = host()
    mutual: Rows
    score: str

    @property
    def row_elements(self) -> int:
        return self.num_scenarios * self.d

    def tensors(self) -> tuple[str | None, ...]:
        return MutualOwnRowPointers(self.streams.tensor, self.gate, self.alpha, self.mutual.tensor)


class MutualTablePointers(NamedTuple):
    streams: Any
    gates: Any
    alpha: Any
    mutual: Any
    mixed: Any


@dataclass(frozen=True, kw_only=True)
class MutualTable(RowsStage):
    """M_i of all branches i of every row, where another mutual unit reads them; own rows of α, and M_t on request."""

    pointers: ClassVar[type] = MutualTablePointers

    streams: Rows
    d: int
    gates: str | None = host()
    gate_width: int
    alpha: str | None = host()
    mutual: str | None = host()
    """M_t (B, d) for backward."""
    mixed: str | None = host()
    """M of all branches (B, M, d)."""
    save: bool
    """M_t is written."""
    score: str

    @property
    def row_elements(self) -> int:
        return self.num_scenarios * self.d

    def tensors(self) -> tuple[str | None, ...]:
        return MutualTablePointers(self.streams.tensor, self.gates, self.alpha, self.mutual, self.mixed)


class MutualBackwardPointers(NamedTuple):
    streams: Any
    gate: Any
    alpha: Any
    d_mutual: Any
    d_own: Any
    d_gate: Any


@dataclass(frozen=True, kw_only=True)
class MutualBackward(RowsStage):
    """The mutual unit's backward, own row: dz_g, and dV_t but for the gate's product dz_g Uᵀ."""

    pointers: ClassVar[type] = MutualBackwardPointers

    streams: Rows
    d: int
    gate: str | None = host()
    gate_width: int
    alpha: str | None = host()
    d_mutual: str | None = host()
    """dM (B, d), float32."""
    d_own: str | None = host()
    """dV_t without dz_g Uᵀ (B, d), float32."""
    d_gate: str | None = host()
    """dz_g (B, gate_width)."""
    score: str

    @property
    def row_elements(self) -> int:
        return self.num_scenarios * self.d

    def tensors(self) -> tuple[str | None, ...]:
        names = self.streams.tensor, self.gate, self.alpha, self.d_mutual, self.d_own, self.d_gate
        return MutualBackwardPointers(*names)


class WeightGradientPointers(NamedTuple):
    first: Any
    second: Any
    dz: Any
    d_weight: Any
    d_bias: Any


@dataclass(frozen=True, kw_only=True)
class WeightGradient(ProductStage):
    """dW_k = Σ [A1 ; A2]ᵀ dz and db_k = Σ dz over scenario k's rows, or over all rows: wgrad."""

    pointers: ClassVar[type] = WeightGradientPointers

    first: Rows
    k1: int
    second: Rows = NO_ROWS
    k2: int = 0
    n: int
    dz: str | None = host()
    """(B, n), sorted rows."""
    d_weight: str | None = host()
    """(M, k1 + k2, n), or (k1 + k2, n)."""
    d_bias: str | None = host()
    by_scenario: bool = True
    """There is a weight for every scenario."""
    first_tile: int | None = None
    """Number of its first tile among those of the launch."""
    row_tiles: int | None = None
    """Tiles of the weight's rows; one more is the bias."""
    whole_tiles: bool | None = None
    """No tile has rows of both factors."""

    def tensors(self) -> tuple[str | None, ...]:
        return WeightGradientPointers(self.first.tensor, self.second.tensor, self.dz, self.d_weight, self.d_bias)

    def strides(self) -> tuple[int | None, ...]:
        return (self.k1, self.k2, self.n, *_steps(self.first, self.second))

    @property
    def columns(self) -> int:
        return self.n


def _strides(*factors: Factor) -> tuple[int | None, ...]:
    return tuple(
        number
        for factor in factors
        for number in (
            factor.k,
            *_steps(factor.rows),
            *(factor.weight.stride, factor.weight.branch_stride, factor.weight.start),
        )
    )


def _steps(*rows: Rows) -> tuple[int | None, ...]:
    return tuple(number for each in rows for number in (each.stride, each.branch_stride))


@dataclass(frozen=True)
class Buffer:
    """A tensor (rows, *shape) that stages write, of the inputs' type unless it has a ``dtype``."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    of_all_branches: bool = False
    """(rows, M, width) or as large: what inference keeps for some rows at a time only."""
    temporary: bool = False
    """Backward does not read it."""

    @property
    def elements(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Program:
    """Stages in an order in which each comes after what it waits for, and the buffers they write."""

    stages: tuple[Stage, ...]
    buffers: dict[str, Buffer]
    planned: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Launches that were planned before, by everything they depend on (launch.py)."""
