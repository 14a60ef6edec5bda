"""What every section knows: the target, the shapes, how long is timed, where files go."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

import cells
import records
from contenders import Contender
from on_gpu.target import Target
from saml_kernels.testing import timing
from saml_kernels.testing.problem import Problem, make
from workload import Cell

Record = dict[str, Any]
Save = Callable[[Record], None]
"""Takes a section's record as far as it has come."""


@dataclass(frozen=True)
class Shapes:
    """Of one run. The floors are stated for those of a GPU."""

    widths: tuple[int, ...]
    """D_l = D_g first, then d_1..d_L."""
    headline: tuple[tuple[int, int], ...]
    """(B, M), the first with every contender."""
    grid: tuple[tuple[int, int], ...]
    stages: tuple[tuple[int, int], ...]
    backward: tuple[int, tuple[int, ...]]
    """B, and the M."""
    launches: tuple[tuple[int, int, int], ...]
    """(B, M, L)."""
    timed: tuple[tuple[int, int], ...]
    """(B, M) whose launches are timed one by one and whose choices are tuned; axes are varied at the first."""

    def cell(self, B: int, M: int, layers: int | None = None) -> Cell:
        return Cell(B, M, self.widths[0], self.widths[0], self.widths[1:][:layers])


GPU_SHAPES: Final = Shapes(
    widths=(256, 512, 256, 128),
    headline=((4096, 8), (16384, 8), (4096, 16), (16384, 16), (4096, 32), (16384, 32)),
    # From the middle outwards: what a run that is cut short has first.
    grid=tuple((B, M) for B in (1024, 256, 4096, 16384, 65536) for M in (8, 2, 32, 4, 16)),
    stages=((4096, 8), (16384, 8), (1024, 8)),
    backward=(16384, (2, 4, 8, 16, 32)),
    launches=((256, 2, 3), (1024, 8, 3), (256, 32, 3), (256, 8, 2), (256, 8, 1)),
    timed=((4096, 8), (16384, 8), (1024, 8), (4096, 32), (16384, 32), (1024, 32)),
)
DRY_SHAPES: Final = Shapes(
    widths=(16, 16, 8),
    headline=((48, 3), (64, 3)),
    grid=((24, 2), (48, 3)),
    stages=((24, 2),),
    backward=(32, (2, 3)),
    launches=((16, 2, 2), (24, 3, 1)),
    timed=((24, 2), (32, 3)),
)


@dataclass(frozen=True)
class Run:
    """What every section knows."""

    target: Target
    compiled: bool
    """Peers under torch.compile take part."""
    argument: Mapping[str, Any] = field(default_factory=dict)
    """Which piece of its work a section does that is made for pieces."""
    folder: Path = Path()
    """Where a section's own files go."""

    @property
    def shapes(self) -> Shapes:
        return DRY_SHAPES if self.target.dry_run else GPU_SHAPES

    def protocol(self, budget: float = 0.8) -> timing.Protocol:
        """Few rounds where nothing is kept."""
        if self.target.dry_run:
            return timing.Protocol(budget=1e-3, min_rounds=2, max_rounds=2, min_sample=1e-4)
        return timing.Protocol(budget=budget, max_rounds=41, min_sample=2e-3)

    def problem(self, cell: Cell) -> Problem:
        """Of a cell, in the type measured most."""
        return make(cell.case()).to(self.target.dtype, self.target.device).leaves()

    def ours(self, dtype: torch.dtype, foreign: Iterable[torch.dtype] = ()) -> tuple[Contender, ...]:
        """The kernels: schedule auto, then each schedule, then rounded foreign streams."""
        auto = Contender(self.target.ours, dtype=dtype)
        schedules = [replace(auto, schedule=schedule) for schedule in self.target.schedules]
        return (auto, *schedules, *(replace(auto, foreign_dtype=entry) for entry in foreign))

    def peers(self, dtype: torch.dtype, names: Iterable[str], compiled: Iterable[str] = ()) -> tuple[Contender, ...]:
        """Eager ones, then compiled ones."""
        eager = [Contender(name, dtype=dtype) for name in names]
        return (*eager, *[Contender(name, True, dtype) for name in compiled if self.compiled])

    def measure(self, shapes: Iterable[tuple[Cell, cells.Plan, Record]], deadline: float, save: Save) -> None:
        """Every cell by its plan, with what else is to be kept of it, as long as there is time."""
        done: list[Record] = []
        left_out: list[str] = []
        for cell, plan, more in shapes:
            if time.monotonic() >= deadline:
                left_out.append(f"B={cell.B} M={cell.M}")
                save({"left_out": left_out})
            else:
                if self.compiled:
                    torch.compiler.reset()
                done.append(asdict(cell) | cells.measure(self.target, cell, plan, deadline=deadline) | more)
                save({"columns": list(records.Row._fields), "cells": done})
