"""What ``saml-rec bench`` does: times the trunk on every backend, or tunes the Triton kernels for a shape."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saml_kernels import doctor
from saml_kernels.backends import BACKENDS, BackendUnavailable, choose_backend
from saml_kernels.backends.triton import configs, tuning
from saml_kernels.backends.triton.configs import Choice
from saml_kernels.backends.triton.tuning import Call, Shape, Tuned
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import one_line
from saml_kernels.testing.problem import backend as run_on
from saml_kernels.testing.timing import Protocol
from saml_rec.console import say, table_of
from saml_rec.errors import InputError
from saml_rec.files import check_output_file
from saml_rec.run_directory import versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = {"forward": "forward", "training_step": "step"}
"""As they are called in the record, and in saml_kernels.testing.problem.PASSES."""
REFERENCE = "reference"
TUNED_LAUNCHES = 5
"""That share the budget: forward, backward, weights, and the result's forward and step beside the built-in choice."""


def measure(shape: Shape, budget: float) -> dict[str, Any]:
    """Times inference and a training step, forward and backward, of every backend that can run the shape here.

    Args:
        shape: what to time.
        budget: seconds for the rounds of both passes together; there are at least Protocol.min_rounds.

    Returns:
        The record that ``--out`` writes: ``shape``, ``budget``, ``machine``, ``versions``, ``backends``. A backend has
        either a ``reason``, or for each of PASSES ``seconds`` and ``ratio``, the reference's seconds divided by its
        own in each round; both have ``median``, ``p20``, ``p80``, ``rounds``. ``ratio`` is None without the reference.

    Raises:
        InputError: the inputs do not fit in memory.
    """
    try:
        problem = shape.problem()
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"{describe(_record(shape, budget))}: {one_line(error)}") from error
    reasons: dict[str, str] = {}
    calls: dict[str, dict[str, Call]] = {name: {} for name in PASSES}
    for backend in BACKENDS:
        try:
            choose_backend(backend, "multi_branch", problem.x_local)
            found = {name: problem.call(kind, run_on(backend)) for name, kind in PASSES.items()}
            for call in found.values():
                call()
        except BackendUnavailable as error:
            reasons[backend] = str(error).partition(": ")[2]
        except (RuntimeError, MemoryError) as error:
            reasons[backend] = one_line(error)
        else:
            for name, call in found.items():
                calls[name][backend] = call
    protocol, clock = Protocol(budget / len(PASSES)), timing.clock_of(shape.device)
    times = {name: timing.interleave(of_pass, protocol, clock) for name, of_pass in calls.items()}
    return _record(shape, budget) | {
        "backends": {
            backend: {"reason": reasons[backend]}
            if backend in reasons
            else {name: _figures(times[name][backend], times[name].get(REFERENCE)) for name in PASSES}
            for backend in BACKENDS
        }
    }


def require_tunable(shape: Shape) -> None:
    """Refuses, before any work, to tune where that cannot end well.

    Raises:
        InputError: the Triton backend cannot run here, or the file of tuned choices is damaged or not writable.
    """
    try:
        choose_backend("triton", "multi_branch", torch.empty(0, device=shape.device, dtype=shape.dtype))
    except BackendUnavailable as error:
        raise InputError(f"--tune: {error}") from error
    path = configs.cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output_file(path)
    configs.forget()
    try:
        configs.tuned(path)
    except ValueError as error:
        raise InputError(str(error)) from error


