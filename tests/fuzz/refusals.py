"""What every reader promises of a file it does not take: an InputError of one line that quotes little of it."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from budget import no_hang

from saml_rec.errors import MOST_SHOWN, InputError

MARK = "ж"
"""A character that no message has but in what it quotes."""
MOST_WORDS = 240
"""Characters of a message besides the path and what it quotes."""
MEMORY = 2**31
"""Bytes of address space beyond those that are in use before."""
Result = TypeVar("Result")


def result_of(read: Callable[[], Result], *paths: Path) -> Result | None:
    """What ``read`` returns; None where it refuses as it may. Any other exception, or a hang, fails the test."""
    try:
        with no_hang():
            return read()
    except InputError as error:
        check_message(str(error), *paths)
        return None


def check_message(message: str, *paths: Path) -> None:
    """One printable line that quotes at most 80 characters of data."""
    for path in sorted(paths, key=lambda path: -len(str(path))):
        message = message.replace(str(path), "")
    assert message.isprintable(), message
    assert len(message) <= MOST_WORDS + MOST_SHOWN, message
    assert message.count(MARK) <= MOST_SHOWN, message
    assert "not enough memory" not in message, message


@contextmanager
def limited_memory() -> Iterator[None]:
    """A block in which memory for little more than there is already is refused."""
    in_use = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
