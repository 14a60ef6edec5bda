"""The extension's operators by name, with their arguments as their schemas call them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def arguments_of(name: str) -> Callable[..., Any]:
    """For an operator the function that gives a call's arguments as attributes of one object."""
    names = [argument.name for argument in getattr(torch.ops.saml_kernels, name).default._schema.arguments]

    def named(*values: Any, **keywords: Any) -> Any:
        return SimpleNamespace(**dict(zip(names, values, strict=False)), **keywords)

    return named
