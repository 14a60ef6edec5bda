"""Everything that needs a GPU: build, smoke test, tests, sanitizers, launch times, tuning, benchmarks, floors, figures.

    make gpu GPU="--command check --out FOLDER"         (python3 benchmarks/gpu.py ...)
    make gpu GPU="--command tune --out FOLDER"
    make gpu GPU="--command measure --out FOLDER --tuned FOLDER/gpu.tuned.json"
    python benchmarks/gpu.py --dry-run --out FOLDER     the same motions on the CPU, for no figure at all

Installs nothing and needs no network: torch, triton, nvcc, ninja, pytest, matplotlib and click are the machine's own.
docs/benchmarks.md says what is measured. The record is written after every section, and a section's own file whenever
it has found something, so that nothing is lost when time runs out. A record of the same device, commit and versions is
continued, so that sections may be measured in several commands.
"""

import contextlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
# The checkout is not installed on such a machine.
sys.path.insert(0, str(ROOT))

import click  # noqa: E402
import torch  # noqa: E402

import records  # noqa: E402
from on_gpu import checks, floors, plots, processes, summary  # noqa: E402
from on_gpu.catalogue import CHECKS, COMMANDS, COMPILING, MEASURED, SECTIONS  # noqa: E402
from on_gpu.processes import OUT_OF_TIME, Job, Running  # noqa: E402
from on_gpu.request import Request  # noqa: E402
from on_gpu.sections import GPU_PEERS  # noqa: E402
from on_gpu.target import Target  # noqa: E402
from saml_kernels.backends.triton import configs  # noqa: E402

TOTAL_SECONDS: Final = 465.0
"""Under eight minutes, with what starting and ending take."""
BUILD_SHARE: Final = 0.25
WARM_SHARE: Final = 0.35
"""Of the total, at most; what is not used is left to the sections."""
GRACE_SECONDS: Final = 20.0
GRACE_SHARE: Final = 0.05
"""A section looks at the clock between cells; this much past its limit it is ended, with all it started."""
LEAST_SECONDS: Final = 1.0
"""With less a section is not begun."""
PLOT_SECONDS: Final = 8.0
DEFAULT: Final = (*CHECKS, *MEASURED)
PROTECTED: Final = (HERE / "results", ROOT / "docs")
"""Where figures are kept that were measured."""
DETAILS: Final = ROOT / "build" / "gpu"
"""Everything but record and figures, where there is no --out."""

Record = dict[str, Any]


@click.command(help=__doc__)
@click.option("--dry-run", is_flag=True, help="Tiny shapes on the CPU, for no figure at all; needs --out")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for everything that is written. Default: benchmarks/results, docs/figures and build/gpu",
)
@click.option("--budget", type=click.FloatRange(1), default=TOTAL_SECONDS, show_default=True, help="Seconds in all")
@click.option("--command", type=click.Choice(list(COMMANDS)), help="One of the three of a first day, for its sections")
@click.option("--sections", help=f"What to run, of {', '.join(SECTIONS)}. Default: {', '.join(DEFAULT)}")
@click.option(
    "--tuned",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of tuned choices, as section tune writes it. Default: the built-in choices",
)
@click.option("--build/--no-build", "with_build", default=True, show_default=True, help="Build the extension first")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Peers under torch.compile")
@click.option("--commit", help="What is measured, where the checkout has no git history")
def main(
    dry_run: bool,
    out: Path | None,
    budget: float,
    command: str | None,
    sections: str | None,
    tuned: Path | None,
    with_build: bool,
    compiled: bool,
    commit: str | None,
) -> None:
    start = time.monotonic()
    target = Target(dry_run)
    reason = target.unavailable()
    if reason is not None:
        raise click.ClickException(reason)
    wanted = chosen(command, sections)
    places = folders(dry_run, out)
    keeper = Keeper(places.results / "gpu.json", describe(target, budget, commit))
    keeper.go_on()
    record = keeper.record
    run = Sections(keeper, places.details, dry_run, compiled, choices(tuned, places.details), budget)

    warming = [] if dry_run or not compiled or not set(wanted) & set(COMPILING) else _warm(run, WARM_SHARE * budget)
    if with_build:
        _say("build")
        limit = time.monotonic() + BUILD_SHARE * budget
        record["checks"]["build"] = (
            {"passed": None, "status": "dry run: not built"}
            if dry_run
            else processes.finish(processes.start(checks.build(places.details / "gpu.build.log")), limit)
        )
        keeper.save()
    end = start + budget - PLOT_SECONDS
    timed = [name for name in wanted if not SECTIONS[name].check]
    run.all([name for name in wanted if SECTIONS[name].check], end, timed)
    for running in warming:
        record["checks"][running.job.name] = processes.finish(running, start + WARM_SHARE * budget)
        keeper.save()
    run.all(timed, end)

    record["floors"] = [asdict(floor) | {"holds": floor.holds} for floor in floors.evaluate(record)]
    record["complete"] = all(record["sections"].get(name, {}).get("status") == "done" for name in MEASURED)
    record["seconds"] = round(time.monotonic() - start, 1)
    keeper.save()
    for path in plots.save(record, places.figures):
        _say(f"wrote {path}")
    _say(f"wrote {keeper.path}")
    click.echo(summary.text(record))
    if summary.failures(record):
        sys.exit(1)


