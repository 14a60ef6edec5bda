"""A table and its schema as files."""

from pathlib import Path

import polars as pl

from saml_rec.datasets.output import make_directory
from saml_rec.files import replacing


def write_table(out: Path, name: str, table: pl.DataFrame, schema: str) -> tuple[Path, Path]:
    """Writes ``<name>.csv`` and ``<name>.toml`` into a directory, which is made if it is missing; their paths."""
    data_path, schema_path = make_directory(out) / f"{name}.csv", out / f"{name}.toml"
    with replacing(data_path) as file:
        table.write_csv(file)
    with replacing(schema_path) as file:
        file.write(schema.encode())
    return data_path, schema_path
