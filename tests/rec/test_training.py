import dataclasses
import json
import math
import signal
import subprocess
import sys
from collections import namedtuple

import numpy as np
import polars
import pytest
import torch
from torch import nn

from saml_rec import models
from saml_rec.data import prepare, read_table, split_rows
from saml_rec.data.schema import Schema, load_schema
from saml_rec.errors import InputError
from saml_rec.evaluation.metrics import LabelledRows, score_rows
from saml_rec.evaluation.scoring import evaluate, load_trained
from saml_rec.models.construction import build_model
from saml_rec.models.registry import hyperparameters, is_fitted
from saml_rec.sealed import load, save
from saml_rec.training import TrainOptions, best_epoch, is_cut_off, loop, stopped_by, train, train_and_validate

SMALL = TrainOptions(epochs=3, batch_size=64, patience=0, model_options={"hidden_dims": (8, 4), "dropout": 0.2})

# Trains in a process that sends itself a signal: at an optimizer step or before a file reaches the disk.
INTERRUPTED = """
import os, signal, sys, torch
from saml_rec import cli
site, count, number, *arguments = sys.argv[1:]
calls = 0
def interrupting(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(count):
            os.kill(os.getpid(), int(number))
        return function(*args, **kwargs)
    return call
torch.set_num_threads(1)
if site == "step":
    torch.optim.AdamW.step = interrupting(torch.optim.AdamW.step)
else:
    os.fsync = interrupting(os.fsync)
cli.main(arguments, prog_name="saml-rec")
"""
ARGUMENTS = ("--epochs", 4, "--batch-size", 64, "--patience", 0, "--hidden-dims", "8,4", "--dropout", 0.2)


class Output(namedtuple("Output", "logit")):
    pass


class Scripted(nn.Module):
    """One number as the logit of every row; subclasses say how its loss moves it."""

    def __init__(self, schema, num_scenarios, *, vocabulary_sizes):
        super().__init__()
        self.number = nn.Parameter(torch.zeros(()))
        self.steps = 0

    def forward(self, batch):
        return Output(self.number.expand(len(batch["scenario"])))

    def loss(self, batch):
        self.steps += 1
        return self.number.square()


class Worsening(Scripted):
    """Moves away from the log loss's minimum by one learning rate a step."""

    def loss(self, batch):
        return -self.number


class NotFinite(Scripted):
    """Its loss is not a number at step 12, counted over all epochs."""

    def loss(self, batch):
        return super().loss(batch) * (math.nan if self.steps == 12 else 1)


class Exploding(Scripted):
    """Its loss is 0 always, and at step BROKEN, counted over all epochs, a weight that no score reads becomes NaN."""

    BROKEN = 10

    def __init__(self, schema, num_scenarios, *, vocabulary_sizes):
        super().__init__(schema, num_scenarios, vocabulary_sizes=vocabulary_sizes)
        self.hidden = nn.Parameter(torch.zeros(()))

    def loss(self, batch):
        loss = super().loss(batch) * 0
        return (self.hidden - self.hidden.detach()).sqrt() if self.steps == self.BROKEN else loss


class Overflowing(Scripted):
    def forward(self, batch):
        return Output(super().forward(batch).logit + math.inf)


@pytest.fixture
def scripted(monkeypatch):
    """Makes the scripted models known by name."""
    for model in (Scripted, Worsening, NotFinite, Exploding, Overflowing):
        monkeypatch.setitem(models.MODELS, model.__name__, model)


@pytest.fixture(scope="module")
def schema(small_dataset):
    return load_schema(small_dataset.schema)


@pytest.fixture(scope="module")
def data(small_dataset, schema):
    return prepare(small_dataset.data, schema, seed=0)


def results(out):
    """What a run came to, without what a clock decides."""
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    history = json.loads((out / "history.json").read_text(encoding="utf-8"))
    timing = [metrics.pop("timing"), *(entry.pop(name) for entry in history for name in ("seconds", "rows_per_second"))]
    assert timing
    return metrics, history


