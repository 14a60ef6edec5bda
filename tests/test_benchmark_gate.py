"""The gate before every figure: what passes it, what it stops, and rows at a kink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from gate import Gate, relative_errors

import workload
from contenders import EAGER_PEERS, LOW_PRECISION_PEERS, REFERENCE, Contender
from peers import PEERS
from workload import Cell

ROOT = Path(__file__).parents[1]
TINY = Cell(B=37, M=3, local_dim=5, global_dim=6, hidden_dims=(7, 4))


@pytest.mark.parametrize("contender", [*EAGER_PEERS, REFERENCE], ids=lambda contender: contender.name)
@pytest.mark.parametrize("cell", [TINY, Cell(3, 8, 4, 4, (5, 4))], ids=str)
def test_gate_passes_float32(cell: Cell, contender: Contender) -> None:
    verdict = Gate(workload.make(cell)).judge(contender, contender.function())
    assert verdict.failure is None
    # own and aux twice, two inputs, 2 · (weights and biases of branches and auxiliary network), gate and its bias
    assert len(verdict.errors) == 4 + 2 + 2 * 4 + 2
    assert set(verdict.bounds.values()) == {1e-5}


def test_gate_bounds_low_precision_by_the_plain_formulation() -> None:
    contender = LOW_PRECISION_PEERS[0]
    verdict = Gate(workload.make(Cell(512, 4, 32, 32, (32, 16)))).judge(contender, contender.function())
    assert verdict.failure is None
    assert 1e-3 < verdict.bounds["own"] < 2e-2


def test_gate_reports_the_distance_of_rounded_foreign_streams() -> None:
    contender = Contender("reference", foreign_dtype=torch.bfloat16)
    verdict = Gate(workload.make(TINY)).judge(contender, contender.function())
    assert verdict.failure is None
    assert verdict.distance is not None
    assert 1e-5 < verdict.distance < 1e-2


def _scaled(own: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    return own * 1.0001, aux


def _leaking(own: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    return own + 0.001 * (own - own.detach()), aux


@pytest.mark.parametrize("change", [_scaled, _leaking])
def test_gate_stops_wrong_outputs_and_wrong_gradients(change: Callable[..., Any]) -> None:
    def function(*arguments: Any) -> tuple[Tensor, Tensor]:
        return change(*PEERS["grouped"].function(*arguments))

    verdict = Gate(workload.make(TINY)).judge(Contender("grouped"), function)
    assert verdict.failure is not None
    assert verdict.failure.startswith("wrong: relative error of ")


def test_gate_records_why_a_contender_does_not_run() -> None:
    def function(*arguments: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("cannot compile\nlong trace")

    assert Gate(workload.make(TINY)).judge(Contender("grouped"), function).failure == "RuntimeError: cannot compile"


def test_chunks_of_the_reference_agree_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = workload.make(TINY)
    whole = workload.reference(problem)
    monkeypatch.setattr(workload, "REFERENCE_ROWS", 5)
    assert max(relative_errors(workload.reference(problem), whole).values()) < 1e-13


def test_no_row_lies_near_a_kink() -> None:
    cell = Cell(2000, 3, 16, 16, (32, 16))
    before = workload.relu_margin(workload.make(cell, avoid_kinks=False))
    after = workload.relu_margin(workload.make(cell))
    assert before.min() < workload.KINK_MARGIN <= after.min()
    # The margin is that of the inputs of the very relus whose gradient is taken.
    assert float(after.max()) < 1.0
