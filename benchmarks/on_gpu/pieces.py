"""Pieces of a section's work in processes of their own, several at a time: one that hangs or crashes costs no other."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from on_gpu import processes
from on_gpu.processes import LEFT_OUT, OUT_OF_TIME, Job, Outcome
from on_gpu.request import Request

Record = dict[str, Any]
PRINTED = 1500
"""Characters of a failed piece's output that are kept."""
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Piece:
    """One piece of work: its name in the results, and what its process is told."""

    name: str
    section: str
    argument: Mapping[str, Any] = field(default_factory=dict)


def run(
    pieces: Sequence[Piece],
    *,
    dry_run: bool,
    deadline: float,
    limit: float,
    environment: Mapping[str, str | None] | None = None,
    save: Callable[[list[Record]], None] = lambda results: None,
) -> list[Record]:
    """A result of every piece, in their order; ``save`` gets those that are there whenever there is one more.

    A piece fails when its process does or the ``failure`` it wrote is not None; ``skipped`` says why it did nothing.
    """
    results: dict[str, Record] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {piece.name: Path(folder) / f"{number}.json" for number, piece in enumerate(pieces)}

        def done(job: Job, outcome: Outcome) -> None:
            results[job.name] = _result(job.name, outcome, files[job.name])
            save([results[piece.name] for piece in pieces if piece.name in results])

        def job(piece: Piece) -> Job:
            seconds = min(limit, deadline - time.monotonic())
            request = Request(str(files[piece.name]), piece.section, seconds, dry_run, False, dict(piece.argument))
            return Job(piece.name, request.command(), environment or {})

        processes.run_all(map(job, pieces), processes.parallel(), deadline, limit, done)
    return [results[piece.name] for piece in pieces]


def _result(name: str, outcome: Outcome, file: Path) -> Record:
    found: Record = {"name": name, "status": outcome["status"]} | _seconds(outcome)
    if outcome["status"] in (OUT_OF_TIME, LEFT_OUT):
        return found | ({"output": outcome["tail"][-PRINTED:]} if outcome["tail"] else {})
    part: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    failure = part.get("failure")
    if part.get("status") not in ("done", "cut short"):
        failure = part.get("reason") or f"ended with {outcome['status']}: {outcome['tail'][-500:]}"
    kept = {name: value for name, value in part.items() if name not in ("failure", "status", "seconds", "reason")}
    if failure is None and "skipped" in part:
        return found | {"status": SKIPPED, "reason": part["skipped"]}
    if failure is None:
        return found | {"status": PASSED} | kept
    # A kernel that gives up says why on its own, which no exception repeats.
    printed = {"output": outcome["tail"][-PRINTED:]} if outcome["tail"] else {}
    return found | {"status": FAILED, "reason": failure} | printed | kept


def _seconds(outcome: Outcome) -> Record:
    return {"seconds": outcome["seconds"]} if "seconds" in outcome else {}


def of_job(name: str, outcome: Outcome) -> Record:
    """The result of a job that is told by its exit status alone."""
    named = {0: PASSED, OUT_OF_TIME: OUT_OF_TIME, LEFT_OUT: LEFT_OUT}
    if outcome["status"] not in named:
        return failed(name, outcome)
    return {"name": name, "status": named[outcome["status"]]} | _seconds(outcome)


def failed(name: str, outcome: Outcome) -> Record:
    """The result of a job that failed, with the end of what it printed."""
    told = {"status": FAILED, "reason": f"ended with {outcome['status']}", "output": outcome["tail"][-PRINTED:]}
    return {"name": name} | _seconds(outcome) | told
