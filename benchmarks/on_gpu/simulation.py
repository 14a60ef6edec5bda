"""A launch as programs that draw work items in order, wait for what theirs needs, and share their multiprocessors.

Discrete events: nothing here knows what an item computes. Times are cycles.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final, NamedTuple

RESOURCES: Final = ("issue", "tensor", "L2")
"""What programs on one multiprocessor share: its schedulers, its tensor cores, its way to L2."""
CAUSES: Final = (*RESOURCES, "latency", "waiting", "idle")
"""What a program's time goes to; "waiting" for other items, "idle" with none left to draw."""
NOTHING: Final = (0.0, 0.0, 0.0)
Tile = tuple[str, Hashable]
"""A stage's name, and which of its tiles."""
Cycles = tuple[float, float, float]
"""By resource."""


@dataclass(frozen=True)
class Cost:
    """What a piece of an item takes."""

    latency: float = 0.0
    """Cycles in which it occupies no resource."""
    limited: Cycles = NOTHING
    """Cycles it takes besides where it runs alone, by the resource that sets the pace."""
    busy: Cycles = NOTHING
    """Cycles for which it occupies each resource."""

    @cached_property
    def alone(self) -> float:
        """Cycles it takes with a multiprocessor to itself."""
        return self.latency + sum(self.limited)

    @cached_property
    def loads(self) -> Cycles:
        """By resource, the part of that time for which it occupies it."""
        return _scaled(self.busy, 1.0 / self.alone) if self.alone else NOTHING

    def then(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(self.latency + other.latency, _sum(self.limited, other.limited), _sum(self.busy, other.busy))

    def times(self, factor: float) -> "Cost":
        """So many, one after the other."""
        return Cost(self.latency * factor, _scaled(self.limited, factor), _scaled(self.busy, factor))


def overlapped(issue: float = 0.0, tensor: float = 0.0, l2: float = 0.0, latency: float = 0.0) -> Cost:
    """Work that runs on all resources at once, as long as the slowest takes; ``latency`` comes besides."""
    busy = issue, tensor, l2
    slowest = busy.index(max(busy))
    return Cost(latency, (issue * (slowest == 0), tensor * (slowest == 1), l2 * (slowest == 2)), busy)


class Task(NamedTuple):
    """A work item."""

    before: float
    """Cycles from drawing it to the first look at what it waits for."""
    cost: Cost
    tile: Tile | None = None
    """What it is a part of. A tile is done when all its tasks are."""
    needs: tuple[Tile, ...] = ()
    """Tiles that must be done; all their tasks come earlier."""
    noticed: float = 0.0
    """Cycles from a tile's end to when a program that waits for it goes on."""


@dataclass(frozen=True)
class Outcome:
    """A launch's end."""

    cycles: float
    spent: dict[str, float]
    """Cause → cycles of all programs together."""

    def shares(self) -> dict[str, float]:
        """Cause → its part of all programs' time."""
        total = sum(self.spent.values())
        return {cause: self.spent[cause] / total if total else 0.0 for cause in CAUSES}


class _Event(IntEnum):
    START = 0
    END = 1


@dataclass
class _Running:
    """A task on a program."""

    task: Task
    drawn: float
    started: float = 0.0
    missing: int = 0
    """Tiles it waits for."""
    left: float = 0.0
    """Cycles still to go, alone."""
    stamp: int = -1
    """Of its one valid end."""


class _Multiprocessor:
    """Tasks that run beside each other: all slow down alike where one resource does not suffice."""

    def __init__(self) -> None:
        self.running: dict[int, _Running] = {}
        self.since = 0.0
        self.speed = 1.0

    def advance(self, now: float) -> None:
        for each in self.running.values():
            each.left -= (now - self.since) * self.speed
        self.since = now

    def changed(self) -> None:
        """Sets the speed for the tasks that run now."""
        loads = [each.task.cost.loads for each in self.running.values()]
        self.speed = 1.0 / max((1.0, *map(sum, zip(*loads, strict=True))))


class _Launch:
    def __init__(self, tasks: Sequence[Task], programs: int, multiprocessors: int, ahead: bool, begin: float) -> None:
        self.tasks = iter(tasks)
        self.drawn = [next(self.tasks, None) for _ in range(programs)] if ahead else None
        self.begin = begin
        self.programs = programs
        self.multiprocessors = [_Multiprocessor() for _ in range(min(multiprocessors, programs))]
        self.unfinished = Counter(task.tile for task in tasks)
        self.waiting: dict[Tile | None, list[int]] = defaultdict(list)
        self.at: dict[int, _Running] = {}
        self.events: list[tuple[float, int, _Event, int]] = []
        self.numbers = itertools.count()
        self.spent = dict.fromkeys(CAUSES, 0.0)
        self.end = 0.0

    def run(self) -> Outcome:
        for program in range(self.programs):
            self.draw(program, self.begin)
        while self.events:
            now, number, event, program = heapq.heappop(self.events)
            if event is _Event.START:
                self.start(program, now)
            elif program in self.at and self.at[program].stamp == number:
                self.finish(program, now)
        if self.at:
            raise ValueError("a task waits for a tile that no earlier task is part of")
        self.spent["latency"] += self.begin * self.programs
        self.spent["idle"] = max(0.0, self.end * self.programs - sum(self.spent.values()))
        return Outcome(self.end, self.spent)

    def push(self, time: float, event: _Event, program: int) -> int:
        number = next(self.numbers)
        heapq.heappush(self.events, (time, number, event, program))
        return number

    def draw(self, program: int, now: float) -> None:
        task = next(self.tasks, None)
        if self.drawn is not None:
            task, self.drawn[program] = self.drawn[program], task
        if task is None:
            self.at.pop(program, None)
            return
        self.at[program] = running = _Running(task, now)
        missing = [tile for tile in task.needs if self.unfinished[tile]]
        running.missing = len(missing)
        for tile in missing:
            self.waiting[tile].append(program)
        if not missing:
            self.push(now + task.before, _Event.START, program)

    def start(self, program: int, now: float) -> None:
        running = self.at[program]
        running.started, running.left = now, running.task.cost.alone
        if running.left == 0.0:
            running.stamp = self.push(now, _Event.END, program)
            return
        place = self.place(program)
        place.advance(now)
        place.running[program] = running
        self.pace(place, now)

    def pace(self, place: _Multiprocessor, now: float) -> None:
        """New ends for all that runs there."""
        place.changed()
        for program, running in place.running.items():
            running.stamp = self.push(now + max(0.0, running.left) / place.speed, _Event.END, program)

    def place(self, program: int) -> _Multiprocessor:
        return self.multiprocessors[program % len(self.multiprocessors)]

    def finish(self, program: int, now: float) -> None:
        running, place = self.at[program], self.place(program)
        if program in place.running:
            place.advance(now)
            del place.running[program]
            self.pace(place, now)
        self.account(running, now)
        self.end = now
        tile = running.task.tile
        self.unfinished[tile] -= 1
        if not self.unfinished[tile]:
            for other in self.waiting.pop(tile, ()):
                self.notice(other, now)
        self.draw(program, now)

    def notice(self, program: int, now: float) -> None:
        running = self.at[program]
        running.missing -= 1
        if not running.missing:
            task = running.task
            self.push(max(running.drawn + task.before, now + task.noticed), _Event.START, program)

    def account(self, running: _Running, now: float) -> None:
        task, cost = running.task, running.task.cost
        self.spent["waiting"] += running.started - running.drawn - task.before
        self.spent["latency"] += task.before + cost.latency
        rest, limited = now - running.started - cost.latency, sum(cost.limited)
        for resource, cycles in zip(RESOURCES, cost.limited, strict=True):
            self.spent[resource] += rest * cycles / limited if limited else 0.0


def simulate(
    tasks: Sequence[Task], programs: int, multiprocessors: int, *, ahead: bool = False, begin: float = 0.0
) -> Outcome:
    """Runs the tasks: programs draw them in order; program p is on multiprocessor p modulo their number.

    Args:
        tasks: in their order.
        programs: that run at the same time.
        multiprocessors: which they share.
        ahead: a program draws its next task when it takes up the one before.
        begin: cycles before the first tasks.

    Raises:
        ValueError: a task waits for a tile that no earlier task is part of.
    """
    return _Launch(tasks, programs, multiprocessors, ahead, begin).run()


def by_stage(tasks: Iterable[Task]) -> dict[str, float]:
    """Stage → its part of the cycles that all tasks take alone, waits left out."""
    found: dict[str, float] = defaultdict(float)
    for task in tasks:
        if task.tile is not None:
            found[task.tile[0]] += task.before + task.cost.alone
    total = sum(found.values())
    return {stage: found[stage] / total for stage in sorted(found, key=found.__getitem__, reverse=True)}


def _sum(a: Cycles, b: Cycles) -> Cycles:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _scaled(a: Cycles, factor: float) -> Cycles:
    return a[0] * factor, a[1] * factor, a[2] * factor
