"""Towers written as nn.Sequential, read for what they compute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.01),
    "gelu": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


@dataclass(frozen=True)
class Tower:
    """Linear layers with one activation between them and perhaps another one after the last."""

    linears: tuple[nn.Linear, ...]
    activation: str
    output_activation: str

    @property
    def widths(self) -> tuple[int, ...]:
        """d_0..d_L."""
        return (self.linears[0].in_features, *(linear.out_features for linear in self.linears))


def activation_name(module: nn.Module) -> str | None:
    """The activation that ``module`` computes; None if it is none that the kernels know."""
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "tanh" else None
    kinds = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Identity: "identity"}
    return kinds.get(type(module))


def read_tower(tower: nn.Module, name: str) -> Tower:
    """What ``tower`` computes; ``name`` is used in errors.

    Raises:
        TypeError: not an nn.Sequential, or a module in it that the kernels cannot compute.
        ValueError: no linear layer, one without bias, dropout, or activations that differ.
    """
    if isinstance(tower, nn.Linear):
        tower = nn.Sequential(tower)
    if not isinstance(tower, nn.Sequential):
        raise TypeError(f"{name} must be an nn.Sequential of nn.Linear and activations, got {type(tower).__name__}")
    linears: list[nn.Linear] = []
    activations: list[str] = []
    for place, module in enumerate(tower):
        if isinstance(module, nn.Linear):
            if module.bias is None:
                raise ValueError(f"{name}[{place}] must have a bias: with bias=False a bias that trains would be added")
            linears.append(module)
            activations.append("identity")
        elif isinstance(module, nn.Dropout):
            if module.p > 0:
                raise ValueError(f"{name}[{place}] is dropout with p = {module.p}: only p = 0 is the same function")
        elif (kind := activation_name(module)) is not None:
            if not linears or activations[-1] != "identity":
                raise ValueError(f"{name}[{place}] must follow an nn.Linear, it is the activation {kind}")
            activations[-1] = kind
        else:
            raise TypeError(f"{name}[{place}] must be an nn.Linear or a known activation, got {module}")
    if not linears:
        raise ValueError(f"{name} must hold at least one nn.Linear")
    if len(set(activations[:-1])) > 1:
        raise ValueError(f"{name} must have one activation after every layer but the last, got {activations[:-1]}")
    return Tower(tuple(linears), activations[0], activations[-1])


def check_alike(towers: Sequence[Tower]) -> Tower:
    """The first one. Raises ValueError unless there is one, and all have its widths, activations, dtype and device."""
    if not towers:
        raise ValueError("towers must hold at least one tower, got none")
    first = towers[0]
    for k, tower in enumerate(towers):
        for what in ("widths", "activation", "output_activation"):
            if getattr(tower, what) != getattr(first, what):
                raise ValueError(
                    f"towers must be alike, but towers[0] has {what} {getattr(first, what)} and towers[{k}] "
                    f"{getattr(tower, what)}"
                )
        if len({(p.dtype, p.device) for p in (first.linears[0].weight, *(x.weight for x in tower.linears))}) > 1:
            raise ValueError(f"towers must share one dtype and device, but towers[{k}] has another one")
    return first
