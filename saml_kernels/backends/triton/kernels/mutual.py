"""The mutual unit on rows of the streams V (B, M, d): own row, whole table, and the own row's backward.

    c_tj = <V_t, V_j> / (max(|V_t|, ε) max(|V_j|, ε)),  M_t = V_t + g_t ∘ Σ_{j≠t} α_tj V_j

Own rows are taken in groups, as blocks (rows, M, columns) in which a row's columns lie in one warp and its branches in
one thread: sums over d stay within a warp, sums over branches within a thread, and no warp waits for another. Cosines
are summed in one pass over blocks of d and the mix is taken in another, which finds the streams in cache. Sums are
float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from saml_kernels.backends.triton.kernels.scenario_tiles import padded, scenario_of

NORM_EPSILON = tl.constexpr(1e-8)
DEGENERATE_SUM = tl.constexpr(1e-6)


@triton.constexpr_function
def table_columns(width: int, branches: int) -> int:
    """Columns of d that the table takes at a time; the matrix unit wants 16, more than these spill."""
    return max(16, min(triton.next_power_of_2(width), {16: 32, 32: 16, 64: 16}[branches]))


@triton.jit
def score_weights(cosine, foreign, SCORE: tl.constexpr, inverse_temperature):
    """α along the last axis from the cosines; ``foreign`` is False where α is 0: the own entry and padding."""
    cosine = tl.where(foreign, cosine, 0.0)
    if SCORE == "ratio":
        total = tl.sum(cosine, 1)[:, None]
        degenerate = tl.abs(total) < DEGENERATE_SUM
        argument = tl.where(degenerate, 0.0, cosine / tl.where(degenerate, 1.0, total))
    else:
        argument = cosine * inverse_temperature
    argument = tl.where(foreign, argument, float("-inf"))
    # With one branch nothing is foreign; -inf - -inf would be NaN.
    largest = tl.max(argument, 1)[:, None]
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.where(foreign, tl.exp(argument - largest), 0.0)
    total_weight = tl.sum(weight, 1)[:, None]
    return weight / tl.where(total_weight == 0.0, 1.0, total_weight)


class Group(NamedTuple):
    """Rows of an item that registers hold at a time, all of one scenario t."""

    row: Any
    """(rows,) int64, sorted."""
    caller: Any
    """The same in the caller's order."""
    stream_row: Any
    """The same as the streams are ordered."""
    row_mask: Any
    branch: Any
    """(M padded,)."""
    foreign: Any
    """(rows, M padded) whether j ≠ t."""
    inside: Any
    """(rows, M padded) whether there is an α."""


@triton.jit
def group_of(STAGE: tl.constexpr, done, item, batch):
    """The group that begins ``done`` rows after the item's first."""
    row = item.first + item.part * STAGE.tile.item_rows + done + tl.arange(0, STAGE.tile.rows)
    row_mask = row < item.end
    caller = tl.load(batch.permutation + row, mask=row_mask, other=0)
    stream_row = row
    if STAGE.streams.gathered:
        stream_row = caller
    branch = tl.arange(0, padded(STAGE.num_scenarios))
    inside = row_mask[:, None] & (branch < STAGE.num_scenarios)[None, :]
    return Group(row, caller, stream_row, row_mask, branch, inside & (branch != item.scenario)[None, :], inside)


@triton.constexpr_function
def is_scalar(stage: Any) -> bool:
    """Whether the gate is one number a row where d is not."""
    return stage.gate_width == 1 and stage.d != 1


