"""Rows of embedding tables: values and gradients are those of F.embedding with row 0 as padding."""

from itertools import chain

import pytest
import torch
import torch.nn.functional as F

from saml_rec.data.schema import Schema
from saml_rec.models.features import ScenarioAwareFeatures
from saml_rec.models.tables import (
    ROWS_PER_VALUE,
    DenseTable,
    SparseTable,
    TableOptions,
    _Rows,
    look_up_all,
    rows_of,
    table_options,
)


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


def test_a_gradient_that_is_a_part_of_wider_rows():
    """As that of a concatenation."""
    table, wide = torch.randn(30, 4, requires_grad=True), torch.randn(40, 11)
    ids = ids_of(40)
    for look_up in (rows_of, lambda table, ids: F.embedding(ids, table, padding_idx=0)):
        look_up(table, ids).backward(wide[:, 3:7])
    (ours,) = torch.autograd.grad(rows_of(table, ids), table, wide[:, 3:7])
    assert torch.equal(table.grad, 2 * ours)


def test_first_and_second_derivatives():
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 2], [4, 3, 1]])
    assert torch.autograd.gradcheck(lambda table: rows_of(table, ids), table)
    assert torch.autograd.gradgradcheck(lambda table: rows_of(table, ids).sin(), table)


def test_an_id_that_is_no_row():
    with pytest.raises(IndexError):
        rows_of(torch.zeros(5, 3), torch.tensor([5]))


def features_and_batch():
    """A table that three features read, and another."""
    kinds = {
        "item": {"kind": "sparse", "scenario_aware": True, "dim": 4},
        "tags": {"kind": "multi", "dim": 3},
        "past": {"kind": "sequence", "item": "item"},
        "seen": {"kind": "sequence", "item": "item", "heads": 1},
    }
    features = ScenarioAwareFeatures(
        Schema.from_dict({"label": "y", "scenario": "s", "features": kinds}), 3, {"item": 9, "tags": 5}
    )
    batch = {
        "scenario": torch.tensor([0, 2]),
        "dense": torch.empty(2, 0),
        "features": {
            "item": torch.tensor([3, 0]),
            "tags": ids_of(2, 3, rows=5),
            "past": ids_of(2, 5, rows=9),
            "seen": ids_of(2, 2, rows=9),
        },
    }
    return features, batch


def test_every_table_is_read_once(monkeypatch):
    """Each read has a gradient as large as the table, so target and sequences share one, global and local too."""
    calls = []
    look_up = SparseTable.look_up

    def counted(table, rows):
        calls.append(tuple(table.rows.shape))
        return look_up(table, rows)

    monkeypatch.setattr(SparseTable, "look_up", counted)
    with table_options(TableOptions("sparse")):
        features, batch = features_and_batch()
    features(batch)
    assert calls == [(4 * 9, 4), (5, 3)]


def test_dense_tables_are_read_in_one_function():
    features, batch = features_and_batch()
    nodes, seen, reads = [x.grad_fn for x in features(batch)], set(), 0
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reads += node.name() == "_RowsBackward"
            nodes += [following for following, _ in node.next_functions]
    assert reads == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_tables_together_are_as_each_by_itself(dtype):
    tables = [
        DenseTable(rows, dim, TableOptions()).to(dtype) for rows, dim in ((30, 4), (9, 3), (200 * ROWS_PER_VALUE, 2))
    ]
    for table in tables:
        torch.nn.init.normal_(table.weight)
    parts = [[ids_of(20), ids_of(2, 20, 3)], [ids_of(7, rows=9)], [ids_of(40, rows=300), ids_of(5, 2, rows=300)]]
    tables[1].weight.requires_grad_(False)
    together = list(chain.from_iterable(look_up_all(list(zip(tables, parts, strict=True)))))
    alone = [table.look_up(rows) for table, each in zip(tables, parts, strict=True) for rows in each]
    trained = [tables[0].weight, tables[2].weight]
    cotangents = [torch.randn_like(each) for each in alone]
    gradients = []
    for found in (together, alone):
        live = [(f, c) for f, c in zip(found, cotangents, strict=True) if f.requires_grad]
        gradients.append(torch.autograd.grad([f for f, _ in live], trained, [c for _, c in live]))
    for ours, expected in zip([*together, *gradients[0]], [*alone, *gradients[1]], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_derivatives_of_several_tables():
    tables = [torch.randn(rows, 2, dtype=torch.float64, requires_grad=True) for rows in (5, 4)]
    rows = [torch.tensor([[1, 2, 2], [4, 3, 1]]), torch.tensor([3, 1]), torch.tensor([1, 3, 3])]

    def found(*tables):
        return tuple(each.sin() for each in _Rows.apply((2, 1), *tables, *rows))

    assert torch.autograd.gradcheck(found, tables)
    assert torch.autograd.gradgradcheck(found, tables)
