"""The measurements, in the order of their weight: each fills its part of the record, cell by cell."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

import cells
import records
from contenders import Contender, short
from on_gpu import roofline
from on_gpu.run import Record, Run, Save
from on_gpu.target import Target
from peers import PEERS
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import AccuracyGate, one_line, reference_results, relative_error
from saml_kernels.testing.problem import PASSES, Call, Problem, backend, make
from workload import Cell

FOREIGN_DTYPES: Final = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
TRAINING_STEPS: Final = 100
GPU_PEERS: Final = tuple(name for name, peer in PEERS.items() if "cuda" in peer.devices)
LAUNCHES_A_GRAPH: Final = 20
"""Of one kernel, so that what a graph costs besides does not count."""


def ceilings(run: Run, deadline: float, save: Save) -> None:
    """Rates of large products and a large copy on this very device."""
    save(roofline.ceilings(run.target))


def headline(run: Run, deadline: float, save: Save) -> None:
    """bfloat16, every contender, eager and from CUDA graphs, with peak memory: what the floors are stated for."""
    dtype = run.target.dtype

    def plan(index: int) -> cells.Plan:
        contenders = (*run.ours(dtype, FOREIGN_DTYPES[1:]), *run.peers(dtype, GPU_PEERS, _compiled(index)))
        return cells.Plan(contenders, run.protocol(), ("eager", "graph"), memory=True, dynamic=True)

    run.measure(((run.shapes.cell(*s), plan(i), {}) for i, s in enumerate(run.shapes.headline)), deadline, save)


def grid(run: Run, deadline: float, save: Save) -> None:
    """bfloat16 over B and M from CUDA graphs; the two fastest peers of each cell stay for the rounds."""
    contenders = (*run.ours(run.target.dtype), *run.peers(run.target.dtype, GPU_PEERS, ("grouped_mm",)))
    # Without rounds of their own for the slow peers, half the time is enough.
    plan = cells.Plan(contenders, run.protocol(0.3), ("graph",), keep_peers=2, dynamic=True)
    run.measure(((run.shapes.cell(*shape), plan, {}) for shape in run.shapes.grid), deadline, save)


def precision(run: Run, deadline: float, save: Save) -> None:
    """float32 with and without tf32, the first cell of the headline; torch._grouped_mm has neither in one kernel."""
    names = [name for name in GPU_PEERS if name != "grouped_mm"]
    contenders = (*run.ours(torch.float32), *run.peers(torch.float32, names))
    plan = cells.Plan(contenders, run.protocol(), ("eager", "graph"), dynamic=True)
    cell = run.shapes.cell(*run.shapes.headline[0])

    def kinds() -> Iterator[tuple[Cell, cells.Plan, Record]]:
        for allowed in (True, False):
            with roofline.tf32_allowed(allowed):
                yield cell, plan, {"tf32": allowed}

    run.measure(kinds(), deadline, save)


def stages(run: Run, deadline: float, save: Save) -> None:
    """Every stage and weight gradient in a launch of its own, beside the whole launches, from CUDA graphs.

    Rows of a cell name a stage ("V0 Layer"), or "persistent" and "per_layer" for all stages of a pass in a schedule;
    their passes are "forward", "backward" and "weights". Inputs stay where they are: they may be in the cache.
    """
    if not run.target.schedules:
        save({"reason": "only the kernels have stages: TRITON_INTERPRET=1 runs them on a CPU"})
        return
    done: list[Record] = []
    repeats = 1 if run.target.dry_run else LAUNCHES_A_GRAPH
    left_out: list[str] = []
    for B, M in run.shapes.stages:
        if time.monotonic() > deadline:
            left_out.append(f"B={B} M={M}")
            save({"left_out": left_out})
            continue
        cell = run.shapes.cell(B, M)
        problem, found = run.problem(cell), {**asdict(cell), "contenders": [], "rows": []}
        done.append(found)
        ours = backend(run.target.ours)
        failure = AccuracyGate(problem, Contender("all_towers").function()).judge(ours, run.target.dtype).failure
        if failure is not None:
            found["failure"] = failure
            continue
        for kind, launches in zip(("forward", "backward", "weights"), _launches_alone(problem, ours), strict=True):
            pool = run.target.graph_pool()
            calls: dict[str, Call] = {}
            for name, call in launches.items():
                if time.monotonic() > deadline:
                    found.setdefault("left_out", []).append(f"{kind} {name}")
                    continue
                calls[name], _ = run.target.capture(partial(_repeated, call, repeats), pool, cells.WARM_UPS)
            seconds = timing.interleave(calls, run.protocol(), run.target.clock)
            each = {name: [value / repeats for value in values] for name, values in seconds.items()}
            found["rows"] += records.rows(kind, each, {})
            save({"columns": list(records.Row._fields), "cells": done})
        del problem
        run.target.collect()


def _repeated(call: Callable[[], object], times: int) -> tuple[Any, ...]:
    for _ in range(times):
        call()
    return ()


def _launches_alone(problem: Problem, ours: Callable[[Problem], Any]) -> Sequence[Mapping[str, Callable[[], object]]]:
    """By name, the launches of forward, backward and weight gradients over the tensors of one training step."""
    from saml_kernels.backends.triton import launch
    from saml_kernels.backends.triton.configs import SCHEDULES
    from saml_kernels.backends.triton.stages import Program

    made: list[tuple[Any, Program, Sequence[Any], Mapping[str, Any]]] = []

    def keeping(original: Any) -> Any:
        def run(program: Program, *arguments: Any, **options: Any) -> None:
            made.append((original, program, arguments, options))
            original(program, *arguments, **options)

        return run

    with (
        patch.object(launch, "run", keeping(launch.run)),
        patch.object(launch, "run_weight_gradients", keeping(launch.run_weight_gradients)),
    ):
        problem.call("step", ours)()
    found = []
    for index, (original, program, arguments, options) in enumerate(made):
        calls: dict[str, Callable[[], object]] = {}
        if index == 0:
            rest = arguments[1:]
            calls = {name: partial(original, program, name, *rest, **options) for name in SCHEDULES}
        else:
            calls["persistent"] = partial(original, program, *arguments, **options)
        for stage in program.stages:
            alone = Program((stage,), program.buffers)
            calls[f"{stage.name} {type(stage).__name__}"] = partial(original, alone, *arguments, **options)
        found.append(calls)
    return found


def backward(run: Run, deadline: float, save: Save) -> None:
    """Backward alone over M at one B, bfloat16, and the bytes of its one read of the foreign streams."""
    B, scenarios = run.shapes.backward
    done: list[Record] = []
    for index, M in enumerate(scenarios):
        if time.monotonic() > deadline:
            save({"left_out": [f"M={left}" for left in scenarios[index:]]})
            break
        cell = run.shapes.cell(B, M)
        problem = run.problem(cell)
        outputs = tuple(problem.run(backend=run.target.ours)[:2])
        leaves = [tensor for _, tensor in problem.named()]
        call = partial(torch.autograd.grad, outputs, leaves, problem.cotangents, retain_graph=True)
        call()
        seconds = timing.interleave({"backward": call}, run.protocol(), run.target.clock)["backward"]
        moved = roofline.bytes_moved(cell, problem.x_local.itemsize)
        done.append({"B": B, "M": M, **asdict(timing.summary(seconds)), "foreign_bytes": moved.foreign_streams})
        save({"cells": done})


def foreign(run: Run, deadline: float, save: Save) -> None:
    """How far rounded foreign streams take own from full precision, on initial and on trained weights."""
    cell = run.shapes.cell(*run.shapes.headline[0])
    problem = make(cell.case()).to(torch.float32, run.target.device).leaves()
    errors = {"initial": _foreign_errors(run, problem)}
    save({"B": cell.B, "M": cell.M, "errors": errors})
    losses = _train(run, problem, 3 if run.target.dry_run else TRAINING_STEPS, deadline)
    errors["trained"] = _foreign_errors(run, problem)
    save({"steps": len(losses), "losses": [losses[0], losses[-1]] if losses else []})


def launches(run: Run, deadline: float, save: Save) -> None:
    """Kernels on the device in one forward and one backward, by torch's profiler, over B, M and L."""
    done: list[Record] = []
    left_out: list[str] = []
    for schedule in run.target.schedules or ("auto",):
        for B, M, layers in run.shapes.launches:
            if time.monotonic() > deadline:
                left_out.append(f"{schedule} B={B} M={M} L={layers}")
                save({"left_out": left_out})
                continue
            entry: Record = {"schedule": schedule, "B": B, "M": M, "L": layers}
            try:
                entry |= _kernels(run, run.problem(run.shapes.cell(B, M, layers)), schedule)
            except Exception as error:
                entry["failure"] = one_line(error)
            done.append(entry)
            save({"counts": done})


