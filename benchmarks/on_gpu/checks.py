"""What comes before every figure, as processes of their own: the build, the GPU tests, compute-sanitizer."""

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import torch

ROOT: Final = Path(__file__).resolve().parents[2]
TAIL: Final = 4000
"""Characters of a process's output that are kept."""
TEST_WORKERS: Final = 10
"""Processes of the GPU tests where pytest-xdist is installed; compiling kernels is what takes their time."""
SANITIZERS: Final = ("memcheck", "racecheck")
SANITIZER_ERROR: Final = 86
"""Exit status that compute-sanitizer is told to use for what it finds, apart from the program's own."""


@dataclass(frozen=True)
class Job:
    """A command from the repository's root."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def build() -> Job:
    """The extension, in place, against this torch, for this GPU only: every further architecture costs its time."""
    major, minor = torch.cuda.get_device_capability()
    return Job(
        "build",
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        {"SAML_KERNELS_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"},
    )


def tests(*, dry_run: bool) -> Job:
    """Parity in all schedules and types against float64, CUDA graphs, determinism. A dry run collects them only."""
    paths = ["tests/triton/test_gpu.py", "tests/kernels/test_grouping_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    if dry_run:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(TEST_WORKERS)]
    return Job("tests", command)


def sanitizer(tool: str, schedule: str, *, dry_run: bool) -> Job | None:
    """compute-sanitizer over small cases of one schedule; None where it is missing. A dry run runs the cases alone."""
    cases = [
        sys.executable,
        str(Path(__file__).with_name("small_cases.py")),
        schedule,
        *(["--dry-run"] if dry_run else []),
    ]
    if dry_run:
        return Job(f"{tool} {schedule}", cases)
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        return None
    # Without torch's cache every tensor is an allocation, whose bounds memcheck knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return Job(
        f"{tool} {schedule}", [found, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), *cases], environment
    )


@dataclass(frozen=True, eq=False)
class Running:
    """A job on its way, in a process group of its own, its output going to a file."""

    job: Job
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    started: float

    def end(self) -> None:
        """The process and everything it started: at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _RUNNING.discard(self)


_RUNNING: Final[set[Running]] = set()


@atexit.register
def end_all() -> None:
    """No job outlives this process."""
    for running in tuple(_RUNNING):
        running.end()


def start(job: Job) -> Running:
    """At once, beside whatever else runs."""
    output = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        job.command,
        cwd=ROOT,
        env=environment(job.environment),
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running = Running(job, process, output, time.monotonic())
    _RUNNING.add(running)
    return running


def finish(running: Running, deadline: float) -> dict[str, Any]:
    """What came of a job, for JSON; past the ``deadline`` (time.monotonic) it and what it started are ended."""
    try:
        status: str | int = running.process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        status = "out of time"
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


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a process that imports the packages of this checkout, installed or not."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(more or {})}
