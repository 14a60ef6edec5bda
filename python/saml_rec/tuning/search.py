"""The same number of trials for every model, drawn with the same seed and trained for the same epochs at most.

    OUT/tune.json       all trials and the best of every model, written whole after every trial

A trial is a training run whose options Optuna's TPE sampler draws; the first one has the model's defaults. What counts
is the best validation log loss; test rows are not scored. No trial is cut short because others were better, only by
early stopping, which all have. Trial n draws with a seed made of the search's seed and n, so that a search that was
interrupted goes on as if it had not been. A trial with the options of an earlier one would give the same: it counts,
and is not trained again.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from saml_rec.console import decimals, say
from saml_rec.data.preparation import PreparedData
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths, named
from saml_rec.data.splits import SPLITS
from saml_rec.errors import InputError, shortened
from saml_rec.files import leftovers
from saml_rec.models.registry import hyperparameters
from saml_rec.run_directory import RunDirectory, differences, versions
from saml_rec.sealed import read_sealed_json, write_sealed_json
from saml_rec.training import TrainOptions, best_epoch, stopped_by, train_and_validate
from saml_rec.tuning.space import TRAINING, defaults_of, is_within, space_of

if TYPE_CHECKING:
    import optuna

FILE = "tune.json"
SAME = ("options", "schema", "data", "seed")
"""Parts of the record that have to be as they were for a search to go on."""
OUTCOME = {
    "valid_logloss": float,
    "valid_auc": float,
    "best_epoch": int,
    "epochs": int,
    "stopped_by": str,
    "error": str,
    "same_as": int,
}
"""Of a trial beside its number, options and seconds; None where it has none."""
PARTS = {"models": dict, "trials": int, "options": dict, "schema": dict, "data": dict, "seed": int}
Record = dict[str, Any]


def require_optuna() -> None:
    """InputError unless Optuna is installed."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError("tuning needs Optuna, which is not installed: pip install 'saml-kernels[tune]'")


def check_tuning_directory(out: Path, models: Sequence[str], trials: int) -> None:
    """Refuses, before data are read, a directory of something else or a search that would end up uneven.

    Raises:
        InputError: no directory, or one with something but no tuning; a tuning of a model that is not named, or of more
            trials, where some models would have more than others; a model that does not exist or is named twice.
    """
    if not models:
        raise InputError("no models to tune")
    if repeated := sorted({model for model in models if models.count(model) > 1}):
        raise InputError(f"models named more than once: {shortened(', '.join(repeated))}")
    for model in models:
        hyperparameters(model)
    if trials < 1:
        raise InputError(f"trials must be at least 1, got {trials}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is not a directory")
    if not (out / FILE).exists():
        if out.is_dir() and set(out.iterdir()) - set(leftovers(out / FILE)):
            raise InputError(f"{out}: is not empty and holds no tuning; choose another directory")
        return
    for model, found in read_tuning(out / FILE)["models"].items():
        if model not in models:
            raise InputError(f"{out}: holds trials of {shortened(model)}; name it too, so that all models have as many")
        if len(found["trials"]) > trials:
            raise InputError(f"{out}: holds {len(found['trials'])} trials of {shortened(model)}, more than {trials}")


def read_tuning(path: Path) -> Record:
    """The content of a tune.json.

    Raises:
        InputError: the file is damaged or something else.
        OSError: it cannot be opened.
    """
    record = read_sealed_json(path)
    if not all(type(record.get(name)) is kind for name, kind in PARTS.items()) or not record["data"].keys() >= {
        *SPLITS
    }:
        raise InputError(f"{path}: was not written by saml-rec tune")
    for model, entry in record["models"].items():
        trials = entry.get("trials") if isinstance(entry, dict) else None
        if not isinstance(trials, list) or not all(map(_is_trial, trials, range(len(trials)))):
            raise InputError(f"{path}: is damaged: expected trials of {shortened(model)}")
        space, best = entry.get("space"), entry.get("best", -1)
        if not isinstance(space, dict) or not (best is None or _is_trained(trials, best)):
            raise InputError(f"{path}: is damaged: expected the ranges and the best trial of {shortened(model)}")
        for trial in trials:
            if trial["options"].keys() != space.keys() or not all(
                is_within(value, space[name]) for name, value in trial["options"].items()
            ):
                raise InputError(
                    f"{path}: is damaged: expected options of {shortened(model)} within their ranges in trial "
                    f"{trial['number'] + 1}"
                )
    return record


