"""Every hyperparameter of the models, once: the annotation of the parameter that takes it, and its command-line option.

A model's signature says which ones it takes and their defaults (:func:`saml_rec.models.registry.hyperparameters`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import click

MOST = 2**40
"""Of everything that is counted: beyond it a number is a slip of the keyboard, and sums of several leave 64 bits."""
MOST_SEED = 2**64 - 1
MOST_LEAVES = 131072
"""LightGBM's own bound."""


class Whole(click.IntRange):
    """An integer of at least ``smallest``, and no more than a computation can count to.

    Args:
        smallest: by what is refused, and what help says.
        most: what is refused silently.
    """

    def __init__(self, smallest: int | None = None, most: int = MOST) -> None:
        super().__init__(smallest)
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if found > self.most:
            self.fail(f"{value!r} is above {self.most}.", param, ctx)
        return found


class Finite(click.FloatRange):
    """A number in a range that is neither infinite nor NaN, which no range refuses."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not finite.", param, ctx)
        return found


class IntegerList(click.ParamType):
    """Positive integers separated by commas, as a tuple; ``none`` is the empty one."""

    name = "integers"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [] if value == "none" else value.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"{value!r} is neither none nor a list of positive integers such as 64,32.", param, ctx)
        return tuple(Whole(1).convert(part.strip(), param, ctx) for part in parts)


class NumberList(click.ParamType):
    """Positive numbers separated by commas, as a tuple."""

    name = "numbers"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "X,X,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        positive = click.FloatRange(0, min_open=True)
        return tuple(positive.convert(part.strip(), param, ctx) for part in value.split(","))


class NameList(click.ParamType):
    """Names separated by commas, as a tuple; ``none`` is the empty one."""

    name = "names"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NAME,NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return () if value == "none" else tuple(part.strip() for part in value.split(","))


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
NumExperts = Annotated[int, Hyperparameter("num_experts", Whole(1), "Experts of the mixture.")]
ScenarioDim = Annotated[
    int,
    Hyperparameter(
        "scenario_dim",
        Whole(0),
        "Width of the scenario's embedding, where one is read; of saml alone 0: it reads none.",
    ),
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
ForeignType = Annotated[
    str,
    Hyperparameter(
        "foreign_type",
        click.Choice(["full", "bfloat16", "int8"]),
        "What inputs and weights of the other scenarios' branches are rounded to, which are constants to a row.",
    ),
]
AuxLossWeight = Annotated[
    float, Hyperparameter("aux_loss_weight", click.FloatRange(min=0), "Weight of the auxiliary loss.")
]
Dropout = Annotated[
    float,
    Hyperparameter("dropout", click.FloatRange(0, 1, max_open=True), "Share of the features dropped in training."),
]
IdDropout = Annotated[
    float,
    Hyperparameter(
        "id_dropout",
        click.FloatRange(0, 1, max_open=True),
        "Share of the ids that become the unknown one in training, so that unknown ids are trained.",
    ),
]
LocalFeatures = Annotated[
    bool,
    Hyperparameter("local_features", click.BOOL, "Whether features flagged scenario_aware get tables per scenario."),
]
BranchViews = Annotated[
    str,
    Hyperparameter(
        "branch_views",
        click.Choice(["own", "each"]),
        "Whose tables a foreign branch reads: the row's own scenario's, or each its own.",
    ),
]
BranchInit = Annotated[
    str,
    Hyperparameter(
        "branch_init",
        click.Choice(["independent", "shared"]),
        "Whether the scenarios' branches, heads and tables start from numbers of their own or all alike.",
    ),
]
PriorFeatures = Annotated[
    Sequence[str],
    Hyperparameter("prior_features", NameList(), "Features that the gates read, e.g. user_id,item_id; none for all."),
]
GateDim = Annotated[int, Hyperparameter("gate_dim", Whole(1), "Width of the gates' hidden layer.")]
OwnExperts = Annotated[int, Hyperparameter("own_experts", Whole(1), "Experts of each scenario, at each level.")]
SharedExperts = Annotated[int, Hyperparameter("shared_experts", Whole(1), "Experts of all scenarios, at each level.")]
InversePenalties = Annotated[
    Sequence[float],
    Hyperparameter(
        "inverse_penalties",
        NumberList(),
        "Inverse strengths of the penalty to try, e.g. 0.1,1; the best one on the validation rows is kept.",
    ),
]
NumTrees = Annotated[int, Hyperparameter("num_trees", Whole(1, 2**31 - 1), "Trees at most.")]
NumLeaves = Annotated[int, Hyperparameter("num_leaves", Whole(2, MOST_LEAVES), "Leaves of a tree at most.")]
TreeRate = Annotated[
    float,
    Hyperparameter("tree_rate", Finite(0, min_open=True), "Learning rate of boosting: shrinkage of a tree."),
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
