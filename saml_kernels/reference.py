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
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

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
    if scenario.device.type == "meta":
        rows = scenario.new_empty(scenario.shape, dtype=torch.int64)
        return Grouping(rows, rows.clone(), scenario.new_empty((num_scenarios + 1,), dtype=torch.int64))
    in_range = (scenario >= 0) & (scenario < num_scenarios)
    if scenario.device.type != "cpu":
        # Reading the verdict on the host would make every call wait for the device.
        torch._assert_async(in_range.all(), f"scenario ids must lie in [0, {num_scenarios})")
    elif not bool(in_range.all()):
        row = int((~in_range).nonzero()[0])
        raise ValueError(f"scenario ids must lie in [0, {num_scenarios}), but row {row} holds {int(scenario[row])}")
    ids, permutation = torch.sort(scenario.long(), stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(scenario.shape[0], device=scenario.device)
    boundaries = torch.arange(num_scenarios + 1, device=scenario.device)
    return Grouping(permutation, inverse, torch.searchsorted(ids, boundaries))


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
    last_mutual = max((layer for layer, unit in enumerate(mutual) if unit), default=-1)

    grouping = group_by_scenario(scenario, num_scenarios)
    sizes = group_sizes(grouping)
    t = scenario[grouping.permutation].long()
    n = torch.arange(t.shape[0], device=t.device)

    aux = x_global[grouping.permutation]
    x_local = x_local[grouping.permutation]
    shared_input = x_local.dim() == 2
    # Streams are (M, B, width), so that the rows of a branch are contiguous; entry (t, n) is the own stream.
    streams = x_local.expand(num_scenarios, -1, -1) if shared_input else x_local.transpose(0, 1)
    own = x_local if shared_input else streams[t, n]
    scores: list[Tensor | None] = []

    foreign_graph = partial(torch.set_grad_enabled, torch.is_grad_enabled() and not stop_gradient)

    for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
        aux = delta(torch.addmm(params.aux_biases[layer], aux, params.aux_weights[layer]))
        inputs = torch.cat([own, aux], dim=1)
        own = delta(grouped_linear(inputs, weight, bias, sizes))
        if layer <= last_mutual:
            with foreign_graph():
                if layer == 0 and shared_input:
                    inputs = inputs.expand(num_scenarios, -1, -1)
                else:
                    inputs = torch.cat([streams, aux.expand(num_scenarios, -1, -1)], dim=2)
                streams = delta(foreign_linear(inputs, weight, bias, foreign_dtype))
                streams = streams.index_put((t, n), own)

        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if gate_weight is None or gate_bias is None:
            scores.append(None)
            continue
        mutual_streams = streams
        if layer < last_mutual:
            with foreign_graph():
                alpha = score_table(streams, score, temperature)
                mix = torch.einsum("bij,jbd->ibd", alpha.to(streams.dtype), streams)
                gate = torch.sigmoid(foreign_linear(streams, gate_weight, gate_bias, foreign_dtype))
                streams = streams + gate * mix
        own, own_alpha = mutual_own_row(
            own, mutual_streams, t, sizes, gate_weight, gate_bias, score=score, temperature=temperature
        )
        scores.append(own_alpha.detach())

    order = grouping.inverse
    return TrunkOutput(
        own[order],
        aux[order],
        tuple(None if alpha is None else alpha[order] for alpha in scores) if return_scores else None,
    )


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
) -> Tensor:
    """See :func:`saml_kernels.grouped_mlp`: δ(z_L), or with ``gated`` γ sigmoid(z_L) ∘ gated."""
    grouping = group_by_scenario(scenario, weights[0].shape[0])
    sizes = group_sizes(grouping)
    names = [activation] * (len(weights) - 1) + [output_activation]
    x = x[grouping.permutation]
    for weight, bias, name in zip(weights, biases, names, strict=True):
        x = ACTIVATIONS[name].function(grouped_linear(x, weight, bias, sizes))
    x = x[grouping.inverse]
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
    grouping = group_by_scenario(scenario, num_scenarios)
    sizes = group_sizes(grouping)
    t = scenario[grouping.permutation].long()
    n = torch.arange(t.shape[0], device=t.device)
    names = [activation] * (len(weights) - 1) + [output_activation]

    x = x[grouping.permutation]
    # Streams are (M, B, width), as in multi_branch; entry (t, n) is the own stream.
    streams = x.expand(num_scenarios, -1, -1) if x.dim() == 2 else x.transpose(0, 1)
    own = x if x.dim() == 2 else streams[t, n]
    streams = streams.detach()
    for weight, bias, name in zip(weights, biases, names, strict=True):
        delta = ACTIVATIONS[name].function
        own = delta(grouped_linear(own, weight, bias, sizes))
        streams = delta(foreign_linear(streams, weight.detach(), bias.detach(), foreign_dtype))
    return streams.index_put((t, n), own).transpose(0, 1)[grouping.inverse]


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
    grouping = group_by_scenario(scenario, v.shape[1])
    t = scenario[grouping.permutation].long()
    n = torch.arange(t.shape[0], device=t.device)
    streams = v[grouping.permutation].transpose(0, 1)
    own, alpha = mutual_own_row(
        streams[t, n],
        streams.detach() if stop_gradient else streams,
        t,
        group_sizes(grouping),
        gate_weight,
        gate_bias,
        score=score,
        temperature=temperature,
    )
    return own[grouping.inverse], alpha.detach()[grouping.inverse]


def group_sizes(grouping: Grouping) -> list[int]:
    """Rows per scenario, on the host."""
    return [stop - start for start, stop in pairwise(grouping.offsets.tolist())]


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
    """x W_t + b_t for rows (B, K) sorted by scenario; weight (M, K, N), bias (M, N).

    Scenarios without rows take part with an empty product: their gradient is then zero and not missing.
    """
    parts = [
        torch.addmm(b, rows, w) for rows, w, b in zip(x.split(sizes), weight.unbind(0), bias.unbind(0), strict=True)
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
    scale = torch.where(magnitude > 0, magnitude / largest, 1.0)
    scaled = x / scale
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(-largest, largest).to(dtype), scale


def mutual_own_row(
    own: Tensor,
    streams: Tensor,
    t: Tensor,
    sizes: list[int],
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """M_t (B, d) and row t of α (B, M), rows sorted by scenario.

    own (B, d) is V_t; streams (M, B, d) are all V_j, of which row (t, n) is not read.
    """
    precise = torch.promote_types(own.dtype, torch.float32)
    v_t, v_j = own.to(precise), streams.to(precise)
    cosine = torch.einsum("bd,jbd->bj", v_t, v_j) / (clamped_norm(v_t).unsqueeze(1) * clamped_norm(v_j).t())
    foreign = torch.arange(streams.shape[0], device=t.device) != t.unsqueeze(1)
    alpha = score_weights(cosine, foreign, score, temperature)
    mix = torch.einsum("bj,jbd->bd", alpha.to(own.dtype), streams)
    gate = torch.sigmoid(grouped_linear(own, gate_weight, gate_bias, sizes))
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
