"""The command saml-rec. Commands import what they need when they run, so that help appears at once.

What the user got wrong, and what the operating system refuses, ends in one line ``error: ...`` on stderr and
exit status 2; an interrupt ends in status 130.
"""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saml_rec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

INPUT_ERROR_STATUS = 2
INTERRUPT_STATUS = 130

FILE = click.Path(path_type=Path)


class Commands(click.Group):
    """Commands whose errors of input are one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # The reader of a pipe is gone; click ends quietly.
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPT_STATUS)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        ctx.exit(INPUT_ERROR_STATUS)


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


def print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import saml_kernels

        click.echo(f"saml-rec {saml_kernels.__version__}")
        ctx.exit()


def print_written(paths: Iterable[Path]) -> None:
    for path in paths:
        click.echo(f"wrote {path}")


def stdout() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """Train and use recommenders for several scenarios at once."""
    # Read by OpenMP when torch is loaded. By default threads spin while they wait for each other: on two cores that
    # another program used too, training took 25 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@main.command()
@click.option("--data", type=FILE, required=True, help="Table of labelled rows, CSV or Parquet.")
@click.option("--schema", type=FILE, required=True, help="TOML file: which column is what.")
@click.option("--out", type=FILE, required=True, help="Run directory; made if missing.")
@click.option(
    "--model", default="saml", show_default=True, help="Architecture: saml, star, hmoe, mmoe or shared_bottom."
)
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Passes over the data at most.")
@click.option("--batch-size", type=click.IntRange(1), default=1024, show_default=True, help="Rows a step.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--weight-decay", type=float, default=1e-5, show_default=True, help="Weight decay of AdamW.")
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Stop after this many epochs without a better validation log loss; 0 never stops early.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, shuffling and split.")
@device_option
@click.option("--resume", is_flag=True, help="Continue the run in --out; all other options as before.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out and start anew.")
@hyperparameter_options
@click.pass_context
def train(
    ctx: click.Context,
    data: Path,
    schema: Path,
    out: Path,
    model: str,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    patience: int,
    seed: int,
    device: str,
    resume: bool,
    overwrite: bool,
    **hyperparameters: Any,
) -> None:
    """Train a model and measure it on the test rows.

    Options whose default is not shown belong to the model and default to its own value.
    """
    from saml_rec import report, training
    from saml_rec.checkpoint import RunDirectory
    from saml_rec.construction import check_model, resolve_device
    from saml_rec.data.prepare import prepare
    from saml_rec.schema import load_schema

    run = RunDirectory(out)
    run.require_startable(resume=resume, overwrite=overwrite)
    options = training.TrainOptions(
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        weight_decay=weight_decay,
        patience=patience,
        seed=seed,
        device=device,
        model_options={name: value for name, value in hyperparameters.items() if value is not None},
    ).resolved()
    loaded_schema = load_schema(schema)
    check_model(model, options.model_options, loaded_schema, resolve_device(options.device))
    console = stdout()
    try:
        result = training.train(
            prepare(data, loaded_schema, seed=seed),
            loaded_schema,
            options,
            out,
            resume=resume,
            overwrite=overwrite,
            data_path=data,
            console=console,
        )
    except KeyboardInterrupt:
        advice = f"; to continue, repeat the command with --resume{' in place of --overwrite' if overwrite else ''}"
        click.echo(f"interrupted{advice if run.started else ''}", err=True)
        ctx.exit(INTERRUPT_STATUS)
    best = f"best epoch {result.metrics['best_epoch']} of {result.metrics['epochs']}"
    if result.already_finished:
        report.say(console, f"{out} is finished already ({best}): nothing to resume")
        return
    report.say(console, f"{model} on the test rows, {best}")
    console.print(report.metrics_table(result.metrics))
    report.say(console, f"wrote {run.metrics}, {run.history.name}, {run.model.name}")


@main.command()
@click.option("--data", type=FILE, required=True, help="Table of labelled rows, CSV or Parquet.")
@click.option("--schema", type=FILE, required=True, help="TOML file: which column is what.")
@click.option("--out", type=FILE, required=True, help="Directory; made if missing. Runs finished there are kept.")
@click.option("--models", default="saml,shared_bottom", show_default=True, help="Architectures, separated by commas.")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Runs of each model.")
@click.option("--split-seed", type=click.IntRange(0), default=0, show_default=True, help="Of a random split.")
@click.option("--epochs", type=click.IntRange(1), default=10, show_default=True, help="Passes over the data at most.")
@click.option("--batch-size", type=click.IntRange(1), default=1024, show_default=True, help="Rows a step.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--weight-decay", type=float, default=1e-5, show_default=True, help="Weight decay of AdamW.")
@click.option("--patience", type=click.IntRange(0), default=2, show_default=True, help="As in train.")
@click.option(
    "--set",
    "settings",
    type=ModelOption(),
    multiple=True,
    help="An option for one of the models only; may be repeated. E.g. saml.dropout=0.1, star.lr=0.002.",
)
@click.option("--reference-epoch", is_flag=True, help="Also time an epoch of each model on the reference backend.")
@device_option
def compare(
    data: Path,
    schema: Path,
    out: Path,
    models: str,
    seeds: int,
    split_seed: int,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    patience: int,
    settings: tuple[tuple[str, str, Any], ...],
    reference_epoch: bool,
    device: str,
) -> None:
    """Train several models with several seeds on one split, and write compare.json and report.html.

    Repeat the command after an interruption: finished runs are not trained again.
    """
    from saml_rec import comparison, report, training
    from saml_rec.construction import check_model, resolve_device
    from saml_rec.data.prepare import prepare
    from saml_rec.schema import load_schema

    names = [name.strip() for name in models.split(",") if name.strip()]
    comparison.check_models(names)
    comparison.check_directory(out)
    options = training.TrainOptions(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        weight_decay=weight_decay,
        patience=patience,
        device=device,
    )
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, keyword, value in settings:
        if name not in changes:
            raise InputError(f"--set {name}.{keyword.replace('_', '-')}: {name} is not among --models")
        changes[name][keyword] = value
    loaded_schema = load_schema(schema)
    own = {name: comparison.options_of(name, options, changes[name]).resolved() for name in names}
    for name in names:
        check_model(name, own[name].model_options, loaded_schema, resolve_device(device))
    console = stdout()
    prepared = prepare(data, loaded_schema, seed=split_seed)
    record = comparison.compare(
        prepared, loaded_schema, names, seeds, options, out, changes=changes, data_path=data, console=console
    )
    console.print(comparison.comparison_table(record))
    if reference_epoch:
        for name in names:
            timed = training.time_backends(prepared, loaded_schema, own[name])
            report.say(console, f"{name}, one epoch: {report.backend_seconds(timed)}")
    report.say(console, f"wrote {out / 'compare.json'}")
    report.say(console, f"report: {out / 'report.html'}")


@main.command()
@click.argument("run", type=FILE)
@click.option("--data", type=FILE, help="Table to measure on; the file the run was trained on unless given.")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    help="Rows that were this split in training. Default: test, or all rows of --data.",
)
@click.option("--out", type=FILE, help="A .json file, or a directory for metrics.json. Default: a file in RUN.")
@device_option
@backend_option
def evaluate(
    run: Path, data: Path | None, split: str | None, out: Path | None, device: str, backend: str | None
) -> None:
    """Measure the model of the finished run RUN."""
    from saml_rec import report, scoring
    from saml_rec.files import check_output_file, write_json

    if out is None:
        target = run / f"evaluation-{split or ('test' if data is None else data.name)}.json"
    else:
        target = out if out.suffix == ".json" else out / "metrics.json"
    if target.parent.exists():
        check_output_file(target)
    console = stdout()
    metrics = scoring.evaluate(run, data_path=data, split=split, device=device, backend=backend, console=console)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, metrics)
    rows = f"the {metrics['split']} rows" if metrics["split"] else f"all rows of {data}"
    report.say(console, f"{metrics['model']} on {rows}")
    console.print(report.metrics_table(metrics))
    report.say(console, f"wrote {target}")


@main.command()
@click.argument("run", type=FILE)
@click.option("--data", type=FILE, required=True, help="Table with the columns of the schema; no label needed.")
@click.option("--out", type=FILE, required=True, help="A .csv or .parquet file; replaced if it exists.")
@device_option
@backend_option
def predict(run: Path, data: Path, out: Path, device: str, backend: str | None) -> None:
    """Write a table as it is with a column prediction: the probability of label 1, by the model of RUN."""
    from saml_rec import report, scoring
    from saml_rec.data.readers import require_csv_columns
    from saml_rec.files import check_output_file, replacing

    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"{out}: the name must end in .csv or .parquet")
    check_output_file(out)
    if out.exists() and data.exists() and out.samefile(data):
        raise InputError(f"{out}: is the input file")
    if out.suffix == ".csv":
        require_csv_columns(data)
    console = stdout()
    frame = scoring.predict(run, data, device=device, backend=backend, console=console)
    with replacing(out) as file:
        if out.suffix == ".csv":
            frame.write_csv(file)
        else:
            frame.write_parquet(file)
    report.say(console, f"wrote {len(frame):,} rows to {out}")


@main.group()
def data() -> None:
    """Write a data set to try things on, with its schema."""


@data.command("ml-100k")
@click.option("--out", type=FILE, required=True, help="Directory for the table and the schema; made if missing.")
@click.option(
    "--scenario",
    type=click.Choice(["age", "occupation"]),
    default="age",
    show_default=True,
    help="What tells scenarios apart: the user's age group or occupation.",
)
def ml_100k(out: Path, scenario: Any) -> None:
    """MovieLens 100k: 100,000 ratings of films, fetched once with pip and kept in the user's cache."""
    from saml_rec.data.ml100k import write_ml100k

    print_written(write_ml100k(out, scenario=scenario))


