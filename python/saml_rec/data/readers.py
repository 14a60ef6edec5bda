"""Reading a table: CSV and Parquet files as a stream of data frames, a bounded number of rows at a time."""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from saml_rec.data.cells import Checks, check_columns, conform
from saml_rec.data.schema import Schema
from saml_rec.data.sources import DAMAGED, HEAD_BYTES, Paths, is_compressed, is_parquet, named, open_bytes, table_files
from saml_rec.errors import InputError

CHUNK_ROWS = 2**17
LONGEST_CELL = 2**31 - 1
NOT_IN_CSV = (pl.Binary, pl.Duration, pl.Object)

Columns = Mapping[str, pl.DataType]
"""Names and types, in order."""


def read_frame(path: str | Path) -> pl.DataFrame:
    """Read a CSV or Parquet file as it is.

    Whether a file is Parquet is decided by its first bytes, not by its name. CSV is UTF-8 with a header, commas and
    double quotes, plain or compressed by gzip or zstd; all its cells are read as the strings they are, so an id ``007``
    stays ``007``.

    Args:
        path: the file.

    Returns:
        One row per row of the file, in its order, with all columns: String from CSV, null where a cell is empty and
        not quoted; from Parquet in the types of the file.

    Raises:
        InputError: the file cannot be read as a table.
    """
    path = Path(path)
    return pl.concat([pl.DataFrame(schema=dict(columns_of(path))), *frames(path)])


def columns_of(path: Path) -> Columns:
    """The columns of a file, without reading its rows; those of CSV are String.

    Raises:
        InputError: the file cannot be read as a table.
    """
    if is_parquet(path):
        with _parquet_errors(path):
            return pl.read_parquet_schema(path)
    with _csv_errors(path):
        # As a row: read as a header, a repeated name would be renamed.
        header = pl.read_csv(path, has_header=False, infer_schema=False, n_rows=1, glob=False).row(0)
    names = ["" if name is None else name for name in header]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} has more than one column {name!r}")
    return {name: pl.String() for name in names}


def require_csv_columns(paths: Paths) -> None:
    """Refuse a table with columns that CSV has no notation for, without reading its rows.

    Raises:
        InputError: a column of a Parquet file holds lists, structures, bytes or durations; or as :func:`read_frame`.
    """
    for path in table_files(paths):
        for name, dtype in columns_of(path).items():
            if dtype.is_nested() or dtype in NOT_IN_CSV:
                raise InputError(f"{path}: column {name!r} holds {dtype}, which CSV cannot hold; write a .parquet file")


def frames(path: Path, columns: Sequence[str] | None = None, rows: int | None = None) -> Iterator[pl.DataFrame]:
    """The rows of a file as :func:`read_frame` gives them.

    Args:
        path: the file.
        columns: those that are read, all unless given. Rows of CSV with too few fields show where all are read only.
        rows: at most so many at a time; CHUNK_ROWS unless given.

    Raises:
        InputError: the file cannot be read as a table.
    """
    names = columns_of(path)
    rows = rows or CHUNK_ROWS
    if is_parquet(path):
        with _parquet_errors(path):
            yield from _collect(pl.scan_parquet(path, glob=False), columns, rows)
        return
    with _csv_errors(path):
        found = _collect(pl.scan_csv(path, infer_schema=False, glob=False), columns, rows)
        yield from _without_blank_end(found, path, None if columns else list(names)[-1])


def _collect(table: pl.LazyFrame, columns: Sequence[str] | None, rows: int) -> Iterator[pl.DataFrame]:
    if columns is not None:
        table = table.select(columns)
    return iter(table.collect_batches(chunk_size=rows, maintain_order=True))


