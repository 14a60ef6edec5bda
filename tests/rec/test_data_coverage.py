"""Values that mean nothing to a model are counted, said, and refused where none means anything."""

import dataclasses
import json
import math

import numpy as np
import polars as pl
import pytest

from saml_rec.data import preparation, prepare
from saml_rec.data.coverage import Count, Coverage, checked_shares, prepared_lines, scored_lines
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


def test_shares_of_every_dense_feature(prepared):
    features = {"price": {"kind": "dense"}, "age": {"kind": "dense"}, "height": {"kind": "dense"}}
    schema = Schema.from_dict(MAPPING | {"features": {"item": {"kind": "sparse"}} | features})
    columns = {
        "price": [1.0, None] * 30,
        "age": [None, None, 1.0, 2.0, 3.0] * 12,
        "height": [1.5, None, None, None] * 15,
    }
    shares = prepared(schema, **columns).shares()["train"]
    assert {name: shares[name] for name in features} == {
        "price": {"empty": 0.5},
        "age": {"empty": 0.4},
        "height": {"empty": 0.75},
    }


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
        "as '12.0', where training has '12'; spell them alike, or leave the feature out of the schema, or give it "
        "buckets$",
    ),
    # The first value that is not known, cut.
    ({}, {"item": [f"new {n}" for n in range(20)]}, {}, "such as 'new 0'; spell them alike"),
    ({}, {"item": ["n" * 30] * 20}, {}, "such as 'nnnnnnn\\.\\.\\.nnnnnnnn'; spell them alike"),
    # Spelled otherwise.
    ({"item": ["12.0", "7.0"] * 30}, {"item": ["12", "7"] * 10}, {}, "such as '12', where training has '12.0'"),
    ({"item": ["SHOE", "BAG"] * 30}, {"item": ["bag"] * 20}, {}, "such as 'bag', where training has 'BAG'"),
    ({"item": ["shoe", "bag"] * 30}, {"item": ["Bag"] * 20}, {}, "such as 'Bag', where training has 'bag'"),
    ({"item": ["shoe", "bag"] * 30}, {"item": ["'bag'"] * 20}, {}, """such as "'bag'", where training has 'bag'"""),
    ({}, {"item": ["0007"] * 20}, {}, "such as '0007', where training has '7'"),
    ({}, {"item": ["700"] * 20}, {}, "such as '700'; spell"),
    ({}, {"item": ["X7"] * 20}, {}, "such as 'X7'; spell"),
    ({"item": ["08", "07"] * 30}, {"item": ["7"] * 20}, {}, "such as '7', where training has '07'"),
    ({"item": ["7".zfill(12)] * 60}, {"item": ["7"] * 20}, {}, "such as '7', where training has '000000000007'"),
    ({"item": ["7".zfill(13)] * 60}, {"item": ["7"] * 20}, {}, "such as '7'; spell"),
    # What is one value is not taken apart.
    ({}, {"item": ["12;7"] * 20}, {}, "such as '12;7'; spell"),
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
        "rows, such as '12;7'; its separator is ';', and '\\|' in the schema; spell them alike, or leave the feature "
        "out of the schema$",
    ),
    ({"history": ["a;b"] * 60}, {}, {}, "such as 'a;b'; spell"),
    ({"history": ["12\t7"] * 60}, {}, {}, r"such as '12\\t7'; its separator is '\\t', and '\|' in the schema"),
    ({"history": ["12 7"] * 60}, {}, {}, r"such as '12 7'; its separator is ' ', and '\|' in the schema"),
    ({"history": ["12/7"] * 60}, {}, {}, r"such as '12/7'; its separator is '/', and '\|' in the schema"),
    (
        {"history": ["12|7"] * 60},
        {},
        {"history": {"separator": ";"}},
        r"such as '12\|7'; its separator is '\|', and ';' in the schema",
    ),
    ({"history": ["['12|7', 'x']"] * 60}, {}, {}, r"such as '12\|7'; spell them alike"),
    (
        {"history": ["12;7"] * 60},
        {},
        {"item": {"min_count": 2}},
        "among those of its item in training rows that occur min_count = 2 times, such as '12;7'",
    ),
    ({"history": ["new", None] * 30}, {}, {}, "feature 'history': none of the 20 values of the training rows is among"),
    ({"history": ["12|a|b|c"] * 60}, {}, {}, "such as 'a'; spell"),
    ({"history": ["12.0, 7.0"] * 60}, {}, {}, "such as '12.0, 7.0'; its separator is ',', and '|' in the schema"),
    ({"history": ["i12|i7"] * 60}, {}, {}, "none of the 80 values of the training rows .*, such as 'i12'; spell"),
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
    prepared(history=(["new"] * 19 + [None] * 41))
    prepared(with_feature(item={"buckets": 100}, tags={"buckets": 100}), item=[None] * 60, tags=[None] * 60)