def assert_same_run(first, second):
    assert results(first) == results(second)
    weights = [load(out / "model.pt", "model")["weights"] for out in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("model", models.MODELS)
def test_run_leaves_its_files(data, schema, model, tmp_path):
    fitted = is_fitted(model)
    options = dataclasses.replace(SMALL, model=model, model_options={} if fitted else SMALL.model_options)
    result = train(data, schema, options, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("checkpoint.pt", "model.pt", "model.safetensors", "history.json", "model_card.md", "metrics.json")
    }
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == result.metrics
    assert json.loads((tmp_path / "history.json").read_text(encoding="utf-8")) == result.history
    assert metrics["model"] == model
    assert metrics["split"] == "test"
    assert set(metrics["scenarios"]) == {"de", "fr", "[it]"}
    assert sum(scores["rows"] for scores in metrics["scenarios"].values()) == metrics["overall"]["rows"] == 40
    assert metrics["data"]["rows"] == {"train": 320, "valid": 40, "test": 40}
    weights = load(tmp_path / "model.pt", "model")["weights"]
    # Moving statistics are no parameters.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    parameters = [tensor for name, tensor in weights.items() if not name.endswith(statistics)]
    assert model == "lightgbm" or metrics["parameters"] == sum(tensor.numel() for tensor in parameters)
    assert metrics["parameters"] > 0
    assert set(metrics["backend"].values()) <= {"reference", "cpp", "triton"}
    assert bool(metrics["backend"]) == ("backend" in hyperparameters(model))
    assert [entry["epoch"] for entry in result.history] == ([1] if fitted else [1, 2, 3])
    assert metrics["stopped_by"] == ("fit" if fitted else "epochs")
    assert (metrics["tables"] is None) == (metrics["fitted"] is not None) == fitted
    assert metrics["valid"] == result.history[metrics["best_epoch"] - 1]["valid"]
    assert metrics["timing"]["rows_per_second"] * metrics["timing"]["seconds_per_epoch"] == pytest.approx(320)


def test_training_learns(data, schema, tmp_path):
    model_options = {"hidden_dims": (16, 8), "branch_init": "independent", "scenario_dim": 0}
    options = dataclasses.replace(SMALL, epochs=15, learning_rate=0.02, weight_decay=0.0)
    options = dataclasses.replace(options, scenario_rate=1.0, scenario_decay=0.0, model_options=model_options)
    result = train(data, schema, options, tmp_path)
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert result.metrics["overall"]["auc"] > 0.8


def test_seed_decides_everything(data, schema, tmp_path):
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    train(data, schema, SMALL, first)
    torch.manual_seed(123)
    train(data, schema, SMALL, second)
    train(data, schema, dataclasses.replace(SMALL, seed=1), other)
    assert_same_run(first, second)
    assert results(first)[1] != results(other)[1]


def test_validation_alone_is_the_training_of_a_run_without_its_test_rows(data, schema, tmp_path, monkeypatch):
    run = train(data, schema, SMALL, tmp_path / "run")
    asked = []
    measure = loop.overall_of

    def noting(model, table, *rest):
        asked.append(table)
        return measure(model, table, *rest)

    monkeypatch.setattr(loop, "overall_of", noting)
    history = train_and_validate(data, schema, SMALL)
    assert [entry["valid"] for entry in history] == [entry["valid"] for entry in run.history]
    assert len(asked) == 3
    assert all(table is data.tables["valid"] for table in asked)


def test_random_numbers_of_the_caller_are_left_alone(data, schema, tmp_path):
    before = torch.get_rng_state()
    train(data, schema, dataclasses.replace(SMALL, epochs=1), tmp_path)
    load_trained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (3, 4), (0, 6)])
def test_stops_after_patience_and_keeps_the_best_weights(data, schema, patience, epochs, tmp_path):
    options = TrainOptions(model="Worsening", epochs=6, batch_size=320, patience=patience, learning_rate=0.5)
    options = dataclasses.replace(options, weight_decay=0)
    result = train(data, schema, options, tmp_path)
    assert len(result.history) == epochs
    assert result.metrics["best_epoch"] == 1
    assert result.metrics["stopped_by"] == ("epochs" if epochs == 6 else "patience")
    assert load(tmp_path / "model.pt", "model")["weights"]["number"] == pytest.approx(0.5)
    assert load(tmp_path / "checkpoint.pt", "checkpoint")["weights"]["number"] == pytest.approx(0.5 * epochs)
    assert result.metrics["overall"]["logloss"] == pytest.approx(
        np.mean([math.log1p(math.exp(-0.5 if label else 0.5)) for label in data.tables["test"].label.tolist()])
    )