def _is_trial(trial: Any, number: int) -> bool:
    """Whether it has all that a trial with that number has."""
    return (
        isinstance(trial, dict)
        and trial.keys() >= {"number", "options", "seconds", *OUTCOME}
        and trial["number"] == number
        and isinstance(trial["options"], dict)
        and isinstance(trial["seconds"], int | float)
        and all(trial[name] is None or type(trial[name]) is kind for name, kind in OUTCOME.items())
        and (trial["valid_logloss"] is None) == (trial["error"] is not None)
    )


def _is_trained(trials: Sequence[Record], number: Any) -> bool:
    return type(number) is int and 0 <= number < len(trials) and trials[number]["valid_logloss"] is not None


def tune(
    data: PreparedData,
    schema: Schema,
    models: Sequence[str],
    trials: int,
    options: TrainOptions,
    out: Path,
    *,
    data_path: Paths | None = None,
    console: Console | None = None,
) -> Record:
    """Searches every model's hyperparameters, and goes on with what stands in ``out``.

    Args:
        data: the split; its test rows are not scored.
        schema: of ``data``.
        models: names in :data:`saml_rec.models.MODELS`, each once.
        trials: of each model.
        options: how to train; ``seed`` is also the sampler's. Its model, hyperparameters, learning rate and weight
            decay are replaced by what is tried.
        out: made if missing.
        data_path: where the data came from, kept in the record.
        console: where to print a line a trial; None prints nothing.

    Returns:
        The content of tune.json: see docs/cli.md.

    Raises:
        InputError: Optuna is not installed; models, trials or ``out`` cannot be used; there are no validation rows;
            ``out`` holds trials of other options, data or ranges; no trial of a model could be trained.
        OSError: ``out`` cannot be written.
    """
    require_optuna()
    check_tuning_directory(out, models, trials)
    if len(data.tables["valid"]) == 0:
        raise InputError("tuning chooses by validation rows, and the schema's split leaves none")
    with RunDirectory(out).held():
        for file in leftovers(out / FILE):
            file.unlink()
        record = _begun(data, schema, options, out / FILE)
        record |= {
            "trials": trials,
            "path": None if data_path is None else named(data_path),
            "threads": torch.get_num_threads(),
            "versions": versions() | {"optuna": version("optuna")},
        }
        for model in models:
            _tune_model(data, schema, model, options, record, out / FILE, console)
    return record


def _begun(data: PreparedData, schema: Schema, options: TrainOptions, path: Path) -> Record:
    """The record so far; a new one if there is none."""
    chosen = replace(options, model_options={}).to_dict()
    for name in ("model", "model_options", "seed", "device", *TRAINING):
        del chosen[name]
    now: Record = {
        "seed": options.seed,
        "options": chosen,
        "schema": schema.to_dict(),
        "data": {name: data.tables[name].fingerprint() for name in SPLITS},
        "models": {},
    }
    if not path.exists():
        return now
    before = read_tuning(path)
    for part in SAME:
        if changes := differences(before[part], now[part], "" if part == "options" else part):
            raise InputError(f"{path}: cannot go on, {part} changed: {shortened('; '.join(changes))}")
    return now | {"models": before["models"]}


