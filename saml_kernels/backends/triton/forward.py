"""The trunk's forward in few launches: one product a layer and network, the mutual unit after its layer.

Launches do not depend on B or M. With L layers, L_s of them run by all branches, U mutual units of which T are followed
by another one, and F = 1 with rounded foreign streams, else 0:

    2 L + F L_s + 2 U + 2 T

L products of the auxiliary network, L of the branches, F L_s of own branches in full precision; per unit the gate's
product and the own row; per followed unit the product of all gates and the table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saml_kernels.backends.triton import mutual
from saml_kernels.backends.triton.functions import SIGMOID
from saml_kernels.backends.triton.product import Factor, product

NEEDS_ARGUMENT = frozenset({2, 3})
"""gelu and silu: the derivative needs δ's argument."""


def trunk_forward(
    x_local: Tensor,
    x_global: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor],
    aux_weights: Sequence[Tensor],
    aux_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    mutual_layers: Sequence[int],
    activations: Sequence[int],
    score: int,
    temperature: float,
    own_bfloat16: bool,
    foreign_bfloat16: bool,
    keep: bool,
    recompute: bool,
    all_branches: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """As the operator trunk_forward of csrc/ops.cpp; what is kept stands in its order, in the inputs' dtype."""
    rows, m, num_layers = x_local.shape[0], branch_weights[0].shape[0], len(branch_weights)
    num_shared = num_layers if all_branches else max(mutual_layers, default=-1) + 1
    rounded = foreign_bfloat16 and not own_bfloat16
    scores: list[Tensor] = []
    kept: list[Tensor] = []
    own, aux, streams = x_local, x_global, x_local

    for layer, (weight, bias) in enumerate(zip(branch_weights, branch_biases, strict=True)):
        activation, d = activations[layer], weight.shape[2]
        argument_needed = keep and activation in NEEDS_ARGUMENT
        second = aux_argument = None
        if aux_weights:
            before, aux = aux, x_local.new_empty(rows, aux_weights[layer].shape[1])
            aux_argument = torch.empty_like(aux) if argument_needed else None
            product(
                Factor.shared(before),
                None,
                aux_weights[layer],
                aux_biases[layer],
                aux,
                offsets,
                activation,
                own=False,
                argument=aux_argument,
            )
            second = Factor.shared(aux)

        own_argument = x_local.new_empty(rows, d) if argument_needed else None
        own_input = Factor.by_branch(own) if own.dim() == 3 else Factor.shared(own)
        if layer >= num_shared:
            own = x_local.new_empty(rows, d)
            product(own_input, second, weight, bias, own, offsets, activation, own=True, argument=own_argument)
            kept += _present(keep, own, own_argument, None, aux if aux_weights else None, aux_argument, None, None)
            continue

        inputs = Factor.by_branch(streams) if streams.dim() == 3 else Factor.shared(streams)
        streams = x_local.new_empty(rows, m, d)
        product(
            inputs,
            second,
            weight,
            bias,
            streams,
            offsets,
            activation,
            own=False,
            foreign_bfloat16=rounded,
            out_row=m * d,
            out_branch=d,
        )
        if rounded or own_argument is not None:
            # The own stream again, in full precision, and its argument.
            product(
                own_input,
                second,
                weight,
                bias,
                streams,
                offsets,
                activation,
                own=True,
                argument=own_argument,
                out_row=m * d,
                out_branch=d,
            )
        unit = mutual_layers.index(layer) if layer in mutual_layers else None
        if unit is None:
            own = streams
            value = _own_entries(streams, offsets) if keep else None
            kept += _present(keep, value, own_argument, None, aux if aux_weights else None, aux_argument, None, None)
            continue

        gate_weight, gate_bias = gate_weights[unit], gate_biases[unit]
        gate = x_local.new_empty(rows, gate_weight.shape[2])
        product(Factor.by_branch(streams), None, gate_weight, gate_bias, gate, offsets, SIGMOID.value, own=True)
        alpha = torch.empty(rows, m, dtype=torch.float32, device=x_local.device)
        value = x_local.new_empty(rows, d) if keep else None
        own = x_local.new_empty(rows, d)
        mutual.own_row(streams, gate, offsets, score, temperature, alpha, own, value)
        scores.append(alpha)
        kept += _present(
            keep,
            value,
            own_argument,
            own,
            aux if aux_weights else None,
            aux_argument,
            None if recompute else streams,
            gate,
        )
        if layer + 1 < num_shared:
            streams = _mixed(
                streams, gate_weight, gate_bias, offsets, score, temperature, own, foreign_bfloat16=rounded
            )

    sorted_own = streams if all_branches else own
    return unsorted(sorted_own, permutation), unsorted(aux, permutation), scores, kept


