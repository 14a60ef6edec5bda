"""Plain PyTorch as a backend: runs every operation on every device."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saml_kernels import reference
from saml_kernels.backends.base import Operation

SCHEDULE_REASON = "schedule is a choice of the triton backend"


class ReferenceBackend:
    """The functions of :mod:`saml_kernels.reference`."""

    name = "reference"
    group_by_scenario = staticmethod(reference.group_by_scenario)
    multi_branch = staticmethod(reference.multi_branch)
    grouped_mlp = staticmethod(reference.grouped_mlp)
    branch_scores = staticmethod(reference.branch_scores)
    expert_outputs = staticmethod(reference.expert_outputs)
    mutual_unit = staticmethod(reference.mutual_unit)

    def supports(self, operation: Operation, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
        """None but for options that only kernels have."""
        return SCHEDULE_REASON if options.get("schedule", "auto") != "auto" else None
