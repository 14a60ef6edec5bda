"""The mutual unit on rows of the streams V (B, M, d): own row, whole table, and the own row's backward.

    c_tj = <V_t, V_j> / (max(|V_t|, ε) max(|V_j|, ε)),  M_t = V_t + g_t ∘ Σ_{j≠t} α_tj V_j

A group of rows is read once where its block (rows, M, d) fits the registers (``WHOLE``); else cosines are summed over
blocks of d in one pass and the mix is taken in another, which finds the streams in cache. Sums are float32.
"""

import triton
import triton.language as tl

from saml_kernels.backends.triton.functions import DEGENERATE_SUM, NORM_EPSILON, RATIO, score_weights

# Addresses of the mutual unit's stages.
STREAMS = tl.constexpr(0)
GATE = tl.constexpr(1)
ALPHA = tl.constexpr(2)
D_MUTUAL = tl.constexpr(3)
MUTUAL = tl.constexpr(5)
MIXED = tl.constexpr(6)
D_OWN = tl.constexpr(5)
D_GATE = tl.constexpr(6)


@triton.jit
def load_streams(v, v_row, live, branch, columns, M: tl.constexpr, D: tl.constexpr):
    """(rows, branches, columns) of V in float32, zero outside; rows stand at v_row·M·D."""
    place = v + (v_row * (M * D))[:, None, None] + (branch * D)[None, :, None] + columns[None, None, :]
    mask = live[:, None, None] & (branch < M)[None, :, None] & (columns < D)[None, None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_own(v, v_row, live, columns, t, M: tl.constexpr, D: tl.constexpr):
    """(rows, columns) of V_t in float32, zero outside."""
    place = v + (v_row * (M * D) + t * D)[:, None] + columns[None, :]
    return tl.load(place, mask=live[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_rows(x, row, live, columns, D: tl.constexpr):
    """(rows, columns) of x (B, D) in float32, zero outside."""
    place = x + (row * D)[:, None] + columns[None, :]
    return tl.load(place, mask=live[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_gate(gate, row, live, columns, D: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, columns) of a vector gate (B, D), (rows, 1) of a scalar one (B, 1)."""
    if WIDTH == 1 and D != 1:
        return tl.load(gate + row, mask=live, other=0.0).to(tl.float32)[:, None]
    else:
        return load_rows(gate, row, live, columns, D)


@triton.jit
def products_and_squares(streams, own):
    """<V_t, V_j> and |V_j|² of a block of columns, (rows, M_PADDED) both."""
    return tl.sum(streams * own[:, None, :], 2), tl.sum(streams * streams, 2)


@triton.jit
def cosines(product, square, own_square):
    """c_tj, max(|V_j|, ε), and |V_t| as it is (rows, 1)."""
    norm = tl.maximum(tl.sqrt(square), NORM_EPSILON)
    own_length = tl.sqrt(own_square)[:, None]
    return product / (norm * tl.maximum(own_length, NORM_EPSILON)), norm, own_length


@triton.jit
def own_row_group(
    v,
    gate,
    alpha,
    mutual,
    inverse_temperature,
    t,
    row,
    v_row,
    alpha_row,
    mutual_row,
    live,
    zero,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """α_t and M_t of ROWS rows of scenario t."""
    branch = zero + tl.arange(0, M_PADDED)
    foreign = ((branch < M) & (branch != t))[None, :] & live[:, None]
    inside = live[:, None] & (branch < M)[None, :]
    if WHOLE:
        columns = zero + tl.arange(0, COLUMNS)
        streams = load_streams(v, v_row, live, branch, columns, M, D)
        own = load_own(v, v_row, live, columns, t, M, D)
        product, square = products_and_squares(streams, own)
        cosine, _, _ = cosines(product, square, tl.sum(own * own, 1))
        weight = score_weights(cosine, foreign, SCORE, inverse_temperature)
        tl.store(alpha + (alpha_row * M)[:, None] + branch[None, :], weight, mask=inside)
        g = load_gate(gate, row, live, columns, D, WIDTH)
        place = mutual + (mutual_row * D)[:, None] + columns[None, :]
        mix = tl.sum(streams * weight[:, :, None], 1)
        tl.store(place, own + g * mix, mask=live[:, None] & (columns < D)[None, :])
    else:
        product = tl.zeros((ROWS, M_PADDED), tl.float32)
        square = tl.zeros((ROWS, M_PADDED), tl.float32)
        own_square = tl.zeros((ROWS,), tl.float32)
        for block in range(0, D, COLUMNS):
            columns = zero + block + tl.arange(0, COLUMNS)
            streams = load_streams(v, v_row, live, branch, columns, M, D)
            own = load_own(v, v_row, live, columns, t, M, D)
            products, squares = products_and_squares(streams, own)
            product += products
            square += squares
            own_square += tl.sum(own * own, 1)
        cosine, _, _ = cosines(product, square, own_square)
        weight = score_weights(cosine, foreign, SCORE, inverse_temperature)
        tl.store(alpha + (alpha_row * M)[:, None] + branch[None, :], weight, mask=inside)
        for block in range(0, D, COLUMNS):
            columns = zero + block + tl.arange(0, COLUMNS)
            streams = load_streams(v, v_row, live, branch, columns, M, D)
            own = load_own(v, v_row, live, columns, t, M, D)
            g = load_gate(gate, row, live, columns, D, WIDTH)
            mix = tl.sum(streams * weight[:, :, None], 1)
            place = mutual + (mutual_row * D)[:, None] + columns[None, :]
            tl.store(place, own + g * mix, mask=live[:, None] & (columns < D)[None, :])


@triton.jit
def table_row(
    v,
    gates,
    alpha,
    mutual,
    mixed,
    inverse_temperature,
    t,
    row,
    alpha_row,
    zero,
    KEEP: tl.constexpr,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SCORE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """M_i of all branches of one row of scenario t, its own row of α, and M_t apart where backward wants it."""
    branch = zero + tl.arange(0, M_PADDED)
    present = branch < M
    gram = tl.zeros((M_PADDED, M_PADDED), tl.float32)
    for block in range(0, D, COLUMNS):
        columns = zero + block + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < D)[None, :]
        place = v + row * (M * D) + (branch * D)[:, None] + columns[None, :]
        streams = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        gram = tl.dot(streams, tl.trans(streams), gram, input_precision="ieee")
    diagonal = branch[:, None] == branch[None, :]
    square = tl.sum(tl.where(diagonal, gram, 0.0), 1)
    norm = tl.maximum(tl.sqrt(square), NORM_EPSILON)
    foreign = present[:, None] & present[None, :] & (branch[:, None] != branch[None, :])
    weight = score_weights(gram / (norm[:, None] * norm[None, :]), foreign, SCORE, inverse_temperature)
    is_own = branch == t
    own_weight = tl.sum(tl.where(is_own[:, None], weight, 0.0), 0)
    tl.store(alpha + alpha_row * M + branch, own_weight, mask=present)

    for block in range(0, D, COLUMNS):
        columns = zero + block + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < D)[None, :]
        index = row * (M * D) + (branch * D)[:, None] + columns[None, :]
        streams = tl.load(v + index, mask=mask, other=0.0).to(tl.float32)
        mix = tl.dot(weight, streams, input_precision="ieee")
        if WIDTH == 1 and D != 1:
            g = tl.load(gates + row * M + branch, mask=present, other=0.0).to(tl.float32)[:, None]
        else:
            g = tl.load(gates + index, mask=mask, other=0.0).to(tl.float32)
        result = streams + g * mix
        tl.store(mixed + index, result, mask=mask)
        if KEEP:
            place = mutual + row * D + tl.zeros((M_PADDED,), tl.int32)[:, None] + columns[None, :]
            tl.store(place, result, mask=mask & is_own[:, None])


@triton.jit
def score_gradient(weight, q, cosine, norm, own_length, foreign, SCORE: tl.constexpr, inverse_temperature):
    """Factors of V_j and of V_t in the scores' part of dV_t, from q_j = <G, V_j>, G = dM ∘ g.

    ratio: S = Σ c_j, r_j = α_j (q_j − q̄), dc_j = r_j / S − Σ_k r_k c_k / S²; softmax: dc_j = α_j (q_j − q̄) / τ.
    dV_t has (Σ_j dc_j V̂_j − [|V_t| > ε] (Σ_j dc_j c_j / n_t) V_t) / n_t, n_t = max(|V_t|, ε).
    """
    cosine = tl.where(foreign, cosine, 0.0)
    dc = weight * (q - tl.sum(weight * q, 1)[:, None])
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
    return tl.where(foreign, dc / (norm * own_norm), 0.0), along


@triton.jit
def own_row_backward_group(
    v,
    gate,
    alpha,
    d_mutual,
    d_own,
    d_gate,
    inverse_temperature,
    t,
    row,
    v_row,
    alpha_row,
    live,
    zero,
    M: tl.constexpr,
    M_PADDED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dz_g, and dV_t but for the gate's product, from dM (B, d) float32; V_j is read, its gradient is zero.

    dz_g = dM ∘ mix ∘ g ∘ (1 − g), summed over d for a scalar gate. c, n and mix are computed again.
    """
    scalar: tl.constexpr = WIDTH == 1 and D != 1
    branch = zero + tl.arange(0, M_PADDED)
    foreign = ((branch < M) & (branch != t))[None, :] & live[:, None]
    inside = live[:, None] & (branch < M)[None, :]
    weight = tl.load(alpha + (alpha_row * M)[:, None] + branch[None, :], mask=inside, other=0.0)
    if WHOLE:
        columns = zero + tl.arange(0, COLUMNS)
        mask = live[:, None] & (columns < D)[None, :]
        place = (row * D)[:, None] + columns[None, :]
        streams = load_streams(v, v_row, live, branch, columns, M, D)
        own = load_own(v, v_row, live, columns, t, M, D)
        product, square = products_and_squares(streams, own)
        cosine, norm, own_length = cosines(product, square, tl.sum(own * own, 1))
        dm = load_rows(d_mutual, row, live, columns, D)
        g = load_gate(gate, row, live, columns, D, WIDTH)
        if scalar:
            mean = tl.sum(weight * tl.sum(streams * dm[:, None, :], 2), 1)[:, None]
            tl.store(d_gate + row[:, None], mean * g * (1.0 - g), mask=live[:, None])
        else:
            mix = tl.sum(streams * weight[:, :, None], 1)
            tl.store(d_gate + place, dm * mix * g * (1.0 - g), mask=mask)
        q = tl.sum(streams * (dm * g)[:, None, :], 2)
        toward, along = score_gradient(weight, q, cosine, norm, own_length, foreign, SCORE, inverse_temperature)
        score_part = tl.sum(streams * toward[:, :, None], 1) - along * own
        tl.store(d_own + place, dm + score_part, mask=mask)
    else:
        product = tl.zeros((ROWS, M_PADDED), tl.float32)
        square = tl.zeros((ROWS, M_PADDED), tl.float32)
        own_square = tl.zeros((ROWS,), tl.float32)
        q = tl.zeros((ROWS, M_PADDED), tl.float32)
        for block in range(0, D, COLUMNS):
            columns = zero + block + tl.arange(0, COLUMNS)
            streams = load_streams(v, v_row, live, branch, columns, M, D)
            own = load_own(v, v_row, live, columns, t, M, D)
            products, squares = products_and_squares(streams, own)
            product += products
            square += squares
            own_square += tl.sum(own * own, 1)
            dm = load_rows(d_mutual, row, live, columns, D)
            if not scalar:
                dm = dm * load_rows(gate, row, live, columns, D)
            q += tl.sum(streams * dm[:, None, :], 2)
        cosine, norm, own_length = cosines(product, square, own_square)
        if scalar:
            g = tl.load(gate + row, mask=live, other=0.0).to(tl.float32)
            tl.store(d_gate + row, tl.sum(weight * q, 1) * g * (1.0 - g), mask=live)
            q = q * g[:, None]
        toward, along = score_gradient(weight, q, cosine, norm, own_length, foreign, SCORE, inverse_temperature)
        for block in range(0, D, COLUMNS):
            columns = zero + block + tl.arange(0, COLUMNS)
            mask = live[:, None] & (columns < D)[None, :]
            place = (row * D)[:, None] + columns[None, :]
            streams = load_streams(v, v_row, live, branch, columns, M, D)
            own = load_own(v, v_row, live, columns, t, M, D)
            dm = load_rows(d_mutual, row, live, columns, D)
            if not scalar:
                mix = tl.sum(streams * weight[:, :, None], 1)
                g = load_rows(gate, row, live, columns, D)
                tl.store(d_gate + place, dm * mix * g * (1.0 - g), mask=mask)
            score_part = tl.sum(streams * toward[:, :, None], 1) - along * own
            tl.store(d_own + place, dm + score_part, mask=mask)
