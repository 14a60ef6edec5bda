"""Towers written as nn.Sequential, read for what they compute, so that layers can take them over."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from saml_kernels import activations

ELEMENTWISE = (
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.Softplus,
)
"""Modules without parameters that work number by number, with any options: what else may stand between products."""


@dataclass(frozen=True)
class Step:
    """A module of a tower."""

    module: nn.Module
    place: str
    """Where it is, for messages: ``towers[0][2]``."""
    path: str
    """Its name in the tower's state dict, with a dot behind it; "" of a tower that is one module."""


@dataclass(frozen=True)
class Tower:
    """nn.Linear, nn.BatchNorm1d, nn.Dropout and activations, one after the other."""

    name: str
    steps: tuple[Step, ...]

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return tuple(step.module for step in self.steps if isinstance(step.module, nn.Linear))

    @property
    def widths(self) -> tuple[int, ...]:
        """d_0..d_L."""
        return (self.linears[0].in_features, *(linear.out_features for linear in self.linears))


@dataclass(frozen=True)
class Entry:
    """A tensor of a layer's state that is those of the towers, stacked."""

    name: str
    path: str
    """Of the towers' tensors in the state of each."""
    is_transposed: bool = False

    def stacked(self, towers: Iterable[Tensor]) -> Tensor:
        return torch.stack([tensor.t() if self.is_transposed else tensor for tensor in towers])


def read_towers(towers: Iterable[nn.Module], names: Sequence[str] | None = None) -> list[Tower]:
    """What towers compute, all alike; ``names`` are used in errors, ``towers[0]`` and so on unless given.

    Raises:
        TypeError: neither an nn.Sequential nor a module that runs others one after the other, or a module in it that
            no layer takes.
        ValueError: no tower; no linear layer; hooks; widths that do not fit; towers that differ in modules, options,
            widths, dtype, device, mode or frozen parameters; a parameter that two places share.
    """
    modules = list(towers)
    names = [f"towers[{k}]" for k in range(len(modules))] if names is None else names
    read = [_read_tower(tower, name) for tower, name in zip(modules, names, strict=True)]
    _check_alike(read)
    return read


def _read_tower(tower: nn.Module, name: str) -> Tower:
    found = _steps(tower, name, "") if type(tower) in (nn.Linear, nn.Sequential) else _traced(tower, name)
    steps = [step for step in found if not _does_nothing(step.module)]
    width: int | None = None
    for step in steps:
        module = step.module
        # torch's parametrizations and LoRA make subclasses of nn.Linear, whose weight is not what trains.
        if type(module) is nn.Linear:
            _check_width(step, module.in_features, width)
            width = module.out_features
        elif type(module) is nn.BatchNorm1d:
            _check_width(step, module.num_features, width)
            width = module.num_features
        elif type(module) is not nn.Dropout and not is_activation(module):
            raise TypeError(
                f"{step.place} must be an nn.Linear, nn.BatchNorm1d, nn.Dropout or a known activation, got {module}"
            )
    result = Tower(name, tuple(steps))
    if not result.linears:
        raise ValueError(f"{name} must hold at least one nn.Linear")
    return result


def is_activation(module: nn.Module) -> bool:
    """Whether the kernels or torch compute it number by number. A subclass may compute something else."""
    return type(module) in ELEMENTWISE or activations.name_of(module) is not None


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)


def _check_width(step: Step, reads: int, width: int | None) -> None:
    if width not in (None, reads):
        raise ValueError(f"{step.place} must read the {width} columns before it, it reads {reads}")


def _steps(module: nn.Module, name: str, path: str) -> Iterator[Step]:
    """What a tower runs one after the other, sequences in sequences opened, with their places."""
    _require_plain(module, name)
    if type(module) is not nn.Sequential:
        yield Step(module, name, path)
        return
    # By its dictionary: named_children leaves out a module that stands there twice.
    for place, (key, step) in enumerate(module._modules.items()):
        assert step is not None
        yield from _steps(step, f"{name}[{place}]", f"{path}{key}.")


def _require_plain(module: nn.Module, name: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"{name} must have no hooks: nothing would call them")
    if "forward" in vars(module):
        raise ValueError(f"{name} must have the forward of its class: nothing would call its own")


def _traced(tower: nn.Module, name: str) -> Iterator[Step]:
    """The modules that the forward of somebody's class runs one after the other, as torch.fx sees it in both modes."""
    for path, module in tower.named_modules():
        _require_plain(module, f"{name}.{path}" if path else name)
    try:
        # Tracing calls the forward, which may keep what it sees or count in a buffer: that is the copy's.
        traced = copy.deepcopy(tower, {id(parameter): parameter for parameter in tower.parameters()})
        chains = [_chain(traced.train(mode)) for mode in (True, False)]
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise TypeError(
            f"{name} must be an nn.Sequential of nn.Linear and activations, or run modules one after the other, got "
            f"{type(tower).__name__}: {reason}"
        ) from error
    if chains[0] != chains[1]:
        raise TypeError(f"{name} must run the same modules in training and evaluation, {type(tower).__name__} does not")
    for path in chains[0]:
        yield from _steps(tower.get_submodule(path), f"{name}.{path}", f"{path}.")


