import dataclasses
import errno
import importlib
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
import typing
from pathlib import Path

import polars
import pytest
import torch

from saml_rec import models
from saml_rec.cli import main
from saml_rec.data import write_ml100k, write_synthetic
from saml_rec.evaluation.scoring import load_trained
from saml_rec.files import write_json
from saml_rec.models.hyperparameters import HYPERPARAMETERS
from saml_rec.models.registry import hyperparameters
from saml_rec.sealed import load, save
from saml_rec.training import loop as training

SMALL = ("--epochs", 1, "--batch-size", 64)


@pytest.fixture
def train(saml_rec, small_dataset, tmp_path):
    """Trains on the small data set into ``tmp_path/run``; keywords replace or add options."""

    def run(*flags, **options):
        options = {"data": small_dataset.data, "schema": small_dataset.schema, "out": tmp_path / "run"} | options
        model = options.get("model", "saml")
        if model not in models.MODELS or "hidden_dims" in hyperparameters(model):
            options = {"hidden_dims": "8,4"} | options
        pairs = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        return saml_rec("train", *SMALL, *pairs, *flags)

    return run


def assert_one_error(result, *parts):
    """The command failed with one line that holds all the parts, and printed nothing else."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for part in parts:
        assert part in result.stderr


def test_train_prints_a_line_an_epoch_and_the_table(train, tmp_path):
    result = train(epochs=2, patience=0)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line[:9] for line in lines[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert "\x1b" not in result.stdout
    for name in ("de", "fr", "[it]", "overall"):
        assert any(name in line for line in lines[2:])
    assert lines[-1].startswith(f"wrote {tmp_path}")


def test_progress_bar_only_on_a_terminal(data_console, train):
    assert train(epochs=1).exit_code == 0
    assert "\x1b[" in data_console.getvalue()
    assert "scenario" in data_console.getvalue()


@pytest.fixture
def data_console(monkeypatch):
    """What the command prints to a terminal."""
    import io

    from rich.console import Console

    from saml_rec import console

    screen = io.StringIO()
    monkeypatch.setattr(console, "stdout", lambda: Console(file=screen, force_terminal=True))
    return screen


@pytest.mark.parametrize("model", models.MODELS)
def test_every_model_trains_evaluates_and_predicts(train, saml_rec, small_dataset, tmp_path, model):
    wanted = {"dropout": 0.1, "backend": "reference", "num_trees": 3}
    result = train(model=model, **{name: value for name, value in wanted.items() if name in hyperparameters(model)})
    assert result.exit_code == 0, result.output
    assert saml_rec("evaluate", tmp_path / "run").exit_code == 0
    out = tmp_path / "predictions.csv"
    assert saml_rec("predict", tmp_path / "run", "--data", small_dataset.data, "--out", out).exit_code == 0
    assert polars.read_csv(out).height == 400


def test_options_reach_the_model(train, tmp_path):
    result = train(
        "--aux-dims",
        "6,4",
        mutual_layers="none",
        gate="scalar",
        score="softmax",
        temperature=0.5,
        activation="tanh",
        stop_gradient="false",
        aux_loss_weight=0.5,
        scenario_dim=5,
        branch_views="each",
        branch_init="shared",
        local_features="false",
        id_dropout=0.1,
        backend="reference",
        lr=0.01,
        weight_decay=0.1,
        scenario_rate=0.3,
        scenario_decay=7.0,
        tables="sparse",
        table_optimizer="adam",
        table_lr=0.03,
        seed=3,
        patience=7,
    )
    assert result.exit_code == 0, result.output
    options = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["options"]
    model_options = options.pop("model_options")
    assert options == {
        "model": "saml",
        "epochs": 1,
        "batch_size": 64,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "scenario_rate": 0.3,
        "scenario_decay": 7.0,
        "patience": 7,
        "seed": 3,
        "device": "cpu",
        "tables": "sparse",
        "table_optimizer": "adam",
        "table_learning_rate": 0.03,
        "table_learning_rates": {},
    }
    assert model_options == {
        "hidden_dims": [8, 4],
        "aux_dims": [6, 4],
        "mutual_layers": [],
        "gate": "scalar",
        "score": "softmax",
        "temperature": 0.5,
        "activation": "tanh",
        "stop_gradient": False,
        "foreign_type": "full",
        "aux_loss_weight": 0.5,
        "scenario_dim": 5,
        "branch_views": "each",
        "branch_init": "shared",
        "local_features": False,
        "dropout": 0.0,
        "id_dropout": 0.1,
        "backend": "reference",
    }


@pytest.mark.parametrize(("given", "expected"), [("full", None), ("bfloat16", torch.bfloat16), ("int8", torch.int8)])
def test_the_foreign_type_reaches_the_kernels(train, tmp_path, given, expected):
    assert train(foreign_type=given).exit_code == 0
    trained = load_trained(tmp_path / "run", device="cpu")
    assert trained.model.trunk.foreign_dtype == expected
    refused = train("--overwrite", foreign_type=given, stop_gradient="false")
    assert (refused.exit_code, "foreign_dtype needs stop_gradient=True" in refused.output) == (
        (0, False) if expected is None else (2, True)
    )


def test_without_stop_gradient_the_reference_runs_and_metrics_say_so(train, tmp_path):
    assert train(stop_gradient="false").exit_code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["backend"]["multi_branch"] == "reference"


def test_a_backend_that_cannot_train_without_stop_gradient_is_refused(train):
    result = train(stop_gradient="false", backend="cpp")
    assert result.exit_code == 2
    assert "cpp" in result.output


def defaults(command):
    return {option.name: option.default for option in command.params if option.default is not None}


def test_defaults_are_those_of_the_functions():
    options = dataclasses.asdict(training.TrainOptions())
    shown = defaults(main.commands["train"])
    assert shown["lr"] == options.pop("learning_rate")
    assert options.pop("model_options") == {}
    assert options.pop("table_learning_rate") is None
    assert options.pop("scenario_rate") is None
    assert options.pop("scenario_decay") is None
    assert options.pop("table_learning_rates") == {}
    assert {name: shown[name] for name in options} == options
    for name, function in (("synthetic", write_synthetic), ("ml-100k", write_ml100k)):
        parameters = inspect.signature(function).parameters
        for option in main.commands["data"].commands[name].params:
            if option.name not in ("out", "help"):
                assert parameters[option.name].default in (option.default, None), option.name


def test_every_hyperparameter_of_every_model_is_an_option():
    taken = {name for model in models.MODELS for name in hyperparameters(model)}
    assert taken == set(HYPERPARAMETERS)


@pytest.mark.parametrize("model", models.MODELS)
def test_a_hyperparameter_is_annotated_with_its_own_option(model):
    signature = inspect.signature(models.MODELS[model]).parameters
    for name in hyperparameters(model):
        annotations = [signature[name].annotation, *typing.get_args(signature[name].annotation)]
        assert HYPERPARAMETERS[name] in [each for a in annotations for each in getattr(a, "__metadata__", ())], name


@pytest.mark.parametrize(
    "command",
    ["", "train", "evaluate", "predict", "data", "data ml-100k", "data synthetic", "doctor"],
)
def test_help_explains_every_option(saml_rec, command):
    result = saml_rec(*command.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: saml-rec")
    group = main
    for name in command.split():
        group = group.commands[name]
    assert group.help
    assert all(option.help for option in group.params if option.param_type_name == "option")


def test_help_names_every_model(saml_rec):
    text = " ".join(saml_rec("train", "--help").stdout.split())
    assert all(model in text for model in models.MODELS)


def test_help_does_not_load_torch(python):
    program = """
