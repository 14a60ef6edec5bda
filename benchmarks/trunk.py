"""Times saml_kernels.multi_branch against what a user would write instead, and writes one JSON file.

    python benchmarks/trunk.py --suite headline

docs/benchmarks.md explains the protocol; benchmarks/figures.py makes its tables and figures from the files.
"""

import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import click
import torch

import memory
import records
import timing
import workload
from contenders import (
    CALLS,
    COMPILED_PEERS,
    CPP,
    CPP_FOREIGN,
    CPP_LOW_PRECISION,
    EAGER_PEERS,
    LOW_PRECISION_PEERS,
    PASSES,
    REFERENCE,
    Contender,
    Product,
    products,
    short,
)
from gate import Gate, Verdict
from saml_kernels import doctor
from timing import Protocol
from workload import Cell

HERE: Final = Path(__file__).resolve().parent
MEMORY_SHARE: Final = 0.8
"""A contender that may need more than this share of the free memory is left out."""

QUIET_SHARE: Final = 0.05
"""Processor time of others, as a share of all, above which a run says that its figures are not to be kept."""


@dataclass(frozen=True)
class Suite:
    """Which cells are timed with which contenders."""

    purpose: str
    cells: tuple[Cell, ...]
    contenders: tuple[Contender, ...]
    budget: float
    """Seconds for the rounds of one cell and pass."""
    keep_peers: int | None = None
    """Peers per precision that stay after one timed call each, the fastest ones; None: all."""
    memory_cells: tuple[Cell, ...] = ()


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
    "small": Suite(
        "narrow layers over batch size and number of scenarios",
        _grid(_ROWS, (4, 8), _narrow),
        _SWEEP,
        budget=10,
        keep_peers=2,
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
    out = HERE / "results" / f"trunk_{suite}.json" if out is None else out
    if not out.parent.is_dir():
        raise click.BadParameter(f"the directory {out.parent} does not exist", param_hint="--out")
    if threads is not None:
        torch.set_num_threads(threads)
    # Compiled code must be the code that is timed: beyond the limit dynamo would go on uncompiled.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64

    chosen = SUITES[suite]
    contenders = [contender for contender in chosen.contenders if compiled or not contender.compiled]
    protocol = Protocol(budget=chosen.budget if budget is None else budget)
    record: dict[str, Any] = {
        "suite": suite,
        "purpose": chosen.purpose,
        "complete": False,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], HERE.parent), *sys.argv[1:]]),
        "commit": records.commit(),
        "machine": doctor.machine(),
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "protocol": asdict(protocol) | {"keep_peers": chosen.keep_peers},
        "cells": [],
    }
    earlier = _quiet_cells(out, record) if again else {}
    for index, cell in enumerate(chosen.cells, start=1):
        if (key := json.dumps(asdict(cell))) in earlier:
            record["cells"].append(earlier[key])
            continue
        click.echo(f"[{index}/{len(chosen.cells)}] {_describe(cell)}", err=True)
        record["cells"].append(
            run_cell(cell, contenders, protocol, seed, chosen.keep_peers, with_memory and cell in chosen.memory_cells)
        )
        records.write(out, record)
    record["complete"] = True
    records.write(out, record)
    click.echo(f"wrote {out}", err=True)