def recomputed_streams(
    x_local: Tensor,
    offsets: Tensor,
    branch_weights: Sequence[Tensor],
    branch_biases: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    mutual_layers: Sequence[int],
    activations: Sequence[int],
    score: int,
    temperature: float,
    foreign_bfloat16: bool,
    aux: Sequence[Tensor],
    own_inputs: Sequence[Tensor],
    mutuals: Sequence[Tensor],
) -> list[Tensor]:
    """The streams of every mutual layer again, from every layer's kept ``aux`` and own input, and M_t."""
    m = branch_weights[0].shape[0]
    result: list[Tensor] = []
    streams = x_local
    for layer in range(max(mutual_layers) + 1):
        weight, bias = branch_weights[layer], branch_biases[layer]
        rows, d = x_local.shape[0], weight.shape[2]
        inputs = Factor.by_branch(streams) if streams.dim() == 3 else Factor.shared(streams)
        second = Factor.shared(aux[layer]) if aux else None
        streams = x_local.new_empty(rows, m, d)
        product(
            inputs,
            second,
            weight,
            bias,
            streams,
            offsets,
            activations[layer],
            own=False,
            foreign_bfloat16=foreign_bfloat16,
            out_row=m * d,
            out_branch=d,
        )
        if foreign_bfloat16:
            tensor = own_inputs[layer]
            own_input = Factor.by_branch(tensor) if tensor.dim() == 3 else Factor.shared(tensor)
            product(
                own_input,
                second,
                weight,
                bias,
                streams,
                offsets,
                activations[layer],
                own=True,
                out_row=m * d,
                out_branch=d,
            )
        if layer in mutual_layers:
            unit = list(mutual_layers).index(layer)
            result.append(streams)
            if layer < max(mutual_layers):
                streams = _mixed(
                    streams,
                    gate_weights[unit],
                    gate_biases[unit],
                    offsets,
                    score,
                    temperature,
                    mutuals[unit],
                    foreign_bfloat16=foreign_bfloat16,
                )
    return result


def mutual_forward(
    streams: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score: int,
    temperature: float,
    bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operator mutual_forward of csrc/ops.cpp: two launches."""
    rows, m, d = streams.shape
    gate = streams.new_empty(rows, gate_weight.shape[2])
    product(Factor.by_branch(streams), None, gate_weight, gate_bias, gate, offsets, SIGMOID.value, own=True)
    alpha = torch.empty(rows, m, dtype=torch.float32, device=streams.device)
    own, result = streams.new_empty(rows, d), streams.new_empty(rows, d)
    mutual.own_row(streams, gate, offsets, score, temperature, alpha, result, own)
    return unsorted(result, permutation), alpha, own, gate


def _mixed(
    streams: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    offsets: Tensor,
    score: int,
    temperature: float,
    own: Tensor,
    *,
    foreign_bfloat16: bool,
) -> Tensor:
    """M_i of every branch."""
    rows, m, _ = streams.shape
    width = gate_weight.shape[2]
    gates = streams.new_empty(rows, m, width)
    product(
        Factor.by_branch(streams),
        None,
        gate_weight,
        gate_bias,
        gates,
        offsets,
        SIGMOID.value,
        own=False,
        foreign_bfloat16=foreign_bfloat16,
        out_row=m * width,
        out_branch=width,
    )
    mixed = torch.empty_like(streams)
    mutual.table(streams, gates, offsets, score, temperature, own, mixed)
    return mixed


def _own_entries(streams: Tensor, offsets: Tensor) -> Tensor:
    """(B, d): V_t of rows sorted by scenario."""
    row = torch.arange(streams.shape[0], device=streams.device)
    scenario = torch.searchsorted(offsets[1:], row, right=True)
    return streams[row, scenario]


def unsorted(x: Tensor, permutation: Tensor) -> Tensor:
    """Sorted rows in the caller's order."""
    result = torch.empty_like(x)
    result[permutation] = x
    return result


def _present(keep: bool, *tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None] if keep else []
