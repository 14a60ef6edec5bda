"""From a table on disk to batches of tensors: schema, read, split, encode, batch."""

from typing import TYPE_CHECKING

from saml_rec.lazy import lazily

if TYPE_CHECKING:
    from saml_rec.data.encoding import Encoder
    from saml_rec.data.preparation import PreparedData, prepare
    from saml_rec.data.readers import read_frame, read_table
    from saml_rec.data.splits import split_rows
    from saml_rec.data.table import Batch, EncodedTable
    from saml_rec.datasets.ml100k import write_ml100k
    from saml_rec.datasets.synthetic import write_synthetic

__all__ = [
    "Batch",
    "EncodedTable",
    "Encoder",
    "PreparedData",
    "prepare",
    "read_frame",
    "read_table",
    "split_rows",
    "write_ml100k",
    "write_synthetic",
]

__getattr__ = lazily(
    __name__,
    {
        "Batch": "saml_rec.data.table",
        "EncodedTable": "saml_rec.data.table",
        "Encoder": "saml_rec.data.encoding",
        "PreparedData": "saml_rec.data.preparation",
        "prepare": "saml_rec.data.preparation",
        "read_frame": "saml_rec.data.readers",
        "read_table": "saml_rec.data.readers",
        "split_rows": "saml_rec.data.splits",
        "write_ml100k": "saml_rec.datasets.ml100k",
        "write_synthetic": "saml_rec.datasets.synthetic",
    },
)
