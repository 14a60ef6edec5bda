"""CSV read character by character, as the documentation of saml_rec.data says: slow, and of no library."""

from dataclasses import dataclass


class Malformed(ValueError):
    """Not CSV."""


@dataclass(frozen=True)
class Cell:
    text: str
    quoted: bool


def records(text: str, separator: str, line_end: str) -> list[list[Cell]]:
    """The lines of a text as cells; a line without any character has none.

    A quote opens a cell if it is its first character, is written twice within such a cell, and closes it before a
    separator or the end of a line; anywhere else it is a character like others. Carriage returns before the end of a
    line belong to it.

    Raises:
        Malformed: a quoted cell does not end, or does not end there; or a carriage return, outside quotes, that does
            not end a line.
    """
    found: list[list[Cell]] = []
    place = 0
    while place < len(text):
        line: list[Cell] = []
        if length := _line_end(text, place, line_end):
            found.append(line)
            place += length
            continue
        while True:
            cell, place = _cell(text, place, separator, line_end)
            line.append(cell)
            if text[place : place + 1] != separator:
                break
            place += 1
        place += _line_end(text, place, line_end)
        found.append(line)
    return found


def _cell(text: str, place: int, separator: str, line_end: str) -> tuple[Cell, int]:
    """The cell that begins at a place, and where it ends."""
    if text[place : place + 1] == '"':
        start, parts = place + 1, []
        while True:
            end = text.find('"', start)
            if end < 0:
                raise Malformed("a quoted cell does not end")
            parts.append(text[start:end])
            if text[end + 1 : end + 2] != '"':
                break
            start = end + 2
        if _ends(text, end + 1, separator, line_end):
            return Cell('"'.join(parts), True), end + 1
        raise Malformed("something stands behind a quoted cell")
    end = place
    while not _ends(text, end, separator, line_end):
        if text[end] == "\r":
            raise Malformed("a carriage return within a line")
        end += 1
    return Cell(text[place:end], False), end


def _ends(text: str, place: int, separator: str, line_end: str) -> bool:
    return place == len(text) or text[place] == separator or _line_end(text, place, line_end) > 0


def _line_end(text: str, place: int, line_end: str) -> int:
    """How many characters of the end of a line stand there, or at the end of the text."""
    end = place
    while line_end != "\r" and text[end : end + 1] == "\r":
        end += 1
    if text[end : end + 1] == line_end:
        return end + 1 - place
    return end - place if end == len(text) else 0
