"""Which parameters belong to single scenarios: those that OF_SCENARIOS names, but for shared parts.

In a model whose scenarios start as one network, and depart from it as far as their rows say, their learning rate is a
share of the others', 1/√M by default. A step has B/M rows of a scenario where shared parameters have B, and Adam makes
its step as long for few rows as for many: what few rows say by chance is learnt as fast as what all of them say. Adam's
learning rate follows the root of the rows of a step (Malladi, Lyu, Panigrahi and Arora, On the SDEs and scaling rules
for adaptive gradient algorithms, NeurIPS 2022). Where scenarios have to learn all of theirs from nothing, as towers and
gates do, they would only learn it later.
"""

import math

from torch import nn

from saml_kernels.layers import STARMLP, GroupedMLP, MultiBranchMLP, MutualUnit, PartitionedNorm
from saml_rec.training.decay import owner_of

OF_SCENARIOS: dict[type[nn.Module], tuple[str, ...]] = {
    MultiBranchMLP: ("branch_weights", "branch_biases", "gate_weights", "gate_biases"),
    MutualUnit: ("gate_weight", "gate_bias"),
    GroupedMLP: ("weights", "biases"),
    STARMLP: ("weights", "biases"),
    PartitionedNorm: ("weight", "bias"),
}
"""By the layer that holds them, the names there of parameters, or of their lists."""

SHARED = "shared"
"""How layers begin the names of their parts that all scenarios use, such as PLE's shared experts."""


def default_rate(model: nn.Module, num_scenarios: int) -> float:
    """1/√M for a model whose scenarios start alike, 1 for others."""
    return 1 / math.sqrt(num_scenarios) if getattr(model, "scenarios_start_alike", False) else 1.0


def of_scenarios(model: nn.Module) -> list[str]:
    """Names of the parameters of a model that belong to single scenarios, as ``named_parameters`` has them."""
    layers = dict(model.named_modules())
    return [name for name, _ in model.named_parameters() if _belongs_to_scenarios(layers, name)]


def _belongs_to_scenarios(layers: dict[str, nn.Module], name: str) -> bool:
    layer, own = owner_of(layers, name)
    if own not in OF_SCENARIOS.get(type(layer), ()) or any(part.startswith(SHARED) for part in name.split(".")):
        return False
    # One gate for all rows is a tower of one scenario.
    return not isinstance(layer, GroupedMLP) or layer.num_scenarios > 1
