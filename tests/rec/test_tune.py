"""saml-rec tune: as many trials for each model, what it repeats after an interruption, what it refuses, who uses it."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest

from saml_rec import models, tuning
from saml_rec.data import prepare
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.models.construction import check_model, resolve_device
from saml_rec.models.registry import hyperparameters, is_fitted
from saml_rec.sealed import write_sealed_json
from saml_rec.training import TrainOptions, train
from saml_rec.training.scenario_parameters import of_scenarios
from saml_rec.tuning import search, space

pytest.importorskip("optuna")

OPTIONS = TrainOptions(epochs=2, batch_size=64, device="cpu")
NAMES = ("saml", "shared_bottom")
TRIALS = 3

# Tunes in a process that kills itself instead of training its trial number COUNT.
KILLED = """
import os, signal, sys, torch
from saml_rec import cli
from saml_rec.tuning import search
count, *arguments = sys.argv[1:]
train, calls = search.train_and_validate, 0
def call(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return train(*args, **kwargs)
search.train_and_validate = call
torch.set_num_threads(1)
cli.main(arguments, prog_name="saml-rec")
"""


@pytest.fixture(scope="module")
def schema(small_dataset):
    return load_schema(small_dataset.schema)


@pytest.fixture(scope="module")
def data(small_dataset, schema):
    return prepare(small_dataset.data, schema, seed=0)


def command(dataset, out, names=NAMES, trials=TRIALS, epochs=2):
    given = ["tune", "--data", dataset.data, "--schema", dataset.schema, "--out", out, "--models", ",".join(names)]
    return [str(each) for each in [*given, "--trials", trials, "--epochs", epochs, "--batch-size", 64]]


def comparing(dataset, out, tuned, *more, names=NAMES):
    given = ["compare", "--data", dataset.data, "--schema", dataset.schema, "--out", out, "--models", ",".join(names)]
    return [*given, "--seeds", 1, "--epochs", 2, "--batch-size", 64, "--tuned", tuned, *more]


@pytest.fixture(scope="module")
def tuned(small_dataset, tmp_path_factory):
    """The directory of a search that was not interrupted, and what it printed. Do not write to it: copy it."""
    from click.testing import CliRunner

    from saml_rec.cli import main

    out = tmp_path_factory.mktemp("tune") / "out"
    result = CliRunner().invoke(main, command(small_dataset, out))
    assert result.exit_code == 0, result.output
    return out, result.output


def read(out):
    return json.loads((out / "tune.json").read_text(encoding="utf-8"))


def trials_of(record):
    """Without what a clock decides."""
    return {
        name: [{key: value for key, value in trial.items() if key != "seconds"} for trial in entry["trials"]]
        for name, entry in record["models"].items()
    }


def test_every_model_has_as_many_trials_and_the_first_is_its_defaults(tuned):
    out, printed = tuned
    record = read(out)
    assert list(record["models"]) == list(NAMES)
    for name, entry in record["models"].items():
        assert [trial["number"] for trial in entry["trials"]] == list(range(TRIALS))
        defaults = dataclasses.asdict(TrainOptions()) | hyperparameters(name)
        for option, value in entry["trials"][0]["options"].items():
            assert value == (list(defaults[option]) if isinstance(defaults[option], tuple) else defaults[option])
        losses = [trial["valid_logloss"] for trial in entry["trials"]]
        assert entry["best"] == losses.index(min(losses))
        assert all(trial["options"].keys() == entry["space"].keys() for trial in entry["trials"])
        assert f"{name}, trial {TRIALS}/{TRIALS}: valid log loss {losses[-1]:.4f}  best epoch" in printed
    assert record["seed"] == 0
    assert record["trials"] == TRIALS
    assert record["versions"]["optuna"] == importlib.import_module("optuna").__version__


def test_models_are_drawn_with_the_same_seed(tuned):
    """The first trials of a sampler are random: equal where the options are the same."""
    saml, bottom = (entry["trials"] for entry in read(tuned[0])["models"].values())
    for first, second in zip(saml, bottom, strict=True):
        for name in ("learning_rate", "weight_decay"):
            assert first["options"][name] == second["options"][name]
    assert len({trial["options"]["learning_rate"] for trial in saml}) == TRIALS


def test_the_table_says_what_was_tried_for_whom(tuned):
    out, printed = tuned
    lines = [line.split() for line in printed.splitlines()]
    best = read(out)["models"]["saml"]
    options = best["trials"][best["best"]]["options"]
    assert ["score", "ratio", "softmax", "ratio", options["score"]] in lines
    assert ["aux", "loss", "weight", "0", "to", "2", "1", f"{options['aux_loss_weight']:.4g}"] in lines
    assert sum(line[:2] == ["tower", "dims"] for line in lines) == 1
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert printed.splitlines()[-1] == f"wrote {out / 'tune.json'}"


def test_a_trial_is_the_training_of_its_options(data, schema, tuned, tmp_path):
    trial = read(tuned[0])["models"]["saml"]["trials"][2]
    found = dict(trial["options"])
    training = {name: found.pop(name) for name in space.training_of("saml")}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    run = train(data, schema, dataclasses.replace(OPTIONS, **training, model_options=found), tmp_path / "run")
    assert trial["valid_logloss"] == pytest.approx(run.metrics["valid"]["logloss"], rel=1e-9)
    assert (trial["best_epoch"], trial["stopped_by"]) == (run.metrics["best_epoch"], run.metrics["stopped_by"])


class Untouchable:
    """Test rows of which nothing but the fingerprint may be asked."""

    def __init__(self, table):
        self.fingerprint = table.fingerprint


def test_test_rows_are_not_looked_at(data, schema, tuned, tmp_path):
    hidden = dataclasses.replace(data, tables={**data.tables, "test": Untouchable(data.tables["test"])})
    record = tuning.tune(hidden, schema, NAMES, TRIALS, OPTIONS, tmp_path)
    assert trials_of(record) == trials_of(read(tuned[0]))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_killed_search_goes_on_to_the_same_trials(small_dataset, python, saml_rec, tuned, tmp_path, count):
    out = tmp_path / "out"
    killed = python("-c", KILLED, count, *command(small_dataset, out))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = sum(len(entry["trials"]) for entry in read(out)["models"].values()) if count > 1 else 0
    assert kept == count - 1
    result = saml_rec(*command(small_dataset, out))
    assert result.exit_code == 0, result.output
    assert sum(", trial " in line for line in result.output.splitlines()) == len(NAMES) * TRIALS - kept
    assert trials_of(read(out)) == trials_of(read(tuned[0]))


def test_what_a_kill_left_half_written_is_no_obstacle(data, schema, tmp_path):
    (tmp_path / ".tune.json.123.tmp").write_text('{"models": {"sa')
    tuning.tune(data, schema, ("shared_bottom",), 1, OPTIONS, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tune.json"]


def test_an_interrupt_keeps_what_was_finished(data, schema, saml_rec, small_dataset, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    whole = search.train_and_validate
    monkeypatch.setattr(search, "train_and_validate", interrupted)
    assert saml_rec(*command(small_dataset, out)).exit_code == 130
    assert len(read(out)["models"]["saml"]["trials"]) == 1


def test_more_trials_and_models_add_to_what_is_there(small_dataset, saml_rec, tuned, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tuned[0], out)
    result = saml_rec(*command(small_dataset, out, (*NAMES, "mmoe"), TRIALS + 1))
    assert result.exit_code == 0, result.output
    after = trials_of(read(out))
    assert {name: len(trials) for name, trials in after.items()} == dict.fromkeys((*NAMES, "mmoe"), TRIALS + 1)
    for name, trials in trials_of(read(tuned[0])).items():
        assert after[name][:TRIALS] == trials


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "cannot go on, options changed: epochs was 2, is 3"),
        ({"batch_size": 32}, "cannot go on, options changed: batch_size was 64, is 32"),
        ({"seed": 1}, "cannot go on, seed changed: seed was 0, is 1"),
    ],
)
def test_a_search_does_not_go_on_with_other_options(data, schema, tuned, tmp_path, changes, message):
    out = tmp_path / "out"
    shutil.copytree(tuned[0], out)
    before = (out / "tune.json").read_bytes()
    with pytest.raises(InputError, match=message):
        tuning.tune(data, schema, NAMES, TRIALS + 1, dataclasses.replace(OPTIONS, **changes), out)
    assert (out / "tune.json").read_bytes() == before


def test_a_search_does_not_go_on_with_other_rows_or_ranges(small_dataset, data, schema, tuned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(tuned[0], out)
    with pytest.raises(InputError, match=r"cannot go on, data changed: data\.test was "):
        tuning.tune(prepare(small_dataset.data, schema, seed=1), schema, NAMES, TRIALS, OPTIONS, out)
    monkeypatch.setitem(space.MODEL, "dropout", space.Numbers(0.0, 0.9))
    with pytest.raises(InputError, match=r"the ranges of saml changed: dropout.high was 0.5, is 0.9"):
        tuning.tune(data, schema, NAMES, TRIALS, OPTIONS, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("saml", "smal")}, "error: there is no model 'smal'"),
        ({"names": ("saml", "saml")}, "error: models named more than once: saml"),
        ({"names": ()}, "error: no models to tune"),
        ({"trials": 0}, "Invalid value for '--trials'"),
        ({"names": ("saml",)}, "holds trials of shared_bottom; name it too"),
        ({"trials": 2}, "holds 3 trials of saml, more than 2"),
    ],
)
def test_bad_options_are_refused_before_data_are_read(saml_rec, small_dataset, tuned, tmp_path, change, message):
    out = tmp_path / "out"
    shutil.copytree(tuned[0], out)
    missing = dataclasses.replace(small_dataset, data=tmp_path / "missing.csv")
    result = saml_rec(*command(missing, out, **change))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_directory_of_something_else_is_refused(saml_rec, small_dataset, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    missing = dataclasses.replace(small_dataset, data=tmp_path / "missing.csv")
    assert "holds no tuning" in saml_rec(*command(missing, tmp_path)).output
    write_sealed_json(tmp_path / "tune.json", {"models": {}})
    assert "was not written by saml-rec tune" in saml_rec(*command(missing, tmp_path)).output


def seal(record):
    """Gives an altered record the checksum of what it holds now."""
    record.pop("checksum", None)
    record["checksum"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def damage_trial(record):
    record["models"]["saml"]["trials"][1]["options"]["learning_rate"] *= 2


def without_loss(record):
    del record["models"]["saml"]["trials"][1]["valid_logloss"]
    seal(record)


def best_of_none(record):
    record["models"]["saml"]["best"] = 17
    seal(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_trial, "tune.json: is damaged: its checksum is not that of its content"),
        (without_loss, "tune.json: is damaged: expected trials of saml"),
        (best_of_none, "tune.json: is damaged: expected the ranges and the best trial of saml"),
    ],
)
def test_a_damaged_search_is_refused_and_left(saml_rec, small_dataset, tuned, tmp_path, change, message):
    out = tmp_path / "out"
    shutil.copytree(tuned[0], out)
    record = read(out)
    change(record)
    (out / "tune.json").write_text(json.dumps(record), encoding="utf-8")
    before = (out / "tune.json").read_bytes()
    for given in (command(small_dataset, out), comparing(small_dataset, tmp_path / "compared", out / "tune.json")):
        result = saml_rec(*given)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr
    assert (out / "tune.json").read_bytes() == before


def test_without_the_extra_one_line_says_what_to_install(saml_rec, small_dataset, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else found(name))
    result = saml_rec(*command(small_dataset, tmp_path / "out"))
    assert result.exit_code == 2
    assert result.output == "error: tuning needs Optuna, which is not installed: pip install 'saml-kernels[tune]'\n"
    assert not (tmp_path / "out").exists()


def test_tuning_needs_validation_rows(dataset_of, tmp_path):
    dataset = dataset_of()
    schema = dataclasses.replace(load_schema(dataset.schema), split=(0.9, 0.0, 0.1))
    with pytest.raises(InputError, match="tuning chooses by validation rows"):
        tuning.tune(prepare(dataset.data, schema, seed=0), schema, NAMES, 1, OPTIONS, tmp_path / "out")


def test_a_trial_that_cannot_be_trained_counts(data, schema, tmp_path, monkeypatch):
    calls = []

    def failing(data, schema, options):
        calls.append(options)
        if len(calls) == 2:
            raise InputError("the loss is nan at epoch 1, step 2; try a lower learning rate")
        return whole(data, schema, options)

    whole = search.train_and_validate
    monkeypatch.setattr(search, "train_and_validate", failing)
    trials = tuning.tune(data, schema, ("shared_bottom",), TRIALS, OPTIONS, tmp_path)["models"]["shared_bottom"]
    assert [trial["error"] is None for trial in trials["trials"]] == [True, False, True]
    assert trials["best"] != 1
    # What failed is known to a search that goes on.
    tuning.tune(data, schema, ("shared_bottom",), TRIALS + 1, OPTIONS, tmp_path)
    assert len(calls) == TRIALS + 1


def test_a_model_that_cannot_be_trained_at_all(data, schema, tmp_path, monkeypatch):
    def failing(*_):
        raise InputError("the loss is nan")

    monkeypatch.setattr(search, "train_and_validate", failing)
    with pytest.raises(InputError, match="no trial of saml could be trained; the last one: the loss is nan"):
        tuning.tune(data, schema, ("saml",), 2, OPTIONS, tmp_path)


def test_options_that_were_tried_are_not_trained_again(data, schema, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "space_of", lambda model: {"score": space.Choices(("ratio",))})
    monkeypatch.setattr(search, "defaults_of", lambda model: {"score": "ratio"})
    calls = []
    whole = search.train_and_validate
    monkeypatch.setattr(search, "train_and_validate", lambda *given: calls.append(given) or whole(*given))
    (entry,) = tuning.tune(data, schema, ("saml",), TRIALS, OPTIONS, tmp_path)["models"].values()
    assert [trial["same_as"] for trial in entry["trials"]] == [None, 0, 0]
    assert [trial["number"] for trial in entry["trials"]] == [0, 1, 2]
    assert len({trial["valid_logloss"] for trial in entry["trials"]}) == len(calls) == 1
    assert entry["best"] == 0


def test_a_fitted_model_has_its_own_hyperparameters_only():
    assert space.space_of("lightgbm").keys() == {"num_leaves", "tree_rate"}
    assert space.defaults_of("logistic_regression") == {"local_features": False}


@pytest.mark.parametrize("name", [name for name in models.MODELS if is_fitted(name)])
def test_fitted_models_are_searched_too(data, schema, tmp_path, name):
    record = tuning.tune(data, schema, (name, "shared_bottom"), 2, OPTIONS, tmp_path)
    for entry in record["models"].values():
        assert [trial["number"] for trial in entry["trials"]] == [0, 1]
        assert all(trial["valid_logloss"] > 0 for trial in entry["trials"])
    assert "learning_rate" not in record["models"][name]["trials"][0]["options"]


@pytest.mark.parametrize("name", models.MODELS)
def test_every_value_of_a_range_is_one_the_model_takes(schema, name):
    ranges = space.space_of(name)
    own = hyperparameters(name)
    assert ranges.keys() == space.defaults_of(name).keys()
    for option, each in ranges.items():
        if isinstance(each, space.Choices):
            assert space.text(space.defaults_of(name)[option]) in each.values
            values = each.values
        else:
            assert each.low <= space.defaults_of(name)[option] <= each.high
            values = (each.distribution().low, each.distribution().high)
        for value in values:
            if option in own:
                check_model(name, {option: each.to_option(option, value)}, schema, resolve_device("cpu"))
            else:
                assert dataclasses.replace(OPTIONS, **{option: each.to_option(option, value)}) is not None


@pytest.mark.parametrize("name", [name for name in models.MODELS if not is_fitted(name)])
def test_networks_with_parameters_of_scenarios_have_their_options(data, schema, name):
    sizes = data.encoder.vocabulary_sizes
    model = models.MODELS[name](schema, data.encoder.num_scenarios, vocabulary_sizes=sizes)
    assert bool(of_scenarios(model)) == model.has_scenario_parameters
    assert (space.space_of(name).keys() >= {*space.OF_SCENARIOS}) == model.has_scenario_parameters


def test_the_highest_learning_rate_allows_the_strongest_decay():
    rate, decay = space.TRAINING["learning_rate"].high, float(space.TRAINING["scenario_decay"].values[-1])
    assert TrainOptions(learning_rate=rate, scenario_decay=decay).scenario_decay == 100


def test_what_a_model_decides_itself_is_a_choice():
    assert space.defaults_of("saml")["scenario_rate"] is None
    assert space.TRAINING["scenario_rate"].to_option("scenario_rate", "default") is None
    assert space.TRAINING["scenario_rate"].to_option("scenario_rate", "0.3") == 0.3
    assert space.is_within(None, space.TRAINING["scenario_decay"].to_dict())


def test_the_page_lists_what_is_tried():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.split("\n## `tune`\n")[1].split("\n## ")[0]
    names = {"lr", "weight_decay", "scenario_rate", "scenario_decay", *space.MODEL}
    options = {"--" + name.replace("_", "-") for name in names}
    assert {option for option in options if f"`{option}`" not in section} == set()


def test_the_space_names_options_that_there_are():
    known = {option for name in models.MODELS for option in hyperparameters(name)}
    assert {"score", "num_experts", "scenario_dim", "tower_dims"} <= known & space.MODEL.keys()
    assert "backend" not in space.MODEL


def test_a_comparison_takes_the_best_options(small_dataset, saml_rec, tuned, tmp_path):
    out, path = tmp_path / "out", tuned[0] / "tune.json"
    result = saml_rec(*comparing(small_dataset, out, path, "--set", "saml.dropout=0.25"))
    assert result.exit_code == 0, result.output
    record, found = json.loads((out / "compare.json").read_text(encoding="utf-8")), read(tuned[0])
    assert record["tuned"]["path"] == str(path)
    assert record["tuned"]["trials"] == TRIALS
    for name, entry in found["models"].items():
        best = entry["trials"][entry["best"]]
        expected = best["options"] | ({"dropout": 0.25} if name == "saml" else {})
        assert record["models"][name]["changes"] == expected
        assert record["tuned"]["models"][name]["best"] == best["options"]
        assert record["tuned"]["models"][name]["best_valid_logloss"] == best["valid_logloss"]
        options = record["models"][name]["options"]
        assert (options["learning_rate"], options["weight_decay"]) == (
            expected["learning_rate"],
            expected["weight_decay"],
        )
    metrics = json.loads((out / "runs/shared_bottom/seed-0/metrics.json").read_text(encoding="utf-8"))
    bottom = found["models"]["shared_bottom"]
    assert metrics["valid"]["logloss"] == pytest.approx(bottom["trials"][bottom["best"]]["valid_logloss"], rel=1e-9)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"Options tuned on the validation rows, {TRIALS} trials a model" in page


@pytest.mark.parametrize("change", ["another model", "unfinished", "nothing", "another split"])
def test_a_comparison_refuses_a_search_of_something_else(small_dataset, saml_rec, tuned, tmp_path, change):
    path, more, names = tmp_path / "tune.json", [], NAMES
    record = read(tuned[0])
    if change == "another model":
        names, message = ("saml", "star"), "star was not tuned there (models: saml, shared_bottom)"
    elif change == "unfinished":
        record["models"]["saml"]["trials"].pop()
        record["models"]["saml"]["best"] = 0
        message = "has 2 of 3 trials of saml; repeat saml-rec tune"
    elif change == "nothing":
        record, message = [], "was not written by saml-rec: expected an object"
    else:
        more, message = ["--split-seed", 1], "was tuned on other data or another split: train, valid, test rows differ"
    if isinstance(record, dict):
        seal(record)
    path.write_text(json.dumps(record))
    result = saml_rec(*comparing(small_dataset, tmp_path / "out", path, *more, names=names))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
