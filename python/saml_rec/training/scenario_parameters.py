"""Which parameters belong to single scenarios: those that OF_SCENARIOS names, but for shared parts.

Two options say how far scenarios may go their own way. Their learning rate is a share of the others',
`TrainOptions.scenario_rate`. A step has B/M rows of a scenario where shared parameters have B, and Adam makes its step
as long for few rows as for many: what few rows say by chance is learnt as fast as what all of them say. Adam's
learning rate follows the root of the rows of a step (Malladi, Lyu, Panigrahi and Arora, On the SDEs and scaling rules
for adaptive gradient algorithms, NeurIPS 2022), which makes it 1/√M here. Where scenarios have to learn all of theirs,
as towers behind gates do, that only delays them: each model says what it is given (`ScenarioModel.has_slow_scenarios`),
by benchmarks/scenario_rate.py.

The decay of what sets them apart, `TrainOptions.scenario_decay`, pulls them together: after every step

    W_k ← W_k − lr · scenario_decay · (W_k − mean over scenarios j of W_j)

It is weight decay, decoupled as AdamW's, towards the mean over scenarios in place of 0: of what few rows say by chance
nothing stays that is not said again and again, and scenarios without rows follow the others. In the terms of
statistics it is partial pooling, a prior that scenarios are alike (Gelman and Hill, Data Analysis Using Regression and
Multilevel/Hierarchical Models, 2007). Biases have none, as of weight decay: how likely a scenario's labels are is what
its rows say first. `ScenarioModel.scenario_decay` is each model's default, by
benchmarks/scenario_decay.py.
"""

import math

from torch import Tensor, nn

from saml_kernels.layers import STARMLP, GroupedMLP, MultiBranchMLP, MutualUnit, PartitionedNorm
from saml_rec.training.decay import BIASES, owner_of

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


def default_decay(model: nn.Module, learning_rate: float) -> float:
    """The model's own, but where a learning rate is higher no more than a tenth of the distance in a step."""
    return min(getattr(model, "scenario_decay", 0.0), 0.1 / learning_rate)


def pull_together(parameter: Tensor, num_scenarios: int, share: float) -> None:
    """Moves every scenario's part of a parameter a share of the way to the mean over the scenarios, in place.

    Args:
        parameter: (M, ...), or (M E, ...) where each scenario has E experts, one scenario's after another's: expert e
            goes towards the mean of the experts e.
        num_scenarios: M.
        share: from 0, nothing, to 1, all alike.
    """
    by_scenario = parameter.detach().unflatten(0, (num_scenarios, -1))
    by_scenario.lerp_(by_scenario.mean(0, keepdim=True), share)


def of_scenarios(model: nn.Module) -> list[str]:
    """Names of the parameters of a model that belong to single scenarios, as ``named_parameters`` has them."""
    layers = dict(model.named_modules())
    return [name for name, _ in model.named_parameters() if _belongs_to_scenarios(layers, name)]


def decaying(model: nn.Module) -> list[str]:
    """Those of :func:`of_scenarios` that the decay is for: all but biases."""
    layers = dict(model.named_modules())
    return [name for name in of_scenarios(model) if not owner_of(layers, name)[1].endswith(BIASES)]


def _belongs_to_scenarios(layers: dict[str, nn.Module], name: str) -> bool:
    layer, own = owner_of(layers, name)
    if own not in OF_SCENARIOS.get(type(layer), ()) or any(part.startswith(SHARED) for part in name.split(".")):
        return False
    # One gate for all rows is a tower of one scenario.
    return not isinstance(layer, GroupedMLP) or layer.num_scenarios > 1
