"""Finds the fastest choice for a bucket by trying candidates, one of its configurations at a time: tiles, then rows.

Trying them together would multiply their number. Every candidate is compared with the float64 reference before it is
timed. The clock is the caller's. Imports no Triton until a candidate runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saml_kernels.backends.triton import availability, configs
from saml_kernels.backends.triton.configs import Bucket, Choice, Config
from saml_kernels.testing import accuracy
from saml_kernels.testing.problem import PASSES, Case, Problem, backend, make

Call = Callable[[], object]
Timer = Callable[[Mapping[Choice, Call]], Mapping[Choice, float]]
"""Seconds of a call, for every contender. All have run before, and may be timed in turns."""
Say = Callable[[str], None]

GATE_ROWS = 16384
"""So many rows at most are compared with the reference, whose float64 streams take twice as much memory and more."""
TRITON = backend("triton")


class TuningFailed(RuntimeError):
    """Not one candidate runs and is right; the message says why the last one does not."""


@dataclass(frozen=True)
class Shape:
    """What is timed: a trunk with a mutual unit after layer 1, relu, score "ratio", a vector gate, and one batch."""

    rows: int
    scenarios: int
    local_dim: int
    global_dim: int
    hidden_dims: tuple[int, ...]
    """d_1..d_L, and the auxiliary widths a_1..a_L as well."""
    dtype: torch.dtype
    device: torch.device

    @property
    def bucket(self) -> Bucket:
        """That the engine files its choice under."""
        return Bucket.of(self.rows, self.scenarios, max(self.hidden_dims))

    def problem(self) -> Problem:
        """A batch of that shape, the same numbers in every call."""
        case = Case(self.rows, self.scenarios, self.local_dim, self.global_dim, self.hidden_dims)
        return make(case).to(self.dtype, self.device).leaves()


class ChoiceGate:
    """Whether a choice's numbers are right, by :class:`saml_kernels.testing.accuracy.AccuracyGate`."""

    def __init__(self, problem: Problem) -> None:
        self._dtype = problem.x_local.dtype
        self._gate = accuracy.AccuracyGate(accuracy.without_kinks(problem.rows(slice(GATE_ROWS))))
        self._failures: dict[Choice, str | None] = {}

    def failure(self, choice: Choice) -> str | None:
        """None if the choice runs and is right, else one line. Never raises for its errors."""
        if choice not in self._failures:
            with configs.forced(choice):
                self._failures[choice] = self._gate.judge(TRITON, self._dtype).failure
        return self._failures[choice]


@dataclass(frozen=True)
class Seconds:
    """Of a call, with the built-in choice and with the one that tuning made, timed together."""

    built_in: float
    tuned: float

    @property
    def ratio(self) -> float:
        """How many times as fast the tuned one is."""
        return self.built_in / self.tuned


@dataclass(frozen=True)
class Tuned:
    """What tuning found and where it was written."""

    key: str
    path: Path
    choice: Choice
    built_in: Choice
    forward: Seconds | None
    """Inference. None where the built-in choice is kept, or does not run."""
    step: Seconds | None
    """Forward and backward."""


