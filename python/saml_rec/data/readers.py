"""Reading a table: a CSV or Parquet file becomes a data frame whose columns are what the schema says they are."""

import csv
import itertools
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from saml_rec.data.schema import Schema
from saml_rec.errors import InputError, did_you_mean

PARQUET_MAGIC = b"PAR1"
NOT_A_TABLE = (  # how other files begin that are easily mistaken for a table
    (b"\x1f\x8b", "is gzip-compressed"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook"),
    (b"\xff\xfe", "is UTF-16 text"),
    (b"\xfe\xff", "is UTF-16 text"),
)
HEAD_BYTES = 8192
LONGEST_CELL = 2**31 - 1
NOT_IN_CSV = (pl.Binary, pl.Duration, pl.Object)
LARGEST_FLOAT32 = 3.4028234e38
LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
SPLITS = ("train", "valid", "test")
SHORTENED = reprlib.Repr()  # of a cell, in an error message
SHORTENED.maxstring = 80
TIME = "a number or an ISO-8601 date or time"
TIME_TYPE = pl.Datetime("us", "UTC")


def read_frame(path: str | Path) -> pl.DataFrame:
    """Read a CSV or Parquet file as it is.

    Whether a file is Parquet is decided by its first bytes, not by its name. CSV is UTF-8 with a header, commas and
    double quotes; all its cells are read as the strings they are, so an id ``007`` stays ``007``.

    Args:
        path: the file.

    Returns:
        One row per row of the file, in its order, with all columns: String from CSV, null where a cell is empty and
        not quoted; from Parquet in the types of the file.

    Raises:
        InputError: the file cannot be read as a table.
    """
    path = Path(path)
    return _read_parquet(path) if _is_parquet(path) else _read_csv(path)


def require_csv_columns(path: str | Path) -> None:
    """Refuse a table with columns that CSV has no notation for, without reading its rows.

    Raises:
        InputError: a column of a Parquet file holds lists, structures, bytes or durations; or as :func:`read_frame`.
    """
    path = Path(path)
    if not _is_parquet(path):
        return
    with _parquet_errors(path):
        columns = pl.read_parquet_schema(path)
    for name, dtype in columns.items():
        if dtype.is_nested() or dtype in NOT_IN_CSV:
            raise InputError(f"{path}: column {name!r} holds {dtype}, which CSV cannot hold; write a .parquet file")


def read_table(path: str | Path, schema: Schema, *, need_label: bool = True, need_split: bool = True) -> pl.DataFrame:
    """Read a CSV or Parquet file as :func:`read_frame` does, and check every cell the schema speaks of.

    Args:
        path: the file.
        schema: the roles of its columns.
        need_label: False is for scoring: only the scenario and the features are needed and checked, and every other
            column is kept as it is. True drops the columns the schema does not mention.
        need_split: whether the time or split column is needed too; of no effect without ``need_label``.

    Returns:
        One row per row of the file, in its order. Label: UInt8 of 0 and 1. Scenario and sparse: String, an empty
        cell of a sparse column null. Dense: Float64, null where missing. Multi and sequence: String or List(String),
        as in the file. Time: Int64, Float64 or a UTC Datetime. Split column: ``train``, ``valid`` or ``test``.

    Raises:
        InputError: the file cannot be read as a table, lacks a column, or a cell is not what its column holds. Rows
            are counted from 1, the header not included.
    """
    return conform(read_frame(path), schema, source=str(path), need_label=need_label, need_split=need_split)


def conform(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    source: str = "data",
    need_label: bool = True,
    need_split: bool = True,
) -> pl.DataFrame:
    """Check a data frame and bring its columns to the types :func:`read_table` returns.

    ``source`` opens every error message; the other arguments, the result and the errors are those of
    :func:`read_table`.
    """
    rules = _rules(schema, need_label, need_split)
    for name in rules:
        if name not in frame.columns:
            raise InputError(_missing_column(frame, name, source))
    if frame.height == 0:
        raise InputError(f"{source} has a header but no rows")
    columns = [rule(frame[name], f"{source}: column {name!r}") for name, rule in rules.items()]
    return pl.DataFrame(columns) if need_label else frame.with_columns(columns)


def _rules(schema: Schema, need_label: bool, need_split: bool) -> dict[str, Callable[[pl.Series, str], pl.Series]]:
    """For each column the schema speaks of, what checks and converts it."""
    rules = {feature.name: _FEATURE_RULES[feature.kind] for feature in schema.features}
    # A scenario that is a feature too obeys the stricter rule: it may not be empty.
    rules[schema.scenario] = _scenario
    if need_label:
        rules[schema.label] = _label
        if need_split and schema.time is not None:
            rules[schema.time] = _time
        if need_split and schema.split_column is not None:
            rules[schema.split_column] = _split
    return rules


def _missing_column(frame: pl.DataFrame, name: str, source: str) -> str:
    message = f"{source} has no column {name!r}{did_you_mean(name, frame.columns)}"
    for separator, word in (("\t", "tabs"), (";", "semicolons")):
        if frame.width == 1 and separator in frame.columns[0]:
            return f"{message}; its header holds {word}: expected fields separated by commas"
    shown = ", ".join(repr(column) for column in frame.columns[:30])
    more = f" and {frame.width - 30} more" if frame.width > 30 else ""
    return f"{message}; it has {shown}{more}"


def _is_parquet(path: Path) -> bool:
    """Whether the file is Parquet; InputError where it is neither that nor text."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; expected one CSV or Parquet file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if head.startswith(PARQUET_MAGIC):
        return True
    expected = "expected CSV (UTF-8 text) or Parquet"
    for magic, what in NOT_A_TABLE:
        if head.startswith(magic):
            raise InputError(f"{path} {what}; {expected}")
    if b"\0" in head:
        raise InputError(f"{path} is a binary file; {expected}")
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise InputError(f"{path} is an HTML or XML page; {expected}")
    text = head.removeprefix(b"\xef\xbb\xbf")
    if not text.strip() and len(head) < HEAD_BYTES:
        raise InputError(f"{path} is empty")
    if text.startswith((b"\n", b"\r")):
        raise InputError(f"{path} begins with an empty line; expected the names of the columns")
    return False


def _read_parquet(path: Path) -> pl.DataFrame:
    with _parquet_errors(path), path.open("rb") as file:
        return pl.read_parquet(file)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    # Some kinds of damage make the reader panic.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise InputError(f"{path} begins like Parquet but cannot be read: {_first_line(error)}") from None


def _read_csv(path: Path) -> pl.DataFrame:
    try:
        # The header as a row first: read as a header, a repeated name would be renamed.
        header = pl.read_csv(path, has_header=False, infer_schema=False, n_rows=1, glob=False).row(0)
        names = ["" if name is None else name for name in header]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{path} has more than one column {name!r}")
        frame = pl.read_csv(path, infer_schema=False, glob=False)
    except pl.exceptions.NoDataError:
        raise InputError(f"{path} is empty") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(_why_no_csv(path, error)) from None
    frame = frame.head(max(0, frame.height - _blank_lines_at_end(path)))
    # The reader completes a short row with empty cells, so the last cell of such a row is empty.
    if frame.width > 1 and frame[:, -1].null_count() and (short := _first_ragged_row(path, frame.height)):
        raise InputError(short)
    return frame


def _first_ragged_row(path: Path, rows: int | None) -> str | None:
    """What to say of the first of so many rows whose number of fields is not that of the header."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            records = csv.reader(file)
            header = next(records)
            for number, record in enumerate(itertools.islice(records, rows), start=1):
                if len(record) != len(header):
                    hint = "; quote a field that holds commas" if len(record) > len(header) else ""
                    return f"{path}: row {number} has {len(record)} fields, the header has {len(header)}{hint}"
    finally:
        csv.field_size_limit(limit)
    return None


def _why_no_csv(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"{path} is not UTF-8 text (line {number}); expected CSV (UTF-8 text) or Parquet"
    if "more fields" in str(error) and (long := _first_ragged_row(path, None)):
        return long
    return f"{path} is not well-formed CSV: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n\n")[0].split())


