"""The compiled extension as a backend: its operators are an engine of :mod:`saml_kernels.autograd`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saml_kernels import autograd, extension
from saml_kernels.activations import ACTIVATION_NUMBERS
from saml_kernels.autograd import Lists, Plan
from saml_kernels.backends.reference import SCHEDULE_REASON
from saml_kernels.checks import SCORES
from saml_kernels.types import Grouping

SCORE_NUMBERS = {name: number for number, name in enumerate(SCORES)}


def supports(operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Why the extension cannot run ``operation`` (on inputs like ``tensor``, with ``options``); None if it can."""
    if extension.EXTENSION_MISSING is not None:
        return extension.EXTENSION_MISSING
    if tensor is not None and tensor.device.type not in _devices(operation):
        return f"the extension has no {operation} kernel for {tensor.device.type}"
    if not options.get("stop_gradient", True):
        return "its backward trains the own branch only: stop_gradient=False needs the reference"
    if options.get("schedule", "auto") != "auto":
        return SCHEDULE_REASON
    foreign_dtype = options.get("foreign_dtype")
    if foreign_dtype not in (None, torch.bfloat16):
        return f"foreign_dtype must be None or torch.bfloat16 here, got {foreign_dtype}"
    if foreign_dtype is not None and tensor is not None and tensor.dtype == torch.float64:
        return "foreign_dtype is not available for float64 here"
    return None


def group_by_scenario(scenario: Tensor, num_scenarios: int) -> Grouping:
    """See :func:`saml_kernels.group_by_scenario`."""
    return Grouping(*torch.ops.saml_kernels.group_by_scenario(scenario, num_scenarios))


def _devices(operation: str) -> frozenset[str]:
    info = extension.build_info()
    cuda = operation == "group_by_scenario" and info is not None and info["cuda"] is not None
    return frozenset({"cpu", "cuda"} if cuda else {"cpu"})


def _trunk_forward(
    x_local: Tensor, x_global: Tensor, scenario: Tensor, lists: Lists, plan: Plan, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
    """The operator trunk_forward on sorted rows."""
    permutation, inverse, offsets = group_by_scenario(scenario, lists[0][0].shape[0])
    dtype = _computing_dtype(x_local)
    x_sorted = [x.index_select(0, permutation).to(dtype) for x in (x_local, x_global)]
    own, aux, scores, kept = torch.ops.saml_kernels.trunk_forward(
        *x_sorted,
        permutation,
        offsets,
        *_in(dtype, lists),
        *_arguments(plan, x_local.dtype),
        keep,
        plan.recompute,
        plan.all_branches,
    )
    names = {"permutation": permutation, "offsets": offsets, "x_local": x_sorted[0], "x_global": x_sorted[1]}
    names |= {f"scores{unit}": tensor for unit, tensor in enumerate(scores)}
    names |= {f"kept{number}": tensor for number, tensor in enumerate(kept)}
    alphas = [alpha.index_select(0, inverse) for alpha in scores]
    return own.to(x_local.dtype), aux.to(x_local.dtype), alphas, names


def _trunk_backward(
    grad_own: Tensor,
    grad_aux: Tensor,
    x_local: Tensor,
    x_global: Tensor,
    scenario: Tensor,
    lists: Lists,
    kept: dict[str, Tensor],
    plan: Plan,
    need_local: bool,
    need_global: bool,
) -> tuple[Any, ...]:
    """The operator trunk_backward."""
    if plan.all_branches:
        grad_own = grad_own[torch.arange(len(scenario)), scenario]
    dtype = _computing_dtype(x_local)
    gradients: tuple[Any, ...] = torch.ops.saml_kernels.trunk_backward(
        grad_own.to(dtype).contiguous(),
        grad_aux.to(dtype).contiguous(),
        _numbered("scores", kept),
        _numbered("kept", kept),
        *(kept[name] for name in ("x_local", "x_global", "permutation", "offsets")),
        *_in(dtype, lists),
        *_arguments(plan, x_local.dtype),
        plan.recompute,
        need_local,
        need_global,
    )
    return gradients


def _mutual_forward(
    v: Tensor, scenario: Tensor, gate_weight: Tensor, gate_bias: Tensor, score: str, temperature: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The operator mutual_forward on sorted rows."""
    permutation, inverse, offsets = group_by_scenario(scenario, v.shape[1])
    dtype = _computing_dtype(v)
    streams = v.index_select(0, permutation).to(dtype)
    gate = gate_weight.to(dtype), gate_bias.to(dtype)
    own, scores, *kept = torch.ops.saml_kernels.mutual_forward(
        streams, permutation, offsets, *gate, SCORE_NUMBERS[score], temperature, v.dtype == torch.bfloat16
    )
    names = {"permutation": permutation, "offsets": offsets, "streams": streams, "scores": scores}
    names |= {f"kept{number}": tensor for number, tensor in enumerate(kept)}
    return own.to(v.dtype), scores.index_select(0, inverse), names


def _mutual_backward(
    gradient: Tensor,
    v: Tensor,
    scenario: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    kept: dict[str, Tensor],
    score: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator mutual_backward."""
    dtype = _computing_dtype(v)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.saml_kernels.mutual_backward(
        gradient.to(dtype),
        kept["scores"],
        *_numbered("kept", kept),
        *(kept[name] for name in ("streams", "permutation", "offsets")),
        gate_weight.to(dtype),
        gate_bias.to(dtype),
        SCORE_NUMBERS[score],
        temperature,
        v.dtype == torch.bfloat16,
    )
    return gradients


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    """The kernels compute in float32, float64 inputs in float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _in(dtype: torch.dtype, lists: Lists) -> list[list[Tensor]]:
    return [[tensor.to(dtype) for tensor in tensors] for tensors in lists]


def _numbered(name: str, kept: dict[str, Tensor]) -> list[Tensor]:
    """The kept tensors name0, name1, … in their order."""
    return [tensor for key, tensor in kept.items() if key.startswith(name)]


def _arguments(plan: Plan, dtype: torch.dtype) -> tuple[Any, ...]:
    """As both operators take them, after the parameters."""
    return (
        plan.mutual_layers,
        [ACTIVATION_NUMBERS[name] for name in plan.activations],
        SCORE_NUMBERS[plan.score],
        plan.temperature,
        dtype == torch.bfloat16,
        torch.bfloat16 in (dtype, plan.foreign_dtype),
    )


_ENGINE = autograd.Engine(_trunk_forward, _trunk_backward, _mutual_forward, _mutual_backward)
multi_branch = partial(autograd.multi_branch, _ENGINE)
grouped_mlp = partial(autograd.grouped_mlp, _ENGINE)
branch_scores = partial(autograd.branch_scores, _ENGINE)
mutual_unit = partial(autograd.mutual_unit, _ENGINE)
