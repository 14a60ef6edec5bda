"""Loads the compiled extension saml_kernels._C, or remembers why it cannot be loaded."""

from types import ModuleType

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


def build_info() -> dict[str, str | int | None] | None:
    """How the extension was built: torch, compiler, C++ standard, CUDA or why not; None when it is not loaded."""
    return None if _C is None else dict(_C.build_info())


if _C is not None:

    @torch.library.register_fake("saml_kernels::group_by_scenario")
    def _(scenario: torch.Tensor, num_scenarios: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = scenario.new_empty(scenario.shape, dtype=torch.int64)
        offsets = scenario.new_empty((num_scenarios + 1,), dtype=torch.int64)
        return rows, torch.empty_like(rows), offsets
