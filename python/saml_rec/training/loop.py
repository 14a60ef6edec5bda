"""Training with early stopping and exact resumption.

After every epoch the validation rows are scored. The best epoch is the first one with the lowest overall
validation log loss: unlike AUC it is defined for any validation rows. Training stops after ``patience``
epochs in a row without a new best one, and the best epoch's weights are kept. Without validation rows
there is no early stopping, and the last epoch counts as the best.

Random numbers of an epoch (shuffling, dropout) come from (seed, epoch) alone, so an epoch needs nothing
but the checkpoint of the one before it. A checkpoint within an epoch also holds where the epoch is, the losses so far
and the state of dropout's random numbers.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from saml_rec.console import epoch_line, progress, say
from saml_rec.data.encoding import Encoder
from saml_rec.data.order import batch_starts
from saml_rec.data.prefetch import prefetched
from saml_rec.data.preparation import PreparedData
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths
from saml_rec.data.splits import SPLITS
from saml_rec.data.table import Batch
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import metrics_of, num_batches, recorded, to_device
from saml_rec.models.construction import (
    backends_used,
    build_model,
    own_random_numbers,
    parameter_count,
)
from saml_rec.models.features import table_rows
from saml_rec.models.tables import TableOptions, resolve_engine, table_options
from saml_rec.run_directory import RunDirectory, differences, load, save, versions
from saml_rec.training.optimizers import Optimizers
from saml_rec.training.options import TrainOptions

# Losses stay on the device for this many steps: looking at each one would stall a GPU.
STEPS_PER_LOSS_CHECK = 32

# What the random numbers are for; one independent stream each.
INITIALISATION, SHUFFLING, DROPOUT = range(3)


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Args:
        out: the run directory.
        metrics: the content of metrics.json.
        history: the content of history.json, one entry an epoch.
        already_finished: the run had been finished before; nothing was trained or written.
    """

    out: Path
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    already_finished: bool


@dataclass(frozen=True)
class CheckpointTimes:
    """When training is saved within an epoch; it always is after one.

    Args:
        steps: after so many steps; None does not count them.
        minutes: after so many minutes; None does not look at the clock.

    Raises:
        InputError: a value that is not above 0.
    """

    steps: int | None = None
    minutes: float | None = 10.0

    def __post_init__(self) -> None:
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"checkpoint {name} must be above 0 and finite, got {value}")

    def is_due(self, steps: int, seconds: float) -> bool:
        """After so many steps and seconds since the last one."""
        by_steps = self.steps is not None and steps >= self.steps
        return by_steps or (self.minutes is not None and seconds >= 60 * self.minutes)