HISTORIES = {
    "still better at the cap": ([3, 2, 1], "epochs", True),
    "cap reached after the best": ([3, 1, 2], "epochs", False),
    "patience and cap at once": ([1, 2, 3], "patience", False),
    "patience": ([1, 2, 2], "patience", False),
    "not at its end": ([3, 2], None, False),
    "no validation rows": ([None, None, None], "epochs", False),
}


@pytest.mark.parametrize(("losses", "stopped", "cut_off"), HISTORIES.values(), ids=HISTORIES)
def test_what_ends_training(losses, stopped, cut_off):
    history, options = [{"valid": {"logloss": loss}} for loss in losses], TrainOptions(epochs=3, patience=2)
    assert stopped_by(history, options) == stopped
    assert is_cut_off(history, options) == cut_off


def test_a_run_that_could_go_on_says_so(small_dataset, saml_rec, tmp_path):
    command = ["train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "run"]
    result = saml_rec(*command, "--epochs", 2, "--lr", 0.0001, "--hidden-dims", "8,4", "--scenario-decay", 0)
    assert "the last of 2 epochs was the best one: more may be better\n" in result.output
    result = saml_rec(*command, "--overwrite", "--epochs", 20, "--patience", 1, "--lr", 0.5, "--hidden-dims", "8,4")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["stopped_by"] == "patience"
    assert "more may be better" not in result.output


@pytest.mark.parametrize(
    ("losses", "best"), [([3, 2, 1], 3), ([2, 1, 1], 2), ([1, 2, 3], 1), ([None, None], 2), ([], 0)]
)
def test_best_epoch_is_the_first_of_the_lowest_losses(losses, best):
    assert best_epoch([{"valid": {"logloss": loss}} for loss in losses]) == best


@pytest.mark.usefixtures("scripted")
def test_loss_that_is_not_finite_names_epoch_and_step(data, schema, tmp_path):
    options = TrainOptions(model="NotFinite", epochs=4, batch_size=64)
    # 320 rows are 5 steps an epoch.
    with pytest.raises(InputError, match=r"^the loss is nan at epoch 3, step 2; try a lower learning rate$"):
        train(data, schema, options, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt"}
    assert len(load(tmp_path / "checkpoint.pt", "checkpoint")["history"]) == 2


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize(("broken", "epoch", "step", "kept"), [(10, 2, 5, 1), (8, 2, 3, 1), (20, 4, 5, 3)])
@pytest.mark.parametrize("every", [None, 1])
def test_weights_that_are_not_finite_are_never_saved(
    data, schema, tmp_path, monkeypatch, broken, epoch, step, kept, every
):
    """Also after the last step of all, and where neither loss nor scores show them."""
    monkeypatch.setattr(Exploding, "BROKEN", broken)
    options, times = TrainOptions(model="Exploding", epochs=4, batch_size=64, patience=0), loop.CheckpointTimes(every)
    seen = step if every else 5
    message = (
        f"^a weight or its optimizer's state is not finite at epoch {epoch}, step {seen}, in hidden; try a lower le"
    )
    with pytest.raises(InputError, match=message):
        train(data, schema, options, tmp_path, checkpoints=times)
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt"}
    saved = load(tmp_path / "checkpoint.pt", "checkpoint")
    assert len(saved["history"]) == kept
    assert saved["weights"]["hidden"].isfinite()
    assert (saved["begun"] is None) == (every is None or step == 1)
    # The last good one can be gone on from.
    monkeypatch.setattr(Exploding, "BROKEN", 0)
    assert len(train(data, schema, options, tmp_path, resume=True).history) == 4


@pytest.mark.usefixtures("scripted")
def test_weights_that_are_not_finite_fail_without_a_run_too(data, schema):
    with pytest.raises(InputError, match="is not finite at epoch 2, step 5, in hidden"):
        train_and_validate(data, schema, TrainOptions(model="Exploding", epochs=4, batch_size=64))


def test_state_that_is_not_finite_is_found_in_every_optimizer(data, schema, tmp_path, monkeypatch):
    for tables, table_optimizer in (("dense", "rowwise_adagrad"), ("sparse", "rowwise_adagrad"), ("sparse", "adam")):
        options = dataclasses.replace(SMALL, epochs=1, tables=tables, table_optimizer=table_optimizer)
        names = []
        monkeypatch.setattr(loop, "not_finite", lambda found, names=names: names.extend(found))
        train_and_validate(data, schema, options)
        monkeypatch.undo()
        table = "features.embeddings.feature_user.table"
        state = "exp_avg of" if table_optimizer == "adam" or tables == "dense" else "squares of"
        assert f"{table}.weight" in names
        assert {f"{state} {table}.weight", f"{state} {table}"} & set(names), names


@pytest.mark.usefixtures("scripted")
def test_scores_that_are_not_finite(data, schema, tmp_path):
    with pytest.raises(InputError, match="gives 40 of 40 rows a score that is not finite"):
        train(data, schema, TrainOptions(model="Overflowing"), tmp_path)


@pytest.mark.parametrize(
    ("site", "count"),
    [
        ("step", 13),  # in the third epoch of 5 steps
        ("fsync", 1),  # the first checkpoint, before it replaces anything
        ("fsync", 5),  # the checkpoint of epoch 2: a file and its directory are synchronised for each
        ("fsync", 15),  # metrics.json
    ],
)
def test_killed_run_resumes_to_the_same_results(small_dataset, python, saml_rec, site, count, tmp_path, whole_run):
    out = tmp_path / "killed"
    command = ["train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", out, *ARGUMENTS]
    assert python("-c", INTERRUPTED, site, count, int(signal.SIGKILL), *command).returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    started = (out / "checkpoint.pt").exists()
    assert started == ((site, count) != ("fsync", 1))
    resumed = saml_rec(*command, *(["--resume"] if started else []))
    assert resumed.exit_code == 0, resumed.output
    assert_same_run(out, whole_run)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole_run.iterdir()}


@pytest.fixture(scope="module")
def whole_run(small_dataset, tmp_path_factory):
    """The run of ARGUMENTS without an interruption."""
    from click.testing import CliRunner

    from saml_rec.cli import main

    out = tmp_path_factory.mktemp("whole") / "run"
    command = ["train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", out, *ARGUMENTS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return out


def test_interrupted_run_says_how_to_resume(small_dataset, python, tmp_path):
    out = tmp_path / "run"
    command = ["train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", out, *ARGUMENTS]
    result = python("-c", INTERRUPTED, "step", 7, int(signal.SIGINT), *command)
    assert result.returncode == 130
    assert result.stderr == "interrupted; to continue, repeat the command with --resume\n"


@pytest.fixture
def stopped_run(data, schema, tmp_path, train_one_epoch):
    """A run of SMALL that stopped after its first epoch."""
    return train_one_epoch(data, schema, SMALL, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, "options changed: learning_rate was 0.001, is 0.1"),
        ({"model": "shared_bottom", "model_options": {"hidden_dims": (8, 4)}}, "model was 'saml', is 'shared_bottom'"),
        ({"model_options": {"hidden_dims": (8, 2), "dropout": 0.2}}, r"model_options.hidden_dims\[1\] was 4, is 2"),
    ],
)
def test_resume_refuses_other_options(data, schema, stopped_run, changes, message):
    before = (stopped_run / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=message):
        train(data, schema, dataclasses.replace(SMALL, **changes), stopped_run, resume=True)
    assert (stopped_run / "checkpoint.pt").read_bytes() == before