def warm(run: Run, deadline: float, save: Save) -> None:
    """Compiles what the headline and the grid compile, so that they find it in the caches on disk. Nothing is timed."""
    done: list[str] = []
    for index, (B, M) in enumerate(run.shapes.headline):
        problem = run.problem(run.shapes.cell(B, M))
        for contender in run.peers(run.target.dtype, (), [n for n in _compiled(index) if n == run.argument["peer"]]):
            if time.monotonic() > deadline:
                return
            problem.results(contender.function(dynamic=True))
            done.append(f"{contender.name} B={B} M={M}")
            save({"compiled": done})


def _compiled(index: int) -> tuple[str, ...]:
    """Peers compiled for a cell of the headline: those that loop over scenarios would compile again for each M."""
    return GPU_PEERS if index == 0 else ("all_towers", "grouped_mm")


def _foreign_errors(run: Run, problem: Problem) -> Record:
    """‖own − ref‖ / ‖ref‖ against float64 without rounding, on the same values; a reason where it cannot run."""
    low = problem.to(run.target.dtype).leaves()
    exact = reference_results(low)["own"]
    errors: Record = {}
    for dtype in (None, *FOREIGN_DTYPES):
        name = "none" if dtype is None else short(dtype)
        try:
            own, _ = low.call("forward", backend(run.target.ours, foreign_dtype=dtype))()
            errors[name] = relative_error(own, exact)
        except Exception as error:
            errors[name] = one_line(error)
    return errors


