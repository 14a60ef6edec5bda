"""The schema file: what it means, and one clear line for every mistake in it."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from saml_rec.data.schema import FeatureSpec, Schema, load_schema
from saml_rec.errors import InputError

GOOD = """
label = "label"
scenario = "country"
time = "ts"
split = [0.7, 0.2, 0.1]

[features.country]
kind = "sparse"

[features.item_id]
kind = "sparse"
scenario_aware = true
dim = 12
min_count = 3

[features.categories]
kind = "multi"
pooling = "sum"
separator = ";"

[features.price]
kind = "dense"

[features.history]
kind = "sequence"
item = "item_id"
heads = 3
max_length = 20
"""


def test_a_schema_file_means_what_it_says(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(GOOD, encoding="utf-8")
    schema = load_schema(path)
    assert (schema.label, schema.scenario, schema.time, schema.split_column) == ("label", "country", "ts", None)
    assert schema.split == (0.7, 0.2, 0.1)
    assert [feature.name for feature in schema.features] == ["country", "item_id", "categories", "price", "history"]
    assert schema.feature("country") == FeatureSpec("country", "sparse")
    assert schema.feature("item_id") == FeatureSpec("item_id", "sparse", scenario_aware=True, dim=12, min_count=3)
    assert schema.feature("categories") == FeatureSpec("categories", "multi", pooling="sum", separator=";")
    assert [feature.name for feature in schema.of_kind("sparse")] == ["country", "item_id"]


def test_the_documented_example():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    schema = Schema.from_dict(tomllib.loads(example))
    assert schema.feature("history").dim == schema.feature("item_id").dim == 32
    assert {feature.kind for feature in schema.features} == {"sparse", "multi", "dense", "sequence"}


def test_a_sequence_has_width_and_local_tables_of_its_item():
    schema = Schema.from_dict(tomllib.loads(GOOD))
    history = schema.feature("history")
    assert (history.dim, history.scenario_aware, history.heads, history.max_length) == (12, True, 3, 20)
    direct = Schema("y", "s", (FeatureSpec("i", "sparse", True, 8), FeatureSpec("h", "sequence", item="i")))
    assert direct.feature("h").dim == 8
    assert direct.feature("h").scenario_aware


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (GOOD, {}),
        (GOOD.replace('time = "ts"\nsplit = [0.7, 0.2, 0.1]', 'split_column = "part"'), {"split_column": "part"}),
        (GOOD.replace('time = "ts"\n', ""), {"time": None}),
        (GOOD.replace('time = "ts"\n', 'weight = "w"\ngroup = "item_id"\n'), {"weight": "w", "group": "item_id"}),
        (GOOD.replace('time = "ts"\n', 'group = "country"\n'), {"weight": None, "group": "country"}),
        (GOOD.replace("split = [0.7, 0.2, 0.1]", ""), {"split": (0.8, 0.1, 0.1)}),
        (GOOD.replace("[0.7, 0.2, 0.1]", "[1, 0, 0]"), {"split": (1.0, 0.0, 0.0)}),
    ],
)
def test_round_trip(text, changes):
    schema = Schema.from_dict(tomllib.loads(text))
    assert Schema.from_dict(schema.to_dict()) == schema
    for key, value in changes.items():
        assert getattr(schema, key) == value


MISTAKES = [
    # what to replace, by what, what the message says
    ('label = "label"', "", "label is missing"),
    ('scenario = "country"', "", "scenario is missing"),
    ('label = "label"', 'lable = "label"', "unknown key 'lable'; did you mean 'label'"),
    ('label = "label"', "label = 3", "label must be the name of a column, not 3"),
    ('label = "label"', 'label = ""', "label must be the name of a column, not ''"),
    ('label = "label"', 'label = "country"', "scenario and label are both column 'country'"),
    ('time = "ts"', 'time = "label"', "time and label are both column 'label'"),
    ('time = "ts"', 'split_column = "part"', "split_column .* cannot stand together with split"),
    ("split = [0.7, 0.2, 0.1]", 'split_column = "part"', "split_column .* cannot stand together with time"),
    ("[0.7, 0.2, 0.1]", "[0.7, 0.2, 0.2]", r"must sum to 1; \[0.7, 0.2, 0.2\] sum to 1.1"),
    ("[0.7, 0.2, 0.1]", "[0.0, 0.9, 0.1]", "training must be positive"),
    ("[0.7, 0.2, 0.1]", "[1.2, -0.1, -0.1]", "none negative"),
    ("[0.7, 0.2, 0.1]", "[0.7, 0.3]", "must be three fractions"),
    ("[0.7, 0.2, 0.1]", '[0.7, 0.2, "a"]', "must be three fractions"),
    ("[0.7, 0.2, 0.1]", "[0.7, 0.2, nan]", "must be three fractions"),
    ("[0.7, 0.2, 0.1]", "[true, false, false]", "must be three fractions"),
    ("[features.price]", "[features.label]", "features.label would leak: it is the label"),
    ("[features.price]", "[features.ts]", "features.ts would leak: it is the time column"),
    ('time = "ts"', 'weight = "price"', "features.price would leak: it is the weight column"),
    ('time = "ts"', 'weight = "label"', "weight and label are both column 'label'"),
    ('time = "ts"', 'weight = 1', "weight must be the name of a column, not 1"),
    ('time = "ts"', 'group = "price"', "features.price.kind must be sparse: it is the group column"),
    ('time = "ts"', 'weight = "w"\ngroup = "w"', "group and weight are both column 'w'"),
    ('time = "ts"', 'group = ""', "group must be the name of a column, not ''"),
    ('[features.country]\nkind = "sparse"', '[features.country]\nkind = "multi"', "country.kind must be sparse"),
    ('kind = "dense"', "", "features.price.kind is missing"),
    ('kind = "dense"', 'kind = "dens"', "price.kind must be one of sparse, .*, not 'dens'; did you mean 'dense'"),
    ('kind = "dense"', "kind = 1", "features.price.kind must be one of"),
    ('kind = "dense"', "kind = []", "features.price.kind must be one of"),
    ('kind = "dense"', 'kind = "dense"\nscenario_aware = true', "price.scenario_aware: a dense feature has no"),
    ('kind = "dense"', 'kind = "dense"\ndim = 4', "features.price.dim: a dense feature enters"),
    ('kind = "dense"', 'kind = "dense"\nheads = 4', "features.price.heads does not apply to a dense feature"),
    ("dim = 12", "dims = 12", "features.item_id: unknown key 'dims'; did you mean 'dim'"),
    ("dim = 12", "dim = 0", "features.item_id.dim must be a whole number from 1 to 65536, not 0"),
    ("dim = 12", "dim = 1e9", "features.item_id.dim must be a whole number"),
    ("dim = 12", "dim = true", "features.item_id.dim must be a whole number"),
    ("dim = 12", 'dim = "12"', "features.item_id.dim must be a whole number from 1 to 65536, not '12'"),
    ("dim = 12", "dim = 13", r"history.heads must divide the dim of its item: 3 heads, item_id.dim = 13"),
    ("min_count = 3", "min_count = 0", "features.item_id.min_count must be a whole number of at least 1"),
    ("min_count = 3", "buckets = -1", "features.item_id.buckets must be a whole number from 1 to 1073741824, or 0"),
    ("min_count = 3", "min_count = 3\nbuckets = 9", "features.item_id.min_count: a feature with buckets has no voc"),
    ("heads = 3", "heads = 3\nbuckets = 9", "features.history.buckets: a sequence has the ids of its item"),
    ("scenario_aware = true", "scenario_aware = 1", "features.item_id.scenario_aware must be true or false, not 1"),
    ('pooling = "sum"', 'pooling = "max"', "features.categories.pooling must be mean or sum, not 'max'"),
    ('separator = ";"', 'separator = ""', "features.categories.separator must be a non-empty string"),
    ('item = "item_id"', "", "features.history.item is missing"),
    ('item = "item_id"', 'item = "item"', "there is no feature 'item'; did you mean 'item_id'"),
    ('item = "item_id"', 'item = "categories"', "item must be a sparse feature; 'categories' is multi"),
    ('item = "item_id"', 'item = "history"', "item must be a sparse feature; 'history' is sequence"),
    ("heads = 3", "heads = 3\ndim = 12", "features.history.dim: a sequence .* inherits dim"),
    ("heads = 3", "heads = 3\nscenario_aware = true", "features.history.scenario_aware: .* inherits scenario_aware"),
    ("heads = 3", "heads = 0", "features.history.heads must be a whole number"),
    ("max_length = 20", "max_length = -1", "features.history.max_length must be a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path, old, new, message):
    path = tmp_path / "schema.toml"
    assert GOOD.count(old) >= 1
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_schema(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "at least one feature"),
        ("item_id", r"features must be tables"),
        ({"item_id": "sparse"}, "features.item_id must be a table"),
        ({"": {"kind": "sparse"}}, "non-empty string"),
    ],
)
def test_features_that_are_none(features, message):
    with pytest.raises(InputError, match=message):
        Schema.from_dict({"label": "y", "scenario": "s", "features": features})


def test_the_split_column_is_no_feature():
    mapping = {"label": "y", "scenario": "s", "split_column": "part", "features": {"part": {"kind": "sparse"}}}
    with pytest.raises(InputError, match=r"features\.part would leak: it is the split column"):
        Schema.from_dict(mapping)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"label = ", "is not valid TOML"),
        (b'label = "a"\nlabel = "b"', "is not valid TOML"),
        (b'label = "a"\rscenario = "b"', "is not valid TOML"),
        (b'\rlabel = "a"', "is not valid TOML"),
        (b"label = " + b"[" * 100_000 + b"]" * 100_000, "is not a schema file: its values are nested too deeply"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"", "label is missing"),
    ],
)
def test_files_that_are_no_schema(tmp_path, content, message):
    path = tmp_path / "schema.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_schema(path)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no such schema file"):
        load_schema(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="is a directory"):
        load_schema(tmp_path)
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        load_schema(tmp_path / ("x" * 300))


def test_built_in_code_it_is_checked_as_well():
    with pytest.raises(InputError, match="dim must be"):
        FeatureSpec("x", "sparse", dim=-1)
    with pytest.raises(InputError, match="no embedding table"):
        FeatureSpec("x", "dense", scenario_aware=True)
    with pytest.raises(InputError, match="only a sequence has an item"):
        FeatureSpec("x", "sparse", item="y")
    item = FeatureSpec("i", "sparse")
    with pytest.raises(InputError, match="given twice"):
        Schema("y", "s", (item, item))
    with pytest.raises(InputError, match="cannot stand together"):
        Schema("y", "s", (item,), split_column="part", time="t")
    with pytest.raises(InputError, match=r"no feature 'j'"):
        Schema("y", "s", (item,)).feature("j")


def test_a_schema_cannot_be_changed():
    schema = Schema.from_dict(tomllib.loads(GOOD))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.label = "other"
    assert hash(schema) == hash(Schema.from_dict(tomllib.loads(GOOD)))
