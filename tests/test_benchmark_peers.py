"""What is timed: the peers compute the trunk, its operations counted by hand, the products beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import contenders
import workload
from contenders import Contender, of_problem
from peers import PEERS
from peers.permutation import _TakeRows
from saml_kernels.testing.accuracy import AccuracyGate, reference_results, relative_errors, without_kinks
from saml_kernels.testing.problem import make
from workload import Cell

TINY = Cell(B=37, M=3, local_dim=5, global_dim=6, hidden_dims=(7, 4))


# The peer whose products are oneDNN's has no float64.
FLOAT64_PEERS = [name for name in PEERS if name not in ("grouped_onednn", "grouped_mm")]


@pytest.mark.parametrize("name", FLOAT64_PEERS)
@pytest.mark.parametrize(
    "cell",
    [
        TINY,
        Cell(64, 5, 8, 3, (6,)),
        Cell(40, 4, 6, 6, (8, 5, 3), "zipf"),
        Cell(1, 2, 8, 8, (8,)),
        Cell(3, 8, 4, 4, (5, 4)),  # scenarios without a row
    ],
    ids=str,
)
def test_peers_compute_the_reference_in_float64(name: str, cell: Cell) -> None:
    problem = make(cell.case())
    results = problem.leaves().results(of_problem(PEERS[name].function))
    errors = relative_errors(results, reference_results(problem))
    assert max(errors.values()) < 1e-12, errors


# torch._grouped_mm has no float64, and widths are multiples of 16 bytes. The second cell has scenarios without a row.
@pytest.mark.parametrize(
    "cell", [Cell(37, 3, 8, 4, (12, 4)), Cell(3, 8, 4, 4, (8, 4)), Cell(40, 4, 4, 8, (8, 12, 4), "zipf")], ids=str
)
def test_grouped_mm_computes_the_reference(cell: Cell) -> None:
    problem = without_kinks(make(cell.case()))
    verdict = AccuracyGate(problem).judge(Contender("grouped_mm").function(), torch.float32)
    assert verdict.failure is None


def test_rows_taken_both_ways_have_the_gradient_of_indexing() -> None:
    x, permutation = torch.randn(9, 4, requires_grad=True), torch.randperm(9)
    weights = torch.randn(9, 4)
    taken = _TakeRows.apply(x, permutation, permutation.argsort())
    assert torch.equal(taken, x[permutation])
    ((gradient,), (expected,)) = (torch.autograd.grad((y * weights).sum(), x) for y in (taken, x[permutation]))
    assert torch.equal(gradient, expected)


def test_operations_of_a_trunk_counted_by_hand() -> None:
    # One row, M = 2, D_l = 3, D_g = 5, widths (4, 2).
    auxiliary = 2 * 5 * 4 + 2 * 4 * 2
    layer_one = 2 * (2 * (3 + 4) * 4)
    gate = 2 * 4 * 4
    scores = 2 * 4 + 2 * (2 * 4) + 2 * 4  # one c_tj, two norms, one term of the mix
    tail = 2 * (4 + 2) * 2
    own_products = auxiliary + layer_one // 2 + gate + tail
    operations = workload.operations(Cell(1, 2, 3, 5, (4, 2)))
    assert operations.layer_one == layer_one
    assert operations.forward == auxiliary + layer_one + gate + scores + tail
    assert operations.backward == 2 * own_products + 2 * 4 + 2 * 4  # p_j; dc_j V_j
    assert operations.step == operations.forward + operations.backward
    assert workload.operations(Cell(7, 2, 3, 5, (4, 2))).step == 7 * operations.step


def test_products_have_the_size_of_layer_one() -> None:
    for product in contenders.products({torch.float32, torch.bfloat16}):
        result = product.call(TINY)()
        assert isinstance(result, Tensor)
        assert result.shape == (TINY.B, TINY.M * 7)
        assert result.dtype == product.dtype


@pytest.mark.parametrize("arguments", [{"M": 1}, {"B": 0}, {"distribution": "normal"}])
def test_cells_refuse_what_is_not_timed(arguments: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"B": 4, "M": 2, "local_dim": 2, "global_dim": 2, "hidden_dims": (2,)}
    with pytest.raises(ValueError, match=r"^(a cell needs|distribution must be)"):
        Cell(**fields | arguments)
