"""The run directory: what a training run leaves on disk, and what it takes to go on from there.

    checkpoint.pt   after every epoch: all that training needs to continue
    run.toml        at the start: the options of the command, for train --config
    model.safetensors  at the end: the best epoch's weights, for other programs
    model.pt        at the end: the best epoch's weights and all that scoring needs
    history.json    at the end: one entry an epoch
    model_card.md   at the end: what the model is, for people
    metrics.json    at the end, last: a directory that has it holds a finished run

Every file is written whole or not at all, and the .pt files say whether they are (:mod:`saml_rec.sealed`). model.pt has
the digests of model.safetensors, history.json and metrics.json.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import polars
import sklearn
import tomli_w
import torch

import saml_kernels
from saml_rec.errors import InputError, shortened, shown
from saml_rec.files import leftovers, replacing, write_json
from saml_rec.sealed import first_tensor, json_digest, load, read_as_written, require_digest

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None

BESIDE = ("evaluation-*.json", "run.json", "test-logits.npy")
"""What evaluating and comparing write into the directory of a run."""
RESULTS = "results"
"""Key of model.pt under which the digests of model.safetensors, history.json and metrics.json stand, by their names."""
MODEL_PARTS = {"options": dict, "schema": dict, "encoder": dict, "data": dict, "weights": dict, "best_epoch": int}
CHECKPOINT_PARTS = {
    "options": dict,
    "schema": dict,
    "data": dict,
    "weights": dict,
    "best_weights": dict,
    "optimizer": dict,
    "history": list,
}
"""What the parts of the two files are; what lies within them is checked where it is used."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one training run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def model(self) -> Path:
        return self.path / "model.pt"

    @property
    def tensors(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def configuration(self) -> Path:
        return self.path / "run.toml"

    @property
    def card(self) -> Path:
        return self.path / "model_card.md"

    @property
    def history(self) -> Path:
        return self.path / "history.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def started(self) -> bool:
        """A run was begun here."""
        return self.checkpoint.exists() or self.model.exists()

    @property
    def finished(self) -> bool:
        """The run was trained to its end; it needs no checkpoint any more."""
        return self.model.exists() and self.metrics.exists()

    def require_startable(self, *, resume: bool, overwrite: bool) -> None:
        """Refuses a directory that training must not write to, before any work.

        Raises:
            InputError: both flags; a run without either flag; no run to resume; a file, or a directory
                with files of something else.
        """
        if resume and overwrite:
            raise InputError("resume and overwrite exclude each other")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is not a directory")
        if resume and not self.started:
            raise InputError(f"{self.path}: holds no run to resume")
        if self.started:
            if not (resume or overwrite):
                state = "a finished run" if self.finished else "an unfinished run"
                raise InputError(f"{self.path}: holds {state}; resume it, overwrite it or choose another directory")
        elif self.path.exists() and set(self.path.iterdir()) - set(self._leftovers()):
            raise InputError(f"{self.path}: is not empty and holds no run; choose another directory")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from training here while the block runs; makes the directory if it is missing.

        The lock is on the directory itself: it leaves no file, and ends with the process however that ends. Where the
        system has no such lock (Windows, some network file systems) nothing is kept away.

        Raises:
            InputError: another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another process is training here") from None
            except OSError:
                pass
            yield
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Makes an empty run directory: removes the files of an earlier run, and leaves all others."""
        self.path.mkdir(parents=True, exist_ok=True)
        # The checkpoint last: without it the directory would no longer count as a run.
        own = (*self._others(), *self.path.glob("evaluation-*.json"), self.checkpoint)
        for file in (*own, *self._leftovers()):
            file.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Removes temporary files that a killed run left behind."""
        for file in self._leftovers():
            file.unlink(missing_ok=True)

    def _others(self) -> tuple[Path, ...]:
        """All files of training but the checkpoint."""
        return self.metrics, self.history, self.card, self.model, self.tensors, self.configuration

    def _leftovers(self) -> Iterator[Path]:
        for file in (self.checkpoint, *self._others(), *map(self.path.joinpath, BESIDE)):
            yield from leftovers(file)

    def load_checkpoint(self) -> dict[str, Any]:
        """The content of checkpoint.pt.

        Raises:
            InputError: it is damaged, or something else.
            OSError: it cannot be opened.
        """
        return _with_parts(self.checkpoint, "checkpoint", CHECKPOINT_PARTS)

    def load_model(self) -> dict[str, Any]:
        """The content of model.pt.

        Raises:
            InputError: it is damaged, or something else.
            OSError: it cannot be opened.
        """
        content = _with_parts(self.model, "model", MODEL_PARTS)
        plain = {name: part for name, part in content.items() if name != "weights"}
        if (name := first_tensor(plain)) is not None:
            raise InputError(f"{self.model}: is damaged: {shortened(name)} is a tensor")
        return content

    def digests_of_results(self, history: list[dict[str, Any]], metrics: Mapping[str, Any]) -> dict[str, str]:
        """What model.pt has to say of the files that :meth:`write_results` writes."""
        return {self.history.name: json_digest(history), self.metrics.name: json_digest(metrics)}

    def write_configuration(self, options: Mapping[str, Any]) -> None:
        """Writes run.toml: options of the command, texts, numbers, booleans and lists of them."""
        with replacing(self.configuration) as file:
            file.write(tomli_w.dumps(options).encode())

    def write_results(self, history: list[dict[str, Any]], metrics: Mapping[str, Any], card: str) -> None:
        """Writes history.json, model_card.md and then metrics.json, which marks the run finished."""
        write_json(self.history, history)
        with replacing(self.card) as file:
            file.write(card.encode("utf-8", "backslashreplace"))
        write_json(self.metrics, metrics)

    def read_results(self, saved: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """History and metrics of a finished run.

        Args:
            saved: of model.pt.

        Raises:
            InputError: a file is damaged.
            OSError: it cannot be opened.
        """
        digests = saved.get(RESULTS, {})
        if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
            raise InputError(f"{self.model}: is damaged: expected the digests of the run's results")
        require_digest(self.tensors, digests.get(self.tensors.name))
        history, metrics = (read_as_written(file, digests.get(file.name)) for file in (self.history, self.metrics))
        if not isinstance(history, list) or not history or not all(isinstance(entry, dict) for entry in history):
            raise InputError(f"{self.history}: is damaged: expected a list of epochs")
        if not isinstance(metrics, dict) or not {"overall", "scenarios", "best_epoch", "epochs"} <= metrics.keys():
            raise InputError(f"{self.metrics}: is damaged: expected an object with overall, scenarios and epochs")
        return history, metrics


def _with_parts(path: Path, kind: str, parts: Mapping[str, type]) -> dict[str, Any]:
    content = load(path, kind)
    for name, expected in parts.items():
        if not isinstance(content.get(name), expected):
            raise InputError(f"{path}: is damaged: its part {name} is {shown(content.get(name))}")
    return content


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Which leaves of two nested plain values differ, each as ``"dotted.name was x, is y"``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            difference
            for key in sorted({*before, *now}, key=str)
            for difference in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            difference
            for position, (old, new) in enumerate(zip(before, now, strict=True))
            for difference in differences(old, new, f"{name}[{position}]")
        ]
    return [] if _are_equal(before, now) else [f"{shortened(name)} was {shown(before)}, is {shown(now)}"]


def _are_equal(before: Any, now: Any) -> bool:
    """Of leaves; a file may have a tensor where a number is expected, and == of tensors is no answer."""
    if isinstance(before, torch.Tensor) or isinstance(now, torch.Tensor):
        return isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor) and torch.equal(before, now)
    return bool(before == now)


def versions() -> dict[str, str]:
    """Versions that the results depend on."""
    return {
        "saml_kernels": saml_kernels.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "polars": polars.__version__,
        "scikit-learn": sklearn.__version__,
    }
