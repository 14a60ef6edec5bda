"""Loads the operators, a library without Python's symbols, or remembers why they cannot be loaded.

The library is built for one release of torch and bears its name, _ops.torch<release>.so; several may stand side by
side.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from saml_kernels.activations import ACTIVATIONS, check_names
from saml_kernels.checks import SCORES

FOLDER = Path(__file__).parent
EXTENSION_MISSING: str | None
"""None when the operators are loaded, else one line that says why they are not."""


def release(version: str) -> str:
    """The part of torch's version within which its C++ interface stays: 2.13 of 2.13.1+cu130."""
    return ".".join(version.split(".")[:2])


def library_path(version: str) -> Path:
    """Where the operators for a version of torch stand, if they were built."""
    return FOLDER / f"_ops.torch{release(version)}.so"


def load() -> str | None:
    """Loads the operators for the torch in use; None, or why they cannot be loaded.

    Warns with ImportWarning where there are operators, but none that this torch can load.
    """
    path = library_path(torch.__version__)
    others = [other.name.removeprefix("_ops.torch").removesuffix(".so") for other in FOLDER.glob("_ops.torch*.so")]
    if path.exists():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            reason = (
                f"the compiled extension {path.name} does not load with torch {torch.__version__} (rebuild it against "
                f"this torch): {str(error).splitlines()[0]}"
            )
        else:
            return None
    elif others:
        reason = (
            f"the compiled extension was built for torch {', '.join(sorted(others))}, and this is torch "
            f"{torch.__version__}: rebuild it against this torch"
        )
    else:
        return "the compiled extension saml_kernels._ops is not built"
    with warnings.catch_warnings():
        # Python shows no ImportWarning unless asked to.
        if not sys.warnoptions:
            warnings.simplefilter("always", ImportWarning)
        warnings.warn(f"saml_kernels runs without its C++ kernels: {reason}", ImportWarning, stacklevel=2)
    return reason


def build_info() -> dict[str, Any] | None:
    """How the extension was built and what it can run; None when it is not loaded.

    Keys: "torch", "compiler", "cpp_standard", "cuda" (version or None), "cuda_omitted" (why, or None),
    "cpu_capabilities" (instruction sets that this machine can run, best first).
    """
    return None if _BUILD_INFO is None else dict(_BUILD_INFO)


def activation_names() -> tuple[str, ...] | None:
    """The extension's activations, each at the number by which its operators take it; None when it is not loaded."""
    return None if EXTENSION_MISSING else tuple(torch.ops.saml_kernels.activations())


def activations_need_preact() -> tuple[bool, ...] | None:
    """For each of them, whether its derivative reads the pre-activation; None when the extension is not loaded."""
    return None if EXTENSION_MISSING else tuple(torch.ops.saml_kernels.activations_need_preact())


def score_names() -> tuple[str, ...] | None:
    """The extension's scores, each at the number by which its operators take it; None when it is not loaded."""
    return None if EXTENSION_MISSING else tuple(torch.ops.saml_kernels.scores())


def check_numbering() -> None:
    """Raises ImportError where the operators' numbers stand for other activations or scores than those of Python."""
    names, found_needs, scores = activation_names(), activations_need_preact(), score_names()
    if names is None or found_needs is None or scores is None:
        return
    check_names("activations of saml_kernels._ops", tuple(ACTIVATIONS), names)
    needs = [f"{row.name}={row.needs_preact}" for row in ACTIVATIONS.values()]
    found = [f"{name}={need}" for name, need in zip(names, found_needs, strict=True)]
    check_names("whether activations of saml_kernels._ops need the pre-activation", needs, found)
    check_names("scores of saml_kernels._ops", SCORES, scores)


def _read_build_info() -> dict[str, Any]:
    operator = torch.ops.saml_kernels.build_info.default
    names = [entry.name for entry in operator._schema.returns]
    return dict(zip(names, operator(), strict=True))


EXTENSION_MISSING = load()
# Read once: torch.compile does not trace operators without tensors.
_BUILD_INFO = None if EXTENSION_MISSING else _read_build_info()

check_numbering()
if EXTENSION_MISSING is None:
    from saml_kernels import fakes as fakes
    from saml_kernels import flops as flops
