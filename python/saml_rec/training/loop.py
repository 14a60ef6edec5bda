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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from saml_rec.console import epoch_line, progress, say
from saml_rec.data.encoding import Encoder
from saml_rec.data.order import Share, batch_starts
from saml_rec.data.prefetch import prefetched
from saml_rec.data.preparation import PreparedData
from saml_rec.data.schema import Schema
from saml_rec.data.sources import Paths
from saml_rec.data.splits import SPLITS
from saml_rec.data.table import Batch
from saml_rec.errors import InputError, memory_for, shortened
from saml_rec.evaluation.scoring import metrics_of, overall_of, recorded, to_device
from saml_rec.models.construction import (
    backends_used,
    build_model,
    own_random_numbers,
    parameter_count,
)
from saml_rec.models.features import table_rows
from saml_rec.models.fitted import FittedModel
from saml_rec.models.registry import hyperparameters, is_fitted
from saml_rec.models.tables import FusedTable, TableOptions, resolve_engine, table_options
from saml_rec.processes import ALONE, Processes
from saml_rec.run_directory import RESULTS, RunDirectory, differences, versions
from saml_rec.sealed import content_of, not_finite, save, save_tensors
from saml_rec.training.decay import without_decay
from saml_rec.training.history import Begun, best_epoch, check_history, is_cut_off, stacked, stopped_by
from saml_rec.training.model_card import model_card
from saml_rec.training.optimizers import Optimizers
from saml_rec.training.options import TrainOptions
from saml_rec.training.scenario_parameters import default_decay, default_rate
from saml_rec.training.trackers import Tracked, Tracker, tracking

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


