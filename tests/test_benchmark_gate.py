"""The gate before every figure: what passes it, what it stops, and rows at a kink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contenders import EAGER_PEERS, LOW_PRECISION_PEERS, REFERENCE, Contender, of_problem
from peers import PEERS
from saml_kernels.testing import accuracy
from saml_kernels.testing.accuracy import (
    KINK_MARGIN,
    AccuracyGate,
    Verdict,
    kink_margin,
    reference_results,
    relative_errors,
    without_kinks,
)
from saml_kernels.testing.problem import Problem, make
from workload import Cell

TINY = Cell(B=37, M=3, local_dim=5, global_dim=6, hidden_dims=(7, 4))


def judge(problem: Problem, contender: Contender) -> Verdict:
    plain = Contender("all_towers").function()
    return AccuracyGate(problem, plain).judge(contender.function(), contender.dtype, contender.foreign_dtype)


@pytest.mark.parametrize("contender", [*EAGER_PEERS, REFERENCE], ids=lambda contender: contender.name)
@pytest.mark.parametrize("cell", [TINY, Cell(3, 8, 4, 4, (5, 4))], ids=str)
def test_gate_passes_float32(cell: Cell, contender: Contender) -> None:
    verdict = judge(without_kinks(make(cell.case())), contender)
    assert verdict.failure is None
    # own and aux twice, two inputs, 2 · (weights and biases of branches and auxiliary network), gate and its bias
    assert len(verdict.errors) == 4 + 2 + 2 * 4 + 2
    assert set(verdict.bounds.values()) == {1e-5}


def test_gate_bounds_low_precision_by_the_plain_formulation() -> None:
    verdict = judge(make(Cell(512, 4, 32, 32, (32, 16)).case()), LOW_PRECISION_PEERS[0])
    assert verdict.failure is None
    assert 1e-3 < verdict.bounds["own"] < 2e-2


def test_gate_reports_the_distance_of_rounded_foreign_streams() -> None:
    contender = Contender("reference", foreign_dtype=torch.bfloat16)
    verdict = judge(without_kinks(make(TINY.case()), [torch.bfloat16]), contender)
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

    verdict = AccuracyGate(make(TINY.case())).judge(of_problem(function), torch.float32)
    assert verdict.failure is not None
    assert verdict.failure.startswith("wrong: relative error of ")


def test_gate_records_why_a_contender_does_not_run() -> None:
    def function(problem: Problem) -> tuple[Tensor, Tensor]:
        raise RuntimeError("cannot compile\nlong trace")

    assert AccuracyGate(make(TINY.case())).judge(function, torch.float32).failure == "RuntimeError: cannot compile"


def test_chunks_of_the_reference_agree_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(TINY.case())
    whole = reference_results(problem)
    monkeypatch.setattr(accuracy, "REFERENCE_ROWS", 5)
    assert max(relative_errors(reference_results(problem), whole).values()) < 1e-13


def test_no_gradient_passes_a_row_near_a_kink() -> None:
    problem = make(Cell(2000, 3, 16, 16, (32, 16)).case())
    margin = kink_margin(problem)
    near = margin < KINK_MARGIN
    assert 0 < near.sum() < 200
    # The margin is that of the inputs of the very relus whose gradient is taken.
    assert float(margin.max()) < 1.0
    for before, after in zip(problem.cotangents, without_kinks(problem).cotangents, strict=True):
        assert not after[near].any()
        assert torch.equal(after[~near], before[~near])