NUMBER = "features.embeddings.feature_user.table.weight"


def narrow_state(content):
    next(iter(content["optimizer"]["optimizers"]["network"]["state"].values()))["exp_avg"] = torch.ones(2, 7)


CHECKPOINT_DAMAGES = {
    "a tensor is missing": (lambda c: c["weights"].pop(NUMBER), "its parts do not fit together: RuntimeError: Missing"),
    "a tensor is wide": (
        lambda c: c["weights"].update({NUMBER: torch.ones(3, 3)}),
        "its parts do not .* size mismatch",
    ),
    "the best is wide": (
        lambda c: c["best_weights"].update({NUMBER: torch.ones(3)}),
        "weights and best weights differ",
    ),
    "no optimizer": (lambda c: c.pop("optimizer"), "its part optimizer is None"),
    "an empty optimizer": (lambda c: c.update(optimizer={}), "its parts do not fit together: KeyError"),
    "a state is narrow": (narrow_state, r"its parts do not .* exp_avg is \(2, 7\) of"),
    "a history of numbers": (lambda c: c.update(history=[1]), "entry 1 of the history is not as training writes it"),
    "an epoch begun of nothing": (lambda c: c.update(begun={}), "its parts do not fit together: KeyError: 'losses'"),
    "steps that count nothing": (
        lambda c: c.update(begun={"losses": torch.ones(1), "weights": [None], "seconds": 1.0, "random": {}}),
        "the weights of the epoch that was begun must be finite numbers",
    ),
    "no data": (lambda c: c.update(data={}), "cannot resume, the data changed"),
    "an unknown model": (
        lambda c: c["options"].update(model="samml"),
        "cannot resume, options changed: model was 'samml'",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINT_DAMAGES)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused_and_left(data, schema, stopped_run, name):
    change, message = CHECKPOINT_DAMAGES[name]
    path = stopped_run / "checkpoint.pt"
    content = load(path, "checkpoint")
    change(content)
    save(path, "checkpoint", content)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"^{stopped_run}.*: {message}|: is damaged: {message}") as error:
        train(data, schema, SMALL, stopped_run, resume=True)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_resume_takes_options_that_mean_the_same(data, schema, stopped_run):
    options = dataclasses.replace(SMALL, device="cpu", model_options={**SMALL.model_options, "gate": "vector"})
    assert len(train(data, schema, options, stopped_run, resume=True).history) == 3


