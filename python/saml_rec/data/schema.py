"""The feature schema: which column of a table is what, and how each feature enters the model.

A schema is a TOML file::

    label = "label"
    scenario = "country"
    time = "ts"                       # split by time; without it a seeded random split
    split = [0.8, 0.1, 0.1]           # train, valid, test; or: split_column = "split"
    weight = "importance"             # what a row counts, in training and in metrics
    group = "user_id"                 # whose rows are ranked among themselves in GAUC

    [features.item_id]
    kind = "sparse"                   # sparse | multi | dense | sequence
    scenario_aware = true

    [features.history]
    kind = "sequence"
    item = "item_id"                  # shares the table of this sparse feature, which is also the attention query

    [scenarios]
    min_rows = 50                     # training rows that a scenario needs for a branch of its own
    rare = "other"                    # where its rows go if it has fewer: other | drop | refuse
    unseen = "other"                  # and those of a scenario without any
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from saml_rec.errors import MOST_OF_NAME, InputError, did_you_mean, named, shortened, shown
from saml_rec.toml_file import read_toml

Kind = Literal["sparse", "multi", "dense", "sequence"]
Pooling = Literal["mean", "sum"]
Fate = Literal["other", "drop", "refuse"]

DEFAULT_SPLIT = (0.8, 0.1, 0.1)
MAX_BUCKETS = 2**30  # ids are 32-bit integers
MAX_SIZE = 65536  # bound on dim, heads and max_length: beyond it a value is a slip of the keyboard
MAX_ROWS = 2**63 - 1  # what a count of rows can reach

_OPTIONAL_COLUMNS = ("time", "split_column", "weight", "group")
# The keys a feature of each kind may have besides "kind".
_KEYS: dict[str, tuple[str, ...]] = {
    "sparse": ("scenario_aware", "dim", "min_count", "buckets"),
    "multi": ("scenario_aware", "dim", "min_count", "buckets", "pooling", "separator"),
    "dense": (),
    "sequence": ("item", "max_length", "heads", "separator"),
}
_WHY_NOT = {
    ("dense", "scenario_aware"): "a dense feature has no embedding table, so it cannot have one per scenario",
    ("dense", "dim"): "a dense feature enters the model as a number, without an embedding",
    ("sequence", "dim"): "a sequence uses the table of its item and inherits dim from it",
    ("sequence", "scenario_aware"): "a sequence uses the tables of its item and inherits scenario_aware from it",
    ("sequence", "min_count"): "a sequence uses the vocabulary of its item; set min_count there",
    ("sequence", "buckets"): "a sequence has the ids of its item; set buckets there",
    ("sequence", "pooling"): "a sequence is read by attention, not pooled",
}


@dataclass(frozen=True)
class FeatureSpec:
    """One feature column.

    Attributes:
        name: the column in the table.
        kind: ``sparse`` (one value), ``multi`` (a bag of values), ``dense`` (a number) or ``sequence`` (values in
            order, newest last).
        scenario_aware: one local embedding table per scenario besides the global one. A sequence has its item's.
        dim: width of the embedding. A sequence has its item's.
        min_count: training occurrences a value needs to get an id of its own (sparse, multi).
        buckets: 0 for a vocabulary of the training rows' values; else values have no ids of their own but one of so
            many by their hash, those that training never saw too, and two values may share one (sparse, multi).
        pooling: how the embeddings of a bag become one vector (multi).
        item: the sparse feature whose table and vocabulary a sequence uses, and which is the attention query.
        max_length: the newest elements of a sequence that are kept.
        heads: attention heads of a sequence; must divide ``dim``.
        separator: what stands between the values of one cell (multi, sequence).

    Raises:
        InputError: a value is out of its range or not one this kind has.
    """

    name: str
    kind: Kind
    scenario_aware: bool = False
    dim: int = 16
    min_count: int = 1
    buckets: int = 0
    pooling: Pooling = "mean"
    item: str | None = None
    max_length: int = 50
    heads: int = 2
    separator: str = "|"

    def __post_init__(self) -> None:
        where = f"features.{_bare(self.name)}"
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"features: a feature name must be a non-empty string, not {shown(self.name)}")
        _check(where, "kind", self.kind)
        for key in _CHECKS.keys() - {"kind", "item"}:
            _check(where, key, getattr(self, key))
        if self.buckets and self.min_count > 1:
            raise InputError(f"{where}.min_count: a feature with buckets has no vocabulary; leave one of them out")
        if self.kind == "dense" and self.scenario_aware:
            raise InputError(f"{where}.scenario_aware: {_WHY_NOT['dense', 'scenario_aware']}")
        if self.kind == "sequence":
            if self.item is None:
                raise InputError(f"{where}.item is missing: a sequence names the sparse feature whose values it holds")
            _check(where, "item", self.item)
        elif self.item is not None:
            raise InputError(f"{where}.item: only a sequence has an item")


@dataclass(frozen=True)
class ScenarioRule:
    """What becomes of the rows of scenarios that have too few training rows, or none.

    ``other`` gives them a branch that they share, trained on the rare scenarios' rows; ``drop`` leaves them out, in
    training, measures and prediction; ``refuse`` is an error.

    Attributes:
        min_rows: training rows a scenario needs for a branch of its own; with fewer it is rare.
        rare: where the rows of rare scenarios go.
        unseen: where the rows of scenarios without a training row go.

    Raises:
        InputError: a value is out of its range, or rows are to share the branch of rare scenarios that has none.
    """

    min_rows: int = 1
    rare: Fate = "other"
    unseen: Fate = "refuse"

    def __post_init__(self) -> None:
        if type(self.min_rows) is not int or not 1 <= self.min_rows <= MAX_ROWS:
            raise InputError(f"scenarios.min_rows must be a whole number of at least 1, not {shown(self.min_rows)}")
        for key in ("rare", "unseen"):
            if (fate := getattr(self, key)) not in get_args(Fate):
                raise InputError(f"scenarios.{key} must be {', '.join(get_args(Fate))}, not {shown(fate)}")
        if self.unseen == "other" and (self.rare != "other" or self.min_rows == 1):
            raise InputError(
                'scenarios.unseen = "other": the branch of other scenarios is trained on the rows of rare ones; it '
                'needs min_rows above 1 and rare = "other"'
            )


@dataclass(frozen=True)
class Schema:
    """The roles of a table's columns.

    Attributes:
        label: column with 0 and 1.
        scenario: column that says which scenario a row belongs to; it may be a sparse feature too.
        features: at least one, in the order of the file.
        time: column that orders the rows for a split by time.
        split: fractions of the rows for training, validation and test; the last two may be 0.
        split_column: column with ``train``, ``valid`` or ``test`` in every row, in place of ``time`` and ``split``.
        scenarios: what becomes of scenarios with few training rows or none.
        weight: column with what each row counts in the loss and in metrics; 1 without it.
        group: column whose equal values make the groups of GAUC and of resampling; it may be a sparse feature, or the
            scenario.

    A sequence among ``features`` takes ``dim`` and ``scenario_aware`` from its item on construction.

    Raises:
        InputError: two roles share a column, the label, time, split or weight column is a feature, the scenario or
            group column is a feature that is not sparse, a sequence's item is not a sparse feature, heads do not divide
            the width, or the fractions do not sum to 1.
    """

    label: str
    scenario: str
    features: tuple[FeatureSpec, ...]
    time: str | None = None
    split: tuple[float, float, float] = DEFAULT_SPLIT
    split_column: str | None = None
    scenarios: ScenarioRule = ScenarioRule()
    weight: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        self._check_roles()
        _check_split(self.split)
        if self.split_column is not None and (self.time is not None or tuple(self.split) != DEFAULT_SPLIT):
            raise InputError("split_column says where each row goes: it cannot stand together with split or time")
        object.__setattr__(self, "split", tuple(float(part) for part in self.split))
        if not self.features:
            raise InputError("features: at least one feature is needed")
        names = [feature.name for feature in self.features]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"features.{_bare(twice)} is given twice")
        self._check_features()
        by_name = {feature.name: feature for feature in self.features}
        object.__setattr__(self, "features", tuple(_inherit(feature, by_name) for feature in self.features))

    def _check_roles(self) -> None:
        roles = {"label": self.label, "scenario": self.scenario}
        roles |= {key: getattr(self, key) for key in _OPTIONAL_COLUMNS if getattr(self, key) is not None}
        column_of: dict[str, str] = {}
        for role, column in roles.items():
            if not isinstance(column, str) or not column:
                raise InputError(f"{role} must be the name of a column, not {shown(column)}")
            if column in column_of and (role, column_of[column]) != ("group", "scenario"):
                raise InputError(f"{role} and {column_of[column]} are both column {named(column)}; they must differ")
            column_of[column] = role

    def _check_features(self) -> None:
        leaks = {
            self.label: "it is the label, so the model would read what it has to predict",
            self.time: "it is the time column, which separates the splits, so it would tell training from test rows",
            self.split_column: "it is the split column, so it would tell training from test rows",
            self.weight: "it is the weight column, which may depend on the label and is not known in prediction",
        }
        for feature in self.features:
            if feature.name in leaks:
                raise InputError(f"features.{_bare(feature.name)} would leak: {leaks[feature.name]}")
            if feature.name == self.scenario and feature.kind != "sparse":
                raise InputError(f"features.{_bare(feature.name)}.kind must be sparse: it is the scenario column")
            if feature.name == self.group and feature.kind != "sparse":
                raise InputError(f"features.{_bare(feature.name)}.kind must be sparse: it is the group column")

    def of_kind(self, kind: Kind) -> tuple[FeatureSpec, ...]:
        """The features of one kind, in schema order."""
        return tuple(feature for feature in self.features if feature.kind == kind)

    def feature(self, name: str) -> FeatureSpec:
        """The feature with this name.

        Raises:
            InputError: there is none.
        """
        for feature in self.features:
            if feature.name == name:
                return feature
        raise InputError(f"no feature {named(name)} in the schema{did_you_mean(name, [f.name for f in self.features])}")

    def to_dict(self) -> dict[str, Any]:
        """The mapping its TOML file would hold; :meth:`from_dict` gives an equal schema back."""
        result: dict[str, Any] = {"label": self.label, "scenario": self.scenario}
        if self.split_column is not None:
            result["split_column"] = self.split_column
        else:
            result |= {"time": self.time} if self.time is not None else {}
            result["split"] = list(self.split)
        result |= {key: getattr(self, key) for key in ("weight", "group") if getattr(self, key) is not None}
        if self.scenarios != ScenarioRule():
            result["scenarios"] = dataclasses.asdict(self.scenarios)
        result["features"] = {
            feature.name: {"kind": feature.kind} | {key: getattr(feature, key) for key in _KEYS[feature.kind]}
            for feature in self.features
        }
        return result

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str = "schema") -> "Schema":
        """The schema a TOML file's mapping describes.

        Args:
            mapping: what ``tomllib`` gives for the file.
            source: opens every error message, usually the file's path.

        Raises:
            InputError: any mistake, with the key it is in.
        """
        try:
            return _parse(mapping)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def load_schema(path: str | Path) -> Schema:
    """Read a schema from a TOML file (UTF-8).

    Raises:
        InputError: the file cannot be read, is not TOML, or describes no valid schema; names the file and the key.
    """
    return Schema.from_dict(read_toml(Path(path), "schema file"), source=str(path))


def _parse(mapping: Mapping[str, Any]) -> Schema:
    known = [field.name for field in dataclasses.fields(Schema)]
    for key in mapping:
        if key not in known:
            raise InputError(f"unknown key {named(key)}{did_you_mean(key, known)}; known keys: {', '.join(known)}")
    for key in ("label", "scenario", "features"):
        if key not in mapping:
            raise InputError(f"{key} is missing")
    if "split_column" in mapping:
        for key in ("split", "time"):
            if key in mapping:
                raise InputError(f"split_column says where each row goes: it cannot stand together with {key}")
    features = mapping["features"]
    if not isinstance(features, Mapping):
        raise InputError("features must be tables such as [features.item_id]")
    given = {key: value for key, value in mapping.items() if key != "features"}
    if "scenarios" in given:
        given["scenarios"] = _parse_scenarios(given["scenarios"])
    for key in ("label", "scenario", *_OPTIONAL_COLUMNS):
        if key in given and not isinstance(given[key], str):
            raise InputError(f"{key} must be the name of a column, not {shown(given[key])}")
    return Schema(**given, features=tuple(_parse_feature(name, table) for name, table in features.items()))


def _parse_scenarios(table: Any) -> ScenarioRule:
    known = [field.name for field in dataclasses.fields(ScenarioRule)]
    if not isinstance(table, Mapping):
        raise InputError(f"scenarios must be a table with {', '.join(known)}, not {shown(table, 40)}")
    for key in table:
        if key not in known:
            raise InputError(
                f"scenarios: unknown key {named(key)}{did_you_mean(key, known)}; known keys: {', '.join(known)}"
            )
    return ScenarioRule(**table)


def _parse_feature(name: str, table: Any) -> FeatureSpec:
    where = f"features.{_bare(name)}"
    if not isinstance(table, Mapping):
        raise InputError(f"{where} must be a table with at least kind, not {shown(table, 40)}")
    if "kind" not in table:
        raise InputError(f"{where}.kind is missing; one of {', '.join(_KEYS)}")
    _check(where, "kind", table["kind"])
    kind: Kind = table["kind"]
    for key in table:
        if key in ("kind", *_KEYS[kind]):
            continue
        if reason := _WHY_NOT.get((kind, key)):
            raise InputError(f"{where}.{key}: {reason}")
        if key in _CHECKS:
            raise InputError(f"{where}.{_bare(key)} does not apply to a {kind} feature")
        known = ("kind", *_KEYS[kind])
        raise InputError(f"{where}: unknown key {named(key)}{did_you_mean(key, known)}; known keys: {', '.join(known)}")
    for key in table:
        _check(where, key, table[key])
    return FeatureSpec(name=name, **table)


def _bare(name: str) -> str:
    return shortened(name, MOST_OF_NAME)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


# For each key of a feature: when a value is right, and what to say when it is not.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: isinstance(value, str) and value in _KEYS, f"one of {', '.join(_KEYS)}"),
    "scenario_aware": (lambda value: isinstance(value, bool), "true or false"),
    "dim": (_is_size, f"a whole number from 1 to {MAX_SIZE}"),
    "min_count": (lambda value: type(value) is int and 1 <= value <= MAX_ROWS, "a whole number of at least 1"),
    "buckets": (
        lambda value: type(value) is int and 0 <= value <= MAX_BUCKETS,
        f"a whole number from 1 to {MAX_BUCKETS}, or 0 for a vocabulary",
    ),
    "pooling": (lambda value: value in ("mean", "sum"), "mean or sum"),
    "item": (_is_text, "the name of a sparse feature"),
    "max_length": (_is_size, f"a whole number from 1 to {MAX_SIZE}"),
    "heads": (_is_size, f"a whole number from 1 to {MAX_SIZE}"),
    "separator": (_is_text, "a non-empty string"),
}


def _check(where: str, key: str, value: Any) -> None:
    is_right, expected = _CHECKS[key]
    if not is_right(value):
        suggestion = did_you_mean(value, _KEYS) if key == "kind" and isinstance(value, str) else ""
        raise InputError(f"{where}.{key} must be {expected}, not {shown(value, 40)}{suggestion}")


def _check_split(split: Any) -> None:
    is_triple = isinstance(split, (list, tuple)) and len(split) == 3
    if not is_triple or not all(type(part) in (int, float) and abs(part) <= MAX_SIZE for part in split):
        raise InputError(
            f"split must be three fractions (train, valid, test) such as [0.8, 0.1, 0.1], not {shown(split)}"
        )
    if split[0] <= 0 or min(split) < 0:
        raise InputError(
            f"split: the fraction for training must be positive and none negative, not {shown(list(split))}"
        )
    if abs(math.fsum(split) - 1) > 1e-6:
        raise InputError(f"split: the fractions must sum to 1; {shown(list(split))} sum to {math.fsum(split):g}")


def _inherit(feature: FeatureSpec, by_name: Mapping[str, FeatureSpec]) -> FeatureSpec:
    """A sequence with the width and the local tables of its item; any other feature as it is."""
    if feature.kind != "sequence":
        return feature
    where = f"features.{_bare(feature.name)}"
    assert feature.item is not None
    item = by_name.get(feature.item)
    sparse = [name for name, other in by_name.items() if other.kind == "sparse"]
    if item is None:
        raise InputError(f"{where}.item: there is no feature {named(feature.item)}{did_you_mean(feature.item, sparse)}")
    if item.kind != "sparse":
        raise InputError(f"{where}.item must be a sparse feature; {named(feature.item)} is {item.kind}")
    if item.dim % feature.heads:
        raise InputError(
            f"{where}.heads must divide the dim of its item: {feature.heads} heads, "
            f"{_bare(feature.item)}.dim = {item.dim}"
        )
    return dataclasses.replace(feature, dim=item.dim, scenario_aware=item.scenario_aware)
