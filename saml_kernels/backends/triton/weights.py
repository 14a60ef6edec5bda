"""All weight and bias gradients of a backward in one launch: dW_k = Σ [A1 ; A2]ᵀ dz over scenario k's rows.

Every program sums one tile of one weight over one chunk of one scenario's rows. A scenario with more rows than a chunk
has several; each leaves its sum in a scratch slot, and the last one to end adds them in order. So every place has one
writer, nothing adds atomically, one large scenario does not hold up the others, and bits are the same in every run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.functions import chunk_of_scenario
from saml_kernels.backends.triton.launching import Grouped, dot_precision, launch, padded
from saml_kernels.backends.triton.product import rows_of
from saml_kernels.backends.triton.program import Matrix
from saml_kernels.backends.triton.tables import address, column, entry, pick, pick_multiple, tabulate

WEIGHT_FIELDS = tl.constexpr(5)
"""Addresses of a weight: A1, A2, dz, dW, db."""


@dataclass(frozen=True)
class WeightTables:
    """By name one entry a weight, or a single one where all are equal."""

    by_scenario: tuple[int, ...]
    """1: one weight a scenario; 0: one for all rows."""
    k1: tuple[int, ...]
    k2: tuple[int, ...]
    n: tuple[int, ...]
    a1_row: tuple[int, ...]
    a1_branch: tuple[int, ...]
    a1_gathered: tuple[int, ...]
    a2_row: tuple[int, ...]
    a2_gathered: tuple[int, ...]
    column_tiles: tuple[int, ...]
    row_tiles: tuple[int, ...]
    """Tiles of the weight's rows; one more is the bias."""
    first_tile: tuple[int, ...]
    """Of this weight among those of all."""