def test_resume_refuses_another_schema(data, schema, stopped_run):
    mapping = schema.to_dict()
    mapping["features"]["item"]["dim"] = 4
    with pytest.raises(InputError, match=r"schema changed: features.item.dim was 8, is 4"):
        train(data, Schema.from_dict(mapping), SMALL, stopped_run, resume=True)


@pytest.mark.parametrize(("split", "row"), [("train", 0), ("valid", 3), ("test", 39)])
def test_resume_refuses_other_data(small_dataset, data, schema, stopped_run, dataset_of, split, row):
    rows = split_rows(read_table(small_dataset.data, schema), schema, seed=0)
    position = int(rows[split][row])
    frame = small_dataset.frame.with_columns(
        click=polars.Series([1 - y if n == position else y for n, y in enumerate(small_dataset.frame["click"])])
    )
    changed = prepare(dataset_of(frame).data, schema, seed=0)
    with pytest.raises(InputError, match=rf"data changed: {split} rows are not the same"):
        train(changed, schema, SMALL, stopped_run, resume=True)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_two_processes_do_not_train_into_one_directory(data, schema, stopped_run, tmp_path, how):
    """The other process only holds the directory, as long as its standard input is open."""
    pytest.importorskip("fcntl", reason="this system has no such lock")
    out = stopped_run if how else tmp_path / "new"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*")}
    holding = (
        "import sys; from pathlib import Path; from saml_rec.run_directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).held(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is training here"):
            train(data, schema, SMALL, out, **how)
        assert {path: path.stat().st_mtime_ns for path in out.glob("*")} == before
        other.communicate("")
    assert len(train(data, schema, SMALL, out, **how).history) == 3


