"""Measures a trained model."""

from pathlib import Path

import click

from saml_rec.cli.options import (
    FILE,
    backend_option,
    csv_options,
    data_option,
    device_option,
    warn,
)


@click.command()
@click.argument("run", type=FILE)
@data_option("Table to measure on; what the run was trained on unless given.", required=False)
@csv_options
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    help="Rows that were this split in training. Default: test, or all rows of --data.",
)
@click.option("--out", type=FILE, help="A .json file, or a directory for metrics.json. Default: a file in RUN.")
@device_option
@backend_option
def evaluate(
    run: Path,
    data: tuple[Path, ...],
    separator: str | None,
    decimal: str | None,
    split: str | None,
    out: Path | None,
    device: str,
    backend: str | None,
) -> None:
    """Measure the model of the finished run RUN."""
    from saml_rec.console import metrics_table, say, stdout
    from saml_rec.data.csv_format import CsvOptions
    from saml_rec.data.sources import named
    from saml_rec.evaluation import scoring
    from saml_rec.files import check_output_file, write_json

    if out is None:
        target = run / f"evaluation-{split or ('+'.join(path.name for path in data) or 'test')}.json"
    else:
        target = out if out.suffix == ".json" else out / "metrics.json"
    if target.parent.exists():
        check_output_file(target)
    console = stdout()
    metrics = scoring.evaluate(
        run,
        data_path=data or None,
        split=split,
        device=device,
        backend=backend,
        console=console,
        csv=CsvOptions(separator, decimal),
        warn=warn,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, metrics)
    rows = f"the {metrics['split']} rows" if metrics["split"] else f"all rows of {named(data)}"
    say(console, f"{metrics['model']} on {rows}")
    console.print(metrics_table(metrics))
    say(console, f"wrote {target}")
