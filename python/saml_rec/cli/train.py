"""Trains a model."""

from pathlib import Path
from typing import Any

import click

from saml_rec.cli.group import INTERRUPT_STATUS
from saml_rec.cli.options import (
    FILE,
    cache_option,
    data_option,
    device_option,
    hyperparameter_options,
    optimizer_options,
)


@click.command()
@data_option("Table of labelled rows, CSV (also .gz, .zst) or Parquet.")
@click.option("--schema", type=FILE, required=True, help="TOML file: which column is what.")
@click.option("--out", type=FILE, required=True, help="Run directory; made if missing.")
@click.option(
    "--model", default="saml", show_default=True, help="Architecture: saml, star, hmoe, mmoe or shared_bottom."
)
@optimizer_options
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Stop after this many epochs without a better validation log loss; 0 never stops early.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, shuffling and split.")
@device_option
@cache_option
@click.option("--checkpoint-steps", type=click.IntRange(1), help="Also save within an epoch after so many steps.")
@click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="And after so many minutes.",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out; all other options as before.")
@click.option("--overwrite", is_flag=True, help="Delete the run in --out and start anew.")
@hyperparameter_options
@click.pass_context
def train(
    ctx: click.Context,
    data: tuple[Path, ...],
    schema: Path,
    out: Path,
    model: str,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    tables: str,
    table_optimizer: str,
    table_lr: float | None,
    patience: int,
    seed: int,
    device: str,
    cache: Path | None,
    checkpoint_steps: int | None,
    checkpoint_minutes: float,
    resume: bool,
    overwrite: bool,
    **hyperparameters: Any,
) -> None:
    """Train a model and measure it on the test rows.

    Options whose default is not shown belong to the model and default to its own value.
    """
    from saml_rec.console import metrics_table, say, stdout
    from saml_rec.data.preparation import prepare
    from saml_rec.data.schema import load_schema
    from saml_rec.models.construction import check_model, resolve_device
    from saml_rec.run_directory import RunDirectory
    from saml_rec.training.loop import CheckpointTimes
    from saml_rec.training.loop import train as train_model
    from saml_rec.training.options import TrainOptions

    run = RunDirectory(out)
    run.require_startable(resume=resume, overwrite=overwrite)
    options = TrainOptions(
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        weight_decay=weight_decay,
        tables=tables,
        table_optimizer=table_optimizer,
        table_learning_rate=table_lr,
        patience=patience,
        seed=seed,
        device=device,
        model_options={name: value for name, value in hyperparameters.items() if value is not None},
    ).resolved()
    loaded_schema = load_schema(schema)
    check_model(model, options.model_options, loaded_schema, resolve_device(options.device))
    console = stdout()
    try:
        result = train_model(
            prepare(data, loaded_schema, seed=seed, cache=cache, console=console),
            loaded_schema,
            options,
            out,
            resume=resume,
            overwrite=overwrite,
            data_path=data,
            checkpoints=CheckpointTimes(checkpoint_steps, checkpoint_minutes),
            console=console,
        )
    except KeyboardInterrupt:
        advice = f"; to continue, repeat the command with --resume{' in place of --overwrite' if overwrite else ''}"
        click.echo(f"interrupted{advice if run.started else ''}", err=True)
        ctx.exit(INTERRUPT_STATUS)
    best = f"best epoch {result.metrics['best_epoch']} of {result.metrics['epochs']}"
    if result.already_finished:
        say(console, f"{out} is finished already ({best}): nothing to resume")
        return
    say(console, f"{model} on the test rows, {best}")
    console.print(metrics_table(result.metrics))
    say(console, f"wrote {run.metrics}, {run.history.name}, {run.model.name}")