def chosen(command: str | None, sections: str | None) -> list[str]:
    """Names of sections, in their order."""
    if command is not None and sections is not None:
        raise click.UsageError("--command has its sections; give one of --command and --sections")
    if sections is None:
        return list(DEFAULT if command is None else COMMANDS[command])
    names = {name for name in sections.split(",") if name}
    if unknown := sorted(names - set(SECTIONS)):
        raise click.BadParameter(f"there is no {', '.join(unknown)}", param_hint="--sections")
    return [name for name in SECTIONS if name in names]


@dataclass(frozen=True)
class Places:
    """Folders of what is written."""

    results: Path
    """The record's."""
    figures: Path
    details: Path
    """Of the sections' files, logs, and tuned choices."""


def folders(dry_run: bool, out: Path | None) -> Places:
    """A dry run's files never lie where measured ones do."""
    if out is None:
        if dry_run:
            raise click.UsageError("--dry-run needs --out: its numbers belong to no GPU")
        DETAILS.mkdir(parents=True, exist_ok=True)
        return Places(PROTECTED[0], PROTECTED[1] / "figures", DETAILS)
    # Sections run in the repository's root.
    out = out.resolve()
    if dry_run and any(out.is_relative_to(folder) for folder in PROTECTED):
        raise click.BadParameter("measured figures are kept there; a dry run's are none", param_hint="--out")
    out.mkdir(parents=True, exist_ok=True)
    return Places(out, out, out)


def choices(tuned: Path | None, details: Path) -> Path:
    """The file of tuned choices that sections read; without one none, not even this user's own."""
    if tuned is None:
        return details / "gpu.no-choices.json"
    try:
        configs.tuned(tuned)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--tuned") from error
    return tuned.resolve()


