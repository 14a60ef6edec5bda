"""The study of planted twins: its variants, its tables, and that its page shows its results."""

import json
import statistics

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from rich.console import Console

import planted_twin as study
from saml_rec.models.registry import hyperparameters

QUICK = {"batch_size": 256, "weight_decay": 1.0}


def test_variants_are_forms_of_the_model_and_lack_what_they_say():
    known = hyperparameters("saml")
    for variant in study.VARIANTS.values():
        assert variant.options.keys() <= known.keys()
    assert study.VARIANTS[study.BASE].options == {}
    for name, other in study.WITHOUT.items():
        with_unit, without = ({**study.PAPER, **study.VARIANTS[each].options} for each in (name, other))
        assert without["mutual_layers"] == ()
        assert with_unit["mutual_layers"] != ()
        assert with_unit["branch_init"] == without["branch_init"]
        assert study.VARIANTS[name].length == study.VARIANTS[other].length


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two data sets at each of two shares, four variants, two epochs."""
    patch = pytest.MonkeyPatch()
    kept = {name: study.VARIANTS[name] for name in ("paper", "softmax_all", "none", "none_shared")}
    short = {name: study.Variant(v.label, v.options, v.model, {"epochs": 2, "patience": 3}) for name, v in kept.items()}
    patch.setattr(study, "VARIANTS", short)
    patch.setattr(study, "SHARES", (0.05, 0.1))
    found = study.study(2, 2400, QUICK, tmp_path_factory.mktemp("runs"))
    yield found
    patch.undo()


def test_every_data_set_has_its_twin(record):
    assert [(cell["seed"], cell["share"]) for cell in record["cells"]] == [(0, 0.05), (0, 0.1), (1, 0.05), (1, 0.1)]
    assert all(0 <= cell["twin"] < study.SCENARIOS - 1 for cell in record["cells"])
    for cell in record["cells"]:
        assert list(cell["results"]) == ["paper", "softmax_all", "none", "none_shared"]
        weights = cell["results"]["softmax_all"]["weights"]
        assert set(weights) == {"1", "2"}
        for row in weights.values():
            assert len(row) == study.SCENARIOS - 1
            assert sum(row) == pytest.approx(1, abs=2e-3)
        assert cell["results"]["none"]["weights"] == {}


def test_tables_are_of_paired_differences(record):
    cells = [cell["results"] for cell in record["cells"] if cell["share"] == 0.05]
    gains = [cell["softmax_all"]["small"] - cell["paper"]["small"] for cell in cells]
    assert study.paired(gains) in study.small_table(record)
    error = statistics.stdev(gains) / 2**0.5
    assert f"{statistics.mean(gains):+.4f} ± {error:.4f}" in study.small_table(record)
    whole = [
        statistics.mean(
            cell["results"]["softmax_all"]["small"] - cell["results"]["paper"]["small"]
            for cell in record["cells"]
            if cell["seed"] == seed
        )
        for seed in (0, 1)
    ]
    line = next(line for line in study.small_table(record).splitlines() if "the same, after" in line)
    assert line.endswith(f"| {study.paired(whole)} |")
    units = [cell["softmax_all"]["small"] - cell["none_shared"]["small"] for cell in cells]
    assert study.paired(units) in study.mutual_table(record)
    table = study.weight_table(record)
    on_twin = [
        cell["results"]["softmax_all"]["weights"]["2"][cell["twin"]] for cell in record["cells"] if cell["share"] == 0.1
    ]
    assert f"{statistics.mean(on_twin):.2f} ± " in next(line for line in table.splitlines() if "layer 2" in line)


@pytest.mark.parametrize(("values", "bold"), [([0.1, 0.11, 0.09], True), ([0.1, -0.11, 0.09], False)])
def test_two_standard_errors_are_bold(values, bold):
    assert study.paired(values).startswith("**") is bold


def test_a_finished_training_is_not_repeated(record, tmp_path):
    first = study.measure(0.1, 3, 1500, QUICK, tmp_path, Console(quiet=True))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.pt")}
    assert study.measure(0.1, 3, 1500, QUICK, tmp_path, Console(quiet=True)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.pt")} == stamps


def test_the_page_shows_the_results():
    page = study.PAGE.read_text(encoding="utf-8")
    for name in study.TABLES:
        assert f"<!-- table:{name} -->" in page
    assert page == study.render(page, json.loads(study.RESULTS.read_text(encoding="utf-8")))
    assert np.isfinite([cell["bayes"] for cell in json.loads(study.RESULTS.read_text())["cells"]]).all()
