"""Ids and normalisation come from the training rows alone, and equal a row-by-row encoding in plain Python."""

import collections
import hashlib
import itertools
import json
import math
import statistics

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saml_rec.data.cells import Checks, conform
from saml_rec.data.encoding import Encoder
from saml_rec.data.learning import Learner
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError

MAPPING = {
    "label": "y",
    "scenario": "s",
    "features": {
        "item": {"kind": "sparse", "min_count": 2},
        "tags": {"kind": "multi", "separator": ", "},
        "price": {"kind": "dense"},
        "history": {"kind": "sequence", "item": "item", "max_length": 3},
    },
}
SCHEMA = Schema.from_dict(MAPPING)


def frame_of(**columns):
    rows = len(next(iter(columns.values())))
    empty = {"y": [0] * rows, "s": ["a"] * rows, "item": None, "tags": None, "price": None, "history": None}
    return conform(pl.DataFrame({name: columns.get(name, values) for name, values in empty.items()}), SCHEMA)


def fit(frame, rows=None):
    return Learner(SCHEMA).add(frame if rows is None else frame[rows]).encoder()


def lists(ragged):
    ids, offsets = ragged.values.tolist(), ragged.offsets.tolist()
    return [ids[start:end] for start, end in itertools.pairwise(offsets)]


def test_ids_by_frequency_then_value():
    frame = frame_of(item=["b", "é", "c", "c", "b", "a", "c", "é", None, ""])
    encoder = fit(frame)
    assert encoder.vocabularies["item"] == ("c", "b", "é")
    assert encoder.vocabulary_sizes == {"item": 5, "tags": 2}
    assert encoder.encode(frame).sparse["item"].tolist() == [3, 4, 2, 2, 3, 1, 2, 4, 0, 0]


def test_values_that_training_never_saw_are_unknown():
    frame = frame_of(item=["a", "a", "z", "z", "z"], tags=["x", "x, y", "q", "q, x", None])
    encoder = fit(frame, rows=[0, 1])
    table = encoder.encode(frame)
    assert table.sparse["item"].tolist() == [2, 2, 1, 1, 1]
    assert lists(table.ragged["tags"]) == [[2], [2, 3], [1], [1, 2], []]


def test_a_sequence_uses_the_vocabulary_of_its_item_and_adds_nothing_to_it():
    frame = frame_of(item=["a", "a", "b", "b"], history=["z|z|z", "a|b", "b|z||a", None])
    encoder = fit(frame)
    assert encoder.vocabularies["item"] == ("a", "b")
    assert lists(encoder.encode(frame).ragged["history"]) == [[1, 1, 1], [2, 3], [3, 1, 2], []]


def test_buckets_take_every_value_by_its_hash():
    """Also those that training never saw, the same on every machine; empty cells stay 0; a sequence has its item's."""
    features = MAPPING["features"] | {
        "item": {"kind": "sparse", "buckets": 1000},
        "tags": {"kind": "multi", "separator": ", ", "buckets": 3},
    }
    schema = Schema.from_dict(MAPPING | {"features": features})
    frame = frame_of(
        item=["a", "b", None, "é", "a"], tags=["x, y", "x", None, "z, z", "x"], history=["b|a", "new", None, "", "é"]
    )
    encoder = Learner(schema).add(frame[[0]]).encoder()
    assert encoder.vocabularies == {}
    assert encoder.vocabulary_sizes == {"item": 1002, "tags": 5}
    assert Encoder.from_dict(json.loads(json.dumps(encoder.to_dict()))) == encoder
    table = encoder.encode(frame)

    def number(value, buckets):
        # BLAKE2b with a digest of 8 bytes, as a little-endian number.
        return 2 + int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") % buckets

    assert table.sparse["item"].tolist() == [
        number("a", 1000),
        number("b", 1000),
        0,
        number("é", 1000),
        number("a", 1000),
    ]
    assert number("a", 1000) == 930
    assert lists(table.ragged["history"])[:2] == [[number("b", 1000), number("a", 1000)], [number("new", 1000)]]
    tags = lists(table.ragged["tags"])
    assert tags == [[number("x", 3), number("y", 3)], [number("x", 3)], [], [number("z", 3)] * 2, [number("x", 3)]]


def test_a_sequence_keeps_its_newest_elements():
    frame = frame_of(item=["a", "a", "b", "b"], history=["a|a|b|b|a", "|a||b|", "|", "b|a|a|"])
    assert lists(fit(frame).encode(frame).ragged["history"]) == [[3, 3, 2], [2, 3], [], [3, 2, 2]]


