"""Files that are written whole or not at all, and checks of an output path before any work is done."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from saml_rec.errors import InputError


def temporary_path(path: Path) -> Path:
    """Where :func:`replacing` collects the bytes of ``path``: a hidden file of this process beside it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file whose content becomes ``path`` when the block ends, and is thrown away when it raises.

    The bytes go to a temporary file in the same directory, reach the disk, and replace ``path`` in one
    step, so a reader sees the old file or the new one, also after a crash or a full disk.

    Raises:
        OSError: the directory or the disk refuses the file.
    """
    path = path.resolve()
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes a rename durable. Directories cannot be opened on Windows, where the rename is already."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON (no NaN, no Infinity), whole or not at all.

    Raises:
        ValueError: ``content`` holds a number that JSON has no notation for.
        OSError: the directory or the disk refuses the file.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def check_output_file(path: Path) -> None:
    """Refuses a path that a file could not be written to, before the work that makes its content.

    Raises:
        InputError: its directory is missing or not writable, or the path is no regular file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file")
    directory = path.resolve().parent
    if not directory.is_dir():
        raise InputError(f"{path}: the directory {directory} does not exist")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no permission to write in {directory}")
