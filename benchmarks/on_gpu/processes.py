"""Commands in processes of their own: each with a limit, its output kept, and everything it started ended with it."""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from on_gpu import guard

ROOT: Final = Path(__file__).resolve().parents[2]
GUARD: Final = Path(guard.__file__).resolve()
TAIL: Final = 4000
"""Characters of a process's output that are kept in the record."""
BYTES_A_JOB: Final = 4 * 2**30
"""Memory that a compiler, or a process with torch and a GPU, may take."""
LOOK_SECONDS: Final = 0.05
OUT_OF_TIME: Final = "out of time"
LEFT_OUT: Final = "left out"
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A command from the repository's root."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables it gets, or (None) does not get, besides those of this process."""
    output: Path | None = None
    """Where what it prints is kept."""


@dataclass(frozen=True, eq=False)
class Running:
    """A job on its way, under a guard, its output going to a file."""

    job: Job
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    started: float

    def end(self) -> None:
        """The process and everything it started: at once."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(guard.END_SECONDS + 5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        _RUNNING.discard(self)


_RUNNING: Final[set[Running]] = set()


@atexit.register
def end_all() -> None:
    """No job outlives this process."""
    for running in _RUNNING:
        with contextlib.suppress(OSError):
            running.process.terminate()
    for running in tuple(_RUNNING):
        running.end()


def end_with_this_process() -> None:
    """What ends this process by a signal ends what it started; what it was started to ignore stays ignored."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def start(job: Job) -> Running:
    """At once, beside whatever else runs."""
    output = tempfile.TemporaryFile() if job.output is None else job.output.open("w+b")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-IS", str(GUARD), str(os.getpid()), *job.command],
        cwd=ROOT,
        env=environment(job.environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running = Running(job, process, output, time.monotonic())
    _RUNNING.add(running)
    return running


def finish(running: Running, deadline: float) -> Outcome:
    """What came of a job, for JSON; past the ``deadline`` (time.monotonic) it and what it started are ended."""
    try:
        status: str | int = running.process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        status = OUT_OF_TIME
    return _outcome(running, status)


def _outcome(running: Running, status: str | int) -> Outcome:
    running.end()
    with running.output as output:
        output.seek(0)
        text = output.read().decode(errors="replace")
    return {
        "passed": status == 0,
        "status": status,
        "seconds": round(time.monotonic() - running.started, 1),
        "tail": text[-TAIL:].replace(str(ROOT), "."),
    }


def run_all(
    jobs: Iterable[Job], most: int, deadline: float, limit: float, done: Callable[[Job, Outcome], None]
) -> None:
    """Runs jobs in their order, ``most`` at a time, each for ``limit`` seconds and all until the deadline.

    ``done`` is told of every job: what :func:`finish` returns, or that it was left out for want of time.
    """
    coming = iter(jobs)
    under_way: list[tuple[Running, float]] = []
    more = True
    while more or under_way:
        now = time.monotonic()
        if now >= deadline:
            for left in coming:
                done(left, {"passed": None, "status": LEFT_OUT, "tail": ""})
        while more and len(under_way) < most:
            # Asked for when its turn has come: what a job is told depends on the time.
            job = next(coming, None)
            more = job is not None
            if job is not None:
                under_way.append((start(job), min(now + limit, deadline)))
        # Told to end together, they do not wait for each other's end.
        for running, end in under_way:
            if now >= end:
                running.process.terminate()
        for entry in tuple(under_way):
            running, end = entry
            if now >= end or running.process.poll() is not None:
                under_way.remove(entry)
                status = running.process.poll()
                done(running.job, _outcome(running, OUT_OF_TIME if now >= end or status is None else status))
        time.sleep(LOOK_SECONDS)


def parallel() -> int:
    """How many compilers, or processes with torch and a GPU, this machine takes at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return cores
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(1, min(cores, available // BYTES_A_JOB))


def environment(more: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """For a process that imports the packages of this checkout, installed or not."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    every = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(more or {})}
    return {name: value for name, value in every.items() if value is not None}
