"""From a table on disk to batches of tensors: read, split, encode, batch."""

from saml_rec.data.batches import Batch, EncodedTable
from saml_rec.data.encoding import Encoder
from saml_rec.data.ml100k import write_ml100k
from saml_rec.data.prepare import PreparedData, prepare
from saml_rec.data.readers import read_frame, read_table
from saml_rec.data.splits import split_rows
from saml_rec.data.synthetic import write_synthetic

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
