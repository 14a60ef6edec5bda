"""From the strings and numbers of a table to ids and normalised values, with what the training rows taught."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.data.splits import Rows
from saml_rec.data.table import EncodedTable, Ragged
from saml_rec.data.values import as_lists
from saml_rec.errors import InputError, listed, named, shown

FORMAT = 1
EMPTY_ID = 0  # an empty cell and padding; its embedding is the zero vector
UNKNOWN_ID = 1  # a value that training never saw, or fewer than min_count times
FIRST_ID = 2  # of the most frequent value
OTHER = "(other)"
"""The scenario that rare and unseen ones share."""
DROPPED, UNSEEN = -1, -2  # in place of a scenario's id
FARTHEST = 1e4  # standard deviations; a value farther out would make a logit infinite rather than large
INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Encoder:
    """Ids and normalisation, learnt from training rows by :class:`saml_rec.data.learning.Learner`.

    Attributes:
        schema: of the tables it encodes.
        scenario_names: the scenarios of the training rows in order of their ids: sorted, as numbers where all are
            integers; last OTHER where rare scenarios share a branch.
        vocabularies: per sparse and multi feature without buckets the values with an id of their own, in order of the
            ids from 2: by falling frequency in the training rows, equally frequent ones by value. A value needs
            ``min_count`` occurrences. The elements of a sequence are looked up in the vocabulary of its item and do
            not count towards it.
        moments: per dense feature mean and standard deviation of the training rows, missing values left out.
        rare: training rows of every scenario that has too few for a branch, by name.
    """

    schema: Schema
    scenario_names: tuple[str, ...]
    vocabularies: Mapping[str, tuple[str, ...]]
    moments: Mapping[str, tuple[float, float]]
    rare: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_scenarios(self) -> int:
        """M."""
        return len(self.scenario_names)

    @cached_property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Per sparse and multi feature the rows of its embedding table, the two reserved ids included."""
        return {
            feature.name: FIRST_ID + (feature.buckets or len(self.vocabularies[feature.name]))
            for feature in categorical(self.schema)
        }

    @property
    def dense_width(self) -> int:
        """Width of a batch's ``dense``: a value and a flag per dense feature."""
        return 2 * len(self.schema.of_kind("dense"))

    def encode(self, frame: pl.DataFrame, *, rows: Rows | None = None) -> EncodedTable:
        """Encode a frame from :func:`saml_rec.data.read_table`, or its rows ``rows`` in that order.

        A frame that was not read with its label gives a table without labels, weights and groups. A missing dense value
        takes the training mean, which is 0 after normalisation, and its flag is 1. Normalised values are cut to
        ±10,000. Rows of scenarios that are to be dropped are left out.

        Raises:
            InputError: a scenario that training never saw, or a rare one, where those are refused.
        """
        if rows is not None:
            frame = frame[rows]
        scenario = self.scenario_ids(frame[self.schema.scenario])
        return self.encode_kept(frame, scenario)

    def encode_kept(self, frame: pl.DataFrame, scenario: NDArray[np.int64]) -> EncodedTable:
        """As :meth:`encode`, with what :meth:`scenario_ids` gave."""
        if not (kept := scenario != DROPPED).all():
            frame, scenario = frame.filter(kept), scenario[kept]
        schema = self.schema
        label = _label(frame, schema)
        return EncodedTable(
            scenario=torch.from_numpy(scenario),
            label=label,
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
            weight=None if label is None else _weight(frame, schema),
            group=None if label is None else _group(frame, schema),
        )

    def scenario_ids(self, column: pl.Series) -> NDArray[np.int64]:
        """The scenario column → ids, DROPPED for rows that are to be left out.

        Raises:
            InputError: a scenario that training never saw, or a rare one, where those are refused.
        """
        names = column.unique().to_list()
        ids = [self._scenario_of.get(name, UNSEEN) for name in names]
        if UNSEEN in ids:
            unseen = natural_order([name for name, number in zip(names, ids, strict=True) if number == UNSEEN])
            if self.schema.scenarios.unseen == "refuse":
                branches = tuple(name for name in self.scenario_names if name != OTHER)
                raise InputError(
                    f"scenario column {named(self.schema.scenario)} has {listed(unseen, 5, 40)}, not among the "
                    f"training rows, whose scenarios are {listed(branches, 50, 40)}"
                    '; [scenarios] unseen = "other" or "drop" in the schema lets such rows pass'
                )
            fate = self._id_of_fate(self.schema.scenarios.unseen)
            ids = [fate if number == UNSEEN else number for number in ids]
        old, new = pl.Series(names, dtype=pl.String), pl.Series(ids, dtype=pl.Int64)
        return column.replace_strict(old, new, default=DROPPED, return_dtype=pl.Int64).to_numpy(writable=True)

    @cached_property
    def _scenario_of(self) -> dict[str, int]:
        """Of the scenarios that training saw."""
        numbers = {name: number for number, name in enumerate(self.scenario_names)}
        return numbers | dict.fromkeys(self.rare, self._id_of_fate(self.schema.scenarios.rare))

    def _id_of_fate(self, fate: str) -> int:
        return self.num_scenarios - 1 if fate == "other" else DROPPED

    def _ids(self, values: pl.Series, feature: str) -> np.ndarray:
        """String values of a sparse or multi feature -> int32 ids; null is the empty cell."""
        if buckets := self.schema.feature(feature).buckets:
            known = values.drop_nulls().unique()
            numbers = pl.Series([_bucket(value, buckets) for value in known], dtype=pl.Int32) + FIRST_ID
        else:
            # A look-up by all of a large vocabulary would build its hash table for every chunk anew.
            id_of = self._id_of[feature]
            known = values.drop_nulls().unique()
            numbers = pl.Series([id_of.get(value, UNKNOWN_ID) for value in known], dtype=pl.Int32)
        return values.replace_strict(known, numbers, default=EMPTY_ID, return_dtype=pl.Int32).to_numpy()

    def ids_of(self, feature: FeatureSpec) -> Mapping[str, int]:
        """The values that have an id of their own in a sparse, multi or sequence feature; none where it has buckets."""
        return self._id_of.get(feature.item or feature.name, {})

    @cached_property
    def _id_of(self) -> dict[str, dict[str, int]]:
        return {
            feature: dict(zip(values, range(FIRST_ID, FIRST_ID + len(values)), strict=True))
            for feature, values in self.vocabularies.items()
        }

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
            "rare": dict(self.rare),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Encoder":
        """The encoder that :meth:`to_dict` described.

        Raises:
            InputError: the content is of another format, or parts of it are missing or of other types.
        """
        if content.get("format") != FORMAT:
            raise InputError(f"encoder: format {FORMAT} expected, got {shown(content.get('format'))}")
        encoder = cls(
            schema=Schema.from_dict(content["schema"], source="encoder"),
            scenario_names=tuple(content["scenario_names"]),
            vocabularies={name: tuple(values) for name, values in content["vocabularies"].items()},
            moments={name: (mean, deviation) for name, (mean, deviation) in content["moments"].items()},
            # Runs of version 0.1 know none.
            rare=dict(content.get("rare", {})),
        )
        encoder._require_parts()
        return encoder

    def _require_parts(self) -> None:
        needed = [feature.name for feature in categorical(self.schema) if not feature.buckets]
        lacking = [name for name in needed if name not in self.vocabularies]
        lacking += [feature.name for feature in self.schema.of_kind("dense") if feature.name not in self.moments]
        if lacking:
            raise InputError(f"encoder: holds nothing of {listed(lacking)}")
        for name, values in {"scenario_names": self.scenario_names, "rare": self.rare, **self.vocabularies}.items():
            if not all(isinstance(value, str) for value in values):
                raise InputError(f"encoder: {named(name)} must hold texts only")
        for name, pair in self.moments.items():
            if not all(type(value) in (int, float) and math.isfinite(value) for value in pair):
                raise InputError(f"encoder: {named(name)} must hold two finite numbers")