def _without_blank_end(chunks: Iterator[pl.DataFrame], path: Path, last_column: str | None) -> Iterator[pl.DataFrame]:
    """Chunks of CSV without the rows of empty cells that the reader makes of blank lines at the end.

    The reader completes a short row with empty cells: the first empty cell in ``last_column`` has the file looked at.
    """
    suspect = last_column is not None
    rows = 0
    held: list[pl.DataFrame] = []
    for chunk in chunks:
        if chunk.is_empty():
            continue
        blank = chunk.select(pl.all_horizontal(pl.all().is_null())).to_series()
        end = chunk.height - int(blank.reverse().cum_prod().sum()) if blank[-1] else chunk.height
        if end == 0:
            held.append(chunk)
            continue
        whole, held = pl.concat([*held, chunk.head(end)]), [chunk.slice(end)]
        rows += whole.height
        if suspect and last_column and chunk.width > 1 and whole[last_column].null_count():
            suspect = False
            if _may_be_ragged(path, chunk.width) and (short := _first_ragged_row(path)):
                raise InputError(short)
        yield whole
    left = pl.concat(held) if held else pl.DataFrame()
    if (kept := left.height - _blank_lines_at_end(path)) > 0:
        if suspect and left.width > 1 and (short := _first_ragged_row(path, rows + kept)):
            raise InputError(short)
        yield left.head(kept)


class TableFiles:
    """The files of a table as one stream of checked rows.

    Args:
        paths: as :func:`saml_rec.data.sources.table_files` takes them.
        schema: the roles of the columns.

    Raises:
        InputError: there is no such file, or one is no table.
    """

    def __init__(self, paths: Paths, schema: Schema) -> None:
        self.files = table_files(paths)
        self.schema = schema
        self.columns = {file: columns_of(file) for file in self.files}

    @property
    def name(self) -> str:
        """For messages about all of it."""
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"

    def require(self, checks: Checks) -> None:
        """Refuses files that lack a column, before any row is read.

        Raises:
            InputError: a column that the checks need is not in one of the files.
        """
        for file, columns in self.columns.items():
            check_columns(columns, self.schema, checks, source=str(file))

    def checked(self, checks: Checks) -> Iterator[pl.DataFrame]:
        """All rows in order as :func:`saml_rec.data.cells.conform` gives them, in frames as of :func:`rebatched`.

        How the rows lie in files does not show, but where their columns have other types.

        Raises:
            InputError: as :func:`read_table`.
        """
        return rebatched((checked for _, checked in self.pairs(checks)), CHUNK_ROWS)

    def pairs(self, checks: Checks, chunk_rows: int | None = None) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """Rows as they are, and checked; those of the columns alone where ``checks.only`` names some.

        At most ``chunk_rows`` at a time, CHUNK_ROWS unless given.

        Raises:
            InputError: as :func:`read_table`.
        """
        self.require(checks)
        rows = 0
        by_number: bool | None = None
        for file in self.files:
            first = 0
            for frame in frames(file, checks.only, chunk_rows):
                checked = conform(frame, self.schema, checks, source=str(file), first_row=first)
                if self.schema.time in checked.columns and checks.split:
                    is_number = checked[self.schema.time].dtype.is_numeric()
                    if by_number not in (None, is_number):
                        expected = "a number" if by_number else "a date"
                        raise InputError(
                            f"{file}: column {self.schema.time!r}, row {first + 1}: expected {expected}, as in the "
                            f"rows before, got {frame[self.schema.time][0]!r}"
                        )
                    by_number = is_number
                yield frame, checked
                first += frame.height
            rows += first
        if rows == 0:
            raise InputError(f"{self.name} has a header but no rows")


def read_table(paths: Paths, schema: Schema, *, need_label: bool = True, need_split: bool = True) -> pl.DataFrame:
    """Read CSV or Parquet files as :func:`read_frame` does, and check every cell the schema speaks of.

    Args:
        paths: the files, as :func:`saml_rec.data.sources.table_files` takes them.
        schema: the roles of their columns.
        need_label: False is for scoring: only the scenario and the features are needed and checked, and every other
            column is kept as it is. True drops the columns the schema does not mention.
        need_split: whether the time or split column is needed too; of no effect without ``need_label``.

    Returns:
        One row per row of the files, in their order. Label: UInt8 of 0 and 1. Scenario and sparse: String, an empty
        cell of a sparse column null. Dense: Float64, null where missing. Multi and sequence: String or List(String),
        as in the file. Time: Int64, Float64 or a UTC Datetime. Split column: ``train``, ``valid`` or ``test``.

    Raises:
        InputError: a file cannot be read as a table, lacks a column, or a cell is not what its column holds. Rows
            are counted from 1 in each file, the header not included.
    """
    checks = Checks(label=need_label, split=need_label and need_split, keep_others=not need_label)
    return _joined(list(TableFiles(paths, schema).checked(checks)), named(paths))


