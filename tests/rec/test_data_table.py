"""Batches hold every row once and pad to their own longest row."""

import dataclasses

import pytest
import torch

from saml_rec.data.table import EncodedTable, Ragged, joined

ROWS = [[5, 6, 7], [], [8], [9, 10], []]


def ragged(rows):
    lengths = torch.tensor([0] + [len(row) for row in rows])
    return Ragged(torch.tensor([value for row in rows for value in row], dtype=torch.int32), lengths.cumsum(0))


@pytest.fixture
def table():
    n = len(ROWS)
    return EncodedTable(
        scenario=torch.tensor([0, 2, 0, 2, 2]),
        label=torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]),
        dense=torch.arange(2.0 * n).view(n, 2),
        sparse={"item": torch.arange(n) + 20},
        ragged={"history": ragged(ROWS), "tags": ragged([[]] * n)},
        num_scenarios=4,
        weight=torch.tensor([0.5, 1.0, 0.0, 2.0, 3.0]),
        group=torch.tensor([7, 7, -1, 7, -1]),
    )


def test_a_batch(table):
    batch = table.batch(torch.tensor([3, 0, 1]))
    assert batch["scenario"].tolist() == [2, 0, 2]
    assert batch["label"].tolist() == [1.0, 0.0, 1.0]
    assert batch["weight"].tolist() == [2.0, 0.5, 1.0]
    assert "group" not in batch
    assert batch["dense"].tolist() == [[6.0, 7.0], [0.0, 1.0], [2.0, 3.0]]
    assert batch["features"]["item"].tolist() == [23, 20, 21]
    assert batch["features"]["history"].tolist() == [[9, 10, 0], [5, 6, 7], [0, 0, 0]]
    assert batch["features"]["tags"].tolist() == [[0], [0], [0]]
    assert all(ids.dtype == torch.int64 for ids in batch["features"].values())


@pytest.mark.parametrize(("indices", "width"), [([2], 1), ([1, 4], 1), ([3, 2], 2), ([0, 0], 3), ([], 1)])
def test_the_longest_row_of_the_batch_is_its_width(table, indices, width):
    history = table.batch(torch.tensor(indices, dtype=torch.int64))["features"]["history"]
    assert history.shape == (len(indices), width)
    assert [[value for value in row if value] for row in history.tolist()] == [ROWS[index] for index in indices]


def test_without_generator_the_rows_come_in_order(table):
    batches = list(table.batches(2))
    assert [batch["features"]["item"].tolist() for batch in batches] == [[20, 21], [22, 23], [24]]


def test_a_generator_shuffles_and_decides_the_order(table):
    def items(seed):
        generator = torch.Generator().manual_seed(seed)
        return [batch["features"]["item"].tolist() for batch in table.batches(2, generator=generator)]

    assert items(1) == items(1)
    assert len({str(items(seed)) for seed in range(10)}) > 1
    assert sorted(item for batch in items(1) for item in batch) == [20, 21, 22, 23, 24]
    generator = torch.Generator().manual_seed(0)
    epochs = {str([batch["scenario"].tolist() for batch in table.batches(1, generator=generator)]) for _ in range(10)}
    assert len(epochs) > 1


def test_counts_without_labels_and_bad_size(table):
    assert len(table) == 5
    assert table.scenario_counts().tolist() == [2, 0, 3, 0]
    unlabelled = EncodedTable(table.scenario, None, table.dense, table.sparse, table.ragged, 4)
    assert not {"label", "weight"} & unlabelled.batch(torch.tensor([0])).keys()
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        table.batches(0)


def test_parts_and_fingerprints_have_weights_and_groups(table):
    whole = joined([table.part(0, 2), table.part(2, 5)])
    assert whole.fingerprint() == table.fingerprint()
    assert table.taken(torch.tensor([4, 0])).group.tolist() == [-1, 7]
    assert table.taken(torch.tensor([4, 0])).weight.tolist() == [3.0, 0.5]
    changed = [{"weight": table.weight + 1}, {"group": table.group.flip(0)}, {"weight": None}, {"group": None}]
    prints = [table.fingerprint(), *(dataclasses.replace(table, **change).fingerprint() for change in changed)]
    assert len(set(prints)) == len(prints)
