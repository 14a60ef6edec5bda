"""The same computation as a user would write it in batched PyTorch, without kernels.

Two uses: it is fast enough to check sizes the per-sample oracle is not, and its own error in bfloat16 or float16 is
the yardstick a kernel's error in that dtype is held against. It is itself checked against the oracle.
"""

import torch
import torch.nn.functional as F
from naive import DEGENERATE_SUM, EPSILON, Output, Params
from torch import Tensor

ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


def mutual(
    V: Tensor, weight: Tensor, bias: Tensor, score: str, temperature: float
) -> tuple[Tensor, Tensor]:  # (B, M, d), (B, M, M)
    M = V.shape[1]
    diagonal = torch.eye(M, dtype=torch.bool, device=V.device)
    lengths = V.norm(dim=-1).clamp_min(EPSILON)
    cosines = (V @ V.mT) / (lengths[:, :, None] * lengths[:, None, :])
    if score == "ratio":
        total = cosines.masked_fill(diagonal, 0.0).sum(-1, keepdim=True)
        usable = total.abs() >= DEGENERATE_SUM
        logits = torch.where(usable, cosines / torch.where(usable, total, 1.0), 0.0)
    else:
        logits = cosines / temperature
    alpha = logits.masked_fill(diagonal, float("-inf")).softmax(-1)
    gate = torch.sigmoid(torch.einsum("bmd,mde->bme", V, weight) + bias)
    return V + gate * (alpha @ V), alpha


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
) -> Output:
    delta = ACTIVATIONS[activation]
    B, M = scenario.shape[0], params.branch_weights[0].shape[0]
    own = torch.nn.functional.one_hot(scenario.long(), M).bool()
    rows = torch.arange(B, device=scenario.device)

    def sg(V: Tensor) -> Tensor:
        return torch.where(own[:, :, None], V, V.detach()) if stop_gradient else V

    A = x_global
    V = sg(x_local if x_local.ndim == 3 else x_local[:, None, :].expand(-1, M, -1))
    scores: list[Tensor | None] = []
    for layer, weight in enumerate(params.gate_weights):
        A = delta(A @ params.aux_weights[layer] + params.aux_biases[layer])
        joined = torch.cat([V, A[:, None, :].expand(-1, M, -1)], dim=-1)
        product = torch.einsum("bmi,mio->bmo", joined, params.branch_weights[layer])
        V = sg(delta(product + params.branch_biases[layer]))
        bias = params.gate_biases[layer]
        if weight is None or bias is None:
            scores.append(None)
        elif M == 1:
            scores.append(V.new_zeros(B, 1))
        else:
            V, alpha = mutual(V, weight, bias, score, temperature)
            V = sg(V)
            scores.append(alpha[rows, scenario.long()])
    return Output(V[rows, scenario.long()], A, scores)
