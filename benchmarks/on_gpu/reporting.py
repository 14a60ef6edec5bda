"""A pytest plugin: every test's begin and result, a line each in a file, at once: nothing is lost with the process.

    SAML_KERNELS_TEST_LOG=FILE pytest -p on_gpu.reporting

Tests that SAML_KERNELS_TESTS_DONE names, a file with a line each, are left out.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

LOG: Final = "SAML_KERNELS_TEST_LOG"
DONE: Final = "SAML_KERNELS_TESTS_DONE"
COLLECTED, BEGUN, ENDED = "collected", "begun", "ended"
Record = dict[str, Any]


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist tells its controller, which writes.
    if LOG in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Log(Path(os.environ[LOG])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if DONE not in os.environ:
        return
    done = set(Path(os.environ[DONE]).read_text(encoding="utf-8").splitlines())
    left_out = [item for item in items if item.nodeid in done]
    items[:] = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=left_out)


class _Log:
    """The hooks that write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, event: str, **fields: object) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **fields}, ensure_ascii=False) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(COLLECTED, tests=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self._write(COLLECTED, tests=list(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(BEGUN, test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.skipped or report.when == "call":
            self._write(ENDED, test=report.nodeid, outcome=report.outcome, reason=_reason(report))


def _reason(report: pytest.TestReport) -> str:
    """The error's first line, or why a test was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    lines = [line.removeprefix("E").strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    # The loss of a worker has no error, but its last line says so.
    return "" if report.passed else (lines or report.longreprtext.strip().splitlines()[-1:] or ["failed"])[0]


def events(path: Path) -> Iterator[Record]:
    """Of a log; a last line that was cut off is left out."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def results(log: Iterable[Record], limit: float) -> list[Record]:
    """A result of every collected test; one whose process ended after so many seconds is out of time."""
    begun: dict[str, float] = {}
    ended: dict[str, Record] = {}
    collected: dict[str, None] = {}
    for event in log:
        if event["event"] == COLLECTED:
            collected |= dict.fromkeys(event["tests"])
        elif event["event"] == BEGUN:
            begun[event["test"]] = event["time"]
        # What failed stays so, whatever is told of the test later.
        elif ended.get(event["test"], {}).get("status") != "failed":
            ended[event["test"]] = _ended(event, event["time"] - begun.get(event["test"], event["time"]), limit)
    lost = {"status": "failed", "reason": "its process ended, or time ran out, while it was under way"}
    return [{"name": test} | ended.get(test, lost if test in begun else {"status": "left out"}) for test in collected]


def _ended(event: Record, seconds: float, limit: float) -> Record:
    # pytest-xdist cannot know why a worker is gone.
    hung = event["outcome"] == "failed" and "crashed while running" in event["reason"] and seconds > 0.9 * limit
    reason = {"reason": event["reason"]} if event["reason"] else {}
    return {"status": "out of time" if hung else event["outcome"], "seconds": round(seconds, 1)} | reason
