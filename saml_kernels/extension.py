"""Loads the compiled extension saml_kernels._C, or remembers why it cannot be loaded."""

from types import ModuleType
from typing import Any

import torch

_C: ModuleType | None
EXTENSION_MISSING: str | None
"""None when the extension is loaded, else one line that says why it is not."""

try:
    from saml_kernels import _C as _C  # type: ignore[attr-defined,no-redef]

    EXTENSION_MISSING = None
except ImportError as error:
    _C = None
    EXTENSION_MISSING = (
        "the compiled extension saml_kernels._C is not built"
        if "_C" in str(error) and "cannot import name" in str(error)
        else f"the compiled extension saml_kernels._C does not load with torch {torch.__version__} "
        f"(rebuild it against this torch): {str(error).splitlines()[0]}"
    )


def build_info() -> dict[str, Any] | None:
    """How the extension was built and what it can run; None when it is not loaded.

    Keys: "torch", "compiler", "cpp_standard", "cuda" (version or None), "cuda_omitted" (why, or None),
    "cpu_capabilities" (instruction sets that this machine can run, best first).
    """
    return None if _BUILD_INFO is None else dict(_BUILD_INFO)


def activation_names() -> tuple[str, ...] | None:
    """The extension's activations, each at the number by which its operators take it; None when it is not loaded."""
    return None if _C is None else tuple(_C.activations())


def score_names() -> tuple[str, ...] | None:
    """The extension's scores, each at the number by which its operators take it; None when it is not loaded."""
    return None if _C is None else tuple(_C.scores())


# Read once: torch.compile does not trace calls into the extension's module.
_BUILD_INFO: dict[str, Any] | None = None if _C is None else dict(_C.build_info())

if _C is not None:
    from saml_kernels import fakes as fakes
