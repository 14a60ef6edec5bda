"""Where the Triton kernels can run; imports no Triton."""

import importlib.metadata
import importlib.util
import os
import re
from contextlib import suppress

import torch

OLDEST = "3.5"
"""Version of Triton: an earlier one has no functions of constants that kernels may call, and does not read them all."""
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")
"""Under which Triton is distributed."""


def version_reason() -> str | None:
    """Why no Triton can be used; None if one can, as far as its version says."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for distribution in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(distribution)
            is_old = _numbers(version) < _numbers(OLDEST)
            return f"triton {version} is installed, {OLDEST} is needed" if is_old else None
    return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


MISSING = version_reason()
"""Of this process."""
# As Triton itself reads it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def device_reason(device_type: str | None) -> str | None:
    """Why tensors of that device (None: any) cannot be used; None if they can."""
    if device_type == "cpu" or (device_type is None and not torch.cuda.is_available()):
        if INTERPRETED:
            return None
        need = "tensors on cpu need Triton's interpreter (TRITON_INTERPRET=1)"
        return need if torch.cuda.is_available() else f"there is no GPU; {need}"
    if device_type in (None, "cuda"):
        return "TRITON_INTERPRET is set: the interpreter takes CPU tensors" if INTERPRETED else None
    return f"there is no Triton kernel for {device_type}"


def float8_reason(device: torch.device | None) -> str | None:
    """Why there are no float8_e4m3fn products on that device (None: the current one); None if there are."""
    if INTERPRETED or not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return "float8_e4m3fn needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"float8_e4m3fn needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}"
    return None
