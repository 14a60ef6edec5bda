"""What a search may try: a range for every option worth it, of which a model gets those that its signature has.

TRAINING     how a network is trained; a model that is fitted as a whole has none of it
MODEL        hyperparameters, by the name that models give them

A hyperparameter whose default is None follows another one and is not searched. Every default is in its range: the first
trial is the model as it is without tuning.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from saml_rec.models.fitted import FittedModel
from saml_rec.models.hyperparameters import HYPERPARAMETERS
from saml_rec.models.registry import MODELS, hyperparameters
from saml_rec.training import TrainOptions

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Numbers:
    """From ``low`` to ``high``.

    Args:
        low, high: both included.
        log: drawn by their logarithms.
        whole: integers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def including(self, default: Any) -> "Numbers":
        """Widened, where the default is outside."""
        return Numbers(min(self.low, default), max(self.high, default), self.log, self.whole)

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def to_parameter(self, value: Any) -> Any:
        """As Optuna has it."""
        return value

    def to_option(self, name: str, parameter: Any) -> Any:
        """As a model takes it."""
        return parameter

    def to_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": self.log}

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """Values as a command line has them.

    Args:
        values: none for all that the option has.
    """

    values: tuple[str, ...] = ()

    def including(self, default: Any) -> "Choices":
        """With the default, if it is not among them."""
        return Choices(tuple(dict.fromkeys((*self.values, text(default)))))

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def to_parameter(self, value: Any) -> Any:
        """As Optuna has it."""
        return text(value)

    def to_option(self, name: str, parameter: Any) -> Any:
        """As a model takes it; a training option, which is a number or None."""
        if name in TRAINING:
            return None if parameter == text(None) else float(parameter)
        return HYPERPARAMETERS[name].type.convert(parameter, None, None)

    def to_dict(self) -> dict[str, Any]:
        return {"choices": list(self.values)}

    def __str__(self) -> str:
        return " ".join(self.values)


Range = Numbers | Choices

TRAINING: dict[str, Range] = {
    "learning_rate": Numbers(1e-4, 1e-2, log=True),
    "weight_decay": Numbers(1e-3, 10.0, log=True),
    # None, the model's own, depends on the number of scenarios and on the learning rate. 100 is the most that every
    # learning rate above allows.
    "scenario_rate": Choices(("default", "0.1", "0.3", "1")),
    "scenario_decay": Choices(("default", "0", "10", "100")),
}
OF_SCENARIOS = ("scenario_rate", "scenario_decay")
"""Those of TRAINING for networks that have parameters of single scenarios."""
MODEL: dict[str, Range] = {
    "hidden_dims": Choices(("32", "64", "128", "64,32", "128,64")),
    "aux_dims": Choices(("none", "16", "32")),
    "tower_dims": Choices(("none", "16", "32", "64")),
    "scenario_dim": Numbers(4, 32, log=True, whole=True),
    "num_experts": Numbers(2, 8, whole=True),
    "own_experts": Numbers(1, 4, whole=True),
    "shared_experts": Numbers(1, 4, whole=True),
    "gate_dim": Numbers(8, 64, log=True, whole=True),
    "mutual_layers": Choices(("none", "1")),
    "score": Choices(),
    "aux_loss_weight": Numbers(0.0, 2.0),
    "combine": Choices(),
    "branch_views": Choices(),
    "branch_init": Choices(),
    "local_features": Choices(),
    "dropout": Numbers(0.0, 0.5),
    "id_dropout": Numbers(0.0, 0.3),
    "num_leaves": Numbers(7, 127, log=True, whole=True),
    "tree_rate": Numbers(0.01, 0.3, log=True),
}


def defaults_of(model: str) -> dict[str, Any]:
    """What a model has without tuning, of what can be tuned: the first trial.

    Raises:
        InputError: there is no such model.
    """
    own = hyperparameters(model)
    found = {name: getattr(TrainOptions(), name) for name in training_of(model)}
    return found | {name: own[name] for name in MODEL if own.get(name) is not None}


def training_of(model: str) -> list[str]:
    """Those of TRAINING that mean something for a model."""
    kind = MODELS[model]
    if issubclass(kind, FittedModel):
        return []
    return [name for name in TRAINING if kind.has_scenario_parameters or name not in OF_SCENARIOS]


def space_of(model: str) -> dict[str, Range]:
    """Ranges of a model's options, defaults included.

    Raises:
        InputError: there is no such model.
    """
    own = hyperparameters(model)
    found = {name: TRAINING[name].including(getattr(TrainOptions(), name)) for name in training_of(model)}
    for name, each in MODEL.items():
        if own.get(name) is not None:
            found[name] = (_all_of(name) if each == Choices() else each).including(own[name])
    return found


def is_within(value: Any, range: Any) -> bool:
    """Whether a value lies in a range as the ``to_dict`` of either kind wrote it, both read from a file."""
    if not isinstance(range, dict):
        return False
    if "choices" in range:
        return isinstance(range["choices"], list) and text(value) in range["choices"]
    bounds = (range.get("low"), value, range.get("high"))
    if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in bounds):
        return False
    low, value, high = bounds
    return bool(low <= value <= high)


def text(value: Any) -> str:
    """A value as the command line takes it; "default" for what a model decides itself."""
    if value is None:
        return "default"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _all_of(name: str) -> Choices:
    kind = HYPERPARAMETERS[name].type
    return Choices(tuple(kind.choices)) if isinstance(kind, click.Choice) else Choices(("False", "True"))
