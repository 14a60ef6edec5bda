"""Types of options, and options that several commands have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


FILE = click.Path(path_type=Path)
BACKENDS = click.Choice(["auto", "reference", "cpp", "triton"])

# Hyperparameters of models, by the keyword in the model's class. Which model takes which, and the defaults,
# stand in the classes.
HYPERPARAMETERS: dict[str, tuple[click.ParamType, str]] = {
    "hidden_dims": (IntegerList(), "Widths of the hidden layers, e.g. 64,32."),
    "aux_dims": (IntegerList(), "Widths of the auxiliary network; as --hidden-dims unless given."),
    "num_experts": (click.IntRange(1), "Experts of the mixture."),
    "scenario_dim": (click.IntRange(1), "Width of the scenario's embedding in the auxiliary network."),
    "tower_dims": (IntegerList(), "Widths of each scenario's tower; none for one linear layer."),
    "mutual_layers": (IntegerList(), "Layers followed by a mutual unit, counted from 1; none for no layer."),
    "combine": (click.Choice(["product", "sum"]), "How partitioned normalisation joins shared and scenario's scale."),
    "gate": (click.Choice(["vector", "scalar"]), "Gate of the mutual unit."),
    "score": (click.Choice(["ratio", "softmax"]), "How the mutual unit weighs the other scenarios."),
    "temperature": (click.FloatRange(min=0, min_open=True), "Temperature of --score softmax."),
    "activation": (
        click.Choice(["relu", "leaky_relu", "gelu", "silu", "tanh", "identity"]),
        "Activation of the hidden layers.",
    ),
    "stop_gradient": (click.BOOL, "Whether a branch is trained by its own scenario's rows only; false is an ablation."),
    "aux_loss_weight": (click.FloatRange(min=0), "Weight of the auxiliary loss."),
    "dropout": (click.FloatRange(0, 1, max_open=True), "Share of the features dropped in training."),
    "backend": (BACKENDS, "What runs the kernels; auto takes the fastest one."),
}

# What else may differ between the models of a comparison, by the option's name in train.
TRAINING_CHANGES: dict[str, tuple[str, click.ParamType]] = {
    "lr": ("learning_rate", click.FLOAT),
    "weight_decay": ("weight_decay", click.FLOAT),
}


class ModelOption(click.ParamType):
    """MODEL.OPTION=VALUE, as (model, keyword, value); the options of train that belong to a model, and two others."""

    name = "model option"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "MODEL.OPTION=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str, Any]:
        if isinstance(value, tuple):
            return value
        left, equals, text = value.partition("=")
        model, dot, option = left.strip().partition(".")
        if not (equals and dot):
            self.fail(f"{value!r} is not of the form MODEL.OPTION=VALUE, such as saml.dropout=0.1.", param, ctx)
        keyword = option.replace("-", "_")
        if keyword in TRAINING_CHANGES:
            keyword, kind = TRAINING_CHANGES[keyword]
        elif keyword in HYPERPARAMETERS:
            kind, _ = HYPERPARAMETERS[keyword]
        else:
            known = ", ".join(name.replace("_", "-") for name in (*TRAINING_CHANGES, *HYPERPARAMETERS))
            self.fail(f"{value!r}: there is no option {option!r} (options: {known}).", param, ctx)
        return model, keyword, kind.convert(text.strip(), param, ctx)


Command = Callable[..., Any]


def hyperparameter_options(command: Command) -> Command:
    """One option for every hyperparameter, None unless given."""
    for name, (kind, text) in reversed(HYPERPARAMETERS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(command)
    return command


def device_option(command: Command) -> Command:
    text = "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."
    return click.option("--device", default="auto", show_default=True, help=text)(command)


def backend_option(command: Command) -> Command:
    return click.option("--backend", type=BACKENDS, help="What runs the kernels; as in training unless given.")(command)
