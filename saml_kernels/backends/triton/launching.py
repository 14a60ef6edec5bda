"""Launches, counted: tests and docs/gpu-kernels.md state how many a call takes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

LAUNCHES: Counter[str] = Counter()
"""Kernel name → launches in this process."""


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Launches ``kernel`` unless the grid is empty. The grid follows from shapes: nothing waits for the device."""
    if all(grid):
        LAUNCHES[kernel.fn.__name__] += 1
        kernel[tuple(grid)](*arguments, **options)


def distance(first: Tensor, second: Tensor) -> int:
    """Elements from the start of ``first`` to that of ``second``, so that one base pointer reaches both."""
    return (second.data_ptr() - first.data_ptr()) // first.element_size()


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores take float32 factors: as torch's own products do. Nothing to choose for 16-bit ones."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded(count: int, minimum: int = 1) -> int:
    """The next power of two, as Triton's ranges want it."""
    return max(minimum, triton.next_power_of_2(count))
