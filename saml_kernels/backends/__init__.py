"""Which engine runs an operation.

Every backend is a module with the operations' functions and ``supports(operation, tensor, options) -> reason | None``;
``options`` holds those of the operation that matter, and "auto" is True while nobody has asked for it by name.
"auto" takes the first that supports the input; a backend asked for by name raises its reason.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from torch import Tensor

OPERATIONS: Final = ("multi_branch", "grouped_mlp", "branch_scores", "mutual_unit", "group_by_scenario")
# In the order "auto" tries them.
_MODULES: Final = {
    "triton": "saml_kernels.backends.triton",
    "cpp": "saml_kernels.backends.cpp",
    "reference": "saml_kernels.backends.reference",
}
BACKENDS: Final = tuple(_MODULES)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this operation on this input here; the message says why."""


def _reason(name: str, operation: str, tensor: Tensor | None, options: Mapping[str, Any]) -> str | None:
    reason: str | None = _LOADED[name].supports(operation, tensor, options)
    return reason


def available_backends(operation: str = "multi_branch") -> dict[str, str | None]:
    """For every backend None if it can run ``operation`` on this machine, else the reason why it cannot.

    ``operation`` is one of "multi_branch", "grouped_mlp", "branch_scores", "mutual_unit", "group_by_scenario". Raises
    ValueError for any other.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    return {name: _reason(name, operation, None, {}) for name in BACKENDS}


def choose_backend(name: str, operation: str, tensor: Tensor, **options: Any) -> ModuleType:
    """The module that runs ``operation`` on inputs like ``tensor`` with ``options``; ``name`` is a known one."""
    if name == "auto":
        reasons: list[str] = []
        for candidate in BACKENDS:
            reason = _reason(candidate, operation, tensor, options | {"auto": True})
            if reason is None:
                return _LOADED[candidate]
            reasons.append(f"{candidate}: {reason}")
        raise BackendUnavailable(f"no backend runs {operation} on {tensor.device}: {'; '.join(reasons)}")
    reason = _reason(name, operation, tensor, options)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run {operation}: {reason}")
    return _LOADED[name]


# At import, as torch.compile traces no imports; none of them imports Triton.
_LOADED: Final = {name: importlib.import_module(path) for name, path in _MODULES.items()}