def categorical(schema: Schema) -> tuple[FeatureSpec, ...]:
    return (*schema.of_kind("sparse"), *schema.of_kind("multi"))


def _bucket(value: str, buckets: int) -> int:
    return _hash(value) % buckets


def _hash(value: str) -> int:
    """64 bits that are the same on every machine and in every version of their library."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


def flat(column: pl.Series, feature: FeatureSpec) -> pl.Series:
    """All values of a sparse or multi column, without the empty ones."""
    return column.drop_nulls() if feature.kind == "sparse" else _explode(_lists(column, feature))


def _lists(column: pl.Series, feature: FeatureSpec) -> pl.Series:
    """A bag or sequence column as List(String) without empty pieces; an empty cell is an empty list."""
    lists = as_lists(column, feature.separator)
    pieces = pl.col(column.name).list.eval(pl.element().filter(pl.element() != ""))
    return lists.to_frame().select(pieces.fill_null([])).to_series().cast(pl.List(pl.String))


def _explode(lists: pl.Series) -> pl.Series:
    """All elements in order. An empty list would become a null, so those are left out before."""
    return lists.filter(lists.list.len() > 0).explode()


def _label(frame: pl.DataFrame, schema: Schema) -> torch.Tensor | None:
    # A frame read for scoring may hold an unchecked label; a checked one is UInt8.
    if frame.schema.get(schema.label) != pl.UInt8:
        return None
    return torch.from_numpy(frame[schema.label].cast(pl.Float32).to_numpy(writable=True))


def _weight(frame: pl.DataFrame, schema: Schema) -> torch.Tensor | None:
    # As of the label: a checked one is Float64.
    if schema.weight is None or frame.schema.get(schema.weight) != pl.Float64:
        return None
    return torch.from_numpy(frame[schema.weight].cast(pl.Float32).to_numpy(writable=True))


def _group(frame: pl.DataFrame, schema: Schema) -> torch.Tensor | None:
    """A number for every value, seen in training or not: 64 bits, so that two of 10⁷ meet with probability 3e-6."""
    if schema.group is None or frame.schema.get(schema.group) != pl.String or frame[schema.group].null_count():
        return None
    values = frame[schema.group]
    known = values.unique()
    numbers = pl.Series([_hash(value) - 2**63 for value in known], dtype=pl.Int64)
    # Without a default, a column without rows would become one of objects.
    numbered = values.replace_strict(known, numbers, default=0, return_dtype=pl.Int64)
    return torch.from_numpy(numbered.to_numpy(writable=True))


def natural_order(names: list[str]) -> tuple[str, ...]:
    if all(INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
