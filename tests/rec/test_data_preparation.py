"""From a file to batches: what the training rows teach, and awkward but valid tables."""

import numpy as np
import polars as pl
import pytest
import torch

from saml_rec.data import Encoder, prepare, read_table, split_rows
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError

FEATURES = {
    "item": {"kind": "sparse", "scenario_aware": True, "dim": 4},
    "tags": {"kind": "multi"},
    "price": {"kind": "dense"},
    "history": {"kind": "sequence", "item": "item"},
}
BY_TIME = Schema.from_dict({"label": "y", "scenario": "land", "time": "t", "features": FEATURES})
WORDS = ["日本", "مرحبا", "😀", "a, b", 'say "hi"', "two\nlines", "é", "plain"]


def make_frame(rows=1000, shares=(0.5, 0.3, 0.2), seed=0):
    rng = np.random.default_rng(seed)
    lands = np.repeat(
        np.array([f"land {index}" for index in range(len(shares))]), np.rint(np.array(shares) * rows).astype(int)
    )
    return pl.DataFrame(
        {
            "y": rng.integers(0, 2, rows),
            "land": rng.permutation(lands),
            "t": rng.permutation(rows),
            "item": [WORDS[word] for word in rng.integers(0, len(WORDS), rows)],
            "tags": ["|".join(WORDS[word] for word in rng.integers(0, len(WORDS), 2)) for _ in range(rows)],
            "price": pl.Series(rng.random(rows)).set(pl.Series(rng.random(rows) < 0.1), None),
            "history": ["|".join(WORDS[word] for word in rng.integers(0, len(WORDS), n % 4)) for n in range(rows)],
        }
    )


@pytest.fixture
def write(tmp_path):
    def write_csv(frame, name="data.csv"):
        frame.write_csv(tmp_path / name)
        return tmp_path / name

    return write_csv


def assert_same_batches(left, right):
    for a, b in zip(left.batches(64), right.batches(64), strict=True):
        for name in ("scenario", "label", "dense"):
            assert torch.equal(a[name], b[name])
        assert a["features"].keys() == b["features"].keys()
        for name, ids in a["features"].items():
            assert torch.equal(ids, b["features"][name])


def test_tables_hold_the_rows_of_their_split(write):
    frame = make_frame()
    data = prepare(write(frame), BY_TIME, seed=0)
    assert [len(data.tables[name]) for name in ("train", "valid", "test")] == [800, 100, 100]
    rows_of = split_rows(frame, BY_TIME, seed=0)
    for name, table in data.tables.items():
        rows = rows_of[name]
        assert table.label.tolist() == frame["y"].gather(rows).to_list()
        assert [data.encoder.scenario_names[i] for i in table.scenario.tolist()] == frame["land"].gather(rows).to_list()
    assert frame["t"].gather(rows_of["train"]).max() < frame["t"].gather(rows_of["valid"]).min()


def test_csv_and_parquet_give_the_same_batches(write, tmp_path):
    frame = make_frame()
    frame.with_columns(pl.col("tags", "history").str.split("|")).write_parquet(tmp_path / "data.parquet")
    from_csv = prepare(write(frame), BY_TIME, seed=0)
    from_parquet = prepare(tmp_path / "data.parquet", BY_TIME, seed=0)
    assert from_csv.encoder == from_parquet.encoder
    for name in from_csv.tables:
        assert_same_batches(from_csv.tables[name], from_parquet.tables[name])


def test_validation_and_test_rows_teach_nothing(write):
    frame = make_frame()
    # One validation row stays: features without any known value there are refused.
    late = pl.col("t") > 800
    changed = frame.with_columns(
        pl.when(late).then(pl.lit("only later")).otherwise("item").alias("item"),
        pl.when(late).then(pl.lit("only|later")).otherwise("tags").alias("tags"),
        pl.when(late).then(1e6).otherwise("price").alias("price"),
        pl.when(late).then(pl.lit("only later|also")).otherwise("history").alias("history"),
    )
    before, after = (prepare(write(table, name), BY_TIME, seed=0) for table, name in ((frame, "a"), (changed, "b")))
    assert after.encoder == before.encoder
    assert_same_batches(after.tables["train"], before.tables["train"])
    assert set(after.tables["test"].sparse["item"].tolist()) == {1}


