"""The computation in plain PyTorch: the oracle of every kernel, and the slow way to run it on any device.

The multi-branch trunk of SAML (arXiv 2012.08952). For layers l = 1..L, branches k = 1..M, activation δ:

    A^l   = δ(A^{l-1} Wa^l + ba^l)                        A^0 = x_g
    V_k^l = δ([V_k^{l-1} ; A^l] W_k^l + b_k^l)            V_k^0 = x_l

and after a layer with a mutual unit V_i becomes

    c_ij = <V_i, V_j> / (max(|V_i|, ε) max(|V_j|, ε))
    α_ij = softmax over j ≠ i of c_ij / Σ_{j≠i} c_ij      (score "ratio"; "softmax": of c_ij / τ)
    g_i  = sigmoid(V_i U_i + u_i)
    M_i  = V_i + g_i ∘ Σ_{j≠i} α_ij V_j

Only the sample's own branch t reaches the loss, and for a sample of scenario t every foreign stream V_j, j ≠ t, is
under stop-gradient. So all branches run for all rows up to the last mutual layer, without a graph; the own branch runs
once more with one; after the last mutual layer only the own branch runs. Rows are sorted by scenario, so that the own
branch is one product per scenario.

The functions take checked arguments: callers use saml_kernels.functional and saml_kernels.grouping, which check.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saml_kernels import tracing
from saml_kernels.activations import ACTIVATIONS
from saml_kernels.types import Grouping, TrunkOutput, TrunkParams

NORM_EPSILON = 1e-8
"""ε of the cosine c_ij."""
DEGENERATE_SUM = 1e-6
"""Where |Σ_{j≠i} c_ij| is below this, every ratio counts as 0 and no gradient flows through the scores."""

# foreign_dtype with one scale per row of the input and per column of the weight, and the largest value it holds.
SCALED_DTYPES: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def group_by_scenario(scenario: Tensor, num_scenarios: int) -> Grouping:
    """The stable grouping by a sort. Ids out of range raise ValueError on the CPU, a device assertion elsewhere."""
    if not tracing.holds_numbers(scenario):
        return _group_without_check(scenario, num_scenarios)
    in_range = (scenario >= 0) & (scenario < num_scenarios)
    if scenario.device.type != "cpu":
        # Reading the verdict on the host would make every call wait for the device.
        torch._assert_async(in_range.all(), f"scenario ids must lie in [0, {num_scenarios})")
    elif not bool(in_range.all()):
        row = int((~in_range).nonzero()[0])
        raise ValueError(f"scenario ids must lie in [0, {num_scenarios}), but row {row} holds {int(scenario[row])}")
    return _group_without_check(scenario, num_scenarios)


def _group_without_check(scenario: Tensor, num_scenarios: int) -> Grouping:
    ids, permutation = torch.sort(scenario.long(), stable=True)
    places = torch.arange(scenario.shape[0], device=scenario.device)
    inverse = torch.zeros_like(permutation).scatter(0, permutation, places)
    boundaries = torch.arange(num_scenarios + 1, device=scenario.device)
    return Grouping(permutation, inverse, torch.searchsorted(ids, boundaries))


class Rows(NamedTuple):
    """A batch's rows in the order in which they are computed."""

    permutation: Tensor
    """(B,): computed = x[permutation]."""
    inverse: Tensor
    """(B,): x = computed[inverse]."""
    t: Tensor
    """(B,): own scenario of every computed row."""
    n: Tensor
    """(B,): 0..B−1."""
    sizes: list[int] | None
    """Rows of every scenario, which stand together; None where that cannot be read, and they stand as they were."""


