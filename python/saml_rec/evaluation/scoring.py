"""Scoring with a trained model: metrics of a table's rows, and their probabilities."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars
import torch
from numpy.typing import NDArray
from polars.io.plugins import register_io_source
from rich.console import Console
from torch import Tensor, nn

from saml_rec.console import progress, say
from saml_rec.data.cells import Checks
from saml_rec.data.coverage import Coverage, Shares, checked_shares, scored_lines
from saml_rec.data.csv_format import CsvOptions
from saml_rec.data.encoding import DROPPED, Encoder
from saml_rec.data.order import Share
from saml_rec.data.preparation import Table, encoded_rows, for_split, with_codes
from saml_rec.data.readers import TableFiles
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths, table_files
from saml_rec.data.splits import SPLITS, split_of
from saml_rec.data.table import ROWS_PER_BLOCK, Batch, Fingerprint, reblocked
from saml_rec.errors import InputError, memory_for, shortened, shown
from saml_rec.evaluation.metrics import LabelledRows, check_rows, evaluate_scores, score_rows
from saml_rec.files import replacing, require_regular
from saml_rec.models.construction import (
    BUILT_BEFORE,
    backends_used,
    build_model,
    own_random_numbers,
    parameter_count,
    resolve_device,
)
from saml_rec.models.registry import hyperparameters
from saml_rec.processes import ALONE, Processes
from saml_rec.run_directory import RunDirectory, differences, versions
from saml_rec.sealed import content_of

PREDICTION = "prediction"
SCORING_BATCH_SIZE = 8192
PREDICTION_ROWS = 2**15
"""Rows that are read, scored and written at a time."""
Warn = Callable[[str], None]


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, ready to score tables.

    Args:
        model: in evaluation mode, on ``device``.
        content: model.pt without the weights.
        csv: what training was told of CSV files.
        features: the shares of the features' cells in the splits of training; empty for a run that did not keep them.
    """

    model: nn.Module
    encoder: Encoder
    schema: Schema
    device: torch.device
    content: Mapping[str, Any]
    csv: CsvOptions
    features: Mapping[str, Shares]

    def logits(self, table: Table, *, console: Console | None = None) -> NDArray[np.float64]:
        """Scores before the sigmoid, (N,)."""
        return score(self.model, table, self.device, console=console)

    def files(self, paths: Paths, csv: CsvOptions | None) -> TableFiles:
        """A table, its CSV files as ``csv`` says, or else what training was told, or else as they show themselves."""
        return TableFiles(paths, self.schema, (csv or CsvOptions()).over(self.csv))

    def lines(self, scored: Coverage) -> list[tuple[bool, str]]:
        """What is worth a line of the features of scored rows, each with whether it is a warning."""
        return list(scored_lines(self.encoder, scored, self.features))


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
    content = directory.load_model()
    with content_of(directory.model):
        schema = Schema.from_dict(content["schema"])
        encoder = Encoder.from_dict(content["encoder"])
        if encoder.schema != schema:
            raise InputError("its schema is not that of its encoder")
        name = content["options"]["model"]
        known = hyperparameters(name)
        model_options = {**BUILT_BEFORE.get(name, {}), **content["options"]["model_options"]}
        csv, features = CsvOptions(**content.get("csv", {})), checked_shares(content.get("features", {}))
    if backend is not None:
        if "backend" not in known:
            raise InputError(f"model {name} has no kernels and takes no backend, got {backend!r}")
        model_options["backend"] = backend
    target = resolve_device(device)
    with content_of(directory.model), own_random_numbers(target):
        model = build_model(name, model_options, schema, encoder)
        model.load_state_dict(content.pop("weights"))
    model.to(target).eval()
    backends_used(model, target)
    return TrainedModel(model, encoder, schema, target, content, csv, features)


