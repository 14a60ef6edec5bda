"""Reading a CSV file as a stream of data frames: every cell comes through as it is, or is refused by row and column.

A quote opens a cell if it is its first character, and is written twice within such a cell; anywhere else it is a
character like others. A file in which every quote opens or closes a cell, or stands within one twice, and all lines end
alike, is read by polars; others more slowly by :mod:`csv`, which knows what their quotes and carriage returns are.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from saml_rec.data.csv_format import LONGEST_CELL, SEPARATORS, CsvOptions, Roles, csv_format
from saml_rec.data.sources import DAMAGED, HEAD_BYTES, is_compressed, open_bytes
from saml_rec.errors import InputError, named, shortened, shown

BLOCK_BYTES = 2**22
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
QUOTE = ord('"')
UNUSED = "\x1f"
"""A separator that no file is expected to have."""


class CsvFile:
    """A CSV file, and how it is written.

    Args:
        path: the file.
        options: what need not be found in it.
        roles: of the columns of its table.

    Raises:
        InputError: the file is no CSV.
    """

    def __init__(self, path: Path, options: CsvOptions | None = None, roles: Roles | None = None) -> None:
        self.path = path
        with self._errors():
            self.format = csv_format(path, options or CsvOptions(), roles or Roles())
            self.names = next(self._records(), [])
        if not self.names:
            raise InputError(f"{path} begins with an empty line; expected the names of the columns")
        for name in self.names:
            if self.names.count(name) > 1:
                raise InputError(f"{path} has more than one column {named(name)}")

    def frames(self, columns: Sequence[str] | None, rows: int) -> Iterator[pl.DataFrame]:
        """The rows in order, at most ``rows`` at a time, all columns String, null where a cell is empty and not quoted.

        Args:
            columns: those that are read, all unless given. Rows with too few fields show where all are read only.
            rows: in a frame.

        Raises:
            InputError: the file is no CSV.
        """
        with self._errors():
            if not self._is_regular:
                yield from self._read_slowly(columns, rows)
                return
            table = pl.scan_csv(
                self.path,
                infer_schema=False,
                glob=False,
                separator=self.format.separator,
                eol_char=self.format.line_end,
                skip_lines=self.format.skipped_lines,
                # polars leaves quotes within a name written twice.
                new_columns=self.names,
            )
            if columns is not None:
                table = table.select(columns)
            chunks = iter(table.collect_batches(chunk_size=rows, maintain_order=True))
            yield from self._without_blank_end(chunks, self.names[-1] if columns is None else None)

    @cached_property
    def _is_regular(self) -> bool:
        """Whether every quote opens or closes a cell, or stands within one twice, and every line ends the same way.

        In such a file quotes open and close in turn: one that opens stands after a separator, the end of a line or a
        quote, one that closes before one of those. Of carriage returns and line feeds there are those that end lines;
        within quotes there may be others, which polars would take outside quotes too. Quotes before the header, in
        lines that are left out, open and close nothing.
        """
        if self._has_quotes_before_header():
            return False
        beside = np.zeros(256, dtype=bool)
        beside[[QUOTE, ord(self.format.separator), ord("\n"), ord("\r")]] = True
        opens, before = True, ord("\n")
        others = 0
        with open_bytes(self.path) as file:
            block = file.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
            while block:
                while block[-1] == QUOTE and (more := file.read(BLOCK_BYTES)):
                    block += more
                if QUOTE in block:
                    content = np.frombuffer(block, np.uint8)
                    places = np.flatnonzero(content == QUOTE)
                    left = content[places - 1]
                    right = content[np.minimum(places + 1, len(content) - 1)]
                    left[places == 0] = before
                    right[places == len(content) - 1] = ord("\n")
                    first_open, first_close = (0, 1) if opens else (1, 0)
                    if not (beside[left[first_open::2]].all() and beside[right[first_close::2]].all()):
                        return False
                    opens ^= len(places) % 2 == 1
                if self.format.line_end == "\n":
                    split = before == ord("\r") and block[0] == ord("\n")
                    others += block.count(b"\r") - block.count(b"\r\n") - split
                else:
                    others += block.count(b"\n")
                before = block[-1]
                block = file.read(BLOCK_BYTES)
        # polars misses an empty field too many where the file ends with it.
        return opens and not others and not (before == ord(self.format.separator) and self._may_be_ragged())

    def _has_quotes_before_header(self) -> bool:
        with self._text() as file:
            return any('"' in line for line in itertools.islice(file, self.format.skipped_lines))

    def _text(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(open_bytes(self.path), encoding="utf-8-sig", newline=self.format.line_end)

    def _records(self) -> Iterator[list[str]]:
        """Rows as lists of their cells, the header first; an empty line is an empty list."""
        limit = csv.field_size_limit(LONGEST_CELL)
        lines: list[str] = []
        number = 0

        def remembered(file: io.TextIOWrapper) -> Iterator[str]:
            for line in itertools.islice(file, self.format.skipped_lines, None):
                lines.append(line)
                yield line

        try:
            with self._text() as file:
                for record in csv.reader(remembered(file), delimiter=self.format.separator, strict=True):
                    yield record
                    number += 1
                    lines.clear()
        except csv.Error as error:
            if "new-line" in str(error):
                raise InputError(f"{self.path}: row {number} holds a carriage return outside quotes") from None
            raise InputError(f"{self.path}: {self._wrong_quote(''.join(lines), number)}") from None
        finally:
            csv.field_size_limit(limit)

    def _wrong_quote(self, record: str, number: int) -> str:
        """What to say of the row ``number``, 0 for the header, that begins a text and is not well-formed."""
        separator = re.escape(self.format.separator)
        field = re.compile(rf'(?:"(?:[^"]++|"")*+"|[^"{separator}\r\n][^{separator}\r\n]*+)?{separator}')
        place, start = 0, 0
        while found := field.match(record, start):
            place, start = place + 1, found.end()
        where = f"row {number}" if number else "the header"
        if number:
            is_named = place < len(self.names)
            where += f", column {named(self.names[place])}" if is_named else f", field {place + 1}"
        return (
            f"{where}: expected a quoted cell to end in a quote before a separator or the end of the line, and a quote "
            f"within it to be written twice, got {shown(record[start : start + 30])}"
        )

    def _read_slowly(self, columns: Sequence[str] | None, rows: int) -> Iterator[pl.DataFrame]:
        width = len(self.names)
        numbered = enumerate(itertools.islice(self._records(), 1, None), start=1)

        def whole() -> Iterator[list[str]]:
            blank = 0
            for number, record in numbered:
                if not record:
                    # Blank lines at the end are no rows.
                    blank += 1
                    continue
                if blank and width > 1:
                    raise InputError(self._ragged(number - blank, 0))
                yield from ([""] for _ in range(blank))
                blank = 0
                if len(record) != width:
                    raise InputError(self._ragged(number, len(record)))
                yield record

        records = whole()
        while part := list(itertools.islice(records, rows)):
            frame = pl.DataFrame(part, schema=dict.fromkeys(self.names, pl.String), orient="row")
            frame = frame.select(columns or self.names)
            yield frame.select(pl.when(pl.all() != "").then(pl.all()))

    def _ragged(self, number: int, fields: int) -> str:
        width = len(self.names)
        separators = SEPARATORS.get(self.format.separator, repr(self.format.separator))
        hint = f"; quote a field that holds {separators}" if fields > width else ""
        return f"{self.path}: row {number} has {fields} fields, the header has {width}{hint}"

    def _without_blank_end(self, chunks: Iterator[pl.DataFrame], last_column: str | None) -> Iterator[pl.DataFrame]:
        """Chunks without the rows of empty cells that the reader makes of blank lines at the end.

        The reader completes a short row with empty cells: the first empty cell in ``last_column`` has the file looked
        at.
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
            if suspect and last_column is not None and chunk.width > 1 and whole[last_column].null_count():
                suspect = False
                if self._may_be_ragged() and (short := self._first_ragged_row()):
                    raise InputError(short)
            yield whole
        left = pl.concat(held) if held else pl.DataFrame()
        if (kept := left.height - self._blank_lines_at_end()) > 0:
            if suspect and left.width > 1 and (short := self._first_ragged_row(rows + kept)):
                raise InputError(short)
            yield left.head(kept)

    def _may_be_ragged(self) -> bool:
        """Whether a row may not have as many fields as the header: a quick look at separators, undecided by quotes."""
        line = pl.col("line").fill_null("")
        lines = pl.scan_csv(
            self.path,
            has_header=False,
            separator=UNUSED,
            eol_char=self.format.line_end,
            skip_lines=self.format.skipped_lines,
            quote_char=None,
            new_columns=["line"],
            infer_schema=False,
            glob=False,
        )
        separators = line.str.count_matches(self.format.separator, literal=True)
        undecided = line.str.contains('"', literal=True) | (separators != len(self.names) - 1)
        try:
            return bool(lines.select(undecided.any()).collect(engine="streaming").item())
        except pl.exceptions.PolarsError:
            return True

    def _first_ragged_row(self, rows: int | None = None) -> str | None:
        """What to say of the first row whose number of fields is not that of the header, among so many or all."""
        blank: int | None = None
        records = itertools.islice(self._records(), 1, None if rows is None else rows + 1)
        for number, record in enumerate(records, start=1):
            if rows is None and not record:
                # Blank lines at the end are no rows.
                blank = blank or number
                continue
            if blank is not None:
                return self._ragged(blank, 0)
            if len(record) != len(self.names):
                return self._ragged(number, len(record))
        return None

    def _blank_lines_at_end(self) -> int:
        """Lines without any character after the last row."""
        if is_compressed(self.path):
            tail = b""
            with open_bytes(self.path) as stream:
                while block := stream.read(2**20):
                    tail = (tail + block)[-HEAD_BYTES:]
        else:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - HEAD_BYTES))
                tail = file.read()
        line_end = self.format.line_end.encode()
        tail = tail.replace(b"\r\n", b"\n")
        return max(0, len(tail) - len(tail.rstrip(line_end)) - 1)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except pl.exceptions.NoDataError:
            raise InputError(f"{self.path} is empty") from None
        except (pl.exceptions.PolarsError, UnicodeDecodeError, *DAMAGED) as error:
            raise InputError(self._why_not(error)) from None

    def _why_not(self, error: Exception) -> str:
        try:
            with open_bytes(self.path) as file:
                for number, line in enumerate(file, start=1):
                    try:
                        line.decode()
                    except UnicodeDecodeError:
                        return f"{self.path} is not UTF-8 text (line {number}); expected CSV (UTF-8 text) or Parquet"
            if "more fields" in str(error) and (long := self._first_ragged_row()):
                return long
        except DAMAGED as damage:
            return f"{self.path} cannot be read: {first_line(damage)}"
        return f"{self.path} is not well-formed CSV: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an error says, as a message shows it."""
    return shortened(" ".join(str(error).strip().partition("\n\n")[0].split()))
