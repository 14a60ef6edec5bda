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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
"""Seconds a call, over a number of calls one behind the other."""
Name = TypeVar("Name", bound=Hashable)
SHORTEST = 1e-9
"""Seconds that a call counts at least."""


@dataclass(frozen=True)
class Protocol:
    """How long and how often is measured.

    Raises:
        ValueError: no budget, or bounds that no number of rounds satisfies.
    """

    budget: float
    """Seconds for the rounds; ``min_rounds`` may exceed it."""
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


def interleave(calls: Mapping[Name, Call], protocol: Protocol, clock: Clock | None = None) -> dict[Name, list[float]]:
    """Seconds a call, one entry a round, of every contender. Contenders are warm: each has run before.

    ``clock`` is :func:`wall_clock` unless another is given.
    """
    clock = wall_clock if clock is None else clock
    repeats = {
        name: max(1, math.ceil(protocol.min_sample / max(clock(call, 1), SHORTEST))) for name, call in calls.items()
    }
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for index in range(protocol.max_rounds if names else 0):
            for name in order(names, index):
                seconds[name].append(clock(calls[name], repeats[name]))
            if index + 1 >= protocol.min_rounds and time.perf_counter() - start > protocol.budget:
                break
    finally:
        gc.enable()
    return seconds


def order(names: Sequence[Name], index: int) -> list[Name]:
    """The contenders in the order of round ``index``."""
    first = index // 2 % len(names)
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if index % 2 else rotated


def wall_clock(call: Call, repeats: int) -> float:
    """Seconds a call by the host's clock: for the CPU."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_clock(device: torch.device | str = "cuda") -> Clock:
    """Seconds a call between events on a GPU, which the launches of the first call are part of."""

    def clock(call: Call, repeats: int) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats

    return clock


def clock_of(device: torch.device) -> Clock:
    """The one that measures calls on that device."""
    return cuda_clock(device) if device.type == "cuda" else wall_clock


def summary(values: Sequence[float]) -> Summary:
    """Of one figure's values over the rounds, at least one."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Summary(statistics.median(values), fifths[0], fifths[3], len(values))


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Summary:
    """slower / faster round by round: how many times as fast the second one is."""
    return summary([a / b for a, b in zip(slower, faster, strict=True)])


def fastest(seconds: Mapping[Name, Sequence[float]]) -> Name:
    """The contender with the lowest median. Not the fastest of each round: that one would owe part of it to noise."""
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


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
