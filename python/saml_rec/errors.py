"""The one error type for what a user supplied: files, schemas, options, columns."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MOST_SHOWN = 80
"""Characters of data in a message."""
MOST_OF_NAME = 40
"""Of a name, which usually stands beside something else."""


class InputError(ValueError):
    """Something the user supplied cannot be used. The message is one line: what was wrong, expected, given."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string when none is near."""
    # None that is more than 7/3 as long can be near, and comparing with a very long one takes long.
    nearest = difflib.get_close_matches(name, [each for each in known if len(each) <= 2.5 * len(name)], n=1)
    return f"; did you mean {named(nearest[0])}?" if nearest else ""


def shown(value: Any, most: int = MOST_SHOWN) -> str:
    """A value as a message shows it: as Python writes it, with control characters escaped, cut in the middle."""
    if isinstance(value, str):
        # Escapes are longer than what they stand for, so that what is left out here would not be shown.
        value = value if len(value) <= 2 * most else value[:most] + value[-most:]
    text = repr(value)
    if len(text) <= most:
        return text
    start = (most - 3) // 2
    return f"{text[:start]}...{text[start + 3 - most :]}"


def escaped(text: str, most: int = MOST_SHOWN) -> str:
    """As :func:`shown`, without quotes around it."""
    return shown(text, most + 2)[1:-1]


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
