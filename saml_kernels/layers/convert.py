"""Towers written as nn.Sequential, read for what they compute, so that layers can take them over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from saml_kernels import activations


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


def read_tower(tower: nn.Module, name: str) -> Tower:
    """What ``tower`` computes; ``name`` is used in errors.

    Raises:
        TypeError: not an nn.Sequential, or a module in it that the kernels cannot compute.
        ValueError: no linear layer, one without bias, dropout, hooks, or activations that differ.
    """
    if type(tower) not in (nn.Linear, nn.Sequential):
        raise TypeError(f"{name} must be an nn.Sequential of nn.Linear and activations, got {type(tower).__name__}")
    linears: list[nn.Linear] = []
    between: list[str] = []
    for place, module in _steps(tower, name):
        # torch's parametrizations and LoRA make subclasses of nn.Linear, whose weight is not what trains.
        if isinstance(module, nn.Linear) and type(module) is nn.Linear:
            if module.bias is None:
                raise ValueError(f"{place} must have a bias: with bias=False a bias that trains would be added")
            linears.append(module)
            between.append("identity")
        elif type(module) is nn.Dropout:
            if module.p > 0:
                raise ValueError(f"{place} is dropout with p = {module.p}: only p = 0 is the same function")
        elif type(module) is nn.Identity:
            continue
        elif (kind := activations.name_of(module)) is not None:
            if not linears or between[-1] != "identity":
                raise ValueError(f"{place} must follow an nn.Linear, it is the activation {kind}")
            between[-1] = kind
        else:
            raise TypeError(f"{place} must be an nn.Linear or a known activation, got {module}")
    if not linears:
        raise ValueError(f"{name} must hold at least one nn.Linear")
    if len(set(between[:-1])) > 1:
        raise ValueError(f"{name} must have one activation after every layer but the last, got {between[:-1]}")
    return Tower(tuple(linears), between[0], between[-1])


def _steps(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What a tower runs one after the other, sequences in sequences opened, with their places."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"{name} must have no hooks: nothing would call them")
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for place, step in enumerate(module):
        yield from _steps(step, f"{name}[{place}]")


def check_alike(towers: Sequence[Tower]) -> Tower:
    """The first one.

    Raises:
        ValueError: no tower; widths, activations, dtype, device or frozen parameters that differ between towers; a
            parameter that two places share.
    """
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
        for index, (linear, like) in enumerate(zip(tower.linears, first.linears, strict=True)):
            if _trained(linear) != _trained(like):
                raise ValueError(
                    f"towers must be frozen alike, but linear layer {index} of towers[{k}] is not as in towers[0]"
                )
    parameters = [id(p) for tower in towers for linear in tower.linears for p in (linear.weight, linear.bias)]
    if len(set(parameters)) < len(parameters):
        raise ValueError("towers must not share parameters: copies of them would part")
    return first


def _trained(linear: nn.Linear) -> tuple[bool, bool]:
    return linear.weight.requires_grad, linear.bias.requires_grad