def test_five_scenarios_of_which_one_has_half_a_percent(write):
    shares = (0.4, 0.3, 0.2, 0.095, 0.005)
    data = prepare(write(make_frame(rows=4000, shares=shares)), BY_TIME, seed=0)
    assert data.encoder.num_scenarios == 5
    counts = torch.stack([table.scenario_counts() for table in data.tables.values()])
    assert counts.sum(dim=0).tolist() == [1600, 1200, 800, 380, 20]
    seen = torch.zeros(5, dtype=torch.int64)
    for batch in data.tables["train"].batches(32, generator=torch.Generator().manual_seed(0)):
        seen += torch.bincount(batch["scenario"], minlength=5)
    assert seen.equal(data.tables["train"].scenario_counts())


def test_a_scenario_that_only_comes_later_is_an_error(write):
    frame = make_frame().with_columns(pl.when(pl.col("t") >= 950).then(pl.lit("新")).otherwise("land").alias("land"))
    with pytest.raises(
        InputError, match="has '新', not among the training rows, whose scenarios are 'land 0', 'land 1'"
    ):
        prepare(write(frame), BY_TIME, seed=0)


def test_a_saved_encoder_scores_a_file_without_label_and_time(write):
    frame = make_frame()
    data = prepare(write(frame), BY_TIME, seed=0)
    encoder = Encoder.from_dict(data.encoder.to_dict())
    rows = split_rows(frame, BY_TIME, seed=0)["test"]
    new = read_table(write(frame[rows].drop("y", "t"), "new.csv"), BY_TIME, need_label=False)
    table = encoder.encode(new)
    assert table.label is None
    for scored, known in zip(table.batches(50), data.tables["test"].batches(50), strict=True):
        assert "label" not in scored
        assert torch.equal(scored["dense"], known["dense"])
        assert all(torch.equal(ids, known["features"][name]) for name, ids in scored["features"].items())


def test_the_seed_decides_a_split_without_time(write):
    at_random = Schema.from_dict({"label": "y", "scenario": "land", "features": FEATURES})
    path = write(make_frame())
    first, same, other = (prepare(path, at_random, seed=seed) for seed in (1, 1, 2))
    assert_same_batches(first.tables["train"], same.tables["train"])
    assert first.tables["train"].fingerprint() != other.tables["train"].fingerprint()


def test_one_feature_is_enough(write):
    only = Schema.from_dict({"label": "y", "scenario": "land", "features": {"price": {"kind": "dense"}}})
    data = prepare(write(make_frame()), only, seed=0)
    batch = next(data.tables["train"].batches(8))
    assert batch["dense"].shape == (8, 2)
    assert batch["features"] == {}
    assert data.encoder.vocabulary_sizes == {}


WEIGHTED = {"label": "y", "scenario": "land", "weight": "w", "split_column": "part", "features": FEATURES}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (pl.when(pl.col("part") == "test").then(0).otherwise(1), "weight column 'w': all 100 test rows have weight 0"),
        (pl.lit(0), "weight column 'w': all 800 train rows have weight 0"),
        (pl.lit(1e-60), "weight column 'w': all 800 train rows have weight 0"),  # as float32
        (pl.col("y"), "all 800 training rows of weight above 0 have label 1"),
    ],
)
def test_rows_that_all_count_nothing_are_refused(write, weight, message):
    part = pl.Series(["train"] * 800 + ["valid"] * 100 + ["test"] * 100)
    frame = make_frame().with_columns(part=part).with_columns(w=weight)
    schema = Schema.from_dict(WEIGHTED)
    with pytest.raises(InputError, match=message):
        prepare(write(frame), schema, seed=0)
    with pytest.raises(InputError, match=message):
        split_rows(read_table(write(frame), schema), schema, seed=0)
