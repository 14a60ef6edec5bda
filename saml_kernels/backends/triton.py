"""The Triton kernels as a backend."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def supports(operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    """Why Triton cannot run ``operation``; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return f"there is no Triton kernel for {operation}"
