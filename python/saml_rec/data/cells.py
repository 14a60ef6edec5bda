"""What the cells of a column hold, by its role in the schema: every cell is checked and converted, or refused."""

import reprlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import polars as pl

from saml_rec.data.schema import Schema
from saml_rec.data.splits import SPLITS
from saml_rec.errors import InputError, did_you_mean

LARGEST_FLOAT32 = 3.4028234e38
LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
SHORTENED = reprlib.Repr()  # of a cell, in an error message
SHORTENED.maxstring = 80
TIME = "a number or an ISO-8601 date or time"
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


@dataclass(frozen=True)
class _Where:
    """A column of some rows of a file, for error messages."""

    column: str
    first_row: int

    def __str__(self) -> str:
        return self.column


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
) -> pl.DataFrame:
    """Check rows of a table and bring their columns to the types that :func:`saml_rec.data.read_table` returns.

    Args:
        frame: the rows.
        schema: the roles of the columns.
        checks: which are needed; label and split unless given.
        source: opens every error message.
        first_row: how many rows of ``source`` come before these.

    Raises:
        InputError: a column is missing, or a cell is not what its column holds.
    """
    checks = checks or Checks()
    check_columns(frame.columns, schema, checks, source=source)
    columns = [
        rule(frame[name], _Where(f"{source}: column {name!r}", first_row))
        for name, rule in _rules(schema, checks).items()
    ]
    return frame.with_columns(columns) if checks.keep_others else pl.DataFrame(columns)


def _rules(schema: Schema, checks: Checks) -> dict[str, Callable[[pl.Series, _Where], pl.Series]]:
    """For each column that is needed, what checks and converts it."""
    rules = {feature.name: _FEATURE_RULES[feature.kind] for feature in schema.features}
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
    message = f"{source} has no column {name!r}{did_you_mean(name, columns)}"
    for separator, word in (("\t", "tabs"), (";", "semicolons")):
        if len(columns) == 1 and separator in columns[0]:
            return f"{message}; its header holds {word}: expected fields separated by commas"
    shown = ", ".join(repr(column) for column in columns[:30])
    more = f" and {len(columns) - 30} more" if len(columns) > 30 else ""
    return f"{message}; it has {shown}{more}"


def _refuse(is_bad: pl.Series, column: pl.Series, where: _Where, expected: str) -> None:
    """InputError with the first row in which ``is_bad`` is true."""
    row = is_bad.fill_null(True).arg_true()
    if len(row):
        value = column[int(row[0])]
        given = "an empty cell" if value is None or value == "" else SHORTENED.repr(value)
        raise InputError(f"{where}, row {where.first_row + int(row[0]) + 1}: expected {expected}, got {given}")


def _text(column: pl.Series, where: _Where) -> pl.Series:
    """Any column of single values as String, null where the cell is empty."""
    if column.dtype.is_nested() or column.dtype == pl.Object:
        raise InputError(f"{where} holds {column.dtype}; expected one value in each row")
    return _evaluate(column, _as_text(pl.col(column.name), column.dtype), where)


