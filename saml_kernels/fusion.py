"""Per-scenario tower lists in somebody's model, replaced by one fused layer."""

import gc
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
from torch import Tensor, nn

from saml_kernels.layers.convert import Entry, Tower, linear_entries, one_activation, read_towers
from saml_kernels.layers.grouped_mlp import GroupedMLP
from saml_kernels.layers.grouped_sequential import GroupedSequential, sequential_entries

Fused = GroupedMLP | GroupedSequential


class FusedTowers(nn.Module):
    """Towers of a list as one layer; still behaves as the list.

    ``towers(x, scenario)`` runs every row through the tower of its scenario, in one fused call: this is what is fast.
    ``towers[k](x)``, slices, ``len(towers)`` and iteration do what the list did, tower by tower, on the same
    parameters: a forward that was written for the list goes on working. What would change the list is refused. A state
    dict of the list is loaded as one of its own is.

    Args:
        towers: the layer, ``.fused``.
        entries: which of its tensors are which of the towers', for state dicts of the list.
        keys: what the list called its towers in state dicts; 0, 1, 2, … unless given.
    """

    def __init__(self, towers: Fused, entries: Iterable[Entry] = (), keys: Iterable[str] | None = None) -> None:
        super().__init__()
        self.fused = towers
        self._entries = tuple(entries)
        self._keys = tuple(map(str, range(towers.num_scenarios)) if keys is None else keys)

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, d_0), scenario (B,) or (B, 1) → (B, d_L)."""
        output: Tensor = self.fused(x, scenario)
        return output

    if TYPE_CHECKING:
        __call__ = forward

    def __len__(self) -> int:
        return self.fused.num_scenarios

    @overload
    def __getitem__(self, index: int) -> "TowerOf": ...
    @overload
    def __getitem__(self, index: slice) -> "list[TowerOf]": ...
    def __getitem__(self, index: int | slice) -> "TowerOf | list[TowerOf]":
        if isinstance(index, slice):
            return [TowerOf(self.fused, k) for k in range(len(self))[index]]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"tower {index} of {len(self)}")
        return TowerOf(self.fused, index % len(self))

    def __iter__(self) -> Iterator["TowerOf"]:
        return (TowerOf(self.fused, k) for k in range(len(self)))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the towers of a fused list cannot be exchanged, added or removed: do so before fuse()")

    __setitem__ = __delitem__ = __add__ = __iadd__ = append = extend = insert = pop = _refuse

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for entry in self._entries:
            names = [f"{prefix}{key}.{entry.path}" for key in self._keys]
            if all(name in state_dict for name in names):
                state_dict[f"{prefix}fused.{entry.name}"] = entry.stacked([state_dict.pop(name) for name in names])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FusedTowerDict(FusedTowers):
    """Towers of an nn.ModuleDict as one layer: tower k is the one of the k-th key, and ``towers[key]`` as before."""

    def __getitem__(self, key: Any) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return TowerOf(self.fused, self._keys.index(key))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def keys(self) -> Sequence[str]:
        """In the order of the scenarios."""
        return self._keys

    def values(self) -> "list[TowerOf]":
        """Every tower, as a function of all rows."""
        return [TowerOf(self.fused, k) for k in range(len(self))]

    def items(self) -> "list[tuple[str, TowerOf]]":
        """Keys and towers."""
        return list(zip(self._keys, self.values(), strict=True))

    clear = update = FusedTowers._refuse


class TowerOf:
    """Tower k of fused ones, as a function of all rows."""

    def __init__(self, fused: Fused, index: int) -> None:
        self._fused = fused
        self._index = index

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., d_0) → (..., d_L)."""
        return self._fused.tower(self._index, x)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"a tower of a fused list is a function of rows, without {name!r}: its parameters are in the list's .fused"
        )

    def __getitem__(self, place: object) -> NoReturn:
        raise TypeError("a tower of a fused list is a function of rows, no sequence of modules")