def coverage_of(encoder, name, count):
    """Of rows with one feature only."""
    nothing = Coverage(encoder).to_dict()
    return Coverage.from_dict(encoder, nothing | {name: dataclasses.asdict(Count(*count))})


@pytest.mark.parametrize(
    ("count", "in_training", "expected"),
    [
        # rows, empty, values, unknown
        (
            (20, 0, 20, 20),
            {"empty": 0.0, "unknown": 0.0},
            [(True, "feature 'item': none of the 20 values of the rows is among those in training rows")],
        ),
        (
            (20, 0, 20, 20),
            {"empty": 0.0, "unknown": 1.0},
            [(False, "feature 'item': unknown to the model are 100% of its values")],
        ),
        (
            (10, 0, 10, 5),
            {"empty": 0.0, "unknown": 0.0},
            [(False, "feature 'item': unknown to the model are 50% of its values")],
        ),
        ((10, 0, 10, 4), {"empty": 0.0, "unknown": 0.0}, []),
        (
            (10, 3, 7, 0),
            {"empty": 0.0, "unknown": 0.0},
            [(False, "feature 'item': empty are 30% of its cells, 0% in training")],
        ),
        ((10, 2, 8, 0), {"empty": 0.0, "unknown": 0.0}, []),
        (
            (10, 10, 0, 0),
            {"empty": 0.5, "unknown": 0.0},
            [(True, "feature 'item': empty are 100% of its cells, 50% in training")],
        ),
    ],
)
def test_what_is_said_of_rows_that_were_scored(prepared, count, in_training, expected):
    encoder = prepared().encoder
    found = scored_lines(encoder, coverage_of(encoder, "item", count), {"train": {"item": in_training}})
    assert list(found) == expected


@pytest.mark.parametrize(
    ("name", "train", "valid", "test", "expected"),
    [
        (
            "item",
            (40, 0, 40, 0),
            (10, 0, 10, 5),
            (10, 0, 10, 0),
            ["unknown values are 0% of train, 50% of valid, 0% of test"],
        ),
        ("item", (40, 0, 40, 0), (10, 0, 10, 4), (10, 0, 10, 4), []),
        (
            "item",
            (40, 0, 40, 0),
            (10, 10, 0, 0),
            (10, 0, 10, 6),
            [
                "unknown values are 0% of train, 60% of test",
                "empty cells are 0% of train, 100% of valid, 0% of test",
            ],
        ),
        ("price", (40, 40), (10, 10), (10, 10), ["empty cells are 100% of train, 100% of valid, 100% of test"]),
        ("price", (40, 0), (10, 3), (10, 0), ["empty cells are 0% of train, 30% of valid, 0% of test"]),
        ("price", (40, 0), (10, 2), (10, 2), []),
    ],
)
def test_what_is_said_of_rows_that_were_prepared(prepared, name, train, valid, test, expected):
    encoder = prepared().encoder
    counts = {"train": train, "valid": valid, "test": test}
    splits = {split: coverage_of(encoder, name, count) for split, count in counts.items()}
    assert prepared_lines(encoder, splits) == [f"feature '{name}': {line}" for line in expected]


@pytest.mark.parametrize(
    ("tags", "feature", "separator"),
    [
        (["a;b", "c;d"], {}, ";"),
        (["a,b", "c,d", "e"], {}, ","),
        (["a\tb", None], {}, "\t"),
        (["a|b", "c|d"], {"separator": ","}, "|"),
        (["a;b", "c;d", "e", "f"], {}, None),
        (["a;b", "c;d", "e", "f", "g"], {}, None),
        (["a b", "c d"], {}, None),
        (["a/b", "c/d"], {}, None),
        (["x", "y"], {}, None),
        (["a;b|c;d", None], {}, None),
        (["['a|b']", "['c|d']"], {}, None),
        (["a;b", "c;d"], {"buckets": 9}, None),
    ],
)
def test_separators_of_bags_without_two_values(prepared, tags, feature, separator):
    data = prepared(with_feature(tags=feature), tags=(tags * 60)[:60])
    line = f"feature 'tags': no cell holds its separator {feature.get('separator', '|')!r}, most hold {separator!r}: "
    expected = [] if separator is None else [f"{line}if that separates values, say so in the schema"]
    assert prepared_lines(data.encoder, data.coverage) == expected


def test_shares_that_are_none():
    good = {"train": {"item": {"empty": 0, "unknown": 1.0}}, "test": {"item": {"empty": 0.5, "unknown": None}}}
    assert checked_shares(good) == good
    for share in (-0.1, 1.1, 2, math.nan):
        with pytest.raises(InputError, match=f"a share of a feature's cells is {share}"):
            checked_shares(good | {"valid": {"item": {"empty": share}}})


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