def arrange(scenario: Tensor, num_scenarios: int) -> Rows:
    """Rows sorted by scenario; ids out of range raise as in :func:`group_by_scenario`.

    On the meta device, of fake tensors and inside vmap nothing is sorted: there is no reading how many rows a scenario
    has.
    """
    n = torch.arange(scenario.shape[0], device=scenario.device)
    if not tracing.holds_numbers(scenario):
        return Rows(n, n, scenario.long(), n, None)
    grouping = group_by_scenario(scenario, num_scenarios)
    # Read at once, and one by one then: tolist() of torch 2.8 reads nothing inside torch.func's derivatives.
    sizes = [stop - start for start, stop in pairwise(int(offset) for offset in grouping.offsets.cpu())]
    return Rows(grouping.permutation, grouping.inverse, scenario[grouping.permutation].long(), n, sizes)


def multi_branch(
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    params: TrunkParams,
    *,
    activation: str,
    score: str,
    temperature: float,
    stop_gradient: bool,
    foreign_dtype: torch.dtype | None,
    return_scores: bool,
    recompute: bool | str = False,
    schedule: str = "auto",
) -> TrunkOutput:
    """See :func:`saml_kernels.multi_branch`; ``recompute`` and ``schedule`` change nothing here."""
    delta = ACTIVATIONS[activation].function
    num_scenarios = params.branch_weights[0].shape[0]
    mutual = [weight is not None for weight in params.gate_weights]
    last_mutual = max([-1, *(layer for layer, unit in enumerate(mutual) if unit)])

    rows = arrange(scenario, num_scenarios)
    t, n = rows.t, rows.n

    aux = x_global[rows.permutation]
    x_local = x_local[rows.permutation]
    shared_input = x_local.dim() == 2
    # Streams are (M, B, width), so that the rows of a branch are contiguous; entry (t, n) is the own stream.
    streams = x_local.expand(num_scenarios, -1, -1) if shared_input else x_local.transpose(0, 1)
    own = x_local if shared_input else streams[t, n]
    scores: list[Tensor | None] = []

    # sg(·), which stops tangents as well.
    constant = torch.detach if stop_gradient else _unchanged

    for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
        aux = delta(torch.addmm(params.aux_biases[layer], aux, params.aux_weights[layer]))
        inputs = torch.cat([own, aux], dim=1)
        own = delta(grouped_linear(inputs, weight, bias, rows))
        if layer <= last_mutual:
            if layer == 0 and shared_input:
                inputs = inputs.expand(num_scenarios, -1, -1)
            else:
                inputs = torch.cat([streams, aux.expand(num_scenarios, -1, -1)], dim=2)
            streams = delta(foreign_linear(constant(inputs), constant(weight), constant(bias), foreign_dtype))
            streams = streams.index_put((t, n), constant(own))

        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if gate_weight is None or gate_bias is None:
            scores.append(None)
            continue
        mutual_streams = streams
        if layer < last_mutual:
            alpha = score_table(streams, score, temperature)
            mix = torch.einsum("bij,jbd->ibd", alpha.to(streams.dtype), streams)
            gate = torch.sigmoid(foreign_linear(streams, constant(gate_weight), constant(gate_bias), foreign_dtype))
            streams = streams + gate * mix
        own, own_alpha = mutual_own_row(
            own, mutual_streams, rows, gate_weight, gate_bias, score=score, temperature=temperature
        )
        scores.append(own_alpha.detach())

    order = rows.inverse
    return TrunkOutput(
        own[order],
        aux[order],
        tuple(None if alpha is None else alpha[order] for alpha in scores) if return_scores else None,
    )


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def products(weights: Sequence[Tensor], shared_weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """W_t ∘ W_shared (STAR, arXiv 2101.11427), layer by layer; without shared weights the weights."""
    if not shared_weights:
        return weights
    return [own * shared for own, shared in zip(weights, shared_weights, strict=True)]


def grouped_mlp(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str,
    output_activation: str,
    gated: Tensor | None = None,
    gate_scale: float = 2.0,
    shared_weights: Sequence[Tensor] = (),
) -> Tensor:
    """See :func:`saml_kernels.grouped_mlp`: δ(z_L), or with ``gated`` γ sigmoid(z_L) ∘ gated."""
    weights = products(weights, shared_weights)
    rows = arrange(scenario, weights[0].shape[0])
    names = [activation] * (len(weights) - 1) + [output_activation]
    x = x[rows.permutation]
    for weight, bias, name in zip(weights, biases, names, strict=True):
        x = ACTIVATIONS[name].function(grouped_linear(x, weight, bias, rows))
    x = x[rows.inverse]
    return x if gated is None else gate_scale * torch.sigmoid(x) * gated


def branch_scores(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str,
    output_activation: str,
    foreign_dtype: torch.dtype | None,
) -> Tensor:
    """See :func:`saml_kernels.branch_scores`."""
    num_scenarios = weights[0].shape[0]
    rows = arrange(scenario, num_scenarios)
    t, n = rows.t, rows.n
    names = [activation] * (len(weights) - 1) + [output_activation]

    x = x[rows.permutation]
    # Streams are (M, B, width), as in multi_branch; entry (t, n) is the own stream.
    streams = x.expand(num_scenarios, -1, -1) if x.dim() == 2 else x.transpose(0, 1)
    own = x if x.dim() == 2 else streams[t, n]
    streams = streams.detach()
    for weight, bias, name in zip(weights, biases, names, strict=True):
        delta = ACTIVATIONS[name].function
        own = delta(grouped_linear(own, weight, bias, rows))
        streams = delta(foreign_linear(streams, weight.detach(), bias.detach(), foreign_dtype))
    return streams.index_put((t, n), own).transpose(0, 1)[rows.inverse]


def expert_outputs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, activation: str, output_activation: str
) -> Tensor:
    """See :func:`saml_kernels.expert_outputs`."""
    return experts(x, weights, biases, [activation] * (len(weights) - 1) + [output_activation])


