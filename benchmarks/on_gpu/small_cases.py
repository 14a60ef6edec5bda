"""A small trunk, forward and backward, for compute-sanitizer, under which everything is slow.

    compute-sanitizer --tool memcheck python benchmarks/on_gpu/small_cases.py "one unit, persistent"

Odd widths, a scenario without rows, more than one row tile, one and two mutual units, quantised foreign streams.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from on_gpu.target import Target
from saml_kernels.testing.problem import Case, backend, make

CASES = {
    "one unit": Case(150, 3, 20, 20, (33, 17)),
    "two units": Case(70, 5, 32, 32, (32, 16), mutual_layers=(1, 2)),
    "foreign int8": Case(70, 4, 32, 32, (32, 16), foreign_dtype=torch.int8),
}


def names(target: Target) -> list[str]:
    """Case and schedule of every run; quantised foreign streams have one schedule only."""
    return [
        f"{name}, {schedule}"
        for name, case in CASES.items()
        for schedule in (("auto",) if case.foreign_dtype else target.schedules or ("auto",))
    ]


def results(name: str, function: str, device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Outputs and gradients of a case as :func:`names` has it; the last scenario has no rows."""
    which, _, schedule = name.partition(", ")
    case = CASES[which]
    problem = make(case).to(dtype, device)
    problem = replace(problem, scenario=problem.scenario % (case.M - 1)).leaves()
    yield from problem.results(backend(function, schedule=schedule)).values()


if __name__ == "__main__":
    target = Target("--dry-run" in sys.argv)
    found = list(results(sys.argv[1], target.ours, target.device, target.dtype))
    if not all(tensor.isfinite().all() for tensor in found):
        sys.exit("a result is not finite")
    print(f"{len(found)} finite tensors")
