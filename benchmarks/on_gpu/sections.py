"""The measurements, in the order of their weight: each fills its part of the record, cell by cell."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import timing
import torch
from gate import relative_error
from torch.autograd import DeviceType  # type: ignore[attr-defined]

import saml_kernels
import workload
from contenders import Contender, short
from on_gpu import cells, roofline
from on_gpu.target import Target
from peers import PEERS
from workload import Cell, Problem

Save = Callable[[dict[str, Any]], None]
"""Takes a section's record as far as it has come."""

FOREIGN_DTYPES: Final = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
TRAINING_STEPS: Final = 100
GPU_PEERS: Final = tuple(name for name, peer in PEERS.items() if "cuda" in peer.devices)


@dataclass(frozen=True)
class Shapes:
    """Of one run. The issue's floors are stated for those of a GPU."""

    widths: tuple[int, ...]
    """D_l = D_g first, then d_1..d_L."""
    headline: tuple[tuple[int, int], ...]
    """(B, M), the first with every contender."""
    grid: tuple[tuple[int, int], ...]
    backward: tuple[int, tuple[int, ...]]
    """B, and the M."""
    launches: tuple[tuple[int, int, int], ...]
    """(B, M, L)."""

    def cell(self, B: int, M: int, layers: int | None = None) -> Cell:
        return Cell(B, M, self.widths[0], self.widths[0], self.widths[1:][:layers])


GPU_SHAPES: Final = Shapes(
    widths=(256, 512, 256, 128),
    headline=((4096, 8), (16384, 8), (4096, 16), (16384, 16), (4096, 32), (16384, 32)),
    # From the middle outwards: what a run that is cut short has first.
    grid=tuple((B, M) for B in (1024, 256, 4096, 16384, 65536) for M in (8, 2, 32, 4, 16)),
    backward=(16384, (2, 4, 8, 16, 32)),
    launches=((256, 2, 3), (1024, 8, 3), (256, 32, 3), (256, 8, 2), (256, 8, 1)),
)
DRY_SHAPES: Final = Shapes(
    widths=(16, 16, 8),
    headline=((48, 3), (64, 3)),
    grid=((24, 2), (48, 3)),
    backward=(32, (2, 3)),
    launches=((16, 2, 2), (24, 3, 1)),
)


@dataclass(frozen=True)
class Run:
    """What every section knows."""

    target: Target
    compiled: bool
    """Peers under torch.compile take part."""
    warm_peer: str | None = None
    """The peer that section ``warm`` compiles."""

    @property
    def shapes(self) -> Shapes:
        return DRY_SHAPES if self.target.dry_run else GPU_SHAPES

    @property
    def protocol(self) -> timing.Protocol:
        """Few rounds where nothing is kept."""
        return (
            timing.Protocol(budget=1e-3, min_rounds=2, max_rounds=2, min_sample=1e-4)
            if self.target.dry_run
            else (cells.Plan.protocol)
        )

    def problem(self, cell: Cell) -> Problem:
        """Of a cell, in the type measured most; for figures that judge no gradient near a kink."""
        made = workload.make(cell, avoid_kinks=False, device=self.target.device)
        return made.to(self.target.dtype)

    def ours(self, dtype: torch.dtype, foreign: Iterable[torch.dtype] = ()) -> tuple[Contender, ...]:
        """The kernels: schedule auto, then each schedule, then rounded foreign streams."""
        auto = Contender(self.target.ours, dtype=dtype)
        schedules = [replace(auto, schedule=schedule) for schedule in self.target.schedules]
        return (auto, *schedules, *(replace(auto, foreign_dtype=entry) for entry in foreign))

    def peers(self, dtype: torch.dtype, names: Iterable[str], compiled: Iterable[str] = ()) -> tuple[Contender, ...]:
        """Eager ones, then compiled ones."""
        eager = [Contender(name, dtype=dtype) for name in names]
        return (*eager, *[Contender(name, True, dtype) for name in compiled if self.compiled])


def ceilings(run: Run, deadline: float, save: Save) -> None:
    """Rates of large products and a large copy on this very device."""
    save(roofline.ceilings(run.target))


