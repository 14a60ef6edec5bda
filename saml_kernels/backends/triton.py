"""The Triton kernels as a backend."""

import importlib.util

from torch import Tensor


def supports(operation: str, tensor: Tensor | None) -> str | None:
    """Why Triton cannot run ``operation``; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return f"there is no Triton kernel for {operation}"
