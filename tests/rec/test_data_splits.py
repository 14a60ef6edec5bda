"""Splits by time, by seed and by column."""

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saml_rec.data.cells import conform
from saml_rec.data.schema import Schema
from saml_rec.data.splits import split_rows
from saml_rec.errors import InputError


def schema(**roles):
    return Schema.from_dict({"label": "y", "scenario": "s", "features": {"s": {"kind": "sparse"}}} | roles)


def frame_of(the_schema, **columns):
    rows = len(next(iter(columns.values())))
    good = {"y": [(row + row // 2) % 2 for row in range(rows)], "s": ["a"] * rows}
    return conform(pl.DataFrame(good | columns), the_schema)


def as_lists(splits):
    assert all(rows.dtype == np.int64 for rows in splits.values())
    return {name: rows.tolist() for name, rows in splits.items()}


def test_by_time_the_oldest_train():
    by_time = schema(time="t", split=[0.5, 0.25, 0.25])
    frame = frame_of(by_time, t=[70, 10, 60, 20, 50, 30, 80, 40])
    assert as_lists(split_rows(frame, by_time, seed=3)) == {"train": [1, 3, 5, 7], "valid": [2, 4], "test": [0, 6]}


@pytest.mark.parametrize(
    ("times", "sizes"),
    [
        ([1, 2, 3, 4, 4, 4, 5, 6], (6, 0, 2)),
        ([1, 1, 1, 1, 2, 3, 3, 4], (4, 3, 1)),
        ([1, 2, 3, 4, 5, 5, 6, 6], (4, 2, 2)),
        ([1, 1, 1, 1, 1, 1, 1, 2], (7, 0, 1)),
    ],
)
def test_rows_of_one_time_stay_together_in_the_earlier_split(times, sizes):
    by_time = schema(time="t", split=[0.5, 0.25, 0.25])
    frame = frame_of(by_time, t=times)
    if 0 in sizes:
        shown = " / ".join(map(str, sizes))
        with pytest.raises(InputError, match=f"rows of one time staying together, leaves no valid rows: 8 .* {shown}"):
            split_rows(frame, by_time, seed=0)
    else:
        assert tuple(len(rows) for rows in split_rows(frame, by_time, seed=0).values()) == sizes


def test_dates_are_times():
    by_time = schema(time="t", split=[0.5, 0.25, 0.25])
    times = ["2024-03-01", "2024-01-01", "2024-02-01T00:00+01:00", "2024-01-31T23:30"]
    assert as_lists(split_rows(frame_of(by_time, t=times, y=[0, 0, 1, 0]), by_time, seed=0)) == {
        "train": [1, 2],
        "valid": [3],
        "test": [0],
    }


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0, 0.5), (1, 0, 0)])
)
def test_splits_by_time_partition_the_rows_and_never_share_a_time(times, fractions):
    by_time = schema(time="t", split=list(fractions))
    frame = frame_of(by_time, t=times)
    try:
        splits = split_rows(frame, by_time, seed=0)
    except InputError:
        return
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(len(times)))
    parts = [{times[row] for row in rows} for rows in splits.values() if len(rows)]
    for earlier, later in itertools.pairwise(parts):
        assert max(earlier) < min(later)


def test_at_random_the_seed_decides():
    at_random = schema()
    frame = frame_of(at_random, t=range(1000))
    splits = split_rows(frame, at_random, seed=1)
    assert [len(rows) for rows in splits.values()] == [800, 100, 100]
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(1000))
    assert all((np.diff(rows) > 0).all() for rows in splits.values())
    assert as_lists(split_rows(frame, at_random, seed=1)) == as_lists(splits)
    assert as_lists(split_rows(frame, at_random, seed=2)) != as_lists(splits)


def test_a_split_of_fraction_0_is_empty():
    everything = schema(split=[1.0, 0.0, 0.0])
    splits = split_rows(frame_of(everything, t=range(10)), everything, seed=0)
    assert as_lists(splits) == {"train": list(range(10)), "valid": [], "test": []}


def test_by_column():
    by_column = schema(split_column="part")
    frame = frame_of(by_column, part=["train", "test", "train", "test"], y=[0, 1, 0, 1])
    with pytest.raises(InputError, match="all 2 training rows have label 0 in column 'y'"):
        split_rows(frame, by_column, seed=0)
    frame = frame_of(by_column, part=["train", "train", "test", "test"], y=[0, 1, 0, 1])
    assert as_lists(split_rows(frame, by_column, seed=0)) == {"train": [0, 1], "valid": [], "test": [2, 3]}
    with pytest.raises(InputError, match="split column 'part': no row is train"):
        split_rows(frame_of(by_column, part=["valid", "test"]), by_column, seed=0)


def test_too_few_rows():
    with pytest.raises(InputError, match=r"leaves no test rows: 3 rows become 2 / 1 / 0 \(train / valid / test\)"):
        split_rows(frame_of(schema(), t=range(3)), schema(), seed=0)


def test_one_label_only():
    frame = frame_of(schema(), y=[1] * 20)
    with pytest.raises(InputError, match="all 16 training rows have label 1 in column 'y'; training needs"):
        split_rows(frame, schema(), seed=0)