def _chain(tower: nn.Module) -> list[str]:
    """Paths of the modules that a forward runs, each on what the one before it gave; ValueError for anything else."""
    graph = fx.Tracer().trace(tower)
    last, *others = graph.nodes
    paths = []
    for node in others:
        if node.args != (last,) or node.kwargs or node.op not in ("call_module", "output"):
            raise ValueError(f"its forward does something else at {node.format_node() or node.name}")
        if node.op == "call_module":
            paths.append(str(node.target))
        last = node
    return paths


def _check_alike(towers: Sequence[Tower]) -> None:
    if not towers:
        raise ValueError("towers must hold at least one tower, got none")
    first = towers[0]
    tensors: list[int] = []
    for tower in towers:
        if tower.widths != first.widths:
            raise ValueError(
                f"towers must be alike, but {first.name} has widths {first.widths} and {tower.name} {tower.widths}"
            )
        if len(tower.steps) != len(first.steps):
            raise ValueError(
                f"towers must be alike, but {first.name} has {len(first.steps)} modules and {tower.name} "
                f"{len(tower.steps)}"
            )
        for step, like in zip(tower.steps, first.steps, strict=True):
            if (found := _description(step.module)) != (expected := _description(like.module)):
                raise ValueError(f"towers must be alike, but {like.place} is {expected} and {step.place} is {found}")
            if step.module.training != like.module.training:
                raise ValueError(f"towers must be in one mode, but {step.place} is not in that of {like.place}")
            if _trained(step.module) != _trained(like.module):
                raise ValueError(f"towers must be frozen alike, but {step.place} is not as {like.place}")
            tensors += [id(tensor) for tensor in step.module.state_dict(keep_vars=True).values()]
        kinds = {
            (p.dtype, p.device) for each in (first, tower) for step in each.steps for p in step.module.parameters()
        }
        if len(kinds) > 1:
            raise ValueError(f"towers must share one dtype and device, but {tower.name} has another one")
    if len(set(tensors)) < len(tensors):
        raise ValueError("towers must not share parameters: copies of them would part")


def _description(module: nn.Module) -> str:
    """Class and options, apart from whether an activation writes over its input."""
    return repr(as_new(module)) if is_activation(module) else repr(module)


def as_new(activation: nn.Module) -> nn.Module:
    """The same activation; it does not write over its input, which an autograd function may need."""
    new = copy.deepcopy(activation)
    if hasattr(new, "inplace"):
        vars(new)["inplace"] = False
    return new


def _trained(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters()]


def state_of(entries: Iterable[Entry], towers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a layer from those of towers."""
    return {entry.name: entry.stacked(state[entry.path] for state in towers) for entry in entries}


def freeze_as(layer: nn.Module, entries: Iterable[Entry], tower: nn.Module) -> None:
    """What is frozen in a tower is in the layer."""
    own, parameters = dict(layer.named_parameters()), dict(tower.named_parameters())
    for entry in entries:
        if entry.path in parameters:
            own[entry.name].requires_grad_(parameters[entry.path].requires_grad)


def one_activation(tower: Tower) -> tuple[str, str]:
    """The kernels' activation after every linear layer of a tower but the last, and that after the last.

    Raises:
        ValueError: one call of the kernels does not compute it, with what stands in the way.
    """
    between: list[str] = []
    for step in tower.steps:
        kind = activations.name_of(step.module)
        if type(step.module) is nn.Linear:
            between.append("identity")
        elif type(step.module) is nn.Dropout:
            raise ValueError(f"{step.place} is dropout with p = {step.module.p}: only p = 0 is the same function")
        elif kind is None:
            raise ValueError(f"{step.place} is {step.module}, which the kernels do not compute")
        elif not between or between[-1] != "identity":
            raise ValueError(f"{step.place} must follow an nn.Linear, it is the activation {kind}")
        else:
            between[-1] = kind
    if len(set(between[:-1])) > 1:
        raise ValueError(f"{tower.name} must have one activation after every layer but the last, got {between[:-1]}")
    if len({linear.bias is None for linear in tower.linears}) > 1:
        raise ValueError(f"{tower.name} must have a bias in all of its linear layers or in none")
    return between[0], between[-1]


def linear_entries(tower: Tower) -> list[Entry]:
    """Of a :class:`saml_kernels.layers.GroupedMLP` that is the tower's linear layers."""
    linears = [step for step in tower.steps if isinstance(step.module, nn.Linear)]
    return [
        entry
        for layer, step in enumerate(linears)
        for entry in (
            Entry(f"weights.{layer}", f"{step.path}weight", is_transposed=True),
            *([] if step.module.bias is None else [Entry(f"biases.{layer}", f"{step.path}bias")]),
        )
    ]