import sys
from saml_rec.cli import main
main(["train", "--help"], standalone_mode=False)
print({"torch", "polars", "sklearn", "rich"} & set(sys.modules))
"""
    assert python("-c", program).stdout.endswith("\nset()\n")


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_spinning_unless_told(saml_rec, monkeypatch, given, expected):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert saml_rec("evaluate", "missing").exit_code == 2
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_version(saml_rec):
    import saml_kernels

    assert saml_rec("--version").stdout == f"saml-rec {saml_kernels.__version__}\n"
    assert importlib.import_module("saml_rec").__version__ == saml_kernels.__version__


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"data": "missing.csv"}, ["missing.csv"]),
        ({"data": "."}, ["directory"]),
        ({"schema": "missing.toml"}, ["missing.toml"]),
        ({"model": "samml"}, ["'samml'", "did you mean 'saml'?"]),
        ({"model": "shared_bottom", "gate": "scalar"}, ["model shared_bottom does not take gate"]),
        ({"tower_dims": "4"}, ["model saml does not take tower_dims"]),
        ({"mutual_layers": "3"}, ["model saml: mutual_layers must lie in 1..2, got 3"]),
        ({"aux_dims": "8"}, ["model saml: hidden_dims has 2 layers but aux_dims has 1"]),
        ({"hidden_dims": "none"}, ["model saml: hidden_dims must name at least one layer"]),
        ({"lr": "nan"}, ["learning_rate must be above 0 and finite, got nan"]),
        ({"lr": "0"}, ["learning_rate must be above 0 and finite, got 0.0"]),
        ({"weight_decay": "-1"}, ["weight_decay must be at least 0"]),
        ({"device": "warp:9"}, ["device 'warp:9' cannot be used here"]),
        ({"backend": "triton", "device": "cpu"}, ["backend 'triton' cannot run"]),
    ],
)
def test_train_refuses_in_one_line_and_leaves_nothing(train, tmp_path, options, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_error(train(**options), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["data", "schema", "out"])
def test_train_needs_its_files(saml_rec, option):
    files = {"data": "a.csv", "schema": "a.toml", "out": "run"}
    del files[option]
    result = saml_rec("train", *[part for name, value in files.items() for part in (f"--{name}", value)])
    assert result.exit_code == 2
    assert f"Missing option '--{option}'" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--hidden-dims", "8,,4"),
        ("--hidden-dims", "8,-4"),
        ("--mutual-layers", "0"),
        ("--dropout", "1"),
        ("--temperature", "0"),
        ("--epochs", "0"),
        ("--seed", "-1"),
        ("--gate", "round"),
        ("--backend", "cuda"),
        ("--epoch",),
    ],
)
def test_usage_errors(train, arguments, tmp_path):
    result = train(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: saml-rec train")
    assert not (tmp_path / "run").exists()


def test_broken_data_leave_nothing(train, dataset_of, small_dataset, tmp_path):
    dataset = dataset_of(small_dataset.frame.with_columns(age=polars.lit("old")))
    assert_one_error(train(data=dataset.data), str(dataset.data), "'age'", "'old'")
    assert not (tmp_path / "run").exists()


def test_existing_run_is_refused_before_any_work(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").touch()
    assert_one_error(train(data="missing.csv"), "holds an unfinished run; resume it, overwrite it or choose another")


def test_damaged_checkpoint(train, tmp_path):
    assert train().exit_code == 0
    (tmp_path / "run" / "metrics.json").unlink()
    with (tmp_path / "run" / "checkpoint.pt").open("r+b") as file:
        file.truncate(1000)
    assert_one_error(train("--resume"), "checkpoint.pt: is damaged")


def test_resume_of_a_finished_run_says_so(train, tmp_path):
    assert train().exit_code == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = train("--resume")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'run'} is finished already (best epoch 1 of 1): nothing to resume\n"
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert train("--overwrite").exit_code == 0


@pytest.mark.parametrize(("flags", "hint"), [((), "--resume"), (("--overwrite",), "--resume in place of --overwrite")])
def test_interrupt_in_training(train, monkeypatch, flags, hint):
    def interrupt(*_):
        raise KeyboardInterrupt

    if flags:
        assert train().exit_code == 0
    monkeypatch.setattr(training, "_run_epoch", interrupt)
    result = train(*flags)
    assert result.exit_code == 130
    assert result.stderr == f"interrupted; to continue, repeat the command with {hint}\n"


def test_interrupt_before_training(train, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("saml_rec.models.construction.check_model", interrupt)
    result = train()
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(train, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert_one_error(train(), str(tmp_path), "Permission denied")


def test_operating_system_errors_are_one_line(train, tmp_path):
    (tmp_path / "file").touch()
    assert_one_error(train(out=tmp_path / "file" / "run"), "Not a directory")


@pytest.mark.parametrize(
    ("arguments", "name", "split"),
    [
        ((), "evaluation-test.json", "test"),
        (("--split", "valid"), "evaluation-valid.json", "valid"),
        (("--data", "DATA"), "evaluation-clicks.csv.json", None),
        (("--data", "DATA", "--split", "train"), "evaluation-train.json", "train"),
        (("--out", "OUT/my.json"), "OUT/my.json", "test"),
        (("--out", "OUT"), "OUT/metrics.json", "test"),
    ],
)
def test_evaluate_writes_where_it_says(saml_rec, finished_run, small_dataset, tmp_path, arguments, name, split):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(finished_run, run)
    known = {"DATA": str(small_dataset.data), "OUT": str(out)}
    arguments = [known.get(part, part.replace("OUT", str(out))) for part in arguments]
    result = saml_rec("evaluate", run, *arguments)
    assert result.exit_code == 0, result.output
    target = run / name.replace("OUT", str(out))
    assert result.stdout.splitlines()[-1] == f"wrote {target}"
    metrics = json.loads(target.read_text(encoding="utf-8"))
    assert metrics["split"] == split
    assert metrics["overall"]["rows"] == {"test": 40, "valid": 40, "train": 320, None: 400}[split]
    assert f"{metrics['overall']['auc']:.4f}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("evaluate", "missing"), "missing: holds no run"),
        (("evaluate", "RUN", "--data", "missing.csv"), "missing.csv"),
        (("evaluate", "RUN", "--device", "warp"), "device 'warp'"),
        (("evaluate", "RUN", "--backend", "triton", "--device", "cpu"), "backend 'triton' cannot run"),
        (("predict", "RUN", "--data", "missing.csv", "--out", "p.csv"), "missing.csv"),
        (("predict", "missing", "--data", "DATA", "--out", "p.csv"), "missing: holds no run"),
        (("predict", "RUN", "--data", "DATA", "--out", "p.xlsx"), "p.xlsx: the name must end in .csv or .parquet"),
        (("predict", "RUN", "--data", "DATA", "--out", "no/p.csv"), "does not exist"),
        (("predict", "RUN", "--data", "DATA", "--out", "DATA"), "is the input file"),
    ],
)
def test_scoring_refuses_in_one_line(saml_rec, finished_run, small_dataset, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    known = {"RUN": finished_run, "DATA": small_dataset.data}
    before = {*finished_run.iterdir()}
    assert_one_error(saml_rec(*(known.get(argument, argument) for argument in arguments)), part)
    assert not list(tmp_path.iterdir())
    assert {*finished_run.iterdir()} == before


def resealed(change):
    """Changes what model.pt holds, and gives it the digest of that."""

    def apply(run):
        content = load(run / "model.pt", "model")
        change(content)
        save(run / "model.pt", "model", content)

    return apply


def written(name, content):
    return lambda run: (run / name).write_text(content, encoding="utf-8")


FIRST = "features.embeddings.feature_user.table.weight"
DAMAGES = {
    "a tensor is missing": (resealed(lambda c: c["weights"].pop(FIRST)), "model.pt: its parts do not fit", "Missing"),
    "a tensor is wide": (resealed(lambda c: c["weights"].update({FIRST: torch.ones(3, 3)})), "model.pt: its", "size"),
    "a tensor is text": (resealed(lambda c: c["weights"].update({FIRST: "x"})), "model.pt: its parts do not fit"),
    "no weights": (resealed(lambda c: c.pop("weights")), "model.pt: is damaged: its part weights is None"),
    "weights are a list": (resealed(lambda c: c.update(weights=[])), "model.pt: is damaged: its part weights is []"),
    "the model is unknown": (resealed(lambda c: c["options"].update(model="samml")), "model.pt: there is no", "samml"),
    "the model is no name": (resealed(lambda c: c["options"].update(model=[1])), "model.pt: its parts do not fit"),
    "an option is unknown": (resealed(lambda c: c["options"]["model_options"].update(depth=3)), "model.pt: ", "depth"),
    "the schema is empty": (resealed(lambda c: c.update(schema={})), "model.pt: schema: label is missing"),
    "the encoder is empty": (resealed(lambda c: c.update(encoder={})), "model.pt: encoder: format"),
    "no vocabulary": (resealed(lambda c: c["encoder"].pop("vocabularies")), "model.pt: its parts do not", "KeyError"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_model_whose_parts_do_not_fit_is_one_line(saml_rec, finished_run, small_dataset, tmp_path, name):
    damage, *parts = DAMAGES[name]
    run = shutil.copytree(finished_run, tmp_path / "run")
    damage(run)
    assert_one_error(saml_rec("evaluate", run), str(run), *parts)
    given = ("--data", small_dataset.data, "--out", tmp_path / "p.csv")
    assert_one_error(saml_rec("predict", run, *given), str(run), *parts)
    assert not (tmp_path / "p.csv").exists()


def of_earlier_format(run, results):
    """As version 0.1 left it, with this in metrics.json and history.json."""
    content = load(run / "model.pt", "model")
    del content["results"]
    torch.save({**content, "format": 1}, run / "model.pt")
    for name, text in results.items():
        (run / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["metrics.json", "history.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "3", "", "[1]", "[" * 10_000])
@pytest.mark.parametrize("earlier", [False, True])
def test_damaged_results_of_a_finished_run(train, tmp_path, finished_run, name, text, earlier):
    run = shutil.copytree(finished_run, tmp_path / "run")
    if earlier:
        of_earlier_format(run, {name: text})
    else:
        (run / name).write_text(text, encoding="utf-8")
    result = train("--resume", epochs=2)
    assert_one_error(result, f"{run / name}: is damaged: ")


def test_a_digit_changed_in_the_results_of_a_finished_run(train, tmp_path, finished_run):
    run = shutil.copytree(finished_run, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    metrics["overall"]["auc"] += 1e-4
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert_one_error(train("--resume", epochs=2), "metrics.json: is damaged: it is not as it was written")


def test_a_finished_run_of_the_earlier_format_is_read(train, saml_rec, tmp_path, finished_run):
    run = shutil.copytree(finished_run, tmp_path / "run")
    of_earlier_format(run, {})
    assert "is finished already (best epoch" in train("--resume", epochs=2).stdout
    assert saml_rec("evaluate", run).exit_code == 0
    now, before = (json.loads((run / f).read_text(encoding="utf-8")) for f in ("evaluation-test.json", "metrics.json"))
    assert now["overall"] == before["overall"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predict_adds_a_column(saml_rec, finished_run, dataset_of, small_dataset, tmp_path, suffix):
    dataset = dataset_of(small_dataset.frame.drop("click"))
    out = tmp_path / f"predictions.{suffix}"
    out.write_bytes(b"old")
    result = saml_rec("predict", finished_run, "--data", dataset.data, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote 400 rows to {out}\n"
    frame = polars.read_csv(out) if suffix == "csv" else polars.read_parquet(out)
    assert frame.columns == [*dataset.frame.columns, "prediction"]
    assert frame["prediction"].is_between(0, 1).all()
    assert [str(price) for price in frame["price"]] == [str(price) for price in dataset.frame["price"]]
    assert frame["user"].to_list() == dataset.frame["user"].to_list()


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (polars.Series([["t1"], []] * 200), "List(String)"),
        (polars.Series([{"x": 1}] * 400), "Struct({'x': Int64})"),
        (polars.Series([b"x"] * 400), "Binary"),
    ],
    ids=lambda value: str(value)[:6],
)
def test_predict_refuses_a_column_that_csv_cannot_hold(saml_rec, finished_run, small_dataset, tmp_path, column, dtype):
    """Before the model is read, and only for CSV."""
    data, out = tmp_path / "new.parquet", tmp_path / "predictions.csv"
    small_dataset.frame.with_columns(column.alias("tags" if dtype.startswith("List") else "more")).write_parquet(data)
    refused = saml_rec("predict", tmp_path / "missing", "--data", data, "--out", out)
    assert_one_error(refused, f"{data}: column ", f"holds {dtype}, which CSV cannot hold; write a .parquet file")
    assert not out.exists()
    assert saml_rec("predict", finished_run, "--data", data, "--out", tmp_path / "p.parquet").exit_code == 0


def test_data_synthetic_is_ready_to_train_on(saml_rec, tmp_path):
    out = tmp_path / "new" / "data"
    result = saml_rec("data", "synthetic", "--out", out, "--scenarios", 3, "--rows", 300, "--seed", 5)
    assert result.exit_code == 0, result.output
    names = ("synthetic.csv", "synthetic.toml", "synthetic-relation.json")
    assert result.stdout.splitlines() == [f"wrote {out / name}" for name in names]
    assert polars.read_csv(out / "synthetic.csv").height == 300
    files = ("--data", out / names[0], "--schema", out / names[1], "--out", tmp_path / "run")
    assert saml_rec("train", *files, *SMALL).exit_code == 0


def test_data_errors_are_one_line(saml_rec, tmp_path):
    assert_one_error(saml_rec("data", "synthetic", "--out", tmp_path, "--scenarios", 0), "scenarios must be at least 1")
    (tmp_path / "file").touch()
    assert_one_error(saml_rec("data", "synthetic", "--out", tmp_path / "file"), str(tmp_path / "file"))


@pytest.mark.parametrize(("arguments", "scenario"), [((), "age"), (("--scenario", "occupation"), "occupation")])
def test_data_ml_100k(saml_rec, tmp_path, monkeypatch, arguments, scenario):
    calls = []

    def write(out, **options):
        calls.append((out, options))
        return out / "a.csv", out / "a.toml"

    monkeypatch.setattr("saml_rec.datasets.ml100k.write_ml100k", write)
    result = saml_rec("data", "ml-100k", "--out", tmp_path, *arguments)
    assert calls == [(tmp_path, {"scenario": scenario})]
    assert result.stdout == f"wrote {tmp_path / 'a.csv'}\nwrote {tmp_path / 'a.toml'}\n"


def test_doctor(saml_rec):
    from saml_kernels import doctor

    assert saml_rec("doctor").stdout == doctor.report() + "\n"


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def in_c_locale():
    """Runs the command in a process that knows ASCII only; arguments may be bytes."""

    def run(*arguments, stdout=subprocess.PIPE):
        given = [part if isinstance(part, bytes) else os.fsencode(str(part)) for part in arguments]
        return subprocess.run(
            [sys.executable, "-m", "saml_rec", *given],
            env={**os.environ, **C_LOCALE},
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=240,
            check=False,
        )

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_that_are_no_text_in_a_locale_without_them(in_c_locale, small_dataset, tmp_path):
    name = "größe ".encode() + b"\xff"
    folder = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(folder)  # noqa: PTH102
    schema, run, out = folder + b"/s.toml", folder + b"/run", folder + b"/p.csv"
    shutil.copy(small_dataset.schema, schema)
    given = ("--schema", schema, "--out", run, *SMALL, "--hidden-dims", "8,4")
    done = in_c_locale("train", "--data", small_dataset.data, *given)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\udcc3\udcb6\udcc3\udc9fe \udcff/run/metrics.json" in done.stdout
    assert in_c_locale("evaluate", run).returncode == 0
    assert in_c_locale("predict", run, "--data", small_dataset.data, "--out", out).returncode == 0
    assert sorted(os.listdir(folder)) == [b"p.csv", b"run", b"s.toml"]  # noqa: PTH208
    # What polars reads needs a name that is text.
    shutil.copy(small_dataset.data, folder + b"/d.csv")
    refused = in_c_locale("train", "--data", folder + b"/d.csv", *given, "--overwrite")
    assert refused.returncode == 2
    assert refused.stderr.count(b"\n") == 1
    assert b"d.csv: this name is not ascii, the encoding of file names here; set PYTHONUTF8=1, or rename it" in (
        refused.stderr
    )


def test_a_name_that_is_no_text_survives_json(tmp_path):
    write_json(tmp_path / "a.json", {"path": "gr\udcffe"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"path": "gr\udcffe"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipe")
def test_nobody_reads_the_output_any_more(small_dataset, tmp_path, in_c_locale, train):
    given = ("--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "run")
    read, write = os.pipe()
    os.close(read)
    done = in_c_locale("train", *given, *SMALL, "--hidden-dims", "8,4", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
    assert train("--resume").exit_code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [("--help",), ("doctor",)])
def test_the_output_is_full(in_c_locale, monkeypatch, arguments, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = in_c_locale(*arguments, stdout=full)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("full", [(errno.ENOSPC, "No space left on device"), ("No space left (os error 28)",)])
def test_a_full_disk_in_predict_leaves_the_old_file(
    saml_rec, finished_run, small_dataset, tmp_path, monkeypatch, suffix, full
):
    out = tmp_path / f"predictions.{suffix}"
    out.write_bytes(b"old")
    out.chmod(0o600)

    def fail(*_, **__):
        raise OSError(*full)

    name = "DataFrame.write_csv" if suffix == "csv" else "LazyFrame.sink_parquet"
    given = ("predict", finished_run, "--data", small_dataset.data, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(f"polars.{name}", fail)
        assert_one_error(saml_rec(*given), f"{out}: No space left")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(out.name, b"old")]
    assert saml_rec(*given).exit_code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert len(list(tmp_path.iterdir())) == 1


LIMITED = """
import resource, signal, sys
from saml_rec.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
main(prog_name="saml-rec")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_that_the_system_refuses_to_let_grow(python, finished_run, small_dataset, tmp_path, suffix):
    out = tmp_path / f"predictions.{suffix}"
    done = python("-c", LIMITED, "predict", finished_run, "--data", small_dataset.data, "--out", out)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {out}: File too large")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


