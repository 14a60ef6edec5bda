"""Files that are read back, with a digest of their content that is checked before any of it is used.

Tensors    a zip archive as torch.save writes it, whose comment is MARK and the SHA-256 of all bytes before the comment.
           torch.load and zip programs read it as any other.
JSON       an object whose key "checksum" is the SHA-256 of the others, as JSON with sorted keys

Weights    also as safetensors, for other programs: whoever writes them keeps the SHA-256 of the file elsewhere

Archives hold tensors and plain values only and are read with ``weights_only=True``: opening one never executes code
from it. Files of versions that wrote no digest are read with what checks their formats allow.
"""

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from saml_rec.errors import InputError, is_out_of_memory, memory_for, shortened, shown
from saml_rec.files import json_bytes, replacing, require_regular, write_json

FORMAT = 2
UNSEALED_FORMAT = 1
"""Of version 0.1, whose archives have no digest."""
MARK = b"saml-rec sha256 "
SEAL_BYTES = len(MARK) + 2 * hashlib.sha256().digest_size
BLOCK_BYTES = 2**20
CHECKSUM = "checksum"


def save(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes tensors and plain values with their digest, whole or not at all.

    Args:
        path: the file.
        kind: what it holds, "checkpoint" or "model"; :func:`load` asks for the same.
        content: what :func:`torch.load` reads with ``weights_only=True``.

    Raises:
        InputError: a number in a tensor is not finite.
        OSError: the directory or the disk refuses the file.
    """
    if (name := not_finite(content)) is not None:
        raise InputError(f"{path}: not written, {shortened(name)} has numbers that are not finite")
    with replacing(path) as file:
        try:
            torch.save({"kind": kind, "format": FORMAT, **content}, file)
        except RuntimeError as error:
            # A write that fails makes torch fail once more, when it closes the archive.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        # An archive ends with the length of its comment.
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", SEAL_BYTES))
        length = file.tell()
        file.seek(0)
        digest = _digest(file, length)
        file.write(MARK + digest.encode("ascii"))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes tensors as safetensors, whole or not at all.

    Args:
        path: the file.
        tensors: by name.
        metadata: of the file's header.

    Returns:
        The SHA-256 of the file, for :func:`require_digest`.

    Raises:
        InputError: a number in a tensor is not finite.
        OSError: the directory or the disk refuses the file.
    """
    if (name := not_finite(tensors)) is not None:
        raise InputError(f"{path}: not written, {shortened(name)} has numbers that are not finite")
    written = safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}, dict(metadata))
    with replacing(path) as file:
        file.write(written)
    return hashlib.sha256(written).hexdigest()


def require_digest(path: Path, digest: str | None) -> None:
    """Refuses a file that is not as it was written; one that is missing, or whose digest nobody kept, passes.

    Raises:
        InputError: the file is damaged.
        OSError: it cannot be opened.
    """
    require_regular(path)
    if digest is None or not path.exists():
        return
    with path.open("rb") as file:
        if _digest(file, path.stat().st_size) != digest:
            raise InputError(f"{path}: is damaged: it is not as it was written")


def load(path: Path, kind: str) -> dict[str, Any]:
    """Reads a file of :func:`save`; tensors come to the CPU.

    Raises:
        InputError: the file is damaged, of another kind or of another format, or a number in it is not finite.
        OSError: it cannot be opened or read.
    """
    require_regular(path)
    with path.open("rb") as file:
        is_sealed = _require_whole(path, file)
        with memory_for(f"reading {path}"):
            content = _read(path, file if is_sealed else io.BytesIO(file.read()), is_sealed)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path}: is not a {kind} file of saml-rec")
    found = content.get("format")
    if type(found) is not int or found not in (FORMAT, UNSEALED_FORMAT):
        raise InputError(f"{path}: has format {shown(found)}, this version reads format {UNSEALED_FORMAT} and {FORMAT}")
    if is_sealed != (found == FORMAT):
        raise InputError(f"{path}: is damaged: it has no checksum at its end")
    if (name := not_finite(content)) is not None:
        raise InputError(f"{path}: {shortened(name)} has numbers that are not finite")
    return content


def _require_whole(path: Path, file: BinaryIO) -> bool:
    """Whether the file has a digest; InputError where it is not that of the content."""
    length = file.seek(0, os.SEEK_END) - SEAL_BYTES
    file.seek(max(length, 0))
    seal = file.read()
    file.seek(0)
    if not seal.startswith(MARK):
        return False
    if seal != MARK + _digest(file, length).encode("ascii"):
        raise InputError(f"{path}: is damaged: its checksum is not that of its content")
    return True


