"""Trains several models side by side."""

from pathlib import Path
from typing import Any

import click

from saml_rec.cli.options import (
    FILE,
    ModelOption,
    TableRates,
    cache_option,
    csv_options,
    data_option,
    device_option,
    optimizer_options,
    patience_option,
    table_rates,
)
from saml_rec.errors import InputError, memory_for, shortened
from saml_rec.models.hyperparameters import MOST_SEED, Whole


@click.command()
@data_option("Table of labelled rows, CSV (also .gz, .zst) or Parquet.")
@csv_options
@click.option("--schema", type=FILE, required=True, help="TOML file: which column is what.")
@click.option("--out", type=FILE, required=True, help="Directory; made if missing. Runs finished there are kept.")
@click.option(
    "--models",
    default="saml,shared_bottom",
    show_default=True,
    help="Separated by commas; all: every model whose packages are installed.",
)
@click.option("--seeds", type=Whole(1), default=5, show_default=True, help="Runs of each model.")
@click.option("--split-seed", type=Whole(0, MOST_SEED), default=0, show_default=True, help="Of a random split.")
@optimizer_options
@patience_option
@click.option(
    "--set",
    "settings",
    type=ModelOption(),
    multiple=True,
    help="An option for one of the models only; may be repeated. E.g. saml.dropout=0.1, star.lr=0.002.",
)
@click.option("--tuned", type=FILE, help="tune.json of saml-rec tune: each model's best options; --set wins.")
@click.option("--reference-epoch", is_flag=True, help="Also time an epoch of each model on the reference backend.")
@device_option
@cache_option
def compare(
    data: tuple[Path, ...],
    separator: str | None,
    decimal: str | None,
    schema: Path,
    out: Path,
    models: str,
    seeds: int,
    split_seed: int,
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
    settings: tuple[tuple[str, str, Any], ...],
    tuned: Path | None,
    reference_epoch: bool,
    device: str,
    cache: Path | None,
) -> None:
    """Train several models with several seeds on one split, and write compare.json and report.html.

    Repeat the command after an interruption: finished runs are not trained again.
    """
    from saml_rec import comparison, tuning
    from saml_rec.console import backend_seconds, say, stdout
    from saml_rec.data.csv_format import CsvOptions
    from saml_rec.data.preparation import prepare
    from saml_rec.data.schema import load_schema
    from saml_rec.models.construction import check_model, resolve_device
    from saml_rec.models.registry import installed_models
    from saml_rec.training.loop import time_backends
    from saml_rec.training.options import TrainOptions

    names = [name.strip() for name in models.split(",") if name.strip()]
    if names == [comparison.ALL_MODELS]:
        names = installed_models()
    comparison.check_models(names)
    comparison.check_directory(out)
    csv = CsvOptions(separator, decimal)
    options = TrainOptions(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        weight_decay=weight_decay,
        scenario_rate=scenario_rate,
        scenario_decay=scenario_decay,
        tables=tables,
        table_optimizer=table_optimizer,
        **table_rates(table_lr),
        patience=patience,
        device=device,
    )
    found = None if tuned is None else tuning.load_tuned(tuned, names)
    changes: dict[str, dict[str, Any]] = {name: found.best_options(name) if found else {} for name in names}
    for name, keyword, value in settings:
        if name not in changes:
            raise InputError(
                f"--set {shortened(name)}.{keyword.replace('_', '-')}: {shortened(name)} is not among --models"
            )
        changes[name][keyword] = value
    loaded_schema = load_schema(schema)
    own = {name: comparison.options_of(name, options, changes[name]).resolved() for name in names}
    for name in names:
        check_model(name, own[name].model_options, loaded_schema, resolve_device(device))
    console = stdout()
    with memory_for("preparing the data"):
        prepared = prepare(data, loaded_schema, seed=split_seed, cache=cache, console=console, csv=csv)
    if found is not None:
        found.require_same_data(prepared)
    record = comparison.compare(
        prepared,
        loaded_schema,
        names,
        seeds,
        options,
        out,
        changes=changes,
        tuned=None if found is None else found.to_dict(),
        data_path=data,
        console=console,
    )
    console.print(comparison.comparison_table(record))
    if late := [name for name, model in record["models"].items() if model["cut_off"]]:
        say(console, f"the last epoch was still the best one in runs of {', '.join(late)}: more may be better")
    for line in comparison.all_sentences(record):
        say(console, line)
    if reference_epoch:
        for name in names:
            timed = time_backends(prepared, loaded_schema, own[name])
            if timed:
                say(console, f"{name}, one epoch: {backend_seconds(timed)}")
    say(console, f"wrote {out / 'compare.json'}")
    say(console, f"report: {out / 'report.html'}")
