"""Several models on one split and several seeds: metrics, how sure they are, and which models differ.

    OUT/runs/MODEL/seed-S/       the training runs, as saml-rec train leaves them, with what comparing adds: run.json,
                                 and test-logits.npy with the scores of the test rows
    OUT/compare.json             all metrics
    OUT/report.html              the same as one page without any other file

A finished run is not trained or scored again; a run of other options or data is refused.
"""

import contextlib
import hashlib
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saml_rec.comparison.memory import PeakMemory
from saml_rec.comparison.report_page import write_page
from saml_rec.comparison.significance import Errors, RowError, holm, judge, row_errors, verdict_of
from saml_rec.comparison.verdicts import verdicts
from saml_rec.console import METRIC_NAMES, interval, say, spread, table_of
from saml_rec.data.preparation import PreparedData
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths, named
from saml_rec.errors import InputError, shortened
from saml_rec.evaluation.metrics import LabelledRows, calibration, evaluate_scores, score_rows
from saml_rec.evaluation.mutual_weights import mean_mutual_weights
from saml_rec.evaluation.scoring import labelled_rows, load_trained
from saml_rec.files import leftovers, replacing, require_regular, write_json
from saml_rec.models.registry import hyperparameters
from saml_rec.run_directory import RunDirectory, versions
from saml_rec.sealed import read_sealed_json, write_sealed_json
from saml_rec.training import TrainOptions, train

OVERALL = "overall"
ALL_MODELS = "all"
WITHIN_SCENARIOS = ("auc", "logloss", "gauc")
"""Metrics whose differences are judged in every scenario too; the others only for all rows."""
TRAINING_CHANGES = ("learning_rate", "weight_decay", "scenario_rate", "scenario_decay")
SAME_LOSS = 1e-5
"""How much the log loss of kept scores may differ from that of the run, relatively: devices sum in another order."""

LOGITS = "logits"
"""Key of run.json under which the digest of test-logits.npy stands."""
ADDED = {"peak_bytes", "mutual_weights"}
"""Its other keys."""

Record = dict[str, Any]
Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n − 1) over seeds; the deviation of one seed is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "deviation": self.deviation}