@data.command()
@click.option("--out", type=FILE, required=True, help="Directory for the files; made if missing.")
@click.option("--scenarios", type=int, default=4, show_default=True, help="Number of scenarios.")
@click.option("--rows", type=int, default=20_000, show_default=True, help="Rows in all.")
@click.option("--users", type=int, default=400, show_default=True, help="Users to draw from.")
@click.option("--items", type=int, default=200, show_default=True, help="Items to draw from.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed and sizes give the same files.")
@click.option("--smallest-share", type=float, help="Share of the rows for the last scenario, at most 1/SCENARIOS.")
def synthetic(out: Path, **sizes: Any) -> None:
    """Rows in which the scenarios share tastes to a known degree, and a file with what was planted."""
    from saml_rec.data.synthetic import write_synthetic

    print_written(write_synthetic(out, **sizes))


@main.command()
@click.option("--rows", type=click.IntRange(1), default=4096, show_default=True, help="Rows of the batch.")
@click.option("--scenarios", type=click.IntRange(1), default=8, show_default=True, help="Scenarios, a branch each.")
@click.option(
    "--local-dim", type=click.IntRange(0), default=256, show_default=True, help="Width of the branches' input."
)
@click.option("--global-dim", type=click.IntRange(0), default=256, show_default=True, help="Width of the shared input.")
@click.option(
    "--hidden",
    type=IntegerList(),
    default="512,256,128",
    show_default=True,
    help="Widths of the layers, of branches and auxiliary network.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@device_option
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds of measuring; at least five rounds are measured.",
)
@click.option("--tune", is_flag=True, help="Find the fastest Triton tiles for the shape and keep them in the cache.")
@click.option("--out", type=FILE, help="A JSON file for the figures.")
def bench(
    rows: int,
    scenarios: int,
    local_dim: int,
    global_dim: int,
    hidden: tuple[int, ...],
    dtype: str,
    device: str,
    budget: float,
    tune: bool,
    out: Path | None,
) -> None:
    """Time the trunk, all branches with a mutual unit, on every backend that runs here."""
    from saml_kernels.backends.triton.tuning import Shape
    from saml_rec import bench, report
    from saml_rec.construction import resolve_device
    from saml_rec.files import check_output_file, write_json

    if not hidden:
        raise InputError("--hidden: expected at least one layer, got none")
    if out is not None:
        check_output_file(out)
    shape = Shape(rows, scenarios, local_dim, global_dim, hidden, bench.DTYPES[dtype], resolve_device(device))
    console = stdout()
    if tune:
        bench.require_tunable(shape)
        found, record = bench.tune(shape, budget, lambda line: report.say(console, line))
        bench.say_tuned(console, found)
    else:
        record = bench.measure(shape, budget)
        bench.say_results(console, record)
    if out is not None:
        write_json(out, record)
        report.say(console, f"wrote {out}")


@main.command()
def doctor() -> None:
    """Show what this machine can run, and why not the rest."""
    import saml_kernels.doctor

    click.echo(saml_kernels.doctor.report())


if __name__ == "__main__":
    main(prog_name="saml-rec")
