"""The benchmark of all models on four data sets: what it keeps, its table, and that the page shows its results."""

import json

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from rich.console import Console

import accuracy
from saml_rec.data import write_synthetic
from saml_rec.models.registry import hyperparameters, installed_models
from saml_rec.training import TrainOptions


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Four models, two seeds, one epoch."""
    patch = pytest.MonkeyPatch()
    tiny = accuracy.DataSet("tiny", lambda out: write_synthetic(out, rows=1500))
    patch.setitem(accuracy.DATA_SETS, "tiny", tiny)
    patch.setattr(accuracy, "installed_models", lambda: ["saml", "mlp", "logistic_regression", "lightgbm"])
    patch.setattr(accuracy, "TrainOptions", lambda: TrainOptions(epochs=1))
    found = accuracy.measure("tiny", 2, tmp_path_factory.mktemp("runs"), Console(quiet=True))
    patch.undo()
    return json.loads(json.dumps(found))


def test_both_comparisons_differ_in_tables_alone(record):
    default, local = (record["comparisons"][tables]["models"] for tables in ("default", "local"))
    assert list(default) == ["saml", "mlp", "logistic_regression", "lightgbm"]
    assert list(local) == ["saml", "mlp", "logistic_regression"]
    assert [model["changes"] for model in default.values()] == [{}] * 4
    assert [model["changes"] for model in local.values()] == [{}, {"local_features": True}, {"local_features": True}]
    assert local["saml"]["overall"] == default["saml"]["overall"]
    assert local["mlp"]["parameters"] > default["mlp"]["parameters"]
    assert record["rows"]["train"]["rows"] == 1200


def test_the_table_is_ranked_and_says_how_models_stand_to_the_best_network(record):
    lines = accuracy.models_table(record).splitlines()[2:]
    models = record["comparisons"]["default"]["models"]
    ranked = sorted(models, key=lambda name: -models[name]["overall"]["auc"]["mean"])
    assert [line.split("|")[1].strip(" `") for line in lines] == ranked
    verdict = record["comparisons"]["default"]["verdicts"]["auc"]
    for name, line in zip(ranked, lines, strict=True):
        *_, parameters, told, _ = (cell.strip() for cell in line.split("|"))
        assert parameters == f"{models[name]['parameters']:,}"
        if name == verdict["best"]:
            assert told == "the best network"
        elif name in verdict["fitted"]:
            assert told == verdict["fitted"][name]
        else:
            assert told == ("level" if name in verdict["level"] else "worse")
    summary = models["mlp"]["overall"]["auc"]
    assert any(f"{summary['mean']:.4f} ± {summary['deviation']:.4f}" in line for line in lines)


def test_differences_from_the_best_network_and_from_saml_are_kept(record):
    for tables, comparison in record["comparisons"].items():
        count = len(comparison["models"])
        for metric in accuracy.SHOWN:
            best = comparison["verdicts"][metric]["best"]
            kept = [entry for entry in comparison["differences"] if entry["measure"] == metric]
            assert all({entry["first"], entry["second"]} & {"saml", best} for entry in kept), tables
            assert len(kept) == (count - 1 if best == "saml" else 2 * count - 3)
    assert record["seeds"] == 2
    assert record["command"]
    assert len(json.dumps(record)) < 40_000


@pytest.mark.parametrize("name", accuracy.DATA_SETS)
def test_the_page_shows_the_results(name):
    record = json.loads(accuracy.results_of(name).read_text(encoding="utf-8"))
    page = accuracy.PAGE.read_text(encoding="utf-8")
    assert page == accuracy.render(page)
    assert (
        f"<!-- accuracy:{name} -->\n{accuracy.models_table(record)}\n\n{accuracy.facts(record)}\n<!-- end -->" in page
    )
    assert record["seeds"] >= 5
    assert set(record["comparisons"]["default"]["models"]) == set(installed_models())
    assert all(model["changes"] == {} for model in record["comparisons"]["default"]["models"].values())
    wanted = {model for model in installed_models() if "local_features" in hyperparameters(model)}
    assert set(record["comparisons"]["local"]["models"]) == wanted
