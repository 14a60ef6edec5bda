"""The Triton kernels as a backend: engine.py in few launches.

Runs on CUDA tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 when Python starts), by name only:
the interpreter shows whether the numbers are right, slowly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saml_kernels import tracing
from saml_kernels.autograd import FusedBackend, ParameterLists, Plan
from saml_kernels.backends.base import Operation
from saml_kernels.backends.triton import availability
from saml_kernels.types import Grouping

OPERATIONS = ("multi_branch", "grouped_mlp", "branch_scores", "expert_outputs", "mutual_unit")


class TritonBackend(FusedBackend):
    """The launches of engine.py, which is imported at the first call, as Triton is with it."""

    name = "triton"

    def supports(self, operation: Operation, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
        """Why Triton cannot run ``operation`` (on inputs like ``tensor``, with ``options``); None if it can."""
        if availability.MISSING is not None:
            return availability.MISSING
        if operation not in OPERATIONS:
            return f"there is no Triton kernel for {operation}"
        reason = availability.device_reason(None if tensor is None else tensor.device.type)
        if reason is not None:
            return reason
        if availability.INTERPRETED and options.get("auto", False):
            return "the interpreter runs by name only"
        if not options.get("stop_gradient", True):
            return "its backward trains the own branch only: stop_gradient=False needs the reference"
        foreign_dtype = options.get("foreign_dtype")
        if options.get("schedule") == "persistent" and foreign_dtype not in (
            None,
            None if tensor is None else tensor.dtype,
        ):
            return 'foreign_dtype needs schedule "per_layer": both kinds of products in one kernel spill registers'
        if foreign_dtype == torch.float8_e4m3fn:
            reason = availability.float8_reason(None if tensor is None else tensor.device)
            if reason is not None:
                return reason
        if tensor is not None and tensor.dtype == torch.float64:
            return "float64 is not available here"
        return tracing.transform_reason()

    def group_by_scenario(self, scenario: Tensor, num_scenarios: int) -> Grouping:
        """Never called: ``supports`` refuses it."""
        raise NotImplementedError("there is no Triton kernel for group_by_scenario")

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
        from saml_kernels.backends.triton import engine

        return engine.trunk_forward(x_local, x_global, gated, scenario, lists, plan, save)

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
    ) -> tuple[Tensor, Tensor, Tensor, *tuple[list[Tensor], ...]]:
        from saml_kernels.backends.triton import engine

        inputs = x_local, x_global
        return engine.trunk_backward(
            grad_own, grad_aux, *inputs, gated, scenario, lists, saved, plan, need_local, need_global
        )

    def mutual_forward(
        self, v: Tensor, scenario: Tensor, gate_weight: Tensor, gate_bias: Tensor, score: str, temperature: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        from saml_kernels.backends.triton import engine

        return engine.mutual_forward(v, scenario, gate_weight, gate_bias, score, temperature)

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
        from saml_kernels.backends.triton import engine

        return engine.mutual_backward(gradient, v, scenario, gate_weight, gate_bias, saved, score, temperature)

    def experts_forward(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor], activations: tuple[str, ...], save: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        from saml_kernels.backends.triton import engine

        return engine.experts_forward(x, weights, biases, activations, save)

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
        from saml_kernels.backends.triton import engine

        return engine.experts_backward(gradient, out, x, weights, biases, saved, activations, need_input)
