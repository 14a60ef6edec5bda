"""The run directory: what a training run leaves on disk, and what it takes to go on from there.

    checkpoint.pt   after every epoch: all that training needs to continue
    model.pt        at the end: the best epoch's weights and all that scoring needs
    history.json    at the end: one entry an epoch
    metrics.json    at the end, last: a directory that has it holds a finished run

Every file is written whole or not at all. The .pt files hold tensors and plain values only and are read
with ``weights_only=True``: opening a run never executes code from it.
"""

import json
import os
import pickle
import platform
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import polars
import sklearn
import torch

import saml_kernels
from saml_rec.errors import InputError
from saml_rec.files import replacing, write_json

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None

FORMAT = 1


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
        own = (self.metrics, self.history, self.model, *self.path.glob("evaluation-*.json"), self.checkpoint)
        for file in (*own, *self._leftovers()):
            file.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Removes temporary files that a killed run left behind."""
        for file in self._leftovers():
            file.unlink(missing_ok=True)

    def _leftovers(self) -> Iterator[Path]:
        for file in (self.checkpoint, self.model, self.history, self.metrics):
            yield from self.path.glob(f".{file.name}.*.tmp")

    def write_results(self, history: list[dict[str, Any]], metrics: Mapping[str, Any]) -> None:
        """Writes history.json and then metrics.json, which marks the run finished."""
        write_json(self.history, history)
        write_json(self.metrics, metrics)

    def read_results(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """History and metrics of a finished run."""
        return read_json(self.history), read_json(self.metrics)


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is damaged: {error}") from error


def save(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values, whole or not at all.

    Args:
        path: the file.
        kind: what it holds, "checkpoint" or "model"; :func:`load` asks for the same.
        content: what :func:`torch.load` reads with ``weights_only=True``.

    Raises:
        OSError: the directory or the disk refuses the file.
    """
    with replacing(path) as file:
        try:
            torch.save({"kind": kind, "format": FORMAT, **content}, file)
        except RuntimeError as error:
            # A write that fails makes torch fail once more, when it closes the archive.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path, kind: str) -> dict[str, Any]:
    """Reads a file of :func:`save`; tensors come to the CPU.

    Raises:
        InputError: the file is damaged, of another kind or of another format.
        OSError: it cannot be opened.
    """
    try:
        # torch.load does not compare checksums: a flipped bit would pass for a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: is damaged (checksum of {damaged})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: is damaged or was not written by saml-rec") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path}: is not a {kind} file of saml-rec")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: has format {content['format']}, this version reads format {FORMAT}")
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
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]


def versions() -> dict[str, str]:
    """Versions that the results depend on."""
    return {
        "saml_kernels": saml_kernels.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "polars": polars.__version__,
        "scikit-learn": sklearn.__version__,
    }