def test_lists_and_separated_text_are_the_same():
    text = frame_of(item=["a", "a"], tags=["x, y", None], history=["a|b||", "a"])
    nested = frame_of(item=["a", "a"], tags=[["x", "y"], None], history=[["a", "b", None, ""], ["a"]])
    assert fit(nested) == fit(text)
    for feature in ("tags", "history"):
        assert lists(fit(text).encode(nested).ragged[feature]) == lists(fit(text).encode(text).ragged[feature])


def test_dense_values_are_normalised_and_missing_ones_flagged():
    frame = frame_of(price=[1.0, 3.0, None, 7.0])
    encoder = fit(frame, rows=[0, 1, 2])
    assert encoder.moments == {"price": (2.0, 1.0)}
    assert encoder.dense_width == 2
    assert encoder.encode(frame).dense.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 0.0]]


@pytest.mark.parametrize(
    ("prices", "moments"), [([0.1] * 7, (0.1, 1.0)), ([None] * 7, (0.0, 1.0)), ([4.0] + [None] * 6, (4.0, 1.0))]
)
def test_a_dense_column_without_spread_is_only_centred(prices, moments):
    frame = frame_of(price=prices)
    encoder = fit(frame)
    assert encoder.moments["price"] == moments
    assert encoder.encode(frame).dense[:, 0].tolist() == [0.0] * 7


@pytest.mark.parametrize("spread", [1e-30, 1e-200, 5e-324])
def test_values_far_from_those_in_training_stay_finite(spread):
    frame = frame_of(price=[0.0, spread, 1e38, -1e38])
    dense = fit(frame, rows=[0, 1]).encode(frame).dense
    assert dense.isfinite().all()
    assert dense[2:, 0].abs().tolist() == [1e4, 1e4]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "-1", "9"], ("-1", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["中国", "مصر", "😀", "de"], ("de", "مصر", "中国", "😀")),
        (["07", "7", "8"], ("07", "7", "8")),
        (["2.5", "10"], ("10", "2.5")),
    ],
)
def test_scenarios_are_sorted(names, order):
    frame = frame_of(s=names)
    encoder = fit(frame)
    assert encoder.scenario_names == order
    assert encoder.num_scenarios == len(order)
    table = encoder.encode(frame)
    assert [order[index] for index in table.scenario.tolist()] == names
    assert table.scenario_counts().tolist() == [names.count(name) for name in order]


def test_a_scenario_that_training_never_saw_is_an_error():
    frame = frame_of(s=["de", "fr", "x1", "x10", "x2", "x3", "x4", "x5"])
    encoder = fit(frame, rows=[0, 1])
    with pytest.raises(
        InputError,
        match=r"^scenario column 's' has 'x1', 'x10', 'x2', 'x3', 'x4' and 1 more, not among the training rows, "
        r"whose scenarios are 'de', 'fr'; \[scenarios\] unseen = \"other\" or \"drop\" in the schema lets [a-z ]*$",
    ):
        encoder.encode(frame)
    assert len(encoder.encode(frame, rows=np.array([1, 0, 1]))) == 3


def test_labels_only_where_they_were_read():
    frame = frame_of(y=[0, 1], item=["a", "b"])
    encoder = fit(frame)
    assert encoder.encode(frame).label.tolist() == [0.0, 1.0]
    assert encoder.encode(frame).label.dtype == torch.float32
    assert encoder.encode(frame.drop("y")).label is None
    unchecked = conform(frame.with_columns(y=pl.lit("?")), SCHEMA, Checks(label=False, split=False, keep_others=True))
    assert encoder.encode(unchecked).label is None


def test_types():
    frame = frame_of(item=["a", "a"], tags=["x", "x"])
    table = fit(frame).encode(frame)
    assert (table.scenario.dtype, table.dense.dtype) == (torch.int64, torch.float32)
    assert table.sparse["item"].dtype == torch.int64
    assert table.ragged["tags"].offsets.dtype == torch.int64


def test_no_rows():
    frame = frame_of(item=["a", "a"], price=[1.0, 2.0], history=["a", "a"])
    table = fit(frame).encode(frame, rows=np.array([], dtype=np.int64))
    assert len(table) == 0
    assert table.dense.shape == (0, 2)
    assert table.scenario_counts().tolist() == [0]
    assert list(table.batches(4)) == []


