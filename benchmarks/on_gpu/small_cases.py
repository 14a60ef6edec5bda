"""A few small trunks, forward and backward, for compute-sanitizer, under which everything is slow.

    compute-sanitizer --tool memcheck python benchmarks/on_gpu/small_cases.py single

Odd widths, a scenario without rows, more than one row tile, one and two mutual units.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import saml_kernels
from on_gpu.target import Target
from saml_kernels import TrunkParams

Schedule = Literal["auto", "persistent", "per_layer"]


@dataclass(frozen=True)
class Case:
    """One trunk; D_l = D_g = D."""

    B: int
    M: int
    D: int
    widths: tuple[int, ...]
    mutual: tuple[int, ...]
    foreign_dtype: torch.dtype | None = None


CASES = (
    Case(150, 3, 20, (33, 17), (1,)),
    Case(70, 5, 32, (32, 16), (1, 2)),
    Case(70, 4, 32, (32, 16), (1,), torch.int8),
)


def tensors(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, TrunkParams]:
    """Inputs and parameters; the last scenario has no rows."""
    B, M, D, widths, mutual = case.B, case.M, case.D, case.widths, case.mutual
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) / shape[-2] ** 0.5 if len(shape) > 1 else torch.randn(shape)
        return values.to(device, dtype).requires_grad_()

    before = (D, *widths)
    params = TrunkParams(
        [leaf(M, i + o, o) for i, o in zip(before, widths, strict=False)],
        [leaf(M, o) for o in widths],
        [leaf(i, o) for i, o in zip(before, widths, strict=False)],
        [leaf(o) for o in widths],
        [leaf(M, o, o) if layer in mutual else None for layer, o in enumerate(widths, start=1)],
        [leaf(M, o) if layer in mutual else None for layer, o in enumerate(widths, start=1)],
    )
    return leaf(B, D), leaf(B, D), (torch.arange(B) * 7 % (M - 1)).to(device), params


def results(schedule: Schedule, backend: str, device: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Outputs and gradients of every case."""
    for case in CASES:
        x_local, x_global, scenario, params = tensors(case, device, dtype)
        # Rounded foreign streams have one schedule only.
        chosen: Schedule = schedule if case.foreign_dtype is None else "auto"
        output = saml_kernels.multi_branch(
            x_local, x_global, scenario, params, backend=backend, schedule=chosen, foreign_dtype=case.foreign_dtype
        )
        yield from (output.own, output.aux)
        leaves = [x_local, x_global, *(entry for entries in params for entry in entries if entry is not None)]
        yield from torch.autograd.grad((output.own.float().sum() + output.aux.float().sum()), leaves)


if __name__ == "__main__":
    target = Target("--dry-run" in sys.argv)
    wanted: Schedule = "auto" if not target.schedules else "persistent" if sys.argv[1] == "persistent" else "per_layer"
    count = 0
    for tensor in results(wanted, target.ours, target.device, target.dtype):
        if not tensor.isfinite().all():
            sys.exit("a result is not finite")
        count += 1
    print(f"{count} finite tensors")
