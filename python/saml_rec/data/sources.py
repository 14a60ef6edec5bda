"""What ``--data`` names: one file, several, a folder or a pattern; CSV or Parquet, CSV also as .gz or .zst."""

import glob
import gzip
import io
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from saml_rec.errors import InputError

PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
NOT_A_TABLE = (  # how other files begin that are easily mistaken for a table
    (b"PK\x03\x04", "is a zip archive or an Excel workbook"),
    (b"\xff\xfe", "is UTF-16 text"),
    (b"\xfe\xff", "is UTF-16 text"),
)
ENDINGS = (".csv", ".parquet", ".csv.gz", ".csv.zst")
"""Of the files of a folder that are read."""
HEAD_BYTES = 8192
PATTERN = frozenset("*?[")
DAMAGED = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What reading a file raises that is gone, or compressed and damaged or cut short."""

Paths = str | Path | Iterable[str | Path]
"""Of a table: one file, folder or pattern, or several."""


def table_files(paths: Paths) -> tuple[Path, ...]:
    """The files that hold a table, in the order of their rows.

    Args:
        paths: each a file; a folder, whose files ending in ENDINGS are read in order of their names; or a pattern
            such as ``clicks/2024-*.parquet`` where no file has that name.

    Raises:
        InputError: nothing is there, a folder or a pattern has no file, or a file is named twice.
    """
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for path in named for file in _files_of(Path(path))]
    if not files:
        raise InputError("no data: expected a file, a folder or a pattern")
    known: set[Path] = set()
    for file in files:
        if (resolved := file.resolve()) in known:
            raise InputError(f"{file} is named twice")
        known.add(resolved)
    return tuple(files)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and not _is_hidden(file))
        if not found:
            raise InputError(f"{path}: this directory has no files that end in {', '.join(ENDINGS)}")
        return found
    if not path.exists() and PATTERN & set(str(path)):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        found = [file for file in found if file.is_file()]
        if not found:
            raise InputError(f"{path}: no file matches this pattern")
        return found
    return [path]


def _is_hidden(file: Path) -> bool:
    """Also what distributed writers leave beside their parts."""
    return file.name.startswith((".", "_"))


def named(paths: Paths) -> str:
    """The paths as a message names them."""
    return ", ".join(str(path) for path in ([paths] if isinstance(paths, str | Path) else paths))


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed where they are gzip or zstd."""
    file = path.open("rb")
    head = file.read(len(ZSTD_MAGIC))
    file.seek(0)
    if head.startswith(GZIP_MAGIC):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if head.startswith(ZSTD_MAGIC):
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream)))
    return file


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(ZSTD_MAGIC)).startswith((GZIP_MAGIC, ZSTD_MAGIC))


def is_parquet(path: Path) -> bool:
    """Whether the file is Parquet, by its first bytes; InputError where it is neither that nor text."""
    try:
        with open_bytes(path) as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; expected one CSV or Parquet file") from None
    except DAMAGED as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if head.startswith(PARQUET_MAGIC):
        if is_compressed(path):
            raise InputError(f"{path} is compressed Parquet; expected Parquet as it is, which compresses its columns")
        return True
    expected = "expected CSV (UTF-8 text), also as .gz or .zst, or Parquet"
    for magic, what in NOT_A_TABLE:
        if head.startswith(magic):
            raise InputError(f"{path} {what}; {expected}")
    if b"\0" in head:
        raise InputError(f"{path} is a binary file; {expected}")
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise InputError(f"{path} is an HTML or XML page; {expected}")
    text = head.removeprefix(b"\xef\xbb\xbf")
    if not text.strip() and len(head) < HEAD_BYTES:
        raise InputError(f"{path} is empty")
    if text.startswith((b"\n", b"\r")):
        raise InputError(f"{path} begins with an empty line; expected the names of the columns")
    return False
