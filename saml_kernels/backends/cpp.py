"""The compiled extension as a backend."""

import torch
from torch import Tensor

from saml_kernels import extension
from saml_kernels.structures import Grouping

_OPERATIONS = frozenset({"group_by_scenario"})


def supports(operation: str, tensor: Tensor | None) -> str | None:
    """Why the extension cannot run ``operation`` (on inputs like ``tensor``); None if it can."""
    if operation not in _OPERATIONS:
        return f"the extension has no {operation} kernel"
    if extension.EXTENSION_MISSING is not None:
        return extension.EXTENSION_MISSING
    if tensor is not None and tensor.device.type not in _devices():
        return f"the extension was built without kernels for {tensor.device.type}"
    return None


def _devices() -> frozenset[str]:
    info = extension.build_info()
    return frozenset({"cpu", "meta"} | ({"cuda"} if info is not None and info["cuda"] is not None else set()))


def group_by_scenario(scenario: Tensor, num_scenarios: int) -> Grouping:
    """See :func:`saml_kernels.group_by_scenario`."""
    return Grouping(*torch.ops.saml_kernels.group_by_scenario(scenario, num_scenarios))
