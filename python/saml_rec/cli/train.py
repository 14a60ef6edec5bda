"""Trains a model."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from saml_rec.cli.configuration import config_option, kept
from saml_rec.cli.group import INTERRUPT_STATUS
from saml_rec.cli.options import (
    FILE,
    TableRates,
    cache_option,
    csv_options,
    data_option,
    device_option,
    hyperparameter_options,
    optimizer_options,
    patience_option,
    table_rates,
)
from saml_rec.errors import memory_for
from saml_rec.models.hyperparameters import MOST_SEED, Whole

if TYPE_CHECKING:
    from saml_rec.processes import Processes
    from saml_rec.run_directory import RunDirectory
    from saml_rec.training.trackers import Tracker


@click.command()
@config_option
@data_option("Table of labelled rows, CSV (also .gz, .zst) or Parquet.")
@csv_options
@click.option("--schema", type=FILE, required=True, help="TOML file: which column is what.")
@click.option("--out", type=FILE, required=True, help="Run directory; made if missing.")
@click.option(
    "--model",
    default="saml",
    show_default=True,
    help="saml, star, hmoe, mmoe, ple, pepnet, shared_bottom, mlp, mlp_scenario, per_scenario, logistic_regression or "
    "lightgbm.",
)
@optimizer_options
@patience_option
@click.option("--seed", type=Whole(0, MOST_SEED), default=0, show_default=True, help="Of weights, shuffling and split.")
@device_option
@cache_option
@click.option("--checkpoint-steps", type=Whole(1), help="Also save within an epoch after so many steps.")
@click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="And after so many minutes.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out; all other options as before.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out and start anew.")
@click.option("--tensorboard", type=FILE, help="Also write curves for TensorBoard into this directory.")
@click.option("--mlflow", metavar="URI", help="Also log the run to MLflow's tracking server or store there.")
@hyperparameter_options
@click.pass_context
def train(
    ctx: click.Context,
    data: tuple[Path, ...],
    separator: str | None,
    decimal: str | None,
    schema: Path,
    out: Path,
    model: str,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    scenario_rate: float | None,
    scenario_decay: float | None,
    tables: str,
    table_optimizer: str,
    table_lr: TableRates,
    patience: int,
    seed: int,
    device: str,
    cache: Path | None,
    checkpoint_steps: int | None,
    checkpoint_minutes: float,
    resume: bool,
    overwrite: bool,
    tensorboard: Path | None,
    mlflow: str | None,
    **hyperparameters: Any,
) -> None:
    """Train a model and measure it on the test rows.

    Options whose default is not shown belong to the model and default to its own value. Several processes, on one
    machine or more: torchrun --nproc-per-node N -m saml_rec train ...
    """
    from saml_rec.processes import joined_processes
    from saml_rec.run_directory import RunDirectory
    from saml_rec.training.trackers import trackers_of

    trackers = trackers_of(tensorboard, mlflow)
    run = RunDirectory(out)
    start: dict[str, Any] = {
        "data": data,
        "csv": (separator, decimal),
        "schema_path": schema,
        "cache": cache,
        "checkpoints": (checkpoint_steps, checkpoint_minutes),
        "resume": resume,
        "overwrite": overwrite,
        "trackers": trackers,
        "kept": partial(kept, ctx),
    }
    options: dict[str, Any] = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": lr,
        "weight_decay": weight_decay,
        "scenario_rate": scenario_rate,
        "scenario_decay": scenario_decay,
        "tables": tables,
        "table_optimizer": table_optimizer,
        **table_rates(table_lr),
        "patience": patience,
        "seed": seed,
        "device": device,
        "model_options": {name: value for name, value in hyperparameters.items() if value is not None},
    }
    try:
        with joined_processes() as processes:
            _train(processes, run, options, **start)
    except KeyboardInterrupt:
        advice = f"; to continue, repeat the command with --resume{' in place of --overwrite' if overwrite else ''}"
        click.echo(f"interrupted{advice if run.started else ''}", err=True)
        ctx.exit(INTERRUPT_STATUS)


def _train(
    processes: "Processes",
    run: "RunDirectory",
    options: dict[str, Any],
    *,
    data: tuple[Path, ...],
    csv: tuple[str | None, str | None],
    schema_path: Path,
    cache: Path | None,
    checkpoints: tuple[int | None, float],
    resume: bool,
    overwrite: bool,
    trackers: "list[Tracker]",
    kept: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> None:
    from saml_rec.console import metrics_table, say, stdout
    from saml_rec.data.csv_format import CsvOptions
    from saml_rec.data.preparation import prepare
    from saml_rec.data.schema import load_schema
    from saml_rec.models.construction import check_model, resolve_device
    from saml_rec.training.loop import CheckpointTimes, train
    from saml_rec.training.options import TrainOptions

    options_of_csv = CsvOptions(*csv)
    if processes.is_first:
        run.require_startable(resume=resume, overwrite=overwrite)
    resolved = TrainOptions(**options).resolved(processes)
    schema = load_schema(schema_path)
    resolved.check_features(schema)
    check_model(resolved.model, resolved.model_options, schema, resolve_device(resolved.device))
    console = stdout() if processes.is_first else None
    with memory_for("preparing the data"):
        prepared = processes.in_turn(
            lambda: prepare(data, schema, seed=resolved.seed, cache=cache, console=console, csv=options_of_csv)
        )
    result = train(
        prepared,
        schema,
        resolved,
        run.path,
        resume=resume,
        overwrite=overwrite,
        data_path=data,
        checkpoints=CheckpointTimes(*checkpoints),
        console=console,
        processes=processes,
        configuration=kept(
            {"device": options["device"] if processes.are_several else resolved.device, **resolved.model_options}
        ),
        trackers=trackers,
    )
    best = f"best epoch {result.metrics['best_epoch']} of {result.metrics['epochs']}"
    if result.already_finished:
        say(console, f"{run.path} is finished already ({best}): nothing to resume")
    elif console is not None:
        say(console, f"{resolved.model} on the test rows, {best}")
        console.print(metrics_table(result.metrics))
        say(console, f"wrote {run.metrics}, {run.history.name}, {run.model.name}")