@triton.constexpr_function
def blocks_of(stage: Any) -> int:
    """Blocks of columns."""
    return -(-stage.d // stage.tile.columns)


@triton.jit
def columns_of(STAGE: tl.constexpr, item, block):
    """(columns,) of a block of d."""
    return item.zero + block * STAGE.tile.columns + tl.arange(0, STAGE.tile.columns)


@triton.jit
def load_streams(STAGE: tl.constexpr, streams, group, columns):
    """(rows, M padded, columns) of V, zero outside."""
    place = (group.stream_row * STAGE.streams.stride)[:, None, None] + (group.branch * STAGE.d)[None, :, None]
    mask = group.inside[:, :, None] & (columns < STAGE.d)[None, None, :]
    return tl.load(streams + (place + columns[None, None, :]), mask=mask, other=0.0)


@triton.jit
def load_own(STAGE: tl.constexpr, streams, group, scenario, columns):
    """(rows, columns) of V_t in float32, zero outside."""
    place = (group.stream_row * STAGE.streams.stride + scenario * STAGE.d)[:, None] + columns[None, :]
    mask = group.row_mask[:, None] & (columns < STAGE.d)[None, :]
    return tl.load(streams + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_place(D: tl.constexpr, row, columns):
    """Elements of x (B, d)."""
    return (row * D)[:, None] + columns[None, :]


@triton.jit
def load_rows(D: tl.constexpr, x, group, columns):
    """(rows, columns) of x (B, d) in float32, zero outside."""
    mask = group.row_mask[:, None] & (columns < D)[None, :]
    return tl.load(x + row_place(D, group.row, columns), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gate(STAGE: tl.constexpr, gate, group, columns):
    """(rows, columns) of a vector gate (B, d), (rows, 1) of a scalar one (B, 1)."""
    if is_scalar(STAGE):
        return tl.load(gate + group.row, mask=group.row_mask, other=0.0).to(tl.float32)[:, None]
    else:
        return load_rows(STAGE.d, gate, group, columns)


class Moments(NamedTuple):
    """What the cosines need, summed over columns as far as each thread has them."""

    product: Any
    """(rows, M padded, threads of a row) of <V_t, V_j>."""
    square: Any
    """Of |V_j|²."""
    own_square: Any
    """(rows, threads of a row) of |V_t|²."""


@triton.constexpr_function
def by_thread(shape: Any, vector: int) -> list[int]:
    """The shape with its last axis as (threads, columns of a thread)."""
    return [*shape[:-1], shape[-1] // vector, vector]


@triton.jit
def thread_sum(STAGE: tl.constexpr, x):
    """Σ over the columns that a thread holds of each row."""
    parts = tl.reshape(x, by_thread(x.shape, STAGE.tile.vector))
    return tl.sum(parts, len(parts.shape) - 1)


@triton.jit
def no_moments(STAGE: tl.constexpr):
    threads: tl.constexpr = STAGE.tile.columns // STAGE.tile.vector
    branches: tl.constexpr = padded(STAGE.num_scenarios)
    nothing = tl.zeros((STAGE.tile.rows, branches, threads), tl.float32)
    return Moments(nothing, nothing, tl.zeros((STAGE.tile.rows, threads), tl.float32))


@triton.jit
def add_moments(STAGE: tl.constexpr, moments, streams, own):
    """With those of another block of columns."""
    return Moments(
        moments.product + thread_sum(STAGE, streams * own[:, None, :]),
        moments.square + thread_sum(STAGE, streams * streams),
        moments.own_square + thread_sum(STAGE, own * own),
    )


@triton.jit
def cosines(moments):
    """c_tj (rows, M padded), max(|V_j|, ε), and |V_t| as it is (rows,)."""
    norm = tl.maximum(tl.sqrt(tl.sum(moments.square, 2)), NORM_EPSILON)
    own_length = tl.sqrt(tl.sum(moments.own_square, 1))
    own_norm = tl.maximum(own_length, NORM_EPSILON)
    return tl.sum(moments.product, 2) / (norm * own_norm[:, None]), norm, own_length


@triton.jit
def mutual_own_row(STAGE: tl.constexpr, pointers, item, batch):
    """α_t and M_t of an item's rows."""
    for done in range(0, STAGE.tile.item_rows, STAGE.tile.rows):
        group = group_of(STAGE, done, item, batch)
        own_row(STAGE, pointers, group, item, batch)


@triton.jit
def store_alpha(STAGE: tl.constexpr, alpha, group, weight):
    """Own rows of α, in the caller's order."""
    place = (group.caller * STAGE.num_scenarios)[:, None] + group.branch[None, :]
    tl.store(alpha + place, weight, mask=group.inside)


@triton.jit
def store_mutual(STAGE: tl.constexpr, pointers, group, columns, streams, own, weight):
    """M_t = V_t + g_t ∘ Σ_{j≠t} α_tj V_j of a block of columns."""
    mutual_row = group.row
    if STAGE.mutual.gathered:
        mutual_row = group.caller
    g = load_gate(STAGE, pointers.gate[0], group, columns)
    mix = tl.sum(streams * weight[:, :, None], 1)
    mask = group.row_mask[:, None] & (columns < STAGE.d)[None, :]
    tl.store(pointers.mutual[0] + row_place(STAGE.d, mutual_row, columns), own + g * mix, mask=mask)


@triton.jit
def own_row(STAGE: tl.constexpr, pointers, group, item, batch):
    """Cosines in one pass over blocks of d, the mix in another."""
    moments = no_moments(STAGE)
    for block in range(0, blocks_of(STAGE)):
        columns = columns_of(STAGE, item, block)
        streams = load_streams(STAGE, pointers.streams[0], group, columns).to(tl.float32)
        own = load_own(STAGE, pointers.streams[0], group, item.scenario, columns)
        moments = add_moments(STAGE, moments, streams, own)
    cosine, _, _ = cosines(moments)
    weight = score_weights(cosine, group.foreign, STAGE.score, batch.inverse_temperature)
    store_alpha(STAGE, pointers.alpha[0], group, weight)
    for block in range(0, blocks_of(STAGE)):
        columns = columns_of(STAGE, item, block)
        streams = load_streams(STAGE, pointers.streams[0], group, columns).to(tl.float32)
        own = load_own(STAGE, pointers.streams[0], group, item.scenario, columns)
        store_mutual(STAGE, pointers, group, columns, streams, own, weight)


@triton.jit
def mutual_table(STAGE: tl.constexpr, pointers, item, batch):
    """M_i of all branches of an item's rows, a row at a time; own rows of α, and M_t apart where it is saved."""
    for done in range(0, STAGE.tile.item_rows):
        row = item.first + item.part * STAGE.tile.item_rows + done
        if row < item.end:
            table_row(STAGE, pointers, row, item, batch)


@triton.jit
def table_row(STAGE: tl.constexpr, pointers, row, item, batch):
    """The whole table of scores of one row, as two small products: c from V Vᵀ, the mix α V."""
    M: tl.constexpr = STAGE.num_scenarios
    D: tl.constexpr = STAGE.d
    branches: tl.constexpr = padded(M, 16)
    block_d: tl.constexpr = table_columns(D, branches)
    t = tl.sum(scenario_of(batch, batch.row0 + row + tl.zeros((1,), tl.int64), M), 0)
    alpha_row = tl.load(batch.permutation + row)
    branch = item.zero + tl.arange(0, branches)
    present = branch < M
    gram = tl.zeros((branches, branches), tl.float32)
    for block in range(0, D, block_d):
        columns = item.zero + block + tl.arange(0, block_d)
        mask = present[:, None] & (columns < D)[None, :]
        place = pointers.streams[0] + row * (M * D) + (branch * D)[:, None] + columns[None, :]
        streams = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        gram = tl.dot(streams, tl.trans(streams), gram, input_precision="ieee")
    diagonal = branch[:, None] == branch[None, :]
    square = tl.sum(tl.where(diagonal, gram, 0.0), 1)
    norm = tl.maximum(tl.sqrt(square), NORM_EPSILON)
    foreign = present[:, None] & present[None, :] & (branch[:, None] != branch[None, :])
    cosine = gram / (norm[:, None] * norm[None, :])
    weight = score_weights(cosine, foreign, STAGE.score, batch.inverse_temperature)
    is_own = branch == t
    own_weight = tl.sum(tl.where(is_own[:, None], weight, 0.0), 0)
    tl.store(pointers.alpha[0] + alpha_row * M + branch, own_weight, mask=present)

    for block in range(0, D, block_d):
        columns = item.zero + block + tl.arange(0, block_d)
        mask = present[:, None] & (columns < D)[None, :]
        index = row * (M * D) + (branch * D)[:, None] + columns[None, :]
        streams = tl.load(pointers.streams[0] + index, mask=mask, other=0.0).to(tl.float32)
        mix = tl.dot(weight, streams, input_precision="ieee")
        if is_scalar(STAGE):
            g = tl.load(pointers.gates[0] + row * M + branch, mask=present, other=0.0).to(tl.float32)[:, None]
        else:
            g = tl.load(pointers.gates[0] + index, mask=mask, other=0.0).to(tl.float32)
        result = streams + g * mix
        tl.store(pointers.mixed[0] + index, result, mask=mask)
        if STAGE.save:
            place = pointers.mutual[0] + row * D + tl.zeros((branches,), tl.int32)[:, None] + columns[None, :]
            tl.store(place, result, mask=mask & is_own[:, None])


@triton.jit
def score_gradient(weight, p, cosine, norm, own_length, foreign, SCORE: tl.constexpr, inverse_temperature):
    """Factors of V_j and of V_t in the scores' part of dV_t, from p_j = <G, V_j>, G = dM ∘ g.

    ratio: S = Σ c_j, r_j = α_j (p_j − p̄), dc_j = r_j / S − Σ_k r_k c_k / S²; softmax: dc_j = α_j (p_j − p̄) / τ.
    dV_t has (Σ_j dc_j V̂_j − [|V_t| > ε] (Σ_j dc_j c_j / n_t) V_t) / n_t, n_t = max(|V_t|, ε).
    """
    cosine = tl.where(foreign, cosine, 0.0)
    dc = weight * (p - tl.sum(weight * p, 1)[:, None])
    if SCORE == "ratio":
        total = tl.sum(cosine, 1)[:, None]
        degenerate = tl.abs(total) < DEGENERATE_SUM
        total = tl.where(degenerate, 1.0, total)
        dc = dc / total
        dc = dc - tl.sum(dc * cosine, 1)[:, None] / total
        dc = tl.where(degenerate | (foreign == 0), 0.0, dc)
    else:
        dc = dc * inverse_temperature
    own_norm = tl.maximum(own_length, NORM_EPSILON)
    along = tl.sum(dc * cosine, 1)
    along = tl.where(own_length > NORM_EPSILON, along / (own_norm * own_norm), 0.0)
    return tl.where(foreign, dc / (norm * own_norm[:, None]), 0.0), along


@triton.jit
def mutual_backward(STAGE: tl.constexpr, pointers, item, batch):
    """dz_g, and dV_t but for the gate's product, from dM (B, d) float32; V_j is read, its gradient is zero.

    dz_g = dM ∘ mix ∘ g ∘ (1 − g), summed over d for a scalar gate. c, n and mix are computed again.
    """
    for done in range(0, STAGE.tile.item_rows, STAGE.tile.rows):
        group = group_of(STAGE, done, item, batch)
        place = (group.caller * STAGE.num_scenarios)[:, None] + group.branch[None, :]
        weight = tl.load(pointers.alpha[0] + place, mask=group.inside, other=0.0)
        own_row_backward(STAGE, pointers, group, weight, item, batch)


@triton.jit
def toward_mix(STAGE: tl.constexpr, pointers, group, columns):
    """A block of G = dM ∘ g, of dM where the gate is one number a row."""
    dm = load_rows(STAGE.d, pointers.d_mutual[0], group, columns)
    if not is_scalar(STAGE):
        dm = dm * load_rows(STAGE.d, pointers.gate[0], group, columns)
    return dm


@triton.jit
def scores_backward(STAGE: tl.constexpr, pointers, group, weight, moments, p, batch):
    """Factors of V_j and of V_t in dV_t, from p_j = <dM ∘ g, V_j>; a scalar gate's dz_g besides, from <dM, V_j>."""
    cosine, norm, own_length = cosines(moments)
    p = tl.sum(p, 2)
    if is_scalar(STAGE):
        g = tl.load(pointers.gate[0] + group.row, mask=group.row_mask, other=0.0).to(tl.float32)
        d_gate = tl.sum(weight * p, 1) * g * (1.0 - g)
        tl.store(pointers.d_gate[0] + group.row, d_gate, mask=group.row_mask)
        p = p * g[:, None]
    return score_gradient(weight, p, cosine, norm, own_length, group.foreign, STAGE.score, batch.inverse_temperature)


@triton.jit
def store_gradients(STAGE: tl.constexpr, pointers, group, columns, streams, own, weight, toward, along):
    """A block of dz_g of a vector gate, and of dM + Σ_j (what dc_j sends toward V_j) − (what it sends along V_t)."""
    dm = load_rows(STAGE.d, pointers.d_mutual[0], group, columns)
    mask = group.row_mask[:, None] & (columns < STAGE.d)[None, :]
    place = row_place(STAGE.d, group.row, columns)
    if not is_scalar(STAGE):
        g = load_rows(STAGE.d, pointers.gate[0], group, columns)
        mix = tl.sum(streams * weight[:, :, None], 1)
        tl.store(pointers.d_gate[0] + place, dm * mix * g * (1.0 - g), mask=mask)
    score_part = tl.sum(streams * toward[:, :, None], 1) - along[:, None] * own
    tl.store(pointers.d_own[0] + place, dm + score_part, mask=mask)


@triton.jit
def own_row_backward(STAGE: tl.constexpr, pointers, group, weight, item, batch):
    """Cosines and p in one pass over blocks of d, the gradients in another."""
    moments = no_moments(STAGE)
    p = moments.product
    for block in range(0, blocks_of(STAGE)):
        columns = columns_of(STAGE, item, block)
        streams = load_streams(STAGE, pointers.streams[0], group, columns).to(tl.float32)
        own = load_own(STAGE, pointers.streams[0], group, item.scenario, columns)
        moments = add_moments(STAGE, moments, streams, own)
        p += thread_sum(STAGE, streams * toward_mix(STAGE, pointers, group, columns)[:, None, :])
    toward, along = scores_backward(STAGE, pointers, group, weight, moments, p, batch)
    for block in range(0, blocks_of(STAGE)):
        columns = columns_of(STAGE, item, block)
        streams = load_streams(STAGE, pointers.streams[0], group, columns).to(tl.float32)
        own = load_own(STAGE, pointers.streams[0], group, item.scenario, columns)
        store_gradients(STAGE, pointers, group, columns, streams, own, weight, toward, along)
