"""Device functions that several kernels share: δ and its derivative, α, tiles of one scenario."""

import triton
import triton.language as tl

# As saml_kernels.backends.fused numbers them.
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
def scenario_tile(offsets, tile, M: tl.constexpr, M_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """(scenario, first row, end of the scenario's rows) of a tile of at most ROWS sorted rows of one scenario.

    Tiles are numbered scenario by scenario; there are at most cdiv(B, ROWS) + M. Past the last one the tile is empty.
    """
    k = tl.arange(0, M_PADDED)
    start = tl.load(offsets + k, mask=k < M, other=0)
    stop = tl.load(offsets + k + 1, mask=k < M, other=0)
    count = (stop - start + (ROWS - 1)) // ROWS
    end = tl.cumsum(count, 0)
    scenario = tl.sum((end <= tile).to(tl.int32), 0)
    here = k == scenario
    first = tl.sum(tl.where(here, start + (tile - (end - count)) * ROWS, 0), 0)
    last = tl.sum(tl.where(here, stop, 0), 0)
    return tl.minimum(scenario, M - 1), first, last


@triton.jit
def scenario_of(offsets, row, M: tl.constexpr, M_PADDED: tl.constexpr):
    """The scenario of each of the sorted rows ``row``."""
    k = tl.arange(0, M_PADDED)
    stop = tl.load(offsets + k + 1, mask=k < M, other=0)
    passed = (row[:, None] >= stop[None, :]) & (k < M)[None, :]
    return tl.minimum(tl.sum(passed.to(tl.int32), 1), M - 1)
