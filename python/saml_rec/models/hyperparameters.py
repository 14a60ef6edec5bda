"""Every hyperparameter of the models, once: the annotation of the parameter that takes it, and its command-line option.

A model's signature says which ones it takes and their defaults (:func:`saml_rec.models.registry.hyperparameters`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import click


class IntegerList(click.ParamType):
    """Positive integers separated by commas, as a tuple; ``none`` is the empty one."""

    name = "integers"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [] if value == "none" else value.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is neither none nor a list of positive integers such as 64,32.", param, ctx)
        return tuple(int(part) for part in parts)


class ActivationName(click.ParamType):
    """A row of the kernels' table of activations, read when a name is given: help must not wait for torch."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from saml_kernels.activations import ACTIVATIONS

        return click.Choice(list(ACTIVATIONS)).convert(value, param, ctx)


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter is called, may be and does."""

    name: str
    """Of the models' parameter; the option's with dashes."""
    type: click.ParamType
    """What reads it on a command line, bounds and choices included."""
    text: str
    """Help of the option."""


HiddenDims = Annotated[
    Sequence[int], Hyperparameter("hidden_dims", IntegerList(), "Widths of the hidden layers, e.g. 64,32.")
]
AuxDims = Annotated[
    Sequence[int],
    Hyperparameter("aux_dims", IntegerList(), "Widths of the auxiliary network; as --hidden-dims unless given."),
]
NumExperts = Annotated[int, Hyperparameter("num_experts", click.IntRange(1), "Experts of the mixture.")]
ScenarioDim = Annotated[
    int,
    Hyperparameter("scenario_dim", click.IntRange(1), "Width of the scenario's embedding in the auxiliary network."),
]
TowerDims = Annotated[
    Sequence[int],
    Hyperparameter("tower_dims", IntegerList(), "Widths of each scenario's tower; none for one linear layer."),
]
MutualLayers = Annotated[
    Sequence[int],
    Hyperparameter(
        "mutual_layers", IntegerList(), "Layers followed by a mutual unit, counted from 1; none for no layer."
    ),
]
Combine = Annotated[
    str,
    Hyperparameter(
        "combine",
        click.Choice(["product", "sum"]),
        "How partitioned normalisation joins shared and scenario's scale.",
    ),
]
Gate = Annotated[str, Hyperparameter("gate", click.Choice(["vector", "scalar"]), "Gate of the mutual unit.")]
Score = Annotated[
    str,
    Hyperparameter("score", click.Choice(["ratio", "softmax"]), "How the mutual unit weighs the other scenarios."),
]
Temperature = Annotated[
    float,
    Hyperparameter("temperature", click.FloatRange(min=0, min_open=True), "Temperature of --score softmax."),
]
Activation = Annotated[
    str,
    Hyperparameter(
        "activation", ActivationName(), "Activation of the hidden layers, such as relu; a wrong name lists all."
    ),
]
StopGradient = Annotated[
    bool,
    Hyperparameter(
        "stop_gradient",
        click.BOOL,
        "Whether a branch is trained by its own scenario's rows only; false is an ablation.",
    ),
]
AuxLossWeight = Annotated[
    float, Hyperparameter("aux_loss_weight", click.FloatRange(min=0), "Weight of the auxiliary loss.")
]
Dropout = Annotated[
    float,
    Hyperparameter("dropout", click.FloatRange(0, 1, max_open=True), "Share of the features dropped in training."),
]
BACKENDS = click.Choice(["auto", "reference", "cpp", "triton"])
Backend = Annotated[str, Hyperparameter("backend", BACKENDS, "What runs the kernels; auto takes the fastest one.")]

HYPERPARAMETERS: dict[str, Hyperparameter] = {
    described.name: described
    for alias in list(vars().values())
    for described in getattr(alias, "__metadata__", ())
    if isinstance(described, Hyperparameter)
}
"""By name, in the order of the command line."""
