"""Choices of the Triton kernels tried out in processes of their own, several at a time, before any is timed.

Compiling is what takes the time, and its results are on disk afterwards. A choice that does not compile, hangs or is
wrong is known then, and is not timed.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from on_gpu import pieces
from on_gpu.pieces import PASSED, Piece
from on_gpu.run import Run, Save
from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.testing import accuracy
from saml_kernels.testing.accuracy import AccuracyGate
from saml_kernels.testing.problem import backend, make

LIMIT_SECONDS: Final = 75.0
ROWS: Final = 512
"""No batch size is compiled in: few rows show as much."""
HARMLESS: Final = ("wrong: ", "OutOfResources")
"""How failures begin after which a choice may run in a process that has more to do."""
Wanted = Mapping[str, tuple[Choice, int]]
"""A choice and M, by name."""


def run(first: Wanted, wanted: Wanted, run: Run, deadline: float) -> dict[str, str | None]:
    """Why a choice cannot be timed, None if it can; ``first`` go first, as the others find their launches compiled."""
    results = pieces.run(
        [Piece(name, "trial", {"choice": asdict(choice), "M": M}) for name, (choice, M) in {**first, **wanted}.items()],
        dry_run=run.target.dry_run,
        deadline=deadline,
        limit=LIMIT_SECONDS,
    )
    return {
        result["name"]: None if result["status"] == PASSED else result.get("reason", result["status"])
        for result in results
    }


def harms(failure: str | None) -> bool:
    """Whether a choice may hang, or break the device for a process. What was not tried may."""
    return failure is not None and not failure.startswith(HARMLESS)


def trial(run: Run, deadline: float, save: Save) -> None:
    """One choice, forward and backward on few rows, against float64; saves why it fails, or None."""
    choice = choice_of(run.argument["choice"])
    rows = 16 if run.target.dry_run else ROWS
    problem = make(run.shapes.cell(rows, run.argument["M"]).case()).to(run.target.dtype, run.target.device).leaves()
    gate = AccuracyGate(accuracy.without_kinks(problem))
    with configs.forced(choice):
        save({"failure": gate.judge(backend(run.target.ours), run.target.dtype).failure})


def choice_of(fields: Mapping[str, Any]) -> Choice:
    """From what dataclasses.asdict made of it."""
    parts = {name: Config(**part) for name, part in fields.items() if isinstance(part, Mapping)}
    return Choice(fields["schedule"], **parts)
