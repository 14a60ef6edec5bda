"""What TensorBoard, MLflow and trackers of one's own are told of a run."""

import json
import logging

import pytest

from saml_rec.data.preparation import prepare
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.training import TrainOptions, train
from saml_rec.training.trackers import MLflow, TensorBoard, of_epoch, of_test, trackers_of


class Recorder:
    """Keeps what it is told; fails when it is asked to."""

    def __init__(self, fails_at=None):
        self.told, self.fails_at = [], fails_at

    def _tell(self, what, *arguments):
        if what == self.fails_at:
            raise OSError(f"no {what}\nhere")
        self.told.append((what, *arguments))

    def begin(self, run, options, epochs):
        self._tell("begin", run, options["model"], epochs)

    def epoch(self, entry):
        self._tell("epoch", entry["epoch"])

    def end(self, metrics):
        self._tell("end", metrics and metrics["best_epoch"])


OPTIONS = TrainOptions(model="mlp", epochs=2, patience=0, device="cpu", model_options={"hidden_dims": (4,)})


@pytest.fixture
def run(small_dataset, tmp_path):
    """Trains with a tracker."""
    schema = load_schema(small_dataset.schema)
    data = prepare(small_dataset.data, schema, seed=0)

    def run(*trackers, **options):
        return train(data, schema, OPTIONS, tmp_path / "run", trackers=trackers, **options)

    return run


def test_a_tracker_is_told_in_order(run, tmp_path):
    first, second = Recorder(), Recorder()
    result = run(first, second)
    best = result.metrics["best_epoch"]
    assert first.told == [("begin", tmp_path / "run", "mlp", 0), ("epoch", 1), ("epoch", 2), ("end", best)]
    assert second.told == first.told


def test_a_resumed_run_says_where_it_goes_on(run, tmp_path, monkeypatch):
    class Stops(Recorder):
        def epoch(self, entry):
            super().epoch(entry)
            raise KeyboardInterrupt

    stopped, resumed = Stops(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert [what for what, *_ in stopped.told] == ["begin", "epoch", "end"]
    assert stopped.told[-1] == ("end", None)
    run(resumed, resume=True)
    assert [(what, given[-1]) for what, *given in resumed.told[:2]] == [("begin", 1), ("epoch", 2)]


@pytest.mark.parametrize("when", ["epoch", "end"])
def test_one_that_fails_is_left_out_and_the_others_go_on(run, when, caplog):
    failing, other = Recorder(when), Recorder()
    with caplog.at_level(logging.WARNING, logger="saml_rec"):
        result = run(failing, other)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"Recorder is told no more: OSError: no {when} here"]
    assert [what for what, *_ in other.told] == ["begin", "epoch", "epoch", "end"]
    assert result.out.joinpath("metrics.json").exists()


def test_one_that_cannot_begin_ends_the_run_before_it_writes(run, tmp_path):
    other = Recorder()
    with pytest.raises(InputError, match=r"^Recorder cannot be told of the run: OSError: no begin here$"):
        run(other, Recorder("begin"))
    assert [what for what, *_ in other.told] == ["begin", "end"]
    assert not list((tmp_path / "run").iterdir())


def test_what_is_drawn():
    entry = {"epoch": 3, "train_loss": 0.5, "valid": {"auc": None, "logloss": 0.25, "rows": 7}, "fitted": {"x": "y"}}
    assert of_epoch(entry) == {"train_loss": 0.5, "valid/logloss": 0.25, "valid/rows": 7}
    metrics = {"overall": {"auc": 0.5}, "scenarios": {"de": {"auc": 0.75}, "fr": {"auc": None}}, "seed": 0}
    assert of_test(metrics) == {"test/auc": 0.5, "test by scenario/de/auc": 0.75}


@pytest.mark.parametrize(("given", "extra"), [(("tb", None), "tensorboard"), ((None, "uri"), "mlflow")])
def test_what_is_not_installed_is_one_line(monkeypatch, saml_rec, small_dataset, tmp_path, given, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"is not installed; pip install 'saml-kernels\[{extra}\]'"):
        trackers_of(*given)
    result = saml_rec(
        *("train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "run"),
        *(f"--{extra}", "x"),
    )
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"saml-kernels[{extra}]" in result.stderr
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_curves(run, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra saml-kernels[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(TensorBoard(tmp_path / "tb"))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("valid/logloss")]
    expected = [(entry["epoch"], pytest.approx(entry["valid"]["logloss"], rel=1e-6)) for entry in result.history]
    assert drawn == expected
    (test,) = events.Scalars("test/logloss")
    assert (test.step, test.value) == (2, pytest.approx(result.metrics["overall"]["logloss"], rel=1e-6))
    assert "test by scenario/de/auc" in events.Tags()["scalars"]


def test_mlflow_has_the_run_and_goes_on_in_it(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra saml-kernels[mlflow] is not installed")
    # Its stores of files ask for it; its other stores need packages that mlflow-skinny has not.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "ml").as_uri()

    class Stops(MLflow):
        def epoch(self, entry):
            super().epoch(entry)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Stops(uri))
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("saml_rec").experiment_id
    (stopped,) = client.search_runs([experiment])
    assert stopped.info.status == "FAILED"
    result = run(MLflow(uri), resume=True)
    (finished,) = client.search_runs([experiment])
    assert (finished.info.status, finished.info.run_name) == ("FINISHED", "run")
    assert finished.data.params["model"] == "mlp"
    assert finished.data.params["epochs"] == "2"
    history = [(each.step, each.value) for each in client.get_metric_history(finished.info.run_id, "valid/logloss")]
    assert history == [(entry["epoch"], entry["valid"]["logloss"]) for entry in result.history]
    assert finished.data.metrics["test/logloss"] == result.metrics["overall"]["logloss"]
    # A scenario is called [it]; MLflow takes no brackets.
    assert "test by scenario/_it_/logloss" in finished.data.metrics


def test_both_options(saml_rec, small_dataset, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra saml-kernels[tensorboard] is not installed")
    pytest.importorskip("mlflow", reason="the extra saml-kernels[mlflow] is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = saml_rec(
        *("train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", tmp_path / "run"),
        *("--model", "mlp", "--epochs", 1, "--tensorboard", tmp_path / "tb", "--mlflow", (tmp_path / "ml").as_uri()),
    )
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "tb").glob("events.*"))
    assert list((tmp_path / "ml").glob("*/*/metrics"))
    options = json.loads((tmp_path / "run" / "metrics.json").read_text())["options"]
    assert "mlflow" not in options
