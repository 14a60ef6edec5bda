"""The compiled extension as a backend: its operators are what :class:`saml_kernels.autograd.FusedBackend` asks for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saml_kernels import extension, tracing
from saml_kernels.activations import ACTIVATION_NUMBERS
from saml_kernels.autograd import FusedBackend, ParameterLists, Plan
from saml_kernels.backends.base import Operation
from saml_kernels.backends.reference import SCHEDULE_REASON
from saml_kernels.checks import SCORES
from saml_kernels.types import Grouping

_CPU = frozenset({"cpu"})
SCORE_NUMBERS = {name: number for number, name in enumerate(SCORES)}
ROUNDING_NUMBERS = {None: 0, torch.bfloat16: 1, torch.int8: 2}


class CppBackend(FusedBackend):
    """The operators of the compiled extension."""

    name = "cpp"

    def supports(self, operation: Operation, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
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
        if foreign_dtype not in ROUNDING_NUMBERS:
            known = "None, torch.bfloat16 or torch.int8"
            return f"foreign_dtype must be {known} here, got {foreign_dtype}, of which processors have no products"
        if foreign_dtype is not None and tensor is not None and tensor.dtype == torch.float64:
            return "foreign_dtype is not available for float64 here"
        return tracing.transform_reason()

    def forms_products(self, dtype: torch.dtype) -> bool:
        """Of what is computed as it stands. In 16 bits PyTorch rounds the product, so that PyTorch forms it."""
        return dtype in (torch.float32, torch.float64)

    def group_by_scenario(self, scenario: Tensor, num_scenarios: int) -> Grouping:
        """See :func:`saml_kernels.group_by_scenario`."""
        return Grouping(*torch.ops.saml_kernels.group_by_scenario(scenario, num_scenarios))

    def trunk_forward(
        self,
        x_local: Tensor,
        x_global: Tensor,
        gated: Tensor | None,
        scenario: Tensor,
        lists: ParameterLists,
        plan: Plan,
        save: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Tensor]]:
        """The operator trunk_forward."""
        permutation, inverse, offsets = self.group_by_scenario(scenario, lists.branch_weights[0].shape[0])
        own, aux, scores, factors, saved = torch.ops.saml_kernels.trunk_forward(
            x_local,
            x_global,
            permutation,
            offsets,
            *lists,
            *_arguments(plan, x_local.dtype, gated),
            save,
            plan.recompute,
            plan.all_branches,
        )
        names = {}
        if save:
            names = {"permutation": permutation, "offsets": offsets}
            names |= {f"scores{unit}": tensor for unit, tensor in enumerate(scores)}
            names |= {f"factor{number}": tensor for number, tensor in enumerate(factors)}
            names |= {f"saved{number}": tensor for number, tensor in enumerate(saved)}
        alphas = [_rows(alpha, inverse) for alpha in scores] if plan.return_scores else []
        return own, aux, alphas, names

    def trunk_backward(
        self,
        grad_own: Tensor,
        grad_aux: Tensor,
        x_local: Tensor,
        x_global: Tensor,
        gated: Tensor | None,
        scenario: Tensor,
        lists: ParameterLists,
        saved: dict[str, Tensor],
        plan: Plan,
        need_local: bool,
        need_global: bool,
    ) -> tuple[Any, ...]:
        """The operators trunk_backward and trunk_weight_gradients."""
        if plan.all_branches:
            grad_own = grad_own[torch.arange(len(scenario)), scenario]
        trunk = (
            x_local,
            x_global,
            saved["permutation"],
            saved["offsets"],
            *lists,
            *_arguments(plan, x_local.dtype, gated),
        )
        factors = _numbered("factor", saved)
        local, glob, scaled, preact_gradients = torch.ops.saml_kernels.trunk_backward(
            grad_own.contiguous(),
            grad_aux,
            _numbered("scores", saved),
            factors,
            _numbered("saved", saved),
            *trunk,
            plan.recompute,
            need_local,
            need_global,
        )
        # The streams of all branches make room for the weights' gradients.
        saved.clear()
        return local, glob, scaled, *torch.ops.saml_kernels.trunk_weight_gradients(preact_gradients, factors, *trunk)

    def mutual_forward(
        self, v: Tensor, scenario: Tensor, gate_weight: Tensor, gate_bias: Tensor, score: str, temperature: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The operator mutual_forward on sorted rows."""
        permutation, inverse, offsets = self.group_by_scenario(scenario, v.shape[1])
        streams = v.index_select(0, permutation).to(_computing_dtype(v))
        options = SCORE_NUMBERS[score], temperature, v.dtype == torch.bfloat16
        own, scores, *saved = torch.ops.saml_kernels.mutual_forward(
            streams, permutation, offsets, gate_weight, gate_bias, *options
        )
        names = {"permutation": permutation, "offsets": offsets, "streams": streams, "scores": scores}
        names |= {f"saved{number}": tensor for number, tensor in enumerate(saved)}
        return own.to(v.dtype), scores.index_select(0, inverse), names

    def mutual_backward(
        self,
        gradient: Tensor,
        v: Tensor,
        scenario: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        saved: dict[str, Tensor],
        score: str,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operator mutual_backward."""
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.saml_kernels.mutual_backward(
            gradient.to(_computing_dtype(v)),
            saved["scores"],
            *_numbered("saved", saved),
            *(saved[name] for name in ("streams", "permutation", "offsets")),
            gate_weight,
            gate_bias,
            SCORE_NUMBERS[score],
            temperature,
            v.dtype == torch.bfloat16,
        )
        return gradients

    def experts_forward(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor], activations: tuple[str, ...], save: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The operator experts_forward."""
        out, saved = torch.ops.saml_kernels.experts_forward(x, weights, biases, *_options(x, activations), save)
        return out, {f"saved{number}": tensor for number, tensor in enumerate(saved)}

    def experts_backward(
        self,
        gradient: Tensor,
        out: Tensor,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        saved: dict[str, Tensor],
        activations: tuple[str, ...],
        need_input: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The operator experts_backward."""
        gradients: tuple[Tensor, list[Tensor], list[Tensor]] = torch.ops.saml_kernels.experts_backward(
            gradient, out, _numbered("saved", saved), x, weights, biases, *_options(x, activations), need_input
        )
        return gradients


def _options(x: Tensor, activations: tuple[str, ...]) -> tuple[list[int], bool]:
    """Of experts, as both operators take them."""
    return [ACTIVATION_NUMBERS[name] for name in activations], x.dtype == torch.bfloat16


def _devices(operation: str) -> frozenset[str]:
    if operation != "group_by_scenario":
        return _CPU
    info = extension.build_info()
    return _CPU if info is None or info["cuda"] is None else _CPU | {"cuda"}


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    """The kernels compute in float32, float64 inputs in float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows(x: Tensor, permutation: Tensor) -> Tensor:
    """x[permutation]; itself where it is one row, which code for any batch size cannot ask for."""
    if not torch.compiler.is_compiling() and x.shape[0] == 1:
        return x
    return x.index_select(0, permutation)


def _numbered(name: str, saved: dict[str, Tensor]) -> list[Tensor]:
    """The saved tensors name0, name1, … in their order."""
    return [tensor for key, tensor in saved.items() if key.startswith(name)]


def _arguments(plan: Plan, dtype: torch.dtype, gated: Tensor | None) -> tuple[Any, ...]:
    """As both operators take them, after the parameters."""
    return (
        plan.mutual_layers,
        [ACTIVATION_NUMBERS[name] for name in plan.activations],
        SCORE_NUMBERS[plan.score],
        plan.temperature,
        dtype == torch.bfloat16,
        ROUNDING_NUMBERS[plan.foreign_dtype or (torch.bfloat16 if dtype == torch.bfloat16 else None)],
        gated,
        plan.gate_scale or 1.0,
    )
