"""The mutual unit on the streams V (B, M, d) of sorted rows: own row, whole table, and the own row's backward.

Cosines and norms are summed over blocks of d in one pass over V, the mix in a second one that finds it in cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.functions import DEGENERATE_SUM, NORM_EPSILON, RATIO, scenario_of, score_weights
from saml_kernels.backends.triton.launching import launch, padded


@triton.jit
def load_streams(v, row, live, columns, M: tl.constexpr, M_PADDED: tl.constexpr, D: tl.constexpr):
    """(rows, M_PADDED, columns) of V in float32, zero outside."""
    branch = tl.arange(0, M_PADDED)
    place = v + (row * (M * D))[:, None, None] + (branch * D)[None, :, None] + columns[None, None, :]
    mask = live[:, None, None] & (branch < M)[None, :, None] & (columns < D)[None, None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rows(x, x_row, row, live, columns, D: tl.constexpr):
    """(rows, columns) of x (B, D), rows x_row apart, in float32, zero outside."""
    place = x + (row * x_row)[:, None] + columns[None, :]
    return tl.load(place, mask=live[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def own_cosines(
    v,
    row,
    live,
    scenario,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """c_tj (rows, M_PADDED), max(|V_j|, ε), and |V_t| as it is (rows, 1)."""
    own = tl.arange(0, M_PADDED)[None, :] == scenario[:, None]
    product = tl.zeros((ROWS, M_PADDED), tl.float32)
    square = tl.zeros((ROWS, M_PADDED), tl.float32)
    for block in range(0, D, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        streams = load_streams(v, row, live, columns, M, M_PADDED, D)
        own_stream = tl.sum(tl.where(own[:, :, None], streams, 0.0), 1)
        product += tl.sum(streams * own_stream[:, None, :], 2)
        square += tl.sum(streams * streams, 2)
    length = tl.sqrt(square)
    norm = tl.maximum(length, NORM_EPSILON)
    own_length = tl.sum(tl.where(own, length, 0.0), 1)[:, None]
    cosine = product / (norm * tl.maximum(own_length, NORM_EPSILON))
    return cosine, norm, own_length


@triton.jit(do_not_specialize=["rows"])
def own_row_kernel(
    v,
    gate,
    offsets,
    alpha,
    own,
    mutual,
    rows,
    inverse_temperature,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
    KEEP_OWN: tl.constexpr,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """α_t and M_t = V_t + g ∘ Σ_j α_tj V_j of ROWS rows; V_t too where backward wants it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    scenario = scenario_of(offsets, row, M, M_PADDED)
    branch = tl.arange(0, M_PADDED)
    is_own = branch[None, :] == scenario[:, None]
    cosine, _, _ = own_cosines(v, row, live, scenario, M, M_PADDED, D, ROWS, COLUMNS)
    foreign = (branch < M)[None, :] & (branch[None, :] != scenario[:, None])
    weight = score_weights(cosine, foreign, SCORE, inverse_temperature)
    inside = live[:, None] & (branch < M)[None, :]
    tl.store(alpha + (row * M)[:, None] + branch[None, :], weight, mask=inside)
    for block in range(0, D, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        streams = load_streams(v, row, live, columns, M, M_PADDED, D)
        own_stream = tl.sum(tl.where(is_own[:, :, None], streams, 0.0), 1)
        mix = tl.sum(streams * weight[:, :, None], 1)
        if GATE == 1:
            g = tl.load(gate + row, mask=live, other=0.0).to(tl.float32)[:, None]
        else:
            g = load_rows(gate, D, row, live, columns, D)
        place = (row * D)[:, None] + columns[None, :]
        mask = live[:, None] & (columns < D)[None, :]
        tl.store(mutual + place, own_stream + g * mix, mask=mask)
        if KEEP_OWN:
            tl.store(own + place, own_stream, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def table_kernel(
    v,
    gates,
    offsets,
    mutual,
    mixed,
    rows,
    inverse_temperature,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
    SCORE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """M_i of all branches of one row; the own one is M_t as the own row's kernel left it."""
    row = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, M_PADDED)
    present = branch < M
    gram = tl.zeros((M_PADDED, M_PADDED), tl.float32)
    for block in range(0, D, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < D)[None, :]
        place = v + row * (M * D) + (branch * D)[:, None] + columns[None, :]
        streams = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        gram = tl.dot(streams, tl.trans(streams), gram, input_precision="ieee")
    diagonal = branch[:, None] == branch[None, :]
    square = tl.sum(tl.where(diagonal, gram, 0.0), 1)
    norm = tl.maximum(tl.sqrt(square), NORM_EPSILON)
    foreign = present[:, None] & present[None, :] & (branch[:, None] != branch[None, :])
    weight = score_weights(gram / (norm[:, None] * norm[None, :]), foreign, SCORE, inverse_temperature)

    one = row + tl.zeros((1,), tl.int64)
    scenario = tl.sum(scenario_of(offsets, one, M, M_PADDED), 0)
    is_own = branch == scenario
    for block in range(0, D, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < D)[None, :]
        place = row * (M * D) + (branch * D)[:, None] + columns[None, :]
        streams = tl.load(v + place, mask=mask, other=0.0).to(tl.float32)
        mix = tl.dot(weight, streams, input_precision="ieee")
        if GATE == 1:
            g = tl.load(gates + row * M + branch, mask=present, other=0.0).to(tl.float32)[:, None]
        else:
            g = tl.load(gates + place, mask=mask, other=0.0).to(tl.float32)
        own = tl.load(mutual + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        result = tl.where(is_own[:, None], own[None, :], streams + g * mix)
        tl.store(mixed + place, result, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def own_row_backward_kernel(
    v,
    gate,
    alpha,
    offsets,
    d_mutual,
    d_mutual_row,
    d_own,
    d_gate,
    rows,
    inverse_temperature,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    GATE: tl.constexpr,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz_g, and dV_t but for the gate's product, from dM; V_j is read, its gradient is zero.

    G = dM ∘ g, p_j = <G, V_j>; dc_j as in docs/computation.md; dV_t = dM + (Σ_j dc_j V̂_j − [|V_t| > ε] (Σ_j dc_j c_j /
    n_t) V_t) / n_t, n_t = max(|V_t|, ε).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    scenario = scenario_of(offsets, row, M, M_PADDED)
    branch = tl.arange(0, M_PADDED)
    is_own = branch[None, :] == scenario[:, None]
    foreign = (branch < M)[None, :] & (branch[None, :] != scenario[:, None])
    cosine, norm, own_length = own_cosines(v, row, live, scenario, M, M_PADDED, D, ROWS, COLUMNS)
    cosine = tl.where(foreign, cosine, 0.0)
    weight = tl.load(
        alpha + (row * M)[:, None] + branch[None, :], mask=live[:, None] & (branch < M)[None, :], other=0.0
    )

    q = tl.zeros((ROWS, M_PADDED), tl.float32)
    for block in range(0, D, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        streams = load_streams(v, row, live, columns, M, M_PADDED, D)
        dm = load_rows(d_mutual, d_mutual_row, row, live, columns, D)
        if GATE != 1:
            dm = dm * load_rows(gate, D, row, live, columns, D)
        q += tl.sum(streams * dm[:, None, :], 2)
    if GATE == 1:
        g = tl.load(gate + row, mask=live, other=0.0).to(tl.float32)
        tl.store(d_gate + row, tl.sum(weight * q, 1) * g * (1.0 - g), mask=live)
        q = q * g[:, None]

    mean = tl.sum(weight * q, 1)[:, None]
    dc = weight * (q - mean)
    if SCORE == RATIO:
        total = tl.sum(cosine, 1)[:, None]
        degenerate = tl.abs(total) < DEGENERATE_SUM
        total = tl.where(degenerate, 1.0, total)
        dc = dc / total
        dc = dc - tl.sum(dc * cosine, 1)[:, None] / total
        dc = tl.where(degenerate | (foreign == 0), 0.0, dc)
    else:
        dc = dc * inverse_temperature
    own_norm = tl.maximum(own_length, NORM_EPSILON)
    along = tl.sum(dc * cosine, 1)[:, None]
    along = tl.where(own_length > NORM_EPSILON, along / (own_norm * own_norm), 0.0)
    toward = tl.where(foreign, dc / (norm * own_norm), 0.0)

    for block in range(0, D, COLUMNS):
        columns = block + tl.arange(0, COLUMNS)
        streams = load_streams(v, row, live, columns, M, M_PADDED, D)
        own_stream = tl.sum(tl.where(is_own[:, :, None], streams, 0.0), 1)
        dm = load_rows(d_mutual, d_mutual_row, row, live, columns, D)
        place = (row * D)[:, None] + columns[None, :]
        mask = live[:, None] & (columns < D)[None, :]
        if GATE != 1:
            mix = tl.sum(streams * weight[:, :, None], 1)
            g = load_rows(gate, D, row, live, columns, D)
            tl.store(d_gate + place, dm * mix * g * (1.0 - g), mask=mask)
        score_part = tl.sum(streams * toward[:, :, None], 1) - along * own_stream
        tl.store(d_own + place, dm + score_part, mask=mask)


def _row_options(streams: Tensor) -> dict[str, int]:
    config = configs.mutual()
    _, m, d = streams.shape
    columns = min(config.columns, padded(d))
    return {
        "M": m,
        "M_PADDED": padded(m),
        "D": d,
        "ROWS": max(1, config.elements // (padded(m) * columns)),
        "COLUMNS": columns,
        "num_warps": config.warps,
    }


def own_row(
    streams: Tensor,
    gate: Tensor,
    offsets: Tensor,
    score: int,
    temperature: float,
    alpha: Tensor,
    mutual: Tensor,
    own: Tensor | None,
) -> None:
    """streams (B, M, d), gate (B, d) or (B, 1) → alpha (B, M) float32, mutual (B, d), own (B, d) if wanted."""
    options = _row_options(streams)
    launch(
        own_row_kernel,
        (triton.cdiv(streams.shape[0], options["ROWS"]),),
        streams,
        gate,
        offsets,
        alpha,
        mutual if own is None else own,
        mutual,
        streams.shape[0],
        1.0 / temperature,
        GATE=gate.shape[1],
        KEEP_OWN=own is not None,
        SCORE=score,
        **options,
    )


def table(
    streams: Tensor, gates: Tensor, offsets: Tensor, score: int, temperature: float, mutual: Tensor, mixed: Tensor
) -> None:
    """streams (B, M, d), gates (B, M, d) or (B, M, 1), mutual (B, d) → mixed (B, M, d)."""
    options = _row_options(streams)
    del options["ROWS"]
    # The matrix unit's least side is 16.
    branches = padded(streams.shape[1], 16)
    columns, warps = configs.TABLES[branches]
    options |= {"M_PADDED": branches, "COLUMNS": max(16, min(columns, options["COLUMNS"])), "num_warps": warps}
    launch(
        table_kernel,
        (streams.shape[0],),
        streams,
        gates,
        offsets,
        mutual,
        mixed,
        streams.shape[0],
        1.0 / temperature,
        GATE=gates.shape[2],
        SCORE=score,
        **options,
    )


def own_row_backward(
    streams: Tensor,
    gate: Tensor,
    alpha: Tensor,
    offsets: Tensor,
    score: int,
    temperature: float,
    d_mutual: Tensor,
    d_own: Tensor,
    d_gate: Tensor,
) -> None:
    """dM (B, d), of any row stride → dV_t but for the gate's product (B, d), dz_g (B, gate width)."""
    options = _row_options(streams)
    launch(
        own_row_backward_kernel,
        (triton.cdiv(streams.shape[0], options["ROWS"]),),
        streams,
        gate,
        alpha,
        offsets,
        d_mutual,
        d_mutual.stride(0),
        d_own,
        d_gate,
        streams.shape[0],
        1.0 / temperature,
        GATE=gate.shape[1],
        SCORE=score,
        **options,
    )
