"""Synthetic data: the planted relation, the sizes, and a signal that can be learnt."""

import json

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from saml_rec.data import prepare, write_synthetic
from saml_rec.data.schema import load_schema
from saml_rec.datasets import synthetic
from saml_rec.errors import InputError


def read(paths):
    data, schema, relation = paths
    return pl.read_csv(data, infer_schema_length=None), load_schema(schema), json.loads(relation.read_text())


def test_the_relation_is_row_stochastic_and_says_what_is_in_the_table(tmp_path):
    frame, _, planted = read(write_synthetic(tmp_path, scenarios=5, rows=4000))
    relation = np.array(planted["relation"])
    assert relation.shape == (5, 5)
    assert (relation >= 0).all()
    np.testing.assert_allclose(relation.sum(axis=1), 1)
    np.testing.assert_allclose(relation.diagonal(), 0.5)
    counts = dict(frame["scenario"].value_counts().iter_rows())
    assert planted["scenarios"] == ["s0", "s1", "s2", "s3", "s4"]
    assert [counts[name] for name in planted["scenarios"]] == sorted(counts.values(), reverse=True)
    for name, measures in planted["bayes"]["scenarios"].items():
        labels = frame.filter(pl.col("scenario") == name)["label"]
        assert measures["rows"] == len(labels)
        assert measures["base_rate"] == pytest.approx(labels.mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scenarios", [1, 4, 12])
def test_the_best_possible_auc(tmp_path, scenarios, seed):
    _, _, planted = read(write_synthetic(tmp_path, scenarios=scenarios, seed=seed))
    assert 0.75 < planted["bayes"]["overall"]["auc"] < 0.85
    assert 0.15 < planted["bayes"]["overall"]["base_rate"] < 0.6


def test_related_scenarios_like_the_same_items(tmp_path):
    frame, _, planted = read(write_synthetic(tmp_path, scenarios=6, rows=60_000, items=60, seed=1))
    relation = np.array(planted["relation"])
    direction = relation / np.linalg.norm(relation, axis=1, keepdims=True)
    rates = frame.group_by("item_id", "scenario").agg(pl.col("label").mean()).pivot(
        "scenario", index="item_id", values="label"
    ).sort("item_id")  # fmt: skip
    observed = np.corrcoef(rates.select(planted["scenarios"]).to_numpy().T)
    pairs = np.triu_indices(6, k=1)
    assert np.corrcoef((direction @ direction.T)[pairs], observed[pairs])[0, 1] > 0.7


def test_scenario_and_item_alone_predict_something(tmp_path):
    frame, _, _ = read(write_synthetic(tmp_path, rows=40_000))
    frame = frame.with_row_index()
    train, test = frame.filter(pl.col("index") < 32_000), frame.filter(pl.col("index") >= 32_000)
    means = train.group_by("scenario", "item_id").agg((pl.col("label").sum() + 1.5) / (pl.len() + 5))
    scored = test.join(means, on=["scenario", "item_id"], suffix="_mean")
    assert roc_auc_score(scored["label"], scored["label_mean"]) > 0.65


def test_the_seed_decides_every_byte(tmp_path):
    def content(name, **options):
        return [path.read_bytes() for path in write_synthetic(tmp_path / name, rows=500, **options)]

    assert content("a") == content("b")
    assert content("a")[0] != content("c", seed=1)[0]


def test_the_smallest_share(tmp_path):
    paths = write_synthetic(tmp_path, scenarios=5, rows=20_000, smallest_share=0.005)
    frame, schema, _ = read(paths)
    assert frame.filter(pl.col("scenario") == "s4").height == 100
    prepared = prepare(paths[0], schema, seed=0)
    assert prepared.encoder.num_scenarios == 5
    assert all(prepared.tables["train"].scenario_counts() > 0)


def test_every_kind_of_column_is_there(tmp_path):
    paths = write_synthetic(tmp_path, rows=2000)
    frame, schema, _ = read(paths)
    assert {feature.kind for feature in schema.features} == {"sparse", "multi", "dense", "sequence"}
    assert 0.02 < frame["price"].is_null().mean() < 0.1
    assert frame["timestamp"].is_sorted()
    assert frame["timestamp"].n_unique() < frame.height
    train = prepare(paths[0], schema, seed=0).tables["train"]
    batch = next(train.batches(len(train)))
    assert batch["features"]["tags"].shape[1] == 3
    assert 1 < batch["features"]["history"].shape[1] <= 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenarios": 0}, "scenarios must be at least 1"),
        ({"rows": 30}, "30 rows give the smallest of 4 scenarios 4; at least 10 are needed"),
        ({"rows": -1}, "at least 10 are needed"),
        ({"users": 0}, "users must be at least 1"),
        ({"items": 0}, "items must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"smallest_share": 0.3}, r"smallest_share must lie in \(0, 0.25\], not 0.3"),
        ({"smallest_share": 0.0}, "smallest_share must lie in"),
        ({"smallest_share": 0.0001}, "at least 10 are needed"),
        ({"relation": "triplet"}, "relation must be one of drawn, twin, not 'triplet'"),
        ({"relation": "twin", "scenarios": 1}, "relation twin needs at least 2 scenarios, not 1"),
    ],
)
def test_bad_sizes(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write_synthetic(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rows_are_written_in_chunks_of_any_size(tmp_path, monkeypatch):
    sizes = {"rows": 700, "users": 9, "items": 30, "seed": 4}
    whole, *_ = write_synthetic(tmp_path / "whole", **sizes)
    for chunk in (37, 256):
        monkeypatch.setattr(synthetic, "CHUNK_ROWS", chunk)
        in_chunks, *_ = write_synthetic(tmp_path / str(chunk), **sizes)
        assert in_chunks.read_bytes() == whole.read_bytes()


def test_a_twin_has_the_taste_of_one_other_and_the_rest_share_nothing(tmp_path):
    twins = set()
    for seed in range(6):
        *_, path = write_synthetic(tmp_path / str(seed), scenarios=4, rows=400, seed=seed, relation="twin")
        relation = np.array(json.loads(path.read_text())["relation"])
        np.testing.assert_array_equal(relation[:3], np.eye(4)[:3])
        np.testing.assert_array_equal(np.sort(relation[3]), [0, 0, 0, 1])
        assert relation[3, 3] == 0
        twins.add(int(relation[3].argmax()))
    assert len(twins) > 1


def test_twins_like_the_same_items(tmp_path):
    frame, _, planted = read(write_synthetic(tmp_path, scenarios=4, rows=60_000, items=60, seed=1, relation="twin"))
    twin = int(np.array(planted["relation"])[-1].argmax())
    rates = frame.group_by("item_id", "scenario").agg(pl.col("label").mean())
    wide = rates.pivot("scenario", index="item_id", values="label").sort("item_id")
    observed = np.corrcoef(wide.select(planted["scenarios"]).to_numpy().T)[-1, :-1]
    assert observed[twin] > 0.8
    assert np.delete(observed, twin).max() < 0.6
