"""How a CSV file is written: what separates fields, ends lines and marks fractions; found in its first lines."""

import csv
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saml_rec.data.sources import open_bytes
from saml_rec.errors import InputError, shown

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""Those that are found, the most likely first, and what they are called."""
DECIMALS = (".", ",")
BEGINNING_BYTES = 2**18
RECORDS = 200
"""Looked at, at most."""
EXCEL_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
COMMENT = "#"
DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,([0-9]+)")
DECIMAL_POINT = re.compile(r"[+-]?[0-9]*\.[0-9]+")
LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class CsvOptions:
    """What is said of all CSV files of a table; what is None is found in each of them.

    Attributes:
        separator: of fields, one ASCII character.
        decimal: what separates the fraction of a number, "." or ",".

    Raises:
        InputError: a value is none of those, or both are the same.
    """

    separator: str | None = None
    decimal: str | None = None

    def __post_init__(self) -> None:
        separator = self.separator
        if separator is not None and (
            not isinstance(separator, str)
            or len(separator) != 1
            or not separator.isascii()
            or separator.isalnum()
            or separator in '"\r\n'
        ):
            raise InputError(f"separator: expected one ASCII character such as ';', got {shown(separator)}")
        if self.decimal not in (None, *DECIMALS):
            raise InputError(f"decimal: expected '.' or ',', got {shown(self.decimal)}")
        if self.decimal == "," and separator == ",":
            raise InputError("separator and decimal are both ','; they must differ")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``CsvOptions(**values)`` gives it back."""
        return asdict(self)

    def over(self, others: "CsvOptions") -> "CsvOptions":
        """With those of ``others`` for what is None here."""
        return CsvOptions(
            others.separator if self.separator is None else self.separator,
            others.decimal if self.decimal is None else self.decimal,
        )


@dataclass(frozen=True)
class Roles:
    """What is known of the columns of a table.

    Attributes:
        needed: names of columns.
        numbers: of them those that hold numbers.
    """

    needed: Collection[str] = ()
    numbers: Collection[str] = ()


@dataclass(frozen=True)
class CsvFormat:
    """How a file is written.

    Attributes:
        separator: of fields.
        decimal: what separates the fraction of a number.
        line_end: the last character of a line, a line feed, or a carriage return that none follows.
        skipped_lines: before the header: comments, and what names the separator for Excel.
    """

    separator: str = ","
    decimal: str = "."
    line_end: str = "\n"
    skipped_lines: int = 0

    def described(self) -> str:
        """What of it is not usual; nothing for most files."""
        usual = CsvFormat()
        parts = []
        if self.separator != usual.separator:
            parts.append(f"separator {self.separator!r}")
        if self.decimal != usual.decimal:
            parts.append(f"decimal {self.decimal!r}")
        if self.line_end != usual.line_end:
            parts.append(f"lines that end in {self.line_end!r}")
        if self.skipped_lines:
            parts.append(f"{self.skipped_lines} line{'s' * (self.skipped_lines > 1)} before the header left out")
        return ", ".join(parts)


def csv_format(path: Path, options: CsvOptions, roles: Roles) -> CsvFormat:
    """How a CSV file is written, from its first 2¹⁸ bytes.

    The separator is the one that gives the header the most names in ``roles.needed``; of several the one that gives all
    rows as many fields as the header; of several of those the first of SEPARATORS. The decimal is a comma where the
    columns in ``roles.numbers`` have numbers with one, not always before three digits, and none with a point, and
    fields are not separated by commas. Lines before the header that begin with ``#`` are left out, unless the last has
    as many fields as the next row and so is the header; so is a line ``sep=;``, which decides.

    Args:
        path: the file.
        options: what need not be found.
        roles: of the columns.

    Raises:
        InputError: the separator is also what ``options`` have as decimal.
        OSError: the file cannot be read.
    """
    with open_bytes(path) as file:
        content = file.read(BEGINNING_BYTES)
    is_cut = len(content) == BEGINNING_BYTES
    text = content.decode("utf-8-sig", errors="replace")
    line_end = _line_end(text)
    lines = text.split(line_end)
    named_separator, skipped = None, 0
    while skipped < len(lines) - 1:
        line = lines[skipped].removesuffix("\r")
        if found := EXCEL_LINE.fullmatch(line):
            named_separator = found[1]
        elif not line.startswith(COMMENT):
            break
        skipped += 1
    given = options.separator or named_separator
    body = lines[skipped:]
    if skipped and lines[skipped - 1].startswith(COMMENT):
        separator, _ = _separator(lines[skipped - 1 :], line_end, is_cut, given, roles)
        # A record may go over several lines.
        widths = [len(record) for record in _records(lines[skipped - 1 :], line_end, separator, 2)]
        if len(widths) == 2 and widths[0] == widths[1] > 1:
            skipped -= 1
            body = lines[skipped:]
    separator, records = _separator(body, line_end, is_cut, given, roles)
    decimal = options.decimal or _decimal(separator, records, roles)
    if decimal == separator:
        raise InputError(f"{path}: its fields are separated by commas; a decimal comma cannot be told from them")
    return CsvFormat(separator, decimal, line_end, skipped)


def _line_end(text: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", text)
    return "\r" if "\r" in unquoted and "\n" not in unquoted else "\n"


def _records(lines: Sequence[str], line_end: str, separator: str, most: int) -> list[list[str]]:
    """The first records, those before one that is none where there is such a one."""
    ended = (line + line_end for line in lines)
    limit = csv.field_size_limit(LONGEST_CELL)
    records: list[list[str]] = []
    try:
        records.extend(itertools.islice(csv.reader(ended, delimiter=separator), most))
    except csv.Error:
        pass
    finally:
        csv.field_size_limit(limit)
    return records


def _separator(
    lines: Sequence[str], line_end: str, is_cut: bool, given: str | None, roles: Roles
) -> tuple[str, list[list[str]]]:
    """The separator and the first records, the header among them."""
    # The last line is not whole where the beginning of a file was cut, and empty elsewhere.
    whole = lines[:-1] if is_cut and len(lines) > 2 else lines
    found = {
        separator: _records(whole, line_end, separator, RECORDS) for separator in ([given] if given else SEPARATORS)
    }

    def likelihood(separator: str) -> tuple[int, bool]:
        header, *rows = found[separator] or [[]]
        is_even = len(header) > 1 and all(len(row) == len(header) for row in rows if row)
        return len(set(header) & set(roles.needed)), is_even

    # max gives the first of several.
    best = max(found, key=likelihood)
    return best, found[best]


def _decimal(separator: str, records: Iterable[Sequence[str]], roles: Roles) -> str:
    if separator == ",":
        return "."
    header, *rows = records or [[]]
    places = [place for place, name in enumerate(header) if name in roles.numbers]
    cells = [row[place].strip() for row in rows for place in places if place < len(row)]
    commas = [found for cell in cells if (found := DECIMAL_COMMA.fullmatch(cell))]
    has_points = any(DECIMAL_POINT.fullmatch(cell) for cell in cells)
    return "," if any(len(found[1]) != 3 for found in commas) and not has_points else "."
