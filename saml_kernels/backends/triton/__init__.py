"""The Triton kernels as a backend: an engine of :mod:`saml_kernels.backends.fused` in few launches.

Runs on CUDA tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 when Python starts), by name only:
the interpreter shows whether the numbers are right, slowly.
"""

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saml_kernels import reference
from saml_kernels.backends import fused
from saml_kernels.backends.triton import availability

OPERATIONS = ("multi_branch", "grouped_mlp", "branch_scores", "mutual_unit")


def supports(operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Why Triton cannot run ``operation`` (on inputs like ``tensor``, with ``options``); None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
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
    if foreign_dtype not in (None, torch.bfloat16):
        return f"foreign_dtype must be None or torch.bfloat16 here, got {foreign_dtype}"
    if tensor is not None and tensor.dtype == torch.float64:
        return "float64 is not available here"
    return None


def _lazily(module: str, name: str) -> Any:
    """Triton compiles at import, so its modules are imported at the first call."""

    def call(*arguments: Any) -> Any:
        loaded = importlib.import_module(f"saml_kernels.backends.triton.{module}")
        return getattr(loaded, name)(*arguments)

    return call


_ENGINE = fused.Engine(
    group_by_scenario=reference.group_by_scenario,
    trunk_forward=_lazily("forward", "trunk_forward"),
    trunk_backward=_lazily("backward", "trunk_backward"),
    mutual_forward=_lazily("forward", "mutual_forward"),
    mutual_backward=_lazily("backward", "mutual_backward"),
    # Inputs, streams and what is kept have the caller's dtype; sums and scores are float32.
    computing_dtype=lambda dtype: dtype,
)
multi_branch = partial(fused.multi_branch, _ENGINE)
grouped_mlp = partial(fused.grouped_mlp, _ENGINE)
branch_scores = partial(fused.branch_scores, _ENGINE)
mutual_unit = partial(fused.mutual_unit, _ENGINE)
