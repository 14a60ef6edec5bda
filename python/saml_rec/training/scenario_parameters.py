"""Which parameters belong to single scenarios: those that OF_SCENARIOS names, but for shared parts.

Their learning rate is a share of the others', `TrainOptions.scenario_rate`. A step has B/M rows of a scenario where
shared parameters have B, and Adam makes its step as long for few rows as for many: what few rows say by chance is
learnt as fast as what all of them say. Adam's learning rate follows the root of the rows of a step (Malladi, Lyu,
Panigrahi and Arora, On the SDEs and scaling rules for adaptive gradient algorithms, NeurIPS 2022), which makes it
1/√M here. Where scenarios have to learn all of theirs, as towers behind gates do, that only delays them: each model
says what it is given (`ScenarioModel.has_slow_scenarios`), by benchmarks/scenario_rate.py.
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
    """1/√M for a model that has slow scenarios, 1 for others."""
    return 1 / math.sqrt(num_scenarios) if getattr(model, "has_slow_scenarios", False) else 1.0


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