def tune(shape: Shape, budget: float, say: Callable[[str], None]) -> tuple[Tuned, dict[str, Any]]:
    """Tunes the Triton kernels for the shape's bucket and writes the choice to the user's cache.

    Args:
        shape: what to time; :func:`require_tunable` has passed.
        budget: seconds for the rounds of all of them together; compiling comes on top.
        say: receives a line for every kind of launch and every candidate that is skipped.

    Returns:
        What was found, and the record that ``--out`` writes, with ``tuned`` in place of ``backends``.

    Raises:
        InputError: no candidate can be used.
    """

    def timer(calls: Mapping[Choice, Call]) -> dict[Choice, float]:
        times = timing.interleave(calls, Protocol(budget / TUNED_LAUNCHES), timing.clock_of(shape.device))
        return {choice: statistics.median(seconds) for choice, seconds in times.items()}

    try:
        found = tuning.tune(shape, timer, say)
    except (tuning.TuningFailed, torch.OutOfMemoryError) as error:
        raise InputError(f"--tune: {one_line(error)}") from error
    return found, _record(shape, budget) | {"tuned": dataclasses.asdict(found) | {"path": str(found.path)}}


def _record(shape: Shape, budget: float) -> dict[str, Any]:
    dtype = str(shape.dtype).removeprefix("torch.")
    return {
        "shape": dataclasses.asdict(shape) | {"dtype": dtype, "device": str(shape.device)},
        "budget": budget,
        "machine": doctor.machine(),
        "versions": versions(),
    }


def _figures(seconds: Sequence[float], reference: Sequence[float] | None) -> dict[str, Any]:
    ratio = None if reference is None else dataclasses.asdict(timing.ratio(reference, seconds))
    return {"seconds": dataclasses.asdict(timing.summary(seconds)), "ratio": ratio}


def describe(record: Mapping[str, Any]) -> str:
    """The shape of a record on one line."""
    shape = record["shape"]
    widths = ",".join(map(str, shape["hidden_dims"]))
    return (
        f"{shape['rows']:,} rows, {shape['scenarios']} scenarios, inputs {shape['local_dim']} + {shape['global_dim']}, "
        f"layers {widths}, {shape['dtype']} on {shape['device']}"
    )


def table(record: Mapping[str, Any]) -> Table:
    """Milliseconds of every backend that ran, and how many times as fast as the reference it is."""
    shown = table_of(
        "backend",
        ("forward, ms", "×", "training step, ms", "×"),
        caption="medians, with the 20th and 80th percentile; × is the reference's time divided by it",
    )
    for backend, figures in record["backends"].items():
        if "reason" in figures:
            continue
        cells: list[str] = []
        for name in PASSES:
            seconds, ratio = figures[name]["seconds"], figures[name]["ratio"]
            median, low, high = (f"{1e3 * seconds[part]:.3g}" for part in ("median", "p20", "p80"))
            cells += [f"{median} ({low}–{high})", "-" if ratio is None else f"{ratio['median']:.2f}"]
        shown.add_row(Text(backend), *cells)
    return shown


def say_results(console: Console, record: Mapping[str, Any]) -> None:
    """Prints a record of :func:`measure`."""
    say(console, describe(record))
    console.print(table(record))
    for backend, figures in record["backends"].items():
        if "reason" in figures:
            say(console, f"not timed: {backend}: {figures['reason']}")


def say_tuned(console: Console, found: Tuned) -> None:
    """Prints what tuning chose, how much faster it is, and where it stands."""
    for launch in ("forward", "backward", "weights"):
        kept = "" if _tiles(found.choice, launch) != _tiles(found.built_in, launch) else " (as built in)"
        say(console, f"{launch}: {tuning.describe(found.choice, launch)}{kept}")
    if found.forward is None or found.step is None:
        same = found.choice == found.built_in
        why = "the built-in choice is kept" if same else "the built-in choice does not run here"
        say(console, f"{why}: there is nothing to compare")
    else:
        for name, seconds in (("forward", found.forward), ("training step", found.step)):
            before, after = 1e3 * seconds.built_in, 1e3 * seconds.tuned
            times = f"{after:.3g} ms, {before:.3g} ms with the built-in choice"
            say(console, f"{name}: {times}: {seconds.ratio:.2f} times as fast")
    say(console, f"wrote {found.path}: {found.key}")


def _tiles(choice: Choice, launch: str) -> object:
    return (choice.schedule, choice.forward) if launch == "forward" else getattr(choice, launch)
