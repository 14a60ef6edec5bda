"""Device functions that several kernels share: δ and its derivative, α, tiles of one scenario."""

import triton
import triton.language as tl

# As saml_kernels.autograd numbers them.
RELU = tl.constexpr(0)
LEAKY_RELU = tl.constexpr(1)
GELU = tl.constexpr(2)
SILU = tl.constexpr(3)
TANH = tl.constexpr(4)
IDENTITY = tl.constexpr(5)
SIGMOID = tl.constexpr(6)
"""Not a δ: the gate's."""
RATIO = tl.constexpr(0)

NORM_EPSILON = tl.constexpr(1e-8)
DEGENERATE_SUM = tl.constexpr(1e-6)


@triton.jit
def hyperbolic_tangent(x):
    t = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -value, value)


@triton.jit
def gelu_inner(z):
    # √(2/π) and the cubic coefficient of the tanh form.
    return hyperbolic_tangent(0.7978845608028654 * (z + 0.044715 * z * z * z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """δ(z), or the gate's sigmoid."""
    if ACTIVATION == RELU:
        # A NaN must survive, so the comparison decides what is zero.
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z > 0, z, 0.01 * z)
    elif ACTIVATION == GELU:
        z = 0.5 * z * (1.0 + gelu_inner(z))
    elif ACTIVATION == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == TANH:
        z = hyperbolic_tangent(z)
    elif ACTIVATION == SIGMOID:
        z = 1.0 / (1.0 + tl.exp(-z))
    return z


@triton.jit
def activate_backward(dv, v, z, ACTIVATION: tl.constexpr):
    """dz = dv ∘ δ'(z), from v = δ(z); gelu and silu from z."""
    if ACTIVATION == RELU:
        dv = tl.where(v > 0, dv, 0.0)
    elif ACTIVATION == LEAKY_RELU:
        dv = tl.where(v > 0, dv, 0.01 * dv)
    elif ACTIVATION == GELU:
        t = gelu_inner(z)
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        dv = dv * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    elif ACTIVATION == SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        dv = dv * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == TANH:
        dv = dv * (1.0 - v * v)
    return dv


@triton.jit
def score_weights(cosine, foreign, SCORE: tl.constexpr, inverse_temperature):
    """α along the last axis from the cosines; ``foreign`` is False where α is 0: the own entry and padding."""
    cosine = tl.where(foreign, cosine, 0.0)
    if SCORE == RATIO:
        total = tl.sum(cosine, axis=1)[:, None]
        degenerate = tl.abs(total) < DEGENERATE_SUM
        argument = tl.where(degenerate, 0.0, cosine / tl.where(degenerate, 1.0, total))
    else:
        argument = cosine * inverse_temperature
    argument = tl.where(foreign, argument, float("-inf"))
    # With one branch nothing is foreign; -inf - -inf would be NaN.
    largest = tl.max(argument, axis=1)[:, None]
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.where(foreign, tl.exp(argument - largest), 0.0)
    total_weight = tl.sum(weight, axis=1)[:, None]
    return weight / tl.where(total_weight == 0.0, 1.0, total_weight)


@triton.jit
def number_of_tiles(offsets, row0, rows, M: tl.constexpr, M_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """How many tiles scenario_tile counts."""
    k = tl.arange(0, M_PADDED)
    start = tl.load(offsets + k, mask=k < M, other=0) - row0
    stop = tl.load(offsets + k + 1, mask=k < M, other=0) - row0
    start = tl.minimum(tl.maximum(start, 0), rows)
    stop = tl.minimum(tl.maximum(stop, 0), rows)
    return tl.sum((stop - start + (ROWS - 1)) // ROWS, 0).to(tl.int32)


@triton.jit
def scenario_tile(offsets, tile, row0, rows, M: tl.constexpr, M_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """(scenario, first row, end of the scenario's rows) of a tile of at most ROWS sorted rows of one scenario.

    Rows count from row0, and rows of them are there. Tiles are numbered scenario by scenario; there are at most
    cdiv(rows, ROWS) + M. Past the last one the tile is empty.
    """
    k = tl.arange(0, M_PADDED)
    start = tl.load(offsets + k, mask=k < M, other=0) - row0
    stop = tl.load(offsets + k + 1, mask=k < M, other=0) - row0
    start = tl.minimum(tl.maximum(start, 0), rows)
    stop = tl.minimum(tl.maximum(stop, 0), rows)
    count = (stop - start + (ROWS - 1)) // ROWS
    end = tl.cumsum(count, 0)
    scenario = tl.sum((end <= tile).to(tl.int32), 0)
    here = k == scenario
    first = tl.sum(tl.where(here, start + (tile - (end - count)) * ROWS, 0), 0)
    last = tl.sum(tl.where(here, stop, 0), 0)
    return tl.minimum(scenario, M - 1), first, last


@triton.jit
def chunk_of_scenario(offsets, number, rows, chunk, by_scenario, M: tl.constexpr, M_PADDED: tl.constexpr):
    """(scenario, first row, end, part, parts, slot) of the chunk ``number``; scenario -1 past the last one.

    A scenario has max(1, cdiv(its rows, chunk)) parts, numbered scenario by scenario; chunks of scenarios with several
    have slots of their own, those of one scenario in a row. Without ``by_scenario`` all rows are scenario 0's.
    """
    k = tl.arange(0, M_PADDED)
    start = tl.load(offsets + k, mask=k < M, other=0)
    stop = tl.load(offsets + k + 1, mask=k < M, other=0)
    present = k < M
    if by_scenario == 0:
        start = tl.where(k == 0, 0, start)
        stop = tl.where(k == 0, rows, stop)
        present = k < 1
    parts = tl.where(present, tl.maximum((stop - start + chunk - 1) // chunk, 1), 0)
    end = tl.cumsum(parts, 0)
    slots = tl.where(parts > 1, parts, 0)
    first_slot = tl.cumsum(slots, 0) - slots
    scenario = tl.sum((end <= number).to(tl.int32), 0)
    here = k == scenario
    part = number - tl.sum(tl.where(here, end - parts, 0), 0)
    begin = tl.sum(tl.where(here, start, 0), 0) + part * chunk
    last = tl.sum(tl.where(here, stop, 0), 0)
    count = tl.sum(tl.where(here, parts, 0), 0)
    slot = tl.sum(tl.where(here, first_slot, 0), 0) + part
    scenario = tl.where(count > 0, scenario, -1)
    return scenario, begin, tl.minimum(last, begin + chunk), part, count, slot


@triton.jit
def tile_of_row(offsets, row, row0, rows, M: tl.constexpr, M_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """The number of the tile, as scenario_tile counts them, that holds a row."""
    k = tl.arange(0, M_PADDED)
    start = tl.load(offsets + k, mask=k < M, other=0) - row0
    stop = tl.load(offsets + k + 1, mask=k < M, other=0) - row0
    start = tl.minimum(tl.maximum(start, 0), rows)
    stop = tl.minimum(tl.maximum(stop, 0), rows)
    passed = (stop <= row) & (k < M)
    before = tl.sum(tl.where(passed, (stop - start + (ROWS - 1)) // ROWS, 0), 0)
    here = (start <= row) & (row < stop)
    return (before + tl.sum(tl.where(here, (row - start) // ROWS, 0), 0)).to(tl.int32)


@triton.jit
def scenario_of(offsets, row, M: tl.constexpr, M_PADDED: tl.constexpr):
    """The scenario of each of the sorted rows ``row``."""
    k = tl.arange(0, M_PADDED)
    stop = tl.load(offsets + k + 1, mask=k < M, other=0)
    passed = (row[:, None] >= stop[None, :]) & (k < M)[None, :]
    return tl.minimum(tl.sum(passed.to(tl.int32), 1), M - 1)