def describe(target: Target, budget: float, commit: str | None) -> Record:
    """The record's head: which machine, which versions, which code."""
    head = records.head()
    return {
        "kind": "dry run on a CPU: no GPU figure" if target.dry_run else "gpu",
        "dry_run": target.dry_run,
        "complete": False,
        "started": head["started"],
        "command": head["command"],
        "commit": commit or head["commit"],
        "device": target.facts(),
        "machine": head["machine"],
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


@dataclass(frozen=True)
class Sections:
    """Runs sections, each in a process of its own; what one has found so far lies in its file, then in the record."""

    keeper: Keeper
    details: Path
    dry_run: bool
    compiled: bool
    tuned: Path
    budget: float

    @property
    def grace(self) -> float:
        return min(GRACE_SECONDS, GRACE_SHARE * self.budget)

    def all(self, wanted: Sequence[str], end: float, later: Sequence[str] = ()) -> None:
        """Until ``end`` (time.monotonic), a part of which is left to ``later`` ones."""
        waiting = batches(wanted, self.dry_run)
        while waiting:
            batch, *waiting = waiting
            seconds = share([batch, *waiting, *batches(later)], end - self.grace - time.monotonic())
            if seconds < LEAST_SECONDS:
                for name in batch:
                    self._keep(name, {"status": "not begun", "reason": "no time was left"})
                continue
            _say(f"{', '.join(batch)}, {seconds:.0f} s")
            with self._taking_over(running := {name: self._start(name, seconds) for name in batch}, seconds):
                for name, job in running.items():
                    outcome = processes.finish(job, job.started + seconds + self.grace)
                    self._keep(name, self._part(name, outcome, seconds))

    def _start(self, name: str, seconds: float) -> Running:
        file = self._file(name)
        file.unlink(missing_ok=True)
        compiled = self.compiled and not SECTIONS[name].check
        request = Request(str(file), name, seconds, self.dry_run, compiled)
        return processes.start(Job(name, request.command(), self.environment(name)))

    def environment(self, name: str) -> dict[str, str | None]:
        """Of a section's process."""
        return {**SECTIONS[name].environment(), configs.CACHE_VARIABLE: str(self.tuned)}

    def _file(self, name: str) -> Path:
        return self.details / f"gpu.{name}.json"

    def _part(self, name: str, outcome: Mapping[str, Any], seconds: float) -> Record:
        """A section's part of the record, whichever way it ended."""
        file = self._file(name)
        part: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"status": "running"}
        if part["status"] == "running":
            part["status"] = OUT_OF_TIME if outcome["status"] == OUT_OF_TIME else "failed"
            part["reason"] = f"ended with {outcome['status']}: {outcome['tail'][-500:]}"
            part["output"] = outcome["tail"]
        return part | {"limit_seconds": round(seconds, 1), "tuned": self.tuned.name if self.tuned.exists() else None}

    def _keep(self, name: str, part: Record) -> None:
        self.keeper.record["sections"][name] = part
        self.keeper.save()
        _say(f"  {name}: {part['status']} {part.get('reason', '')}")

    @contextlib.contextmanager
    def _taking_over(self, running: Mapping[str, Running], seconds: float) -> Iterator[None]:
        """Keeps what the sections have found so far should this process be told to end."""
        try:
            yield
        except BaseException as error:
            for name, job in running.items():
                if job.process.poll() is None:
                    job.end()
                    self._keep(name, self._part(name, {"status": type(error).__name__, "tail": ""}, seconds))
            raise


def batches(wanted: Sequence[str], together: bool = False) -> list[tuple[str, ...]]:
    """Sections that run at the same time; all of them where nothing is timed."""
    if together:
        return [tuple(wanted)] if wanted else []
    found: list[tuple[str, ...]] = []
    for name in wanted:
        if found and SECTIONS[name].beside and SECTIONS[found[-1][0]].beside:
            found[-1] = (*found[-1], name)
        else:
            found.append((name,))
    return found


def share(waiting: Sequence[tuple[str, ...]], seconds: float) -> float:
    """Seconds of the first batch, of those left for all: by weight."""
    weights = [max(SECTIONS[name].weight for name in batch) for batch in waiting]
    return seconds * weights[0] / sum(weights)


def _warm(run: Sections, seconds: float) -> list[Running]:
    """A process for each compiled peer, beside the build and the tests: the timed process finds the code on disk."""
    folder = Path(tempfile.mkdtemp())
    jobs = []
    for name in GPU_PEERS:
        request = Request(str(folder / f"{name}.json"), "warm", seconds, False, True, {"peer": name})
        jobs.append(Job(f"compiling {name}", request.command(), run.environment("headline")))
    return [processes.start(job) for job in jobs]


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    processes.end_with_this_process()
    main()