def test_a_refused_hyperparameter_leaves_no_directory(data, schema, tmp_path):
    options = dataclasses.replace(SMALL, model_options={"hidden_dims": ()})
    with pytest.raises(InputError, match="hidden_dims must name at least one layer"):
        train(data, schema, options, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_resume_of_a_finished_run_leaves_it(data, schema, tmp_path):
    done = train(data, schema, SMALL, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again = train(data, schema, SMALL, tmp_path, resume=True)
    assert again.already_finished
    assert (again.metrics, again.history) == (done.metrics, done.history)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="epochs was 3, is 9"):
        train(data, schema, dataclasses.replace(SMALL, epochs=9), tmp_path, resume=True)


def test_finished_run_needs_no_checkpoint(data, schema, small_dataset, tmp_path):
    train(data, schema, SMALL, tmp_path, data_path=small_dataset.data)
    (tmp_path / "checkpoint.pt").unlink()
    assert evaluate(tmp_path)["overall"]["rows"] == 40
    assert train(data, schema, SMALL, tmp_path, resume=True).already_finished
    with pytest.raises(InputError, match="holds a finished run"):
        train(data, schema, SMALL, tmp_path)


def test_overwrite_starts_anew(data, schema, tmp_path):
    train(data, schema, SMALL, tmp_path)
    result = train(data, schema, dataclasses.replace(SMALL, epochs=1), tmp_path, overwrite=True)
    assert len(result.history) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"patience": -1},
        {"seed": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"weight_decay": -1.0},
        {"weight_decay": math.inf},
    ],
)
def test_options_out_of_range(change):
    (name,) = change
    with pytest.raises(InputError, match=f"^{name} must be at least|^{name} must be above"):
        TrainOptions(**change)


def test_options_of_another_model():
    with pytest.raises(InputError, match="model shared_bottom does not take gate; it takes hidden_dims, tower_dims"):
        TrainOptions(model="shared_bottom", model_options={"gate": "vector"}).resolved()
    with pytest.raises(InputError, match=r"no model 'smal' \(models: saml, .*\); did you mean 'saml'\?"):
        TrainOptions(model="smal").resolved()


def test_resolved_options_hold_every_default():
    options = TrainOptions(device="cpu", model_options={"dropout": 0.5}).resolved()
    assert options.model_options.keys() == hyperparameters("saml").keys()
    assert options.model_options["dropout"] == 0.5
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "meta"])
def test_device_that_is_not_here(device):
    with pytest.raises(InputError, match=f"^device '{device}' cannot be used here: [^\n]+$"):
        TrainOptions(device=device).resolved()


@pytest.mark.parametrize(("split", "rows"), [([0.9, 0.0, 0.1], "valid"), ([0.9, 0.1, 0.0], "test")])
def test_split_without_rows(dataset_of, split, rows, tmp_path):
    dataset = dataset_of()
    schema = dataclasses.replace(load_schema(dataset.schema), split=tuple(split))
    metrics = train(prepare(dataset.data, schema, seed=0), schema, SMALL, tmp_path / "run").metrics
    names = ("auc", "logloss", "pr_auc", "normalised_entropy", "predicted_over_observed", "ece")
    nothing = {**dict.fromkeys(names), "rows": 0}
    if rows == "valid":
        assert metrics["valid"] == nothing
        assert metrics["best_epoch"] == metrics["epochs"] == 3
    else:
        assert metrics["overall"] == metrics["scenarios"]["de"] == nothing


@pytest.fixture(scope="module")
def weighted(weighted_dataset):
    schema = load_schema(weighted_dataset.schema)
    return prepare(weighted_dataset.data, schema, seed=0), schema


@pytest.mark.parametrize("model", ["saml", "shared_bottom"])
def test_the_loss_of_weights_is_that_of_repeated_rows(weighted, model):
    data, schema = weighted
    table = data.tables["train"]
    network = build_model(model, {"hidden_dims": (8, 4)}, schema, data.encoder).double()
    halves = (2 * table.weight).long()
    rows = torch.arange(len(table))
    repeated = table.batch(rows.repeat_interleave(halves))
    del repeated["weight"]
    losses = [network.loss(batch) for batch in (table.batch(rows), repeated)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    gradients = [torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True) for loss in losses]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    nothing = table.batch(rows) | {"weight": torch.zeros(len(rows))}
    loss = network.loss(nothing)
    assert float(loss) == 0
    assert all(
        not gradient.any() for gradient in torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)
    )


