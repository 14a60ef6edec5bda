"""Names of a package imported at first use: torch takes seconds, which is too long for ``saml-rec --help``."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` for the names in ``module_of``, each from the module there."""

    def get(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(module_of[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
