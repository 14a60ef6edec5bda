"""Files that are written whole or not at all, and checks of paths before any work is done."""

import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from saml_rec.errors import InputError

STEM = 40
"""Characters of a file's name that the name of its temporary file has: names are 255 bytes long at most."""
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def temporary_path(path: Path) -> Path:
    """Where :func:`replacing` may collect the bytes of ``path``: a hidden file beside it that nobody can foresee."""
    return path.with_name(f".{path.name[:STEM]}.{secrets.token_hex(8)}.tmp")


def leftovers(path: Path) -> list[Path]:
    """Temporary files of ``path`` that a killed process left. The last part of the path may be a pattern."""
    return list(path.parent.glob(f".{path.name[:STEM]}.*.tmp"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file whose content becomes ``path`` when the block ends, and is thrown away when it raises.

    The bytes go to a temporary file in the same directory, reach the disk, and replace ``path`` in one
    step, so a reader sees the old file or the new one, also after a crash or a full disk. A file that is replaced
    leaves its mode to the new one.

    Raises:
        OSError: the directory or the disk refuses the file.
    """
    path = path.resolve()
    temporary = temporary_path(path)
    try:
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
        # What others may not read, they may not read while it is written either.
        with os.fdopen(os.open(temporary, NEW, 0o666 if mode is None else 0o600), "w+b") as file:
            if mode is not None and mode != stat.S_IMODE(temporary.stat().st_mode):
                temporary.chmod(mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # What libraries raise may have a text and no number.
            error.strerror = error.strerror or str(error)
            error.filename, error.filename2 = str(path), None
        raise


def sync_directory(directory: Path) -> None:
    """Makes a rename durable. Directories cannot be opened on Windows, where the rename is already."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(content: Any) -> bytes:
    """Strict JSON (no NaN, no Infinity) in UTF-8. A file name that is not UTF-8 has its bytes as ``\\udcXX``.

    Raises:
        ValueError: ``content`` holds a number that JSON has no notation for.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    # Python's escape of such a byte is JSON's.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_json(path: Path, content: Any) -> None:
    """Writes :func:`json_bytes`, whole or not at all.

    Raises:
        ValueError: ``content`` holds a number that JSON has no notation for.
        OSError: the directory or the disk refuses the file.
    """
    written = json_bytes(content)
    with replacing(path) as file:
        file.write(written)


def require_regular(path: Path) -> None:
    """Refuses what can be read only once, or never ends, before it is opened. Nothing there is no matter.

    Raises:
        InputError: the path is a named pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if kind := KINDS.get(stat.S_IFMT(mode)):
        raise InputError(f"{path}: is {kind}; expected a regular file")


def require_text_name(path: Path) -> None:
    """Refuses a name that only Python could open: polars takes text.

    Raises:
        InputError: the name has bytes that are no text in the encoding of the system's file names.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        hint = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1, or rename it"
        raise InputError(f"{path}: this name is not {encoding}, the encoding of file names here; {hint}") from None


def check_output_file(path: Path) -> None:
    """Refuses a path that a file could not be written to, before the work that makes its content.

    Raises:
        InputError: its directory is missing or not writable, or the path is no regular file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file")
    try:
        directory = path.resolve().parent
    except RuntimeError:
        raise InputError(f"{path}: is a symbolic link to itself") from None
    if not directory.is_dir():
        raise InputError(f"{path}: the directory {directory} does not exist")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no permission to write in {directory}")
