"""Every launch of a call of the Triton kernels: recorded as it is made, to be made again alone.

A launch leaves its counters zero and reads what stays in memory, so that it may be made again any number of times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from saml_kernels.backends.triton.stages import (
    Factor,
    InputGradient,
    Layer,
    QuantizedLayer,
    Stage,
    Weight,
    WeightGradient,
)


@dataclass(frozen=True)
class Product:
    """``batch`` products of (m, k) by (k, n)."""

    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def operations(self) -> int:
        """A multiplication and an addition count two."""
        return 2 * self.batch * self.m * self.k * self.n

    def call(self, dtype: torch.dtype, device: str) -> Callable[[], torch.Tensor]:
        """torch's own product of that size, on random numbers."""
        lead = () if self.batch == 1 else (self.batch,)
        a, b = (torch.randn(*lead, *size, device=device).to(dtype) for size in ((self.m, self.k), (self.k, self.n)))
        return partial(torch.mm if self.batch == 1 else torch.bmm, a, b)


@dataclass(frozen=True)
class Recorded:
    """One launch of a call."""

    name: str
    number: int
    """Among the launches of its call."""
    again: Callable[[], object]
    stages: tuple[Stage, ...] = ()
    """Of a launch that is compiled for a description of them."""

    def products(self, rows: int) -> list[Product]:
        """Of its stages on a batch of so many rows, as many in each scenario."""
        return [product for stage in self.stages for product in products_of(stage, rows)]

    def what(self) -> list[str]:
        """Name and kind of its stages."""
        return [f"{stage.name} {type(stage).__name__}" for stage in self.stages]


def products_of(stage: Stage, rows: int) -> list[Product]:
    """One product where all rows meet one weight, a product a scenario where each has its own."""
    find = PRODUCTS.get(type(stage))
    return [] if find is None else [product for product in find(stage, rows, stage.num_scenarios) if product.k]


def _layer(stage: Layer, rows: int, scenarios: int) -> list[Product]:
    k = stage.first.k + stage.second.k
    if stage.own:
        return [Product(_share(rows, scenarios), k, stage.n, scenarios)]
    branches = stage.branches or 1
    # All branches read the same rows, side by side, unless each has a stream of its own.
    if stage.first.rows.branch_stride:
        return [Product(rows, k, stage.n, branches)]
    return [Product(rows, k, branches * stage.n)]


def _quantized(stage: QuantizedLayer, rows: int, scenarios: int) -> list[Product]:
    foreign = scenarios - 1
    if stage.rows.branch_stride:
        return [Product(rows, stage.k, stage.n, foreign)]
    return [Product(rows, stage.k, foreign * stage.n)]


def _input_gradient(stage: InputGradient, rows: int, scenarios: int) -> list[Product]:
    def of(factor: Factor) -> Product:
        if _by_branch(factor.weight):
            return Product(_share(rows, scenarios), factor.k, stage.n, scenarios)
        return Product(rows, factor.k, stage.n)

    return [of(stage.first), of(stage.second)]


def _weight_gradient(stage: WeightGradient, rows: int, scenarios: int) -> list[Product]:
    k = stage.k1 + stage.k2
    if stage.by_scenario:
        return [Product(k, _share(rows, scenarios), stage.n, scenarios)]
    return [Product(k, rows, stage.n)]


def _by_branch(weight: Weight) -> bool:
    return bool(weight.branch_stride)


def _share(rows: int, scenarios: int) -> int:
    return -(-rows // scenarios)


PRODUCTS: dict[type[Stage], Callable[[Any, int, int], list[Product]]] = {
    Layer: _layer,
    QuantizedLayer: _quantized,
    InputGradient: _input_gradient,
    WeightGradient: _weight_gradient,
}
"""The products of a stage, by its kind; the other kinds have none."""


@contextmanager
def recording(into: list[Recorded]) -> Iterator[None]:
    """Makes launches and keeps them, in all threads: autograd runs a backward in one of its own."""
    from saml_kernels.backends.triton import launch
    from saml_kernels.backends.triton import schedule as scheduling

    coming: list[tuple[Stage, ...]] = []
    start, run, run_weight_gradients = launch.start, launch.run, launch.run_weight_gradients

    def running(program: Any, schedule: str, *arguments: Any, **options: Any) -> None:
        coming[:] = scheduling.split(program.stages, schedule)
        run(program, schedule, *arguments, **options)

    def running_weight_gradients(program: Any, *arguments: Any, **options: Any) -> None:
        coming[:] = [program.stages]
        run_weight_gradients(program, *arguments, **options)

    def starting(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
        start(kernel, grid, *arguments, **options)
        # Only what is compiled for a description runs stages.
        stages = coming.pop(0) if "LAUNCH" in options else ()
        again = partial(start, kernel, grid, *arguments, **options)
        into.append(Recorded(kernel.fn.__name__, len(into), again, tuple(stages)))

    with (
        patch.object(launch, "start", starting),
        patch.object(launch, "run", running),
        patch.object(launch, "run_weight_gradients", running_weight_gradients),
    ):
        yield
