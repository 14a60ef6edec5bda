"""All towers for all rows, the whole M×M table, pick the own row: what public multi-scenario code does."""

import torch
from torch import Tensor

from peers.scoring import clamped_norm, ratio_weights
from saml_kernels import TrunkParams


def trunk(x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams) -> tuple[Tensor, Tensor]:
    """own (B, d_L), aux (B, a_L); see the package."""
    M = params.branch_weights[0].shape[0]
    rows = torch.arange(scenario.shape[0], device=scenario.device)
    is_own = (scenario == torch.arange(M, device=scenario.device)[:, None])[:, :, None]  # (M, B, 1)

    aux = x_global
    streams = x_local.expand(M, -1, -1)  # (M, B, width)
    for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
        aux = torch.relu(torch.addmm(params.aux_biases[layer], aux, params.aux_weights[layer]))
        inputs = torch.cat([streams, aux.expand(M, -1, -1)], dim=2)
        streams = torch.relu(torch.baddbmm(bias[:, None], inputs, weight))
        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if gate_weight is not None and gate_bias is not None:
            # Picking row t at the end leaves M_j, j ≠ t, without gradient: only what M_t reads needs the stop.
            streams = torch.where(is_own, streams, streams.detach())
            streams = _mutual_unit(streams, gate_weight, gate_bias)
    return streams[scenario, rows], aux


def _mutual_unit(streams: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """M_i (M, B, d) of all branches from V_i (M, B, d)."""
    norm = clamped_norm(streams)
    cosine = torch.einsum("ibd,jbd->bij", streams, streams) / (norm.t()[:, :, None] * norm.t()[:, None, :])
    alpha = ratio_weights(cosine, torch.eye(streams.shape[0], dtype=torch.bool, device=streams.device))
    gate = torch.sigmoid(torch.baddbmm(gate_bias[:, None], streams, gate_weight))
    return streams + gate * torch.einsum("bij,jbd->ibd", alpha, streams)