def _blank_lines_at_end(path: Path) -> int:
    """Lines without any character after the last row; the reader would make rows of empty cells of them."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - HEAD_BYTES))
        tail = file.read().replace(b"\r\n", b"\n")
    return max(0, len(tail) - len(tail.rstrip(b"\n")) - 1)


def _refuse(is_bad: pl.Series, column: pl.Series, where: str, expected: str) -> None:
    """InputError with the first row in which ``is_bad`` is true."""
    row = is_bad.fill_null(True).arg_true()
    if len(row):
        value = column[int(row[0])]
        given = "an empty cell" if value is None or value == "" else SHORTENED.repr(value)
        raise InputError(f"{where}, row {row[0] + 1}: expected {expected}, got {given}")


def _text(column: pl.Series, where: str) -> pl.Series:
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


def _evaluate(column: pl.Series, expression: pl.Expr, where: str) -> pl.Series:
    try:
        return column.to_frame().select(expression.alias(column.name)).to_series()
    except pl.exceptions.PolarsError:
        raise InputError(f"{where} holds {column.dtype} that is not text") from None


def _number(column: pl.Series, where: str, expected: str) -> pl.Series:
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


def _label(column: pl.Series, where: str) -> pl.Series:
    text = _text(column, where).str.strip_chars().str.to_lowercase()
    label = text.replace_strict(list(LABELS), list(LABELS.values()), default=None, return_dtype=pl.UInt8)
    _refuse(label.is_null(), column, where, "a label of 0 or 1")
    return label


def _scenario(column: pl.Series, where: str) -> pl.Series:
    text = _text(column, where)
    _refuse(text.str.strip_chars() == "", column, where, "the name of a scenario")
    return text


def _split(column: pl.Series, where: str) -> pl.Series:
    text = _text(column, where)
    _refuse(~text.is_in(SPLITS), column, where, "train, valid or test")
    return text


def _dense(column: pl.Series, where: str) -> pl.Series:
    numbers = _number(column, where, "a number")
    out_of_range = (numbers.abs() > LARGEST_FLOAT32).fill_null(False)
    _refuse(out_of_range, column, where, "a finite number within the range of float32")
    return numbers


def _time(column: pl.Series, where: str) -> pl.Series:
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


def _time_from_text(text: pl.Series, where: str) -> pl.Series:
    """Int64 if every value is whole, else Float64 if the first value is a number, else a UTC Datetime.

    Null where a value is not a date; a value that is not a number where the first one is, is an InputError.
    """
    numbers = text.cast(pl.Float64, strict=False)
    if numbers[0] is not None:
        _refuse(numbers.is_null(), text, where, "a number, as in row 1")
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


def _values(column: pl.Series, where: str) -> pl.Series:
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


_FEATURE_RULES: dict[str, Callable[[pl.Series, str], pl.Series]] = {
    "sparse": _text,
    "multi": _values,
    "sequence": _values,
    "dense": _dense,
}
