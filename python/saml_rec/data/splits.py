"""Which rows are for training, validation and test."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saml_rec.data.schema import Schema
from saml_rec.errors import InputError, named

SPLITS = ("train", "valid", "test")

Rows = NDArray[np.int64]
Codes = NDArray[np.uint8]
"""Per row the position of its split in SPLITS."""


@dataclass(frozen=True)
class Split:
    """How the rows of a table are divided. Made by :func:`split_of`.

    Args:
        schema: says by what.
        rows: of the table.
        last_times: the last time of training and of validation rows, of a split by time.
        drawn: per row its split, of one at random.
    """

    schema: Schema
    rows: int
    last_times: pl.Series | None = None
    drawn: Codes | None = None

    def codes(self, frame: pl.DataFrame, first_row: int) -> Codes:
        """Per row of ``frame``, whose first is row ``first_row`` of the table, the position of its split in SPLITS."""
        if self.schema.split_column is not None:
            column = frame[self.schema.split_column]
            return column.replace_strict(SPLITS, range(len(SPLITS)), return_dtype=pl.UInt8).to_numpy()
        if self.drawn is not None:
            return self.drawn[first_row : first_row + frame.height]
        assert self.schema.time is not None
        assert self.last_times is not None
        times = frame[self.schema.time].cast(self.last_times.dtype)
        last_train, last_valid = self.last_times
        return ((times > last_train).cast(pl.UInt8) + (times > last_valid).cast(pl.UInt8)).to_numpy()


def needs_a_pass(schema: Schema) -> bool:
    """Whether all rows have to be looked at before any can be given its split."""
    return schema.split_column is None


def split_of(schema: Schema, parts: Iterator[pl.DataFrame], seed: int) -> Split:
    """How a table's rows are divided.

    With a time column the oldest rows train and the newest test: the rows are ordered by time, cut at the schema's
    fractions of their number, and rows of one time stay together in the earlier split. Without it a permutation
    drawn from ``seed`` is cut. A split column decides by itself.

    Args:
        schema: says how to split.
        parts: the rows in order, with the time column where there is one; not read where :func:`needs_a_pass` is false.
        seed: of the permutation; of no effect with a time or split column.
    """
    if not needs_a_pass(schema):
        return Split(schema, 0)
    if schema.time is None:
        rows = sum(part.height for part in parts)
        order = np.random.default_rng(seed).permutation(rows)
        drawn = np.empty(rows, np.uint8)
        for code, places in enumerate(np.split(order, _cuts(schema, rows))):
            drawn[places] = code
        return Split(schema, rows, drawn=drawn)
    columns = pl.concat([part.select(schema.time) for part in parts], how="vertical_relaxed")
    times = columns.to_series().sort()
    return Split(schema, len(times), last_times=_last_times(schema, times))


def _cuts(schema: Schema, rows: int) -> tuple[int, int]:
    """Where the rows in their order are cut."""
    train, valid, _ = schema.split
    return round(train * rows), round((train + valid) * rows)


def _last_times(schema: Schema, times: pl.Series) -> pl.Series:
    """Of sorted times, that of the row before each cut."""
    first, second = _cuts(schema, len(times))
    if first == 0:
        check_split(schema, {"train": 0, "valid": second, "test": len(times) - second}, set())
    return times.gather([first - 1, second - 1])


def split_rows(frame: pl.DataFrame, schema: Schema, seed: int) -> dict[str, Rows]:
    """Row indices of the three splits, each in ascending order, as :func:`split_of` divides them.

    Args:
        frame: from :func:`saml_rec.data.read_table`, with the label and the time or split column.
        schema: says how to split.
        seed: of the permutation; of no effect with a time or split column.

    Returns:
        ``train``, ``valid`` and ``test``, disjoint and together all rows. A split whose fraction is 0, or that the
        split column never names, is empty.

    Raises:
        InputError: a split that was asked for has no rows, the training rows do not have both labels, or all rows of
            a split have weight 0.
    """
    codes = split_of(schema, iter([frame]), seed).codes(frame, 0)
    rows = {name: np.flatnonzero(codes == code).astype(np.int64) for code, name in enumerate(SPLITS)}
    labels = weighted_labels(schema, frame[rows["train"]])
    check_split(schema, {name: len(places) for name, places in rows.items()}, labels)
    if schema.weight is not None:
        weights = frame[schema.weight].cast(pl.Float32).to_numpy()
        check_weights(schema, {name: (len(places), float(weights[places].sum())) for name, places in rows.items()})
    return rows


def weighted_labels(schema: Schema, training: pl.DataFrame) -> set[int]:
    """The labels of training rows that count anything."""
    if schema.weight is not None:
        training = training.filter(pl.col(schema.weight).cast(pl.Float32) > 0)
    return set(training[schema.label].unique().to_list())


def check_weights(schema: Schema, sums: Mapping[str, tuple[int, float]]) -> None:
    """Refuses a split whose rows count nothing.

    Args:
        schema: names the weight column, if there is one.
        sums: per split its rows and the sum of their weights.

    Raises:
        InputError: a split has rows, and all of them have weight 0.
    """
    if schema.weight is None:
        return
    for name, (rows, weight) in sums.items():
        if rows and not weight:
            raise InputError(
                f"weight column {named(schema.weight)}: all {rows} {name} rows have weight 0; "
                "expected one above 0 at least"
            )


def check_split(schema: Schema, sizes: Mapping[str, int], labels: set[int]) -> None:
    """Refuses a split that training cannot use.

    Args:
        schema: says how the rows were split.
        sizes: rows of each split.
        labels: those of the training rows, of weight above 0 where rows have weights.

    Raises:
        InputError: a split that was asked for has no rows, or the training rows do not have both labels.
    """
    if schema.split_column is not None:
        if not sizes["train"]:
            raise InputError(
                f"split column {named(schema.split_column)}: no row is train; at least the training rows are needed"
            )
    else:
        for name, fraction in zip(SPLITS, schema.split, strict=True):
            if fraction > 0 and not sizes[name]:
                ties = f" by column {named(schema.time)}, rows of one time staying together," if schema.time else ""
                raise InputError(
                    f"split {list(schema.split)}{ties} leaves no {name} rows: {sum(sizes.values())} rows become "
                    f"{' / '.join(str(sizes[each]) for each in SPLITS)} (train / valid / test)"
                )
    if len(labels) == 1:
        raise InputError(
            f"all {sizes['train']} training rows{' of weight above 0' if schema.weight else ''} have label "
            f"{next(iter(labels))} in column {named(schema.label)}; "
            "training needs rows with 0 and rows with 1"
        )
