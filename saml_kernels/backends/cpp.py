"""The compiled extension as a backend: its operators are an engine of :mod:`saml_kernels.backends.fused`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saml_kernels import extension
from saml_kernels.backends import fused
from saml_kernels.structures import Grouping


def supports(operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Why the extension cannot run ``operation`` (on inputs like ``tensor``, with ``options``); None if it can."""
    if extension.EXTENSION_MISSING is not None:
        return extension.EXTENSION_MISSING
    if tensor is not None and tensor.device.type not in _devices(operation):
        return f"the extension has no {operation} kernel for {tensor.device.type}"
    if not options.get("stop_gradient", True):
        return "its backward trains the own branch only: stop_gradient=False needs the reference"
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


def _operator(name: str) -> Any:
    """Looked up at the call: the operators exist only where the extension was built."""
    return lambda *arguments: getattr(torch.ops.saml_kernels, name)(*arguments)


_ENGINE = fused.Engine(
    group_by_scenario=group_by_scenario,
    trunk_forward=_operator("trunk_forward"),
    trunk_backward=_operator("trunk_backward"),
    mutual_forward=_operator("mutual_forward"),
    mutual_backward=_operator("mutual_backward"),
    # The kernels compute in float32, float64 inputs in float64.
    computing_dtype=partial(torch.promote_types, torch.float32),
)
multi_branch = partial(fused.multi_branch, _ENGINE)
grouped_mlp = partial(fused.grouped_mlp, _ENGINE)
branch_scores = partial(fused.branch_scores, _ENGINE)
mutual_unit = partial(fused.mutual_unit, _ENGINE)