def _digest(file: BinaryIO, length: int) -> str:
    """Of so many bytes from here on."""
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(BLOCK_BYTES, length))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def _read(path: Path, file: BinaryIO, is_sealed: bool) -> Any:
    """The content of an archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            _require_plain(path, archive, file.seek(0, os.SEEK_END))
            if not is_sealed:
                # torch compares no checksums and little of the directory. It gets what zipfile has compared all of.
                file = io.BytesIO()
                with zipfile.ZipFile(file, "w") as checked:
                    for name in dict.fromkeys(archive.namelist()):
                        checked.writestr(name, archive.read(name))
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever bytes of another origin make the two libraries raise.
        if isinstance(error, InputError | OSError) or is_out_of_memory(error):
            raise
        raise InputError(f"{path}: is damaged or was not written by saml-rec") from error


def _require_plain(path: Path, archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Refuses an archive that would grow when it is unpacked: torch compresses nothing."""
    total = 0
    for entry in archive.infolist():
        total += entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or total > file_bytes:
            raise InputError(
                f"{path}: is damaged or was not written by saml-rec: in {file_bytes:,} bytes its part "
                f"{shown(entry.filename)} would have {shown(entry.file_size)}"
            )


def not_finite(content: Any) -> str | None:
    """The dotted name of the first tensor in nested values that holds NaN or infinity; None where none does."""
    return first_tensor(content, lambda tensor: tensor.is_floating_point() and not bool(tensor.isfinite().all()))


def first_tensor(content: Any, is_sought: Callable[[Tensor], bool] = lambda _: True, name: str = "") -> str | None:
    """The dotted name of the first tensor in nested values that is sought; None where none is."""
    if isinstance(content, Tensor):
        return name if is_sought(content) else None
    if isinstance(content, Mapping):
        parts: Any = content.items()
    elif isinstance(content, list | tuple):
        parts = enumerate(content)
    else:
        return None
    found = (first_tensor(part, is_sought, f"{name}.{key}" if name else str(key)) for key, part in parts)
    return next((each for each in found if each is not None), None)


@contextmanager
def content_of(path: Path) -> Iterator[None]:
    """What a block takes from a file and cannot use is an error of that file.

    Raises:
        InputError: with the file and what the block raised, lack of memory excepted.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from error
        # torch lists all that is wrong with tensors, below a line that says so.
        reason = str(error).partition(":\n\t")[2] or str(error)
        raise InputError(
            f"{path}: its parts do not fit together: {type(error).__name__}: {shortened(' '.join(reason.split()))}"
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: the file is damaged.
        OSError: it cannot be opened.
    """
    require_regular(path)
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged: {shortened(str(error))}") from error


def read_as_written(path: Path, digest: str | None) -> Any:
    """The content of a JSON file whose bytes have a known digest.

    Args:
        path: the file.
        digest: as :func:`json_digest` gave it; None where nobody kept it.

    Raises:
        InputError: the file is damaged.
        OSError: it cannot be opened.
    """
    require_regular(path)
    content = path.read_bytes()
    if digest not in (None, hashlib.sha256(content).hexdigest()):
        raise InputError(f"{path}: is damaged: it is not as it was written")
    return _parsed(path, content)


def json_digest(content: Any) -> str:
    """Of what :func:`saml_rec.files.write_json` writes for it."""
    return hashlib.sha256(json_bytes(content)).hexdigest()


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as strict JSON with its checksum, whole or not at all.

    Raises:
        ValueError: ``content`` holds a number that JSON has no notation for.
        OSError: the directory or the disk refuses the file.
    """
    write_json(path, {**content, CHECKSUM: _checksum(content)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The content of :func:`write_sealed_json`.

    Raises:
        InputError: the file is damaged, or holds no object with a checksum.
        OSError: it cannot be opened.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: is damaged or was not written by saml-rec: expected an object")
    if CHECKSUM not in content:
        raise InputError(f"{path}: is damaged or was not written by saml-rec: it has no {CHECKSUM}")
    if content.pop(CHECKSUM) != _checksum(content):
        raise InputError(f"{path}: is damaged: its checksum is not that of its content")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
