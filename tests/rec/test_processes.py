"""Training in several processes: the curve of one, shares of every size, kills, other numbers of processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import evaluate, predict
from saml_rec.models import tables
from saml_rec.models.tables import TableOptions, resolve_engine
from saml_rec.processes import ALONE, Processes
from saml_rec.training import TrainOptions

CPU = torch.device("cpu")
# As saml-rec, with small blocks, and a process that kills itself before a step if it is asked to.
DRIVER = """
import os, signal, sys
from saml_rec.cli import main
from saml_rec.data import order, preparation, readers, stored
if os.environ.get("TINY"):
    readers.CHUNK_ROWS, preparation.MEMORY_ROWS, stored.SHARD_ROWS = 450, 100, 128
    for module in (order, stored):
        module.BLOCK_ROWS, module.LANES, module.WINDOW_ROWS = 32, 16, 512
    stored.ROWS_PER_BLOCK = 64
if os.environ.get("KILLED", "none") == os.environ.get("RANK"):
    from saml_rec.training.optimizers import Optimizers
    step, left = Optimizers.step, [int(os.environ["STEPS"])]
    def counted(self):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)
    Optimizers.step = counted
main(prog_name="saml-rec")
"""


@pytest.fixture
def launch(tmp_path):
    """saml-rec in so many processes, by torchrun if there are several."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")

    def run(processes, *arguments, **environment):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(driver), *map(str, arguments)]
        values = {"OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **values}
        )

    return run


@pytest.fixture
def arguments(dataset_of, tmp_path):
    """Of train: 1,601 training rows, batches of 97, neither a multiple of anything."""
    dataset = dataset_of(rows=2001)
    given = ["train", "--data", dataset.data, "--schema", dataset.schema, "--cache", tmp_path / "cache"]
    return [*given, "--epochs", 2, "--batch-size", 97, "--hidden-dims", "8,4", "--dropout", 0]


def history(out):
    return json.loads((out / "history.json").read_text())


def losses(out):
    return [value for entry in history(out) for value in (entry["train_loss"], entry["valid"]["logloss"])]


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


def assert_same_run(out, one):
    np.testing.assert_allclose(losses(out), losses(one), rtol=2e-5)
    for place in ("overall", "valid"):
        assert metrics(out)[place]["rows"] == metrics(one)[place]["rows"]
        np.testing.assert_allclose(metrics(out)[place]["logloss"], metrics(one)[place]["logloss"], rtol=2e-5)
        np.testing.assert_allclose(metrics(out)[place]["auc"], metrics(one)[place]["auc"], atol=2e-4)


