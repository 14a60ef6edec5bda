"""Shapes of the extension's operators without their computation: torch.compile and the meta device read them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.operators import arguments_of

Fake = Callable[[Any], Any]

_NEEDS_PREACT = tuple(row.needs_preact for row in ACTIVATIONS.values())
"""By the operators' numbering of δ: whether its derivative reads the pre-activation."""


def _fake(name: str) -> Callable[[Fake], Fake]:
    """Registers a function of one object, which holds the operator's arguments under the names of its schema."""
    named = arguments_of(name)

    def register(function: Fake) -> Fake:
        def fake(*values: Any, **keywords: Any) -> Any:
            return function(named(*values, **keywords))

        torch.library.register_fake(f"saml_kernels::{name}")(fake)
        return function

    return register


@_fake("group_by_scenario")
def _group_by_scenario(call: Any) -> tuple[Tensor, ...]:
    rows = call.scenario.new_empty(call.scenario.shape, dtype=torch.int64)
    offsets = call.scenario.new_empty((call.num_scenarios + 1,), dtype=torch.int64)
    return rows, torch.empty_like(rows), offsets


@_fake("group_by_scenario_and_clear")
def _group_by_scenario_and_clear(call: Any) -> tuple[Tensor, ...]:
    counters = call.scenario.new_empty((call.num_counters,), dtype=torch.int32)
    permutation, _, offsets = _group_by_scenario(call)
    return permutation, offsets, counters


def _computed(tensor: Tensor) -> Tensor:
    """An empty one of the type in which the kernels compute."""
    return tensor.new_empty(0, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _stored(tensor: Tensor) -> Tensor:
    """An empty one of the type in which layers save for backward: bfloat16 stays, as products take such factors."""
    return tensor.new_empty(0) if tensor.dtype == torch.bfloat16 else _computed(tensor)


@_fake("trunk_forward")
def _trunk_forward(call: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    x_local, computed, stored = call.x_local, _computed(call.x_local), _stored(call.x_local)
    rows, scenarios = x_local.shape[0], call.branch_weights[0].shape[0]
    scores: list[Tensor] = []
    factors: list[Tensor] = []
    saved: list[Tensor] = []
    width = aux_width = 0
    for layer, weight in enumerate(call.branch_weights):
        width = weight.shape[2]
        aux_width = call.aux_weights[layer].shape[1] if call.aux_weights else 0
        preact = _NEEDS_PREACT[call.activations[layer]]
        mutual = layer in call.mutual_layers
        gate_width = call.gate_weights[len(scores)].shape[2] if mutual else 0
        if mutual:
            scores.append(computed.new_empty(rows, scenarios))
        # In the order of saved_matrices in csrc/cpu/trunk.h.
        read_twice = (
            (True, (rows, width)),
            (mutual, (rows, width)),
            (aux_width > 0, (rows, aux_width)),
        )
        read_once = (
            (preact, computed, (rows, width)),
            (aux_width > 0 and preact, computed, (rows, aux_width)),
            (mutual and not call.recompute, stored, (rows, scenarios, width)),
            (mutual, stored, (rows, gate_width)),
        )
        factors += [stored.new_empty(shape) for wanted, shape in read_twice if call.save and wanted]
        saved += [like.new_empty(shape) for wanted, like, shape in read_once if call.save and wanted]
    own = x_local.new_empty((rows, scenarios, width) if call.all_branches else (rows, width))
    return own, x_local.new_empty(rows, aux_width), scores, factors, saved


@_fake("trunk_backward")
def _trunk_backward(call: Any) -> tuple[Tensor | list[Tensor], ...]:
    rows = call.x_local.shape[0]
    gate_weights = dict(zip(call.mutual_layers, call.gate_weights, strict=True))
    preact_gradients: list[Tensor] = []
    for layer, weight in enumerate(call.branch_weights):
        widths = [weight.shape[2]]
        widths += [call.aux_weights[layer].shape[1]] if call.aux_weights else []
        widths += [gate_weights[layer].shape[2]] if layer in gate_weights else []
        preact_gradients += [_stored(call.x_local).new_empty(rows, width) for width in widths]
    return (
        torch.empty_like(call.x_local) if call.need_local else call.x_local.new_empty(0),
        torch.empty_like(call.x_global) if call.need_global else call.x_global.new_empty(0),
        call.x_local.new_empty(0) if call.gated is None else torch.empty_like(call.gated),
        preact_gradients,
    )


@_fake("trunk_weight_gradients")
def _trunk_weight_gradients(call: Any) -> tuple[list[Tensor], ...]:
    lists = (
        call.branch_weights,
        call.branch_biases,
        call.aux_weights,
        call.aux_biases,
        call.gate_weights,
        call.gate_biases,
        call.shared_weights,
    )
    return tuple([torch.empty_like(entry) for entry in entries] for entries in lists)


@_fake("mutual_forward")
def _mutual_forward(call: Any) -> tuple[Tensor, ...]:
    rows, scenarios, width = call.streams.shape
    shapes = ((rows, width), (rows, scenarios), (rows, width), (rows, call.gate_weight.shape[2]))
    return tuple(call.streams.new_empty(shape) for shape in shapes)


@_fake("mutual_backward")
def _mutual_backward(call: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(call.streams), torch.empty_like(call.gate_weight), torch.empty_like(call.gate_bias)


@_fake("experts_forward")
def _experts_forward(call: Any) -> tuple[Tensor, list[Tensor]]:
    rows, experts = call.x.shape[0], call.weights[0].shape[0]
    saved: list[Tensor] = []
    for layer, weight in enumerate(call.weights):
        # In the order of saved_of_experts in csrc/cpu/trunk.h.
        own = (layer < len(call.weights) - 1, _stored(call.x))
        preact = (_NEEDS_PREACT[call.activations[layer]], _computed(call.x))
        saved += [
            like.new_empty(experts * rows, weight.shape[2]) for wanted, like in (own, preact) if call.save and wanted
        ]
    return call.x.new_empty(rows, experts, call.weights[-1].shape[2]), saved


@_fake("experts_backward")
def _experts_backward(call: Any) -> tuple[Tensor | list[Tensor], ...]:
    lists = ([torch.empty_like(entry) for entry in entries] for entries in (call.weights, call.biases))
    return torch.empty_like(call.x) if call.need_input else call.x.new_empty(0), *lists
