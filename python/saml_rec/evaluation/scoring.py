"""Scoring with a trained model: metrics of a table's rows, and their probabilities."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from saml_rec.console import progress
from saml_rec.data.encoding import Encoder
from saml_rec.data.readers import conform, read_frame, read_table
from saml_rec.data.schema import Schema
from saml_rec.data.splits import split_rows
from saml_rec.data.table import Batch, EncodedTable, fingerprint
from saml_rec.errors import InputError
from saml_rec.evaluation.metrics import evaluate_scores
from saml_rec.models.construction import backends_used, build_model, own_random_numbers, parameter_count, resolve_device
from saml_rec.run_directory import RunDirectory, load, versions

PREDICTION = "prediction"
SCORING_BATCH_SIZE = 8192


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, ready to score tables.

    Args:
        model: in evaluation mode, on ``device``.
        content: model.pt without the weights.
    """

    model: nn.Module
    encoder: Encoder
    schema: Schema
    device: torch.device
    content: Mapping[str, Any]

    def logits(self, table: EncodedTable, *, console: Console | None = None) -> NDArray[np.float64]:
        """Scores before the sigmoid, (N,)."""
        return score(self.model, table, self.device, console=console)


def load_trained(run: Path, *, device: str = "auto", backend: str | None = None) -> TrainedModel:
    """The best model of a finished run.

    Args:
        run: the run directory.
        device: where to score, as in :class:`saml_rec.training.loop.TrainOptions`.
        backend: of the kernels; None: as in training.

    Raises:
        InputError: no finished run there, a damaged file, or a device or backend that cannot be used.
    """
    directory = RunDirectory(run)
    if not directory.started:
        raise InputError(f"{run}: holds no run")
    if not directory.finished:
        raise InputError(f"{run}: holds an unfinished run; finish it with train --resume")
    content = load(directory.model, "model")
    schema = Schema.from_dict(content["schema"], source=str(directory.model))
    encoder = Encoder.from_dict(content["encoder"])
    options = content["options"]
    model_options = dict(options["model_options"])
    if backend is not None:
        model_options["backend"] = backend
    target = resolve_device(device)
    with own_random_numbers(target):
        model = build_model(options["model"], model_options, schema, encoder)
    model.load_state_dict(content.pop("weights"))
    model.to(target).eval()
    backends_used(model, target)
    return TrainedModel(model, encoder, schema, target, content)


def evaluate(
    run: Path,
    *,
    data_path: Path | None = None,
    split: str | None = None,
    device: str = "auto",
    backend: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures of a finished run's model.

    Args:
        run: the run directory.
        data_path: the table to measure on; None: the file that the run was trained on.
        split: the rows that were this split in training, checked to be the same rows; None: all rows of
            ``data_path``, or the test rows when that is None too.
        device, backend: as :func:`load_trained`.
        console: where to show progress; None prints nothing.

    Returns:
        What saml-rec evaluate writes: see docs/cli.md.

    Raises:
        InputError: the run, the table or a split of it cannot be used.
        OSError: a file cannot be read.
    """
    trained = load_trained(run, device=device, backend=backend)
    if data_path is None:
        split = split or "test"
        data_path = _training_file(run, trained.content)
    frame = read_table(data_path, trained.schema, need_split=split is not None)
    if split is None:
        table = trained.encoder.encode(frame)
    else:
        rows = split_rows(frame, trained.schema, trained.content["options"]["seed"])[split]
        table = trained.encoder.encode(frame, rows=rows)
        if fingerprint(table) != trained.content["data"][split]:
            raise InputError(f"{data_path}: its {split} rows are not those that {run} was trained with")
    if len(table) == 0:
        raise InputError(f"{data_path}: has no rows to evaluate" + (f" in split {split}" if split else ""))
    start = time.perf_counter()
    metrics = metrics_of(trained.model, table, trained.encoder, trained.device, console)
    seconds = time.perf_counter() - start
    return {
        "model": trained.content["options"]["model"],
        "split": split,
        **metrics,
        "best_epoch": trained.content["best_epoch"],
        "seed": trained.content["options"]["seed"],
        "parameters": parameter_count(trained.model),
        "device": str(trained.device),
        "backend": backends_used(trained.model, trained.device),
        "data": {"path": str(data_path.resolve())},
        "timing": {"seconds": seconds, "rows_per_second": len(table) / seconds},
        "versions": versions(),
    }


def predict(
    run: Path,
    data_path: Path,
    *,
    device: str = "auto",
    backend: str | None = None,
    console: Console | None = None,
) -> polars.DataFrame:
    """The rows of a table with the probability that their label is 1.

    Args:
        run: the run directory.
        data_path: a table with the columns of the run's schema; it needs no label.
        device, backend: as :func:`load_trained`.
        console: where to show progress; None prints nothing.

    Returns:
        The table as :func:`saml_rec.data.read_frame` reads it, with a column ``prediction``, float64 in [0, 1].

    Raises:
        InputError: the run or the table cannot be used, or the table has a column ``prediction`` already.
        OSError: a file cannot be read.
    """
    trained = load_trained(run, device=device, backend=backend)
    frame = read_frame(data_path)
    if PREDICTION in frame.columns:
        raise InputError(f"{data_path}: already has a column {PREDICTION!r}")
    checked = conform(frame, trained.schema, source=str(data_path), need_label=False)
    logits = trained.logits(trained.encoder.encode(checked), console=console)
    return frame.with_columns(polars.Series(PREDICTION, torch.from_numpy(logits).sigmoid().numpy()))


def score(
    model: nn.Module,
    table: EncodedTable,
    device: torch.device,
    *,
    batch_size: int = SCORING_BATCH_SIZE,
    console: Console | None = None,
) -> NDArray[np.float64]:
    """Logits of all rows in their order, (N,), with the model in evaluation mode.

    Raises:
        InputError: a logit is not finite.
    """
    was_training = model.training
    model.eval()
    parts = [np.empty(0)]
    with torch.no_grad(), progress(console, "scoring", num_batches(table, batch_size)) as advance:
        for batch in table.batches(batch_size):
            parts.append(model(to_device(batch, device)).logit.double().cpu().numpy())
            advance()
    model.train(was_training)
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        broken = int((~np.isfinite(logits)).sum())
        raise InputError(f"the model gives {broken} of {len(logits)} rows a score that is not finite")
    return logits


def metrics_of(
    model: nn.Module, table: EncodedTable, encoder: Encoder, device: torch.device, console: Console | None
) -> dict[str, Any]:
    """Overall and per scenario as :func:`saml_rec.evaluation.metrics.evaluate_scores` gives them.

    Raises:
        InputError: the table has no labels, or a score is not finite.
    """
    if table.label is None:
        raise InputError("the table has no labels to measure against")
    logits = score(model, table, device, console=console)
    return dict(evaluate_scores(table.label.numpy(), logits, table.scenario.numpy(), encoder.scenario_names))


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    return {**moved, "features": {name: ids.to(device) for name, ids in batch["features"].items()}}


def num_batches(table: EncodedTable, batch_size: int) -> int:
    """Batches that hold every row once."""
    return math.ceil(len(table) / batch_size)


def _training_file(run: Path, content: Mapping[str, Any]) -> Path:
    if content["data_path"] is None:
        raise InputError(f"{run}: does not know its training file; name one with --data")
    path = Path(content["data_path"])
    if not path.exists():
        raise InputError(f"{path}: the file that {run} was trained on is gone; name it with --data and --split")
    return path