def headline(run: Run, deadline: float, save: Save) -> None:
    """bfloat16, every contender, eager and from CUDA graphs, with peak memory: what the floors are stated for."""
    done: list[dict[str, Any]] = []
    for index, (B, M) in enumerate(run.shapes.headline):
        contenders = (
            *run.ours(run.target.dtype, FOREIGN_DTYPES[1:]),
            *run.peers(run.target.dtype, GPU_PEERS, _compiled(index)),
        )
        plan = cells.Plan(contenders, protocol=run.protocol, memory=True)
        _add(run, run.shapes.cell(B, M), plan, deadline, done, save)


def grid(run: Run, deadline: float, save: Save) -> None:
    """bfloat16 over B and M from CUDA graphs; the two fastest peers of each cell stay for the rounds."""
    done: list[dict[str, Any]] = []
    contenders = (*run.ours(run.target.dtype), *run.peers(run.target.dtype, GPU_PEERS, ("grouped_mm",)))
    # Without rounds of their own for the slow peers, half the time is enough.
    protocol = run.protocol if run.target.dry_run else replace(run.protocol, budget=0.3)
    plan = cells.Plan(contenders, modes=("graph",), protocol=protocol, keep_peers=2)
    for B, M in run.shapes.grid:
        _add(run, run.shapes.cell(B, M), plan, deadline, done, save)


def precision(run: Run, deadline: float, save: Save) -> None:
    """float32 without and with tf32, the first cell of the headline; torch._grouped_mm has neither in one kernel."""
    done: list[dict[str, Any]] = []
    names = [name for name in GPU_PEERS if name != "grouped_mm"]
    plan = cells.Plan((*run.ours(torch.float32), *run.peers(torch.float32, names)), protocol=run.protocol)
    for tf32 in (True, False):
        with _tf32(tf32):
            _add(run, run.shapes.cell(*run.shapes.headline[0]), plan, deadline, done, save, tf32=tf32)


def backward(run: Run, deadline: float, save: Save) -> None:
    """Backward alone over M at one B, bfloat16, and the bytes of its one read of the foreign streams."""
    B, scenarios = run.shapes.backward
    done: list[dict[str, Any]] = []
    for M in scenarios:
        if time.monotonic() > deadline:
            break
        cell = run.shapes.cell(B, M)
        problem = run.problem(cell)
        leaves = [tensor for _, tensor in problem.named()]
        outputs = _outputs(run, problem)

        def call(outputs: Any = outputs, leaves: Any = leaves, problem: Problem = problem) -> Any:
            return torch.autograd.grad(outputs, leaves, problem.cotangents, retain_graph=True)

        call()
        seconds = timing.interleave({"backward": call}, run.protocol, run.target.sample)["backward"]
        moved = roofline.bytes_moved(cell, 2)
        done.append({"B": B, "M": M, "seconds": seconds, "foreign_bytes": moved.foreign_streams})
        save({"cells": done})


def foreign(run: Run, deadline: float, save: Save) -> None:
    """How far rounded foreign streams take own from full precision, on initial and on trained weights."""
    cell = run.shapes.cell(*run.shapes.headline[0])
    problem = workload.make(cell, avoid_kinks=False, device=run.target.device)
    record: dict[str, Any] = {"B": cell.B, "M": cell.M, "errors": {"initial": _foreign_errors(run, problem)}}
    save(record)
    losses = _train(run, problem, 3 if run.target.dry_run else TRAINING_STEPS, deadline)
    record |= {"steps": len(losses), "losses": [losses[0], losses[-1]] if losses else []}
    record["errors"]["trained"] = _foreign_errors(run, problem)
    save(record)