@dataclass
class _State:
    """What changes during training."""

    model: nn.Module
    optimizer: Optimizers
    tables: TableOptions
    history: list[dict[str, Any]]
    best_weights: dict[str, Tensor]
    loss_of: nn.Module
    begun: Begun | None = None

    @classmethod
    def fresh(
        cls,
        options: TrainOptions,
        schema: Schema,
        encoder: Encoder,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> "_State":
        torch.manual_seed(stream_seed(options.seed, INITIALISATION))
        rows = 0 if is_fitted(options.model) else table_rows(schema, encoder.num_scenarios, encoder.vocabulary_sizes)
        engine = resolve_engine(options.tables, options.table_optimizer, rows, device, processes)
        tables = options.table_options(engine)
        with table_options(tables, processes):
            model = build_model(options.model, options.model_options, schema, encoder).to(device)
        rate = options.scenario_rate
        scenario_rate = default_rate(model, encoder.num_scenarios) if rate is None else rate
        decay = options.scenario_decay
        scenario_decay = default_decay(model, options.learning_rate) if decay is None else decay
        optimizer = Optimizers(
            model,
            options.learning_rate,
            options.weight_decay,
            tables,
            scenario_rate,
            scenario_decay,
            encoder.num_scenarios,
        )
        loss_of: nn.Module = _Loss(model)
        if processes.are_several:
            loss_of = nn.parallel.DistributedDataParallel(loss_of)
        return cls(model, optimizer, tables, [], _weights(model), loss_of)

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

    @property
    def fused_tables(self) -> list[str]:
        """Names of the modules that are tables whose rows may be in several processes."""
        return [name for name, module in self.model.named_modules() if isinstance(module, FusedTable)]

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint.

        Raises:
            Exception: of many kinds, where its parts do not fit this model or each other.
        """
        self.model.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history, self.best_weights = saved["history"], saved["best_weights"]
        self.begun = None if saved["begun"] is None else Begun.from_dict(saved["begun"])
        check_history(self.history)
        kept, best = ({name: each.shape for name, each in saved[part].items()} for part in ("weights", "best_weights"))
        if changed := differences(kept, best):
            raise InputError(f"weights and best weights differ: {changed[0]}")

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All numbers of the model and its optimizers that this process has."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        for name, module in self.model.named_modules():
            if isinstance(module, FusedTable):
                yield f"{name}.weight", module.rows
        yield from self.optimizer.named_tensors()


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
    processes: Processes = ALONE,
    configuration: Mapping[str, Any] | None = None,
    trackers: Sequence[Tracker] = (),
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
        processes: of the job that this one belongs to. Every one calls this with the same arguments and does its share
            of each batch; the first prints and writes.
        configuration: what the run directory keeps as run.toml, options of ``saml-rec train``; None: nothing.
        trackers: what is told of the run and its epochs; those of the first process.

    Raises:
        InputError: an option, the run directory or the data cannot be used; the loss is not finite; another process
            trains into ``out``.
        OSError: the run directory cannot be written.
    """
    run = RunDirectory(out)
    if processes.is_first:
        run.require_startable(resume=resume, overwrite=overwrite)
    options = options.resolved(processes)
    options.check_features(schema)
    device = torch.device(options.device)
    if not processes.is_first:
        console = None
    with own_random_numbers(device):
        state = _State.fresh(options, schema, data.encoder, device, processes)
        identity = _identity(options, schema, state, data)
        backends = backends_used(state.model, device)
        with run.held() if processes.is_first else nullcontext():
            saved, finished = None, None
            if processes.is_first:
                # What stood here may have changed until the run was held.
                run.require_startable(resume=resume, overwrite=overwrite)
                if resume:
                    saved = run.load_model() if run.finished else run.load_checkpoint()
                    _require_same(out, saved, identity)
                    if run.finished:
                        finished = run.read_results(saved)
                        run.remove_leftovers()
            if (finished := processes.from_first(finished)) is not None:
                history, metrics = finished
                return RunResult(out, metrics, history, already_finished=True)
            job = _Job(data, options, device, processes, console)
            start = _Start(saved, identity, configuration)
            with tracking(trackers if processes.is_first else (), run.path, options.to_dict()) as tracked:
                tracked.begun(0 if saved is None else len(saved["history"]))
                _run_epochs(run, state, start, job, checkpoints or CheckpointTimes(), tracked)
                state.model.load_state_dict(state.best_weights)
                if is_cut_off(state.history, options):
                    say(console, f"the last of {options.epochs} epochs was the best one: more may be better")
                tested = metrics_of(state.model, data.tables["test"], data.encoder, device, console, processes)
                result = _write(run, state, tested, start, job, backends, data_path)
                tracked.finished(result.metrics)
            return result


def train_and_validate(
    data: PreparedData, schema: Schema, options: TrainOptions, *, console: Console | None = None
) -> list[dict[str, Any]]:
    """Trains as :func:`train` does, and neither looks at the test rows nor writes anything.

    Args:
        data, schema, options, console: as of :func:`train`.

    Returns:
        The history, one entry an epoch.

    Raises:
        InputError: an option or the data cannot be used; the loss is not finite.
    """
    options = options.resolved()
    options.check_features(schema)
    device = torch.device(options.device)
    with own_random_numbers(device):
        state = _State.fresh(options, schema, data.encoder, device)
        job = _Job(data, options, device, console=console)
        while stopped_by(state.history, options) is None:
            state.add_epoch(_next_epoch(state, job))
            say(console, epoch_line(state.history, options.epochs, best_epoch(state.history)))
    return state.history


@dataclass(frozen=True)
class _Job:
    """What stays the same during training."""

    data: PreparedData
    options: TrainOptions
    device: torch.device
    processes: Processes = ALONE
    console: Console | None = None


@dataclass(frozen=True)
class _Start:
    """What a run begins with: a checkpoint or none, what has to be the same to go on, what run.toml keeps."""

    saved: Mapping[str, Any] | None
    identity: Mapping[str, Any]
    configuration: Mapping[str, Any] | None


def _identity(options: TrainOptions, schema: Schema, state: _State, data: PreparedData) -> dict[str, Any]:
    """What has to be the same for a run to go on. Tables that are not dense may go on in another engine."""
    chosen = options.to_dict()
    same = {"dense": state.tables.engine == "dense", **dataclasses.asdict(state.tables)}
    del same["engine"], chosen["tables"]
    return {
        "options": chosen,
        "schema": schema.to_dict(),
        "tables": same,
        "without_decay": without_decay(state.model),
        "data": {name: data.tables[name].fingerprint() for name in SPLITS},
    }


def _run_epochs(
    run: RunDirectory,
    state: _State,
    start: _Start,
    job: _Job,
    checkpoints: CheckpointTimes,
    tracked: Tracked,
) -> None:
    """Trains to the end, from the checkpoint ``saved`` if there is one, with a checkpoint after every epoch."""
    processes, console, saved = job.processes, job.console, start.saved

    def save_state() -> None:
        content = {**start.identity, **state.to_dict()}
        if processes.is_first:
            save(run.checkpoint, "checkpoint", content)
        # The others do not go on before it is there, so that a kill loses the same for all.
        processes.wait()

    if processes.from_first(saved is None):
        if processes.is_first:
            run.clear()
        # Before the first epoch: a directory that cannot be written shows now, and resume always works.
        save_state()
    else:
        with content_of(run.checkpoint):
            state.restore(_shared_state(saved, state, processes))
        if processes.is_first:
            run.remove_leftovers()
        within = f", step {state.begun.steps} of the next" if state.begun else ""
        say(console, f"resuming {run.path} after epoch {len(state.history)}{within}")
    if processes.is_first and start.configuration is not None:
        run.write_configuration(start.configuration)
    if processes.are_several:
        say(console, f"{processes.count} processes")
    if state.tables.engine != "dense":
        say(console, f"tables: {state.tables.engine}, {_trained_by(state.tables)}")
    if len(job.data.tables["valid"]) == 0:
        say(console, "no validation rows: no early stopping, the last epoch is kept")
    while stopped_by(state.history, job.options) is None:
        entry = _next_epoch(state, job, _Saver(checkpoints, save_state, processes))
        state.add_epoch(entry)
        save_state()
        say(console, epoch_line(state.history, job.options.epochs, best_epoch(state.history)))
        tracked.epoch(entry)


def _shared_state(saved: Mapping[str, Any] | None, state: _State, processes: Processes) -> Mapping[str, Any]:
    """A checkpoint that the first process has read, in all of them; tables in several processes in the first alone."""
    if not processes.are_several:
        assert saved is not None
        return saved
    light = None
    if saved is not None:
        tables = {f"{name}.weight" for name in state.fused_tables}
        light = {name: saved[name] for name in ("history", "begun")}
        for part in ("weights", "best_weights"):
            light[part] = {name: tensor[:0] if name in tables else tensor for name, tensor in saved[part].items()}
        squares = {name: each[:0] for name, each in saved["optimizer"]["squares"].items()}
        light["optimizer"] = {**saved["optimizer"], "squares": squares}
    shared: Mapping[str, Any] = processes.from_first(light)
    return shared if saved is None else saved


def _write(
    run: RunDirectory,
    state: _State,
    tested: Mapping[str, Any],
    start: _Start,
    job: _Job,
    backends: Mapping[str, str],
    data_path: Paths | None,
) -> RunResult:
    """The files of a run that is at its end."""
    history, options, data = state.history, job.options, job.data
    metrics = {
        "model": options.model,
        "split": "test",
        **tested,
        "best_epoch": best_epoch(history),
        "epochs": len(history),
        "stopped_by": stopped_by(history, options),
        "valid": history[best_epoch(history) - 1]["valid"],
        "seed": options.seed,
        "options": options.to_dict(),
        "parameters": parameter_count(state.model),
        "device": options.device,
        "processes": job.processes.count,
        "backend": backends,
        "tables": None
        if is_fitted(options.model)
        else {"engine": state.tables.engine, "trained_by": _trained_by(state.tables)},
        "fitted": history[0].get("fitted"),
        "data": {
            "path": None if data_path is None else recorded(data_path),
            "unseen_scenarios": dict(data.unseen),
            "rows": {name: len(data.tables[name]) for name in SPLITS},
            "features": data.shares(),
        },
        "timing": _timing(history, len(data.tables["train"])),
        "versions": versions(),
    }
    if job.processes.is_first:
        tensors = {"format": "pt", "model": options.model, "saml_kernels": metrics["versions"]["saml_kernels"]}
        model_file = {
            **start.identity,
            "data_path": metrics["data"]["path"],
            "features": metrics["data"]["features"],
            "csv": data.csv.to_dict(),
            "encoder": data.encoder.to_dict(),
            "best_epoch": metrics["best_epoch"],
            "versions": metrics["versions"],
            "weights": state.best_weights,
            RESULTS: {
                run.tensors.name: save_tensors(run.tensors, state.best_weights, tensors),
                **run.digests_of_results(history, metrics),
            },
        }
        save(run.model, "model", model_file)
        run.write_results(history, metrics, model_card(metrics, start.identity["schema"], start.configuration))
    job.processes.wait()
    return RunResult(run.path, metrics, history, already_finished=False)


def _trained_by(tables: TableOptions) -> str:
    """What trains them, for people."""
    return "adamw" if tables.engine == "dense" else f"{tables.optimizer} with learning rate {tables.rate:g}"


def time_backends(data: PreparedData, schema: Schema, options: TrainOptions) -> dict[str, float]:
    """Seconds of one epoch of training steps on the backend in use and on the reference, each from fresh weights.

    Returns:
        Seconds by the names of the backends that ran, "a + b" for a model whose operations ran on several; nothing
        for a model without kernels.

    Raises:
        InputError: an option or the data cannot be used.
    """
    seconds: dict[str, float] = {}
    for backend in ("auto", "reference") if "backend" in hyperparameters(options.model) else ():
        asked = dataclasses.replace(options, model_options={**options.model_options, "backend": backend}).resolved()
        device = torch.device(asked.device)
        with own_random_numbers(device):
            state = _State.fresh(asked, schema, data.encoder, device)
            used = " + ".join(sorted(set(backends_used(state.model, device).values())))
            seconds[used] = _run_epoch(state, _Job(data, asked, device))["seconds"]
    return seconds


def stream_seed(seed: int, purpose: int, *what: int) -> int:
    """A seed for torch from (seed, purpose, and for what of it); streams of different arguments are independent."""
    return int(np.random.SeedSequence((seed, purpose, *(what or (0,)))).generate_state(1, np.uint64)[0] >> 1)


class _Saver:
    """Saves within an epoch when it is time.

    Args:
        times: when that is.
        save: writes the checkpoint.
        processes: of the job; the clock of the first decides.
    """

    def __init__(self, times: CheckpointTimes, save: Callable[[], None], processes: Processes) -> None:
        self._times, self._save, self._processes = times, save, processes
        self._steps, self._clock = 0, time.monotonic()

    def is_due(self, steps_since_check: int) -> bool:
        """Asked after every step, ``steps_since_check`` of them after the losses were looked at."""
        self._steps += 1
        if self._times.steps is not None and self._steps >= self._times.steps:
            return True
        if self._times.minutes is None or steps_since_check < STEPS_PER_LOSS_CHECK:
            return False
        minutes = (time.monotonic() - self._clock) / 60
        return bool(self._processes.from_first(minutes >= self._times.minutes))

    def save(self, state: _State, begun: Begun) -> None:
        """Writes a checkpoint of the epoch so far."""
        state.begun = begun
        self._save()
        self._steps, self._clock = 0, time.monotonic()


class _Losses:
    """Mean losses of the steps of an epoch, over the rows of all processes.

    They stay on the device, and in this process, until they are looked at.

    Args:
        known, weights: of the steps before.
        epoch: for messages.
        processes: of the job.
    """

    def __init__(self, known: Sequence[Tensor], weights: Sequence[float], epoch: int, processes: Processes) -> None:
        self.known, self.weights = list(known), list(weights)
        self._epoch, self._processes = epoch, processes
        self.own: list[Tensor] = []

    def add(self, own_share: Tensor, weight: float) -> None:
        """What this process's rows add to the mean of a step, and what the step's rows count in all processes."""
        self.own.append(own_share.detach())
        self.weights.append(weight)

    def mean(self) -> float:
        """Over the rows of all steps; 0 where none counts anything, as the loss of such a batch is."""
        total = sum(self.weights)
        losses = stacked(self.known).double().numpy()
        return float(np.average(losses, weights=self.weights)) if total else 0.0

    def look(self) -> None:
        """Adds up the shares of all processes.

        Raises:
            InputError: a loss is not finite, in all processes alike.
        """
        if not self.own:
            return
        losses = self._processes.sum(torch.stack(self.own)).cpu()
        if len(broken := (~losses.isfinite()).nonzero()):
            position = int(broken[0])
            raise InputError(
                f"the loss is {float(losses[position])} at epoch {self._epoch}, step "
                f"{len(self.known) + position + 1}; try a lower learning rate"
            )
        self.known += losses.unbind()
        self.own = []


def _next_epoch(state: _State, job: _Job, saver: _Saver | None = None) -> dict[str, Any]:
    """Trains for one epoch, or fits the model; the entry of the history."""
    with memory_for(f"epoch {len(state.history) + 1} of training"):
        return _fit(state, job) or _run_epoch(state, job, saver)


def _run_epoch(state: _State, job: _Job, saver: _Saver | None = None) -> dict[str, Any]:
    """Trains for one epoch, or what is left of it, and scores the validation rows; its entry of the history."""
    options, processes, table = job.options, job.processes, job.data.tables["train"]
    epoch = len(state.history) + 1
    generator = torch.Generator().manual_seed(stream_seed(options.seed, SHUFFLING, epoch))
    torch.manual_seed(stream_seed(options.seed, DROPOUT, epoch))
    before = 0.0
    losses = _Losses([], [], epoch, processes)
    if state.begun is not None:
        losses = _Losses(state.begun.losses, state.begun.weights, epoch, processes)
        before = state.begun.seconds
        _set_random_state(state.begun.random, job.device)
    share = Share(processes.rank, processes.count)
    done = len(losses.known)
    batches = table.batches(options.batch_size, generator=generator, share=share, first_batch=done)
    sizes = [size for _, size in batch_starts(len(table), options.batch_size, 0)]
    start = time.perf_counter()
    described = f"epoch {epoch}/{options.epochs}"
    with progress(job.console, described, len(sizes) - done) as advance, prefetched(batches) as ready:
        state.model.train()
        step = _step_of(state, job)
        for batch, size in zip(ready, sizes[done:], strict=True):
            if processes.are_several:
                # Their rows differ, and how many processes there are may change: a stream for every step and process.
                position = len(losses.known) + len(losses.own)
                torch.manual_seed(stream_seed(options.seed, DROPOUT, epoch, position, processes.rank))
            losses.add(*step(batch, size))
            advance()
            is_due = saver is not None and saver.is_due(len(losses.own))
            if is_due or len(losses.own) == STEPS_PER_LOSS_CHECK:
                losses.look()
            if is_due and saver is not None:
                _require_finite(state, processes, epoch, len(losses.known))
                seconds = before + time.perf_counter() - start
                saver.save(state, Begun(losses.known, losses.weights, seconds, _random_state(job.device)))
        losses.look()
    _require_finite(state, processes, epoch, len(losses.known))
    seconds = before + time.perf_counter() - start
    try:
        valid = overall_of(state.model, job.data.tables["valid"], job.device, job.console, processes)
    except InputError as error:
        raise InputError(f"{error}, after epoch {epoch}; try a lower learning rate") from error
    return {
        "epoch": epoch,
        "train_loss": losses.mean(),
        "valid": valid,
        "seconds": seconds,
        "rows_per_second": len(table) / seconds,
    }


def _require_finite(state: _State, processes: Processes, epoch: int, step: int) -> None:
    """Looks at all numbers that the next checkpoint would have; a loss shows those of the step before it at most.

    Raises:
        InputError: one is not finite, in all processes alike.
    """
    broken = not_finite(dict(state.named_tensors()))
    count = int(processes.sum(torch.tensor(0 if broken is None else 1)))
    if count:
        which = "in another process" if broken is None else f"in {shortened(broken)}"
        raise InputError(
            f"a weight or its optimizer's state is not finite at epoch {epoch}, step {step}, {which}; try a lower "
            "learning rate"
        )


def _fit(state: _State, job: _Job) -> dict[str, Any] | None:
    """Fits a model that is fitted as a whole; the only entry of its history. None for others."""
    if not isinstance(state.model, FittedModel):
        return None
    train, valid = job.data.tables["train"], job.data.tables["valid"]
    start = time.perf_counter()
    fitted = state.model.fit(train, valid, job.options.seed)
    seconds = time.perf_counter() - start
    losses = {
        name: overall_of(state.model, table, job.device, job.console)
        for name, table in (("train", train), ("valid", valid))
    }
    return {
        "epoch": 1,
        "train_loss": losses["train"]["logloss"],
        "valid": losses["valid"],
        "seconds": seconds,
        "rows_per_second": len(train) / seconds,
        "fitted": fitted,
    }


class _Loss(nn.Module):
    """A model's loss as a forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self.model.loss(batch)  # type: ignore[operator]
        return loss


def _step_of(state: _State, job: _Job) -> Callable[[Batch, int], tuple[Tensor, float]]:
    """One optimizer step.

    This process's rows of a batch, and how many the batch has → their share of the mean loss, what the batch counts.
    """
    count = job.processes.count
    first = job.data.tables["train"].first() if job.processes.are_several else None

    def step(batch: Batch, size: int) -> tuple[Tensor, float]:
        own, whole = _weights_of(batch, size, job.processes)
        if len(batch["scenario"]) == 0:
            # The others wait for its gradients, which are zero.
            assert first is not None
            batch = first
        share = own / whole if whole else 0.0
        loss: Tensor = state.loss_of(to_device(batch, job.device))
        state.optimizer.zero_grad()
        if job.processes.are_several:
            # Gradients are averaged over processes.
            (loss * (share * count)).backward()
            loss = loss.detach() * share
        else:
            loss.backward()
        state.optimizer.step()
        return loss, whole

    return step


def _weights_of(batch: Batch, size: int, processes: Processes) -> tuple[float, float]:
    """What this process's rows of a batch count, and all ``size`` rows of the batch: rows, or sums of their weights."""
    if "weight" not in batch:
        return float(len(batch["scenario"])), float(size)
    own = batch["weight"].sum(dtype=torch.float64)
    return float(own), float(processes.sum(own))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _timing(history: Sequence[Mapping[str, Any]], rows: int) -> dict[str, float]:
    seconds = sum(entry["seconds"] for entry in history) / len(history)
    return {"seconds_per_epoch": seconds, "rows_per_second": rows / seconds}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _require_same(out: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with other options, another schema or other data."""
    for part in ("options", "schema", "tables"):
        if changes := differences(saved.get(part), now[part]):
            raise InputError(f"{out}: cannot resume, {part} changed: {shortened('; '.join(changes))}")
    if saved.get("without_decay") != now["without_decay"]:
        raise InputError(
            f"{out}: cannot resume, in this version weight decay shrinks other parameters than in the one that began "
            "the run; overwrite it or choose another directory"
        )
    if changed := [name for name in SPLITS if saved["data"].get(name) != now["data"][name]]:
        raise InputError(f"{out}: cannot resume, the data changed: {', '.join(changed)} rows are not the same")
