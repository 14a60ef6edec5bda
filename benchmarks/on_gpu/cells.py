"""One cell on the device: the gate, eager calls and replayed CUDA graphs in turns, peak memory."""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import timing
import workload
from contenders import PASSES, Contender, forward_call, short
from gate import Gate, Verdict
from on_gpu.target import WARM_UPS, Call, Target, rotating
from peers import PEERS, Trunk
from workload import Cell, Problem

MEMORY_SHARE = 0.7
"""A contender that may need more than this share of the free device memory is left out."""
GRAPH = ", graph"
"""Ends the name under which a contender's replayed graph is timed."""


PROTOCOL = timing.Protocol(budget=0.8, max_rounds=41, min_sample=2e-3)


@dataclass(frozen=True)
class Plan:
    """How one cell is measured."""

    contenders: tuple[Contender, ...]
    modes: tuple[str, ...] = ("eager", "graph")
    """A peer that cannot be captured is timed eagerly all the same."""
    passes: tuple[str, ...] = PASSES
    protocol: timing.Protocol = PROTOCOL
    keep_peers: int | None = None
    """Peers that stay after one timed call each, the fastest ones; None: all."""
    memory: bool = False


def step_call(function: Trunk, problem: Problem) -> Call:
    """(own, aux, gradients in the order of problem.named()). Not into .grad: a captured graph owns its results."""
    leaves = [tensor for _, tensor in problem.named()]

    def call() -> tuple[Tensor, ...]:
        outputs = function(problem.x_local, problem.x_global, problem.scenario, problem.params)
        gradients: tuple[Tensor, ...] = torch.autograd.grad(outputs, leaves, problem.cotangents)
        return (*outputs, *gradients)

    return call


CALLS = {"forward": forward_call, "step": step_call}


def measure(target: Target, cell: Cell, plan: Plan, deadline: float, seed: int = 0) -> dict[str, Any]:
    """Everything about one cell, ready for JSON. Past the ``deadline`` (time.monotonic) contenders are left out."""
    low_precision = all(contender.dtype != torch.float32 for contender in plan.contenders)
    gate = Gate(workload.make(cell, seed, avoid_kinks=not low_precision, device=target.device))
    entries = [Entry(target, cell, contender) for contender in plan.contenders]
    for entry in entries:
        entry.judge(gate, deadline)
    green = [entry for entry in entries if entry.verdict.failure is None]
    pool = target.graph_pool()
    for entry in green:
        entry.prepare(gate, plan, pool)
    green = [entry for entry in green if entry.verdict.failure is None]
    # The references, in float64, are not needed any more.
    gate.reference.cache_clear()

    passes: dict[str, Any] = {}
    for kind in plan.passes:
        screened = _screen(target, green, kind, plan.keep_peers)
        calls = {name: call for entry in green for name, call in entry.calls[kind].items() if name not in screened}
        seconds = timing.interleave(calls, plan.protocol, target.sample) if calls else {}
        passes[kind] = {"seconds": seconds, "screened_out": screened}
    operations = workload.operations(cell)
    result = {
        **asdict(cell),
        "operations": asdict(operations) | {"step": operations.step},
        "contenders": [entry.record() for entry in entries],
        "passes": passes,
    }
    # Graphs hold their memory until they are gone.
    del entries, green, gate
    gc.collect()
    if not target.dry_run:
        torch.cuda.empty_cache()
    return result


