"""The one error type for what a user supplied: files, schemas, options, columns; and how messages quote data."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 80
"""Characters of data that a message quotes at most."""
_NO_MEMORY = ("not enough memory", "t allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
"""What torch, the system and C++ say, in lower case."""


class InputError(ValueError):
    """Something the user supplied cannot be used. The message is one line: what was wrong, expected, given."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string when none is near."""
    nearest = difflib.get_close_matches(name[:LONGEST], list(known), n=1)
    return f"; did you mean {quoted(nearest[0])}?" if nearest else ""


def escaped(text: str) -> str:
    """The text with everything that is no printable character as Python writes it: ``\\n``, ``\\x1b``, ``\\udcff``."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def shortened(text: str) -> str:
    """Data as a message shows them: escaped, and cut with ``…`` beyond LONGEST characters."""
    shown = escaped(text[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def quoted(value: object) -> str:
    """The ``repr`` of a value, shortened."""
    try:
        return shortened(repr(value[: LONGEST + 1] if isinstance(value, str) else value))
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return "a number of thousands of digits"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was refused: Python's own, torch's of the CPU and of a GPU, or C++'s."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


@contextmanager
def memory_for(work: str) -> Iterator[None]:
    """A block of work whose lack of memory is an error of input.

    Raises:
        InputError: with the work, for whatever :func:`is_out_of_memory` recognises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).splitlines() or ["the system has none left"]
        raise InputError(f"not enough memory for {work}: {shortened(lines[0])}") from error
