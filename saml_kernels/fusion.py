"""Per-scenario tower lists in somebody's model, replaced by one fused layer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saml_kernels.activations import ACTIVATIONS
from saml_kernels.layers.grouped_mlp import GroupedMLP


class FusedTowers(nn.Module):
    """Towers of a list as one :class:`saml_kernels.layers.GroupedMLP`; still behaves as the list.

    ``towers(x, scenario)`` runs every row through the tower of its scenario, in one fused call: this is what is fast.
    ``towers[k](x)``, ``len(towers)`` and iteration do what the list did, tower by tower, on the same parameters: a
    forward that was written for the list goes on working.
    """

    def __init__(self, towers: GroupedMLP) -> None:
        super().__init__()
        self.fused = towers

    def forward(self, x: Tensor, scenario: Tensor) -> Tensor:
        """x (B, d_0), scenario (B,) → (B, d_L)."""
        output: Tensor = self.fused(x, scenario)
        return output

    if TYPE_CHECKING:
        __call__ = forward

    def __len__(self) -> int:
        return self.fused.num_scenarios

    def __getitem__(self, index: int) -> "TowerOf":
        if not -len(self) <= index < len(self):
            raise IndexError(f"tower {index} of {len(self)}")
        return TowerOf(self.fused, index % len(self))

    def __iter__(self) -> Iterator["TowerOf"]:
        return (self[k] for k in range(len(self)))


class TowerOf:
    """Tower k of fused ones, as a function of all rows."""

    def __init__(self, fused: GroupedMLP, index: int) -> None:
        self._fused = fused
        self._index = index

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., d_0) → (..., d_L)."""
        fused = self._fused
        last = fused.activation if fused.output_activation is None else fused.output_activation
        names = [fused.activation] * (len(fused.hidden_dims) - 1) + [last]
        for weight, bias, name in zip(fused.weights, fused.biases, names, strict=True):
            x = ACTIVATIONS[name].function(F.linear(x, weight[self._index].t(), bias[self._index]))
        return x


def fuse(model: nn.Module, names: Iterable[str] | None = None, backend: str = "auto") -> tuple[str, ...]:
    """Replaces lists of towers inside ``model``, in place, by :class:`FusedTowers` with the same parameters' values.

    Call it before the optimizer takes the parameters. The model's outputs and gradients stay the same; it becomes
    faster where its forward calls ``self.towers(x, scenario)`` in place of a loop over the list.

    Args:
        model: any module.
        names: of the nn.ModuleList in it, as ``named_modules`` gives them; None: every one with at least two towers
            that are alike and that :meth:`saml_kernels.layers.GroupedMLP.from_towers` can read.
        backend: as :class:`saml_kernels.layers.GroupedMLP`.

    Returns:
        The names of the lists that were replaced.

    Raises:
        ValueError: a name that is no nn.ModuleList of the model; no list that can be replaced; towers that cannot, or
            whose parameters the model also uses elsewhere.
        TypeError: named towers that the kernels cannot compute.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    replacements: dict[str, FusedTowers] = {}
    if names is not None:
        for name in names:
            if name not in lists:
                raise ValueError(
                    f"names must be of nn.ModuleList in the model ({', '.join(lists) or 'none'}), got {name!r}"
                )
            _require_unshared(model, name)
            replacements[name] = FusedTowers(GroupedMLP.from_towers(lists[name], backend))
    else:
        reasons = []
        for name, towers in lists.items():
            try:
                if len(towers) < 2:
                    raise ValueError("fewer than two towers")
                _require_unshared(model, name)
                replacements[name] = FusedTowers(GroupedMLP.from_towers(towers, backend))
            except (TypeError, ValueError) as error:
                reasons.append(f"{name}: {error}")
        if not replacements:
            raise ValueError("the model has no list of towers to fuse" + "".join(f"; {reason}" for reason in reasons))
    if "" in replacements:
        raise ValueError("the model itself is the list: use GroupedMLP.from_towers")
    for name, replacement in replacements.items():
        parent, _, child = name.rpartition(".")
        replacement.train(lists[name].training)
        setattr(model.get_submodule(parent), child, replacement)
    return tuple(replacements)


def _require_unshared(model: nn.Module, name: str) -> None:
    """ValueError if a parameter of the list ``name`` is also one of the model by another name."""
    inside: set[int] = set()
    outside: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if path.startswith(f"{name}.") or not name:
            inside.add(id(parameter))
        else:
            outside[id(parameter)] = path
    if shared := [outside[key] for key in inside if key in outside]:
        raise ValueError(f"its parameters are also {', '.join(sorted(shared))}: copies of them would part")


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
        if scenario.dim() == 2 and scenario.shape[1] == 1:
            scenario = scenario.squeeze(1)
        if scenario.dim() != 1:
            raise ValueError(f"{self.indicator} must have shape (B,) or (B, 1), got {tuple(scenario.shape)}")
        if scenario.is_floating_point():
            if not bool((scenario == scenario.round()).all()):
                raise ValueError(f"{self.indicator} must hold whole numbers")
            scenario = scenario.long()
        output: Tensor = self.layer(batch[self.feature], scenario.to(torch.int64))
        return output

    if TYPE_CHECKING:
        __call__ = forward