def test_two_processes_have_the_curve_of_one_and_leave_the_same_run(launch, arguments, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(1, *arguments, "--out", one).returncode == 0
    done = launch(2, *arguments, "--out", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == 1
    assert "2 processes" in done.stdout
    assert_same_run(two, one)
    assert metrics(two)["processes"] == 2
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    # Read without torchrun.
    assert evaluate(two)["overall"] == pytest.approx(metrics(two)["overall"], rel=1e-6)
    np.testing.assert_allclose(
        predict(two, arguments[2])["prediction"], predict(one, arguments[2])["prediction"], rtol=1e-3
    )


def test_weights_of_two_processes_are_those_of_one(launch, weighted_rows, tmp_path):
    dataset = weighted_rows(801)
    # Batches of four rows, so that a process often has a part of weight 0, and sometimes all have.
    given = ["train", "--data", dataset.data, "--schema", dataset.schema, "--epochs", 1, "--batch-size", 4]
    given += ["--hidden-dims", "8,4", "--dropout", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(1, *given, "--out", one).returncode == 0
    done = launch(2, *given, "--out", two)
    assert done.returncode == 0, done.stderr
    assert_same_run(two, one)
    for metric in ("gauc", "pr_auc", "normalised_entropy"):
        assert metrics(two)["overall"][metric] == pytest.approx(metrics(one)["overall"][metric], abs=2e-4)
    weights = [torch.load(out / "model.pt")["weights"] for out in (one, two)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_sharded_tables_and_shards_of_unequal_size(launch, arguments, tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    assert launch(1, *arguments, "--tables", "fbgemm", "--out", one, TINY=1).returncode == 0
    done = launch(3, *arguments, "--tables", "torchrec", "--out", three, TINY=1)
    assert done.returncode == 0, done.stderr
    assert "tables: torchrec, rowwise_adagrad with learning rate 0.02" in done.stdout
    assert_same_run(three, one)
    weights = [torch.load(out / "model.pt")["weights"] for out in (one, three)]
    assert [*weights[0]] == [*weights[1]]
    for name, tensor in weights[0].items():
        # Sums in another order, divided by roots of small sums of squares, step after step.
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "then"), [(1, 1), (0, 3)])
def test_a_killed_process_ends_the_job_in_one_line_and_it_goes_on_with_others(launch, arguments, tmp_path, rank, then):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert launch(1, *arguments, "--out", whole, TINY=1).returncode == 0
    step = int(np.random.default_rng().integers(1, 33))
    more = ["--checkpoint-steps", 4, "--out", out]
    killed = launch(2, *arguments, *more, TINY=1, KILLED=rank, STEPS=step)
    assert killed.returncode != 0
    (line,) = [line for line in killed.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: process {1 - rank} of 2: another process of the job failed or was ended; start")
    assert "saml_rec" not in killed.stderr.replace(line, "")
    assert not (out / "metrics.json").exists()
    again = launch(then, *arguments, *more, "--resume", TINY=1)
    assert again.returncode == 0, again.stderr
    # Epochs have 17 steps, and each counts its own up to the next checkpoint.
    epochs, steps = divmod(step, 17)
    begun = steps // 4 * 4
    within = f", step {begun} of the next" if begun else ""
    assert f"resuming {out} after epoch {epochs}{within}\n" in again.stdout, (step, again.stdout)
    assert_same_run(out, whole)


def test_what_the_first_process_refuses_is_one_line(launch, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    done = launch(2, *arguments, "--out", tmp_path / "out")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [f"error: {tmp_path / 'out'}: is not empty and holds no run; choose another directory"]


def test_only_training_has_several_processes(saml_rec, finished_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = saml_rec("evaluate", finished_run)
    assert result.exit_code == 2
    assert result.stderr == "error: evaluate runs in one process; start it without torchrun\n"


def test_a_launcher_that_is_not_torchrun(saml_rec, small_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = saml_rec("train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert result.stderr == "error: WORLD_SIZE is set, but not 'RANK'; start several processes with torchrun\n"


TWO = Processes(rank=1, count=2, local_rank=1, machine_count=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "star"},
            "model star normalises by the statistics of a batch, of which each of 2 processes",
        ),
        ({"batch_size": 1}, "batch_size 1 is too small for 2 processes"),
        ({"tables": "sparse"}, "tables of sparse are in one process; in 2 take torchrec, dense or auto"),
        ({"tables": "fbgemm"}, "tables of fbgemm are in one process"),
    ],
)
def test_what_several_processes_cannot_do(options, message):
    with pytest.raises(InputError, match=message):
        TrainOptions(**options).resolved(TWO)


def test_engines_of_one_and_of_several():
    assert resolve_engine("auto", "rowwise_adagrad", 10**6, CPU, TWO) == "torchrec"
    assert resolve_engine("auto", "rowwise_adagrad", 10**5, CPU, TWO) == "dense"
    assert resolve_engine("auto", "rowwise_adagrad", 10**6, CPU, ALONE) == "fbgemm"
    with pytest.raises(InputError, match="tables of torchrec are in several processes, started by torchrun"):
        resolve_engine("torchrec", "rowwise_adagrad", 10, CPU, ALONE)


def test_a_missing_extra_names_the_line(monkeypatch):
    monkeypatch.setattr(tables, "has_torchrec", lambda: False)
    with pytest.raises(InputError, match=r"tables in several processes need torchrec: pip install --no-deps 'torchrec"):
        TableOptions("torchrec")
    monkeypatch.setattr(tables, "has_fbgemm", lambda: False)
    with pytest.raises(InputError, match=r"tables of torchrec need fbgemm-gpu-cpu: pip install 'fbgemm-gpu-cpu"):
        TableOptions("torchrec")


def test_learning_rates_of_single_tables(small_dataset, tmp_path, saml_rec):
    schema = load_schema(small_dataset.schema)
    TrainOptions(table_learning_rates={"user": 0.1}).check_features(schema)
    for name, message in (
        ("usr", "'usr'; did you mean 'user'"),
        ("age", "'age': features with a table are user, item"),
    ):
        with pytest.raises(InputError, match=message):
            TrainOptions(table_learning_rates={name: 0.1}).check_features(schema)
    given = [
        "train",
        "--data",
        small_dataset.data,
        "--schema",
        small_dataset.schema,
        "--epochs",
        1,
        "--hidden-dims",
        "8",
    ]
    found = []
    for number, engine in enumerate(("sparse", "fbgemm", "sparse")):
        out = tmp_path / str(number)
        rates = ["--table-lr", 0.05, "--table-lr", "user=0.4"] if number < 2 else ["--table-lr", 0.05]
        assert saml_rec(*given, "--out", out, "--tables", engine, *rates).exit_code == 0
        found.append(torch.load(out / "model.pt")["weights"]["features.embeddings.feature_user.table.weight"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 0.1
    for bad, message in (("user=x", "'x' is not a valid float"), ("=1", "is not of the form FEATURE=X")):
        assert message in saml_rec(*given, "--out", tmp_path / "bad", "--table-lr", bad).output
