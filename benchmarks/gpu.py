"""Everything that needs a GPU in one command: build, tests, sanitizers, launch counts, benchmarks, floors, figures.

    make gpu                                            (python3 benchmarks/gpu.py)
    python benchmarks/gpu.py --dry-run --out FOLDER     the same motions on the CPU, for no figure at all

Installs nothing and needs no network: torch, triton, nvcc, ninja, pytest, matplotlib and click are the machine's own.
docs/benchmarks.md says what is measured. The record is written after every step, so that nothing is lost when time runs
out.
"""

import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
import time
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
"""A section looks at the clock between cells; this much past its limit it is ended."""
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
    keeper.save()

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
    if not summary.passed(record):
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

    def __init__(self, path: Path, record: Record) -> None:
        self.path = path
        self.record = record

    def save(self) -> None:
        records.write(self.path, self.record)


def _warm(deadline: float) -> list[checks.Running]:
    """A process for each compiled peer, beside the build and the tests: the timed process finds the code on disk."""
    folder = Path(tempfile.mkdtemp())
    seconds = deadline - time.monotonic()
    jobs = []
    for name in GPU_PEERS:
        request = Request(str(folder / f"{name}.json"), ["warm"], seconds, False, True, name)
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


def _measure(keeper: Keeper, wanted: list[str], end: float, dry_run: bool, compiled: bool) -> None:
    """Every wanted section, in as few processes as errors and limits allow."""
    remaining = list(wanted)
    with tempfile.TemporaryDirectory() as folder:
        while remaining:
            file = Path(folder) / f"{len(remaining)}.json"
            request = Request(str(file), remaining, max(1.0, end - time.monotonic()), dry_run, compiled)
            _say("measuring " + ", ".join(remaining))
            running = checks.start(checks.Job("measure", request.command()))
            seen: float = 0
            while True:
                ended = running.process.poll() is not None
                if file.exists() and (changed := file.stat().st_mtime) != seen:
                    seen = changed
                    keeper.record["sections"] |= json.loads(file.read_text(encoding="utf-8"))
                    keeper.save()
                if ended or _overdue(keeper.record, remaining):
                    break
                time.sleep(0.2)
            outcome = checks.finish(running, time.monotonic())
            sections = keeper.record["sections"]
            begun = [name for name in remaining if name in sections]
            if not begun:
                # It did not come as far as the first section, and would not again.
                sections[remaining[0]] = {"status": "failed", "reason": f"no process: {outcome['tail'][-500:]}"}
                begun = remaining[:1]
            for name in begun:
                if sections[name]["status"] == "running":
                    sections[name]["status"] = "out of time" if not ended else "failed"
                    sections[name] |= {"reason": outcome["tail"][-500:]} if ended else {}
                _say(f"  {name}: {sections[name]['status']}")
            keeper.save()
            remaining = [name for name in remaining if name not in begun]


def _overdue(record: Record, names: list[str]) -> bool:
    """A section has run past its limit and grace."""
    now = time.monotonic()
    for name in names:
        part = record["sections"].get(name, {})
        if part.get("status") == "running":
            begun = part.setdefault("seen", now)
            if now - begun > part["limit_seconds"] + GRACE_SECONDS:
                return True
    return False


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
