"""Every number of the schedule model that is not counted: of the chip, and of how the peer is taken to run.

``known`` numbers come from NVIDIA's papers. ``guess`` numbers are guesses, which nothing here has measured:
docs/gpu-model.md shows them as such, and how far predictions move when each is halved or doubled.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final


def known(value: float, unit: str, source: str) -> Any:
    """A published number."""
    return dataclasses.field(default=value, metadata={"unit": unit, "source": source, "guess": False})


def guess(value: float, unit: str, reason: str) -> Any:
    """A number that nobody here has measured."""
    return dataclasses.field(default=value, metadata={"unit": unit, "source": reason, "guess": True})


@dataclass(frozen=True)
class Chip:
    """An H100 SXM5."""

    multiprocessors: int = known(132, "", "H100 white paper")
    clock: float = known(1.83e9, "Hz", "the clock of the white paper's 989.4 TFLOP/s: 132 · 2048 · 2 · 1.83 GHz")
    products: int = known(
        2048, "bf16 multiplications with addition a cycle and multiprocessor", "white paper, dense: 4 tensor cores"
    )
    schedulers: int = known(4, "a multiprocessor, each an instruction of a warp a cycle", "white paper")
    registers: int = known(65536, "a multiprocessor", "white paper")
    threads: int = known(2048, "a multiprocessor", "white paper")
    shared_memory: int = known(233472, "bytes a multiprocessor", "CUDA programming guide: 228 KiB")
    shared_memory_of_program: int = known(1024, "bytes a program beside its own", "CUDA programming guide")
    memory: float = known(3.35e12, "bytes a second", "H100 SXM data sheet; no program reaches all of it")
    l2_bytes: float = guess(
        5120 / 132, "bytes a cycle and multiprocessor", "5120 bytes a cycle for the whole chip, the A100 white paper's"
    )
    l2_round_trip: float = guess(
        700, "cycles", "a load from L2 on a busy chip, up to the first instruction that uses it"
    )
    atomic_round_trip: float = guess(700, "cycles", "an atomic operation in L2, its result spread among the warps")
    fence: float = guess(700, "cycles", "until an item's stores are visible to others, before it counts as done")
    barrier: float = guess(30, "cycles", "a barrier of a program's warps, beside the instruction itself")
    block_start: float = guess(1000, "cycles", "from the end of a program to the next one's first instruction")
    bias_block: float = guess(
        100, "instructions of a warp", "BLOCK_K rows of dz summed for a bias: the file counts loops with products only"
    )
    launch: float = guess(2.5e-6, "seconds", "a launch in a CUDA graph, from the end of the one before")

    def guesses(self) -> Iterator[str]:
        """Names of the numbers that are guesses."""
        return (field.name for field in dataclasses.fields(self) if field.metadata["guess"])

    def beside(self, registers: int, shared_memory: int, warps: int) -> int:
        """Programs that a multiprocessor holds at a time; registers are given out 8 a thread."""
        threads = 32 * warps
        return int(
            min(
                self.registers // (-(-registers // 8) * 8 * threads),
                self.shared_memory // (shared_memory + self.shared_memory_of_program),
                self.threads // threads,
            )
        )


@dataclass(frozen=True)
class Peer:
    """How torch's own kernels are taken to run."""

    products: float = guess(0.7, "of the tensor cores' peak", "what large bf16 products of cuBLAS reach")
    elementwise: float = guess(1.0, "of the memory's rate", "in the peer's favour")


H100: Final = Chip()
PEER: Final = Peer()