@dataclass
class _Begun:
    """An epoch that was begun."""

    losses: list[Tensor]
    seconds: float
    random: Mapping[str, Tensor]

    @property
    def steps(self) -> int:
        return len(self.losses)

    def to_dict(self) -> dict[str, Any]:
        return {"losses": _stacked(self.losses), "seconds": self.seconds, "random": dict(self.random)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "_Begun":
        return cls(list(saved["losses"]), saved["seconds"], saved["random"])


@dataclass
class _State:
    """What changes during training."""

    model: nn.Module
    optimizer: Optimizers
    tables: TableOptions
    history: list[dict[str, Any]]
    best_weights: dict[str, Tensor]
    begun: _Begun | None = None

    @classmethod
    def fresh(cls, options: TrainOptions, schema: Schema, encoder: Encoder, device: torch.device) -> "_State":
        torch.manual_seed(stream_seed(options.seed, INITIALISATION))
        rows = table_rows(schema, encoder.num_scenarios, encoder.vocabulary_sizes)
        tables = options.table_options(resolve_engine(options.tables, options.table_optimizer, rows, device))
        with table_options(tables):
            model = build_model(options.model, options.model_options, schema, encoder).to(device)
        optimizer = Optimizers(model, options.learning_rate, options.weight_decay, tables)
        return cls(model, optimizer, tables, [], _weights(model))

    def add_epoch(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        self.begun = None
        if best_epoch(self.history) == len(self.history):
            self.best_weights = _weights(self.model)

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "history": self.history,
            "begun": None if self.begun is None else self.begun.to_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history, self.best_weights = saved["history"], saved["best_weights"]
        # Runs of version 0.1 are saved between epochs only.
        self.begun = None if saved.get("begun") is None else _Begun.from_dict(saved["begun"])


def train(
    data: PreparedData,
    schema: Schema,
    options: TrainOptions,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data_path: Paths | None = None,
    checkpoints: CheckpointTimes | None = None,
    console: Console | None = None,
) -> RunResult:
    """Trains a model, keeps the best epoch's weights and measures them on the test rows.

    Writes the files of :mod:`saml_rec.run_directory` into ``out``. A resumed run ends with the same weights
    and metrics as one that was never interrupted: bit by bit on a CPU with the same number of threads.

    Args:
        data: prepared with ``options.seed``.
        schema: the schema of ``data``.
        options: how to train.
        out: the run directory; made if missing.
        resume: go on after the last checkpoint of the run in ``out``.
        overwrite: delete the run in ``out`` first.
        data_path: where the data came from, kept for :func:`saml_rec.evaluation.scoring.evaluate`.
        checkpoints: when to save within an epoch; every ten minutes unless given.
        console: where to print a line an epoch; None prints nothing.

    Raises:
        InputError: an option, the run directory or the data cannot be used; the loss is not finite; another process
            trains into ``out``.
        OSError: the run directory cannot be written.
    """
    run = RunDirectory(out)
    run.require_startable(resume=resume, overwrite=overwrite)
    options = options.resolved()
    device = torch.device(options.device)
    with own_random_numbers(device):
        state = _State.fresh(options, schema, data.encoder, device)
        identity = {
            "options": options.to_dict(),
            "schema": schema.to_dict(),
            "tables": dataclasses.asdict(state.tables),
            "data": {name: data.tables[name].fingerprint() for name in SPLITS},
        }
        backends = backends_used(state.model, device)
        with run.held():
            # What stood here may have changed until the run was held.
            run.require_startable(resume=resume, overwrite=overwrite)
            saved = None
            if resume:
                saved = load(*((run.model, "model") if run.finished else (run.checkpoint, "checkpoint")))
                _require_same(out, saved, identity)
                if run.finished:
                    history, metrics = run.read_results()
                    return RunResult(out, metrics, history, already_finished=True)
            _run_epochs(run, state, saved, identity, data, options, device, checkpoints or CheckpointTimes(), console)
            state.model.load_state_dict(state.best_weights)
            tested = metrics_of(state.model, data.tables["test"], data.encoder, device, console)
            return _write(run, state, tested, identity, data, options, backends, data_path)


def _run_epochs(
    run: RunDirectory,
    state: _State,
    saved: Mapping[str, Any] | None,
    identity: Mapping[str, Any],
    data: PreparedData,
    options: TrainOptions,
    device: torch.device,
    checkpoints: CheckpointTimes,
    console: Console | None,
) -> None:
    """Trains to the end, from the checkpoint ``saved`` if there is one, with a checkpoint after every epoch."""

    def save_state() -> None:
        save(run.checkpoint, "checkpoint", {**identity, **state.to_dict()})

    if saved is None:
        run.clear()
        # Before the first epoch: a directory that cannot be written shows now, and resume always works.
        save_state()
    else:
        state.restore(saved)
        run.remove_leftovers()
        within = f", step {state.begun.steps} of the next" if state.begun else ""
        say(console, f"resuming {run.path} after epoch {len(state.history)}{within}")
    if state.tables.engine != "dense":
        say(console, f"tables: {state.tables.engine}, {_trained_by(state.tables)}")
    if len(data.tables["valid"]) == 0:
        say(console, "no validation rows: no early stopping, the last epoch is kept")
    while not _stops(state.history, options):
        state.add_epoch(_run_epoch(state, data, options, device, console, _Saver(checkpoints, save_state)))
        save_state()
        say(console, epoch_line(state.history, options.epochs, best_epoch(state.history)))


def _write(
    run: RunDirectory,
    state: _State,
    tested: Mapping[str, Any],
    identity: Mapping[str, Any],
    data: PreparedData,
    options: TrainOptions,
    backends: Mapping[str, str],
    data_path: Paths | None,
) -> RunResult:
    """The files of a run that is at its end."""
    history = state.history
    metrics = {
        "model": options.model,
        "split": "test",
        **tested,
        "best_epoch": best_epoch(history),
        "epochs": len(history),
        "valid": history[best_epoch(history) - 1]["valid"],
        "seed": options.seed,
        "options": identity["options"],
        "parameters": parameter_count(state.model),
        "device": options.device,
        "backend": backends,
        "tables": {"engine": state.tables.engine, "trained_by": _trained_by(state.tables)},
        "data": {
            "path": None if data_path is None else recorded(data_path),
            "unseen_scenarios": dict(data.unseen),
            "rows": {name: len(data.tables[name]) for name in SPLITS},
        },
        "timing": _timing(history, len(data.tables["train"])),
        "versions": versions(),
    }
    model_file = {
        **identity,
        "data_path": metrics["data"]["path"],
        "encoder": data.encoder.to_dict(),
        "best_epoch": metrics["best_epoch"],
        "versions": metrics["versions"],
        "weights": state.best_weights,
    }
    save(run.model, "model", model_file)
    run.write_results(history, metrics)
    return RunResult(run.path, metrics, history, already_finished=False)


def _trained_by(tables: TableOptions) -> str:
    """What trains them, for people."""
    return "adamw" if tables.engine == "dense" else f"{tables.optimizer} with learning rate {tables.rate:g}"


def time_backends(data: PreparedData, schema: Schema, options: TrainOptions) -> dict[str, float]:
    """Seconds of one epoch of training steps on the backend in use and on the reference, each from fresh weights.

    Returns:
        Seconds by the names of the backends that ran, "a + b" for a model whose operations ran on several.

    Raises:
        InputError: an option or the data cannot be used.
    """
    seconds = {}
    for backend in ("auto", "reference"):
        asked = dataclasses.replace(options, model_options={**options.model_options, "backend": backend}).resolved()
        device = torch.device(asked.device)
        with own_random_numbers(device):
            state = _State.fresh(asked, schema, data.encoder, device)
            used = " + ".join(sorted(set(backends_used(state.model, device).values()))) or "none"
            seconds[used] = _run_epoch(state, data, asked, device, None)["seconds"]
    return seconds


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """The first epoch with the lowest validation log loss, from 1; the last one if there are no validation rows."""
    losses = [entry["valid"]["logloss"] for entry in history]
    return len(losses) if not losses or None in losses else losses.index(min(losses)) + 1


def stream_seed(seed: int, purpose: int, epoch: int = 0) -> int:
    """A seed for torch from (seed, purpose, epoch); streams of different arguments are independent."""
    return int(np.random.SeedSequence((seed, purpose, epoch)).generate_state(1, np.uint64)[0] >> 1)


class _Saver:
    """Saves within an epoch when it is time.

    Args:
        times: when that is.
        save: writes the checkpoint.
    """

    def __init__(self, times: CheckpointTimes, save: Callable[[], None]) -> None:
        self._times, self._save = times, save
        self._steps, self._clock = 0, time.monotonic()

    def after_step(self, state: _State, losses: list[Tensor], seconds: float, device: torch.device) -> None:
        """Saves if it is time: ``losses`` of the epoch so far, and how long it took."""
        self._steps += 1
        if self._times.is_due(self._steps, time.monotonic() - self._clock):
            state.begun = _Begun(losses, seconds, _random_state(device))
            self._save()
            self._steps, self._clock = 0, time.monotonic()


def _run_epoch(
    state: _State,
    data: PreparedData,
    options: TrainOptions,
    device: torch.device,
    console: Console | None,
    saver: _Saver | None = None,
) -> dict[str, Any]:
    """Trains for one epoch, or what is left of it, and scores the validation rows; its entry of the history."""
    epoch = len(state.history) + 1
    table = data.tables["train"]
    generator = torch.Generator().manual_seed(stream_seed(options.seed, SHUFFLING, epoch))
    torch.manual_seed(stream_seed(options.seed, DROPOUT, epoch))
    losses: list[Tensor] = []
    before = 0.0
    if state.begun is not None:
        losses, before = list(state.begun.losses), state.begun.seconds
        _set_random_state(state.begun.random, device)
    batches = table.batches(options.batch_size, generator=generator, first_batch=len(losses))
    start = time.perf_counter()

    def after_step() -> None:
        advance()
        if saver is not None:
            saver.after_step(state, losses, before + time.perf_counter() - start, device)

    left = num_batches(table, options.batch_size) - len(losses)
    with progress(console, f"epoch {epoch}/{options.epochs}", left) as advance, prefetched(batches) as ready:
        _train_on(state, ready, losses, epoch, device, after_step)
    seconds = before + time.perf_counter() - start
    sizes = [size for _, size in batch_starts(len(table), options.batch_size, 0)]
    return {
        "epoch": epoch,
        "train_loss": float(np.average(_stacked(losses).double().numpy(), weights=sizes)),
        "valid": metrics_of(state.model, data.tables["valid"], data.encoder, device, console)["overall"],
        "seconds": seconds,
        "rows_per_second": len(table) / seconds,
    }


def _train_on(
    state: _State,
    batches: Iterable[Batch],
    losses: list[Tensor],
    epoch: int,
    device: torch.device,
    after_step: Callable[[], None],
) -> None:
    """One optimizer step a batch; the mean loss of its rows goes to ``losses``."""
    state.model.train()
    checked = len(losses)
    for batch in batches:
        loss = state.model.loss(to_device(batch, device))  # type: ignore[operator]
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        losses.append(loss.detach())
        if len(losses) - checked == STEPS_PER_LOSS_CHECK:
            _require_finite(losses, checked, epoch)
            checked = len(losses)
        after_step()
    _require_finite(losses, checked, epoch)


def _stacked(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.cpu() for loss in losses]) if losses else torch.empty(0)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _require_finite(losses: Sequence[Tensor], start: int, epoch: int) -> None:
    """Refuses a loss from ``start`` on that is not finite."""
    if start == len(losses):
        return
    values = torch.stack(list(losses[start:])).cpu()
    if len(broken := (~values.isfinite()).nonzero()):
        position = int(broken[0])
        raise InputError(
            f"the loss is {float(values[position])} at epoch {epoch}, step {start + position + 1}; "
            "try a lower learning rate"
        )


def _stops(history: Sequence[Mapping[str, Any]], options: TrainOptions) -> bool:
    """All epochs are done, or the last ``patience`` ones brought nothing better."""
    return len(history) >= options.epochs or 0 < options.patience <= len(history) - best_epoch(history)


def _timing(history: Sequence[Mapping[str, Any]], rows: int) -> dict[str, float]:
    seconds = sum(entry["seconds"] for entry in history) / len(history)
    return {"seconds_per_epoch": seconds, "rows_per_second": rows / seconds}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _require_same(out: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with other options, another schema or other data."""
    for part in ("options", "schema", "tables"):
        if changes := differences(saved[part], now[part]):
            raise InputError(f"{out}: cannot resume, {part} changed: {'; '.join(changes)}")
    if changed := [name for name in SPLITS if saved["data"][name] != now["data"][name]]:
        raise InputError(f"{out}: cannot resume, the data changed: {', '.join(changed)} rows are not the same")
