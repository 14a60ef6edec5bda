"""Loads the compiled extension saml_kernels._C, or remembers why it cannot be loaded."""

from types import ModuleType
from typing import Any

import torch

from saml_kernels.activations import ACTIVATIONS, check_names
from saml_kernels.checks import SCORES

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


def check_numbering() -> None:
    """Raises ImportError where the operators' numbers stand for other activations or scores than those of Python."""
    if _C is None:
        return
    check_names("activations of saml_kernels._C", tuple(ACTIVATIONS), _C.activations())
    needs = [f"{row.name}={row.needs_preact}" for row in ACTIVATIONS.values()]
    found = [f"{name}={need}" for name, need in zip(_C.activations(), _C.activations_need_preact(), strict=True)]
    check_names("whether activations of saml_kernels._C need the pre-activation", needs, found)
    check_names("scores of saml_kernels._C", SCORES, _C.scores())


# Read once: torch.compile does not trace calls into the extension's module.
_BUILD_INFO: dict[str, Any] | None = None if _C is None else dict(_C.build_info())

check_numbering()
if _C is not None:
    from saml_kernels import fakes as fakes