def tune(shape: Shape, timer: Timer, say: Say = lambda line: None, path: Path | None = None) -> Tuned:
    """Times candidates for the shape's bucket, and writes the fastest choice.

    Forward configurations, in both schedules, and those of layers that have a launch of their own are timed in
    inference, those of backward and weight gradients in a training step, each with the others as built in. What was
    chosen is then timed against the built-in choice, and is
    kept only if forward and step together take less time: three winners need not win together.

    Args:
        shape: float32, bfloat16 or float16, on a device that the Triton backend supports.
        timer: seconds of every contender.
        say: receives a line for every kind of launch and for every candidate that is skipped.
        path: the file to add the choice to; None: :func:`configs.cache_path`.

    Raises:
        TuningFailed: no candidate runs and is right.
        ValueError: the file is there and does not hold choices; nothing was timed.
        OSError: the file cannot be read or written.
    """
    path = configs.cache_path() if path is None else path
    configs.forget()
    configs.tuned(path)
    problem = shape.problem()
    gate = ChoiceGate(problem)
    built_in = _built_in(shape)
    family = configs.family(shape.device)

    def configured(part: str) -> tuple[Config, ...]:
        return configs.candidates(part, shape.dtype.itemsize, family)

    forward, step = (problem.call(kind, TRITON) for kind in PASSES)
    trials = [
        replace(built_in, schedule=schedule, forward=config)
        for config in configured("forward")
        for schedule in configs.SCHEDULES
    ]
    best = _fastest("forward", trials, built_in, forward, gate, timer, say)
    best = _rows("forward", best, forward, gate, timer, say)
    # In the other schedule no layer has a launch of its own.
    if best.schedule == "per_layer":
        trials = [replace(best, layer=config) for config in configured("layer")]
        best = _fastest("layer", trials, best, forward, gate, timer, say)
    # Where the built-in forward does not run here, nothing could be timed with it.
    base = built_in if gate.failure(built_in) is None else best
    trials = [replace(base, backward=config) for config in configured("backward")]
    backward = _fastest("backward", trials, base, step, gate, timer, say)
    backward = _rows("backward", backward, step, gate, timer, say)
    trials = [replace(base, weights=config) for config in configured("weights")]
    weights = _fastest("weights", trials, base, step, gate, timer, say)
    choice = Choice(best.schedule, best.forward, backward.backward, weights.weights, best.layer)
    forward_seconds = step_seconds = None
    if choice != base and (failure := gate.failure(choice)) is not None:
        say(f"the three together: {failure}")
        choice = base
    if choice != built_in and gate.failure(built_in) is None:
        forward_seconds, step_seconds = (
            Seconds(seconds[built_in], seconds[choice])
            for seconds in (_time([built_in, choice], call, timer) for call in (forward, step))
        )
        if forward_seconds.tuned + step_seconds.tuned >= forward_seconds.built_in + step_seconds.built_in:
            say("the three together are not faster than the built-in choice")
            choice, forward_seconds, step_seconds = built_in, None, None
    key = configs.key(configs.device_name(shape.device), shape.dtype, shape.bucket)
    # Another process may have added to the file meanwhile.
    configs.forget()
    configs.save(path, {key: choice})
    return Tuned(key, path, choice, built_in, forward_seconds, step_seconds)


def _built_in(shape: Shape) -> Choice:
    if availability.INTERPRETED:
        return configs.choice(shape.rows, shape.scenarios, max(shape.hidden_dims), shape.dtype, shape.device)
    return configs.built_in(shape.bucket, shape.dtype.itemsize, configs.family(shape.device))


def _fastest(
    launch: str, trials: Sequence[Choice], base: Choice, call: Call, gate: ChoiceGate, timer: Timer, say: Say
) -> Choice:
    contenders: list[Choice] = []
    failure = None
    for trial in dict.fromkeys((base, *trials)):
        failure = gate.failure(trial)
        if failure is None:
            contenders.append(trial)
        else:
            say(f"{launch}: skipped {describe(trial, launch)}: {failure}")
    if not contenders:
        raise TuningFailed(f"no candidate for {launch} can be used; the last one: {failure}")
    seconds = _time(contenders, call, timer)
    fastest = min(contenders, key=lambda choice: seconds[choice])
    found = f"fastest {describe(fastest, launch)} with {1e3 * seconds[fastest]:.3f} ms"
    say(f"{launch}: {len(contenders)} candidates, {found}")
    return fastest


def _rows(part: str, base: Choice, call: Call, gate: ChoiceGate, timer: Timer, say: Say) -> Choice:
    """The choice with the fastest items of what is no product."""
    variants: list[dict[str, Any]] = [{part: config} for config in configs.rows_candidates(getattr(base, part))]
    trials = [replace(base, **variant) for variant in variants]
    return _fastest(part, trials, base, call, gate, timer, say)


def _time(contenders: Sequence[Choice], call: Call, timer: Timer) -> Mapping[Choice, float]:
    def forced(choice: Choice) -> Call:
        def run() -> object:
            with configs.forced(choice):
                return call()

        return run

    return timer({choice: forced(choice) for choice in contenders})


def describe(choice: Choice, launch: str) -> str:
    """A configuration of a choice, and of a forward the schedule too, for a person."""
    config: Config = getattr(choice, launch) or choice.forward
    schedule = f"{choice.schedule} " if launch == "forward" else ""
    tiles = f"{config.block_m}x{config.block_n}x{config.block_k}"
    rows = f"items of {config.item_rows} rows, {config.group_rows} at a time"
    return (
        f"{schedule}{tiles}, {config.num_warps} warps, {config.num_stages} stages, {config.programs} programs, {rows}"
    )
