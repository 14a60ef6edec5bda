"""What the cells of a column hold, by its role in the schema: every cell is checked and converted, or refused."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import polars as pl

from saml_rec.data.refusal import Notations, Where, refuse
from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.data.splits import SPLITS
from saml_rec.data.values import single_values, value_lists
from saml_rec.errors import InputError, did_you_mean, listed, named

LARGEST_FLOAT32 = 3.4028234e38
LABELS = {"0": 0, "1": 1, "false": 0, "true": 1, "f": 0, "t": 1, "no": 0, "yes": 1, "n": 0, "y": 1}
"""Those that are not numbers, and the frequent ones; in lower case."""
MISSING = ("nan", "na", "n/a", "null", "none", "\\n")
"""What stands for a number that is not there; in lower case."""
DECIMALS = {".": "", ",": " with a decimal comma"}
SPLIT_NAMES = {"val": "valid", "validation": "valid"}
SEPARATOR = re.compile(r"[^\w.\"'-]")
"""What may separate names in a header."""
MOST_OF_HEADER = 10_000
TIME = "a number or an ISO-8601 date or time"
INTEGER_TIME = "a whole number from -2^63 to 2^63 - 1"
TIME_TYPE = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class Checks:
    """Which columns are needed.

    Args:
        label: the label, and the weight and group of a row, besides the scenario and the features.
        split: the time or split column.
        keep_others: whether columns that are not needed stay, as they are.
        only: these columns alone, of those above.
    """

    label: bool = True
    split: bool = True
    keep_others: bool = False
    only: Sequence[str] | None = None


def check_columns(columns: Collection[str], schema: Schema, checks: Checks, *, source: str) -> None:
    """Refuse a table without a column that is needed.

    Raises:
        InputError: with the name, and those that are there.
    """
    for name in _rules(schema, checks):
        if name not in columns:
            raise InputError(_missing_column(list(columns), name, source))


def conform(
    frame: pl.DataFrame,
    schema: Schema,
    checks: Checks | None = None,
    *,
    source: str = "data",
    first_row: int = 0,
    decimal: str = ".",
    notations: Notations | None = None,
) -> pl.DataFrame:
    """Check rows of a table and bring their columns to the types that :func:`saml_rec.data.read_table` returns.

    Args:
        frame: the rows.
        schema: the roles of the columns.
        checks: which are needed; label and split unless given.
        source: opens every error message.
        first_row: how many rows of ``source`` come before these.
        decimal: what separates the fraction of a number that is text, "." or ",".
        notations: of rows that came before.

    Raises:
        InputError: a column is missing, or a cell is not what its column holds.
    """
    checks = checks or Checks()
    check_columns(frame.columns, schema, checks, source=source)
    notations = notations or Notations()
    columns = [
        rule(frame[name], Where(source, name, first_row, decimal, notations))
        for name, rule in _rules(schema, checks).items()
    ]
    return frame.with_columns(columns) if checks.keep_others else pl.DataFrame(columns)


_Rule = Callable[[pl.Series, Where], pl.Series]
"""Checks and converts a column."""


def _rules(schema: Schema, checks: Checks) -> dict[str, _Rule]:
    """For each column that is needed, what checks and converts it."""
    rules: dict[str, _Rule] = {feature.name: _FEATURE_RULES[feature.kind](feature) for feature in schema.features}
    # A scenario that is a feature too obeys the stricter rule: it may not be empty.
    rules[schema.scenario] = _scenario
    if checks.label:
        rules[schema.label] = _label
        if schema.weight is not None:
            rules[schema.weight] = _weight
        if schema.group is not None and schema.group != schema.scenario:
            # A group that is a feature too obeys the stricter rule, as a scenario does.
            rules[schema.group] = _group
    if checks.split and schema.time is not None:
        rules[schema.time] = _time
    if checks.split and schema.split_column is not None:
        rules[schema.split_column] = _split
    return rules if checks.only is None else {name: rules[name] for name in checks.only}


def _missing_column(columns: list[str], name: str, source: str) -> str:
    message = f"{source} has no column {named(name)}{did_you_mean(name, columns)}"
    marks = Counter(SEPARATOR.findall(columns[0][:MOST_OF_HEADER])) if len(columns) == 1 else Counter()
    if marks:
        mark, _ = marks.most_common(1)[0]
        only = f"it has one column only, {named(columns[0])}"
        return f"{message}; {only}: if {mark!r} separates fields, name it with --separator"
    return f"{message}; it has {listed(columns)}"


def _number(column: pl.Series, where: Where, expected: str) -> pl.Series:
    """Any numeric or text column as Float64, null where the cell is empty, NaN or one of MISSING."""
    if column.dtype.is_numeric() or column.dtype == pl.Boolean:
        return column.cast(pl.Float64).fill_nan(None)
    if column.dtype.is_temporal():
        raise InputError(f"{where} holds {named(column.dtype)}; expected {expected}")
    text = single_values(column, where).str.strip_chars()
    numbers = _parsed(text, where)
    is_bad = numbers.is_null() & (text != "").fill_null(False)
    if is_bad.any():
        is_bad &= ~text.str.to_lowercase().is_in(MISSING).fill_null(False)
        refuse(is_bad, column, where, expected + DECIMALS[where.decimal], _hint(text, is_bad, where))
    return numbers.fill_nan(None)


def _hint(text: pl.Series, is_bad: pl.Series, where: Where) -> str:
    if where.decimal == "," or not text.filter(is_bad).head(1).str.contains(r"^[+-]?[0-9]*,[0-9]+$").any():
        return ""
    return "; if that is a decimal comma, say --decimal ,"


def _parsed(text: pl.Series, where: Where) -> pl.Series:
    """Text as Float64, null where it is no number as the file writes numbers."""
    if where.decimal == ",":
        text = text.set(text.str.contains(".", literal=True).fill_null(False), None)
        text = text.str.replace(",", ".", literal=True)
    return text.cast(pl.Float64, strict=False)


def _label(column: pl.Series, where: Where) -> pl.Series:
    """UInt8 of 0 and 1. A table has −1 in place of 0 or has none: beside 0 it would mean something else."""
    if column.dtype.is_numeric():
        numbers = column.cast(pl.Float64)
    else:
        text = single_values(column, where).str.strip_chars().str.to_lowercase()
        numbers = text.replace_strict(list(LABELS), list(LABELS.values()), default=None, return_dtype=pl.Float64)
        if numbers.null_count():
            numbers = numbers.fill_null(_parsed(text, where))
    refuse(~numbers.is_in([-1.0, 0.0, 1.0]), column, where, f"a label of 0 or 1{DECIMALS[where.decimal]}")
    negatives = numbers.filter(numbers < 1)
    if len(negatives):
        notations = where.notations
        notations.negative = negatives[0] if notations.negative is None else notations.negative
        is_other = (numbers < 1) & (numbers != notations.negative)
        refuse(is_other, column, where, f"a label of {notations.negative:.0f} or 1, as in the rows before")
    return (numbers == 1).cast(pl.UInt8)


def _scenario(column: pl.Series, where: Where) -> pl.Series:
    text = single_values(column, where)
    refuse(text.str.strip_chars() == "", column, where, "the name of a scenario")
    return text


def _weight(column: pl.Series, where: Where) -> pl.Series:
    expected = "a weight: a finite number of at least 0 within the range of float32"
    numbers = _number(column, where, expected)
    refuse((numbers < 0) | (numbers > LARGEST_FLOAT32), column, where, expected)
    return numbers


def _group(column: pl.Series, where: Where) -> pl.Series:
    text = single_values(column, where)
    refuse(text.is_null(), column, where, "the group of the row")
    return text


def _split(column: pl.Series, where: Where) -> pl.Series:
    text = single_values(column, where)
    names = text.str.strip_chars().str.to_lowercase().replace(SPLIT_NAMES)
    refuse(~names.is_in(SPLITS), column, where, "train, valid or test")
    return names


def _dense(column: pl.Series, where: Where) -> pl.Series:
    numbers = _number(column, where, "a number")
    out_of_range = (numbers.abs() > LARGEST_FLOAT32).fill_null(False)
    refuse(out_of_range, column, where, "a finite number within the range of float32")
    return numbers


def _time(column: pl.Series, where: Where) -> pl.Series:
    dtype = column.dtype
    if isinstance(dtype, pl.Datetime):
        zoned = column.dt.replace_time_zone("UTC") if dtype.time_zone is None else column.dt.convert_time_zone("UTC")
        times = zoned.cast(TIME_TYPE)
    elif dtype == pl.Date:
        times = column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    elif dtype.is_integer() or (dtype.is_decimal() and not dtype.scale):  # type: ignore[attr-defined]
        times = column.cast(pl.Int64, strict=False)
        refuse(times.is_null() & column.is_not_null(), column, where, INTEGER_TIME)
    elif dtype.is_numeric():
        times = _number(column, where, TIME)
    elif dtype.is_temporal() or dtype == pl.Boolean:
        raise InputError(f"{where} holds {named(dtype)}; expected {TIME}")
    else:
        times = _time_from_text(single_values(column, where).str.strip_chars(), where)
    is_bad = times.is_null()
    refuse(is_bad | times.is_infinite() if times.dtype == pl.Float64 else is_bad, column, where, TIME)
    return times


def _time_from_text(text: pl.Series, where: Where) -> pl.Series:
    """Int64 if every value is whole, else Float64 if the first value is a number, else a UTC Datetime.

    Null where a value is not a date; a value that is not a number where the first one is, is an InputError.
    """
    numbers = _parsed(text, where)
    if numbers[0] is not None:
        expected = f"a number, as in row {where.first_row + 1}{DECIMALS[where.decimal]}"
        refuse(numbers.is_null(), text, where, expected)
        # Nanoseconds since 1970 do not fit the 53 bits of a float.
        whole = text.cast(pl.Int64, strict=False)
        if not whole.null_count():
            return whole
        is_too_large = (numbers.abs() >= 2.0**63) & whole.is_null() & text.str.contains(r"^[+-]?[0-9]+$")
        refuse(is_too_large, text, where, INTEGER_TIME)
        return numbers.fill_nan(None)
    with_seconds_and_offset = (
        text.str.replace(" ", "T", literal=True)
        .str.replace(r"^(\d{4})/(\d{2})/(\d{2})", "${1}-${2}-${3}")
        .str.replace(r"[T ]?UTC$", "Z")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})(Z?)$", "${1}T00:00${2}")
        .str.replace(r"(T\d{2}:\d{2})($|Z|[+-])", "${1}:00${2}")
        .str.replace(r"Z$", "+00:00")
        .str.replace(r"(T[0-9:.]+[+-]\d{2})$", "${1}:00")
        .str.replace(r"(T[0-9:.]+)$", "${1}+00:00")
    )
    return with_seconds_and_offset.str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f%z", strict=False, time_unit="us", time_zone="UTC"
    )


def _values(feature: FeatureSpec) -> _Rule:
    in_order = feature.kind == "sequence"
    return lambda column, where: value_lists(column, feature.separator, where, in_order=in_order)


_FEATURE_RULES: dict[str, Callable[[FeatureSpec], _Rule]] = {
    "sparse": lambda _: single_values,
    "multi": _values,
    "sequence": _values,
    "dense": lambda _: _dense,
}
