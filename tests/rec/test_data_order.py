"""Orders of an epoch: every row once, the same batches for any number of processes, shuffled as stated."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saml_rec.data import order
from saml_rec.data.order import Share, batch_starts, own_positions, windows


@pytest.fixture(scope="module")
def tiny():
    """Blocks of 4 rows, 8 lanes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK_ROWS", 4)
        patch.setattr(order, "LANES", 8)
        patch.setattr(order, "WINDOW_ROWS", 32)
        yield


def rows_in_order(rows, seed):
    """The row at every position of an epoch, from the definition."""
    sequence = []
    for lanes in windows(rows, torch.Generator().manual_seed(seed)):
        own = []
        for lane in lanes:
            inside = np.concatenate([np.arange(s.start, s.stop) for s in lane.segments] or [np.arange(0)])
            own.append(inside[lane.order().numpy()])
        sequence += [own[p % len(lanes)][p // len(lanes)] for p in range(sum(len(lane) for lane in own))]
    return sequence


@given(rows=st.integers(1, 300), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_every_row_once_in_windows_of_whole_blocks(tiny, rows, seed):
    sequence = rows_in_order(rows, seed)
    assert sorted(sequence) == list(range(rows))
    for start in range(0, rows, 32):
        window = sequence[start : start + 32]
        # The rows of a block share a window, and a full window has eight blocks, one in every lane.
        assert {row // 4 for row in window}.isdisjoint({row // 4 for row in set(sequence) - set(window)})
        if len(window) == 32:
            for lane in range(8):
                assert len({row // 4 for row in window[lane::8]}) == 1


def test_epochs_differ_and_seeds_repeat(tiny):
    assert rows_in_order(200, 1) == rows_in_order(200, 1)
    assert rows_in_order(200, 1) != rows_in_order(200, 2)


@given(st.integers(0, 100), st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_processes_share_every_batch(first, rows, processes):
    shares = [own_positions(first, rows, 64, Share(rank, processes)).tolist() for rank in range(processes)]
    assert sorted(chain.from_iterable(shares)) == list(range(first, first + rows))
    if 64 % processes == 0:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_from_any_one_on():
    whole = list(batch_starts(10, 4, 0))
    assert whole == [(0, 4), (4, 4), (8, 2)]
    for first in range(4):
        assert list(batch_starts(10, 4, first)) == whole[first:]
