"""From the strings and numbers of a table to ids and normalised values, with what the training rows taught.

Everything learnt here — scenarios, vocabularies, means and deviations — comes from the training rows alone, so that
nothing of the validation and test rows reaches the model.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.data.splits import Rows
from saml_rec.data.table import EncodedTable, Ragged
from saml_rec.errors import InputError

FORMAT = 1
EMPTY_ID = 0  # an empty cell and padding; its embedding is the zero vector
UNKNOWN_ID = 1  # a value that training never saw, or fewer than min_count times
FIRST_ID = 2  # of the most frequent value
FARTHEST = 1e4  # standard deviations; a value farther out would make a logit infinite rather than large
INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Encoder:
    """Ids and normalisation, fitted on training rows.

    Attributes:
        schema: of the tables it encodes.
        scenario_names: the scenarios of the training rows in order of their ids: sorted, as numbers where all are
            integers.
        vocabularies: per sparse and multi feature without buckets the values with an id of their own, in order of the
            ids from 2: by falling frequency in the training rows, equally frequent ones by value. A value needs
            ``min_count`` occurrences. The elements of a sequence are looked up in the vocabulary of its item and do
            not count towards it.
        moments: per dense feature mean and standard deviation of the training rows, missing values left out.
    """

    schema: Schema
    scenario_names: tuple[str, ...]
    vocabularies: Mapping[str, tuple[str, ...]]
    moments: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(cls, frame: pl.DataFrame, schema: Schema, rows: Rows) -> "Encoder":
        """Learn from the rows ``rows`` (indices, int64) of a frame from :func:`saml_rec.data.read_table`."""
        training = frame[rows]
        return cls(
            schema=schema,
            scenario_names=_natural_order(training[schema.scenario].unique().to_list()),
            vocabularies={
                feature.name: _vocabulary(_flat(training[feature.name], feature), feature.min_count)
                for feature in _categorical(schema)
                if not feature.buckets
            },
            moments={feature.name: _moments(training[feature.name]) for feature in schema.of_kind("dense")},
        )

    @property
    def num_scenarios(self) -> int:
        """M."""
        return len(self.scenario_names)

    @cached_property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Per sparse and multi feature the rows of its embedding table, the two reserved ids included."""
        return {
            feature.name: FIRST_ID + (feature.buckets or len(self.vocabularies[feature.name]))
            for feature in _categorical(self.schema)
        }

    @property
    def dense_width(self) -> int:
        """Width of a batch's ``dense``: a value and a flag per dense feature."""
        return 2 * len(self.schema.of_kind("dense"))

    def encode(self, frame: pl.DataFrame, *, rows: Rows | None = None) -> EncodedTable:
        """Encode a frame from :func:`saml_rec.data.read_table`, or its rows ``rows`` in that order.

        A frame that was not read with its label gives a table without labels. A missing dense value takes the
        training mean, which is 0 after normalisation, and its flag is 1. Normalised values are cut to ±10,000.

        Raises:
            InputError: a scenario that training never saw.
        """
        if rows is not None:
            frame = frame[rows]
        schema = self.schema
        return EncodedTable(
            scenario=self._scenario(frame[schema.scenario]),
            label=_label(frame, schema),
            dense=self._dense(frame),
            sparse={
                feature.name: torch.from_numpy(self._ids(frame[feature.name], feature.name).astype(np.int64))
                for feature in schema.of_kind("sparse")
            },
            ragged={
                feature.name: self._ragged(frame[feature.name], feature)
                for feature in (*schema.of_kind("multi"), *schema.of_kind("sequence"))
            },
            num_scenarios=self.num_scenarios,
        )

    def _scenario(self, column: pl.Series) -> torch.Tensor:
        names = list(self.scenario_names)
        ids = column.replace_strict(names, range(len(names)), default=None, return_dtype=pl.Int64)
        if ids.null_count():
            unseen = _natural_order(column.filter(ids.is_null()).unique().to_list())
            raise InputError(
                f"scenario column {self.schema.scenario!r} has {_listed(unseen, 5)}, not among the training rows, "
                f"whose scenarios are {_listed(self.scenario_names, 50)}"
            )
        return torch.from_numpy(ids.to_numpy(writable=True))

    def _ids(self, values: pl.Series, feature: str) -> np.ndarray:
        """String values of a sparse or multi feature -> int32 ids; null is the empty cell."""
        if buckets := self.schema.feature(feature).buckets:
            known = values.drop_nulls().unique()
            numbers = pl.Series([_bucket(value, buckets) for value in known], dtype=pl.Int32) + FIRST_ID
        else:
            known = pl.Series(self.vocabularies[feature], dtype=pl.String)
            numbers = pl.int_range(FIRST_ID, FIRST_ID + len(known), dtype=pl.Int32, eager=True)
        ids = values.replace_strict(known, numbers, default=UNKNOWN_ID, return_dtype=pl.Int32)
        return pl.select(pl.when(values.is_not_null()).then(ids).otherwise(EMPTY_ID)).to_series().to_numpy()

    def _ragged(self, column: pl.Series, feature: FeatureSpec) -> Ragged:
        lists = _lists(column, feature)
        if feature.kind == "sequence":
            lists = lists.list.tail(feature.max_length)
        offsets = np.zeros(len(lists) + 1, dtype=np.int64)
        np.cumsum(lists.list.len().to_numpy(), out=offsets[1:])
        ids = self._ids(_explode(lists), feature.item or feature.name)
        return Ragged(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(offsets))

    def _dense(self, frame: pl.DataFrame) -> torch.Tensor:
        result = np.zeros((frame.height, self.dense_width), dtype=np.float32)
        for position, feature in enumerate(self.schema.of_kind("dense")):
            mean, deviation = self.moments[feature.name]
            values = frame[feature.name]
            missing = values.is_null().to_numpy()
            with np.errstate(over="ignore"):
                normalised = (values.fill_null(mean).to_numpy() - mean) / deviation
            result[:, 2 * position] = normalised.clip(-FARTHEST, FARTHEST)
            result[:, 2 * position + 1] = missing
        return torch.from_numpy(result)

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only; :meth:`from_dict` gives an equal encoder, also through JSON."""
        return {
            "format": FORMAT,
            "schema": self.schema.to_dict(),
            "scenario_names": list(self.scenario_names),
            "vocabularies": {name: list(values) for name, values in self.vocabularies.items()},
            "moments": {name: list(pair) for name, pair in self.moments.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Encoder":
        """The encoder that :meth:`to_dict` described.

        Raises:
            InputError: the content is of another format.
        """
        if content.get("format") != FORMAT:
            raise InputError(f"encoder: format {FORMAT} expected, got {content.get('format')!r}")
        return cls(
            schema=Schema.from_dict(content["schema"], source="encoder"),
            scenario_names=tuple(content["scenario_names"]),
            vocabularies={name: tuple(values) for name, values in content["vocabularies"].items()},
            moments={name: (mean, deviation) for name, (mean, deviation) in content["moments"].items()},
        )


def _categorical(schema: Schema) -> tuple[FeatureSpec, ...]:
    return (*schema.of_kind("sparse"), *schema.of_kind("multi"))


def _bucket(value: str, buckets: int) -> int:
    """Of a hash that is the same on every machine and in every version of its library."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") % buckets


