"""The one error type for what a user supplied: files, schemas, options, columns; and how messages quote data."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MOST_SHOWN = 80
"""Characters of data in a message."""
MOST_OF_NAME = 40
"""Of a name, which usually stands beside something else."""
_NO_MEMORY = ("not enough memory", "t allocate memory", "out of memory", "bad_alloc")
"""What torch, the system and C++ say, in lower case; of memory one "can't" or "cannot" allocate."""


class InputError(ValueError):
    """Something the user supplied cannot be used. The message is one line: what was wrong, expected, given."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string when none is near."""
    # None that is more than 7/3 as long can be near, and comparing with a very long one takes long.
    name = name[:MOST_SHOWN]
    nearest = difflib.get_close_matches(name, [each for each in known if len(each) <= 2.5 * len(name)], n=1)
    return f"; did you mean {named(nearest[0])}?" if nearest else ""


def shown(value: Any, most: int = MOST_SHOWN) -> str:
    """A value as a message shows it: as Python writes it, with control characters escaped, cut in the middle."""
    if isinstance(value, str):
        # Escapes are longer than what they stand for, so that what is left out here would not be shown.
        value = value if len(value) <= 2 * most else value[:most] + value[-most:]
    try:
        # Of tensors, and of others that Python does not write in one line.
        text = escaped(repr(value))
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return "a number of thousands of digits"
    if len(text) <= most:
        return text
    start = (most - 3) // 2
    return f"{text[:start]}...{text[start + 3 - most :]}"


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """As :func:`shown`, without quotes around it."""
    return shown(text, most + 2)[1:-1]


def escaped(text: str) -> str:
    """The text with everything that is no printable character as Python writes it: ``\\n``, ``\\x1b``, ``\\udcff``."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def named(name: Any) -> str:
    """A name out of the data as a message shows it, such as a column's."""
    return shown(name, MOST_OF_NAME)


def listed(names: Sequence[Any], at_most: int = MOST_SHOWN, most: int = MOST_SHOWN) -> str:
    """Names as a message lists them: the first ones, ``at_most`` in ``most`` characters, and how many others."""
    parts: list[str] = []
    left = most
    for name in names[:at_most]:
        part = named(name)
        if parts and len(part) + 2 > left:
            break
        parts.append(part)
        left -= len(part) + 2
    more = f" and {len(names) - len(parts):,} more" if len(parts) < len(names) else ""
    return ", ".join(parts) + more


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
