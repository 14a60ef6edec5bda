"""The study on planted relations: its measures, its variants, and that its page shows its results."""

import json
import statistics
import tomllib

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import synthetic_study as study
from saml_rec import Schema
from saml_rec.data import prepare, write_synthetic
from saml_rec.datasets.synthetic import SCHEMA
from saml_rec.models.construction import build_model, parameter_count, resolve_model_options


def test_a_ranking_that_agrees_and_one_that_is_reversed():
    target = np.random.default_rng(0).random((5, 5))
    assert study.ranking(target**3, target) == pytest.approx({"spearman": 1, "ndcg": 1, "top_1": 1})
    reversed_ = study.ranking(-target, target)
    assert reversed_["spearman"] == pytest.approx(-1)
    assert reversed_["top_1"] == 0
    assert reversed_["ndcg"] < 0.95


def test_the_own_entry_does_not_count():
    target = np.random.default_rng(1).random((4, 4))
    assert study.ranking(target + 9 * np.eye(4), target)["spearman"] == pytest.approx(1)


def test_random_weights_rank_by_chance():
    found = study.random_ranking(np.random.default_rng(2).random((6, 6)), seed=0)
    assert found["spearman"] == pytest.approx(0, abs=0.06)
    assert found["top_1"] == pytest.approx(0.2, abs=0.04)


def test_closeness_is_the_cosine_of_relations():
    found = study.closeness(np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1.0]]))
    np.testing.assert_allclose(found, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-12)


def test_wider_tables_have_as_many_numbers_as_scenario_aware_ones(tmp_path):
    paths = write_synthetic(tmp_path, scenarios=study.SCENARIOS, rows=1200)
    sizes = {}
    for tables in ("aware", "wide", "global"):
        schema = Schema.from_dict(tomllib.loads(study.schema_text(SCHEMA, tables)))
        encoder = prepare(paths[0], schema, seed=0).encoder
        model = build_model("saml", resolve_model_options("saml", {}), schema, encoder)
        sizes[tables] = parameter_count(model.features.embeddings)
    assert sizes["aware"] == sizes["wide"] > 3 * sizes["global"]


def test_one_training_of_the_study(tmp_path, monkeypatch):
    kept = {name: study.CANDIDATES[name] for name in ("saml", "shared_bottom", "no_stop_gradient", "no_mutual")}
    monkeypatch.setattr(study, "CANDIDATES", kept)
    cells = [study.measure_share(0.02, seed, 4000, 1e-5, tmp_path, study.Console(quiet=True)) for seed in (0, 1)]
    assert cells[0]["planted"]["relation"] != cells[1]["planted"]["relation"]
    results = cells[0]["results"]
    assert list(results) == list(kept)
    assert results["no_mutual"]["weights"] is None
    assert results["saml"]["ranking"] == study.ranking(
        np.array(results["saml"]["weights"]), np.array(cells[0]["planted"]["closeness"])
    )
    record = {"cells": cells, "variants": {name: variant.label for name, variant in kept.items()}}
    gains = [
        cell["results"]["shared_bottom"]["overall"]["auc"] - cell["results"]["saml"]["overall"]["auc"] for cell in cells
    ]
    assert f"{statistics.mean(gains):+.4f} ± {statistics.stdev(gains):.4f}" in study.ablation_table(record)


def test_the_page_shows_the_results():
    if not study.RESULTS.exists():
        page = study.PAGE.read_text(encoding="utf-8")
        assert page.count("Not measured yet.") == len(study.TABLES)
        return
    page = study.PAGE.read_text(encoding="utf-8")
    assert page == study.render_page(page, json.loads(study.RESULTS.read_text(encoding="utf-8")))
    assert "Not measured yet" not in page
