"""Everything that needs a GPU in one command: build, tests, sanitizers, launch counts, benchmarks, floors, figures.

    make gpu                                            (python3 benchmarks/gpu.py)
    python benchmarks/gpu.py --dry-run --out FOLDER     the same motions on the CPU, for no figure at all

Installs nothing and needs no network: torch, triton, nvcc, ninja, pytest, matplotlib and click are the machine's own.
docs/benchmarks.md says what is measured. The record is written after every step, and a section's own file after every
cell, so that nothing is lost when time runs out. A record of the same device, commit and versions is continued, so that
sections may be measured in several commands.
"""

import datetime
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
# The checkout is not installed on such a machine.
sys.path.insert(0, str(ROOT))

import click  # noqa: E402
import torch  # noqa: E402

import records  # noqa: E402
from on_gpu import checks, floors, plots, summary  # noqa: E402
from on_gpu.measuring import Request  # noqa: E402
from on_gpu.sections import GPU_PEERS, SECTIONS  # noqa: E402
from on_gpu.target import Target  # noqa: E402
from saml_kernels import doctor  # noqa: E402

TOTAL_SECONDS: Final = 465.0
"""Under eight minutes, with what starting and ending take."""
BUILD_SHARE: Final = 0.25
CHECKS_SHARE: Final = 0.25
"""Of the total, at most; what is not used is left to the measurements."""
GRACE_SECONDS: Final = 20.0
"""A section looks at the clock between cells; this much past its limit it is ended, with all it started."""
LEAST_SECONDS: Final = 1.0
"""With less a section is not begun."""
PLOT_SECONDS: Final = 8.0
MEASURED: Final = tuple(name for name in SECTIONS if name != "warm")
PROTECTED: Final = (HERE / "results", ROOT / "docs")
"""Where figures are kept that were measured."""

Record = dict[str, Any]


@click.command(help=__doc__)
@click.option("--dry-run", is_flag=True, help="Tiny shapes on the CPU, for no figure at all; needs --out")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for gpu.json and the figures. Default: benchmarks/results and docs/figures",
)
@click.option("--budget", type=click.FloatRange(1), default=TOTAL_SECONDS, show_default=True, help="Seconds in all")
@click.option("--sections", default=",".join(MEASURED), show_default=True, help="Measurements to make")
@click.option("--checks/--no-checks", "with_checks", default=True, show_default=True, help="Tests and sanitizers")
@click.option("--build/--no-build", "with_build", default=True, show_default=True, help="Build the extension first")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Peers under torch.compile")
@click.option("--commit", help="What is measured, where the checkout has no git history")
def main(
    dry_run: bool,
    out: Path | None,
    budget: float,
    sections: str,
    with_checks: bool,
    with_build: bool,
    compiled: bool,
    commit: str | None,
) -> None:
    start = time.monotonic()
    target = Target(dry_run)
    reason = target.unavailable()
    if reason is not None:
        raise click.ClickException(reason)
    wanted = [name for name in sections.split(",") if name]
    if unknown := sorted(set(wanted) - set(MEASURED)):
        raise click.BadParameter(f"there is no {', '.join(unknown)}", param_hint="--sections")
    results, figures = folders(dry_run, out)
    record = describe(target, budget, commit)
    keeper = Keeper(results / "gpu.json", record)
    keeper.go_on()
    # What ends this process ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    warming = [] if dry_run or not compiled else _warm(start + (BUILD_SHARE + CHECKS_SHARE) * budget)
    if with_build:
        _say("build")
        limit = time.monotonic() + BUILD_SHARE * budget
        record["checks"]["build"] = (
            {"passed": None, "status": "dry run: not built"}
            if dry_run
            else checks.finish(checks.start(checks.build()), limit)
        )
        keeper.save()
    if with_checks:
        _check(record, dry_run, time.monotonic() + CHECKS_SHARE * budget)
        keeper.save()
    for running in warming:
        record["checks"][running.job.name] = checks.finish(running, time.monotonic() + 1)
    keeper.save()

    _measure(keeper, wanted, start + budget - PLOT_SECONDS, dry_run, compiled)
    record["floors"] = [asdict(floor) | {"holds": floor.holds} for floor in floors.evaluate(record)]
    record["complete"] = all(record["sections"].get(name, {}).get("status") == "done" for name in MEASURED)
    record["seconds"] = round(time.monotonic() - start, 1)
    keeper.save()
    for path in plots.save(record, figures):
        _say(f"wrote {path}")
    _say(f"wrote {keeper.path}")
    click.echo(summary.text(record))
    if summary.failures(record):
        sys.exit(1)