def _joined(parts: list[pl.DataFrame], source: str) -> pl.DataFrame:
    """One frame; whole numbers of one part become floats beside those of another."""
    try:
        return pl.concat(parts, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{source}: the rows do not have the same types: {_first_line(error)}") from None


def rebatched(parts: Iterator[pl.DataFrame], rows: int) -> Iterator[pl.DataFrame]:
    """The same rows, so many in every frame but the last, and the last before columns of another type."""
    waiting: list[pl.DataFrame] = []
    height = 0
    for part in parts:
        if waiting and part.schema != waiting[0].schema:
            yield pl.concat(waiting)
            waiting, height = [], 0
        waiting.append(part)
        height += part.height
        while height >= rows:
            whole = pl.concat(waiting)
            yield whole.head(rows)
            height -= rows
            waiting = [whole.slice(rows)] if height else []
    if height:
        yield pl.concat(waiting)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    # Some kinds of damage make the reader panic.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise InputError(f"{path} begins like Parquet but cannot be read: {_first_line(error)}") from None


@contextmanager
def _csv_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except pl.exceptions.NoDataError:
        raise InputError(f"{path} is empty") from None
    except (pl.exceptions.PolarsError, OSError, EOFError) as error:
        raise InputError(_why_no_csv(path, error)) from None


def _may_be_ragged(path: Path, width: int) -> bool:
    """Whether a row may not have ``width`` fields: a quick look at commas, which quotes make undecided."""
    line = pl.col("line").fill_null("")
    lines = pl.scan_csv(
        path, has_header=False, separator="\x1f", quote_char=None, new_columns=["line"], infer_schema=False, glob=False
    )
    undecided = line.str.contains('"', literal=True) | (line.str.count_matches(",", literal=True) != width - 1)
    try:
        return bool(lines.select(undecided.any()).collect(engine="streaming").item())
    except pl.exceptions.PolarsError:
        return True


def _first_ragged_row(path: Path, rows: int | None = None) -> str | None:
    """What to say of the first row whose number of fields is not that of the header, among so many or all."""
    limit = csv.field_size_limit(LONGEST_CELL)
    blank: int | None = None
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
            records = csv.reader(file)
            width = len(next(records))
            for number, record in enumerate(itertools.islice(records, rows), start=1):
                if rows is None and not record:
                    # Blank lines at the end are no rows.
                    blank = blank or number
                    continue
                if blank is not None:
                    return f"{path}: row {blank} has 0 fields, the header has {width}"
                if len(record) != width:
                    hint = "; quote a field that holds commas" if len(record) > width else ""
                    return f"{path}: row {number} has {len(record)} fields, the header has {width}{hint}"
    finally:
        csv.field_size_limit(limit)
    return None


def _why_no_csv(path: Path, error: Exception) -> str:
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return f"{path} is not UTF-8 text (line {number}); expected CSV (UTF-8 text) or Parquet"
        if "more fields" in str(error) and (long := _first_ragged_row(path)):
            return long
    except DAMAGED as damage:
        return f"{path} cannot be read: {_first_line(damage)}"
    return f"{path} is not well-formed CSV: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).strip().partition("\n\n")[0].split())


def _blank_lines_at_end(path: Path) -> int:
    """Lines without any character after the last row."""
    if is_compressed(path):
        tail = b""
        with open_bytes(path) as stream:
            while block := stream.read(2**20):
                tail = (tail + block)[-HEAD_BYTES:]
    else:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - HEAD_BYTES))
            tail = file.read()
    tail = tail.replace(b"\r\n", b"\n")
    return max(0, len(tail) - len(tail.rstrip(b"\n")) - 1)
