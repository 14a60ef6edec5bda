"""The study of weight decay: its page shows the committed result, and the default is one that it supports."""

import json

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from torch import nn

import weight_decay
from saml_rec.models.tables import make_table
from saml_rec.training import TrainOptions
from saml_rec.training.decay import WITHOUT_DECAY, without_decay


@pytest.fixture(scope="module")
def record():
    return json.loads(weight_decay.RESULT.read_text(encoding="utf-8"))


def test_the_page_has_the_committed_result(record):
    text = weight_decay.PAGE.read_text(encoding="utf-8")
    assert weight_decay.table(record) in text
    assert weight_decay.page.fill(text, {"decay": weight_decay.table(record) + "\n"}) == text


NOISY = ("ml-100k", "synthetic")


def test_the_default_is_better_than_none_for_every_model(record):
    options = TrainOptions()
    assert (options.epochs, options.patience) == (record["epochs"], record["patience"])
    found = {}
    for row in record["runs"]:
        if row["decayed"] == weight_decay.EVERYTHING and row["data"] in NOISY:
            found[row["data"], row["model"], row["weight_decay"]] = row["valid_logloss"]["mean"]
    pairs = {(data, model) for data, model, _ in found}
    assert len(pairs) == 2 * len(weight_decay.MODELS)
    for data, model in pairs:
        assert found[data, model, options.weight_decay] < found[data, model, 0.0], (data, model)


def test_no_baseline_was_cut_off(record):
    runs = [row for row in record["runs"] if row["data"] in NOISY]
    assert all(row["stopped_by"] == ["patience"] * record["seeds"] for row in runs)
    assert max(max(row["best_epochs"]) for row in runs) > 10


def test_tables_are_decayed_or_not():
    model = nn.ModuleDict({"table": make_table(9, 2), "network": nn.Linear(2, 1)})
    before = dict(WITHOUT_DECAY)
    with weight_decay.decaying(weight_decay.NETWORK):
        assert without_decay(model) == ["table.weight", "network.bias"]
    with weight_decay.decaying(weight_decay.EVERYTHING):
        assert without_decay(model) == ["network.bias"]
    assert before == WITHOUT_DECAY