def launches(run: Run, deadline: float, save: Save) -> None:
    """Kernels on the device in one forward and one backward, by torch's profiler, over B, M and L."""
    done: list[dict[str, Any]] = []
    for schedule in run.target.schedules or ("auto",):
        for B, M, layers in run.shapes.launches:
            if time.monotonic() > deadline:
                return
            cell = run.shapes.cell(B, M, layers)
            problem = run.problem(cell)
            entry: dict[str, Any] = {"schedule": schedule, "B": B, "M": M, "L": layers}
            try:
                entry |= _kernels(run, problem, schedule)
            except Exception as error:
                entry["failure"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            done.append(entry)
            save({"counts": done})


def warm(run: Run, deadline: float, save: Save) -> None:
    """Compiles what the headline and the grid compile, so that they find it in the caches on disk. Nothing is timed."""
    done: list[str] = []
    for index, (B, M) in enumerate(run.shapes.headline):
        names = [name for name in _compiled(index) if name == run.warm_peer]
        problem = workload.make(run.shapes.cell(B, M), avoid_kinks=False, device=run.target.device).to(run.target.dtype)
        for contender in run.peers(run.target.dtype, (), names):
            if time.monotonic() > deadline:
                return
            function = contender.function(dynamic=True)
            for call in cells.CALLS.values():
                call(function, problem)()
            done.append(f"{contender.name} B={B} M={M}")
            save({"compiled": done})


SECTIONS: Final[dict[str, tuple[Callable[[Run, float, Save], None], float]]] = {
    "ceilings": (ceilings, 8),
    "headline": (headline, 105),
    "launches": (launches, 15),
    "grid": (grid, 100),
    "backward": (backward, 12),
    "foreign": (foreign, 15),
    "precision": (precision, 15),
    # Not measured: compiles for the others.
    "warm": (warm, 0),
}
"""Function and weight: a section's share of the time that is left when it starts."""


def _compiled(index: int) -> tuple[str, ...]:
    """Peers compiled for a cell of the headline: those that loop over scenarios would compile again for each M."""
    return GPU_PEERS if index == 0 else ("all_towers", "grouped_mm")


def _add(
    run: Run, cell: Cell, plan: cells.Plan, deadline: float, done: list[dict[str, Any]], save: Save, **more: Any
) -> None:
    if time.monotonic() > deadline:
        return
    done.append(cells.measure(run.target, cell, plan, deadline) | more)
    save({"cells": done})


def _outputs(run: Run, problem: Problem, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    output = saml_kernels.multi_branch(
        problem.x_local, problem.x_global, problem.scenario, problem.params, backend=run.target.ours, **options
    )
    return output.own, output.aux


def _foreign_errors(run: Run, problem: Problem) -> dict[str, Any]:
    """‖own − ref‖ / ‖ref‖ against float64 without rounding, on the same values; a reason where it cannot run."""
    low = problem.to(run.target.dtype)
    exact = workload.reference(low)["own"]
    errors: dict[str, Any] = {}
    for dtype in (None, *FOREIGN_DTYPES):
        name = "none" if dtype is None else short(dtype)
        try:
            with torch.inference_mode():
                errors[name] = relative_error(_outputs(run, low, foreign_dtype=dtype)[0], exact)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return errors


def _train(run: Run, problem: Problem, steps: int, deadline: float) -> list[float]:
    """Adam on labels that a random function of the inputs and the scenario decides; changes the problem's parameters.

    bfloat16 by autocast over float32 parameters, in a dry run float32. Returns the losses.
    """
    generator = torch.Generator().manual_seed(1)
    device, D = run.target.device, problem.x_local.shape[1]
    M, width = len(problem.params.branch_weights[0]), problem.params.branch_weights[-1].shape[2]
    teacher = torch.randn(M, D, generator=generator).to(device)
    labels = ((problem.x_local * teacher[problem.scenario]).sum(1) > 0).float()
    heads = (torch.randn(M, width, generator=generator) / width**0.5).to(device).requires_grad_()
    trained = [tensor for name, tensor in problem.named() if not name.startswith("x_")]
    for tensor in trained:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam([*trained, heads], lr=1e-3)
    losses = []
    for _ in range(steps):
        if time.monotonic() > deadline:
            break
        with torch.autocast(device, dtype=run.target.dtype, enabled=not run.target.dry_run):
            own, _ = _outputs(run, problem)
        logits = (own.float() * heads[problem.scenario]).sum(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for tensor in trained:
        tensor.requires_grad_(False)
    return losses


def _kernels(run: Run, problem: Problem, schedule: str) -> dict[str, dict[str, int]]:
    """Names and numbers of the kernels of one warm inference, training forward and backward."""
    leaves = [tensor for _, tensor in problem.named()]

    def infer() -> Any:
        with torch.inference_mode():
            return _outputs(run, problem, schedule=schedule)

    def forward() -> Any:
        return _outputs(run, problem, schedule=schedule)

    infer()
    torch.autograd.grad(forward(), leaves, problem.cotangents)
    counts = {}
    counts["inference"], _ = count_kernels(run.target, infer)
    counts["forward"], outputs = count_kernels(run.target, forward)
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


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """float32 products with or without tf32 within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
