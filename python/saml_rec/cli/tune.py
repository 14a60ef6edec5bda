"""Searches the hyperparameters of several models."""

from pathlib import Path

import click

from saml_rec.cli.options import (
    FILE,
    TableRates,
    budget_options,
    cache_option,
    csv_options,
    data_option,
    device_option,
    patience_option,
    table_rates,
)
from saml_rec.errors import memory_for
from saml_rec.models.hyperparameters import MOST_SEED, Whole


@click.command()
@data_option("Table of labelled rows, CSV (also .gz, .zst) or Parquet.")
@csv_options
@click.option("--schema", type=FILE, required=True, help="TOML file: which column is what.")
@click.option("--out", type=FILE, required=True, help="Directory for tune.json; made if missing.")
@click.option("--models", default="saml,shared_bottom", show_default=True, help="Architectures, separated by commas.")
@click.option("--trials", type=Whole(1), default=20, show_default=True, help="Of each model.")
@click.option("--seed", type=Whole(0, MOST_SEED), default=0, show_default=True, help="Of the sampler and of every run.")
@click.option("--split-seed", type=Whole(0, MOST_SEED), default=0, show_default=True, help="Of a random split.")
@budget_options
@patience_option
@device_option
@cache_option
def tune(
    data: tuple[Path, ...],
    separator: str | None,
    decimal: str | None,
    schema: Path,
    out: Path,
    models: str,
    trials: int,
    seed: int,
    split_seed: int,
    epochs: int,
    batch_size: int,
    tables: str,
    table_optimizer: str,
    table_lr: TableRates,
    patience: int,
    device: str,
    cache: Path | None,
) -> None:
    """Search learning rate, weight decay and hyperparameters of several models, with as many trials for each.

    Writes tune.json, which compare takes with --tuned. Test rows are not scored. Repeat the command after an
    interruption: finished trials are kept.
    """
    from saml_rec import tuning
    from saml_rec.console import say, stdout
    from saml_rec.data.csv_format import CsvOptions
    from saml_rec.data.preparation import prepare
    from saml_rec.data.schema import load_schema
    from saml_rec.models.construction import check_model, resolve_device
    from saml_rec.training.options import TrainOptions

    tuning.require_optuna()
    names = [name.strip() for name in models.split(",") if name.strip()]
    tuning.check_tuning_directory(out, names, trials)
    csv = CsvOptions(separator, decimal)
    options = TrainOptions(
        epochs=epochs,
        batch_size=batch_size,
        tables=tables,
        table_optimizer=table_optimizer,
        **table_rates(table_lr),
        patience=patience,
        seed=seed,
        device=device,
    )
    loaded_schema = load_schema(schema)
    options.check_features(loaded_schema)
    for name in names:
        check_model(name, {}, loaded_schema, resolve_device(device))
    console = stdout()
    with memory_for("preparing the data"):
        prepared = prepare(data, loaded_schema, seed=split_seed, cache=cache, console=console, csv=csv)
    record = tuning.tune(prepared, loaded_schema, names, trials, options, out, data_path=data, console=console)
    console.print(tuning.tuning_table(record))
    console.print(tuning.tried_table(record))
    say(console, f"wrote {out / tuning.FILE}")