def test_other_rows_teach_nothing():
    train = {"item": ["a", "a", "b"], "tags": ["x", "y", None], "price": [1.0, 2.0, 4.0], "history": ["a", "b|a", None]}
    other = {"item": ["z", "b", "a"], "tags": ["q", "y", "y"], "price": [1e6, None, -1e6], "history": ["z|a", "z", "b"]}
    both = frame_of(**{name: train[name] + other[name] for name in train})
    assert fit(both, rows=[0, 1, 2]) == fit(frame_of(**train))


def test_a_round_trip_through_json_is_exact():
    frame = frame_of(
        s=["日本", "a", "a"], item=["😀", "😀", "x"], tags=["é", "b, c", None], price=[1 / 3, math.pi, 1e-30]
    )
    encoder = fit(frame)
    again = Encoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder
    assert torch.equal(again.encode(frame).dense, encoder.encode(frame).dense)
    with pytest.raises(InputError, match="format 1 expected, got 2"):
        Encoder.from_dict(encoder.to_dict() | {"format": 2})


values = st.sampled_from(["a", "b", "c", "日本", "😀", "a b", " "])
cells = st.lists(values | st.just(""), max_size=5)
row = st.tuples(
    values | st.none(), cells, st.integers(-(10**8), 10**8).map(lambda hundredths: hundredths / 100) | st.none(), cells
)


@settings(deadline=None, max_examples=60)
@given(st.lists(row, min_size=2, max_size=30), st.data())
def test_equals_an_encoding_row_by_row(rows, data):
    train = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=30, unique=True))
    item, tags, price, history = zip(*rows, strict=True)
    frame = frame_of(
        item=pl.Series(item, dtype=pl.String),
        tags=[", ".join(cell) for cell in tags],
        price=pl.Series(price, dtype=pl.Float64),
        history=["|".join(cell) for cell in history],
    )
    encoder = Learner(SCHEMA).add(frame[train]).encoder()
    table = encoder.encode(frame)

    def vocabulary(of_rows, min_count):
        counts = collections.Counter(value for of_row in of_rows for value in of_row if value)
        kept = sorted((-count, value.encode()) for value, count in counts.items() if count >= min_count)
        return {value.decode(): index for index, (_, value) in enumerate(kept, start=2)}

    items = vocabulary([[item[index]] for index in train], 2)
    words = vocabulary([tags[index] for index in train], 1)
    assert table.sparse["item"].tolist() == [items.get(value, 1) if value else 0 for value in item]
    assert lists(table.ragged["tags"]) == [[words.get(value, 1) for value in cell if value] for cell in tags]
    assert lists(table.ragged["history"]) == [[items.get(value, 1) for value in cell if value][-3:] for cell in history]
    known = [price[index] for index in train if price[index] is not None]
    mean = statistics.fmean(known) if known else 0.0
    deviation = statistics.pstdev(known) if len(set(known)) > 1 else 1.0
    expected = [[0.0, 1.0] if value is None else [(value - mean) / deviation, 0.0] for value in price]
    torch.testing.assert_close(table.dense, torch.tensor(expected).clamp(-1e4, 1e4), rtol=1e-4, atol=1e-4)


def test_weights_and_groups_come_with_labels_and_unknown_groups_stay_apart():
    schema = Schema.from_dict(
        {
            "label": "y",
            "scenario": "land",
            "weight": "w",
            "group": "user",
            "features": {"user": {"kind": "sparse", "min_count": 2}},
        }
    )
    columns = {"y": [0, 1, 1, 0], "land": ["a"] * 4, "w": [0.1, 2.0, 0.0, 1.0], "user": ["u", "u", "v", "w"]}
    frame = pl.DataFrame(columns).cast({"y": pl.UInt8})
    encoder = Learner(schema).add(frame).encoder()
    table = encoder.encode(frame)
    assert table.weight.dtype == torch.float32
    assert table.weight.tolist() == pytest.approx(columns["w"])
    assert table.group.dtype == torch.int64
    first, second, third, fourth = table.group.tolist()
    assert first == second
    assert len({first, third, fourth}) == 3  # "v" and "w" are one unknown value to the model
    assert table.sparse["user"].tolist() == [2, 2, 1, 1]
    assert encoder.encode(frame[[3, 2]]).group.tolist() == [fourth, third]  # whatever other rows there are
    unlabelled = encoder.encode(frame.drop("y"))
    assert unlabelled.label is unlabelled.weight is unlabelled.group is None
    # A cell that only scoring sees may be empty.
    assert encoder.encode(frame.drop("y", "w").with_columns(user=pl.lit(None, pl.String))).group is None
