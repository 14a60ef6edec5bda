"""What benchmarks/results/gpu_assembly.json says of the launches' machine code: instructions, barriers, registers.

``python tests/triton/costs.py`` writes the file. Instructions are a warp's.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Cut = tuple[int, ...]
"""How a stage is cut: BLOCK_M, BLOCK_N, BLOCK_K of a product, rows of an item of what is none."""
BLOCKS = "block_m", "block_n", "block_k"


class AssemblyError(ValueError):
    """A file that is not there, not of the form, or lacks a launch."""


class Count(NamedTuple):
    """Of a warp."""

    instructions: float
    barriers: float


class Wanted(NamedTuple):
    """A launch whose code is looked for: its scenarios, its warps, and how each of its stages is cut."""

    M: int
    num_warps: int
    num_stages: int
    cuts: frozenset[tuple[str, Cut]]

    def __str__(self) -> str:
        stages = " ".join(f"{name} {'×'.join(map(str, cut))}," for name, cut in sorted(self.cuts))
        return f"M = {self.M} with {self.num_warps} warps and {self.num_stages} stages: {stages.rstrip(',')}"


@dataclass(frozen=True)
class BodyCode:
    """The code of stages that share it."""

    stages: frozenset[str]
    cut: Cut
    block: tuple[int, int] | None
    """Rows and columns that what is no product takes at a time."""
    repeated: Count
    """In a step of k (BLOCK_K rows of a weight's gradient), or for a row of what is no product."""
    once: Count
    """Besides, once an item."""


@dataclass(frozen=True)
class LaunchCode:
    """The code of a launch."""

    M: int
    schedule: str
    title: str
    registers: int
    spilled_bytes: int
    shared_memory: int
    """Bytes of a program."""
    num_warps: int
    num_stages: int
    """Of the software pipeline."""
    item: Count
    """Drawing, locating, waiting and releasing: once an item."""
    bodies: tuple[BodyCode, ...]

    @property
    def signature(self) -> Wanted:
        """What it is the code of."""
        return Wanted(
            self.M,
            self.num_warps,
            self.num_stages,
            frozenset((name, body.cut) for body in self.bodies for name in body.stages),
        )

    def body(self, stage: str) -> BodyCode:
        """The code that serves a stage."""
        return next(body for body in self.bodies if stage in body.stages)


@dataclass(frozen=True)
class Assembly:
    """A file's launches."""

    launches: Mapping[Wanted, LaunchCode]
    head: dict[str, Any]
    """Everything of the file but its launches."""

    def find(self, choices: Iterable[Wanted]) -> LaunchCode:
        """The first of the choices that is there.

        Raises:
            AssemblyError: none is.
        """
        tried = list(choices)
        for wanted in tried:
            if wanted in self.launches:
                return self.launches[wanted]
        raise AssemblyError(f"the assembly file has no launch of {tried[0]}; python tests/triton/costs.py writes it")


def load(path: Path, needed: Iterable[Iterable[Wanted]] = ()) -> Assembly:
    """The file's launches.

    Args:
        path: the file.
        needed: launches that must be there, each with the choices of tiles of which one is enough.

    Raises:
        AssemblyError: the file is not there, not of the form, or lacks a launch.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssemblyError(f"there is no {path}; python tests/triton/costs.py writes it") from None
    except ValueError as error:
        raise AssemblyError(f"{path} is not JSON: {error}") from None
    try:
        launches = [_launch(entry) for entry in data["launches"]]
    except (KeyError, TypeError) as error:
        raise AssemblyError(f"{path} is not of the form that on_gpu/assembly.py reads: {error!r}") from None
    head = {name: value for name, value in data.items() if name != "launches"}
    # Backward is the same in both schedules: the first of equal launches stands for all.
    assembly = Assembly({launch.signature: launch for launch in reversed(launches)}, head)
    for choices in needed:
        assembly.find(choices)
    return assembly


def _launch(entry: Mapping[str, Any]) -> LaunchCode:
    plain = {
        name: entry[name]
        for name in ("M", "schedule", "title", "registers", "spilled_bytes", "shared_memory", "num_warps", "num_stages")
    }
    return LaunchCode(**plain, item=_count(entry["item"]), bodies=tuple(map(_body, entry["bodies"])))


def _body(entry: Mapping[str, Any]) -> BodyCode:
    rows = "item_rows" in entry
    cut = (entry["item_rows"],) if rows else tuple(entry[name] for name in BLOCKS)
    repeated = entry["row" if rows else "step"]
    block = (entry["rows"], entry["columns"]) if rows else None
    return BodyCode(frozenset(entry["stages"]), cut, block, _count(repeated), _count(entry["once"]))


def _count(entry: Mapping[str, Any]) -> Count:
    return Count(float(entry["instructions"]), float(entry["barriers"]))