MANY_DIGITS, BEYOND = "9" * 6000, str(2**64)


@pytest.mark.parametrize("number", [MANY_DIGITS, BEYOND, f"-{MANY_DIGITS}"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--epochs"),
        ("train", "--batch-size"),
        ("train", "--seed"),
        ("train", "--hidden-dims"),
        ("train", "--num-experts"),
        ("train", "--num-leaves"),
        ("train", "--checkpoint-steps"),
        ("tune", "--trials"),
        ("compare", "--seeds"),
        ("compare", "--set"),
        ("bench", "--rows"),
        ("bench", "--local-dim"),
        ("bench", "--hidden"),
        ("data", "synthetic", "--users"),
        ("data", "synthetic", "--scenarios"),
    ],
)
def test_numbers_that_nothing_can_count_to(saml_rec, arguments, number):
    *command, option = arguments
    result = saml_rec(*command, option, f"saml.hidden-dims={number}" if option == "--set" else number)
    if command == ["data", "synthetic"] and number[0] == "-" and not result.stderr.startswith("Usage"):
        pytest.skip("negative sizes are the generator's to refuse")
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: saml-rec")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: Invalid value for '")
    assert len(last) < 220


def test_budgets_that_are_no_number(saml_rec):
    for budget in ("nan", "inf", "1e400"):
        assert "is not finite." in saml_rec("bench", "--budget", budget).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "is not valid TOML"),
        ("label = " + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("label = " + "9" * 6000, "is not valid TOML"),
        (
            "scenario = 'b'\nfeatures = {}\nlabel = 0x" + "f" * 6000,
            "label must be the name of a column, not a number of thousands of digits",
        ),
        ("split = [0x" + "f" * 6000 + ", 0, 0]\nlabel = 'a'\nscenario = 'b'\nfeatures = {}", "three fractions"),
        ("label = '" + "x" * 500 + "'\nscenario = '" + "x" * 500 + "'\nfeatures.a.kind = 'dense'", "they must differ"),
        ("'" + "\\t" * 300 + "' = 1", "unknown key"),
        ("'" + "k" * 3000 + "' = 1", "unknown key"),
        ("label = 'a'\nscenario = 'b'\nfeatures.'" + "n" * 900 + "'.kind = 'denser'", "kind must be one of"),
        (
            "label = 'a'\nscenario = 'b'\nfeatures.c = {kind = 'sparse', min_count = " + BEYOND + "}",
            "min_count must be",
        ),
        ("label = 'a'\nscenario = 'b'\nfeatures.c.kind = 'sparse'\nscenarios.min_rows = " + BEYOND, "min_rows must be"),
    ],
)
def test_schemas_of_absurd_size_are_one_short_line(train, tmp_path, text, message):
    schema = tmp_path / "absurd.toml"
    schema.write_text(text, encoding="utf-8")
    result = train(schema=schema)
    assert_one_error(result, "absurd.toml", message)
    assert len(result.stderr) < len(str(schema)) + 400


