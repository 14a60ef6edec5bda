"""Times saml_kernels.multi_branch against what a user would write instead, and writes one JSON file.

    python benchmarks/trunk.py --suite headline

docs/benchmarks.md explains the protocol; benchmarks/figures.py makes its tables and figures from the files.
"""

import importlib.metadata
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch

import ceilings
import cells
import memory
import records
from contenders import (
    COMPILED_PEERS,
    CPP,
    CPP_FOREIGN,
    CPP_INT8,
    CPP_LOW_PRECISION,
    EAGER_PEERS,
    LOW_PRECISION_PEERS,
    REFERENCE,
    REFERENCE_INT8,
    Contender,
)
from saml_kernels import extension, keep_layouts
from saml_kernels.testing.problem import Call, make
from saml_kernels.testing.timing import Protocol
from workload import Cell


@dataclass(frozen=True)
class Suite:
    """Which cells are timed with which contenders."""

    purpose: str
    cells: tuple[Cell, ...]
    contenders: tuple[Contender, ...]
    budget: float
    """Seconds for the rounds of one cell and pass."""
    keep_peers: int | None = None
    """Peers per precision that stay after a few timed calls each, the fastest ones; None: all."""
    memory_cells: tuple[Cell, ...] = ()
    keeps_layouts: bool = False
    """The kernels keep the layouts of weights between calls without gradients, as a server asks them to."""


def _grid(rows: Iterable[int], scenarios: Iterable[int], shape: Callable[[int, int], Cell]) -> tuple[Cell, ...]:
    rows = tuple(rows)
    return tuple(shape(B, M) for M in scenarios for B in rows)


def _wide(B: int, M: int, distribution: str = "uniform") -> Cell:
    return Cell(B, M, 256, 256, (512, 256, 128), distribution)


def _narrow(B: int, M: int) -> Cell:
    return Cell(B, M, 64, 128, (128, 64, 32))


_ROWS: Final = (64, 256, 1024, 4096, 16384)
_SCENARIOS: Final = (2, 4, 8, 16, 32)
_SWEEP: Final = (*EAGER_PEERS, Contender("grouped", compiled=True), CPP, CPP_FOREIGN)
_EVERYBODY: Final = (
    *EAGER_PEERS,
    *COMPILED_PEERS,
    *LOW_PRECISION_PEERS,
    REFERENCE,
    CPP,
    CPP_FOREIGN,
    CPP_LOW_PRECISION,
)
SUITES: Final = {
    "headline": Suite(
        "the paper's widths, every contender; uniform and skewed scenarios",
        (_wide(4096, 8), _wide(4096, 8, "zipf")),
        _EVERYBODY,
        budget=300,
        memory_cells=(_wide(4096, 8),),
    ),
    "grid": Suite(
        "the paper's widths over batch size and number of scenarios",
        _grid(_ROWS, _SCENARIOS, _wide),
        _SWEEP,
        budget=20,
        keep_peers=2,
        memory_cells=_grid((4096,), _SCENARIOS, _wide),
    ),
    "grid_bfloat16": Suite(
        "the same where all is bfloat16",
        _grid(_ROWS, _SCENARIOS, _wide),
        (*LOW_PRECISION_PEERS, CPP_LOW_PRECISION),
        budget=20,
    ),
    "small": Suite(
        "narrow layers over batch size and number of scenarios",
        _grid(_ROWS, (4, 8), _narrow),
        _SWEEP,
        budget=10,
        keep_peers=2,
    ),
    "few_rows": Suite(
        "the paper's widths on the few rows of a request",
        _grid((1, 8, 64), (8,), _wide),
        (*COMPILED_PEERS, CPP),
        budget=10,
        keep_peers=2,
    ),
    "few_rows_kept": Suite(
        "the same while the kernels keep the layouts of weights between calls (keep_layouts)",
        _grid((1, 8, 64), (8,), _wide),
        (*COMPILED_PEERS, CPP),
        budget=10,
        keep_peers=2,
        keeps_layouts=True,
    ),
    "foreign": Suite(
        "the paper's widths with foreign streams in every type",
        _grid((1024, 4096), (8, 32), _wide),
        (Contender("grouped"), Contender("grouped", compiled=True), CPP, CPP_FOREIGN, CPP_INT8, REFERENCE_INT8),
        budget=20,
        memory_cells=(_wide(4096, 8),),
    ),
    "overhead": Suite(
        "one row, two scenarios, one layer of width 8: what a call costs besides arithmetic",
        (Cell(1, 2, 8, 8, (8,)),),
        (*EAGER_PEERS, *COMPILED_PEERS, REFERENCE, CPP),
        budget=20,
    ),
    "quick": Suite(
        "everything once, on small shapes: does it run?",
        (Cell(256, 4, 32, 32, (64, 32)),),
        tuple(contender for contender in _EVERYBODY if not contender.compiled),
        budget=1,
        memory_cells=(Cell(256, 4, 32, 32, (64, 32)),),
    ),
}


