"""In which order an epoch visits the rows of a table, and which rows of every batch a process takes.

A table of up to WINDOW_ROWS rows is shuffled whole. A larger one is shuffled in windows: its blocks of BLOCK_ROWS rows,
in random order, make windows of LANES blocks each, and the batches of a window take their rows from all of its lanes in
turn, each of which is in a random order of its own. So a batch is drawn from WINDOW_ROWS rows that lie in LANES places
of the table; two rows of one block always share a window.

Position p of an epoch belongs to lane p mod LANES, however many processes there are: process r of W takes the lanes
r, r + W, .., reads nothing else, and the rows of a batch are the same for every W.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 2**14
LANES = 64
WINDOW_ROWS = LANES * BLOCK_ROWS


@dataclass(frozen=True)
class Share:
    """Which of several processes this is.

    Args:
        rank: of the process.
        processes: in all, W.
    """

    rank: int = 0
    processes: int = 1


ALL = Share()


@dataclass(frozen=True)
class Segment:
    """Rows start .. stop − 1 of a table, within one block."""

    start: int
    stop: int


@dataclass(frozen=True)
class Lane:
    """What one lane holds of a window: segments, one after the other, in the order that ``seed`` gives their rows."""

    segments: tuple[Segment, ...]
    seed: tuple[int, int, int]

    def order(self) -> Tensor:
        """A permutation of its rows."""
        rows = sum(segment.stop - segment.start for segment in self.segments)
        return torch.from_numpy(np.random.default_rng(self.seed).permutation(rows))


def windows(rows: int, generator: torch.Generator) -> Iterator[list[Lane]]:
    """The LANES lanes of every window; position p of a window is row p // LANES of lane p % LANES.

    Args:
        rows: of the table.
        generator: decides the order.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    order = torch.randperm(-(-rows // BLOCK_ROWS), generator=generator).tolist()
    last = -(-rows // BLOCK_ROWS) - 1
    if rows % BLOCK_ROWS:
        # The short block is in the last window: all others are full.
        order.remove(last)
        order.append(last)
    for number, start in enumerate(range(0, len(order), LANES)):
        blocks = [
            Segment(block * BLOCK_ROWS, min(rows, (block + 1) * BLOCK_ROWS)) for block in order[start : start + LANES]
        ]
        yield [Lane(tuple(part), (seed, number, lane)) for lane, part in enumerate(_in_lanes(blocks))]


def _in_lanes(blocks: Sequence[Segment]) -> Iterator[list[Segment]]:
    """The rows of a window in LANES parts of ⌈(rows − lane) / LANES⌉; whole blocks where there are LANES full ones."""
    rows = sum(block.stop - block.start for block in blocks)
    left = list(reversed(blocks))
    for lane in range(LANES):
        wanted = -(-(rows - lane) // LANES)
        part = []
        while wanted:
            block = left.pop()
            cut = min(block.stop, block.start + wanted)
            part.append(Segment(block.start, cut))
            wanted -= cut - block.start
            if cut < block.stop:
                left.append(Segment(cut, block.stop))
        yield part


def own_positions(first: int, rows: int, lanes: int, share: Share) -> Tensor:
    """Of the positions first .. first + rows − 1 of an epoch, those whose lane this process has, (n,) int64."""
    positions = torch.arange(first, first + rows)
    return positions[positions % lanes % share.processes == share.rank]


def batch_starts(rows: int, batch_size: int, first_batch: int) -> Iterator[tuple[int, int]]:
    """First position and number of rows of every batch from ``first_batch`` on."""
    for start in range(first_batch * batch_size, rows, batch_size):
        yield start, min(batch_size, rows - start)
