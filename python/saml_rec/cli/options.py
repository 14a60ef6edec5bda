"""Types of options, and options that several commands have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from saml_rec.errors import InputError
from saml_rec.models.hyperparameters import BACKENDS, HYPERPARAMETERS, Whole

FILE = click.Path(path_type=Path)

# What else may differ between the models of a comparison, by the option's name in train.
TRAINING_CHANGES: dict[str, tuple[str, click.ParamType]] = {
    "lr": ("learning_rate", click.FLOAT),
    "weight_decay": ("weight_decay", click.FLOAT),
    "scenario_rate": ("scenario_rate", click.FLOAT),
    "scenario_decay": ("scenario_decay", click.FLOAT),
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
            kind = HYPERPARAMETERS[keyword].type
        else:
            known = ", ".join(name.replace("_", "-") for name in (*TRAINING_CHANGES, *HYPERPARAMETERS))
            self.fail(f"{value!r}: there is no option {option!r} (options: {known}).", param, ctx)
        return model, keyword, kind.convert(text.strip(), param, ctx)


class TableRate(click.ParamType):
    """X or FEATURE=X, as (feature or None, X)."""

    name = "rate"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "[FEATURE=]X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str | None, float]:
        if isinstance(value, tuple):
            return value
        feature, equals, text = value.rpartition("=")
        if equals and not feature:
            self.fail(f"{value!r} is not of the form FEATURE=X, such as item_id=0.01.", param, ctx)
        return feature or None, click.FLOAT.convert(text, param, ctx)


TableRates = tuple[tuple[str | None, float], ...]


def table_rates(given: TableRates) -> dict[str, Any]:
    """What ``--table-lr`` says, as training options."""
    rates = dict(given)
    return {"table_learning_rate": rates.pop(None, None), "table_learning_rates": rates}


Command = Callable[..., Any]


def warn(line: str) -> None:
    """Logs what does not end the command, and says it on stderr."""
    from saml_rec.console import LOGGER

    LOGGER.warning("%s", line)
    click.echo(f"warning: {line}", err=True)


def data_option(text: str, *, required: bool = True) -> Callable[[Command], Command]:
    """A table, in one file or several."""
    where = "A file, a folder or a quoted pattern; may be repeated."
    return click.option(
        "--data", type=FILE, multiple=True, required=required, callback=_openable, help=f"{text} {where}"
    )


def _openable(ctx: click.Context, param: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """The paths, unless one of their files would block, never end or be no name to what reads tables."""
    if not paths or ctx.resilient_parsing:
        return paths
    from saml_rec.data.sources import table_files
    from saml_rec.files import require_regular, require_text_name

    try:
        files = table_files(paths)
    except InputError:
        # The command says so when its options are known to be right.
        return paths
    for file in files:
        require_regular(file)
        require_text_name(file)
    return paths


def cache_option(command: Command) -> Command:
    text = "Directory for encoded data of more than a million rows; default: SAML_REC_CACHE, or the user's cache."
    return click.option("--cache", type=FILE, callback=_nameable, help=text)(command)


def _nameable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """The path, unless it is no name to what reads tables."""
    if path is not None:
        from saml_rec.files import require_text_name

        require_text_name(path)
    return path


class Separator(click.ParamType):
    """One character, or its name."""

    name = "separator"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "CHARACTER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}.get(value, value)


def csv_options(command: Command) -> Command:
    """How CSV files are written."""
    separator = click.option(
        "--separator",
        type=Separator(),
        help="What separates the fields of CSV files: a character, or tab. Unless given it is found in each file: "
        "comma, semicolon, tab or bar.",
    )
    decimal = click.option(
        "--decimal",
        type=click.Choice((".", ",")),
        help="What separates the fraction of a number in CSV files. Unless given it is found in each file.",
    )
    return separator(decimal(command))


def hyperparameter_options(command: Command) -> Command:
    """One option for every hyperparameter, None unless given."""
    for each in reversed(HYPERPARAMETERS.values()):
        command = click.option(f"--{each.name.replace('_', '-')}", each.name, type=each.type, help=each.text)(command)
    return command


def budget_options(command: Command) -> Command:
    """How a model is trained, the same in every command that trains, without what tuning looks for."""
    for option in reversed(
        (
            click.option(
                "--epochs", type=Whole(1), default=30, show_default=True, help="Passes over the data at most."
            ),
            click.option("--batch-size", type=Whole(1), default=1024, show_default=True, help="Rows a step."),
            click.option(
                "--tables",
                type=click.Choice(("auto", "dense", "sparse", "fbgemm", "torchrec")),
                default="auto",
                show_default=True,
                help="How embedding tables are kept; auto: dense up to 100,000 rows in all, above so that a step costs "
                "what its batch reads.",
            ),
            click.option(
                "--table-optimizer",
                type=click.Choice(("rowwise_adagrad", "adam")),
                default="rowwise_adagrad",
                show_default=True,
                help="Of tables that are not dense; adam only with sparse ones.",
            ),
            click.option(
                "--table-lr",
                type=TableRate(),
                multiple=True,
                help="Its learning rate, or FEATURE=X for the table of one feature; may be repeated. 0.02 for "
                "rowwise_adagrad, 0.001 for adam unless given.",
            ),
        )
    ):
        command = option(command)
    return command


def optimizer_options(command: Command) -> Command:
    """How a model is trained, the same in every command that trains with options as given."""
    rate = click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of AdamW.")
    decay = click.option("--weight-decay", type=float, default=1.0, show_default=True, help="Weight decay of AdamW.")
    together = click.option(
        "--scenario-decay",
        type=click.FloatRange(0),
        help="Decay of what sets the parameters of single scenarios apart from their mean over scenarios; at most "
        "1 / --lr. Unless given 100 for saml and pepnet, at most 0.1 / --lr, and 0 for other models.",
    )
    of_scenarios = click.option(
        "--scenario-rate",
        type=click.FloatRange(0),
        help="Learning rate of the parameters of single scenarios as a share of --lr. Unless given 1/√M for saml, M "
        "scenarios, and 1 for other models.",
    )
    return rate(of_scenarios(together(decay(budget_options(command)))))


def patience_option(command: Command) -> Command:
    text = "Stop after this many epochs without a better validation log loss; 0 never stops early."
    return click.option("--patience", type=Whole(0), default=3, show_default=True, help=text)(command)


def device_option(command: Command) -> Command:
    text = "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."
    return click.option("--device", default="auto", show_default=True, help=text)(command)


def backend_option(command: Command) -> Command:
    return click.option("--backend", type=BACKENDS, help="What runs the kernels; as in training unless given.")(command)
