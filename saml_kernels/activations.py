"""Every activation δ, one row each: what it is in torch, and what a backward needs of it.

A row's place is its number in the extension's operators (``Activation`` of csrc/activation.h); names are compared when
the extension is loaded, and with the device functions of backends/triton/kernels/activations.py when that is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """An activation δ."""

    name: str
    """What options call it."""
    function: Callable[[Tensor], Tensor]
    """δ of a tensor, in torch."""
    module: Callable[[], nn.Module]
    """Makes the module that computes the same."""
    needs_preact: bool = False
    """Whether δ' is computed from the pre-activation z, as it does not follow from δ(z)."""
    slope_below_kink: float | None = None
    """δ'(z) below z = 0, where δ' jumps; None where it does not."""

    def is_computed_by(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this row's class and options. A subclass may compute something else."""
        own = self.module()
        constants = getattr(own, "__constants__", ())
        return type(module) is type(own) and all(
            getattr(module, option) == getattr(own, option) for option in constants if option != "inplace"
        )


ACTIVATIONS: Final = {
    row.name: row
    for row in (
        Activation("relu", F.relu, nn.ReLU, slope_below_kink=0.0),
        Activation(
            "leaky_relu", partial(F.leaky_relu, negative_slope=0.01), partial(nn.LeakyReLU, 0.01), slope_below_kink=0.01
        ),
        Activation(
            "gelu", partial(F.gelu, approximate="tanh"), partial(nn.GELU, approximate="tanh"), needs_preact=True
        ),
        Activation("silu", F.silu, nn.SiLU, needs_preact=True),
        Activation("tanh", torch.tanh, nn.Tanh),
        Activation("identity", torch.positive, nn.Identity),
    )
}
ACTIVATION_NUMBERS: Final = {name: number for number, name in enumerate(ACTIVATIONS)}
"""By which the extension's operators take them."""


def name_of(module: nn.Module) -> str | None:
    """The activation that ``module`` computes; None if it is none that the kernels know."""
    for row in ACTIVATIONS.values():
        if row.is_computed_by(module):
            return row.name
    return None


def check_names(what: str, expected: Sequence[object], found: Sequence[object]) -> None:
    """Raises ImportError unless another part of the package has the same rows in the same order."""
    if list(expected) != list(found):
        raise ImportError(
            f"{what} must be {', '.join(map(str, expected))}, as in the Python sources; found "
            f"{', '.join(map(str, found))}: rebuild saml_kernels, or complete the new row"
        )