def folders(dry_run: bool, out: Path | None) -> tuple[Path, Path]:
    """Of the record and of the figures. A dry run's never lie where measured ones do."""
    if out is None:
        if dry_run:
            raise click.UsageError("--dry-run needs --out: its numbers belong to no GPU")
        return PROTECTED[0], PROTECTED[1] / "figures"
    if dry_run and any(out.resolve().is_relative_to(folder) for folder in PROTECTED):
        raise click.BadParameter("measured figures are kept there; a dry run's are none", param_hint="--out")
    out.mkdir(parents=True, exist_ok=True)
    return out, out


def describe(target: Target, budget: float, commit: str | None) -> Record:
    """The record's head: which machine, which versions, which code."""
    return {
        "kind": "dry run on a CPU: no GPU figure" if target.dry_run else "gpu",
        "dry_run": target.dry_run,
        "complete": False,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit or records.commit(),
        "device": target.facts(),
        "machine": doctor.machine(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "budget_seconds": budget,
        "checks": {},
        "sections": {},
    }


class Keeper:
    """Writes the record whenever it has grown."""

    SAME: Final = ("dry_run", "commit", "device", "versions")

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.record = record

    def go_on(self) -> None:
        """Takes over checks and sections of an earlier command that measured the same code on the same machine."""
        if self.path.exists() and self.record["commit"] is not None:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            if all(earlier[name] == self.record[name] for name in self.SAME):
                self.record |= {name: earlier[name] for name in ("checks", "sections")}
        self.save()

    def save(self) -> None:
        records.write(self.path, self.record)


def _warm(deadline: float) -> list[checks.Running]:
    """A process for each compiled peer, beside the build and the tests: the timed process finds the code on disk."""
    folder = Path(tempfile.mkdtemp())
    seconds = deadline - time.monotonic()
    jobs = []
    for name in GPU_PEERS:
        request = Request(str(folder / f"{name}.json"), "warm", seconds, False, True, name)
        jobs.append(checks.Job(f"compiling {name}", request.command()))
    return [checks.start(job) for job in jobs]


def _check(record: Record, dry_run: bool, deadline: float) -> None:
    """Tests and sanitizers at the same time: none of them is timed."""
    jobs: list[checks.Job] = [checks.tests(dry_run=dry_run)]
    for tool in checks.SANITIZERS:
        for schedule in ("persistent", "per_layer"):
            job = checks.sanitizer(tool, schedule, dry_run=dry_run)
            if job is None:
                record["checks"][f"{tool} {schedule}"] = {
                    "passed": None,
                    "status": "compute-sanitizer is not installed",
                }
            else:
                jobs.append(job)
    _say(", ".join(job.name for job in jobs))
    # On a machine with a GPU there are cores for all of them at once; a dry run may have two.
    running = [] if dry_run else [checks.start(job) for job in jobs]
    for index, job in enumerate(jobs):
        record["checks"][job.name] = checks.finish(checks.start(job) if dry_run else running[index], deadline)


def _measure(keeper: Keeper, wanted: Sequence[str], end: float, dry_run: bool, compiled: bool) -> None:
    """Every wanted section, each in a process of its own; what one has found so far lies beside the record."""
    for index, name in enumerate(wanted):
        seconds = share(name, wanted[index + 1 :], end - time.monotonic())
        if seconds < LEAST_SECONDS:
            keeper.record["sections"][name] = {"status": "not begun", "reason": "no time was left"}
            keeper.save()
            continue
        _say(f"{name}, {seconds:.0f} s")
        file = keeper.path.with_name(f"gpu.{name}.json")
        request = Request(str(file), name, seconds, dry_run, compiled)
        running = checks.start(checks.Job(name, request.command()))
        outcome = checks.finish(running, time.monotonic() + seconds + GRACE_SECONDS)
        part = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"status": "running"}
        if part["status"] == "running":
            timed_out = outcome["status"] == "out of time"
            part["status"] = "out of time" if timed_out else "failed"
            part["reason"] = f"ended with {outcome['status']}: {outcome['tail'][-500:]}"
        keeper.record["sections"][name] = part | {"limit_seconds": round(seconds, 1)}
        keeper.save()
        file.unlink(missing_ok=True)
        _say(f"  {name}: {part['status']} {part.get('reason', '')}")


def share(name: str, later: Sequence[str], seconds: float) -> float:
    """Seconds of section ``name``, of those left for it and the ``later`` ones: by weight."""
    weights = [SECTIONS[section][1] for section in (name, *later)]
    return seconds * weights[0] / sum(weights)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
