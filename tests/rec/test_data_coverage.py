"""Values that mean nothing to a model are counted, said, and refused where none means anything."""

import json

import numpy as np
import polars as pl
import pytest

from saml_rec.data import preparation, prepare
from saml_rec.data.coverage import Coverage, scored_lines
from saml_rec.data.schema import Schema, load_schema
from saml_rec.errors import InputError

MAPPING = {
    "label": "y",
    "scenario": "s",
    "split_column": "part",
    "features": {
        "item": {"kind": "sparse"},
        "tags": {"kind": "multi"},
        "price": {"kind": "dense"},
        "history": {"kind": "sequence", "item": "item", "max_length": 3},
    },
}
SCHEMA = Schema.from_dict(MAPPING)
TRAIN, HELD_OUT = 40, 20
GOOD = {
    "y": [0, 1] * 30,
    "s": ["a", "b", "b"] * 20,
    "part": ["train"] * TRAIN + ["valid"] * 10 + ["test"] * 10,
    "item": ["12", "7"] * 30,
    "tags": ["x|y", "x", ""] * 20,
    "price": [1.0, 2.0, None] * 20,
    "history": ["12|7", "7"] * 30,
}


@pytest.fixture
def prepared(tmp_path):
    """Prepares the rows above with some columns replaced, and some features; those of ``late`` from row 40 on only."""

    def write_and_prepare(schema=SCHEMA, late=None, **columns):
        columns = GOOD | columns | {name: GOOD[name][:TRAIN] + values for name, values in (late or {}).items()}
        pl.DataFrame(columns).write_csv(tmp_path / "data.csv")
        return prepare(tmp_path / "data.csv", schema, seed=0, cache=tmp_path / "cache", console=None)

    return write_and_prepare


def with_feature(**features):
    changed = {name: feature | features.get(name, {}) for name, feature in MAPPING["features"].items()}
    return Schema.from_dict(MAPPING | {"features": changed})


@pytest.mark.parametrize("rows", [preparation.MEMORY_ROWS, 10], ids=["in memory", "on disk"])
def test_shares_by_split_and_feature(prepared, monkeypatch, rows):
    monkeypatch.setattr(preparation, "MEMORY_ROWS", rows)
    late = {
        "item": ["12", "new", None, "new"] * 5,
        "tags": ["x|new", "", "new", "x"] * 5,
        "history": ["new|7|new|new|7", "", "12", "7"] * 5,
    }
    for _ in range(2):  # the second time from the cache, if there is one
        shares = prepared(late=late).shares()
        assert list(shares) == ["train", "valid", "test"]
        assert shares["train"] == {
            "item": {"empty": 0.0, "unknown": 0.0},
            "tags": {"empty": 13 / 40, "unknown": 0.0},
            "price": {"empty": 13 / 40},
            "history": {"empty": 0.0, "unknown": 0.0},
        }
        # Ten rows from the first of four kinds on, and ten from the third.
        assert shares["valid"]["item"] == {"empty": 2 / 10, "unknown": 5 / 8}
        assert shares["test"]["item"] == {"empty": 3 / 10, "unknown": 5 / 7}
        assert shares["valid"]["tags"] == {"empty": 3 / 10, "unknown": 5 / 10}
        # The newest three of "new|7|new|new|7": two are unknown.
        assert shares["valid"]["history"] == {"empty": 3 / 10, "unknown": 6 / 13}


