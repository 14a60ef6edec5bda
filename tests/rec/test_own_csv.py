"""A table of the user's own, from the command line: many scripts, quoted cells, a scenario with 0.5 % of the rows."""

import csv
import json
import random

import polars
import pytest

from saml_rec.training import loop as training

ROWS = 2000
# 青少年 has 10 of the rows.
SCENARIOS = {"مصر": 900, "日本, 東京": 500, "Türkiye": 400, 'a "b"': 190, "青少年": 10}
ITEMS = ["茶", "قهوة", "🍕, 大", "👩‍👩‍👧", "two\nlines", "ñandú", '5" disc', " 007", "007", "NaN"]
SCHEMA = """\
label = "喜欢"
scenario = "Land"

[features."товар"]
kind = "sparse"
scenario_aware = true
dim = 8

[features."👤"]
kind = "sparse"
dim = 4

[features.tags]
kind = "multi"
separator = ";"
dim = 4

[features.price]
kind = "dense"

[features.history]
kind = "sequence"
item = "товар"
max_length = 4
"""
HEADER = ["喜欢", "Land", "товар", "👤", "tags", "price", "history", "note, free"]
ARGUMENTS = ("--epochs", 3, "--patience", 0, "--batch-size", 128, "--hidden-dims", "8,4", "--lr", 0.01)


def make_rows():
    draw = random.Random(0)
    scenarios = [name for name, count in SCENARIOS.items() for _ in range(count)]
    draw.shuffle(scenarios)
    taste = {(name, item): draw.random() < 0.5 for name in SCENARIOS for item in ITEMS}
    for scenario in scenarios:
        item = draw.choice(ITEMS)
        yield [
            str(int(taste[scenario, item] != (draw.random() < 0.1))),
            scenario,
            item,
            draw.choice(["zoë", "ß", "", "\u202eעברית"]),
            ";".join(draw.sample(["🙂", "红,色", "x y"], draw.randrange(4))),
            draw.choice(["5", "5.0", "-1e3", "", "NaN"]),
            "|".join(draw.choices(ITEMS, k=draw.randrange(6))),
            draw.choice(["", "a, b", "007"]),
        ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("数据 data")
    rows = list(make_rows())
    with (directory / "мои.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    (directory / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    return directory / "мои.csv", directory / "schema.toml", rows


def test_train_evaluate_predict_and_resume(saml_rec, files, tmp_path, monkeypatch):
    data, schema, rows = files
    run, interrupted = tmp_path / "run ①", tmp_path / "interrupted"

    def train(out, *flags):
        return saml_rec("train", "--data", data, "--schema", schema, "--out", out, *ARGUMENTS, *flags)

    result = train(run)
    assert result.exit_code == 0, result.output
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics["scenarios"]) == set(SCENARIOS)
    assert all(name in result.stdout for name in SCENARIOS)
    assert metrics["data"]["rows"] == {"train": 1600, "valid": 200, "test": 200}
    assert metrics["overall"]["auc"] > 0.7

    assert saml_rec("evaluate", run).exit_code == 0
    assert saml_rec("evaluate", run, "--data", data).exit_code == 0
    measured = json.loads((run / "evaluation-test.json").read_text(encoding="utf-8"))
    assert (measured["overall"], measured["scenarios"]) == (metrics["overall"], metrics["scenarios"])
    everything = json.loads((run / "evaluation-мои.csv.json").read_text(encoding="utf-8"))
    assert {name: scores["rows"] for name, scores in everything["scenarios"].items()} == SCENARIOS

    assert saml_rec("predict", run, "--data", data, "--out", tmp_path / "预测.csv").exit_code == 0
    assert saml_rec("predict", run, "--data", data, "--out", tmp_path / "预测.parquet").exit_code == 0
    with (tmp_path / "预测.csv").open(encoding="utf-8", newline="") as file:
        first, *others = csv.reader(file)
    assert first == [*HEADER, "prediction"]
    assert [row[:-1] for row in others] == rows
    predictions = polars.read_parquet(tmp_path / "预测.parquet")["prediction"]
    assert [float(row[-1]) for row in others] == predictions.to_list()

    run_epoch = training._run_epoch

    def stop_in_second(state, *arguments):
        if state.history:
            raise KeyboardInterrupt
        return run_epoch(state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_run_epoch", stop_in_second)
        assert train(interrupted).exit_code == 130
    result = train(interrupted, "--resume")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"resuming {interrupted} after epoch 1\n")
    resumed = json.loads((interrupted / "metrics.json").read_text(encoding="utf-8"))
    assert {**resumed, "timing": None} == {**metrics, "timing": None}
