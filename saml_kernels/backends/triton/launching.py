"""Launches, counted: tests and docs/gpu-kernels.md state how many a call takes."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

LAUNCHES: Counter[str] = Counter()
"""Kernel name → launches in this process."""


class Grouped(NamedTuple):
    """A batch's rows by scenario, as every launch takes them."""

    permutation: Tensor
    """(B,) int64: rows in stable order of their scenario."""
    offsets: Tensor
    """(M + 1,) int64: where each scenario's rows begin among the sorted ones."""
    counters: Tensor
    """int32 zeros, enough for any of the launches; each leaves them zero."""


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launches ``kernel`` on the device of its first argument unless the grid is empty.

    The grid follows from shapes: nothing waits for the device.
    """
    if not all(grid):
        return
    LAUNCHES[kernel.fn.__name__] += 1
    device = arguments[0].device
    # Triton launches on the current device, whatever device the tensors are on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **options)


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores take float32 factors: as torch's own products do. Nothing to choose for 16-bit ones."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded(count: int, minimum: int = 1) -> int:
    """The next power of two, as Triton's ranges want it."""
    return max(minimum, triton.next_power_of_2(count))
