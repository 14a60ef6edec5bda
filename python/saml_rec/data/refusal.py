"""What is said of a cell that cannot be used: its column, row and value."""

from dataclasses import dataclass, field

import polars as pl

from saml_rec.errors import MOST_SHOWN, InputError, named, shown

LEAST_SHOWN = MOST_SHOWN - 40
"""Of a value beside the name of its column."""


@dataclass
class Notations:
    """What the rows so far have in common.

    Args:
        negative: the label that is not 1, 0 or −1; None until one is seen.
    """

    negative: float | None = None


@dataclass(frozen=True)
class Where:
    """A column of some rows of a file.

    Args:
        source: the file.
        column: its name.
        first_row: how many rows of the file come before these.
        decimal: what separates the fraction of a number that is text, "." or ",".
        notations: of the rows before, also those of other files of the table; learns those of the column.
    """

    source: str
    column: str
    first_row: int = 0
    decimal: str = "."
    notations: Notations = field(default_factory=Notations)

    def __str__(self) -> str:
        return f"{self.source}: column {named(self.column)}"


def refuse(is_bad: pl.Series, column: pl.Series, where: Where, expected: str, hint: str = "") -> None:
    """InputError with the first row in which ``is_bad`` is true, or null; ``hint`` ends it."""
    row = is_bad.fill_null(True).arg_true()
    if len(row):
        value = column[int(row[0])]
        if isinstance(value, pl.Series):
            value = value.to_list()
        left = max(MOST_SHOWN - len(named(where.column)), LEAST_SHOWN)
        given = "an empty cell" if value is None or value == "" else shown(value, left)
        raise InputError(f"{where}, row {where.first_row + int(row[0]) + 1}: expected {expected}, got {given}{hint}")
