"""What comes before every figure: the build, the GPU tests, compute-sanitizer."""

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch

from on_gpu import limits, pieces, processes, reporting, small_cases
from on_gpu.processes import OUT_OF_TIME, Job, Outcome
from on_gpu.run import Run, Save

TESTS: Final = ("tests/triton/test_gpu.py", "tests/kernels/test_grouping_gpu.py")
RESTARTS: Final = 1000
"""Workers that may be lost: each costs one test only."""
SANITIZERS: Final = ("memcheck", "racecheck")
SANITIZER_ERROR: Final = 86
"""Exit status that compute-sanitizer is told to use for what it finds, apart from the program's own."""
MISSING: Final = "compute-sanitizer is not installed"


def build(output: Path | None = None) -> Job:
    """The extension, in place, against this torch, for this GPU only: every further architecture costs its time."""
    major, minor = torch.cuda.get_device_capability()
    jobs = os.environ.get("MAX_JOBS") or str(processes.parallel())
    return Job(
        "build",
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        {"SAML_KERNELS_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": jobs},
        output,
    )


def tests(run: Run, deadline: float, save: Save) -> None:
    """Parity in all schedules and types against float64, CUDA graphs, determinism. A dry run skips each for its reason.

    A test that ends its process (limits.py) costs no other: pytest-xdist goes on with them, and where it is missing
    pytest is started again for those that are left.
    """
    log, done = run.folder / "gpu.tests.jsonl", run.folder / "gpu.tests.done"
    log.unlink(missing_ok=True)
    left, number = -1, 0
    while True:
        number += 1
        begun = [event["test"] for event in reporting.events(log) if event["event"] == reporting.BEGUN]
        done.write_text("".join(f"{test}\n" for test in begun), encoding="utf-8")
        named = {reporting.LOG: str(log), reporting.DONE: str(done)}
        outputs = [run.folder / f"gpu.tests{'' if number == 1 else f'.{number}'}.{kind}" for kind in ("log", "xml")]
        job = Job("tests", [*_pytest(run), f"--junitxml={outputs[1]}", *TESTS], named, outputs[0])
        outcome = processes.finish(processes.start(job), deadline)
        found = reporting.results(reporting.events(log), limits.seconds())
        before, left = left, sum(result["status"] == processes.LEFT_OUT for result in found)
        save({"results": found})
        in_time = outcome["status"] != OUT_OF_TIME and time.monotonic() < deadline
        # Again where pytest itself was ended, as long as that gets further.
        if in_time and left not in (0, before):
            continue
        # Tests that do not load, say, are no test's failure.
        if in_time and (left or not found or outcome["status"] not in (0, 1)):
            save({"results": [pieces.failed("pytest", outcome), *found]})
        done.unlink()
        return


def _pytest(run: Run) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "on_gpu.reporting"]
    if not run.target.dry_run and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes.parallel()), "--maxschedchunk=1", f"--max-worker-restart={RESTARTS}"]
    return command


def sanitize(run: Run, deadline: float, save: Save) -> None:
    """compute-sanitizer over small cases, a process each. A dry run runs one of them alone."""
    jobs: list[Job] = []
    results: dict[str, dict[str, Any]] = {}
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    wanted = [(tool, case) for tool in SANITIZERS for case in small_cases.names(run.target)]
    for tool, case in wanted[: 1 if run.target.dry_run else None]:
        job = _sanitizer(run, tool, case, found)
        results[job.name] = {"name": job.name, "status": processes.LEFT_OUT}
        jobs.append(job)
    if found is None and not run.target.dry_run:
        save({"results": [{"name": name, "status": pieces.SKIPPED, "reason": MISSING} for name in results]})
        return

    def done(job: Job, outcome: Outcome) -> None:
        results[job.name] = pieces.of_job(job.name, outcome)
        save({"results": list(results.values())})

    # Beside the tests: half of what the machine takes.
    processes.run_all(jobs, max(1, processes.parallel() // 2), deadline, float("inf"), done)


def _sanitizer(run: Run, tool: str, case: str, found: str | None) -> Job:
    name = f"{tool}, {case}"
    command = [sys.executable, str(Path(small_cases.__file__).resolve()), case]
    if run.target.dry_run:
        command.append("--dry-run")
    else:
        command = [str(found), "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), *command]
    # Without torch's cache every tensor is an allocation, whose bounds memcheck knows.
    told: dict[str, str | None] = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return Job(name, command, told, run.folder / f"gpu.sanitize.{name.replace(', ', '.').replace(' ', '_')}.log")
