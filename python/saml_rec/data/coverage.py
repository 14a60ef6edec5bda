"""How much of each feature reaches a model: shares of empty cells and of unknown values, and what is said of them.

A value that means nothing to the model is an id of 1 and no error: a column in another notation than the schema's, or
whose ids are spelled otherwise than in training, would pass for one that is empty.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from saml_rec.data.encoding import EMPTY_ID, UNKNOWN_ID, Encoder, flat
from saml_rec.data.schema import FeatureSpec
from saml_rec.data.splits import SPLITS
from saml_rec.data.table import EncodedTable
from saml_rec.errors import InputError, named, shown

LEAST_VALUES = 20
"""Values of which none is known for that to be no accident."""
NOTABLE = 0.5
"""A share of unknown values that is worth a line."""
APART = 0.3
"""And how much the shares of empty cells have to differ."""
SEPARATORS = ("|", ";", ",", "\t", " ", "/")
LOOKED_AT = 1000
"""Values, for an example of one that is unknown, or for what they have in common."""
MOST_DIGITS = 12
MOST_OF_EXAMPLE = 20
"""Characters of a value; two stand beside the name of a feature."""

Shares = Mapping[str, Mapping[str, float | None]]
"""By feature: the share ``empty`` of its cells and, but for dense ones, ``unknown`` of its values; None of nothing."""


@dataclass
class Count:
    """Of one feature in some rows.

    Attributes:
        rows: in all.
        empty: of them those without a value.
        values: of all rows; of a sequence those that are kept.
        unknown: of the values those without an id of their own.
        example: one of these.
    """

    rows: int = 0
    empty: int = 0
    values: int = 0
    unknown: int = 0
    example: str | None = None

    @property
    def known(self) -> int:
        return self.values - self.unknown

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.rows + other.rows,
            self.empty + other.empty,
            self.values + other.values,
            self.unknown + other.unknown,
            other.example if self.example is None else self.example,
        )


class Coverage:
    """Counts of every feature, added up over chunks of rows.

    Args:
        encoder: of the rows.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.counts = {feature.name: Count() for feature in encoder.schema.features}

    def add(self, frame: pl.DataFrame, table: EncodedTable) -> None:
        """More rows, as they were checked and as they were encoded."""
        schema, rows = self._encoder.schema, len(table)
        for position, feature in enumerate(schema.of_kind("dense")):
            self._add(feature, Count(rows, int(table.dense[:, 2 * position + 1].sum())), frame)
        for name, ids in table.sparse.items():
            empty = int((ids == EMPTY_ID).sum())
            self._add(schema.feature(name), Count(rows, empty, rows - empty, int((ids == UNKNOWN_ID).sum())), frame)
        for name, ragged in table.ragged.items():
            empty = int((ragged.offsets.diff() == 0).sum())
            count = Count(rows, empty, len(ragged.values), int((ragged.values == UNKNOWN_ID).sum()))
            self._add(schema.feature(name), count, frame)

    def _add(self, feature: FeatureSpec, count: Count, frame: pl.DataFrame) -> None:
        known = self.counts[feature.name]
        if count.unknown and known.example is None:
            vocabulary = self._encoder.ids_of(feature)
            values = flat(frame[feature.name], feature).unique(maintain_order=True).head(LOOKED_AT)
            count.example = next((value for value in values if value not in vocabulary), None)
        self.counts[feature.name] = known + count

    def shares(self) -> dict[str, dict[str, float | None]]:
        """See :data:`Shares`; rows that were left out do not count."""
        dense = {feature.name for feature in self._encoder.schema.of_kind("dense")}
        result: dict[str, dict[str, float | None]] = {}
        for name, count in self.counts.items():
            result[name] = {"empty": _share(count.empty, count.rows)}
            if name not in dense:
                result[name]["unknown"] = _share(count.unknown, count.values)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` gives it back."""
        return {name: dataclasses.asdict(count) for name, count in self.counts.items()}

    @classmethod
    def from_dict(cls, encoder: Encoder, content: Mapping[str, Any]) -> "Coverage":
        """What :meth:`to_dict` gave."""
        result = cls(encoder)
        result.counts = {name: Count(**count) for name, count in content.items()}
        return result


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def check_coverage(encoder: Encoder, splits: Mapping[str, Coverage]) -> None:
    """Refuses a feature that can teach a model nothing, or whose lessons no validation or test row has a use for.

    Args:
        encoder: of the rows.
        splits: the counts of every split.

    Raises:
        InputError: no training row has a value of a sparse or multi feature, or no value occurs often enough to be
            known; LEAST_VALUES or more elements of a sequence in training rows, or values of any feature in validation
            and test rows, are all unknown.
    """
    for feature in encoder.schema.features:
        if feature.kind == "dense" or feature.buckets:
            continue
        train, valid, test = (splits[name].counts[feature.name] for name in SPLITS)
        held_out = valid + test
        if feature.kind != "sequence" and not train.known:
            why = (
                f"none of the {train.values:,} values of the training rows occurs min_count = {feature.min_count} times"
                if train.values
                else f"all {train.rows:,} training rows are empty"
            )
            raise InputError(f"feature {named(feature.name)}: {why}, so that a model would learn nothing from it")
        if feature.kind == "sequence" and train.values >= LEAST_VALUES and not train.known:
            raise InputError(f"{_all_unknown(encoder, feature, train, 'training rows')}{_advice(feature)}")
        if train.known and held_out.values >= LEAST_VALUES and not held_out.known:
            raise InputError(
                f"{_all_unknown(encoder, feature, held_out, 'validation and test rows')}{_advice(feature)}"
            )


def _advice(feature: FeatureSpec) -> str:
    own = "" if feature.kind == "sequence" else ", or give it buckets"
    return f"; spell them alike, or leave the feature out of the schema{own}"


def _all_unknown(encoder: Encoder, feature: FeatureSpec, count: Count, where: str) -> str:
    item = encoder.schema.feature(feature.item) if feature.item else feature
    of_item = " of its item" if feature.item else ""
    often = f" that occur min_count = {item.min_count} times" if item.min_count > 1 else ""
    example = ""
    if count.example is not None:
        example = f", such as {shown(count.example, MOST_OF_EXAMPLE)}{_cause(encoder, feature, count.example)}"
    return (
        f"feature {named(feature.name)}: none of the {count.values:,} values of the {where} is among those{of_item} in "
        f"training rows{often}{example}"
    )


# How one program spells what another spells otherwise.
_RESPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda value: re.sub(r"\.0+$", "", value),
    lambda value: f"{value}.0",
    str.strip,
    str.lower,
    str.upper,
    str.title,
    lambda value: value.strip("'\""),
    lambda value: value.lstrip("0"),
    *(lambda value, digits=digits: value.zfill(digits) for digits in range(2, MOST_DIGITS + 1)),
)


def _cause(encoder: Encoder, feature: FeatureSpec, value: str) -> str:
    """What the value would be to training if it were spelled or taken apart otherwise."""
    known = encoder.ids_of(feature)
    for respell in _RESPELLINGS:
        if (other := respell(value)) in known:
            return f", where training has {shown(other, MOST_OF_EXAMPLE)}"
    if feature.kind == "sparse":
        return ""
    for separator in SEPARATORS:
        if separator != feature.separator and separator in value:
            pieces = [respell(piece) for piece in value.split(separator) for respell in (str.strip, *_RESPELLINGS)]
            if any(piece in known for piece in pieces):
                return f"; its separator is {separator!r}, and {named(feature.separator)} in the schema"
    return ""


def prepared_lines(encoder: Encoder, splits: Mapping[str, Coverage]) -> list[str]:
    """What is worth a line of a table that was prepared for training."""
    shares = {name: coverage.shares() for name, coverage in splits.items()}
    lines = []
    for feature in encoder.schema.features:
        own = {name: each[feature.name] for name, each in shares.items()}
        unknown = {name: share.get("unknown") for name, share in own.items()}
        empty = {name: share["empty"] for name, share in own.items()}
        if any((share or 0) >= NOTABLE for share in unknown.values()):
            lines.append(f"feature {named(feature.name)}: {_listed('unknown values', unknown)}")
        if empty["train"] == 1 or any(_are_apart(share, empty["train"]) for share in empty.values()):
            lines.append(f"feature {named(feature.name)}: {_listed('empty cells', empty)}")
        if feature.kind == "multi" and (separator := _other_separator(encoder, feature, splits["train"])):
            lines.append(
                f"feature {named(feature.name)}: no cell holds its separator {named(feature.separator)}, most hold "
                f"{separator!r}: if that separates values, say so in the schema"
            )
    return lines


def _are_apart(share: float | None, of_training: float | None) -> bool:
    return share is not None and of_training is not None and abs(share - of_training) >= APART


def _listed(what: str, shares: Mapping[str, float | None]) -> str:
    there = [f"{share:.0%} of {name}" for name, share in shares.items() if share is not None]
    return f"{what} are {', '.join(there)}"


def _other_separator(encoder: Encoder, feature: FeatureSpec, train: Coverage) -> str | None:
    """What most values of a bag hold if no bag has two values."""
    count = train.counts[feature.name]
    values = encoder.vocabularies.get(feature.name, ())[:LOOKED_AT]
    if not values or count.values > count.rows - count.empty:
        return None
    for separator in SEPARATORS[:4]:
        if separator != feature.separator and 2 * sum(separator in value for value in values) > len(values):
            return separator
    return None


def checked_shares(of_splits: Any) -> Mapping[str, Shares]:
    """Shares by split as a file has them.

    Raises:
        Exception: of several kinds, where they are none.
    """
    for shares in of_splits.values():
        for share in (each for feature in shares.values() for each in feature.values()):
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"a share of a feature's cells is {shown(share)}")
    checked: Mapping[str, Shares] = of_splits
    return checked


def scored_lines(encoder: Encoder, scored: Coverage, of_training: Mapping[str, Shares]) -> Iterator[tuple[bool, str]]:
    """What is worth a line of a table that was scored, each with whether it is a warning.

    Args:
        encoder: of the rows.
        scored: their counts.
        of_training: the shares of the splits of training; empty for a run that did not keep them.
    """
    train = of_training.get("train", {})
    shares = scored.shares()
    for feature in encoder.schema.features:
        count, own, then = scored.counts[feature.name], shares[feature.name], train.get(feature.name, {})
        if count.values and not count.known and then.get("unknown") != 1:
            yield True, _all_unknown(encoder, feature, count, "rows")
        elif (own.get("unknown") or 0) >= NOTABLE:
            yield False, f"feature {named(feature.name)}: unknown to the model are {own['unknown']:.0%} of its values"
        if _are_apart(own["empty"], then.get("empty")):
            yield (
                own["empty"] == 1,
                f"feature {named(feature.name)}: empty are {own['empty']:.0%} of its cells, {then['empty']:.0%} in "
                "training",
            )
