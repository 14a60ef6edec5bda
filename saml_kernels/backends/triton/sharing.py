"""One description of several stages that share a kernel's body.

A number in which they differ is :class:`Varying` and is chosen at run time; one in which all agree, and one that the
others do not read, stays a constant of the compiler. Which stages share is the plan's choice (launch.py), and follows
the registers that ahead-of-time compilation reports (docs/gpu-kernels.md).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")
LARGEST_MULTIPLE = 8
WORD_BITS = 63


@dataclass(frozen=True)
class Varying:
    """A number that differs between stages."""

    values: tuple[tuple[int, Any], ...]
    """(stage, number) of those that read it, in ascending order."""
    multiple: int = 1
    """A power of two, LARGEST_MULTIPLE at most, of which all are multiples: the compiler sees it in a product."""
    bits: int = 0
    """Bits of an entry where all, by their multiple, fit one word together; else 0."""
    word: int = 0
    """All entries by their multiple in one word, stage 0 in the lowest bits."""

    def __bool__(self) -> bool:
        raise TypeError(f"a number that differs between stages decides nothing at compile time: {self.values}")


def varying(values: tuple[tuple[int, int], ...]) -> Varying:
    """Numbers that differ, as a kernel reads them."""
    multiple = math.gcd(LARGEST_MULTIPLE, *(value for _, value in values))
    numbers = [value // multiple for _, value in values]
    width = max(numbers).bit_length()
    if min(numbers) < 0 or width * (values[-1][0] + 1) >= WORD_BITS:
        return Varying(values, multiple)
    word = sum(number << (width * stage) for (stage, _), number in zip(values, numbers, strict=True))
    return Varying(values, multiple, width, word)


@dataclass(frozen=True)
class OneOf:
    """One of several objects, which one differs between stages."""

    choices: tuple[Any, ...]
    number: Varying


def merged(parts: Mapping[int, T]) -> T:
    """The common description of the stages with these numbers, in ascending order."""
    given = {stage: part for stage, part in parts.items() if part is not None}
    if not given:
        return cast(T, None)
    first = next(iter(given.values()))
    if all(part == first for part in given.values()):
        return first
    # A leaf may be a dataclass of functions, which differ as a whole.
    if dataclasses.is_dataclass(first) and not getattr(first, "leaf", False):
        fields = {
            field.name: merged({stage: getattr(part, field.name) for stage, part in given.items()})
            for field in dataclasses.fields(first)
        }
        return cast(T, dataclasses.replace(cast(Any, first), **fields))
    if isinstance(first, int):
        return cast(T, varying(tuple(cast(Mapping[int, int], given).items())))
    choices = list(dict.fromkeys(given.values()))
    return cast(T, OneOf(tuple(choices), varying(tuple((s, choices.index(part)) for s, part in given.items()))))
