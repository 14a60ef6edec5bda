"""The Triton kernels as a backend: an engine of :mod:`saml_kernels.autograd` in few launches.

Runs on CUDA tensors, and on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 when Python starts), by name only:
the interpreter shows whether the numbers are right, slowly.
"""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saml_kernels import autograd
from saml_kernels.backends.triton import availability

OPERATIONS = ("multi_branch", "grouped_mlp", "branch_scores", "mutual_unit")


def supports(operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Why Triton cannot run ``operation`` (on inputs like ``tensor``, with ``options``); None if it can."""
    if not availability.INSTALLED:
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
    return None


def _lazily(name: str) -> Any:
    """Triton compiles at import, so the engine is imported at the first call."""

    def call(*arguments: Any) -> Any:
        engine = importlib.import_module("saml_kernels.backends.triton.engine")
        return getattr(engine, name)(*arguments)

    return call


_ENGINE = autograd.Engine(
    trunk_forward=_lazily("trunk_forward"),
    trunk_backward=_lazily("trunk_backward"),
    mutual_forward=_lazily("mutual_forward"),
    mutual_backward=_lazily("mutual_backward"),
)
multi_branch = partial(autograd.multi_branch, _ENGINE)
grouped_mlp = partial(autograd.grouped_mlp, _ENGINE)
branch_scores = partial(autograd.branch_scores, _ENGINE)
mutual_unit = partial(autograd.mutual_unit, _ENGINE)
