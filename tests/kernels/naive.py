"""The computation read literally: one sample, one branch, one pair of branches at a time.

    A^l   = δ(A^{l-1} Wa^l + ba^l)
    V_k^l = δ([V_k^{l-1} ; A^l] W_k^l + b_k^l)
    c_ij  = ⟨V_i, V_j⟩ / (max(‖V_i‖, ε) max(‖V_j‖, ε))
    α_ij  = softmax over j ≠ i of c_ij / Σ_{j≠i} c_ij            or of c_ij / τ
    M_i   = V_i + sigmoid(V_i U_i + u_i) ∘ Σ_{j≠i} α_ij V_j

Every foreign stream is detached the moment it exists, so automatic differentiation of this file is the gradient
the kernels have to produce. It runs in the dtype it is given; tests give it float64. It shares no code with
saml_kernels and trades all speed for being readable. Source of the formulas: SAML, arXiv 2012.08952.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EPSILON = 1e-8  # floor of a norm in the cosine
DEGENERATE_SUM = 1e-6  # below it the ratios c_ij / Σ c_ij count as 0

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: torch.where(z <= 0, torch.zeros_like(z), z),
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "gelu": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z * torch.sigmoid(z),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


class Params(Protocol):
    """What the oracle reads of the trunk's parameters: one list entry per hidden layer."""

    @property
    def branch_weights(self) -> Sequence[Tensor]: ...
    @property
    def branch_biases(self) -> Sequence[Tensor]: ...
    @property
    def aux_weights(self) -> Sequence[Tensor]: ...
    @property
    def aux_biases(self) -> Sequence[Tensor]: ...
    @property
    def gate_weights(self) -> Sequence[Tensor | None]: ...
    @property
    def gate_biases(self) -> Sequence[Tensor | None]: ...


class Output(NamedTuple):
    """own (B, d_L), aux (B, a_L), scores per layer: None or the own rows of α (B, M)."""

    own: Tensor
    aux: Tensor
    scores: list[Tensor | None]