def _quiet_cells(path: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By cell, those of an earlier run of the same suite on the same machine that need not be measured again."""
    if not path.exists():
        raise click.BadParameter(f"there is no earlier run {path}", param_hint="--again")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for what in ("suite", "machine", "versions", "threads", "seed"):
        # As it would be read back: JSON has lists only.
        if earlier[what] != json.loads(json.dumps(record[what])):
            raise click.BadParameter(f"{what} of {path} differs: {earlier[what]}", param_hint="--again")
    names = [field.name for field in fields(Cell)]
    return {
        json.dumps({name: cell[name] for name in names}): cell
        for cell in earlier["cells"]
        if all((timed["others"] or 0) <= QUIET_SHARE for timed in cell["passes"].values())
    }


def run_cell(
    cell: Cell, contenders: list[Contender], protocol: Protocol, seed: int, keep_peers: int | None, with_memory: bool
) -> dict[str, Any]:
    """Gate, timed passes and peak memory of one cell, ready for JSON."""
    torch.compiler.reset()
    gate = Gate(workload.make(cell, seed))
    verdicts: dict[Contender, Verdict] = {}
    functions = {contender: contender.function() for contender in contenders}
    for contender in contenders:
        reason = _too_large(contender, cell)
        verdicts[contender] = Verdict(failure=reason) if reason else gate.judge(contender, functions[contender])
        click.echo(f"  {contender.name}: {verdicts[contender].failure or 'within its bounds'}", err=True)
    green = [contender for contender in contenders if verdicts[contender].failure is None]
    rates = products({contender.dtype for contender in green})

    passes: dict[str, Any] = {}
    for name in PASSES:
        calls = {
            contender.name: CALLS[name](functions[contender], gate.problems(contender.dtype)) for contender in green
        }
        screened = _screen(calls, green, keep_peers)
        timed = {key: call for key, call in calls.items() if key not in screened}
        timed |= {product.name: product.call(cell) for product in rates}
        for call in timed.values():
            call()
        with timing.Others() as others:
            seconds_of = timing.interleave(timed, protocol)
        passes[name] = {"seconds": seconds_of, "screened_out": screened, "others": others.share}
        if others.share is not None and others.share > QUIET_SHARE:
            click.echo(
                f"  {name}: others had {others.share:.0%} of the processor time: too much to keep these figures",
                err=True,
            )
        for key, seconds in seconds_of.items():
            result = timing.summary(seconds)
            click.echo(f"  {name:<8}{key:<36}{result.median * 1e3:10.3f} ms  ({result.rounds} rounds)", err=True)

    # The largest tensors go before other processes measure memory.
    gate.problems.cache_clear()
    gate.reference.cache_clear()
    operations = workload.operations(cell)
    return {
        **asdict(cell),
        "operations": asdict(operations) | {"step": operations.step},
        "contenders": [
            {
                "name": contender.name,
                "implementation": contender.implementation,
                "peer": contender.is_peer,
                "compiled": contender.compiled,
                "dtype": short(contender.dtype),
                "foreign_dtype": short(contender.foreign_dtype) if contender.foreign_dtype else None,
                "gate": asdict(verdicts[contender]),
                "memory": _memory(contender, cell, seed) if with_memory and contender in green else None,
            }
            for contender in contenders
        ],
        "products": [_product(product) for product in rates],
        "passes": passes,
    }


def _product(product: Product) -> dict[str, str]:
    return {"name": product.name, "library": product.library, "dtype": short(product.dtype)}


def _screen(
    calls: dict[str, Callable[[], object]], contenders: list[Contender], keep_peers: int | None
) -> dict[str, float]:
    """Peers that are not among the fastest ``keep_peers`` of their precision, with the seconds of one warm call."""
    if keep_peers is None:
        return {}
    seconds = {}
    out: dict[str, float] = {}
    for dtype in {contender.dtype for contender in contenders}:
        names = [contender.name for contender in contenders if contender.is_peer and contender.dtype == dtype]
        for name in names:
            calls[name]()
            seconds[name] = timing.once(calls[name])
        out |= {name: seconds[name] for name in sorted(names, key=seconds.__getitem__)[keep_peers:]}
    return out


def _too_large(contender: Contender, cell: Cell) -> str | None:
    needed, free = contender.bytes_needed(cell), _free_bytes()
    if free is None or needed <= MEMORY_SHARE * free:
        return None
    return f"left out: may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None


def _memory(contender: Contender, cell: Cell, seed: int) -> dict[str, Any]:
    reason = memory.unavailable()
    if reason is not None:
        return {"peak_bytes": None, "failure": reason}
    try:
        return {"peak_bytes": memory.peak_bytes(contender, cell, seed, torch.get_num_threads()), "failure": None}
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return {"peak_bytes": None, "failure": lines[-1]}


def _describe(cell: Cell) -> str:
    widths = ", ".join(map(str, cell.hidden_dims))
    return f"B={cell.B} M={cell.M} D_l={cell.local_dim} D_g={cell.global_dim} hidden=({widths}) {cell.distribution}"


def _versions() -> dict[str, str]:
    """Of what decides a time; `machine` has Python and the processor."""
    build = torch.__config__.show().splitlines()
    libraries = [line.strip(" -") for line in build if "Math Kernel Library" in line or "MKL-DNN" in line]
    return {"torch": torch.__version__, "numpy": importlib.metadata.version("numpy"), "libraries": "; ".join(libraries)}


if __name__ == "__main__":
    main()
