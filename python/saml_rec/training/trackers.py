"""Who else is told of a run: TensorBoard, MLflow, or what somebody writes for another program.

A tracker that cannot begin is an error before training. One that fails later is told of once and left out: what is
learnt does not depend on a server of somebody else's.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from saml_rec.console import LOGGER
from saml_rec.errors import InputError, shortened

EXPERIMENT = "saml_rec"
"""Of MLflow, unless MLFLOW_EXPERIMENT_NAME says another."""


class Tracker(Protocol):
    """Is told of a run; every method may raise what it will."""

    def begin(self, run: Path, options: Mapping[str, Any], epochs: int) -> None:
        """Training begins, or goes on after so many ``epochs``, into the directory ``run``."""

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch ended: its entry of history.json."""

    def end(self, metrics: Mapping[str, Any] | None) -> None:
        """The run is finished with the content of metrics.json, or ended before with None."""


def numbers(values: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested values by their names, ``valid/auc``; neither texts nor metrics that are not defined."""
    for key, value in values.items():
        path = f"{name}/{key}" if name else str(key)
        if isinstance(value, Mapping):
            yield from numbers(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, float(value)


def of_epoch(entry: Mapping[str, Any]) -> dict[str, float]:
    """What is drawn of an epoch."""
    return {name: value for name, value in numbers(entry) if name != "epoch"}


def of_test(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What is drawn of a finished run: test metrics, overall and by scenario."""
    return dict(numbers({"test": metrics["overall"], "test by scenario": metrics["scenarios"]}))


class TensorBoard:
    """Curves by epoch for TensorBoard, the extra saml-kernels[tensorboard].

    Args:
        directory: of the event files, made if missing.

    Raises:
        InputError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        _require("tensorboard", "TensorBoard", "tensorboard")
        self._directory = directory
        self._epochs = 0

    def begin(self, run: Path, options: Mapping[str, Any], epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process wrote after the checkpoint is not shown.
        self._writer = SummaryWriter(str(self._directory), purge_step=epochs + 1 if epochs else None)
        lines = [f"    {name} = {value}" for name, value in options.items()]
        self._writer.add_text("options", "\n".join(lines))
        self._epochs = epochs

    def epoch(self, entry: Mapping[str, Any]) -> None:
        self._epochs = entry["epoch"]
        for name, value in of_epoch(entry).items():
            self._writer.add_scalar(name, value, self._epochs)
        self._writer.flush()

    def end(self, metrics: Mapping[str, Any] | None) -> None:
        for name, value in ({} if metrics is None else of_test(metrics)).items():
            self._writer.add_scalar(name, value, self._epochs)
        self._writer.close()


class MLflow:
    """A run of MLflow, the extra saml-kernels[mlflow]: options as parameters, metrics by epoch, its end.

    The run goes by the run directory's path in a tag: a resumed one goes on in the same run of MLflow.

    Args:
        uri: of the tracking server or store.

    Raises:
        InputError: MLflow is not installed.
    """

    TAG = "saml_rec.directory"

    def __init__(self, uri: str) -> None:
        _require("mlflow", "MLflow", "mlflow")
        self._uri = uri

    def begin(self, run: Path, options: Mapping[str, Any], epochs: int) -> None:
        import os

        from mlflow import MlflowClient

        client = self._client = MlflowClient(self._uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        known = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if known is None else known.experiment_id
        # A digest, as a filter cannot quote every path.
        directory = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()
        found = client.search_runs([experiment], f"tags.`{self.TAG}` = '{directory}'", max_results=1) if epochs else []
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        begun = client.create_run(experiment, tags={self.TAG: directory}, run_name=run.resolve().name)
        self._id = begun.info.run_id
        for option, value in options.items():
            client.log_param(self._id, option, value)

    def epoch(self, entry: Mapping[str, Any]) -> None:
        for name, value in of_epoch(entry).items():
            self._client.log_metric(self._id, _plain(name), value, step=entry["epoch"])

    def end(self, metrics: Mapping[str, Any] | None) -> None:
        for name, value in ({} if metrics is None else of_test(metrics)).items():
            self._client.log_metric(self._id, _plain(name), value)
        self._client.set_terminated(self._id, "FAILED" if metrics is None else "FINISHED")


def _plain(name: str) -> str:
    """A name of a metric as MLflow takes it: letters, digits and some signs."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)[:250]


def _require(module: str, name: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{name} is not installed; pip install 'saml-kernels[{extra}]'")


def trackers_of(tensorboard: Path | None, mlflow: str | None) -> list[Tracker]:
    """What the options ask for.

    Raises:
        InputError: one is not installed.
    """
    trackers: list[Tracker] = []
    if tensorboard is not None:
        trackers.append(TensorBoard(tensorboard))
    if mlflow is not None:
        trackers.append(MLflow(mlflow))
    return trackers


class Tracked:
    """Tells trackers of one run.

    Args:
        trackers: who is told.
        run: the run directory.
        options: as they are in metrics.json.
    """

    def __init__(self, trackers: Sequence[Tracker], run: Path, options: Mapping[str, Any]) -> None:
        self._trackers = list(trackers)
        self._run, self._options = run, options
        self._begun: list[Tracker] = []

    def begun(self, epochs: int) -> None:
        """Training begins after so many epochs.

        Raises:
            InputError: a tracker cannot begin.
        """
        for tracker in self._trackers:
            try:
                tracker.begin(self._run, self._options, epochs)
            except Exception as error:
                raise InputError(f"{_name(tracker)} cannot be told of the run: {_reason(error)}") from error
            self._begun.append(tracker)

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch ended."""
        self._tell(lambda tracker: tracker.epoch(entry))

    def finished(self, metrics: Mapping[str, Any] | None) -> None:
        """The run ended; told once."""
        self._tell(lambda tracker: tracker.end(metrics))
        self._begun.clear()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._begun):
            try:
                what(tracker)
            except Exception as error:
                self._begun.remove(tracker)
                LOGGER.warning("%s is told no more: %s", _name(tracker), _reason(error))


def _name(tracker: Tracker) -> str:
    return type(tracker).__name__


def _reason(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextmanager
def tracking(trackers: Sequence[Tracker], run: Path, options: Mapping[str, Any]) -> Iterator[Tracked]:
    """A run that trackers are told of, also where it ends by an error."""
    tracked = Tracked(trackers, run, options)
    try:
        yield tracked
    finally:
        tracked.finished(None)