def fuse(model: nn.Module, names: Iterable[str] | None = None, backend: str = "auto") -> tuple[str, ...]:
    """Replaces lists of towers inside ``model``, in place, by :class:`FusedTowers` with the same parameters' values.

    Call it before the optimizer takes the parameters. The model's outputs and gradients stay the same; it becomes
    faster where its forward calls ``self.towers(x, scenario)`` in place of a loop over the list. With that call a batch
    norm in training takes its statistics from the rows of its own scenario, and dropout draws other random numbers.

    Args:
        model: any module.
        names: of the nn.ModuleList and nn.ModuleDict in it, as ``named_modules`` gives them; None: every one with at
            least two towers that are alike and that :meth:`saml_kernels.layers.GroupedMLP.from_towers` or
            :meth:`saml_kernels.layers.GroupedSequential.from_towers` can read. Of a dict scenario k is the k-th key.
        backend: as :class:`saml_kernels.layers.GroupedMLP`.

    Returns:
        The names of the lists that were replaced.

    Raises:
        ValueError: a name that is no list of the model; no list that can be replaced; towers that cannot, or whose
            parameters the model also uses elsewhere; a dict with the keys 0, 1, 2, … in another order.
        TypeError: named towers that hold what no layer of this package computes.

    Warns:
        UserWarning: an optimizer holds parameters that are replaced: it would go on training those, not the new ones.
    """
    kinds = (nn.ModuleList, nn.ModuleDict)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    replacements: dict[str, FusedTowers] = {}
    if names is not None:
        for name in names:
            if name not in lists:
                raise ValueError(
                    f"names must be of nn.ModuleList or nn.ModuleDict in the model ({', '.join(lists) or 'none'}), got "
                    f"{name!r}"
                )
            replacements[name] = _fused(model, name, lists[name], backend)
    else:
        reasons = []
        for name, towers in lists.items():
            try:
                if len(towers) < 2:
                    raise ValueError("fewer than two towers")
                replacements[name] = _fused(model, name, towers, backend)
            except (TypeError, ValueError) as error:
                reasons.append(f"{name}: {error}")
        if not replacements:
            raise ValueError("the model has no list of towers to fuse" + "".join(f"; {reason}" for reason in reasons))
    if "" in replacements:
        raise ValueError("the model itself is the list: use GroupedMLP.from_towers")
    _warn_of_optimizers({name: lists[name] for name in replacements})
    for name, replacement in replacements.items():
        parent, _, child = name.rpartition(".")
        replacement.training = lists[name].training
        setattr(model.get_submodule(parent), child, replacement)
    return tuple(replacements)


def _fused(model: nn.Module, name: str, towers: nn.ModuleList | nn.ModuleDict, backend: str) -> FusedTowers:
    _require_unshared(model, name)
    keys = list(towers._modules)
    if sorted(keys) == sorted(map(str, range(len(keys)))) and keys != sorted(keys, key=int):
        raise ValueError(f"its keys {', '.join(keys)} are numbers in another order than those of the scenarios")
    modules = list(towers.children())
    if len(modules) < len(keys):
        raise ValueError("one module stands there twice: copies of it would part")
    first = read_towers(
        modules, [f"{name}[{key!r}]" if isinstance(towers, nn.ModuleDict) else f"towers[{key}]" for key in keys]
    )[0]
    layer: Fused
    if _is_one_call(first):
        layer, entries = GroupedMLP.from_towers(modules, backend), linear_entries(first)
    else:
        layer, entries = GroupedSequential.from_towers(modules, backend), sequential_entries(first)
    kind = FusedTowerDict if isinstance(towers, nn.ModuleDict) else FusedTowers
    return kind(layer, entries, keys)


def _is_one_call(tower: Tower) -> bool:
    try:
        one_activation(tower)
    except ValueError:
        return False
    return True


def _require_unshared(model: nn.Module, name: str) -> None:
    """ValueError if a parameter of the list ``name`` is also one of the model by another name."""
    inside: set[int] = set()
    outside: dict[int, str] = {}
    for path, parameter in model.state_dict(keep_vars=True).items():
        if path.startswith(f"{name}.") or not name:
            inside.add(id(parameter))
        else:
            outside[id(parameter)] = path
    if shared := [outside[key] for key in inside if key in outside]:
        raise ValueError(f"its parameters are also {', '.join(sorted(shared))}: copies of them would part")


def _warn_of_optimizers(replaced: Mapping[str, nn.Module]) -> None:
    """Looks at all optimizers that there are: none knows its model, and no model its optimizers."""
    names = {
        id(parameter): f"{name}.{path}"
        for name, towers in replaced.items()
        for path, parameter in towers.named_parameters()
    }
    # By type(): an object may answer isinstance with code of its own.
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer)]
    for optimizer in optimizers:
        groups = getattr(optimizer, "param_groups", [])
        held = [names[id(p)] for group in groups for p in group["params"] if id(p) in names]
        if held:
            warnings.warn(
                f"{type(optimizer).__name__} holds {len(held)} parameters that fuse() replaces, such as {held[0]}: it "
                "would not train the new ones; make it after fuse()",
                UserWarning,
                stacklevel=3,
            )


class DomainIndicatorAdapter(nn.Module):
    """A layer of this package for models whose forward hands a dict with the scenario under ``domain_indicator``.

    Args:
        layer: takes (x, scenario).
        feature: key of x (B, d) in the dict.
        indicator: key of the scenario, (B,) or (B, 1), integral.
    """

    def __init__(self, layer: nn.Module, feature: str = "x", indicator: str = "domain_indicator") -> None:
        super().__init__()
        self.layer = layer
        self.feature = feature
        self.indicator = indicator

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The layer's output. Raises KeyError for a missing key, ValueError for an indicator that is no id a row."""
        for key in (self.feature, self.indicator):
            if key not in batch:
                raise KeyError(f"the batch must hold {key!r}, it holds {', '.join(batch)}")
        scenario = batch[self.indicator]
        if scenario.shape != (len(scenario), 1) and scenario.dim() != 1:
            raise ValueError(f"{self.indicator} must have shape (B,) or (B, 1), got {tuple(scenario.shape)}")
        if scenario.is_floating_point():
            if not bool((scenario == scenario.round()).all()):
                raise ValueError(f"{self.indicator} must hold whole numbers")
            scenario = scenario.long()
        output: Tensor = self.layer(batch[self.feature], scenario)
        return output

    if TYPE_CHECKING:
        __call__ = forward
