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


files = pytest.importorskip("scale_files")
step = pytest.importorskip("step")
table_accuracy = pytest.importorskip("table_accuracy")


def read(module):
    return json.loads(module.RESULT.read_text(encoding="utf-8")), module.PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_committed_memory_rates_and_processes():
    record, text = read(files)
    filled = {"sizes": files.sizes_table(record) + "\n", "processes": files.processes_table(record) + "\n"}
    assert files.page.fill(text, filled) == text
    smallest, *_, largest = record["sizes"]
    assert (smallest["rows"], largest["rows"]) == (100_000, 8_000_000)
    assert largest["saml_rec"]["peak_bytes"] - smallest["saml_rec"]["peak_bytes"] <= 1.5 * 2**30
    smallest, *_, largest = record["predict"]["sizes"]
    assert (smallest["rows"], largest["rows"]) == (100_000, 8_000_000)
    assert largest["peak_bytes"] - smallest["peak_bytes"] <= 0.5 * 2**30
    one, two = (record["processes"][name][0] for name in ("one", "two"))
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)


def test_the_page_has_the_committed_step_and_accuracy():
    record, text = read(step)
    assert step.page.fill(text, {"step": step.sentence(record) + "\n"}) == text
    assert record["ratio"]["median"] >= 1.5
    record, text = read(table_accuracy)
    assert table_accuracy.page.fill(text, {"accuracy": table_accuracy.table(record) + "\n"}) == text


def test_the_peer_reads_the_same_rows(tmp_path):
    from saml_rec.data import prepare, write_synthetic
    from saml_rec.data.schema import load_schema

    data, schema, _ = write_synthetic(tmp_path, rows=3000)
    told, seconds, peak = files.run([files.sys.executable, str(files.PEER), str(data), str(schema), "256", "60"])
    found = json.loads(told)
    assert found["rows"] == found["train_rows"] == len(prepare(data, load_schema(schema), seed=0).tables["train"])
    assert 0 < found["seconds"] < seconds
    assert peak > 2**27


def test_the_first_rows_of_a_table(tmp_path):
    (tmp_path / "all.csv").write_text("a\n1\n2\n3\n", encoding="utf-8")
    assert files.first_rows(tmp_path / "all.csv", 2, tmp_path / "part.csv").read_text() == "a\n1\n2\n"