def rounded(x: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """x as `dtype` can hold it, back in x's own dtype; the 8-bit types with one symmetric scale along `dim`."""
    if dtype == torch.bfloat16:
        return x.to(torch.bfloat16).to(x.dtype)
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    scale = x.abs().amax(dim, keepdim=True) / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if dtype == torch.int8:
        return torch.round(x / scale) * scale
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def cosine(a: Tensor, b: Tensor) -> Tensor:
    norm_a, norm_b = torch.sqrt(a @ a), torch.sqrt(b @ b)
    # A norm at or below ε is the constant ε; branching keeps sqrt'(0) = ∞ out of the graph.
    length_a = norm_a if norm_a > EPSILON else torch.full_like(norm_a, EPSILON)
    length_b = norm_b if norm_b > EPSILON else torch.full_like(norm_b, EPSILON)
    return (a @ b) / (length_a * length_b)


def attention_row(streams: Sequence[Tensor], i: int, score: str, temperature: float) -> dict[int, Tensor]:
    """α_ij of one sample for every j ≠ i."""
    c = {j: cosine(streams[i], streams[j]) for j in range(len(streams)) if j != i}
    if score == "ratio":
        total = sum(c.values())
        assert isinstance(total, Tensor)
        degenerate = abs(total.item()) < DEGENERATE_SUM
        logits = {j: torch.zeros_like(c[j]) if degenerate else c[j] / total for j in c}
    else:
        logits = {j: c[j] / temperature for j in c}
    highest = max(z.item() for z in logits.values())
    exponentials = {j: torch.exp(z - highest) for j, z in logits.items()}
    return {j: e / sum(exponentials.values()) for j, e in exponentials.items()}


def exchange(
    streams: Sequence[Tensor], i: int, gate_logit: Tensor, score: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """M_i of one sample, and the row α_i· with entry i = 0. One branch alone has nobody to listen to."""
    alpha = streams[i].new_zeros(len(streams))
    if len(streams) == 1:
        return streams[i], alpha
    row = attention_row(streams, i, score, temperature)
    heard = torch.zeros_like(streams[i])
    for j, weight in row.items():
        heard = heard + weight * streams[j]
        alpha[j] = weight.detach()
    return streams[i] + torch.sigmoid(gate_logit) * heard, alpha


def one_sample(
    x_local: Tensor,
    x_global: Tensor,
    own: int,
    params: Params,
    *,
    activation: str,
    score: str,
    temperature: float,
    stop_gradient: bool,
    foreign_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """x_local (D_l,) or one view a branch (M, D_l); x_global (D_g,). All M branches run through all layers."""
    delta = ACTIVATIONS[activation]
    branches = range(params.branch_weights[0].shape[0])

    def sg(k: int, stream: Tensor) -> Tensor:
        return stream.detach() if stop_gradient and k != own else stream

    def product(k: int, row: Tensor, weight: Tensor) -> Tensor:
        if foreign_dtype is None or k == own:
            return row @ weight
        return rounded(row, foreign_dtype, dim=0) @ rounded(weight, foreign_dtype, dim=0)

    A = x_global
    V = [sg(k, x_local[k] if x_local.ndim == 2 else x_local) for k in branches]
    scores: list[Tensor | None] = []
    for layer, U in enumerate(params.gate_weights):
        A = delta(A @ params.aux_weights[layer] + params.aux_biases[layer])
        W, b = params.branch_weights[layer], params.branch_biases[layer]
        V = [sg(k, delta(product(k, torch.cat([V[k], A]), W[k]) + b[k])) for k in branches]
        if U is None:
            scores.append(None)
            continue
        u = params.gate_biases[layer]
        assert u is not None
        rows = [exchange(V, i, product(i, V[i], U[i]) + u[i], score, temperature) for i in branches]
        V = [sg(i, rows[i][0]) for i in branches]
        scores.append(rows[own][1])
    return V[own], A, scores


def multi_branch(
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    params: Params,
    *,
    activation: str = "relu",
    score: str = "ratio",
    temperature: float = 0.1,
    stop_gradient: bool = True,
    foreign_dtype: torch.dtype | None = None,
) -> Output:
    """The trunk on a batch of at least one sample."""
    samples = [
        one_sample(
            x_local[n],
            x_global[n],
            own,
            params,
            activation=activation,
            score=score,
            temperature=temperature,
            stop_gradient=stop_gradient,
            foreign_dtype=foreign_dtype,
        )
        for n, own in enumerate(scenario.tolist())
    ]
    scores: list[Tensor | None] = []
    for layer in range(len(params.branch_weights)):
        rows = [sample[2][layer] for sample in samples]
        scores.append(torch.stack([row for row in rows if row is not None]) if rows[0] is not None else None)
    own, aux, _ = zip(*samples, strict=True)
    return Output(torch.stack(own), torch.stack(aux), scores)


def mutual_unit(
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    score: str = "ratio",
    temperature: float = 0.1,
    stop_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """M_t (B, d) and the own rows of α (B, M) from the streams v (B, M, d)."""
    outputs, alphas = [], []
    for n, own in enumerate(scenario.tolist()):
        streams = [v[n, k].detach() if stop_gradient and k != own else v[n, k] for k in range(v.shape[1])]
        gate_logit = streams[own] @ gate_weight[own] + gate_bias[own]
        output, alpha = exchange(streams, own, gate_logit, score, temperature)
        outputs.append(output)
        alphas.append(alpha)
    return torch.stack(outputs), torch.stack(alphas)


def grouped_mlp(
    x: Tensor,
    scenario: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output_activation: str | None = None,
    gated: Tensor | None = None,
    gate_scale: float = 2.0,
    shared_weights: Sequence[Tensor] = (),
) -> Tensor:
    """Each sample through the MLP of its own scenario: (B, d_L); a gate where something is ``gated``."""
    names = [activation] * (len(weights) - 1) + [output_activation or activation]
    outputs = []
    for n, own in enumerate(scenario.tolist()):
        row = x[n]
        for layer, (W, b, name) in enumerate(zip(weights, biases, names, strict=True)):
            weight = W[own] * shared_weights[layer] if shared_weights else W[own]
            row = row @ weight + b[own]
            if gated is None or W is not weights[-1]:
                row = ACTIVATIONS[name](row)
        outputs.append(row if gated is None else gate_scale * torch.sigmoid(row) * gated[n])
    return torch.stack(outputs)


def expert_outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    activation: str = "relu",
    output_activation: str | None = None,
) -> Tensor:
    """Each sample through the MLP of every expert: (B, K, d_L)."""
    everyone = range(weights[0].shape[0])
    options = {"activation": activation, "output_activation": output_activation}
    columns = [grouped_mlp(x, torch.full((len(x),), expert), weights, biases, **options) for expert in everyone]
    return torch.stack(columns, 1)
