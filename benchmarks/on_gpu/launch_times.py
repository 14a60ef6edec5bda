"""Section ``launches_timed``: the device time of every single launch, beside torch's products of the same sizes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import torch

import cells
from on_gpu import trials
from on_gpu.recording import Product, Recorded, recording
from on_gpu.run import Record, Run, Save
from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import one_line
from saml_kernels.testing.problem import Problem, backend
from workload import Cell

LAUNCHES_A_GRAPH: Final = 20
"""Of one kernel, so that what a graph costs besides does not count."""
PASSES: Final = ("forward", "backward")
PARTS: Final = ("forward", "layer", "backward", "weights")
"""Of a choice: the configurations of the forward, of a layer that has a launch of its own, of the backward's chain
and of the weight gradients."""
TRIALS_SHARE: Final = 0.5
"""Of the section's time, at most, for compiling what is varied."""
AXES: Final[Mapping[str, Sequence[int]]] = {
    "block_m": (32, 64, 128, 256),
    "block_n": (64, 128, 256),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
    "programs": (1, 2, 3),
    "item_rows": (8, 16, 32),
    "group_rows": (8, 16, 32),
}
DRY_VARIATIONS: Final = ("persistent, forward, block_n 128",)
OF_PRODUCTS: Final = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
"""Axes of launches that are products alone: of a layer, of weight gradients."""
SCHEDULES_OF: Final[Mapping[str, Sequence[str]]] = {"forward": configs.SCHEDULES, "layer": ("per_layer",)}
"""By part, where it is more than the built-in one."""


@dataclass(frozen=True)
class Variation:
    """The built-in choice but for one number of one of its configurations."""

    choice: Choice
    part: str
    """Of PARTS."""
    axis: str
    value: int

    @property
    def name(self) -> str:
        return f"{self.choice.schedule}, {self.part}, {self.axis} {self.value}"


def variations(built_in: Choice, axes: Mapping[str, Sequence[int]]) -> Iterator[Variation]:
    """Axis by axis, every value but the built-in one of each configuration; forward in both schedules."""
    for axis, values in axes.items():
        for part in PARTS:
            config: Config = getattr(built_in, part) or built_in.forward
            if part in ("layer", "weights") and axis not in OF_PRODUCTS:
                continue
            for schedule in SCHEDULES_OF.get(part, (built_in.schedule,)):
                for value in values:
                    if value != getattr(config, axis):
                        number: dict[str, Any] = {axis: value}
                        changed: dict[str, Any] = {part: replace(config, **number)}
                        yield Variation(replace(built_in, schedule=schedule, **changed), part, axis, value)


def launches_timed(run: Run, deadline: float, save: Save) -> None:
    """Every launch of a training step over B and M in both schedules; then each axis of the configurations alone."""
    shapes = [run.shapes.cell(B, M) for B, M in run.shapes.timed]
    varied = shapes[0]
    wanted = list(variations(_built_in(run, varied), AXES))
    both = [(cell, replace(_built_in(run, cell), schedule=each)) for cell in shapes for each in configs.SCHEDULES]
    if run.target.dry_run:
        wanted = [variation for variation in wanted if variation.name in DRY_VARIATIONS]
    tried = trials.run(
        {} if run.target.dry_run else {_name(cell, choice): (choice, cell.M) for cell, choice in both},
        {variation.name: (variation.choice, varied.M) for variation in wanted},
        run,
        time.monotonic() + TRIALS_SHARE * (deadline - time.monotonic()),
    )
    found: Record = {"cells": [], "variations": []}
    for cell, choice in both:
        entry = asdict(cell) | {"schedule": choice.schedule}
        found["cells"].append(entry | _tried(run, deadline, tried.get(_name(cell, choice)), cell, choice))
        save(found)
    for variation in wanted:
        usual = _built_in(run, varied)
        built_in = getattr(getattr(usual, variation.part) or usual.forward, variation.axis)
        entry = {"name": variation.name, "part": variation.part, "schedule": variation.choice.schedule}
        entry |= {"axis": variation.axis, "value": variation.value, "built_in": built_in}
        failure = tried[variation.name]
        entry |= _tried(run, deadline, failure, varied, variation.choice, variation.part)
        found["variations"].append(entry)
        save(found)


