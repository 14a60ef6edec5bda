"""The study of foreign branches in fewer bits: what it keeps, its table, and that the page shows its results."""

import json

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import accuracy
import foreign_types
from saml_rec.data import write_synthetic
from saml_rec.training import TrainOptions


@pytest.fixture(scope="module")
def record():
    """Two seeds of one epoch."""
    patch = pytest.MonkeyPatch()
    tiny = accuracy.DataSet("tiny", lambda out: write_synthetic(out, rows=1500))
    patch.setattr(foreign_types, "DATA_SETS", {"tiny": tiny})
    patch.setattr(foreign_types, "NAMES", ("tiny",))
    patch.setattr(foreign_types, "TrainOptions", lambda **given: TrainOptions(epochs=1, **given))
    found = foreign_types.measure(2)
    patch.undo()
    return json.loads(json.dumps(found))


def test_a_type_moves_logits_as_far_as_it_rounds(record):
    rows = {(row["foreign_type"], row["seed"]): row for row in record["runs"]}
    assert len(rows) == len(record["runs"]) == 6
    for seed in range(2):
        full, half, eight = (rows[name, seed] for name in ("full", "bfloat16", "int8"))
        assert full["distance_initial"] == full["distance_trained"] == 0
        assert full["auc_served"] == full["auc_trained"]
        for rounded in (half, eight):
            assert 0 < rounded["distance_initial"] < 0.05
            assert 0 < rounded["distance_trained"] < 0.05
    # Of so few rows not every rounding changes the order.
    moved = [rows[name, seed]["auc_served"] != rows["full", seed]["auc_served"] for name, seed in rows]
    assert any(moved)
    assert rows["full", 0]["auc_trained"] != rows["full", 1]["auc_trained"]


def test_the_table_has_the_differences_of_equal_seeds():
    aucs = {("full", 0): 0.6, ("full", 1): 0.7, ("bfloat16", 0): 0.61, ("bfloat16", 1): 0.71}
    aucs |= {("int8", 0): 0.59, ("int8", 1): 0.71}
    runs = [
        {"data": "tiny", "foreign_type": name, "seed": seed, "auc_served": auc, "auc_trained": 0.6}
        | {"distance_initial": 0.001, "distance_trained": 0.002}
        for (name, seed), auc in aucs.items()
    ]
    lines = foreign_types.table({"seeds": 2, "runs": runs}).splitlines()
    assert lines[2] == "| tiny | `bfloat16` | 1.0e-03 | 2.0e-03 | 0.6000 | +0.01000 ± 0.00000 | +0.00000 ± 0.00000 |"
    assert lines[3] == "| tiny | `int8` | 1.0e-03 | 2.0e-03 | 0.6000 | +0.00000 ± 0.01000 | +0.00000 ± 0.00000 |"


def test_the_page_shows_the_results():
    record = json.loads(foreign_types.RESULT.read_text(encoding="utf-8"))
    page = foreign_types.PAGE.read_text(encoding="utf-8")
    assert f"<!-- {foreign_types.PLACE} -->\n{foreign_types.table(record)}\n<!-- end -->" in page
    assert record["seeds"] >= 5
