"""The timing protocol: contenders take turns in rounds, and every statement is made from the rounds.

One round times every contender once. The order rotates; each rotation is run forwards in one round and backwards in the
next, so that everybody takes every place and nobody always follows the same neighbour. A disturbance from outside
hits contenders of the same round alike, hence ratios are formed round by round before their median is taken.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Call = Callable[[], object]
Sample = Callable[[Call, int], float]
"""Seconds a call, over a number of calls."""


@dataclass(frozen=True)
class Protocol:
    """How long and how often is measured."""

    budget: float
    """Seconds for the rounds of one cell and pass; min_rounds may exceed it."""
    min_rounds: int = 5
    max_rounds: int = 101
    min_sample: float = 5e-3
    """Seconds: shorter calls are repeated within a sample, and the sample is divided by their number."""

    def __post_init__(self) -> None:
        if not (self.budget > 0 and 1 <= self.min_rounds <= self.max_rounds):
            raise ValueError(f"expected budget > 0 and 1 ≤ min_rounds ≤ max_rounds, got {asdict(self)}")


@dataclass(frozen=True)
class Summary:
    """Median and the 20th and 80th percentile of one figure over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def once(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: Mapping[str, Call], protocol: Protocol, measure: Sample | None = None) -> dict[str, list[float]]:
    """Seconds a call, one entry a round, of every contender. Contenders are warm: each has run before.

    ``measure`` is :func:`sample`, by the wall clock, unless another clock is given.
    """
    measure = sample if measure is None else measure
    repeats = {name: max(1, math.ceil(protocol.min_sample / measure(call, 1))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for index in range(protocol.max_rounds):
            for name in order(names, index):
                seconds[name].append(measure(calls[name], repeats[name]))
            if index + 1 >= protocol.min_rounds and time.perf_counter() - start > protocol.budget:
                break
    finally:
        gc.enable()
    return seconds


class Others:
    """The share of all cores' time that went to anybody else, steal included, in a with block (Linux).

    Above a few per cent the times are not only noisy but biased: a contender with many short parallel regions waits for
    its slowest thread in each of them.
    """

    share: float | None = None
    """After the block, 0 to 1; None where /proc/stat is missing."""

    def __enter__(self) -> "Others":
        self._start = _processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        end = _processor_seconds()
        if self._start is not None and end is not None:
            busy, own, total = (after - before for before, after in zip(self._start, end, strict=True))
            self.share = min(max((busy - own) / total, 0.0), 1.0) if total > 0 else 0.0


def _processor_seconds() -> tuple[float, float, float] | None:
    """Since boot: busy seconds of all cores, those of this process, and busy and idle ones of all cores."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    seconds = [tick / os.sysconf("SC_CLK_TCK") for tick in ticks]
    _, _, _, idle, waiting, *_ = seconds
    return sum(seconds) - idle - waiting, time.process_time(), sum(seconds)


def order(names: Sequence[str], index: int) -> list[str]:
    """The contenders in the order of round ``index``."""
    first = index // 2 % len(names)
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if index % 2 else rotated


def sample(call: Call, repeats: int) -> float:
    """Seconds a call, over ``repeats`` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def summary(values: Sequence[float]) -> Summary:
    """Of one figure's values over the rounds, at least one."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Summary(statistics.median(values), fifths[0], fifths[3], len(values))


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Summary:
    """slower / faster round by round: how many times as fast the second one is."""
    return summary([a / b for a, b in zip(slower, faster, strict=True)])


def fastest(seconds: Mapping[str, Sequence[float]]) -> str:
    """The contender with the lowest median. Not the fastest of each round: that one would owe part of it to noise."""
    return min(seconds, key=lambda name: statistics.median(seconds[name]))
