"""A Python loop over the scenarios' towers, all rows through each; stack, gather the own stream."""

import torch
from torch import Tensor

from peers.scoring import clamped_norm, ratio_weights
from saml_kernels import TrunkParams


def trunk(x_local: Tensor, x_global: Tensor, scenario: Tensor, params: TrunkParams) -> tuple[Tensor, Tensor]:
    """own (B, d_L), aux (B, a_L); see the package."""
    M = params.branch_weights[0].shape[0]
    is_own = scenario[:, None] == torch.arange(M, device=scenario.device)  # (B, M)
    aux, own = x_global, x_local
    for layer, (weight, bias) in enumerate(zip(params.branch_weights, params.branch_biases, strict=True)):
        aux = torch.relu(torch.addmm(params.aux_biases[layer], aux, params.aux_weights[layer]))
        # After the mutual unit every tower reads the own stream: towers j ≠ t only fill rows that are not gathered.
        streams = torch.relu(_every_tower(torch.cat([own, aux], dim=1), weight, bias))
        own = _gather(streams, scenario)
        gate_weight, gate_bias = params.gate_weights[layer], params.gate_biases[layer]
        if gate_weight is not None and gate_bias is not None:
            foreign = streams.detach()
            dots = torch.einsum("bd,bmd->bm", own, foreign)
            alpha = ratio_weights(dots / (clamped_norm(own)[:, None] * clamped_norm(foreign)), is_own)
            gate = torch.sigmoid(_gather(_every_tower(own, gate_weight, gate_bias), scenario))
            own = own + gate * torch.einsum("bm,bmd->bd", alpha, foreign)
    return own, aux


def _every_tower(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W_k + b_k of all towers k, (B, M, N) from x (B, K)."""
    towers = zip(weight.unbind(0), bias.unbind(0), strict=True)
    return torch.stack([torch.addmm(b, x, w) for w, b in towers], dim=1)


def _gather(streams: Tensor, scenario: Tensor) -> Tensor:
    """Stream t of every row, (B, N) from (B, M, N)."""
    index = scenario.long()[:, None, None].expand(-1, 1, streams.shape[2])
    return streams.gather(1, index).squeeze(1)