def _tune_model(
    data: PreparedData,
    schema: Schema,
    model: str,
    options: TrainOptions,
    record: Record,
    path: Path,
    console: Console | None,
) -> None:
    """All trials of one model that are missing; writes the record after each."""
    space = {name: each.to_dict() for name, each in space_of(model).items()}
    entry = record["models"].setdefault(model, {"space": space, "trials": [], "best": None})
    if changes := differences(entry["space"], space):
        raise InputError(f"{path}: cannot go on, the ranges of {model} changed: {shortened('; '.join(changes))}")
    study = _study_of(model, entry["trials"])
    total = record["trials"]
    for number in range(len(entry["trials"]), total):
        asked, tried = _ask(study, model, options.seed, number)
        trial = {"number": number, "options": tried, **_outcome(data, schema, model, tried, options, entry["trials"])}
        _tell(study, asked, trial)
        entry["trials"].append(trial)
        entry["best"] = _best(entry["trials"])
        write_sealed_json(path, record)
        say(console, _line(model, total, trial, entry["best"]))
    if entry["best"] is None:
        raise InputError(f"no trial of {model} could be trained; the last one: {entry['trials'][-1]['error']}")


def _study_of(model: str, trials: Sequence[Record]) -> "optuna.Study":
    """A study that knows the trials so far."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    ranges = space_of(model)
    for trial in trials:
        failed = trial["valid_logloss"] is None
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
                value=trial["valid_logloss"],
                params={name: ranges[name].to_parameter(value) for name, value in trial["options"].items()},
                distributions={name: ranges[name].distribution() for name in trial["options"]},
            )
        )
    return study


def _ask(study: "optuna.Study", model: str, seed: int, number: int) -> tuple["optuna.Trial", dict[str, Any]]:
    """The next trial and its options."""
    import optuna

    ranges = space_of(model)
    study.sampler = optuna.samplers.TPESampler(seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
    if number == 0:
        study.enqueue_trial({name: ranges[name].to_parameter(value) for name, value in defaults_of(model).items()})
    asked = study.ask({name: each.distribution() for name, each in ranges.items()})
    tried = {name: each.to_option(name, asked.params[name]) for name, each in ranges.items()}
    return asked, {name: list(value) if isinstance(value, tuple) else value for name, value in tried.items()}


def _tell(study: "optuna.Study", asked: "optuna.Trial", trial: Mapping[str, Any]) -> None:
    import optuna

    if trial["valid_logloss"] is None:
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(asked, trial["valid_logloss"])


def _outcome(
    data: PreparedData,
    schema: Schema,
    model: str,
    tried: Mapping[str, Any],
    options: TrainOptions,
    earlier: Sequence[Record],
) -> Record:
    """What a trial came to; its ``valid_logloss`` is None if it could not be trained."""
    for trial in earlier:
        if trial["options"] == tried:
            return {**trial, "number": len(earlier), "same_as": trial["number"], "seconds": 0.0}
    start = time.perf_counter()
    training = {name: tried[name] for name in TRAINING if name in tried}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in tried.items()}
    chosen = replace(
        options,
        model=model,
        model_options={name: value for name, value in own.items() if name not in TRAINING},
        **training,
    )
    found: Record = dict.fromkeys(OUTCOME)
    try:
        history = train_and_validate(data, schema, chosen)
    except InputError as error:
        # Such as a loss that is not finite, with a learning rate that is too high: also an answer.
        return found | {"error": str(error), "seconds": time.perf_counter() - start}
    best = best_epoch(history)
    valid = history[best - 1]["valid"]
    return found | {
        "valid_logloss": valid["logloss"],
        "valid_auc": valid["auc"],
        "best_epoch": best,
        "epochs": len(history),
        "stopped_by": stopped_by(history, chosen),
        "seconds": time.perf_counter() - start,
    }


def _best(trials: Sequence[Record]) -> int | None:
    """Number of the first trial with the lowest validation log loss."""
    known = [trial for trial in trials if trial["valid_logloss"] is not None]
    return min(known, key=lambda trial: trial["valid_logloss"])["number"] if known else None


def _line(model: str, total: int, trial: Mapping[str, Any], best: int | None) -> str:
    start = f"{model}, trial {trial['number'] + 1}/{total}: "
    if trial["same_as"] is not None:
        return f"{start}as trial {trial['same_as'] + 1}"
    if trial["error"] is not None:
        return f"{start}failed: {trial['error']}"
    return (
        f"{start}valid log loss {decimals(trial['valid_logloss'])}  "
        f"best epoch {trial['best_epoch']} of {trial['epochs']}  "
        f"{trial['seconds']:.1f} s{'  *' if trial['number'] == best else ''}"
    )
