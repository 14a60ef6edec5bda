"""One cell: the gate, then its contenders in turns, eager and on a GPU from replayed CUDA graphs too; peak memory."""

import gc
import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from contenders import Contender, onednn_multiplies, products, short
from peers import PEERS
from records import QUIET_SHARE, Record, Row, rows, verdict
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import AccuracyGate, Verdict, one_line, without_kinks
from saml_kernels.testing.problem import PASSES, Call, Problem, Results, make
from saml_kernels.testing.timing import Protocol
from workload import Cell

MEMORY_SHARE = 0.7
"""A contender that may need more than this share of the free memory is left out."""
GRAPH = ", graph"
"""Ends the name under which a contender's replayed graph is timed."""
WARM_UPS = 2
"""Calls before a capture: what is compiled or allocated at first calls must not be captured."""
SCREENING_CALLS = 5
SCREENING_SECONDS = 0.2
"""What a peer has to show that it may stay: so many calls, fewer where they take longer together."""


class Host:
    """Where a cell is measured: the CPU."""

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cpu"

    @property
    def clock(self) -> timing.Clock:
        return timing.wall_clock

    def free_bytes(self) -> int | None:
        """Memory that can still be had; None where the system does not tell."""
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        return kilobytes[0] * 1024 if kilobytes else None

    def copies(self, bytes_: int) -> int:
        """How many sets of inputs calls rotate over, so that none finds its own in the cache."""
        return 1

    def lacks(self, contender: Contender) -> str | None:
        """What a peer would need to be worth timing here; None if nothing."""
        if not contender.is_peer or contender.dtype == torch.float32 or onednn_multiplies(contender.dtype):
            return None
        return f"left out: oneDNN has no product of {short(contender.dtype)} on this processor"

    def graph_pool(self) -> Any:
        """Memory that the graphs of one cell share: they are never replayed at the same time."""
        return None

    def capture(self, call: Call, pool: Any, warm_ups: int) -> tuple[Any, Any]:
        """(replay, the results that a replay fills) of ``call`` as a CUDA graph; elsewhere the call again."""
        return call, call()

    def peak_bytes(self, contender: Contender, cell: Cell, step: Call) -> dict[str, Any]:
        """``peak_bytes`` of a step, and why there is none, where there is none."""
        return {}

    def collect(self) -> None:
        """Gives memory back that nobody holds."""
        gc.collect()


@dataclass(frozen=True)
class Plan:
    """How one cell is measured."""

    contenders: tuple[Contender, ...]
    protocol: Protocol
    modes: tuple[str, ...] = ("eager",)
    """And "graph". A peer that cannot be captured is timed eagerly all the same."""
    keep_peers: int | None = None
    """Peers of each precision that stay after a few timed calls each, the fastest ones; None: all."""
    memory: bool = False
    products: bool = False
    """Matrix products of layer 1's size take part."""
    dynamic: bool = False
    """Peers are compiled for any shape."""


