"""The benchmark of steps as tables grow: what it measures, and that the page has the committed figures."""

import json

import pytest

scale = pytest.importorskip("scale")


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_every_size_is_timed_beside_the_smallest(engine):
    found = scale.measure(engine, (50, 400), budget=0.01)
    assert [(row["engine"], row["V"]) for row in found] == [(engine, 50), (engine, 400)]
    assert found[0]["ratio"] == 1
    assert all(row["p20"] <= row["median"] <= row["p80"] and row["rounds"] >= 5 for row in found)


def test_memory_of_dense_tables_has_gradients_and_both_moments():
    assert scale.memory_of("dense", 1000) == 4 * 2 * 9 * 1000 * 16 * 4
    assert scale.memory_of("fbgemm", 1000) == 2 * 9 * 1000 * (16 + 1) * 4


def test_the_page_has_the_committed_figures():
    record = json.loads(scale.RESULT.read_text(encoding="utf-8"))
    text = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page.fill(text, {"steps": scale.table(record) + "\n"}) == text
    assert {row["V"] for row in record["steps"] if row["engine"] == "fbgemm"} == {*scale.SIZES, scale.LARGEST}
