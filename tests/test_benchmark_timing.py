"""The timing protocol, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memory
from contenders import CPP_LOW_PRECISION, Contender
from saml_kernels.testing import timing
from saml_kernels.testing.problem import Problem
from workload import Cell

TINY = Cell(B=37, M=3, local_dim=5, global_dim=6, hidden_dims=(7, 4))


def test_every_contender_takes_every_place() -> None:
    names = ["a", "b", "c", "d"]
    orders = [timing.order(names, index) for index in range(8)]
    for place in range(4):
        assert {order[place] for order in orders} == set(names)
    assert orders[:3] == [["a", "b", "c", "d"], ["d", "c", "b", "a"], ["b", "c", "d", "a"]]


def test_rounds_respect_bounds_and_budget() -> None:
    calls = {"short": lambda: None, "longer": lambda: sum(range(1000))}
    few = timing.interleave(calls, timing.Protocol(budget=1e-9, min_rounds=3, max_rounds=9, min_sample=1e-5))
    many = timing.interleave(calls, timing.Protocol(budget=60, min_rounds=3, max_rounds=9, min_sample=1e-5))
    assert {name: len(seconds) for name, seconds in few.items()} == {"short": 3, "longer": 3}
    assert {len(seconds) for seconds in many.values()} == {9}
    assert all(value > 0 for seconds in many.values() for value in seconds)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_processor_time_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Busy, own, all: 8 of 20 seconds busy, 5 of them ours.
    readings = iter([(100.0, 1.0, 1000.0), (108.0, 6.0, 1020.0)])
    monkeypatch.setattr(timing, "_processor_seconds", lambda: next(readings))
    with timing.Others() as others:
        pass
    assert others.share == pytest.approx(3 / 20)
    monkeypatch.undo()
    busy, own, total = timing._processor_seconds() or (0.0, 0.0, 0.0)
    assert 0 < own < busy < total


def test_ratios_are_formed_round_by_round() -> None:
    # The second round was disturbed for both: the ratio of medians would be 5.
    ratio = timing.ratio([2.0, 20.0, 10.0], [1.0, 10.0, 2.0])
    assert ratio.median == 2.0
    assert ratio.p20 == 2.0
    assert ratio.p80 == pytest.approx(3.8)
    assert ratio.rounds == 3


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_memory_counts_what_a_step_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    mebibytes = 64

    def step(*_: Any) -> Callable[[], object]:
        return lambda: torch.ones(mebibytes * 2**20, dtype=torch.int8).numel()

    monkeypatch.setattr(memory.Contender, "function", lambda self: None)
    monkeypatch.setattr(Problem, "call", step)
    threads = torch.get_num_threads()
    measured = memory.measure(Contender("grouped"), TINY, 0, threads)
    assert measured == pytest.approx(mebibytes * 2**20, rel=0.1)


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_memory_of_a_process_of_its_own() -> None:
    cell = Cell(512, 4, 32, 32, (64, 32))
    streams = cell.B * cell.M * 64 * 4
    found = memory.peak(Contender("grouped"), cell, seed=0)
    assert streams < found["peak_bytes"] < 100 * streams
    low = memory.peak(CPP_LOW_PRECISION, TINY, seed=3)
    assert low["peak_bytes"] > 0
    assert memory.peak(Contender("nobody"), TINY, seed=0)["peak_failure"].startswith("ValueError: ")