@triton.jit(do_not_specialize=["rows", "chunk"])
def weight_gradient_kernel(
    base,
    places,
    sums,
    permutation,
    offsets,
    counters,
    rows,
    chunk,
    TABLES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of one weight, or a stretch of its bias, over one chunk of rows."""
    tile = tl.program_id(0)
    weight = tl.zeros((), tl.int32)
    for s in tl.static_range(1, WEIGHTS):
        weight += (tile >= entry(TABLES, "first_tile", s)).to(tl.int32)
    column_tiles = pick(TABLES, "column_tiles", weight)
    inside = tile - pick(TABLES, "first_tile", weight)
    row_tile = inside // column_tiles
    K1 = pick_multiple(TABLES, "k1", weight, MULTIPLE)
    K2 = pick_multiple(TABLES, "k2", weight, MULTIPLE)
    N = pick_multiple(TABLES, "n", weight, MULTIPLE)
    n = (inside % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    by_scenario = pick(TABLES, "by_scenario", weight)
    scenario, begin, end, part, parts, slot = chunk_of_scenario(
        offsets, tl.program_id(1), rows, chunk, by_scenario, M, M_PADDED
    )
    if scenario >= 0:
        wide = scenario.to(tl.int64)
        dz = address(base, places, 2, weight, WEIGHTS, ALIGNED, WEIGHT_FIELDS)
        is_bias = row_tile == pick(TABLES, "row_tiles", weight)
        if is_bias:
            bias_total = tl.zeros((COLUMNS,), tl.float32)
            for bias_row0 in range(begin, end, DEPTH):
                bias_row = bias_row0 + tl.arange(0, DEPTH)
                bias_mask = (bias_row < end)[:, None] & (n < N)[None, :]
                bias_total += tl.sum(
                    tl.load(dz + (bias_row * N)[:, None] + n[None, :], mask=bias_mask, other=0.0).to(tl.float32), 0
                )
            db = address(base, places, 4, weight, WEIGHTS, False, WEIGHT_FIELDS) + wide * N + n
            if parts == 1:
                tl.store(db, bias_total, mask=n < N)
            else:
                bias_here = sums + (slot * TILES + tile) * (ROWS * COLUMNS) + tl.arange(0, COLUMNS)
                tl.store(bias_here, bias_total)
                tl.debug_barrier()
                bias_counter = counters + tile * M + scenario
                if tl.atomic_add(bias_counter, 1) == parts - 1:
                    bias_total = tl.zeros((COLUMNS,), tl.float32)
                    bias_sum = bias_here - part.to(tl.int64) * (TILES * ROWS * COLUMNS)
                    for _ in range(0, parts):
                        bias_total += tl.load(bias_sum)
                        bias_sum += TILES * ROWS * COLUMNS
                    tl.store(db, bias_total, mask=n < N)
                    tl.store(bias_counter, 0)
        else:
            k = row_tile * ROWS + tl.arange(0, ROWS)
            of_first = k < K1
            a1 = address(base, places, 0, weight, WEIGHTS, ALIGNED, WEIGHT_FIELDS)
            a1_step = pick_multiple(TABLES, "a1_row", weight, MULTIPLE)
            a1_start = wide * pick_multiple(TABLES, "a1_branch", weight, MULTIPLE)
            two: tl.constexpr = column(TABLES, "k2") != (0,)
            second_tile = row_tile * ROWS >= K1
            if two:
                bytes_each: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
                a2 = address(base, places, 1, weight, WEIGHTS, ALIGNED, WEIGHT_FIELDS)
                a2_start = (a2.to(tl.int64) - a1.to(tl.int64)) // bytes_each - K1
                a2_step = pick_multiple(TABLES, "a2_row", weight, MULTIPLE)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for row0 in range(begin, end, DEPTH):
                row = row0 + tl.arange(0, DEPTH)
                live = row < end
                caller = tl.load(permutation + row, mask=live, other=0)
                place = a1_start + (rows_of(row, caller, TABLES, "a1_gathered", weight) * a1_step)[:, None]
                if two:
                    other = a2_start + (rows_of(row, caller, TABLES, "a2_gathered", weight) * a2_step)[:, None]
                    if WHOLE_TILES:
                        # A choice for the whole tile keeps the contiguity along k.
                        place = tl.where(second_tile, other, place)
                        if ALIGNED:
                            place = tl.multiple_of(place, (1, MULTIPLE))
                    else:
                        place = tl.where(of_first[None, :], place, other)
                place = place + k[None, :]
                a_tile = tl.load(a1 + place, mask=live[:, None] & (k < K1 + K2)[None, :], other=0.0)
                dz_tile = tl.load(
                    dz + (row * N)[:, None] + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0
                )
                total = tl.dot(tl.trans(a_tile), dz_tile, total, input_precision=PRECISION)
            dw = address(base, places, 3, weight, WEIGHTS, ALIGNED, WEIGHT_FIELDS) + wide * (K1 + K2) * N
            dw += (k.to(tl.int64) * N)[:, None] + n[None, :]
            mask = (k < K1 + K2)[:, None] & (n < N)[None, :]
            if parts == 1:
                tl.store(dw, total, mask=mask)
            else:
                here = sums + (slot * TILES + tile) * (ROWS * COLUMNS)
                within = (tl.arange(0, ROWS) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
                tl.store(here + within, total)
                tl.debug_barrier()
                counter = counters + tile * M + scenario
                if tl.atomic_add(counter, 1) == parts - 1:
                    total = tl.zeros((ROWS, COLUMNS), tl.float32)
                    first_sum = here - part.to(tl.int64) * (TILES * ROWS * COLUMNS)
                    for _ in range(0, parts):
                        total += tl.load(first_sum + within)
                        first_sum += TILES * ROWS * COLUMNS
                    tl.store(dw, total, mask=mask)
                    tl.store(counter, 0)


@dataclass(frozen=True)
class WeightGradient:
    """One weight's gradient: dW (M, k1 + k2, n) or (k1 + k2, n) and db from factors and dz (B, n), sorted rows."""

    first: tuple[Matrix, int]
    second: tuple[Matrix, int] | None
    dz: str
    n: int
    weight: str
    """Names of the gradients: d_``weight``, d_``bias``."""
    bias: str
    by_scenario: bool = True


@dataclass(frozen=True)
class Arranged:
    """The launch's compile-time side."""

    tables: WeightTables
    tiles: int
    multiple: int
    whole_tiles: bool
    """No tile has rows of both factors."""


@dataclass(frozen=True, eq=False)
class WeightProgram:
    """Gradients that one launch computes; follows from shapes alone."""

    branches: int
    gradients: tuple[WeightGradient, ...]
    plans: dict[tuple[Config, int], Arranged] = field(default_factory=dict)

    def arranged(self, config: Config, vector: int) -> Arranged:
        """Tables of the launch; made once."""
        if (config, vector) not in self.plans:
            self.plans[config, vector] = _arranged(self.gradients, config, vector)
        return self.plans[config, vector]


def _arranged(gradients: Sequence[WeightGradient], config: Config, vector: int) -> Arranged:
    entries: list[dict[str, int]] = []
    tiles = 0
    for gradient in gradients:
        rows, k1 = gradient.first
        others, k2 = gradient.second or (Matrix("", 0), 0)
        column_tiles = triton.cdiv(gradient.n, config.columns)
        row_tiles = triton.cdiv(k1 + k2, config.rows)
        entries.append(
            {
                "by_scenario": int(gradient.by_scenario),
                "k1": k1,
                "k2": k2,
                "n": gradient.n,
                "a1_row": rows.row,
                "a1_branch": rows.branch,
                "a1_gathered": int(rows.gathered),
                "a2_row": others.row,
                "a2_gathered": int(others.gathered),
                "column_tiles": column_tiles,
                "row_tiles": row_tiles,
                "first_tile": tiles,
            }
        )
        tiles += (row_tiles + 1) * column_tiles
    names = ("k1", "k2", "n", "a1_row", "a1_branch", "a2_row")
    whole = all(item[name] % vector == 0 for item in entries for name in names)

    tables = tabulate(WeightTables, entries)
    whole_tiles = all(item["k1"] % config.rows == 0 for item in entries if item["k2"])
    return Arranged(tables, tiles, vector if whole else 1, whole_tiles)


def num_counters(program: WeightProgram, config: Config, vector: int) -> int:
    """Counters of the launch: one a tile and scenario."""
    return program.arranged(config, vector).tiles * program.branches


def run(
    program: WeightProgram,
    config: Config,
    tensors: Mapping[str, Tensor],
    grouped: Grouped,
    rows: int,
    base: Tensor,
) -> None:
    """Writes all gradients of a program.

    Args:
        tensors: by name, factors, dz and gradients, contiguous and of one type.
        grouped: :func:`num_counters` counters at least.
        base: any tensor of that type.
    """
    vector = 16 // base.element_size()
    plan = program.arranged(config, vector)
    chunk = configs.chunk_rows(rows)
    # Scenarios of more than one chunk have fewer than 2 chunks for every chunk's worth of rows.
    slots = 2 * rows // chunk if rows > chunk else 0
    sums = base.new_empty(max(1, slots * plan.tiles * config.rows * config.columns), dtype=torch.float32)
    places: list[Tensor] = []
    for gradient in program.gradients:
        second = tensors[gradient.second[0].name] if gradient.second else base
        places += [
            tensors[gradient.first[0].name],
            second,
            tensors[gradient.dz],
            tensors[f"d_{gradient.weight}"],
            tensors[f"d_{gradient.bias}"],
        ]
    aligned = plan.multiple > 1 and _starts_at_vectors(places)
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    launch(
        weight_gradient_kernel,
        (plan.tiles, triton.cdiv(rows, chunk) + program.branches),
        base,
        tuple(places),
        sums,
        *grouped,
        rows,
        chunk,
        TABLES=plan.tables,
        WEIGHTS=len(program.gradients),
        TILES=plan.tiles,
        M=program.branches,
        M_PADDED=padded(program.branches),
        PRECISION=dot_precision(base.dtype),
        ALIGNED=aligned,
        MULTIPLE=plan.multiple if aligned else 1,
        WHOLE_TILES=plan.whole_tiles,
        ROWS=config.rows,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        **options,
    )


def _starts_at_vectors(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