def evaluate(
    run: Path,
    *,
    data_path: Paths | None = None,
    split: str | None = None,
    device: str = "auto",
    backend: str | None = None,
    console: Console | None = None,
    csv: CsvOptions | None = None,
    warn: Warn = lambda _: None,
) -> dict[str, Any]:
    """Measures of a finished run's model.

    Args:
        run: the run directory.
        data_path: the table to measure on, as :func:`saml_rec.data.sources.table_files` takes it; None: that of
            training.
        split: the rows that were this split in training, checked to be the same rows; None: all rows of
            ``data_path``, or the test rows when that is None too.
        device, backend: as :func:`load_trained`.
        console: where to show progress, and what is notable of the rows; None prints nothing.
        csv: how CSV files are written; what training was told unless given, else found in each of them.
        warn: takes what is wrong with the rows, a line each.

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
    start = time.perf_counter()
    coverage = Coverage(trained.encoder)
    rows, logits = _scored(trained, trained.files(data_path, csv), split, run, console, coverage)
    metrics = evaluate_scores(rows, logits, trained.encoder.scenario_names)
    seconds = time.perf_counter() - start
    _say(trained.lines(coverage), console, warn)
    return {
        "model": trained.content["options"]["model"],
        "split": split,
        **metrics,
        "best_epoch": trained.content["best_epoch"],
        "seed": trained.content["options"]["seed"],
        "parameters": parameter_count(trained.model),
        "device": str(trained.device),
        "backend": backends_used(trained.model, trained.device),
        "data": {"path": recorded(data_path), "features": coverage.shares()},
        "timing": {"seconds": seconds, "rows_per_second": len(logits) / seconds},
        "versions": versions(),
    }


def _say(lines: list[tuple[bool, str]], console: Console | None, warn: Warn) -> None:
    for is_wrong, line in lines:
        if is_wrong:
            warn(line)
        else:
            say(console, line)


def _scored(
    trained: TrainedModel,
    files: TableFiles,
    split: str | None,
    run: Path,
    console: Console | None,
    coverage: Coverage,
) -> tuple[LabelledRows, NDArray[np.float64]]:
    """All rows, or those of a split, and their logits; a chunk at a time. Counts them in ``coverage``."""
    for line in files.format_lines():
        say(console, line)
    divided, expected = None, 0
    if split is not None:
        divided = split_of(trained.schema, files.checked(for_split(trained.schema)), trained.content["options"]["seed"])
        chosen = with_codes(divided, files.checked(for_split(trained.schema)))
        expected = sum(int((codes == SPLITS.index(split)).sum()) for _, codes in chosen)
    digest = Fingerprint(expected)
    tables = encoded_rows(trained.encoder, files.checked(Checks(split=split is not None)), divided, {split: coverage})
    chosen_tables = (table for name, table in tables if split in (None, name))
    parts: list[tuple[LabelledRows, NDArray[np.float64]]] = []
    for table in reblocked(chosen_tables, ROWS_PER_BLOCK):
        if split is not None:
            digest.add(table)
        parts.append((labelled_rows(table), trained.logits(table, console=console)))
    if not parts:
        raise InputError(f"{files.name}: has no rows to evaluate" + (f" in split {split}" if split else ""))
    if split is not None and digest.hexdigest() != trained.content["data"].get(split):
        raise InputError(f"{files.name}: its {split} rows are not those that {run} was trained with")
    rows = LabelledRows.joined([part for part, _ in parts])
    if rows.weights is not None and not rows.weights.any():
        raise InputError(
            f"{files.name}: weight column {shown(trained.schema.weight)}: all {len(rows)} rows have weight 0"
        )
    return rows, np.concatenate([logits for _, logits in parts])


def labelled_rows(table: Table) -> LabelledRows:
    """What the rows of a table are measured against.

    Raises:
        InputError: the table has no labels.
    """
    if table.label is None:
        raise InputError("the table has no labels to measure against")
    return LabelledRows(
        table.label.numpy(),
        table.scenario.numpy(),
        None if table.weight is None else table.weight.numpy(),
        None if table.group is None else table.group.numpy(),
    )


@dataclass(frozen=True)
class Predictions:
    """The rows of a table with a column ``prediction``, as a stream.

    Args:
        columns: names and types, the prediction last.
        frames: the rows in order, a bounded number at a time.
        lines: what there is to say of the rows so far, each line with whether it is a warning.
    """

    columns: Mapping[str, polars.DataType]
    frames: Iterator[polars.DataFrame]
    lines: Callable[[], list[tuple[bool, str]]]

    def write(self, out: Path) -> int:
        """Writes a .csv or .parquet file, whole or not at all; the number of rows.

        Raises:
            InputError: a cell cannot be used.
            OSError: the file cannot be written.
        """
        rows = 0
        failed: list[Exception] = []

        def counted(*_: Any) -> Iterator[polars.DataFrame]:
            nonlocal rows
            try:
                for frame in self.frames:
                    rows += frame.height
                    yield frame
            except Exception as error:
                # What runs this turns exceptions into its own.
                failed.append(error)
                raise

        with replacing(out) as file:
            if out.suffix == ".parquet":
                lazy = register_io_source(counted, schema=dict(self.columns))
                try:
                    lazy.sink_parquet(file)
                except Exception as error:
                    if failed:
                        raise failed[0] from None
                    # What the system says of the file has no type of its own there.
                    _, said, reason = str(error).partition("underlying IO error: ")
                    if said:
                        raise OSError(reason) from error
                    raise
            else:
                for frame in counted():
                    frame.write_csv(file, include_header=rows == frame.height)
        return rows


def predictions(
    run: Path,
    data_path: Paths,
    *,
    device: str = "auto",
    backend: str | None = None,
    console: Console | None = None,
    csv: CsvOptions | None = None,
) -> Predictions:
    """The rows of a table with the probability that their label is 1, read and scored as they are asked for.

    Args:
        run: the run directory.
        data_path: a table with the columns of the run's schema, as :func:`saml_rec.data.sources.table_files` takes it.
            It needs no label. Several files have the same columns.
        device, backend: as :func:`load_trained`.
        console: where to show progress; None prints nothing.
        csv: as of :func:`evaluate`.

    Returns:
        The table as :func:`saml_rec.data.read_frame` reads it, with a column ``prediction``, float64 in [0, 1]; null
        in rows of scenarios that the schema drops.

    Raises:
        InputError: the run or the table cannot be used, or the table has a column ``prediction`` already.
        OSError: a file cannot be read.
    """
    trained = load_trained(run, device=device, backend=backend)
    files = trained.files(data_path, csv)
    for line in files.format_lines():
        say(console, line)
    first = files.files[0]
    columns = files.columns[first]
    for file, other in files.columns.items():
        if PREDICTION in other:
            raise InputError(f"{file}: already has a column {PREDICTION!r}")
        if other != columns:
            changed = differences({k: str(v) for k, v in columns.items()}, {k: str(v) for k, v in other.items()})
            raise InputError(
                f"{file}: its columns are not those of {first}: {shortened('; '.join(changed)) or 'another order'}"
            )
    checks = Checks(label=False, split=False)
    files.require(checks)
    coverage = Coverage(trained.encoder)
    scored = (
        _with_prediction(trained, frame, checked, coverage, console)
        for frame, checked in files.pairs(checks, PREDICTION_ROWS)
    )
    return Predictions({**columns, PREDICTION: polars.Float64()}, scored, lambda: trained.lines(coverage))


def _with_prediction(
    trained: TrainedModel,
    frame: polars.DataFrame,
    checked: polars.DataFrame,
    coverage: Coverage,
    console: Console | None,
) -> polars.DataFrame:
    scenario = trained.encoder.scenario_ids(checked[trained.schema.scenario])
    table = trained.encoder.encode_kept(checked, scenario)
    coverage.add(checked, table)
    logits = trained.logits(table, console=console)
    probabilities = np.full(frame.height, np.nan)
    probabilities[scenario != DROPPED] = torch.from_numpy(logits).sigmoid().numpy()
    return frame.with_columns(polars.Series(PREDICTION, probabilities).fill_nan(None))


def predict(run: Path, data_path: Paths, **options: Any) -> polars.DataFrame:
    """:func:`predictions` as one frame."""
    found = predictions(run, data_path, **options)
    return polars.concat([polars.DataFrame(schema=dict(found.columns)), *found.frames])


def score(
    model: nn.Module,
    table: Table,
    device: torch.device,
    *,
    batch_size: int = SCORING_BATCH_SIZE,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> NDArray[np.float64]:
    """Logits of all rows in their order, (N,), with the model in evaluation mode.

    Several processes score their share each, and all of them get all logits.

    Raises:
        InputError: a logit is not finite.
    """
    was_training = model.training
    model.eval()
    parts = [torch.empty(0, dtype=torch.float64)]
    share = Share(processes.rank, processes.count)
    with (
        memory_for("scoring"),
        torch.no_grad(),
        progress(console, "scoring", num_batches(table, batch_size)) as advance,
    ):
        for batch in table.batches(batch_size, share=share):
            # A model whose tables are in several processes is asked by all of them.
            rows = len(batch["scenario"])
            parts.append(model(to_device(batch if rows else table.first(), device)).logit[:rows].double().cpu())
            advance()
    model.train(was_training)
    logits = processes.interleaved(torch.cat(parts), len(table)).numpy()
    if not np.isfinite(logits).all():
        broken = int((~np.isfinite(logits)).sum())
        raise InputError(f"the model gives {broken} of {len(logits)} rows a score that is not finite")
    return logits


def metrics_of(
    model: nn.Module,
    table: Table,
    encoder: Encoder,
    device: torch.device,
    console: Console | None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Overall and per scenario as :func:`saml_rec.evaluation.metrics.evaluate_scores` gives them.

    Raises:
        InputError: the table has no labels, or a score is not finite.
    """
    rows = labelled_rows(table)
    logits = score(model, table, device, console=console, processes=processes)
    return dict(evaluate_scores(rows, logits, encoder.scenario_names))


