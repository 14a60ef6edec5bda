"""Plain PyTorch as a backend: runs every operation on every device."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saml_kernels.reference import branch_scores, group_by_scenario, grouped_mlp, multi_branch, mutual_unit

SCHEDULE_REASON = "schedule is a choice of the triton backend"

__all__ = ["branch_scores", "group_by_scenario", "grouped_mlp", "multi_branch", "mutual_unit", "supports"]


def supports(operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """None but for options that only kernels have."""
    return SCHEDULE_REASON if options.get("schedule", "auto") != "auto" else None