LONG = "x" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--model", LONG),
        ("train", "--device", f"{LONG}:1"),
        ("train", "--device", "\x1b[31mred"),
        ("train", "--table-lr", f"{LONG}=0.1"),
        ("train", f"--{LONG}"),
        ("train", "--gate", LONG),
        ("train", "--lr", "1 " * 5000),
        ("train", "--hidden-dims", LONG),
        (LONG,),
        ("evaluate", "run", "--split", LONG),
        ("compare", "--models", LONG),
        ("compare", "--models", f"{LONG},{LONG}"),
        ("compare", "--set", f"{LONG}.dropout=0.1"),
        ("compare", "--set", f"saml.{LONG}=0.1"),
        ("compare", "--set", f"saml.dropout={LONG}"),
        ("tune", "--models", LONG),
    ],
)
def test_messages_quote_80_characters_at_most(saml_rec, small_dataset, tmp_path, arguments):
    files = ("--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "out")
    command = arguments[0] if arguments[0] in ("train", "compare", "tune") else None
    result = saml_rec(*arguments, *(files if command else ()))
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert "\x1b" not in line
    assert "x" * 80 not in line
    assert len(line) < 900  # names of all options there are
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_pipes_and_devices_are_refused_before_they_are_opened(train, saml_rec, finished_run, tmp_path):
    pipe, folder = tmp_path / "pipe.csv", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    os.mkfifo(folder / "a.csv")
    for path in (pipe, folder, tmp_path / "*.csv", Path("/dev/zero")):
        if "*" not in path.name:
            assert_one_error(train(data=path), "expected a regular file")
        assert saml_rec("predict", finished_run, "--data", path, "--out", tmp_path / "p.csv").exit_code == 2
    assert_one_error(train(schema=pipe), "pipe.csv: is a named pipe; expected a regular file")
    assert_one_error(saml_rec("predict", finished_run, "--data", "x.csv", "--out", pipe), "is not a regular file")


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt", "metrics.json", "history.json"])
def test_a_pipe_in_a_run_directory_is_refused(train, finished_run, tmp_path, name):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    if name == "checkpoint.pt":
        (run / "metrics.json").unlink()
    assert_one_error(train("--resume", epochs=2), f"{run / name}: is a named pipe; expected a regular file")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 3 TiB"), ": Unable to allocate 3 TiB"),
        (MemoryError(), ": the system has none left"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            ": DefaultCPUAllocator",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ": CUDA out of memory"),
        (RuntimeError("std::bad_alloc"), ": std::bad_alloc"),
    ],
)
@pytest.mark.parametrize(
    ("where", "work"),
    [
        ("saml_rec.data.preparation.prepare", "preparing the data"),
        ("saml_rec.training.loop._run_epoch", "epoch 1 of training"),
        ("saml_rec.evaluation.scoring.num_batches", "epoch 1 of training"),
        ("saml_rec.training.loop._State.fresh", "saml-rec train"),
    ],
)
def test_memory_that_cannot_be_had_is_one_line(train, monkeypatch, error, said, where, work):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, fail)
    result = train()
    expected = said.replace(": the system has none left", "") if work == "saml-rec train" else said
    work = "scoring" if where.endswith("num_batches") else work
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"error: not enough memory for {work}{expected}" in result.stderr


def test_other_runtime_errors_are_defects(train, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training, "_run_epoch", fail)
    result = train()
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_runs_as_a_module(python):
    result = python("-m", "saml_rec.cli", "evaluate", "missing")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: missing: holds no run\n")