@click.command(help=__doc__)
@click.option("--suite", type=click.Choice(list(SUITES)), default="quick", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: results/trunk_<suite>.json")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; default: torch's own choice")
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="Seconds of rounds for each cell and pass")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Contenders under torch.compile")
@click.option("--memory/--no-memory", "with_memory", default=True, show_default=True, help="Measure peak memory")
@click.option("--again", is_flag=True, help="Only cells of an earlier run during which others took processor time")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    suite: str,
    out: Path | None,
    threads: int | None,
    budget: float | None,
    compiled: bool,
    with_memory: bool,
    again: bool,
    seed: int,
) -> None:
    out = records.RESULTS / f"trunk_{suite}.json" if out is None else out
    if not out.parent.is_dir():
        raise click.BadParameter(f"the directory {out.parent} does not exist", param_hint="--out")
    if threads is not None:
        torch.set_num_threads(threads)
    compiled_code_only()
    chosen = SUITES[suite]
    protocol = Protocol(budget=chosen.budget if budget is None else budget)
    record: dict[str, Any] = {
        "suite": suite,
        "purpose": chosen.purpose,
        "complete": False,
        **records.head(),
        "instruction_set": (extension.build_info() or {"cpu_capabilities": ["none"]})["cpu_capabilities"][0],
        "versions": _versions(),
        "seed": seed,
        "protocol": asdict(protocol) | {"keep_peers": chosen.keep_peers},
        "cells": [],
    }
    contenders = tuple(contender for contender in chosen.contenders if compiled or not contender.compiled)

    def measure(cell: Cell) -> records.Record:
        torch.compiler.reset()
        with_peak = with_memory and cell in chosen.memory_cells
        plan = cells.Plan(contenders, protocol, keep_peers=chosen.keep_peers, memory=with_peak, products=True)
        host = MeasuringHost(seed)
        with keep_layouts() if chosen.keeps_layouts else nullcontext():
            found = cells.measure(host, cell, plan, seed=seed, say=lambda text: click.echo(text, err=True))
        return found | _ceilings(cell, seed)

    kept = records.quiet_cells(out, record, ("suite", "versions", "seed")) if again else []
    records.measure_cells(out, record, chosen.cells, kept, measure)
    record["complete"] = True
    records.write(out, record)
    click.echo(f"wrote {out}", err=True)


def _ceilings(cell: Cell, seed: int) -> dict[str, Any]:
    """What limits the cell: the processor's rates, and how many scenarios have rows."""
    own_scenarios = make(cell.case(seed)).scenario.unique().numel()
    rates = ceilings.measure(torch.get_num_threads(), ceilings.bytes_read(cell, "float32", own_scenarios))
    return {"own_scenarios": own_scenarios, "ceilings": rates}


def compiled_code_only() -> None:
    """Compiled code must be the code that is timed: beyond the limit dynamo would go on uncompiled."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64


@dataclass(frozen=True)
class MeasuringHost(cells.Host):
    """The CPU; peak memory in a process of its own."""

    seed: int

    def peak_bytes(self, contender: Contender, cell: Cell, step: Call) -> dict[str, Any]:
        return memory.peak(contender, cell, self.seed)


def _versions() -> dict[str, str]:
    """Of what decides a time; `machine` has Python and the processor."""
    build = torch.__config__.show().splitlines()
    libraries = [line.strip(" -") for line in build if "Math Kernel Library" in line or "MKL-DNN" in line]
    return {"torch": torch.__version__, "numpy": importlib.metadata.version("numpy"), "libraries": "; ".join(libraries)}


if __name__ == "__main__":
    main()
