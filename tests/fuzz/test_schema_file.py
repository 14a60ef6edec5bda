"""Any bytes as a schema: what its TOML says, or one line that says why not."""

import tomllib

import pytest
from alterations import corpus, mutated
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from refusals import MARK, limited_memory, result_of

from saml_rec.data.schema import FeatureSpec, Schema, load_schema

FILES = corpus("schema")
LONG = MARK * 100
TOKENS = [
    *(b"[", b"]", b"[[", b'"', b"'", b'"""', b"=", b".", b",", b"{", b"}", b"#", b"\n", b"\r", b"\\", b"\0", b"\xff"),
    *(
        b"kind = ",
        b"dim = ",
        b"sequence",
        b"sparse",
        b"multi",
        b"dense",
        b"item = ",
        b"[features.x]\n",
        b"[features]\n",
    ),
    *(b"nan", b"inf", b"-1", b"0", b"1e400", b"0x7fffffffffffffff", b"9" * 5000, b"true", b"1979-05-27", b"07:32:00"),
    *(b"[" * 2000, b"a." * 500, b'"\\u001b[31m"', b'"\\n"', b'""', LONG.encode(), b'"' + LONG.encode() + b'"'),
]
OWN_KEYS = (
    "kind",
    "scenario_aware",
    "dim",
    "min_count",
    "buckets",
    "pooling",
    "item",
    "max_length",
    "heads",
    "separator",
)
"""Of a feature."""
INHERITED = ("dim", "scenario_aware")
"""By a sequence from its item."""


@pytest.fixture(scope="module", autouse=True)
def memory():
    with limited_memory():
        yield


def check(path, content):
    path.write_bytes(content)
    schema = result_of(lambda: load_schema(path), path)
    if schema is not None:
        check_schema(schema, tomllib.loads(content.decode("utf-8-sig")))
    return schema


def check_schema(schema, said):
    """A schema says what the mapping says, defaults where it says nothing, and no column has two uses that exclude."""
    for key in ("label", "scenario", "time", "split_column", "weight", "group"):
        assert getattr(schema, key) == said.get(key)
        assert getattr(schema, key) != ""
    assert list(schema.split) == said.get("split", [0.8, 0.1, 0.1])
    assert sum(schema.split) == pytest.approx(1, abs=1e-5)
    assert min(schema.split) >= 0 < schema.split[0]
    for key in ("min_rows", "rare", "unseen"):
        if key in said.get("scenarios", {}):
            assert getattr(schema.scenarios, key) == said["scenarios"][key]
    assert [feature.name for feature in schema.features] == list(said["features"])
    for feature in schema.features:
        given = said["features"][feature.name]
        defaults = FeatureSpec(feature.name, feature.kind, item="any" if feature.kind == "sequence" else None)
        assert given.keys() <= set(OWN_KEYS)
        for key in OWN_KEYS:
            if feature.kind == "sequence" and key in INHERITED:
                assert getattr(feature, key) == getattr(schema.feature(feature.item), key)
            else:
                assert getattr(feature, key) == given.get(key, getattr(defaults, key))
        if feature.kind == "sequence":
            assert schema.feature(feature.item).kind == "sparse"
            assert feature.dim % feature.heads == 0
    leaks = {schema.label, schema.time, schema.split_column, schema.weight}
    assert not leaks & {feature.name for feature in schema.features}
    assert Schema.from_dict(schema.to_dict()) == schema


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_corpus(tmp_path, name):
    assert check(tmp_path / "schema.toml", FILES[name]) is not None


@examples(400)
@given(content=mutated(list(FILES.values()), TOKENS))
def test_text_that_is_nearly_a_schema(tmp_path, content):
    check(tmp_path / "schema.toml", content)


@examples(100)
@given(content=st.binary(max_size=100) | st.lists(st.sampled_from(TOKENS), max_size=20).map(b"".join))
def test_any_bytes(tmp_path, content):
    check(tmp_path / "schema.toml", content)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.datetimes()
    | st.sampled_from(
        [2**63, 10**4000, 0, 1, 8, "", LONG, "\x1b[31m", "mean", "sum", "other", "drop", "refuse", "a", "b"]
    )
    | st.text(max_size=5)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
names = st.sampled_from(["a", "b", "c", "label", "scenario", "", LONG, "x y", "\n", "größe"])
features = st.fixed_dictionaries(
    {"kind": st.sampled_from(["sparse", "multi", "dense", "sequence", "Sparse"]) | values},
    optional={
        "scenario_aware": st.booleans(),
        "dim": st.integers(-1, 70_000) | values,
        "min_count": st.integers(0, 5),
        "buckets": st.integers(-1, 2**31),
        "pooling": st.sampled_from(["mean", "sum", "max"]),
        "item": names | values,
        "max_length": st.integers(0, 70_000),
        "heads": st.integers(0, 16),
        "separator": st.text(max_size=2) | values,
    },
)
sequences = st.fixed_dictionaries(
    {"kind": st.just("sequence"), "item": names}, optional={"heads": st.sampled_from([1, 2])}
)
plain = st.fixed_dictionaries({"kind": st.sampled_from(["sparse", "sparse", "multi", "dense"])})
schemas = st.fixed_dictionaries(
    {
        "label": names | st.just("y"),
        "scenario": names | st.just("s"),
        "features": st.dictionaries(names, plain | plain | sequences | features, max_size=4) | values,
    },
    optional={
        "time": names | values,
        "split": st.lists(st.floats(0, 1), min_size=3, max_size=3) | st.just([0.5, 0.25, 0.25]) | values,
        "split_column": names | values,
        "weight": names | values,
        "group": names | values,
        "scenarios": st.fixed_dictionaries(
            {}, optional={"min_rows": st.integers(-1, 9), "rare": values, "unseen": values}
        )
        | values,
        "lable": values,
    },
)


@examples(400)
@given(mapping=schemas)
def test_mappings_that_are_nearly_a_schema(mapping):
    """Also what TOML cannot say: schemas come from run directories too."""
    schema = result_of(lambda: Schema.from_dict(mapping))
    if schema is not None:
        check_schema(schema, mapping)
