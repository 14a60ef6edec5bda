"""How a body that several stages share reads their numbers and addresses.

A leaf of a description is a constant, or :class:`saml_kernels.backends.triton.sharing.Varying`; ``stage`` is the
number of the stage at run time.
"""

from typing import Any

import triton
import triton.language as tl

from saml_kernels.backends.triton.sharing import OneOf, Varying


@triton.constexpr_function
def varies(leaf: Any) -> bool:
    """Whether the stages differ in it."""
    return isinstance(leaf, Varying)


@triton.constexpr_function
def several(leaf: Any) -> bool:
    """Whether it is one of several objects."""
    return isinstance(leaf, OneOf)


@triton.constexpr_function
def possible(leaf: Any, wanted: Any = True) -> bool:
    """Whether any stage has ``wanted``."""
    return any(value == wanted for _, value in leaf.values) if isinstance(leaf, Varying) else leaf == wanted


@triton.constexpr_function
def exists(width: Any) -> bool:
    """Whether any stage has a width above 0."""
    return isinstance(width, Varying) or width > 0


@triton.constexpr_function
def divides(block: int, width: Any) -> bool:
    """Whether a width is a multiple of the block in every stage."""
    return all(value % block == 0 for _, value in width.values) if isinstance(width, Varying) else width % block == 0


@triton.constexpr_function
def stage_value(leaf: Any, stage: int) -> int:
    """The number of a stage that is known at compile time."""
    return int(dict(leaf.values)[stage] if isinstance(leaf, Varying) else leaf)


@triton.constexpr_function
def multiple_of(leaf: Any) -> int:
    return int(leaf.multiple)


@triton.constexpr_function
def entries(leaf: Any) -> int:
    return len(leaf.values)


@triton.constexpr_function
def stage_of(leaf: Any, entry: int) -> int:
    return int(leaf.values[entry][0])


@triton.constexpr_function
def number_of(leaf: Any, entry: int) -> int:
    """By the common multiple."""
    return int(leaf.values[entry][1]) // leaf.multiple


@triton.constexpr_function
def bits_of(leaf: Any) -> int:
    return int(leaf.bits)


@triton.constexpr_function
def word_of(leaf: Any) -> int:
    return int(leaf.word)


@triton.jit
def value(LEAF: tl.constexpr, stage):
    """The stage's number; a constant where all agree."""
    if varies(LEAF):
        # Written as a product, the compiler sees of what it is a multiple; a hint on a choice is lost.
        if bits_of(LEAF) > 0:
            # Flags and other small numbers: a shift instead of a choice a stage.
            word = tl.full((), word_of(LEAF), tl.int64)
            number = ((word >> (stage * bits_of(LEAF))) & ((1 << bits_of(LEAF)) - 1)).to(tl.int32)
        else:
            number = tl.zeros((), tl.int32)
            for entry in tl.static_range(entries(LEAF)):
                if stage == stage_of(LEAF, entry):
                    number = tl.full((), number_of(LEAF, entry), tl.int32)
        return number * multiple_of(LEAF)
    else:
        return LEAF


@triton.constexpr_function
def entry_of(given: tuple[int, ...], entry: int) -> int:
    return given[entry]


@triton.jit
def pointer(candidates, GIVEN: tl.constexpr, stage, VECTOR: tl.constexpr):
    """The stage's of several tensors, which are those of the stages GIVEN and start at multiples of VECTOR elements.

    Several addresses become one as an offset from the first: a choice between pointers would lose their alignment.
    """
    some = candidates[0]
    if len(candidates) == 1:
        return some
    else:
        bytes_each: tl.constexpr = some.dtype.element_ty.primitive_bitwidth // 8
        address = tl.zeros((), tl.int64)
        for entry in tl.static_range(len(candidates)):
            address = tl.where(stage == entry_of(GIVEN, entry), candidates[entry].to(tl.int64), address)
        # Subtracted after the choice: differences of all addresses would be computed ahead and occupy registers.
        offset = (address - some.to(tl.int64)) // bytes_each
        return some + tl.multiple_of(offset, VECTOR)
