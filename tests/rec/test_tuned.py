"""The benchmark of tuned models: what it keeps, its table, and that the page shows its results."""

import json

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")
pytest.importorskip("optuna", reason="the extra saml-kernels[tune] is not installed")

from rich.console import Console

import accuracy
import tuned
from saml_rec.data import write_synthetic
from saml_rec.training import TrainOptions


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two models, three trials, two seeds, one epoch."""
    patch = pytest.MonkeyPatch()
    tiny = accuracy.DataSet("tiny", lambda out: write_synthetic(out, rows=1500))
    patch.setitem(accuracy.DATA_SETS, "tiny", tiny)
    patch.setattr(tuned, "MODELS", ("shared_bottom", "mlp"))
    patch.setattr(tuned, "TrainOptions", lambda: TrainOptions(epochs=1))
    found = tuned.measure("tiny", 3, 2, tmp_path_factory.mktemp("runs"), Console(quiet=True))
    patch.undo()
    return json.loads(json.dumps(found))


def test_the_best_trials_options_are_those_compared(record):
    for model, entry in record["search"].items():
        assert entry["best_valid_logloss"] <= entry["default_valid_logloss"]
        changes = record["tuned"]["models"][model]["changes"]
        assert changes == {name: value for name, value in entry["best"].items() if name in changes}
        assert changes or entry["best_valid_logloss"] == entry["default_valid_logloss"]


def test_the_table_has_both_scores_of_every_model(record):
    lines = tuned.table(record).splitlines()[2:]
    for line, model in zip(lines, ("shared_bottom", "mlp"), strict=True):
        for part in ("defaults", "tuned"):
            assert accuracy.mean_and_spread(record[part]["models"][model]["overall"]["auc"]) in line
        assert line.startswith(f"| `{model}` |")
    assert "0.1234 ± 0.0010" in tuned.table(with_auc(record, "defaults", "mlp", 0.12341, 0.001))


def with_auc(record, part, model, mean, deviation):
    """The record with another score."""
    changed = json.loads(json.dumps(record))
    changed[part]["models"][model]["overall"]["auc"] |= {"mean": mean, "deviation": deviation}
    return changed


@pytest.mark.parametrize("name", tuned.SEARCHED)
def test_the_page_shows_the_results(name):
    record = json.loads(tuned.results_of(name).read_text(encoding="utf-8"))
    page = accuracy.PAGE.read_text(encoding="utf-8")
    assert f"<!-- tuned:{name} -->\n{tuned.table(record)}\n\n{tuned.facts(record)}\n<!-- end -->" in page
    assert set(record["search"]) == set(tuned.MODELS)
    assert record["seeds"] >= 5