def test_the_training_loss_is_the_weighted_mean_of_its_batches(weighted, tmp_path, monkeypatch):
    from saml_rec.training import loop

    data, schema = weighted
    monkeypatch.setattr(loop.Optimizers, "step", lambda self: None)  # the weights stay as they are
    options = dataclasses.replace(SMALL, epochs=1, model="shared_bottom", model_options={"hidden_dims": (8,)})
    history = train(data, schema, options, tmp_path).history
    table = data.tables["train"]
    network = load_trained(tmp_path).model
    with torch.no_grad():
        expected = float(network.loss(table.batch(torch.arange(len(table)))))
    assert history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    unweighted = dataclasses.replace(table, weight=None)
    with torch.no_grad():
        assert abs(expected - float(network.loss(unweighted.batch(torch.arange(len(table)))))) > 1e-4


def test_the_training_loss_is_the_mean_of_rows_and_not_of_batches(data, schema, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Optimizers, "step", lambda self: None)
    options = dataclasses.replace(SMALL, epochs=1, batch_size=300, model_options={"hidden_dims": (8, 4)})
    history = train(data, schema, options, tmp_path).history
    table, network = data.tables["train"], load_trained(tmp_path).model
    with torch.no_grad():
        whole = float(network.loss(table.batch(torch.arange(len(table)))))
        batches = [float(network.loss(batch)) for batch in table.batches(300, generator=shuffling(1))]
    assert history[0]["train_loss"] == pytest.approx(whole, rel=1e-5)
    assert abs(np.mean(batches) - whole) > 1e-4 * whole


def shuffling(epoch):
    return torch.Generator().manual_seed(loop.stream_seed(SMALL.seed, loop.SHUFFLING, epoch))


@pytest.mark.usefixtures("scripted")
def test_every_epoch_has_all_rows_in_an_order_of_its_own(data, schema, tmp_path, monkeypatch):
    seen = []
    loss = Scripted.loss
    monkeypatch.setattr(Scripted, "loss", lambda self, batch: seen.append(batch["dense"][:, 0]) or loss(self, batch))
    train(data, schema, TrainOptions(model="Scripted", epochs=3, batch_size=64, patience=0), tmp_path)
    orders = [torch.cat(seen[5 * epoch : 5 * epoch + 5]) for epoch in range(3)]
    everything = data.tables["train"].dense[:, 0].sort().values
    for order in orders:
        assert torch.equal(order.sort().values, everything)
    for number, order in enumerate(orders):
        assert all((order != other).float().mean() > 0.5 for other in orders[number + 1 :])
        assert (order != data.tables["train"].dense[:, 0]).float().mean() > 0.5


def test_metrics_and_resumption_of_a_weighted_run(weighted, weighted_dataset, tmp_path, train_one_epoch):
    data, schema = weighted
    whole = train(data, schema, SMALL, tmp_path / "whole", data_path=weighted_dataset.data)
    again = train_one_epoch(data, schema, SMALL, tmp_path / "again")
    train(data, schema, SMALL, again, resume=True, data_path=weighted_dataset.data)
    assert_same_run(tmp_path / "whole", again)
    overall = whole.metrics["overall"]
    assert overall["rows"] == 40
    assert overall["gauc_groups"] <= 20
    assert evaluate(tmp_path / "whole")["overall"] == overall
    table = data.tables["test"]
    rows = LabelledRows(table.label.numpy(), table.scenario.numpy(), table.weight.numpy(), table.group.numpy())
    assert overall["logloss"] == pytest.approx(
        score_rows(rows, load_trained(tmp_path / "whole").logits(table))["logloss"]
    )


def test_evaluation_of_rows_that_all_count_nothing(weighted, weighted_dataset, tmp_path):
    data, schema = weighted
    train(data, schema, dataclasses.replace(SMALL, epochs=1), tmp_path / "run")
    weighted_dataset.frame.with_columns(importance=0).write_csv(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="weight column 'importance': all 400 rows have weight 0"):
        evaluate(tmp_path / "run", data_path=tmp_path / "nothing.csv")