def _as_text(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Values as String, null where empty.

    Whole floats are written without a fraction: a column of integer ids that once had a gap comes as floats.
    """
    text = value.cast(pl.String)
    if dtype.is_float():
        is_whole = (value == value.floor()) & (value.abs() < 2.0**53)
        whole = pl.when(is_whole).then(value).cast(pl.Int64).cast(pl.String)
        text = pl.when(value.is_not_nan()).then(pl.coalesce(whole, text))
    return pl.when(text != "").then(text)


def _evaluate(column: pl.Series, expression: pl.Expr, where: _Where) -> pl.Series:
    try:
        return column.to_frame().select(expression.alias(column.name)).to_series()
    except pl.exceptions.PolarsError:
        raise InputError(f"{where} holds {column.dtype} that is not text") from None


def _number(column: pl.Series, where: _Where, expected: str) -> pl.Series:
    """Any numeric or text column as Float64, null where the cell is empty or not a number (NaN)."""
    if column.dtype.is_numeric() or column.dtype == pl.Boolean:
        numbers = column.cast(pl.Float64)
    elif column.dtype.is_temporal():
        raise InputError(f"{where} holds {column.dtype}; expected {expected}")
    else:
        text = _text(column, where).str.strip_chars()
        numbers = text.cast(pl.Float64, strict=False)
        _refuse(numbers.is_null() & (text != "").fill_null(False), column, where, expected)
    return numbers.fill_nan(None)


def _label(column: pl.Series, where: _Where) -> pl.Series:
    text = _text(column, where).str.strip_chars().str.to_lowercase()
    label = text.replace_strict(list(LABELS), list(LABELS.values()), default=None, return_dtype=pl.UInt8)
    _refuse(label.is_null(), column, where, "a label of 0 or 1")
    return label


def _scenario(column: pl.Series, where: _Where) -> pl.Series:
    text = _text(column, where)
    _refuse(text.str.strip_chars() == "", column, where, "the name of a scenario")
    return text


def _weight(column: pl.Series, where: _Where) -> pl.Series:
    expected = "a weight: a finite number of at least 0 within the range of float32"
    numbers = _number(column, where, expected)
    _refuse((numbers < 0) | (numbers > LARGEST_FLOAT32), column, where, expected)
    return numbers


def _group(column: pl.Series, where: _Where) -> pl.Series:
    text = _text(column, where)
    _refuse(text.is_null(), column, where, "the group of the row")
    return text


def _split(column: pl.Series, where: _Where) -> pl.Series:
    text = _text(column, where)
    _refuse(~text.is_in(SPLITS), column, where, "train, valid or test")
    return text


def _dense(column: pl.Series, where: _Where) -> pl.Series:
    numbers = _number(column, where, "a number")
    out_of_range = (numbers.abs() > LARGEST_FLOAT32).fill_null(False)
    _refuse(out_of_range, column, where, "a finite number within the range of float32")
    return numbers


def _time(column: pl.Series, where: _Where) -> pl.Series:
    dtype = column.dtype
    if isinstance(dtype, pl.Datetime):
        zoned = column.dt.replace_time_zone("UTC") if dtype.time_zone is None else column.dt.convert_time_zone("UTC")
        times = zoned.cast(TIME_TYPE)
    elif dtype == pl.Date:
        times = column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    elif dtype.is_integer() and dtype != pl.UInt64:
        times = column.cast(pl.Int64)
    elif dtype.is_numeric():
        times = _number(column, where, TIME)
    elif dtype.is_temporal() or dtype == pl.Boolean:
        raise InputError(f"{where} holds {dtype}; expected {TIME}")
    else:
        times = _time_from_text(_text(column, where).str.strip_chars(), where)
    is_bad = times.is_null()
    _refuse(is_bad | times.is_infinite() if times.dtype == pl.Float64 else is_bad, column, where, TIME)
    return times


def _time_from_text(text: pl.Series, where: _Where) -> pl.Series:
    """Int64 if every value is whole, else Float64 if the first value is a number, else a UTC Datetime.

    Null where a value is not a date; a value that is not a number where the first one is, is an InputError.
    """
    numbers = text.cast(pl.Float64, strict=False)
    if numbers[0] is not None:
        _refuse(numbers.is_null(), text, where, f"a number, as in row {where.first_row + 1}")
        # Nanoseconds since 1970 do not fit the 53 bits of a float.
        whole = text.cast(pl.Int64, strict=False)
        return numbers.fill_nan(None) if whole.null_count() else whole
    with_seconds_and_offset = (
        text.str.replace(" ", "T", literal=True)
        .str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00")
        .str.replace(r"(T\d{2}:\d{2})($|Z|[+-])", "${1}:00${2}")
        .str.replace(r"Z$", "+00:00")
        .str.replace(r"(T[0-9:.]+)$", "${1}+00:00")
    )
    return with_seconds_and_offset.str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f%z", strict=False, time_unit="us", time_zone="UTC"
    )


def _values(column: pl.Series, where: _Where) -> pl.Series:
    """A bag or a sequence: cells of separated values stay text, lists become lists of text."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not isinstance(column.dtype, pl.List):
        return _text(column, where)
    inner = column.dtype.inner
    assert isinstance(inner, pl.DataType)
    if inner.is_nested() or inner == pl.Object:
        raise InputError(f"{where} holds {column.dtype}; expected lists of single values")
    return _evaluate(column, pl.col(column.name).list.eval(_as_text(pl.element(), inner)), where)


_FEATURE_RULES: dict[str, Callable[[pl.Series, _Where], pl.Series]] = {
    "sparse": _text,
    "multi": _values,
    "sequence": _values,
    "dense": _dense,
}
