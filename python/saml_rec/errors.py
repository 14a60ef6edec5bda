"""The one error type for what a user supplied: files, schemas, options, columns."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user supplied cannot be used. The message is one line: what was wrong, expected, given."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string when none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
