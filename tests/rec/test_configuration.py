"""train --config: options from a file, and the file that a run keeps of its own."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from saml_rec.cli import main
from saml_rec.cli.configuration import NOT_KEPT
from saml_rec.sealed import load


@pytest.fixture
def config_of(small_dataset, tmp_path):
    """Writes a configuration; the data and the schema stand in it."""

    def write(**options):
        path = tmp_path / "config.toml"
        own = {"data": str(small_dataset.data), "schema": str(small_dataset.schema), "out": str(tmp_path / "run")}
        path.write_text(tomli_w.dumps(own | {name.replace("_", "-"): value for name, value in options.items()}))
        return path

    return write


PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
QUICK = {"model": "mlp", "epochs": 2, "hidden_dims": [4]}


def metrics(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def test_all_options_in_a_file(saml_rec, config_of, tmp_path):
    given = QUICK | {
        "batch_size": 64,
        "lr": 0.01,
        "patience": 0,
        "tables": "sparse",
        "table_lr": ["0.05", "user=0.2"],
        "local_features": True,
        "activation": "silu",
        "checkpoint_minutes": 5,
    }
    result = saml_rec("train", "--config", config_of(**given))
    assert result.exit_code == 0, result.output
    options = metrics(tmp_path / "run")["options"]
    assert (options["model"], options["epochs"], options["batch_size"], options["learning_rate"]) == (
        "mlp",
        2,
        64,
        0.01,
    )
    assert (options["table_learning_rate"], options["table_learning_rates"]) == (0.05, {"user": 0.2})
    assert options["model_options"]["hidden_dims"] == [4]
    assert (options["model_options"]["local_features"], options["model_options"]["activation"]) == (True, "silu")


def test_the_file_of_the_documentation(saml_rec, small_dataset, tmp_path):
    section = PAGE.partition("### A file of options")[2]
    path = tmp_path / "run.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", section, re.DOTALL)[1], encoding="utf-8")
    given = ("--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "run")
    result = saml_rec("train", "--config", path, *given, "--table-lr", 0.03, "--epochs", 1)
    assert result.exit_code == 0, result.output
    options = metrics(tmp_path / "run")["options"]
    assert (options["epochs"], options["model_options"]["hidden_dims"]) == (1, [128, 64])
    # And without what was said otherwise the file is read as it is.
    assert "item_id" in saml_rec("train", "--config", path, *given, "--overwrite").stderr


def test_the_command_line_goes_before_the_file(saml_rec, config_of, tmp_path):
    path = config_of(**QUICK)
    for place in (("--config", path, "--epochs", 1), ("--epochs", 1, "--config", path)):
        assert saml_rec("train", *place, "--out", tmp_path / "run", "--overwrite").exit_code == 0
        assert metrics(tmp_path / "run")["options"]["epochs"] == 1


def test_flags_in_a_file(saml_rec, config_of):
    assert saml_rec("train", "--config", config_of(**QUICK)).exit_code == 0
    result = saml_rec("train", "--config", config_of(**QUICK, resume=True))
    assert "is finished already" in result.stdout


def test_keys_may_have_either_dash(saml_rec, tmp_path, config_of):
    path = config_of(**QUICK)
    path.write_text(path.read_text().replace("hidden-dims", "hidden_dims"))
    assert saml_rec("train", "--config", path).exit_code == 0


@pytest.mark.parametrize("model", ["saml", "star", "logistic_regression"])
def test_the_file_of_a_run_reproduces_it(saml_rec, config_of, tmp_path, model, monkeypatch):
    first, second = tmp_path / "run", tmp_path / "again"
    given = {"epochs": 1, "model": model, "seed": 2**64 - 1}
    if model != "logistic_regression":
        given |= {"hidden_dims": [6, 4], "dropout": 0.25, "table_lr": ["user=0.125"], "tables": "sparse"}
    assert saml_rec("train", "--config", config_of(**given)).exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert saml_rec("train", "--config", first / "run.toml", "--out", second).exit_code == 0
    for what in ("options", "overall", "scenarios", "valid", "data"):
        assert metrics(first)[what] == metrics(second)[what]
    weights = [load(run / "model.pt", "model")["weights"] for run in (first, second)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    kept = [tomllib.loads((run / "run.toml").read_text()) for run in (first, second)]
    assert kept[0] == kept[1]
    assert not set(kept[0]) & set(NOT_KEPT)
    # The model's own defaults stand in it, so that a later version's do not change the run.
    assert set(kept[0]) >= {
        name.replace("_", "-") for name in metrics(first)["options"]["model_options"] if name != "aux_dims"
    }


def test_the_file_of_a_run_resumes_it(saml_rec, config_of, tmp_path):
    assert saml_rec("train", "--config", config_of(**QUICK)).exit_code == 0
    run = tmp_path / "run"
    (run / "metrics.json").unlink()
    result = saml_rec("train", "--config", run / "run.toml", "--out", run, "--resume")
    assert result.exit_code == 0, result.output
    assert "resuming" in result.stdout


def test_a_path_that_is_no_text_is_left_out(saml_rec, small_dataset, tmp_path):
    schema = tmp_path / "sch\udcffema.toml"
    schema.write_bytes(small_dataset.schema.read_bytes())
    given = ("--data", small_dataset.data, "--schema", schema, "--out", tmp_path / "run", "--model", "mlp")
    assert saml_rec("train", *given, "--epochs", 1).exit_code == 0
    kept = tomllib.loads((tmp_path / "run" / "run.toml").read_text())
    assert "data" in kept
    assert "schema" not in kept


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epoch = 3", ["there is no option 'epoch'", "did you mean 'epochs'"]),
        ("zzz = 3", ["there is no option 'zzz'"]),
        ("config = 'x'", ["there is no option 'config'"]),
        ("batch-size = 3\nbatch_size = 3", ["batch-size is given twice"]),
        ("epochs = 3.5", ["epochs: '3.5' is not a valid integer"]),
        ("epochs = 'three'", ["epochs: 'three' is not a valid integer"]),
        ("epochs = 0", ["epochs: 0 is not in the range"]),
        ("epochs = true", ["epochs must be one value, got True"]),
        ("epochs = [3]", ["epochs must be one value, got [3]"]),
        ("epochs = 2024-01-01", ["epochs must be one value"]),
        ("resume = 'yes'", ["resume must be true or false, got 'yes'"]),
        ("stop-gradient = 'maybe'", ["stop-gradient: 'maybe' is not a valid boolean"]),
        ("hidden-dims = [8, -1]", ["hidden-dims: '8,-1' is neither none nor a list of positive integers"]),
        ("hidden-dims = {a = 1}", ["hidden-dims must be a value or a list of them"]),
        ("table-lr = ['x=y']", ["table-lr: 'y' is not a valid float"]),
        ("[train]\nepochs = 3", ["there is no option 'train'"]),
        ("epochs = ", ["is not valid TOML: Invalid value"]),
        ("epochs = 3\nepochs = 4", ["is not valid TOML"]),
        (f"{'x' * 500} = 1", ["there is no option 'xxx"]),
    ],
)
def test_what_a_file_cannot_say(saml_rec, tmp_path, text, parts):
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    result = saml_rec("train", "--config", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {path}")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < len(str(path)) + 200
    for part in parts:
        assert part in result.stderr


def test_a_file_that_is_not_there_or_no_text(saml_rec, tmp_path):
    assert "there is no such file of options" in saml_rec("train", "--config", tmp_path / "none.toml").stderr
    assert "is a directory" in saml_rec("train", "--config", tmp_path).stderr
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in saml_rec("train", "--config", tmp_path / "bytes.toml").stderr
    assert "expected a regular file" in saml_rec("train", "--config", "/dev/null").stderr


def test_a_byte_order_mark_is_no_part_of_the_first_key(saml_rec, tmp_path, config_of):
    path = config_of(**QUICK)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert saml_rec("train", "--config", path).exit_code == 0


def test_what_is_required_may_stand_in_the_file(saml_rec, tmp_path):
    (tmp_path / "c.toml").write_text("epochs = 1")
    result = saml_rec("train", "--config", tmp_path / "c.toml")
    assert result.exit_code == 2
    assert "Missing option '--data'" in result.stderr


def test_every_option_is_a_key(saml_rec, config_of):
    """Each is known by its name: the error is of the value, or there is none, but never of the key."""
    for option in main.commands["train"].params:
        name = option.opts[0].removeprefix("--")
        if name in ("config", "data", "schema", "out"):
            continue
        result = saml_rec("train", "--config", config_of(**{name: {"no": "value"}}))
        assert f"{name} must be " in result.stderr, name
