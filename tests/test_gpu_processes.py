"""Processes of benchmarks/gpu.py: each has a limit, nothing that it started is left, and none costs another."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from on_gpu import checks, guard, limits, pieces, processes, reporting
from on_gpu.processes import Job
from on_gpu.request import Request
from on_gpu.run import Run
from on_gpu.target import Target

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def ended(pid: int) -> bool:
    """Gone, or a zombie that waits for its new parent."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_the_build_takes_no_more_jobs_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
    monkeypatch.setattr(processes, "BYTES_A_JOB", 2**62)
    assert checks.build().environment["MAX_JOBS"] == "1"
    monkeypatch.setattr(processes, "BYTES_A_JOB", 1)
    assert checks.build().environment["MAX_JOBS"] == "96"
    monkeypatch.setenv("MAX_JOBS", "7")
    assert checks.build().environment["MAX_JOBS"] == "7"


def test_a_job_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    job = processes.start(Job("sleep", command, output=tmp_path / "log"))
    lines_of(tmp_path / "log", 1)
    begun = time.monotonic()
    outcome = processes.finish(job, begun + 1)
    assert time.monotonic() - begun < 30
    assert (outcome["passed"], outcome["status"], outcome["tail"].strip()) == (False, "out of time", "begun")
    assert (tmp_path / "log").read_text().strip() == "begun"


def test_the_status_of_a_job_is_its_own() -> None:
    for program, status in (("raise SystemExit(3)", 3), ("import os; os.abort()", -signal.SIGABRT)):
        job = Job("end", [sys.executable, "-c", program])
        assert processes.finish(processes.start(job), time.monotonic() + 60)["status"] == status
    missing = processes.finish(processes.start(Job("missing", ["/nowhere/program"])), time.monotonic() + 60)
    assert missing["status"] == 127
    assert "/nowhere/program" in missing["tail"]


# A process, one in a session of its own that ignores SIGTERM, and one below it whose parent is gone.
ESCAPING = """
import os, signal, sys, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(os.getpid(), flush=True)
            os.write(write, b".")
            time.sleep(600)
        os._exit(0)
    print(os.getpid(), flush=True)
    os.write(write, b".")
    time.sleep(600)
for _ in range(2):
    os.read(read, 1)
print(os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
"""


def lines_of(log: Path, number: int) -> list[str]:
    """As soon as there are so many."""
    for _ in range(600):
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) == number:
            return lines
        time.sleep(0.1)
    raise AssertionError(lines)


def escaping(seconds: float) -> Job:
    return Job("escaping", [sys.executable, "-c", ESCAPING, str(seconds)])


@LINUX
@pytest.mark.parametrize("seconds", [600, 0], ids=["ended", "ends by itself"])
def test_nothing_is_left_of_a_job(seconds: float, tmp_path: Path) -> None:
    job = processes.start(dataclasses.replace(escaping(seconds), output=tmp_path / "log"))
    lines_of(tmp_path / "log", 3)
    outcome = processes.finish(job, time.monotonic() + (1 if seconds else 60))
    assert outcome["status"] == ("out of time" if seconds == 600 else 0)
    pids = [int(line) for line in outcome["tail"].split()]
    assert len(pids) == 3
    assert all(map(ended, pids))
    assert guard.descendants(os.getpid()) == [] or not set(pids) & set(guard.descendants(os.getpid()))


@LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=str)
def test_nothing_is_left_of_a_command_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    """As gpu.py is: by a signal to it alone, which it was not started to ignore, as the tests may be."""
    program = (
        f"import signal; signal.signal({int(signal.SIGHUP)}, signal.SIG_DFL); "
        "import sys, time; from pathlib import Path; from on_gpu import processes; processes.end_with_this_process(); "
        f"job = processes.Job('escaping', [sys.executable, '-c', {ESCAPING!r}, '600'], output=Path(sys.argv[1])); "
        "processes.start(job); time.sleep(600)"
    )
    log = tmp_path / "log"
    command = subprocess.Popen(
        [sys.executable, "-c", program, str(log)], env=processes.environment(), stderr=subprocess.DEVNULL
    )
    pids = [int(line) for line in lines_of(log, 3)]
    command.send_signal(number)
    command.wait(30)
    assert all(map(ended, pids))


HANGING = """
import os, signal, sys, time
from types import SimpleNamespace
import pytest

pytest_plugins = ("on_gpu.limits",)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("time_limit")]

@pytest.mark.parametrize("number", range(3))
def test_quick(number): pass
def test_hangs(): time.sleep(600)
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def test_fails(): assert 1 == 2
def test_last(): pass
def test_breaks_the_device():
    def synchronize(): raise RuntimeError("an illegal memory access")
    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))
"""


