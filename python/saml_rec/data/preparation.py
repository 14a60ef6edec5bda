"""A file and its schema become encoded tables: read, split, fit on the training rows, encode."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from saml_rec.data.encoding import Encoder
from saml_rec.data.readers import read_table
from saml_rec.data.schema import Schema
from saml_rec.data.splits import Rows, split_rows
from saml_rec.data.table import EncodedTable


@dataclass(frozen=True)
class PreparedData:
    """What training needs.

    Attributes:
        encoder: fitted on the training rows.
        tables: ``train``, ``valid`` and ``test``; a split that was not asked for is an empty table.
        frame: all rows, as :func:`saml_rec.data.read_table` returns them.
        rows: per split the indices of its rows in ``frame``, in the order of its table.
    """

    encoder: Encoder
    tables: dict[str, EncodedTable]
    frame: pl.DataFrame
    rows: dict[str, Rows]


def prepare(data_path: str | Path, schema: Schema, *, seed: int) -> PreparedData:
    """Read, split and encode a table.

    Args:
        data_path: CSV or Parquet.
        schema: of the table.
        seed: of the random split; of no effect with a time or split column.

    Raises:
        InputError: see :func:`saml_rec.data.read_table` and :func:`saml_rec.data.split_rows`; or a validation or
            test row has a scenario that no training row has.
    """
    frame = read_table(data_path, schema)
    rows = split_rows(frame, schema, seed)
    encoder = Encoder.fit(frame, schema, rows["train"])
    tables = {name: encoder.encode(frame, rows=indices) for name, indices in rows.items()}
    return PreparedData(encoder, tables, frame, rows)
