"""What every backend is: the operations' functions, and the reason where it cannot run one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from saml_kernels.types import Grouping, TrunkOutput, TrunkParams

Operation = Literal[
    "multi_branch", "grouped_mlp", "branch_scores", "expert_outputs", "mutual_unit", "group_by_scenario"
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class Backend(Protocol):
    """An implementation of the operations. Arguments are checked, options complete, autocast is off."""

    name: str

    def supports(self, operation: Operation, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
        """Why it cannot run ``operation`` (on inputs like ``tensor``, with ``options``); None if it can."""

    def group_by_scenario(self, scenario: Tensor, num_scenarios: int) -> Grouping:
        """See :func:`saml_kernels.group_by_scenario`."""

    def multi_branch(
        self,
        x_local: Tensor,
        x_global: Tensor,
        scenario: Tensor,
        params: TrunkParams,
        *,
        activation: str,
        score: str,
        temperature: float,
        stop_gradient: bool,
        foreign_dtype: torch.dtype | None,
        return_scores: bool,
        recompute: bool | str,
        schedule: str,
    ) -> TrunkOutput:
        """See :func:`saml_kernels.multi_branch`."""

    def grouped_mlp(
        self,
        x: Tensor,
        scenario: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        activation: str,
        output_activation: str,
        gated: Tensor | None,
        gate_scale: float,
        shared_weights: Sequence[Tensor],
    ) -> Tensor:
        """See :func:`saml_kernels.grouped_mlp`; without shared weights their list is empty."""

    def branch_scores(
        self,
        x: Tensor,
        scenario: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        activation: str,
        output_activation: str,
        foreign_dtype: torch.dtype | None,
    ) -> Tensor:
        """See :func:`saml_kernels.branch_scores`."""

    def expert_outputs(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        activation: str,
        output_activation: str,
    ) -> Tensor:
        """See :func:`saml_kernels.expert_outputs`."""

    def mutual_unit(
        self,
        v: Tensor,
        scenario: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor,
        *,
        score: str,
        temperature: float,
        stop_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`saml_kernels.mutual_unit`; returns M_t (B, d) and the own rows of α (B, M)."""