@LINUX
@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_that_hangs_costs_no_other(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pytest-xdist, and without it."""
    file = tmp_path / "test_hanging.py"
    file.write_text(HANGING)
    monkeypatch.setattr(checks, "TESTS", (str(file),))
    # Other plugins take longer to start than these tests.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    options = (
        ["-p", "xdist", "-n", str(workers), "--maxschedchunk=1", f"--max-worker-restart={checks.RESTARTS}"]
        if workers
        else []
    )
    monkeypatch.setattr(checks, "_pytest", lambda run, original=checks._pytest: [*original(run), *options])
    monkeypatch.setenv(limits.VARIABLE, "1.5")
    found: dict[str, Any] = {}
    run = Run(Target(dry_run=True), False, folder=tmp_path)
    checks.tests(run, time.monotonic() + 100, found.update)
    results = {result["name"].split("::")[1]: result for result in found["results"]}
    lost = {"status": "failed", "reason": "its process ended, or time ran out, while it was under way"}
    assert {name: result["status"] for name, result in results.items()} == {
        **dict.fromkeys(("test_quick[0]", "test_quick[1]", "test_quick[2]", "test_last"), "passed"),
        "test_hangs": "out of time" if workers else "failed",
        "test_crashes": "failed",
        "test_fails": "failed",
        "test_breaks_the_device": "failed",
    }
    assert results["test_fails"]["reason"] == "assert 1 == 2"
    if workers:
        assert "crashed while running" in results["test_crashes"]["reason"]
    else:
        assert results["test_crashes"].items() >= lost.items()
    # Where it stood, for the one who reads.
    assert "in test_hangs" in "".join(path.read_text() for path in tmp_path.glob("gpu.tests*.log"))


def test_tests_that_do_not_load_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_right.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_right(): pass")
    (tmp_path / "test_a.py").write_text("import nothing_of_that_name")
    monkeypatch.setattr(checks, "TESTS", (str(tmp_path / "test_right.py"), str(tmp_path / "test_a.py")))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    found: dict[str, Any] = {}
    checks.tests(Run(Target(dry_run=True), False, folder=tmp_path), time.monotonic() + 100, found.update)
    assert (found["results"][0]["name"], found["results"][0]["status"]) == ("pytest", "failed")
    assert "nothing_of_that_name" in found["results"][0]["output"]


def test_tests_without_time_are_left_out_by_name() -> None:
    log = [
        {"event": "collected", "tests": ["a", "b", "c"], "time": 0.0},
        {"event": "begun", "test": "a", "time": 1.0},
        {"event": "ended", "test": "a", "time": 2.0, "outcome": "passed", "reason": ""},
        {"event": "begun", "test": "b", "time": 2.0},
    ]
    results = reporting.results(log, 9.0)
    assert [(result["name"], result["status"]) for result in results] == [
        ("a", "passed"),
        ("b", "failed"),
        ("c", "left out"),
    ]


def test_pieces_end_each_in_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import json, os, sys, time
request = json.loads(sys.argv[1])
kind = request["argument"]["kind"]
if kind == "crashes":
    os.abort()
if kind == "hangs":
    time.sleep(600)
part = {"status": "done", "seconds": 0.1, "failure": None if kind == "right" else "wrong: by far"}
json.dump(part, open(request["file"], "w"))
"""
    monkeypatch.setattr(Request, "command", lambda self: [sys.executable, "-c", program, json.dumps(self.__dict__)])
    monkeypatch.setattr(processes, "parallel", lambda: 4)
    kinds = ("crashes", "hangs", "right", "wrong", "too late")
    seen: list[int] = []
    begun = time.monotonic()
    results = pieces.run(
        [pieces.Piece(kind, "form", {"kind": kind if kind != "too late" else "hangs"}) for kind in kinds],
        dry_run=True,
        deadline=begun + 60,
        limit=6,
        save=lambda found: seen.append(len(found)),
    )
    assert time.monotonic() - begun < 60
    assert {result["name"]: result["status"] for result in results} == {
        "crashes": "failed",
        "hangs": "out of time",
        "right": "passed",
        "wrong": "failed",
        "too late": "out of time",
    }
    assert [result["name"] for result in results] == list(kinds)
    assert seen == [1, 2, 3, 4, 5]
    assert pieces.run([pieces.Piece("a", "form", {"kind": "right"})], dry_run=True, deadline=begun, limit=1) == [
        {"name": "a", "status": "left out"}
    ]
