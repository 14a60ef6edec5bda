"""Predicted times of every launch of a training step: a model. Nothing in it was measured.

A launch takes as long as its simulated programs, at least its bytes at the memory's rate, and the launch itself.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from on_gpu import launches, peer_model
from on_gpu.assembly import Assembly, LaunchCode, Wanted
from on_gpu.chip import Chip, Peer
from on_gpu.launches import Plan
from on_gpu.simulation import CAUSES, by_stage, simulate
from saml_kernels.backends.triton import configs

Record = dict[str, Any]
KIND: Final = "predicted by a model; nothing was measured"
ROWS: Final = (1024, 4096, 16384)
SCENARIOS: Final = (8, 32)
DISTRIBUTIONS: Final = ("uniform", "zipf")
BACKWARD: Final = "backward"
PEER_STEP: Final = "peer's step"
SENSITIVE: Final = ((4096, 8), (16384, 8))
"""(B, M) for which every guess is halved and doubled."""
LIMITS: Final = (*CAUSES, "memory", "launch")
"""What a launch's time goes to; "memory" is what its bytes take beyond the simulated time."""


@dataclass(frozen=True)
class Prediction:
    """Of a launch."""

    plan: Plan
    spilled_bytes: int
    """A thread's."""
    programs: int
    items: int
    """Drawn, those without rows included."""
    bytes: int
    """Of its tensors, each once."""
    seconds: float
    shares: dict[str, float]
    """Limit → its part of ``seconds``."""
    stages: dict[str, float]
    """Stage → its part of all programs' work."""

    def record(self) -> Record:
        """As the result file has it."""
        return {
            "launch": self.plan.title,
            "schedule": self.plan.schedule or BACKWARD,
            "tiles": self.plan.tiles,
            "spilled_bytes": self.spilled_bytes,
            "programs": self.programs,
            "items": self.items,
            "bytes": self.bytes,
            "us": round(1e6 * self.seconds, 2),
            "shares": {limit: round(share, 4) for limit, share in self.shares.items()},
            "stages": {stage: round(share, 4) for stage, share in self.stages.items()},
        }


def needed(rows: Iterable[int], scenarios: Sequence[int]) -> list[list[Wanted]]:
    """The code that predictions need, each launch with the choices of tiles that will do."""
    return [
        [plan.wanted(M) for plan in candidates]
        for B in rows
        for M in scenarios
        for candidates in launches.candidates(B, M)
    ]


def predict(plan: Plan, code: LaunchCode, chip: Chip, offsets: Sequence[int]) -> Prediction:
    """One launch on a batch whose scenarios begin at ``offsets``."""
    rows, M = offsets[-1], len(offsets) - 1
    tasks = launches.tasks(plan, code, chip, offsets)
    programs = min(chip.multiprocessors * launches.programs_beside(plan, code, chip), len(tasks))
    begin = launches.begin(plan, chip)
    outcome = simulate(tasks, programs, chip.multiprocessors, ahead=plan.waits, begin=begin)
    computing, moved = outcome.cycles / chip.clock, launches.moved_bytes(plan, rows, M)
    memory = max(0.0, moved / chip.memory - computing)
    seconds = computing + memory + chip.launch
    shares = {cause: share * computing / seconds for cause, share in outcome.shares().items()}
    shares |= {"memory": memory / seconds, "launch": chip.launch / seconds}
    return Prediction(plan, code.spilled_bytes, programs, len(tasks), moved, seconds, shares, by_stage(tasks))


def predict_step(assembly: Assembly, chip: Chip, B: int, M: int, distribution: str) -> list[Prediction]:
    """Every launch of the forward in both schedules, and of backward, with built-in tiles.

    Where the file has no code of those, with the tiles of larger batches.

    Raises:
        AssemblyError: the file lacks a launch.
    """
    offsets = launches.batch(B, M, distribution)
    found = []
    for candidates in launches.candidates(B, M):
        code = assembly.find(plan.wanted(M) for plan in candidates)
        plan = next(plan for plan in candidates if plan.wanted(M) == code.signature)
        found.append(predict(plan, code, chip, offsets))
    return found


def predict_others(assembly: Assembly, chip: Chip, B: int, M: int) -> list[Prediction]:
    """The same launches with all other tiles whose code the file has, for a uniform batch."""
    offsets = launches.batch(B, M, "uniform")
    found = []
    for candidates in launches.candidates(B, M):
        there = [plan for plan in candidates if plan.wanted(M) in assembly.launches]
        found += [predict(plan, assembly.launches[plan.wanted(M)], chip, offsets) for plan in there[1:]]
    return found


def seconds_of(predictions: Iterable[Prediction], schedule: str | None) -> float:
    """The launches of a schedule's forward, or (None) of backward, one after another."""
    return sum(each.seconds for each in predictions if each.plan.schedule == schedule)


def cell(assembly: Assembly, chip: Chip, peer: Peer, B: int, M: int, distribution: str) -> Record:
    """All of one batch, in microseconds. Grouping the rows counts as a launch of the forward."""
    found, even = predict_step(assembly, chip, B, M, distribution), distribution == "uniform"
    built_in = launches.built_in(B, M)
    forward = {name: chip.launch + seconds_of(found, name) for name in configs.SCHEDULES}
    peers = {"forward": peer_model.forward(B, M), BACKWARD: peer_model.backward(B, M)}
    return {
        "B": B,
        "M": M,
        "distribution": distribution,
        "built_in": built_in.schedule,
        "built_in_tiles": all(each.plan in launches.plans(built_in, M) for each in found),
        "forward": {name: round(1e6 * seconds, 2) for name, seconds in forward.items()},
        BACKWARD: round(1e6 * seconds_of(found, None), 2),
        "peer": {name: round(1e6 * peer_model.seconds(each, chip, peer), 2) for name, each in peers.items()},
        "launches": [each.record() for each in found],
        "other_tiles": [each.record() for each in predict_others(assembly, chip, B, M)] if even else [],
    }


def sensitivity(assembly: Assembly, chip: Chip, peer: Peer, B: int, M: int) -> list[Record]:
    """What the totals of uniform batches become with each guess halved and doubled, as multiples of what they were."""

    def totals(chip: Chip) -> dict[str, float]:
        found = predict_step(assembly, chip, B, M, "uniform")
        ours = {name or BACKWARD: seconds_of(found, name) for name in (*configs.SCHEDULES, None)}
        step = (*peer_model.forward(B, M), *peer_model.backward(B, M))
        return ours | {PEER_STEP: peer_model.seconds(step, chip, peer)}

    before = totals(chip)
    changed = []
    for name in chip.guesses():
        for factor in (0.5, 2.0):
            after = totals(dataclasses.replace(chip, **{name: factor * getattr(chip, name)}))
            changed.append(
                {
                    "B": B,
                    "M": M,
                    "guess": name,
                    "factor": factor,
                    "totals": {each: round(after[each] / before[each], 4) for each in before},
                }
            )
    return changed
