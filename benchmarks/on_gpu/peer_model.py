"""The best peer as the model takes it: torch's own kernels over rows grouped by scenario, in a CUDA graph.

Layer 1 of all branches as one product of cuBLAS, own branches through torch._grouped_mm, everything else elementwise,
as peers/grouped_mm.py does it. Nothing is simulated: every kernel takes the longer of its operations at a share of the
tensor cores' peak and its bytes at the memory's rate, and a launch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from on_gpu.chip import Chip, Peer
from on_gpu.costs import ITEMSIZE
from on_gpu.launches import LOCAL, WIDTHS

GROUPING = 5
"""Kernels at least: a sort, the inverse permutation, groups' ends, the one-hot scenarios, row numbers."""


@dataclass(frozen=True)
class Operation:
    """A kernel, or several of one kind."""

    name: str
    products: float = 0.0
    """Multiplications with addition."""
    numbers: float = 0.0
    """bf16 numbers read and written."""
    kernels: int = 1

    def seconds(self, chip: Chip, peer: Peer) -> float:
        """Its time, launches included."""
        peak = chip.products * chip.multiprocessors * chip.clock
        computing = self.products / (peer.products * peak)
        moving = ITEMSIZE * self.numbers / (peer.elementwise * chip.memory)
        return max(computing, moving) + self.kernels * chip.launch


def product(name: str, rows: int, k: int, n: int, weights: int = 1) -> Operation:
    """(rows, k) by (k, n); ``weights`` of them, each for some of the rows."""
    return Operation(name, rows * k * n, rows * (k + n) + weights * k * n)


def forward(B: int, M: int) -> Iterator[Operation]:
    """Of a batch."""
    d = WIDTHS[0]
    yield Operation("grouping", numbers=8 * B, kernels=GROUPING)
    yield Operation("rows by scenario", numbers=4 * B * LOCAL, kernels=2)
    for layer, (before, width) in enumerate(pairwise((LOCAL, *WIDTHS))):
        yield product("auxiliary layer", B, before, width)
        yield Operation("relu", numbers=2 * B * width)
        yield Operation("concatenation", numbers=2 * B * (before + width))
        if layer:
            yield product("grouped product", B, before + width, width, M)
            yield Operation("bias and relu", numbers=3 * B * width)
            continue
        yield Operation("weights side by side", numbers=2 * M * (before + width) * width)
        yield Operation(
            "product of all branches",
            B * (before + width) * M * width,
            B * (before + width) + M * (before + width) * width + B * M * width,
        )
        yield Operation("own rows", numbers=2 * B * d)
        yield Operation("products with the own stream", numbers=B * (M + 1) * d)
        yield Operation("norms", numbers=B * M * d)
        yield Operation("scores", numbers=6 * B * M)
        yield product("grouped product, gate", B, d, d, M)
        yield Operation("bias and sigmoid", numbers=3 * B * d)
        yield Operation("mix", numbers=B * (M + 1) * d)
        yield Operation("gated sum", numbers=4 * B * d)
    yield Operation("rows in the caller's order", numbers=4 * B * WIDTHS[-1], kernels=2)


def backward(B: int, M: int) -> Iterator[Operation]:
    """Of a batch: both factors of every own product, biases as products with the one-hot scenarios."""
    d = WIDTHS[0]
    yield Operation("rows by scenario", numbers=4 * B * WIDTHS[-1], kernels=2)
    for layer, (before, width) in reversed(list(enumerate(pairwise((LOCAL, *WIDTHS))))):
        own = [(before + width, width)]
        if layer == 0:
            yield Operation("gated sum", numbers=6 * B * d)
            yield Operation("products with the streams", numbers=B * (M + 1) * d)
            yield Operation("scores", numbers=8 * B * M)
            yield Operation("what scores send to the own stream", numbers=B * (M + 1) * d)
            own.append((d, d))
        for k, n in own:
            yield Operation("activation", numbers=3 * B * n)
            yield product("grouped product, rows", B, n, k, M)
            yield product("grouped product, weights", B, k, n, M)
            yield product("biases", B, M, n)
        yield Operation("parts of a concatenation", numbers=2 * B * (before + width))
        yield Operation("activation", numbers=3 * B * width)
        yield product("auxiliary layer, rows", B, width, before)
        yield product("auxiliary layer, weights", B, before, width)
        yield Operation("auxiliary bias", numbers=B * width)
    yield Operation("rows in the caller's order", numbers=4 * B * LOCAL, kernels=2)


def seconds(operations: Iterator[Operation] | Sequence[Operation], chip: Chip, peer: Peer) -> float:
    """All of them, one after another."""
    return sum(operation.seconds(chip, peer) for operation in operations)
