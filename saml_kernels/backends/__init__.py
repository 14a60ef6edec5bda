"""Which backend runs an operation.

``supports(operation, tensor, options)`` of a backend returns a reason or None; ``options`` holds those of the operation
that matter, and "auto" is True while nobody has asked for the backend by name. "auto" takes the first that supports the
input; a backend asked for by name raises its reason.
"""

from typing import Any, Final

from torch import Tensor

from saml_kernels import tracing
from saml_kernels.backends.base import OPERATIONS, Backend, Operation
from saml_kernels.backends.cpp import CppBackend
from saml_kernels.backends.reference import ReferenceBackend
from saml_kernels.backends.triton import TritonBackend

_BACKENDS: Final[dict[str, Backend]] = {
    backend.name: backend for backend in (TritonBackend(), CppBackend(), ReferenceBackend())
}
BACKENDS: Final = tuple(_BACKENDS)
"""Names, in the order "auto" tries them."""
BACKEND_CHOICES: Final = ("auto", *BACKENDS)
"""What the option ``backend`` may be."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run this operation on this input here; the message says why."""


def available_backends(operation: Operation = "multi_branch") -> dict[str, str | None]:
    """For every backend None if it can run ``operation`` on this machine, else the reason why it cannot.

    ``operation`` is one of "multi_branch", "grouped_mlp", "branch_scores", "expert_outputs", "mutual_unit",
    "group_by_scenario". Raises ValueError for any other.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    return {name: backend.supports(operation, None, {}) for name, backend in _BACKENDS.items()}


def choose_backend(name: str, operation: Operation, tensor: Tensor, **options: Any) -> Backend:
    """The backend that runs ``operation`` on inputs like ``tensor`` with ``options``; ``name`` is a known one."""
    if name != "reference" and (reason := tracing.script_reason()) is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run {operation}: {reason}")
    if name == "auto":
        reasons: list[str] = []
        for backend in _BACKENDS.values():
            reason = backend.supports(operation, tensor, options | {"auto": True})
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise BackendUnavailable(f"no backend runs {operation} on {tensor.device}: {'; '.join(reasons)}")
    reason = _BACKENDS[name].supports(operation, tensor, options)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} cannot run {operation}: {reason}")
    return _BACKENDS[name]
