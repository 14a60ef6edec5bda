"""Shapes of the extension's operators without their computation: torch.compile and the meta device read them."""

from collections.abc import Sequence

import torch
from torch import Tensor

# δ whose derivative needs its argument, by the operators' numbering: gelu and silu.
_NEEDS_ARGUMENT = frozenset({2, 3})


@torch.library.register_fake("saml_kernels::group_by_scenario")
def _group_by_scenario(scenario: Tensor, num_scenarios: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = scenario.new_empty(scenario.shape, dtype=torch.int64)
    return rows, torch.empty_like(rows), scenario.new_empty((num_scenarios + 1,), dtype=torch.int64)


@torch.library.register_fake("saml_kernels::group_by_scenario_and_clear")
def _group_by_scenario_and_clear(
    scenario: Tensor, num_scenarios: int, num_counters: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counters = scenario.new_empty((num_counters,), dtype=torch.int32)
    return (*_group_by_scenario(scenario, num_scenarios), counters)


@torch.library.register_fake("saml_kernels::trunk_forward")
def _trunk_forward(
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
    rows, scenarios = x_local.shape[0], branch_weights[0].shape[0]
    scores: list[Tensor] = []
    kept: list[Tensor] = []
    width = aux_width = 0
    for layer, weight in enumerate(branch_weights):
        width = weight.shape[2]
        aux_width = aux_weights[layer].shape[1] if aux_weights else 0
        argument = activations[layer] in _NEEDS_ARGUMENT
        mutual = layer in mutual_layers
        gate_width = gate_weights[len(scores)].shape[2] if mutual else 0
        if mutual:
            scores.append(x_local.new_empty(rows, scenarios))
        # In the order of the extension's table of kept buffers.
        buffers = (
            (True, (rows, width)),
            (argument, (rows, width)),
            (mutual, (rows, width)),
            (aux_width > 0, (rows, aux_width)),
            (aux_width > 0 and argument, (rows, aux_width)),
            (mutual and not recompute, (rows, scenarios, width)),
            (mutual, (rows, gate_width)),
        )
        kept += [x_local.new_empty(shape) for wanted, shape in buffers if keep and wanted]
    own = x_local.new_empty((rows, scenarios, width) if all_branches else (rows, width))
    return own, x_local.new_empty(rows, aux_width), scores, kept


@torch.library.register_fake("saml_kernels::trunk_backward")
def _trunk_backward(
    grad_own: Tensor,
    grad_aux: Tensor,
    scores: Sequence[Tensor],
    kept: Sequence[Tensor],
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
    recompute: bool,
    need_local: bool,
    need_global: bool,
) -> tuple[Tensor | list[Tensor], ...]:
    lists = (branch_weights, branch_biases, aux_weights, aux_biases, gate_weights, gate_biases)
    return (
        torch.empty_like(x_local) if need_local else x_local.new_empty(0),
        torch.empty_like(x_global) if need_global else x_global.new_empty(0),
        *([torch.empty_like(entry) for entry in entries] for entries in lists),
    )


@torch.library.register_fake("saml_kernels::mutual_forward")
def _mutual_forward(
    streams: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score: int,
    temperature: float,
    bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, scenarios, width = streams.shape
    shapes = ((rows, width), (rows, scenarios), (rows, width), (rows, gate_weight.shape[2]))
    mutual, scores, own, gate = (streams.new_empty(shape) for shape in shapes)
    return mutual, scores, own, gate


@torch.library.register_fake("saml_kernels::mutual_backward")
def _mutual_backward(
    gradient: Tensor,
    scores: Tensor,
    own: Tensor,
    gate: Tensor,
    streams: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    score: int,
    temperature: float,
    bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(streams), torch.empty_like(gate_weight), torch.empty_like(gate_bias)