def _train(run: Run, problem: Problem, steps: int, deadline: float) -> list[float]:
    """Adam on labels that a random function of the inputs and the scenario decides; changes the problem's parameters.

    bfloat16 by autocast over float32 parameters, in a dry run float32. Returns the losses.
    """
    generator = torch.Generator().manual_seed(1)
    device, D = run.target.device, problem.x_local.shape[1]
    M, width = len(problem.params.branch_weights[0]), problem.params.branch_weights[-1].shape[2]
    teacher = torch.randn(M, D, generator=generator).to(device)
    labels = ((problem.x_local.detach() * teacher[problem.scenario]).sum(1) > 0).float()
    heads = (torch.randn(M, width, generator=generator) / width**0.5).to(device).requires_grad_()
    trained = [tensor for name, tensor in problem.named() if not name.startswith("x_")]
    optimizer = torch.optim.Adam([*trained, heads], lr=1e-3)
    losses: list[float] = []
    while len(losses) < steps and time.monotonic() < deadline:
        with torch.autocast(device, dtype=run.target.dtype, enabled=not run.target.dry_run):
            own = problem.run(backend=run.target.ours).own
        logits = (own.float() * heads[problem.scenario]).sum(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _kernels(run: Run, problem: Problem, schedule: str) -> dict[str, dict[str, int]]:
    """Names and numbers of the kernels of one warm inference, training forward and backward."""
    ours = backend(run.target.ours, schedule=schedule)
    leaves = [tensor for _, tensor in problem.named()]
    infer, step = (problem.call(kind, ours) for kind in PASSES)
    infer()
    step()
    counts = {}
    counts["inference"], _ = count_kernels(run.target, infer)
    counts["forward"], outputs = count_kernels(run.target, lambda: tuple(ours(problem)[:2]))
    counts["backward"], _ = count_kernels(run.target, lambda: torch.autograd.grad(outputs, leaves, problem.cotangents))
    return {name: dict(count) for name, count in counts.items()}


def count_kernels(target: Target, call: Callable[[], Any]) -> tuple[Counter[str], Any]:
    """Kernels by name that ``call`` runs on the device, copies and fills left out, and what it returns.

    A dry run has no kernels there: launches in the interpreter, or torch's operators, are counted in their place.
    """
    if target.dry_run and target.schedules:
        from saml_kernels.backends.triton.launch import LAUNCHES

        before = LAUNCHES.copy()
        results = call()
        return LAUNCHES - before, results
    activity = torch.profiler.ProfilerActivity
    target.synchronize()
    with torch.profiler.profile(activities=[activity.CPU if target.dry_run else activity.CUDA]) as profile:
        results = call()
        target.synchronize()
    wanted = DeviceType.CPU if target.dry_run else DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == wanted]
    return Counter(name for name in names if not name.startswith(("Memcpy", "Memset"))), results