def _flat(column: pl.Series, feature: FeatureSpec) -> pl.Series:
    """All values of a sparse or multi column, without the empty ones."""
    return column.drop_nulls() if feature.kind == "sparse" else _explode(_lists(column, feature))


def _lists(column: pl.Series, feature: FeatureSpec) -> pl.Series:
    """A bag or sequence column as List(String) without empty pieces; an empty cell is an empty list."""
    values = pl.col(column.name)
    if column.dtype == pl.String:
        values = values.str.split(feature.separator)
    pieces = values.list.eval(pl.element().filter(pl.element() != ""))
    return column.to_frame().select(pieces.fill_null([])).to_series().cast(pl.List(pl.String))


def _explode(lists: pl.Series) -> pl.Series:
    """All elements in order. An empty list would become a null, so those are left out before."""
    return lists.filter(lists.list.len() > 0).explode()


def _vocabulary(values: pl.Series, min_count: int) -> tuple[str, ...]:
    counts = values.to_frame("value").group_by("value").len("rows")
    kept = counts.filter(pl.col("rows") >= min_count).sort(["rows", "value"], descending=[True, False])
    return tuple(kept["value"].to_list())


def _moments(column: pl.Series) -> tuple[float, float]:
    values = column.drop_nulls().to_numpy()
    if not len(values):
        return 0.0, 1.0
    # The deviation of equal values is not always exactly 0 in floating point, and that of others may underflow to it.
    if values.min() == values.max():
        return float(values[0]), 1.0
    return float(values.mean()), float(values.std()) or 1.0


def _label(frame: pl.DataFrame, schema: Schema) -> torch.Tensor | None:
    # A frame read for scoring may hold an unchecked label; a checked one is UInt8.
    if frame.schema.get(schema.label) != pl.UInt8:
        return None
    return torch.from_numpy(frame[schema.label].cast(pl.Float32).to_numpy(writable=True))


def _natural_order(names: list[str]) -> tuple[str, ...]:
    if all(INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _listed(names: tuple[str, ...], at_most: int) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(repr(name) for name in names[:at_most]) + more
