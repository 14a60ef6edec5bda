"""Section ``tune``: the fastest choices for the shapes that matter, in a file that ``--tuned`` takes."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch

import cells
from on_gpu import trials
from on_gpu.launch_times import PARTS, SCHEDULES_OF
from on_gpu.run import Record, Run, Save
from saml_kernels.backends.triton import configs, tuning
from saml_kernels.backends.triton.configs import Choice, Config
from saml_kernels.backends.triton.tuning import Shape, TuningFailed
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import one_line
from saml_kernels.testing.problem import backend

FILE: Final = "gpu.tuned.json"
TRIALS_SHARE: Final = 0.5
"""Of the section's time, at most, for compiling the candidates."""
ROUNDS_SECONDS: Final = 0.6
"""For the contenders of one kind of launch at one shape."""


def tune(run: Run, deadline: float, save: Save) -> None:
    """saml_kernels.backends.triton.tuning over B and M in the type measured most, from CUDA graphs."""
    path = run.folder / FILE
    path.unlink(missing_ok=True)
    found: list[Record] = []
    with _standing_in(run):
        tried = _try(run, time.monotonic() + TRIALS_SHARE * (deadline - time.monotonic()))
        for B, M in run.shapes.timed:
            entry: Record = {"B": B, "M": M}
            if time.monotonic() > deadline:
                found.append(entry | {"failure": "left out: no time was left"})
            else:
                found.append(entry | _tuned(run, B, M, tried, path))
            save({"file": FILE, "shapes": found})
    save({"skipped": {name: failure for name, failure in tried.items() if failure}})


def _tuned(run: Run, B: int, M: int, tried: Mapping[str, str | None], path: Path) -> Record:
    cell = run.shapes.cell(B, M)
    sizes = cell.B, cell.M, cell.local_dim, cell.global_dim, cell.hidden_dims
    shape = Shape(*sizes, run.target.dtype, torch.device(run.target.device))
    lines: list[str] = []
    candidates = configs.candidates

    def usable(part: str, itemsize: int, family: str) -> tuple[Config, ...]:
        return tuple(
            config
            for config in candidates(part, itemsize, family)
            if not any(trials.harms(tried.get(name)) for name in _trials(run, M, part, config))
        )

    try:
        with patch.object(configs, "candidates", usable):
            result = tuning.tune(shape, _timer(run), lines.append, path)
    except (TuningFailed, RuntimeError) as error:
        return {"failure": one_line(error), "said": lines}
    finally:
        run.target.collect()
    return {"key": result.key, "choice": asdict(result.choice), "said": lines} | {
        name: None if seconds is None else asdict(seconds) | {"ratio": seconds.ratio}
        for name, seconds in (("forward", result.forward), ("step", result.step))
    }


def _timer(run: Run) -> tuning.Timer:
    """Medians of calls captured in graphs: without, the host's share of a small batch would decide."""

    def timer(calls: Mapping[Choice, tuning.Call]) -> dict[Choice, float]:
        pool = run.target.graph_pool()
        captured: dict[Choice, Callable[[], object]] = {}
        for choice, call in calls.items():
            captured[choice], _ = run.target.capture(partial(_run, call), pool, cells.WARM_UPS)
        seconds = timing.interleave(captured, run.protocol(ROUNDS_SECONDS), run.target.clock)
        return {choice: timing.summary(values).median for choice, values in seconds.items()}

    return timer


def _run(call: tuning.Call) -> tuple[Any, ...]:
    return (call(),)


def _try(run: Run, deadline: float) -> dict[str, str | None]:
    """Every candidate at every M, in each place of the built-in choice."""
    if not run.target.schedules:
        return {}
    family = configs.family(torch.device(run.target.device))
    wanted = {
        name: (choice, M)
        for M in dict.fromkeys(M for _, M in run.shapes.timed)
        for part in PARTS
        for config in configs.candidates(part, run.target.dtype.itemsize, family)
        for name, choice in _trials(run, M, part, config).items()
    }
    return trials.run({}, wanted, run, deadline)


def _trials(run: Run, M: int, part: str, config: Config) -> dict[str, Choice]:
    """By name, the built-in choice with a candidate in one place."""
    bucket = configs.Bucket.of(configs.PERSISTENT_ROWS, M, max(run.shapes.widths[1:]))
    built_in = configs.built_in(bucket, run.target.dtype.itemsize, configs.family(torch.device(run.target.device)))
    changed: dict[str, Any] = {part: config}
    return {
        f"M={M}, {part} {schedule}, {config}": replace(built_in, schedule=schedule, **changed)
        for schedule in SCHEDULES_OF.get(part, (built_in.schedule,))
    }


@contextmanager
def _standing_in(run: Run) -> Iterator[None]:
    """Where no kernels run, as in most dry runs, the reference is tuned: every choice is right, and none is faster."""
    with ExitStack() as stack:
        if not run.target.schedules:
            stack.enter_context(patch.object(tuning, "TRITON", backend(run.target.ours)))
            stack.enter_context(patch.object(configs, "device_name", lambda device: "dry run"))
        yield
