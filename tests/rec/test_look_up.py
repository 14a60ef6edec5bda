"""Rows of embedding tables: values and gradients are those of F.embedding with row 0 as padding."""

import pytest
import torch
import torch.nn.functional as F

from saml_rec.data.schema import Schema
from saml_rec.models.features import ScenarioAwareFeatures
from saml_rec.models.tables import ROWS_PER_VALUE, DenseTable, rows_of


def ids_of(*shape, rows=30):
    """Ids with repeats; some are 0."""
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(500,), (50, 20), (50, 3, 2), (0,), (4, 0)], ids=str)
def test_as_embedding_to_the_bit(dtype, shape):
    torch.manual_seed(1)
    table, other = (torch.randn(30, 5, dtype=dtype).requires_grad_() for _ in range(2))
    other.data.copy_(table.data)
    ids = ids_of(*shape)
    rows, expected = rows_of(table, ids), F.embedding(ids, other, padding_idx=0)
    assert torch.equal(rows, expected)
    cotangent = torch.randn_like(rows)
    rows.backward(cotangent)
    expected.backward(cotangent)
    assert torch.equal(table.grad, other.grad)


@pytest.mark.parametrize("rows", [30, 40 * ROWS_PER_VALUE + 1], ids=["grouped", "added one by one"])
@pytest.mark.parametrize("ids", [ids_of(40), torch.zeros(40, dtype=torch.int64), 29 * torch.ones(40).long()])
def test_both_ways_of_adding_in_float32(rows, ids):
    table = torch.randn(rows, 4, requires_grad=True)
    cotangent = torch.randn(40, 4, requires_grad=True)
    found = []
    for look_up in (rows_of, lambda table, ids: F.embedding(ids, table, padding_idx=0)):
        (gradient,) = torch.autograd.grad(look_up(table, ids), table, cotangent, create_graph=True)
        found.append((gradient, *torch.autograd.grad(gradient.square().sum(), cotangent)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def test_a_gradient_that_is_not_contiguous():
    table = torch.randn(30, 4, requires_grad=True)
    ids = ids_of(6, 7)
    cotangent = torch.randn(4, 7, 6)
    (rows_of(table, ids) * cotangent.permute(2, 1, 0)).sum().backward()
    (expected,) = torch.autograd.grad(
        (F.embedding(ids, table, padding_idx=0) * cotangent.permute(2, 1, 0)).sum(), table
    )
    assert torch.equal(table.grad, expected)


def test_first_and_second_derivatives():
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 2], [4, 3, 1]])
    assert torch.autograd.gradcheck(lambda table: rows_of(table, ids), table)
    assert torch.autograd.gradgradcheck(lambda table: rows_of(table, ids).sin(), table)


def test_an_id_that_is_no_row():
    with pytest.raises(IndexError):
        rows_of(torch.zeros(5, 3), torch.tensor([5]))


def test_every_table_is_read_once(monkeypatch):
    """Each read has a gradient as large as the table, so target and sequences share one, global and local too."""
    calls = []

    look_up = DenseTable.look_up

    def counted(table, rows):
        calls.append(tuple(table.rows.shape))
        return look_up(table, rows)

    monkeypatch.setattr(DenseTable, "look_up", counted)
    kinds = {
        "item": {"kind": "sparse", "scenario_aware": True, "dim": 4},
        "past": {"kind": "sequence", "item": "item"},
        "seen": {"kind": "sequence", "item": "item", "heads": 1},
    }
    features = ScenarioAwareFeatures(
        Schema.from_dict({"label": "y", "scenario": "s", "features": kinds}), 3, {"item": 9}
    )
    batch = {
        "scenario": torch.tensor([0, 2]),
        "dense": torch.empty(2, 0),
        "features": {"item": torch.tensor([3, 0]), "past": ids_of(2, 5, rows=9), "seen": ids_of(2, 2, rows=9)},
    }
    features(batch)
    assert calls == [(4 * 9, 4)]
