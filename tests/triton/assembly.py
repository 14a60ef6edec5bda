"""What a compiled kernel does over and over: loops of its machine code, with the lines they come from.

Reads what ``nvdisasm -gi`` prints. Loops are found in the control flow, not in the order of the text, where the
assembler moves rare code behind the rest.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

MATRIX = re.compile(r"\b([HIQ]GMMA|[HIQ]MMA|UTC[A-Z]*MMA)\b")
PRODUCT = re.compile(MATRIX.pattern + r"|\bFFMA\b")
BARRIER = re.compile(r"\bBAR\.(SYNC|RED|ARV)")
BRANCH = re.compile(r"^(@!?U?P\d+ )?BRA(?P<kind>\.[A-Z.]+)? (?P<conditions>[^`]*)`\((?P<label>\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instruction:
    """A line of machine code."""

    text: str
    file: str
    """Name of the source file, without its folder; empty where there is none."""
    line: int


@dataclass(frozen=True)
class Loop:
    """A natural loop: places that are passed again and again."""

    code: "Code"
    places: frozenset[int]
    inner: tuple["Loop", ...]

    @functools.cached_property
    def own(self) -> tuple[Instruction, ...]:
        """Instructions outside the inner loops."""
        inside = frozenset().union(*(loop.places for loop in self.inner))
        return tuple(self.code.instructions[place] for place in sorted(self.places - inside))

    @property
    def every(self) -> tuple[Instruction, ...]:
        """Instructions, those of inner loops included."""
        return tuple(self.code.instructions[place] for place in sorted(self.places))

    def walk(self) -> Iterator["Loop"]:
        """This loop and all inside."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


def count(instructions: tuple[Instruction, ...], pattern: re.Pattern[str]) -> int:
    """Instructions that match."""
    return sum(pattern.search(each.text) is not None for each in instructions)


class Code:
    """A disassembled kernel.

    Args:
        assembly: what nvdisasm prints, with or without the lines of the source.
    """

    def __init__(self, assembly: str) -> None:
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        file, number = "", 0
        for line in assembly.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif source := re.match(r'\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)', line):
                file, number = source[1], int(source[2])
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                self.instructions.append(Instruction(found[1], file, number))
        self._follow(labels)

    def _follow(self, labels: dict[str, int]) -> None:
        """The places that each reachable block goes on to."""
        ends: dict[int, tuple[int, ...]] = {}
        for place, instruction in enumerate(self.instructions):
            branch = BRANCH.match(instruction.text)
            # A branch for threads that have parted leads to rare code only.
            if branch and branch["kind"] != ".DIV" and branch["label"] in labels:
                always = branch[1] is None and not branch["conditions"].strip(" ,")
                ends[place] = (labels[branch["label"]],) if always else (labels[branch["label"]], place + 1)
            elif table := re.search(r"BRANCH_TARGETS ([^\"]+)\"", instruction.text):
                ends[place] = tuple(labels[label] for label in table[1].split(","))
            elif re.match(r"(EXIT|RET)\b", instruction.text):
                ends[place] = ()
        starts = sorted({0, *labels.values(), *(place + 1 for place in ends)} & set(range(len(self.instructions))))
        self.blocks: dict[int, range] = {}
        self.successors: dict[int, tuple[int, ...]] = {}
        for start, stop in zip(starts, [*starts[1:], len(self.instructions)], strict=True):
            self.blocks[start] = range(start, stop)
            going = ends.get(stop - 1, (stop,))
            self.successors[start] = tuple(next for next in going if next < len(self.instructions))

    @functools.cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Blocks on every way to a block, of the blocks that the first one reaches."""
        order: list[int] = []
        seen, stack = {0}, [0]
        while stack:
            block = stack.pop()
            order.append(block)
            for next in self.successors[block]:
                if next not in seen:
                    seen.add(next)
                    stack.append(next)
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for next in self.successors[block]:
                before[next].append(block)
        self._before = before
        dominators = {block: set(order) for block in order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                found = {block} | set.intersection(*(dominators[other] for other in before[block]))
                if found != dominators[block]:
                    dominators[block], changed = found, True
        return dominators

    @functools.cached_property
    def reached(self) -> frozenset[int]:
        """Places that some way leads to."""
        return frozenset(place for block in self._dominators for place in self.blocks[block])

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops."""
        bodies: dict[int, set[int]] = {}
        for block, dominators in self._dominators.items():
            for head in self.successors[block]:
                if head in dominators:
                    bodies.setdefault(head, {head}).update(self._reaching(block, head))
        places = {head: frozenset(p for block in body for p in self.blocks[block]) for head, body in bodies.items()}

        def nested(within: frozenset[int] | None, heads: list[int]) -> tuple[Loop, ...]:
            inside = [head for head in heads if within is None or places[head] < within]
            outer = [head for head in inside if not any(places[head] < places[other] for other in inside)]
            return tuple(Loop(self, places[head], nested(places[head], inside)) for head in outer)

        return nested(None, sorted(places))

    def _reaching(self, block: int, head: int) -> set[int]:
        """Blocks from which ``block`` is reached without passing ``head``."""
        found, stack = {head, block}, [block] if block != head else []
        while stack:
            for other in self._before[stack.pop()]:
                if other not in found:
                    found.add(other)
                    stack.append(other)
        return found

    def all_loops(self) -> Iterator[Loop]:
        for loop in self.loops:
            yield from loop.walk()