REFUSED = [
    # columns, those of validation and test rows, features, what the message says
    (
        {"item": [None] * 60},
        {},
        {},
        "feature 'item': all 40 training rows are empty, so that a model would learn nothing from it",
    ),
    ({"tags": [None] * 60}, {}, {}, "feature 'tags': all 40 training rows are empty"),
    ({"item": [f"i{n}" for n in range(60)]}, {}, {"item": {"min_count": 2}}, "none of the 40 values of"),
    (
        {},
        {"item": ["12.0", "7.0"] * 10},
        {},
        "feature 'item': none of the 20 values of the validation and test rows is among those in training rows, such "
        "as '12.0', where training has '12'; spell them alike, or leave the feature out of the schema, or ",
    ),
    ({"item": ["007", "008"] * 30}, {"item": ["7", "8"] * 10}, {}, "such as '7', where training has '007'"),
    ({"item": ["Shoe", "Bag"] * 30}, {"item": [" Bag"] * 20}, {}, "such as ' Bag', where training has 'Bag'"),
    ({"item": ["Shoe", "Bag"] * 30}, {"item": ["BAG"] * 20}, {}, "such as 'BAG', where training has 'Bag'"),
    ({}, {"item": ["new"] * 20}, {}, "such as 'new'; spell them alike"),
    ({}, {"item": ["new"] * 20}, {"item": {"min_count": 3}}, "training rows that occur min_count = 3 times, such"),
    (
        {"history": ["12;7"] * 60},
        {},
        {},
        "feature 'history': none of the 40 values of the training rows is among those of its item in training "
        "rows, such as '12;7'; its separator is ';', and '|' in the schema; spell them alike, or leave the feature out",
    ),
    ({"history": ["12.0, 7.0"] * 60}, {}, {}, "such as '12.0, 7.0'; its separator is ',', and '|' in the schema"),
    ({"history": ["i12|i7"] * 60}, {}, {}, "none of the 80 values of the training rows"),
    ({}, {"history": ["12 7"] * 20}, {}, "of the validation and test rows is among those of its item"),
    ({}, {"tags": ["X"] * 20}, {}, "feature 'tags': none of the 20 values .* such as 'X', where training has 'x'"),
]


@pytest.mark.parametrize(("columns", "late", "features", "message"), REFUSED)
def test_a_feature_of_which_nothing_is_known_is_refused(prepared, columns, late, features, message, monkeypatch):
    kept = {name: values[:TRAIN] for name, values in columns.items()}
    late = {name: columns.get(name, GOOD[name])[TRAIN:] for name in columns} | late
    columns = {name: values + late[name] for name, values in kept.items()}
    late = {name: values for name, values in late.items() if name not in columns}
    for rows in (preparation.MEMORY_ROWS, 10):
        monkeypatch.setattr(preparation, "MEMORY_ROWS", rows)
        with pytest.raises(InputError, match=message):
            prepared(with_feature(**features), late, **columns)


def test_what_is_no_fault(prepared):
    """Most values unknown, as of users in a split by time; fewer than 20; buckets; sequences or numbers without any."""
    prepared(late={"item": ["new"] * 19 + ["7"], "history": ["7"] * 20})
    part = ["train"] * 41 + ["valid"] * 10 + ["test"] * 9
    prepared(part=part, item=GOOD["item"][:41] + ["new"] * 19, history=GOOD["history"])
    prepared(with_feature(item={"buckets": 100}), late={"item": ["new"] * 20, "history": ["newer"] * 20})
    prepared(history=[None] * 60, price=[None] * 60)


def test_lists_as_text_are_lists(prepared):
    as_text = prepared(history=["['12', '7']", "[7]"] * 30, tags=['["x", "y"]', '["x"]', "[]"] * 20)
    expected = prepared()
    assert as_text.encoder == expected.encoder
    for name, table in expected.tables.items():
        assert as_text.tables[name].fingerprint() == table.fingerprint()


@pytest.fixture
def train(saml_rec, tmp_path, dataset_of):
    """The command, with a frame of the small data set or one like it."""

    def call(frame, out="run", *options):
        dataset = dataset_of(frame)
        arguments = ["--schema", dataset.schema, "--out", tmp_path / out, "--epochs", 1, "--model", "mlp"]
        return saml_rec("train", "--data", dataset.data, *arguments, *options)

    return call


def test_training_says_what_is_notable_and_keeps_all(train, small_dataset, tmp_path):
    order = np.random.default_rng(0).permutation(400)  # as of a split with seed 0
    late = np.isin(np.arange(400), order[320:])
    frame = small_dataset.frame.with_columns(
        user=pl.when(pl.Series(late) & (pl.int_range(400) % 4 > 0)).then(pl.lit("new")).otherwise("user"),
        age=pl.when(pl.Series(late)).then(None).otherwise("age"),
    )
    result = train(frame)
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if line.startswith("feature")]
    shares = json.loads((tmp_path / "run" / "metrics.json").read_text())["data"]["features"]
    valid, test = (f"{shares[name]['user']['unknown']:.0%}" for name in ("valid", "test"))
    assert said == [
        f"feature 'user': unknown values are 0% of train, {valid} of valid, {test} of test",
        "feature 'age': empty cells are 0% of train, 100% of valid, 100% of test",
    ]
    assert 0.6 < shares["test"]["user"]["unknown"] < 0.9
    assert shares["test"]["age"] == {"empty": 1.0}
    assert shares["train"]["history"].keys() == {"empty", "unknown"}


