"""A few small trunks, forward and backward, for compute-sanitizer, under which everything is slow.

    compute-sanitizer --tool memcheck python benchmarks/on_gpu/small_cases.py persistent

Odd widths, a scenario without rows, more than one row tile, one and two mutual units, rounded foreign streams.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from on_gpu.target import Target
from saml_kernels.testing.problem import Case, backend, make

CASES = (
    Case(150, 3, 20, 20, (33, 17)),
    Case(70, 5, 32, 32, (32, 16), mutual_layers=(1, 2)),
    Case(70, 4, 32, 32, (32, 16), foreign_dtype=torch.int8),
)


def results(schedule: str, name: str, device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Outputs and gradients of every case; the last scenario has no rows."""
    for case in CASES:
        problem = make(case).to(dtype, device)
        problem = replace(problem, scenario=problem.scenario % (case.M - 1)).leaves()
        # Rounded foreign streams have one schedule only.
        yield from problem.results(backend(name, schedule="auto" if case.foreign_dtype else schedule)).values()


if __name__ == "__main__":
    target = Target("--dry-run" in sys.argv)
    wanted = sys.argv[1] if target.schedules else "auto"
    found = list(results(wanted, target.ours, target.device, target.dtype))
    if not all(tensor.isfinite().all() for tensor in found):
        sys.exit("a result is not finite")
    print(f"{len(found)} finite tensors")
