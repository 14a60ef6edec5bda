"""Reading a table: CSV and Parquet files as a stream of data frames, a bounded number of rows at a time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from saml_rec.data.cells import Checks, check_columns, conform
from saml_rec.data.csv_files import CsvFile, first_line
from saml_rec.data.csv_format import CsvFormat, CsvOptions, Roles
from saml_rec.data.refusal import Notations
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths, is_parquet, table_files
from saml_rec.data.sources import named as named_paths
from saml_rec.data.values import as_lists
from saml_rec.errors import InputError, named, shown

CHUNK_ROWS = 2**17
NOT_IN_CSV = (pl.Binary, pl.Duration, pl.Object)

Columns = Mapping[str, pl.DataType]
"""Names and types, in order."""


def read_frame(path: str | Path, csv: CsvOptions | None = None) -> pl.DataFrame:
    """Read a CSV or Parquet file as it is.

    Whether a file is Parquet is decided by its first bytes, not by its name. CSV is UTF-8 with a header and double
    quotes, plain or compressed by gzip or zstd, its fields separated as :mod:`saml_rec.data.csv_format` says; all its
    cells are read as the strings they are, so an id ``007`` stays ``007``.

    Args:
        path: the file.
        csv: how it is written if it is CSV; found in the file unless given.

    Returns:
        One row per row of the file, in its order, with all columns: String from CSV, null where a cell is empty and
        not quoted; from Parquet in the types of the file.

    Raises:
        InputError: the file cannot be read as a table.
    """
    file = open_table(Path(path), csv)
    return pl.concat([pl.DataFrame(schema=dict(file.columns)), *file.frames()])


class _ParquetFile:
    """A Parquet file, with the interface of :class:`_Csv`."""

    format: CsvFormat | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            self.columns: Columns = pl.read_parquet_schema(path)

    def frames(self, columns: Sequence[str] | None = None, rows: int | None = None) -> Iterator[pl.DataFrame]:
        with self._errors():
            table = pl.scan_parquet(self.path, glob=False)
            if columns is not None:
                table = table.select(columns)
            yield from table.collect_batches(chunk_size=rows or CHUNK_ROWS, maintain_order=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        # Some kinds of damage make the reader panic.
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise InputError(f"{self.path} begins like Parquet but cannot be read: {first_line(error)}") from None


class _Csv:
    """A CSV file as a table of strings."""

    def __init__(self, path: Path, options: CsvOptions | None, roles: Roles | None) -> None:
        self.path = path
        self._file = CsvFile(path, options, roles)
        self.format: CsvFormat | None = self._file.format
        self.columns: Columns = {name: pl.String() for name in self._file.names}

    def frames(self, columns: Sequence[str] | None = None, rows: int | None = None) -> Iterator[pl.DataFrame]:
        """The rows of the file in order, at most ``rows`` at a time, CHUNK_ROWS unless given.

        Args:
            columns: those that are read, all unless given. Rows with too few fields show where all are read only.
            rows: in a frame.

        Raises:
            InputError: the file cannot be read as a table.
        """
        return self._file.frames(columns, rows or CHUNK_ROWS)


def open_table(path: Path, csv: CsvOptions | None = None, roles: Roles | None = None) -> _ParquetFile | _Csv:
    """A file of a table; of its rows none is read.

    Args:
        path: the file.
        csv: how it is written if it is CSV; found in the file unless given.
        roles: of its columns.

    Raises:
        InputError: the file cannot be read as a table.
    """
    return _ParquetFile(path) if is_parquet(path) else _Csv(path, csv, roles)


def require_csv_columns(paths: Paths) -> None:
    """Refuse a table with columns that CSV has no notation for, without reading its rows.

    Raises:
        InputError: a column of a Parquet file holds lists, structures, bytes or durations; or as :func:`read_frame`.
    """
    for path in table_files(paths):
        for name, dtype in _ParquetFile(path).columns.items() if is_parquet(path) else ():
            if dtype.is_nested() or dtype in NOT_IN_CSV:
                raise InputError(
                    f"{path}: column {named(name)} holds {named(dtype)}, which CSV cannot hold; write a .parquet file"
                )


class TableFiles:
    """The files of a table as one stream of checked rows.

    Args:
        paths: as :func:`saml_rec.data.sources.table_files` takes them.
        schema: the roles of the columns.
        csv: how CSV files are written; found in each of them unless given.

    Raises:
        InputError: there is no such file, or one is no table.
    """

    def __init__(self, paths: Paths, schema: Schema, csv: CsvOptions | None = None) -> None:
        self.files = table_files(paths)
        self.schema = schema
        self._opened = {file: open_table(file, csv, roles_of(schema)) for file in self.files}
        self.columns = {file: opened.columns for file, opened in self._opened.items()}

    @property
    def name(self) -> str:
        """For messages about all of it."""
        return _name_of(self.files)

    def format_lines(self) -> list[str]:
        """How files are written that are not written as usual, a line for each way."""
        files_of: dict[str, list[Path]] = {}
        for file, opened in self._opened.items():
            if opened.format is not None and (described := opened.format.described()):
                files_of.setdefault(described, []).append(file)
        return [f"{_name_of(files)}: {described}" for described, files in files_of.items()]

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
        notations = Notations()
        for file, opened in self._opened.items():
            first = 0
            decimal = "." if opened.format is None else opened.format.decimal
            for frame in opened.frames(checks.only, chunk_rows):
                checked = conform(
                    frame,
                    self.schema,
                    checks,
                    source=str(file),
                    first_row=first,
                    decimal=decimal,
                    notations=notations,
                )
                if self.schema.time in checked.columns and checks.split:
                    is_number = checked[self.schema.time].dtype.is_numeric()
                    if by_number not in (None, is_number):
                        expected = "a number" if by_number else "a date"
                        raise InputError(
                            f"{file}: column {named(self.schema.time)}, row {first + 1}: expected {expected}, as in "
                            f"the rows before, got {shown(frame[self.schema.time][0], 40)}"
                        )
                    by_number = is_number
                yield frame, checked
                first += frame.height
            rows += first
        if rows == 0:
            raise InputError(f"{self.name} has a header but no rows")


def roles_of(schema: Schema) -> Roles:
    """Of the columns that scoring needs, and of the others that are numbers."""
    numbers = {feature.name for feature in schema.of_kind("dense")}
    numbers |= {name for name in (schema.weight, schema.time) if name is not None}
    return Roles({schema.scenario, schema.label, *(feature.name for feature in schema.features), *numbers}, numbers)


def _name_of(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def read_table(
    paths: Paths,
    schema: Schema,
    *,
    need_label: bool = True,
    need_split: bool = True,
    csv: CsvOptions | None = None,
) -> pl.DataFrame:
    """Read CSV or Parquet files as :func:`read_frame` does, and check every cell the schema speaks of.

    Args:
        paths: the files, as :func:`saml_rec.data.sources.table_files` takes them.
        schema: the roles of their columns.
        need_label: False is for scoring: only the scenario and the features are needed and checked, and every other
            column is kept as it is. True drops the columns the schema does not mention.
        need_split: whether the time or split column is needed too; of no effect without ``need_label``.
        csv: how CSV files are written; found in each of them unless given.

    Returns:
        One row per row of the files, in their order. Label: UInt8 of 0 and 1. Scenario and sparse: String, an empty
        cell of a sparse column null. Dense: Float64, null where missing. Multi and sequence: String or List(String),
        as in the file. Time: Int64, Float64 or a UTC Datetime. Split column: ``train``, ``valid`` or ``test``.

    Raises:
        InputError: a file cannot be read as a table, lacks a column, or a cell is not what its column holds. Rows
            are counted from 1 in each file, the header not included.
    """
    checks = Checks(label=need_label, split=need_label and need_split, keep_others=not need_label)
    parts = list(TableFiles(paths, schema, csv).checked(checks))
    for feature in (*schema.of_kind("multi"), *schema.of_kind("sequence")):
        if len({part.schema[feature.name] for part in parts}) > 1:
            parts = [part.with_columns(as_lists(part[feature.name], feature.separator)) for part in parts]
    return _joined(parts, named_paths(paths))


def _joined(parts: list[pl.DataFrame], source: str) -> pl.DataFrame:
    """One frame; whole numbers of one part become floats beside those of another."""
    try:
        return pl.concat(parts, how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{source}: the rows do not have the same types: {first_line(error)}") from None


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
