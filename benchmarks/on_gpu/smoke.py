"""The first minute on a GPU: does every form of the kernels run, is it right, and is it the same each time.

Every form runs in a process of its own, so that the first that fails is known by name and takes no other along. A
process that hangs is ended at its limit; with SAML_KERNELS_DEBUG_WAITS the kernel itself says what it waited for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Final
from unittest.mock import patch

import torch

from on_gpu import pieces
from on_gpu.pieces import Piece
from on_gpu.run import Run, Save
from on_gpu.target import Target
from saml_kernels.backends.triton import availability, configs
from saml_kernels.testing import accuracy
from saml_kernels.testing.accuracy import AccuracyGate
from saml_kernels.testing.problem import Case, Results, backend, make

LIMIT_SECONDS: Final = 90.0
"""Of one form: starting torch and compiling take most of it."""
PROGRAMS: Final = (1, 2, 132, 264)
STEPS: Final = 2000
SLACK: Final = 2.0
"""Over the gate's bounds in 16 bits, where few numbers make the yardstick's own error a matter of chance."""
FOREIGN_FLOOR: Final = 1e-3
"""A foreign value between two rounded ones may fall on either side, which is no error."""
SMALL: Final = Case(300, 3, 32, 32, (32, 16))
# Work items enough for all the programs.
REPEATED: Final = Case(2500, 4, 32, 32, (64, 32))
DRY: Final = Case(24, 3, 8, 8, (8, 4))


@dataclass(frozen=True)
class Form:
    """One way in which the trunk is computed."""

    dtype: str
    schedule: str = "auto"
    foreign_dtype: str | None = None
    programs: int | None = None
    """Of a persistent launch; None: as built in."""

    @property
    def name(self) -> str:
        parts = [self.schedule, self.dtype]
        parts += [f"foreign {self.foreign_dtype}"] if self.foreign_dtype else []
        parts += [f"{self.programs} programs"] if self.programs else []
        return ", ".join(parts)


def forms(target: Target) -> Iterator[Form]:
    """Every schedule in every type, the types of foreign streams, and what the repetition runs."""
    if not target.schedules:
        # The reference, in a dry run: one form goes through the same motions.
        yield Form("bfloat16", foreign_dtype="int8")
        return
    for dtype in ("float32", "bfloat16", "float16"):
        for schedule in target.schedules:
            yield Form(dtype, schedule)
    # Quantised foreign streams have one schedule.
    yield Form("bfloat16", foreign_dtype="int8")
    yield Form("bfloat16", foreign_dtype="float8_e4m3fn")
    yield Form("float32", foreign_dtype="bfloat16")
    for programs in PROGRAMS:
        yield Form("bfloat16", "persistent", programs=programs)


def smoke(run: Run, deadline: float, save: Save) -> None:
    """Every form once against float64, then 2,000 training steps at several numbers of programs, equal bit for bit."""
    every = [Piece(form.name, "form", asdict(form)) for form in forms(run.target)]
    found: list[dict[str, Any]] = []

    def keep(results: list[dict[str, Any]]) -> None:
        save({"results": [*found, *results]})

    found = pieces.run(every, dry_run=run.target.dry_run, deadline=deadline, limit=LIMIT_SECONDS, save=keep)
    repeated = Piece(f"{STEPS:,} training steps at {', '.join(map(str, PROGRAMS))} programs in turn", "repeated")
    pieces.run([repeated], dry_run=run.target.dry_run, deadline=deadline, limit=LIMIT_SECONDS, save=keep)


def form(run: Run, deadline: float, save: Save) -> None:
    """One form forward and backward against float64; saves why it fails, or None."""
    wanted = Form(**run.argument)
    if wanted.foreign_dtype == "float8_e4m3fn" and (reason := availability.float8_reason(None)):
        save({"skipped": reason})
        return
    case = DRY if run.target.dry_run else SMALL if wanted.programs is None else REPEATED
    save({"failure": _failure(run.target, wanted, case)})


def _failure(target: Target, wanted: Form, case: Case) -> str | None:
    """One line on what is wrong; None where all is within its bounds."""
    dtype = getattr(torch, wanted.dtype)
    foreign = getattr(torch, wanted.foreign_dtype) if wanted.foreign_dtype else None
    problem = accuracy.without_kinks(make(case).to(torch.float32, target.device).leaves(), (None, foreign))
    gate = AccuracyGate(problem)
    ours = backend(target.ours, foreign_dtype=foreign, schedule=wanted.schedule)
    with _programs(wanted.programs) if wanted.programs else nullcontext():
        verdict = gate.judge(ours, dtype, foreign)
    if not verdict.errors:
        return verdict.failure
    slack = 1.0 if dtype == torch.float32 else SLACK
    floor = 0.0 if foreign is None else FOREIGN_FLOOR
    bounds = {name: max(floor, slack * bound) for name, bound in verdict.bounds.items()}
    return accuracy.outside(verdict.errors, bounds)


@contextmanager
def _programs(number: int) -> Iterator[None]:
    """Persistent launches of so many programs, in all threads."""
    config = configs.built_in(configs.Bucket.of(REPEATED.B, REPEATED.M, max(REPEATED.hidden_dims)), 2)
    one = {name: replace(getattr(config, name), programs=1) for name in ("forward", "backward")}
    with (
        configs.forced(replace(config, schedule="persistent", **one)),
        patch.object(configs, "multiprocessors", lambda index: number),
    ):
        yield


def repeated(run: Run, deadline: float, save: Save) -> None:
    """Training steps at the numbers of programs in turn: whether each gives the bits of the first."""
    steps = 2 * len(PROGRAMS) if run.target.dry_run else STEPS
    problem = make(DRY if run.target.dry_run else REPEATED).to(run.target.dtype, run.target.device).leaves()
    step = problem.call("step", backend(run.target.ours))
    first: dict[int, Results] = {}
    for number in range(steps):
        if time.monotonic() > deadline:
            save({"failure": f"no time for more than {number} of {steps} steps; these gave the same bits"})
            return
        programs = PROGRAMS[number % len(PROGRAMS)]
        with _programs(programs):
            results = problem.name(step())
        different = _different(first.setdefault(programs, results), results)
        if different is not None:
            save({"failure": f"step {number} with {programs} programs gave other bits: {different}"})
            return
    # Other numbers of programs are other compilations, which may add in another order.
    others = [_different(first[PROGRAMS[0]], first[programs]) for programs in PROGRAMS]
    save({"failure": None, "steps": steps, "same_at_every_number": not any(others)})


def _different(first: Results, again: Results) -> str | None:
    """The first tensor that is not the same, and how many of its entries."""
    for name, tensor in first.items():
        if not torch.equal(tensor, again[name]):
            entries = int((tensor != again[name]).sum())
            return f"{entries} of {tensor.numel()} entries of {name}"
    return None