def experts(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activations: Sequence[str]) -> Tensor:
    """E_k(x) of all experts, (B, K, d_L), with a name of δ for every layer."""
    streams = x.expand(weights[0].shape[0], -1, -1)
    for weight, bias, name in zip(weights, biases, activations, strict=True):
        streams = ACTIVATIONS[name].function(torch.baddbmm(bias.unsqueeze(1), streams, weight))
    return streams.transpose(0, 1)


def mutual_unit(
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str,
    temperature: float,
    stop_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`saml_kernels.mutual_unit`; returns M_t (B, d) and the own rows of α (B, M)."""
    rows = arrange(scenario, v.shape[1])
    streams = v[rows.permutation].transpose(0, 1)
    own, alpha = mutual_own_row(
        streams[rows.t, rows.n],
        streams.detach() if stop_gradient else streams,
        rows,
        gate_weight,
        gate_bias,
        score=score,
        temperature=temperature,
    )
    return own[rows.inverse], alpha.detach()[rows.inverse]


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
    """x W_t + b_t for rows (B, K) as arranged; weight (M, K, N), bias (M, N).

    Scenarios without rows take part with an empty product: their gradient is then zero and not missing.
    """
    if rows.sizes is None:
        streams = torch.baddbmm(bias.unsqueeze(1), x.expand(weight.shape[0], -1, -1), weight)
        return streams[rows.t, rows.n]
    parts = [
        torch.addmm(b, part, w)
        for part, w, b in zip(x.split(rows.sizes), weight.unbind(0), bias.unbind(0), strict=True)
    ]
    return torch.cat(parts)


def foreign_linear(x: Tensor, weight: Tensor, bias: Tensor, foreign_dtype: torch.dtype | None) -> Tensor:
    """x_k W_k + b_k of every branch, (M, B, K) by (M, K, N), with both factors rounded to ``foreign_dtype``.

    bfloat16 rounds the values. int8 and float8_e4m3fn round values divided by a scale, one per row of x and one per
    column of each W_k, that takes the largest magnitude to the type's largest value. Products are summed in float32
    (float64 for float64 inputs; int8 exactly).
    """
    if foreign_dtype is None:
        return torch.baddbmm(bias.unsqueeze(1), x, weight)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    x_rounded, x_scale = round_to(x.to(accumulate), foreign_dtype, dim=2)
    w_rounded, w_scale = round_to(weight.to(accumulate), foreign_dtype, dim=1)
    # An int8 product may exceed the 24 bits in which float32 counts exactly.
    exact = torch.float64 if foreign_dtype == torch.int8 else accumulate
    product = torch.bmm(x_rounded.to(exact), w_rounded.to(exact)).to(accumulate)
    return (product * x_scale * w_scale + bias.unsqueeze(1)).to(x.dtype)


def round_to(x: Tensor, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor]:
    """x rounded to ``dtype`` after division by a scale shared along ``dim``, and the scale (1 for unscaled types)."""
    if dtype not in SCALED_DTYPES or x.shape[dim] == 0:
        return x.to(dtype), x.new_ones(())
    largest = SCALED_DTYPES[dtype]
    magnitude = x.abs().amax(dim, keepdim=True)
    # Of NaN and infinity the scale is not finite: the product is NaN, and not what the rounded factors would give.
    scale = torch.where(magnitude == 0, 1.0, magnitude / largest)
    scaled = x / scale
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(-largest, largest).to(dtype), scale


def mutual_own_row(
    own: Tensor,
    streams: Tensor,
    rows: Rows,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """M_t (B, d) and row t of α (B, M), rows as arranged.

    own (B, d) is V_t; streams (M, B, d) are all V_j, of which row (t, n) is not read.
    """
    precise = torch.promote_types(own.dtype, torch.float32)
    v_t, v_j = own.to(precise), streams.to(precise)
    cosine = torch.einsum("bd,jbd->bj", v_t, v_j) / (clamped_norm(v_t).unsqueeze(1) * clamped_norm(v_j).t())
    foreign = torch.arange(streams.shape[0], device=own.device) != rows.t.unsqueeze(1)
    alpha = score_weights(cosine, foreign, score, temperature)
    mix = torch.einsum("bj,jbd->bd", alpha.to(own.dtype), streams)
    gate = torch.sigmoid(grouped_linear(own, gate_weight, gate_bias, rows))
    return own + gate * mix, alpha


def score_table(streams: Tensor, score: str, temperature: float) -> Tensor:
    """The whole table α (B, M, M), diagonal 0, of streams (M, B, d)."""
    v = streams.to(torch.promote_types(streams.dtype, torch.float32))
    norm = clamped_norm(v).t()
    cosine = torch.einsum("ibd,jbd->bij", v, v) / (norm.unsqueeze(2) * norm.unsqueeze(1))
    foreign = ~torch.eye(streams.shape[0], dtype=torch.bool, device=streams.device)
    return score_weights(cosine, foreign, score, temperature)


def score_weights(cosine: Tensor, foreign: Tensor, score: str, temperature: float) -> Tensor:
    """α from the cosines c, both (..., M); ``foreign`` is False at the own entry, where α is 0."""
    if cosine.shape[-1] == 1:
        return torch.zeros_like(cosine)
    cosine = torch.where(foreign, cosine, 0)
    if score == "softmax":
        argument = cosine / temperature
    else:
        total = cosine.sum(-1, keepdim=True)
        degenerate = total.abs() < DEGENERATE_SUM
        argument = torch.where(degenerate, 0, cosine / torch.where(degenerate, 1, total))
    return torch.softmax(argument.masked_fill(~foreign, -torch.inf), dim=-1)


def clamped_norm(v: Tensor) -> Tensor:
    """max(|v|, ε) over the last dimension; constant, with no derivative of any order, where |v| ≤ ε."""
    short = torch.linalg.vector_norm(v.detach(), dim=-1, keepdim=True) <= NORM_EPSILON
    # Without the replacement the second derivative of the norm at 0 would be 0 · ∞.
    norm = torch.linalg.vector_norm(torch.where(short, 1.0, v), dim=-1)
    return torch.where(short.squeeze(-1), NORM_EPSILON, norm)
