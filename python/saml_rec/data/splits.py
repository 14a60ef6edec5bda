"""Which rows are for training, validation and test."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saml_rec.data.schema import Schema
from saml_rec.errors import InputError

SPLITS = ("train", "valid", "test")

Rows = NDArray[np.int64]


def split_rows(frame: pl.DataFrame, schema: Schema, seed: int) -> dict[str, Rows]:
    """Row indices of the three splits, each in ascending order.

    With a time column the oldest rows train and the newest test: the rows are ordered by time, cut at the schema's
    fractions of their number, and rows of one time stay together in the earlier split. Without it a permutation
    drawn from ``seed`` is cut. A split column decides by itself.

    Args:
        frame: from :func:`saml_rec.data.read_table`, with the label and the time or split column.
        schema: says how to split.
        seed: of the permutation; of no effect with a time or split column.

    Returns:
        ``train``, ``valid`` and ``test``, disjoint and together all rows. A split whose fraction is 0, or that the
        split column never names, is empty.

    Raises:
        InputError: a split that was asked for has no rows, or the training rows do not have both labels.
    """
    if schema.split_column is not None:
        column = frame[schema.split_column]
        rows = {name: (column == name).arg_true().to_numpy().astype(np.int64) for name in SPLITS}
        if not len(rows["train"]):
            raise InputError(
                f"split column {schema.split_column!r}: no row is train; at least the training rows are needed"
            )
    else:
        rows = _by_fractions(frame, schema, seed)
    if frame[schema.label].gather(rows["train"]).n_unique() < 2:
        label = frame[schema.label][int(rows["train"][0])]
        raise InputError(
            f"all {len(rows['train'])} training rows have label {label} in column {schema.label!r}; "
            "training needs rows with 0 and rows with 1"
        )
    return rows


def _by_fractions(frame: pl.DataFrame, schema: Schema, seed: int) -> dict[str, Rows]:
    n = frame.height
    train, valid, _ = schema.split
    first, second = round(train * n), round((train + valid) * n)
    if schema.time is None:
        order = np.random.default_rng(seed).permutation(n)
    else:
        order = frame[schema.time].to_physical().to_numpy().argsort(kind="stable")
        times = frame[schema.time].to_physical().to_numpy()[order]
        first, second = _after_ties(times, first), _after_ties(times, second)
    # The second cut never lies before the first: both move to the end of their tie group, in order.
    parts = np.split(order, [first, second])
    rows = {name: np.sort(part).astype(np.int64) for name, part in zip(SPLITS, parts, strict=True)}
    for name, fraction in zip(SPLITS, schema.split, strict=True):
        if fraction > 0 and not len(rows[name]):
            ties = f" by column {schema.time!r}, rows of one time staying together," if schema.time else ""
            sizes = " / ".join(str(len(part)) for part in rows.values())
            raise InputError(
                f"split {list(schema.split)}{ties} leaves no {name} rows: "
                f"{n} rows become {sizes} (train / valid / test)"
            )
    return rows


def _after_ties(times: np.ndarray, cut: int) -> int:
    """The end of the group of equal times that holds the row before ``cut``."""
    return int(np.searchsorted(times, times[cut - 1], side="right")) if cut > 0 else 0
