"""The programs in examples/ run, and print what their docstrings say."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCHEMA = """\
label = "bought"
scenario = "shop"

[features.item]
kind = "sparse"
scenario_aware = true
dim = 4

[features.price]
kind = "dense"
"""


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs a program in this process; gives its lines."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_fuse_your_model(example):
    fused, difference, *times = example("fuse_your_model.py", "--rows", 256, "--scenarios", 4, "--rounds", 3)
    assert fused == "fused: towers"
    assert re.fullmatch(r"relative difference: output \S+, gradient \S+", difference)
    assert [line.partition(":")[0] for line in times] == ["forward", "forward and backward"]
    assert all(float(line.rpartition("ratio ")[2]) > 0 for line in times)


def test_train_on_a_table_of_the_users_own(example, tmp_path):
    rows = [f"{(n // 2 + n) % 2},{'ab'[n % 2]},i{n % 5},{n % 7}.5" for n in range(200)]
    (tmp_path / "own.csv").write_text("bought,shop,item,price\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "own.toml").write_text(SCHEMA, encoding="utf-8")
    given = ("--data", tmp_path / "own.csv", "--schema", tmp_path / "own.toml")
    shown = example("train_on_csv.py", *given, "--out", tmp_path / "run", "--epochs", 2)
    heading, *lines = (line.split() for line in shown)
    assert heading == ["scenario", "AUC", "log", "loss", "rows"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert [(line[0], int(line[3])) for line in lines] == [
        (name, scores["rows"]) for name, scores in [*metrics["scenarios"].items(), ("overall", metrics["overall"])]
    ]
    assert [line[0] for line in lines] == ["a", "b", "overall"]


def test_train_on_the_example_data(example, tmp_path):
    wrote, *lines = example("train_on_csv.py", "--out", tmp_path / "run", "--epochs", 1, "--model", "shared_bottom")
    assert wrote == f"wrote {tmp_path}/run-data/synthetic.csv and {tmp_path}/run-data/synthetic.toml"
    assert [line.split()[0] for line in lines] == ["scenario", "s0", "s1", "s2", "s3", "overall"]


def test_a_table_without_its_schema_is_refused(example, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        example("train_on_csv.py", "--data", "own.csv", "--out", tmp_path / "run")
    assert stop.value.code == 2
    assert "--data and --schema belong together" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