class Entry:
    """One contender in one cell: what the gate said, and its calls by pass and mode."""

    def __init__(self, target: Target, cell: Cell, contender: Contender) -> None:
        self.target = target
        self.cell = cell
        self.contender = contender
        self.function = contender.function(dynamic=True)
        self.verdict = Verdict()
        self.no_graph: str | None = None
        """Why it has no CUDA graph; None where it has one, or none was asked for."""
        self.calls: dict[str, dict[str, Call]] = {}
        self.peak_bytes: int | None = None

    def judge(self, gate: Gate, deadline: float) -> None:
        """The gate's verdict on eager calls; left out past the deadline and where memory is short."""
        needed, free = self.contender.bytes_needed(self.cell), self.target.free_bytes()
        if time.monotonic() > deadline:
            self.verdict = Verdict(failure="left out: no time was left")
        elif free is not None and needed > MEMORY_SHARE * free:
            self.verdict = Verdict(
                failure=f"left out: may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
        else:
            self.verdict = gate.judge(self.contender, self.function)

    def prepare(self, gate: Gate, plan: Plan, pool: Any) -> None:
        """Eager calls and captured graphs over copies of the inputs; a graph's results go through the gate too."""
        problem = gate.problems(self.contender.dtype)
        sizes = [tensor.nbytes for _, tensor in problem.named()]
        copies = self.target.copies(sum(sizes))
        problems = [problem, *[problem.copy() for _ in range(copies - 1)]]
        peer = PEERS.get(self.contender.implementation)
        if peer is not None and peer.waits is not None:
            self.no_graph = f"waits for the device: {peer.waits}"
        eager = "eager" in plan.modes or self.no_graph is not None
        self.calls = {kind: {} for kind in plan.passes}
        for kind in plan.passes if eager else ():
            self.calls[kind][self.contender.name] = rotating([CALLS[kind](self.function, each) for each in problems])
        if plan.memory:
            self.peak_bytes = self.target.peak_bytes(step_call(self.function, problem))
        if "graph" in plan.modes and self.no_graph is None:
            self._capture(gate, problems, plan.passes, pool)

    def _capture(self, gate: Gate, problems: list[Problem], passes: Sequence[str], pool: Any) -> None:
        results: dict[str, Tensor] = {}
        try:
            for kind in passes:
                replays = []
                for index, problem in enumerate(problems):
                    replay, out = self.target.capture(
                        CALLS[kind](self.function, problem), pool, warm_ups=WARM_UPS if index == 0 else 0
                    )
                    if index == 0:
                        # Later graphs may use the memory of these results again.
                        results |= _named(problem, kind, [tensor.detach().clone() for tensor in out])
                    del out
                    replays.append(replay)
                self.calls[kind][self.contender.name + GRAPH] = rotating(replays)
        except Exception as error:
            self.no_graph = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            for calls in self.calls.values():
                calls.pop(self.contender.name + GRAPH, None)
            return
        if set(passes) == set(PASSES):
            verdict = gate.compare(self.contender, results)
            if verdict.failure is not None:
                self.verdict = replace(verdict, failure=f"replayed graph: {verdict.failure}")

    def record(self) -> dict[str, Any]:
        """For JSON."""
        contender = self.contender
        return {
            "name": contender.name,
            "implementation": contender.implementation,
            "peer": contender.is_peer,
            "compiled": contender.compiled,
            "dtype": short(contender.dtype),
            "foreign_dtype": short(contender.foreign_dtype) if contender.foreign_dtype else None,
            "schedule": contender.schedule,
            "gate": asdict(self.verdict),
            "no_graph": self.no_graph,
            "peak_bytes": self.peak_bytes,
        }


def _named(problem: Problem, kind: str, results: list[Tensor]) -> dict[str, Tensor]:
    if kind == "forward":
        return dict(zip(("own (inference)", "aux (inference)"), results, strict=True))
    return dict(zip(("own", "aux", *(f"∂{name}" for name, _ in problem.named())), results, strict=True))


def _screen(target: Target, entries: list[Entry], kind: str, keep: int | None) -> dict[str, float]:
    """Calls of peers that are not among the fastest ``keep``, with the seconds of one warm call."""
    if keep is None:
        return {}
    seconds = {}
    for entry in entries:
        if entry.contender.is_peer:
            for name, call in entry.calls[kind].items():
                call()
                seconds[name] = target.sample(call, 1)
    return {name: seconds[name] for name in sorted(seconds, key=seconds.__getitem__)[keep:]}
