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
LARGEST_MULTIPLE = 16


@dataclass(frozen=True)
class Varying:
    """A number that differs between stages: (stage, number) of those that read it."""

    values: tuple[tuple[int, Any], ...]

    @property
    def multiple(self) -> int:
        """A power of two, LARGEST_MULTIPLE at most, of which all are multiples: the compiler sees it in a product."""
        return math.gcd(LARGEST_MULTIPLE, *(value for _, value in self.values))

    @property
    def bits(self) -> int:
        """Bits of an entry where all, by their multiple, fit one word together; else 0."""
        numbers = [value // self.multiple for _, value in self.values]
        width = max(numbers).bit_length()
        return width if min(numbers) >= 0 and width * (self.values[-1][0] + 1) < 63 else 0

    @property
    def word(self) -> int:
        """All entries by their multiple in one word, stage 0 in the lowest bits."""
        return sum((value // self.multiple) << (self.bits * stage) for stage, value in self.values)


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
    return cast(T, Varying(tuple(given.items())))