def _name(cell: Cell, choice: Choice) -> str:
    """Of a built-in choice, which is the same for several B."""
    return f"M={cell.M}, {choice.schedule}, {choice.forward}"


def _tried(
    run: Run, deadline: float, failure: str | None, cell: Cell, choice: Choice, part: str | None = None
) -> Record:
    """``launches`` with their times, or the ``failure`` for which there are none."""
    if failure is not None:
        return {"failure": failure}
    if time.monotonic() > deadline:
        return {"failure": "left out: no time was left"}
    try:
        return {"launches": _timed(run, cell, choice, part)}
    except RuntimeError as error:
        return {"failure": one_line(error)}
    finally:
        run.target.collect()


def _built_in(run: Run, cell: Cell) -> Choice:
    bucket = configs.Bucket.of(cell.B, cell.M, max(cell.hidden_dims))
    return configs.built_in(bucket, run.target.dtype.itemsize, configs.family(torch.device(run.target.device)))


def _timed(run: Run, cell: Cell, choice: Choice, part: str | None) -> list[Record]:
    """Seconds of the launches that ``part`` of a choice makes, of all of a training step where it is None."""
    problem = run.problem(cell)
    with configs.forced(choice):
        made = launches_of(run, problem)
    wanted = [(kind, entry) for kind in PASSES for entry in made[kind] if part in (None, _part(kind, entry))]
    pool = run.target.graph_pool()
    repeats = 1 if run.target.dry_run else LAUNCHES_A_GRAPH
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    for place, (_, entry) in enumerate(wanted):
        products = entry.products(cell.B)
        several: dict[str, list[Callable[[], object]]] = {"launch": [entry.again]}
        if products and part is None:
            several["torch"] = [product.call(run.target.dtype, run.target.device) for product in products]
        for name, each in several.items():
            calls[place, name], _ = run.target.capture(partial(_repeated, each, repeats), pool, cells.WARM_UPS)
    seconds = timing.interleave(calls, run.protocol(0.4), run.target.clock)
    rows = []
    for place, (kind, entry) in enumerate(wanted):
        of_launch = {
            name: [value / repeats for value in values] for (of, name), values in seconds.items() if of == place
        }
        rows.append(_row(kind, entry, entry.products(cell.B), of_launch))
    return rows


def _part(kind: str, entry: Recorded) -> str:
    if entry.name == "weight_gradient_kernel":
        return "weights"
    return "layer" if len(entry.stages) == 1 and entry.stages[0].own_launch else kind


def _row(kind: str, entry: Recorded, products: Sequence[Product], seconds: Mapping[str, list[float]]) -> Record:
    ours = timing.summary(seconds["launch"])
    operations = sum(product.operations for product in products)
    row: Record = {
        "pass": kind,
        "part": _part(kind, entry),
        "number": entry.number,
        "name": entry.name,
        "stages": entry.what(),
    }
    row |= asdict(ours) | {"products": [asdict(product) for product in products]}
    if operations:
        row["tflops"] = operations / ours.median / 1e12
    if operations and "torch" in seconds:
        torch_seconds = timing.summary(seconds["torch"]).median
        row |= {"torch_seconds": torch_seconds, "torch_tflops": operations / torch_seconds / 1e12}
        row["ratio"] = torch_seconds / ours.median
    return row


def _repeated(calls: Sequence[Callable[[], object]], times: int) -> tuple[Any, ...]:
    for _ in range(times):
        for call in calls:
            call()
    return ()


def launches_of(run: Run, problem: Problem) -> dict[str, list[Recorded]]:
    """Of a training step by pass; where no kernels run, as in most dry runs, each pass counts as one."""
    made: dict[str, list[Recorded]] = {name: [] for name in PASSES}
    ours = backend(run.target.ours)
    leaves = [tensor for _, tensor in problem.named()]
    with recording(made["forward"]):
        outputs = tuple(ours(problem)[:2])
    backward = partial(torch.autograd.grad, outputs, leaves, problem.cotangents, retain_graph=True)
    with recording(made["backward"]):
        backward()
    if not run.target.schedules:
        whole: dict[str, Callable[[], object]] = {"forward": partial(ours, problem), "backward": backward}
        return {name: [Recorded(f"{run.target.ours} {name}", 0, call)] for name, call in whole.items()}
    return made
