"""Several models on one split and several seeds: metrics with their spread, and which differences exceed it.

    OUT/runs/MODEL/seed-S/       the training runs, as saml-rec train leaves them, and run.json with what comparing adds
    OUT/compare.json             all metrics
    OUT/report.html              the same as one page without any other file

A finished run is not trained again; a run of other options or data is refused.
"""

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
from saml_rec.console import say, spread, table_of
from saml_rec.data.preparation import PreparedData
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths, named
from saml_rec.errors import InputError
from saml_rec.evaluation.mutual_weights import mean_mutual_weights
from saml_rec.evaluation.scoring import load_trained
from saml_rec.files import write_json
from saml_rec.models.registry import hyperparameters
from saml_rec.run_directory import RunDirectory, read_json, versions
from saml_rec.training import TrainOptions, train

OVERALL = "overall"
METRICS = ("auc", "logloss")
CALIBRATION_BINS = 10
STANDARD_ERRORS = 2.0
TRAINING_CHANGES = ("learning_rate", "weight_decay")

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
    changes = changes or {}
    runs: dict[str, list[Record]] = {}
    for model in models:
        runs[model] = []
        own = options_of(model, options, changes.get(model, {}))
        for seed in range(seeds):
            say(console, f"{model}, seed {seed}")
            directory = run_directory(out, model, seed)
            runs[model].append(_run(data, schema, replace(own, seed=seed), directory, data_path, console))
    record = summarize(runs, list(data.encoder.scenario_names), changes) | {
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
        raise InputError(f"models named more than once: {', '.join(repeated)}")
    for model in models:
        hyperparameters(model)


def options_of(model: str, options: TrainOptions, changes: Changes) -> TrainOptions:
    """``options`` for one model, with its changes: hyperparameters by keyword, learning_rate and weight_decay."""
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
    data_path: Paths | None,
    console: Console | None,
) -> Record:
    """One run, trained unless it is finished; what the comparison needs of it."""
    extra = directory / "run.json"
    resume = RunDirectory(directory).started
    with PeakMemory(options.resolved().device) as memory:
        result = train(data, schema, options, directory, resume=resume, data_path=data_path, console=console)
    if result.already_finished and extra.exists():
        added: Record = read_json(extra)
    else:
        trained = load_trained(directory, device=options.device)
        table = data.tables["test"]
        weights = mean_mutual_weights(trained.model, table, trained.device)
        assert table.label is not None
        added = {
            # A run that was interrupted or finished elsewhere was not watched as a whole.
            "peak_bytes": None if resume else memory.peak_bytes,
            "calibration": calibration(table.label.numpy(), trained.logits(table)),
            "mutual_weights": None if weights is None else {str(k): _plain(matrix) for k, matrix in weights.items()},
        }
        write_json(extra, added)
    return {"metrics": result.metrics, "history": result.history, **added}


def _plain(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    """With None for NaN, which JSON does not have."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in matrix]


def calibration(labels: NDArray[np.floating], logits: NDArray[np.floating]) -> list[dict[str, float]]:
    """Rows sorted by score in up to ten groups of equal size: mean prediction, share of label 1, and rows of each."""
    probabilities = np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
    groups = np.array_split(np.argsort(logits, kind="stable"), CALIBRATION_BINS)
    return [
        {
            "predicted": float(probabilities[rows].mean()),
            "observed": float(labels[rows].mean()),
            "rows": len(rows),
        }
        for rows in groups
        if len(rows)
    ]


def summarize(
    runs: Mapping[str, Sequence[Record]], scenarios: Sequence[str], changes: Mapping[str, Changes] | None = None
) -> Record:
    """Measures over seeds and differences between models.

    Args:
        runs: per model its runs in order of seeds.
        scenarios: names, by id.
        changes: per model the options that were its own, if any.
    """
    return {
        "scenarios": [
            {"name": name, "rows": _scores(next(iter(runs.values()))[0], index)["rows"]}
            for index, name in enumerate(scenarios)
        ],
        "models": {
            model: _summary_of_model(entries, scenarios) | {"changes": dict((changes or {}).get(model, {}))}
            for model, entries in runs.items()
        },
        "differences": [
            difference
            for first, second in combinations(runs, 2)
            for index, name in [(None, OVERALL), *enumerate(scenarios)]
            for metric in METRICS
            if (difference := _difference(runs, first, second, index, name, metric)) is not None
        ],
    }


def _scores(run: Record, index: int | None) -> Record:
    """Measures of the scenario with that id; None: overall."""
    metrics: Record = run["metrics"]
    scores: Record = metrics[OVERALL] if index is None else list(metrics["scenarios"].values())[index]
    return scores


def _summary_of_model(runs: Sequence[Record], scenarios: Sequence[str]) -> Record:
    def over_seeds(index: int | None, metric: str) -> dict[str, float | None] | None:
        values = [_scores(run, index)[metric] for run in runs]
        return None if None in values else Summary.of(values).to_dict()

    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return {
        OVERALL: {metric: over_seeds(None, metric) for metric in METRICS},
        "scenarios": [{metric: over_seeds(index, metric) for metric in METRICS} for index in range(len(scenarios))],
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


def _mean_weights(weights: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Per mutual layer the mean over seeds."""
    known = [entry for entry in weights if entry is not None]
    if not known:
        return None
    return {
        layer: _plain(np.mean([np.array(entry[layer], dtype=np.float64) for entry in known], axis=0))
        for layer in known[0]
    }


def _difference(
    runs: Mapping[str, Sequence[Record]], first: str, second: str, index: int | None, name: str, metric: str
) -> Record | None:
    """First minus second; None where a metric is not defined."""
    a, b = ([_scores(run, index)[metric] for run in runs[model]] for model in (first, second))
    if None in a or None in b:
        return None
    return {
        "first": first,
        "second": second,
        "scenario": None if index is None else name,
        "measure": metric,
        **judge(a, b),
    }


def judge(first: Sequence[float], second: Sequence[float]) -> dict[str, float | bool | None]:
    """Whether two models differ by more than seeds make them differ.

    Args:
        first, second: a metric by seed, the same seeds in both.

    Returns:
        ``mean``, of first − second; ``pooled_deviation``, √((s₁² + s₂²) / 2); ``standard_error`` of the differences
        seed by seed; ``exceeds_spread``: the mean is above the pooled deviation and above two standard errors. All
        but the mean are None for one seed.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return {"mean": mean, "pooled_deviation": None, "standard_error": None, "exceeds_spread": None}
    pooled = ((statistics.variance(first) + statistics.variance(second)) / 2) ** 0.5
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "mean": mean,
        "pooled_deviation": pooled,
        "standard_error": error,
        "exceeds_spread": abs(mean) > max(pooled, STANDARD_ERRORS * error),
    }


def comparison_table(record: Record) -> Table:
    """What is printed: a row per model."""
    table = table_of("model", ("AUC", "log loss", "parameters", "rows/s", "peak MiB"))
    for model, entry in record["models"].items():
        peak = entry["peak_bytes"]
        table.add_row(
            Text(model),
            *(spread(entry[OVERALL][metric]) for metric in METRICS),
            f"{entry['parameters']:,}",
            f"{entry['rows_per_second']['mean']:,.0f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
        )
    return table
