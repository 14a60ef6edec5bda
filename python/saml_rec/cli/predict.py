"""Scores a table."""

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
from saml_rec.errors import InputError


@click.command()
@click.argument("run", type=FILE)
@data_option("Table with the columns of the schema; no label needed.")
@csv_options
@click.option("--out", type=FILE, required=True, help="A .csv or .parquet file; replaced if it exists.")
@device_option
@backend_option
def predict(
    run: Path,
    data: tuple[Path, ...],
    separator: str | None,
    decimal: str | None,
    out: Path,
    device: str,
    backend: str | None,
) -> None:
    """Write a table as it is with a column prediction: the probability of label 1, by the model of RUN."""
    from saml_rec.console import say, stdout
    from saml_rec.data.csv_format import CsvOptions
    from saml_rec.data.readers import require_csv_columns
    from saml_rec.data.sources import table_files
    from saml_rec.evaluation import scoring
    from saml_rec.files import check_output_file

    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"{out}: the name must end in .csv or .parquet")
    check_output_file(out)
    if out.exists() and any(file.exists() and out.samefile(file) for file in table_files(data)):
        raise InputError(f"{out}: is the input file")
    if out.suffix == ".csv":
        require_csv_columns(data)
    console = stdout()
    csv = CsvOptions(separator, decimal)
    found = scoring.predictions(run, data, device=device, backend=backend, console=console, csv=csv)
    rows = found.write(out)
    for is_wrong, line in found.lines():
        warn(line) if is_wrong else say(console, line)
    say(console, f"wrote {rows:,} rows to {out}")