def measure(
    host: Host,
    cell: Cell,
    plan: Plan,
    *,
    seed: int = 0,
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> Record:
    """A cell's part of a record. Past the ``deadline`` (time.monotonic) contenders are left out."""
    problem = make(cell.case(seed)).to(torch.float32, host.device)
    if any(contender.dtype == torch.float32 for contender in plan.contenders):
        # The plain formulation, which sets a low precision's bounds, meets the same kinks.
        problem = without_kinks(problem, {None, *(contender.foreign_dtype for contender in plan.contenders)})
    gate = AccuracyGate(problem, Contender("all_towers").function())
    entries = [Entry(host, cell, contender, plan.dynamic) for contender in plan.contenders]
    for entry in entries:
        entry.judge(gate, deadline)
        say(f"  {entry.name}: {entry.verdict.failure or 'within its bounds'}")
    pool = host.graph_pool()
    for entry in entries:
        if entry.verdict.failure is None:
            entry.prepare(gate, plan, pool)
    green = [entry for entry in entries if entry.verdict.failure is None]
    # The references, in float64, are not needed any more.
    gate.reference.cache_clear()

    others: dict[str, float | None] = {}
    timed: list[Row] = []
    rates = products({entry.contender.dtype for entry in green}) if plan.products else []
    for kind in PASSES:
        screened = _screen(host, green, kind, plan.keep_peers)
        calls: dict[str, Callable[[], object]] = {
            name: call for entry in green for name, call in entry.calls[kind].items() if name not in screened
        }
        calls |= {product.name: product.call(cell) for product in rates}
        for call in calls.values():
            call()
        with timing.Others() as watched:
            seconds = timing.interleave(calls, plan.protocol, host.clock)
        found = rows(kind, seconds, {name: _peers(name, green, seconds) for name in seconds}, screened)
        timed += found
        others[kind] = watched.share
        for row in found:
            say(f"  {kind:<8}{row.contender:<36}{row.median * 1e3:10.3f} ms  ({row.rounds} rounds)")
        if (watched.share or 0) > QUIET_SHARE:
            say(f"  {kind}: others had {watched.share:.0%} of the processor time: too much to keep these figures")
    # The largest tensors go before other processes measure memory.
    gate.problems.cache_clear()
    for entry in green if plan.memory else ():
        entry.peak = host.peak_bytes(entry.contender, cell, entry.step)
    result = {
        "contenders": [entry.record() for entry in entries],
        "products": [product.record() for product in rates],
        "others": others,
        "rows": timed,
    }
    # Graphs hold their memory until they are gone.
    del entries, green, gate, problem
    host.collect()
    return result


class Entry:
    """One contender in one cell: what the gate said, and its calls by pass and name."""

    def __init__(self, host: Host, cell: Cell, contender: Contender, dynamic: bool) -> None:
        self.host = host
        self.cell = cell
        self.contender = contender
        self.name = contender.name
        self.function = contender.function(dynamic=dynamic)
        self.verdict = Verdict()
        self.no_graph: str | None = None
        """Why it has no CUDA graph; None where it has one, or none was asked for."""
        self.calls: dict[str, dict[str, Call]] = {kind: {} for kind in PASSES}
        self.peak: dict[str, Any] = {}

    def judge(self, gate: AccuracyGate, deadline: float) -> None:
        """The gate's verdict on eager calls; left out past the deadline, and where host or memory lack something."""
        late = "left out: no time was left" if time.monotonic() > deadline else None
        reason = late or self.too_large() or self.host.lacks(self.contender)
        judged = (self.contender.dtype, self.contender.foreign_dtype)
        self.verdict = Verdict(failure=reason) if reason else gate.judge(self.function, *judged)

    def too_large(self) -> str | None:
        """Why it does not fit in memory; None if it may."""
        needed, free = self.contender.bytes_needed(self.cell), self.host.free_bytes()
        if free is None or needed <= MEMORY_SHARE * free:
            return None
        return f"left out: may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def prepare(self, gate: AccuracyGate, plan: Plan, pool: Any) -> None:
        """Eager calls and captured graphs over copies of the inputs; a graph's results go through the gate too."""
        problem = gate.problems(self.contender.dtype)
        copies = self.host.copies(sum(tensor.nbytes for _, tensor in problem.named()))
        problems = [problem, *[problem.copy() for _ in range(copies - 1)]]
        graph = "graph" in plan.modes
        peer = PEERS.get(self.contender.implementation)
        if graph and peer is not None and peer.waits is not None:
            self.no_graph = f"waits for the device: {peer.waits}"
        for kind in PASSES if "eager" in plan.modes or self.no_graph else ():
            self.calls[kind][self.name] = rotating([each.call(kind, self.function) for each in problems])
        self.step = problem.call("step", self.function)
        if graph and self.no_graph is None:
            self._capture(gate, problems, pool)

    def _capture(self, gate: AccuracyGate, problems: list[Problem], pool: Any) -> None:
        results: Results = {}
        try:
            for kind in PASSES:
                replays = []
                for index, problem in enumerate(problems):
                    call = problem.call(kind, self.function)
                    replay, out = self.host.capture(call, pool, 0 if index else WARM_UPS)
                    if index == 0:
                        # Later graphs may use the memory of these results again.
                        kept = [tensor.detach().clone() for tensor in out]
                        forward = dict(zip(("own (inference)", "aux (inference)"), kept, strict=False))
                        results |= forward if kind == "forward" else problem.name(kept)
                    del out
                    replays.append(replay)
                self.calls[kind][self.name + GRAPH] = rotating(replays)
        except Exception as error:
            self.no_graph = one_line(error)
            for calls in self.calls.values():
                calls.pop(self.name + GRAPH, None)
            return
        verdict = gate.compare(results, self.contender.dtype, self.contender.foreign_dtype)
        if verdict.failure is not None:
            self.verdict = replace(verdict, failure=f"replayed graph: {verdict.failure}")

    def record(self) -> Record:
        """For the result file."""
        no_graph = {"no_graph": self.no_graph} if self.no_graph else {}
        return self.contender.record() | verdict(self.verdict) | no_graph | self.peak


def rotating(calls: list[Call]) -> Call:
    """One call that makes those of the list in turn."""
    if len(calls) == 1:
        return calls[0]
    place = 0

    def call() -> Any:
        nonlocal place
        place = (place + 1) % len(calls)
        return calls[place]()

    return call


def _peers(name: str, entries: Sequence[Entry], timed: Container[str]) -> list[str]:
    """Peers of the same precision and mode; against a graph, what cannot be captured counts as it runs eagerly."""
    mode = GRAPH if name.endswith(GRAPH) else ""
    dtype = next((entry.contender.dtype for entry in entries if entry.name + mode == name), None)
    peers = [entry for entry in entries if entry.contender.is_peer and entry.contender.dtype == dtype]
    return [
        peer.name + mode if peer.name + mode in timed else peer.name
        for peer in peers
        if peer.name + mode in timed or peer.no_graph
    ]


def seconds_of_fastest(call: Call, clock: timing.Clock) -> float:
    """The fastest of a few warm calls, one where it takes long: a single short one may meet an interruption."""
    call()
    taken: list[float] = []
    while len(taken) < SCREENING_CALLS and sum(taken) < SCREENING_SECONDS:
        taken.append(clock(call, 1))
    return min(taken)


def _screen(host: Host, entries: list[Entry], kind: str, keep: int | None) -> dict[str, float]:
    """Calls of peers that are not among the fastest ``keep`` of their precision, with their seconds."""
    if keep is None:
        return {}
    out: dict[str, float] = {}
    peers = [entry for entry in entries if entry.contender.is_peer]
    for dtype in {entry.contender.dtype for entry in peers}:
        seconds = {}
        for name, call in [item for e in peers if e.contender.dtype == dtype for item in e.calls[kind].items()]:
            seconds[name] = seconds_of_fastest(call, host.clock)
        out |= {name: seconds[name] for name in sorted(seconds, key=seconds.__getitem__)[keep:]}
    return out
