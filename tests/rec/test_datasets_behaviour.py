"""A row's history holds what its user liked strictly before it, and nothing of the row itself."""

import numpy as np
import polars as pl
import pytest

from saml_rec.datasets.behaviour import add_behaviour_sequence


def histories(log, last=50):
    with_history = add_behaviour_sequence(log, user="u", item="i", time="t", label="y", last=last)
    assert with_history.drop("history").equals(log)
    return with_history["history"].to_list()


def test_an_example():
    log = pl.DataFrame(
        {
            "u": ["a", "b", "a", "a", "a", "a", "b"],
            "i": ["x", "x", "y", "z", "w", "v", "x"],
            "t": [1, 1, 2, 3, 3, 4, 9],
            "y": [1, 0, 0, 1, 1, 1, 1],
        }
    )
    assert histories(log) == [[], [], ["x"], ["x"], ["x"], ["x", "z", "w"], []]
    assert histories(log, last=1) == [[], [], ["x"], ["x"], ["x"], ["w"], []]
    reversed_log = log.reverse()
    assert histories(reversed_log) == [[], ["x", "w", "z"], ["x"], ["x"], ["x"], [], []]


def test_nobody_liked_anything():
    log = pl.DataFrame({"u": ["a", "a"], "i": ["x", "y"], "t": [1, 2], "y": [0, 0]})
    assert histories(log) == [[], []]


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_search_through_the_log(seed):
    rng = np.random.default_rng(seed)
    n = 300
    log = pl.DataFrame(
        {
            "u": rng.integers(0, 8, n),
            "i": [f"i{item}" for item in rng.integers(0, 30, n)],
            "t": rng.integers(0, 60, n),
            "y": rng.integers(0, 2, n),
        }
    )
    rows = log.rows(named=True)
    expected = [
        [
            other["i"]
            for other in sorted(rows, key=lambda other: other["t"])
            if other["u"] == row["u"] and other["y"] == 1 and other["t"] < row["t"]
        ][-5:]
        for row in rows
    ]
    assert histories(log, last=5) == expected


def test_the_own_label_and_later_rows_do_not_show():
    rng = np.random.default_rng(0)
    log = pl.DataFrame(
        {"u": [0] * 50, "i": [f"i{row}" for row in range(50)], "t": np.arange(50) // 2, "y": rng.integers(0, 2, 50)}
    )
    other_future = log.with_columns(y=pl.when(pl.col("t") >= 10).then(1 - pl.col("y")).otherwise("y"))
    until = pl.col("t") <= 10
    for row, (before, after) in enumerate(zip(histories(log), histories(other_future), strict=True)):
        if log.filter(until).height > row:
            assert before == after