def compare(
    data: PreparedData,
    schema: Schema,
    models: Sequence[str],
    seeds: int,
    options: TrainOptions,
    out: Path,
    *,
    changes: Mapping[str, Changes] | None = None,
    tuned: Mapping[str, Any] | None = None,
    data_path: Paths | None = None,
    console: Console | None = None,
) -> Record:
    """Trains every model with every seed on the same split, and writes compare.json and report.html.

    Args:
        data: the one split that all runs share.
        schema: of ``data``.
        models: names in :data:`saml_rec.models.MODELS`, at least one, each once.
        seeds: runs of each model, with seeds 0, 1, ..; they decide initial weights, shuffling and dropout.
        options: how to train; ``model``, ``seed`` and ``model_options`` of each run are replaced by its own.
        out: made if missing.
        changes: per model what is not as in ``options`` or the model's defaults, see :func:`options_of`.
        tuned: the search that the changes came from, kept in the record.
        data_path: where the data came from, kept in the runs.
        console: where to print progress; None prints nothing.

    Returns:
        The content of compare.json: see docs/compare.md.

    Raises:
        InputError: models or seeds cannot be used; a run in ``out`` has other options or data.
        OSError: ``out`` cannot be written.
    """
    check_models(models)
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    check_directory(out)
    for file in (out / "compare.json", out / "report.html"):
        for left in leftovers(file):
            left.unlink(missing_ok=True)
    changes = changes or {}
    rows, names = labelled_rows(data.tables["test"]), list(data.encoder.scenario_names)
    runs: dict[str, list[Record]] = {}
    logits: dict[str, list[NDArray[np.floating]]] = {}
    for model in models:
        runs[model], logits[model] = [], []
        own = options_of(model, options, changes.get(model, {}))
        for seed in range(seeds):
            say(console, f"{model}, seed {seed}")
            directory = run_directory(out, model, seed)
            entry, scores = _run(data, schema, replace(own, seed=seed), directory, rows, data_path, console)
            runs[model].append(entry)
            logits[model].append(scores)
    record = summarize(runs, names, row_errors(rows, logits, len(names)), changes) | {
        "tuned": None if tuned is None else dict(tuned),
        "seeds": list(range(seeds)),
        "data": {
            "path": None if data_path is None else named(data_path),
            "rows": {name: len(table) for name, table in data.tables.items()},
        },
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    write_json(out / "compare.json", record)
    write_page(record, out / "report.html")
    return record


def check_models(models: Sequence[str]) -> None:
    """InputError for an empty list, an unknown model, or one named twice."""
    if not models:
        raise InputError("no models to compare")
    if repeated := sorted({model for model in models if models.count(model) > 1}):
        raise InputError(f"models named more than once: {shortened(', '.join(repeated))}")
    for model in models:
        hyperparameters(model)


def options_of(model: str, options: TrainOptions, changes: Changes) -> TrainOptions:
    """``options`` for one model, with its changes: hyperparameters by keyword, and TRAINING_CHANGES."""
    training = {name: value for name, value in changes.items() if name in TRAINING_CHANGES}
    own = {name: value for name, value in changes.items() if name not in TRAINING_CHANGES}
    return replace(options, model=model, model_options=own, **training)


def check_directory(out: Path) -> None:
    """InputError for a file, or a directory that holds something but no comparison."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is not a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / "runs").is_dir():
        raise InputError(f"{out}: is not empty and holds no comparison; choose another directory")


def run_directory(out: Path, model: str, seed: int) -> Path:
    """Where the run of a model and a seed lies."""
    return out / "runs" / model / f"seed-{seed}"


def _run(
    data: PreparedData,
    schema: Schema,
    options: TrainOptions,
    directory: Path,
    rows: LabelledRows,
    data_path: Paths | None,
    console: Console | None,
) -> tuple[Record, NDArray[np.floating]]:
    """One run, trained unless it is finished; what the comparison needs of it, and its scores of the test rows."""
    extra, kept = directory / "run.json", directory / "test-logits.npy"
    resume = RunDirectory(directory).started
    with PeakMemory(options.resolved().device) as memory:
        result = train(data, schema, options, directory, resume=resume, data_path=data_path, console=console)
    names, layers = data.encoder.scenario_names, result.metrics["options"]["model_options"].get("mutual_layers", ())
    added = _kept_addition(extra, len(names), layers, console) if result.already_finished else None
    logits = None if added is None else _kept_logits(kept, rows, result.metrics, added.get(LOGITS), console)
    if added is None or logits is None:
        trained = load_trained(directory, device=options.device)
        table = data.tables["test"]
        if logits is None:
            logits = _as_small_as_exact(trained.logits(table))
        content = _npy(logits)
        with replacing(kept) as file:
            file.write(content)
        weights = mean_mutual_weights(trained.model, table, trained.device)
        # A run that was interrupted or finished elsewhere was not watched as a whole.
        peak = None if resume else memory.peak_bytes
        added = {
            "peak_bytes": peak if added is None else added["peak_bytes"],
            "mutual_weights": None if weights is None else {str(k): _plain(matrix) for k, matrix in weights.items()},
            LOGITS: hashlib.sha256(content).hexdigest(),
        }
        write_sealed_json(extra, added)
    # Of the scores whose differences are judged, and with every metric of this version.
    metrics = result.metrics | evaluate_scores(rows, logits, names)
    return {
        "metrics": metrics,
        "history": result.history,
        "calibration": calibration(rows, logits) if len(rows) else [],
        **{name: added[name] for name in ADDED},
    }, logits


def _as_small_as_exact(logits: NDArray[np.float64]) -> NDArray[np.floating]:
    small = logits.astype(np.float32)
    return small if (small == logits).all() else logits


def _npy(logits: NDArray[np.floating]) -> bytes:
    file = io.BytesIO()
    np.save(file, logits)
    return file.getvalue()


def _kept_addition(path: Path, scenarios: int, layers: Sequence[int], console: Console | None) -> Record | None:
    """What a command before this one kept in run.json; None where it is missing or, which is said, damaged.

    Args:
        path: of run.json.
        scenarios: M.
        layers: the model's mutual layers.
        console: where to say it.
    """
    if not path.exists():
        return None
    try:
        found = read_sealed_json(path)
        if not _is_addition(found, scenarios, {str(layer) for layer in layers}):
            raise InputError(f"{path}: is damaged: expected {' and '.join(sorted(ADDED))}")
    except InputError as error:
        say(console, f"{error}; making it again")
        return None
    return found


def _is_addition(found: Record, scenarios: int, layers: set[str]) -> bool:
    """Whether an object has what :func:`_run` adds to a run: bytes and (M, M) weights by layer, None where unknown."""
    if not found.keys() >= ADDED:
        return False
    peak, weights = found["peak_bytes"], found["mutual_weights"]
    if peak is not None and type(peak) is not int:
        return False
    return weights is None or (
        isinstance(weights, dict)
        and weights.keys() == layers
        and all(_is_matrix(rows, scenarios) for rows in weights.values())
    )


def _is_matrix(rows: Any, size: int) -> bool:
    """Whether they are so many lists of so many numbers or None."""
    return (
        isinstance(rows, list)
        and len(rows) == size
        and all(isinstance(row, list) and len(row) == size for row in rows)
        and all(entry is None or type(entry) is float for row in rows for entry in row)
    )


def _kept_logits(
    path: Path, rows: LabelledRows, metrics: Mapping[str, Any], digest: str | None, console: Console | None
) -> NDArray[np.floating] | None:
    """The scores that a command before this one kept.

    None where they are missing or, which is said, damaged or of another model. Before version 0.2 nobody kept a digest.
    """
    if not path.exists():
        return None
    require_regular(path)
    content = path.read_bytes()
    if digest in (None, hashlib.sha256(content).hexdigest()):
        # Its header may claim anything where nobody kept a digest.
        with contextlib.suppress(OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError):
            logits = np.load(io.BytesIO(content), allow_pickle=False)
            if isinstance(logits, np.ndarray) and _are_scores(logits, rows, metrics):
                return logits
    say(console, f"{path}: is damaged or of another model; making it again")
    return None


def _are_scores(logits: NDArray[Any], rows: LabelledRows, metrics: Mapping[str, Any]) -> bool:
    """Whether they may be the scores that the metrics of a run are of."""
    if logits.shape != (len(rows),) or logits.dtype.kind != "f" or not np.isfinite(logits).all():
        return False
    before, now = metrics[OVERALL]["logloss"], score_rows(rows, logits)["logloss"]
    return before == now or (None not in (before, now) and abs(before - now) <= SAME_LOSS * before)


def _plain(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    """With None for NaN, which JSON does not have."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in matrix]


def summarize(
    runs: Mapping[str, Sequence[Record]],
    scenarios: Sequence[str],
    errors: Errors,
    changes: Mapping[str, Changes] | None = None,
) -> Record:
    """Measures over seeds, differences between models, and what they come to.

    Args:
        runs: per model its runs in order of seeds.
        scenarios: names, by id.
        errors: of the metrics, over test rows.
        changes: per model the options that were its own, if any.
    """
    first = next(iter(runs.values()))[0]
    metrics = [metric for metric in METRIC_NAMES if metric in first["metrics"][OVERALL]]
    record: Record = {
        "metrics": metrics,
        "scenarios": [{"name": name, "rows": _scores(first, index)["rows"]} for index, name in enumerate(scenarios)],
        "models": {
            model: _summary_of_model(model, entries, scenarios, metrics, errors)
            | {"changes": dict((changes or {}).get(model, {}))}
            for model, entries in runs.items()
        },
        "differences": _differences(runs, scenarios, metrics, errors),
    }
    return record | {"verdicts": verdicts(record)}


def _scores(run: Record, index: int | None) -> Record:
    """Measures of the scenario with that id; None: overall."""
    metrics: Record = run["metrics"]
    scores: Record = metrics[OVERALL] if index is None else list(metrics["scenarios"].values())[index]
    return scores


def _summary_of_model(
    model: str, runs: Sequence[Record], scenarios: Sequence[str], metrics: Sequence[str], errors: Errors
) -> Record:
    def over_seeds(index: int | None, metric: str) -> Record | None:
        values = [_scores(run, index)[metric] for run in runs]
        if None in values:
            return None
        summary = Summary.of(values)
        return summary.to_dict() | _own_interval(summary.mean, errors.of(metric, index, model))

    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    groups = {name: _scores(runs[0], None)[name] for name in ("gauc_groups", "gauc_rows") if "gauc" in metrics}
    return {
        OVERALL: {metric: over_seeds(None, metric) for metric in metrics} | groups,
        "scenarios": [{metric: over_seeds(index, metric) for metric in metrics} for index in range(len(scenarios))],
        "parameters": runs[0]["metrics"]["parameters"],
        "rows_per_second": Summary.of([run["metrics"]["timing"]["rows_per_second"] for run in runs]).to_dict(),
        "peak_bytes": max(peaks) if peaks else None,
        "backend": runs[0]["metrics"]["backend"],
        "device": runs[0]["metrics"]["device"],
        "options": {key: value for key, value in runs[0]["metrics"]["options"].items() if key != "seed"},
        "best_epochs": [run["metrics"]["best_epoch"] for run in runs],
        "stopped_by": [run["metrics"]["stopped_by"] for run in runs],
        "cut_off": sum(_was_cut_off(run["metrics"]) for run in runs),
        "history": [
            [{"train_loss": entry["train_loss"], "valid": entry["valid"]} for entry in run["history"]] for run in runs
        ],
        "calibration": [run["calibration"] for run in runs],
        "mutual_weights": _mean_weights([run["mutual_weights"] for run in runs]),
    }


def _was_cut_off(metrics: Record) -> bool:
    """Its last epoch was still the best one: with more it may be better."""
    return metrics["stopped_by"] == "epochs" and metrics["best_epoch"] == metrics["epochs"]


def _own_interval(mean: float, error: RowError | None) -> Record:
    if error is None:
        return {"row_standard_error": None, "interval": None}
    return {
        "row_standard_error": error.standard_error,
        "interval": [mean - error.half_width, mean + error.half_width],
    }


def _mean_weights(weights: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Per mutual layer the mean over seeds."""
    known = [entry for entry in weights if entry is not None]
    if not known:
        return None
    return {
        layer: _plain(np.mean([np.array(entry[layer], dtype=np.float64) for entry in known], axis=0))
        for layer in known[0]
    }


def _differences(
    runs: Mapping[str, Sequence[Record]], scenarios: Sequence[str], metrics: Sequence[str], errors: Errors
) -> list[Record]:
    """First minus second of every pair; those of a metric, for all rows or in scenarios, are tested together."""
    found: list[Record] = []
    for metric in metrics:
        families: list[list[tuple[int | None, str | None]]] = [[(None, None)]]
        if metric in WITHIN_SCENARIOS:
            families.append(list(enumerate(scenarios)))
        for family in families:
            entries = [
                {"first": first, "second": second, "scenario": name, "measure": metric}
                | judge(*values, errors.of(metric, index, first, second))
                for index, name in family
                for first, second in combinations(runs, 2)
                if (values := _defined(runs, first, second, index, metric)) is not None
            ]
            tested = [entry for entry in entries if entry["p_value"] is not None]
            adjusted = holm([entry["p_value"] for entry in tested])
            for entry in entries:
                entry |= {"adjusted_p_value": None, "adjusted_verdict": None}
            for entry, p_value in zip(tested, adjusted, strict=True):
                entry |= {"adjusted_p_value": p_value, "adjusted_verdict": verdict_of(p_value)}
            found += entries
    return found


def _defined(
    runs: Mapping[str, Sequence[Record]], first: str, second: str, index: int | None, metric: str
) -> tuple[list[float], list[float]] | None:
    """A metric of two models by seed; None where it is not defined."""
    a, b = ([_scores(run, index)[metric] for run in runs[model]] for model in (first, second))
    return None if None in a or None in b else (a, b)


def comparison_table(record: Record) -> Table:
    """What is printed: a row per model, means ± deviation over seeds and below them the interval over test rows."""
    shown = [metric for metric in ("auc", "logloss", "gauc") if metric in record["metrics"]]
    figures = {
        "parameters": lambda entry: f"{entry['parameters']:,}",
        "rows/s": lambda entry: f"{entry['rows_per_second']['mean']:,.0f}",
    }
    # With a third metric there is no room for these in 80 columns.
    names = list(figures) if len(shown) < 3 else []
    table = table_of("model", (*(METRIC_NAMES[metric] for metric in shown), *names))
    for model, entry in record["models"].items():
        cells = [f"{spread(entry[OVERALL][metric])}\n{interval(entry[OVERALL][metric])}" for metric in shown]
        table.add_row(Text(model), *cells, *(figures[name](entry) for name in names))
    return table