def test_a_bag_with_another_separator_is_said(train, small_dataset):
    frame = small_dataset.frame.with_columns(pl.col("tags").str.replace_all("|", ";", literal=True))
    result = train(frame)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("feature")]
    assert line == (
        "feature 'tags': no cell holds its separator '|', most hold ';': if that separates values, say so in the schema"
    )


def test_training_refuses_in_one_line(train, small_dataset, tmp_path):
    result = train(small_dataset.frame.with_columns(pl.col("history").str.replace_all("i", "item ")), "other")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: feature 'history': none of the ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_scoring_warns_of_what_the_model_does_not_know(
    saml_rec, finished_run, dataset_of, small_dataset, tmp_path, command
):
    frame = small_dataset.frame.with_columns(
        user=pl.col("user").str.to_uppercase(),
        item=pl.when(pl.int_range(400) < 300).then(pl.lit("new")).otherwise("item"),
        age=None,
    )
    out = tmp_path / ("out.csv" if command == "predict" else "out.json")
    result = saml_rec(command, finished_run, "--data", dataset_of(frame).data, "--out", out)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "feature 'user': none of the 400 values of the rows is among those in training rows" in warnings[0]
    assert ", where training has 'u" in warnings[0]
    assert warnings[1] == "warning: feature 'age': empty are 100% of its cells, 0% in training"
    assert "feature 'item': unknown to the model are 75% of its values" in result.stdout
    if command == "evaluate":
        features = json.loads(out.read_text())["data"]["features"]
        assert features["user"] == {"empty": 0.0, "unknown": 1.0}
        assert features["item"] == {"empty": 0.0, "unknown": 0.75}
        assert features["age"] == {"empty": 1.0}


def test_scoring_rows_like_those_of_training_says_nothing(saml_rec, finished_run, small_dataset, tmp_path):
    for command, name in (("predict", "out.csv"), ("evaluate", "out.json")):
        result = saml_rec(command, finished_run, "--data", small_dataset.data, "--out", tmp_path / name)
        assert result.stderr == ""
        assert "feature" not in result.stdout


def test_a_run_that_kept_no_shares_can_be_warned_of(small_dataset, tmp_path):
    data = prepare(small_dataset.data, load_schema(small_dataset.schema), seed=0)
    counted = Coverage.from_dict(data.encoder, data.coverage["test"].to_dict())
    assert list(scored_lines(data.encoder, counted, {})) == []


@pytest.fixture
def european(small_dataset, tmp_path):
    """The small data set with semicolons and decimal commas, and its path."""
    path = tmp_path / "european.csv"
    small_dataset.frame.write_csv(path, separator=";", decimal_comma=True)
    return path


def test_the_commands_read_what_they_find_or_are_told(saml_rec, european, small_dataset, tmp_path):
    """Detected, named, and kept in the run where it was named; the same rows each time."""
    schema = load_schema(small_dataset.schema)
    expected = {name: table.fingerprint() for name, table in prepare(small_dataset.data, schema, seed=0).tables.items()}
    odd = tmp_path / "odd.csv"
    odd.write_text(european.read_text(encoding="utf-8").replace(";", "^"), encoding="utf-8")
    train = ["train", "--schema", small_dataset.schema, "--epochs", 1, "--model", "mlp"]
    for data, options, found in (
        (european, [], f"{european}: separator ';', decimal ','"),
        (european, ["--separator", "semicolon", "--decimal", ","], f"{european}: separator ';', decimal ','"),
        (odd, ["--separator", "^"], f"{odd}: separator '^', decimal ','"),
    ):
        run = tmp_path / f"run{len(options)}{data.stem}"
        result = saml_rec(*train, "--data", data, "--out", run, *options)
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[0] == found
        result = saml_rec("evaluate", run)
        assert result.exit_code == 0, result.output
        result = saml_rec("predict", run, "--data", data, "--out", tmp_path / "out.parquet")
        assert result.exit_code == 0, result.output
        assert pl.read_parquet(tmp_path / "out.parquet")["prediction"].is_between(0, 1).all()
    # What was named in training holds until another is named.
    result = saml_rec("predict", run, "--data", small_dataset.data, "--out", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert "if ',' separates fields, name it with --separator" in result.stderr
    options = ["--separator", "comma"]
    result = saml_rec("predict", run, "--data", small_dataset.data, "--out", tmp_path / "out.csv", *options)
    assert result.exit_code == 0, result.output
    found = prepare(european, schema, seed=0)
    assert {name: table.fingerprint() for name, table in found.tables.items()} == expected