def overall_of(
    model: nn.Module, table: Table, device: torch.device, console: Console | None, processes: Processes = ALONE
) -> dict[str, Any]:
    """Of all rows together, as :func:`saml_rec.evaluation.metrics.score_rows` gives them.

    Raises:
        InputError: the table has no labels, or a score is not finite.
    """
    rows = labelled_rows(table)
    logits = score(model, table, device, console=console, processes=processes)
    check_rows(rows, logits)
    return dict(score_rows(rows, logits))


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device."""
    moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    return {**moved, "features": {name: ids.to(device) for name, ids in batch["features"].items()}}


def num_batches(table: Table, batch_size: int) -> int:
    """Batches that hold every row once."""
    return math.ceil(len(table) / batch_size)


def recorded(paths: Paths) -> str | list[str]:
    """As a run remembers where its data were."""
    if isinstance(paths, str | Path):
        return str(Path(paths).resolve())
    found = [str(Path(path).resolve()) for path in paths]
    return found[0] if len(found) == 1 else found


def _training_file(run: Path, content: Mapping[str, Any]) -> Paths:
    known = content.get("data_path")
    if known is None:
        raise InputError(f"{run}: does not know its training file; name one with --data")
    try:
        files = table_files(known)
    except InputError as error:
        raise InputError(f"{error}; name what {run} was trained on with --data and --split") from None
    for path in files:
        if not path.exists():
            raise InputError(f"{path}: the file that {run} was trained on is gone; name it with --data and --split")
        require_regular(path)
    return known if isinstance(known, str) else tuple(known)
