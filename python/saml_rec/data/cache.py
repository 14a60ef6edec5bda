"""Encoded tables that are kept on disk between runs, by what they were made of.

    DIR/encoded/KEY/            meta.json and the files of :mod:`saml_rec.data.stored`
    DIR/encoded/KEY.lock        held by the process that makes them
    DIR/encoded/KEY.tmp/        what it has so far

KEY is a digest of the files' bytes, the schema, what was said of CSV, and the seed of a random split. A directory by
the name KEY is whole: it was renamed when it was. What a killed process left is removed by the next that makes the
same.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs

from saml_rec.data.csv_format import CsvOptions
from saml_rec.data.schema import Schema
from saml_rec.data.sources import HEAD_BYTES
from saml_rec.errors import InputError
from saml_rec.files import sync_directory, write_json

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None

FORMAT = 2
CACHE_VARIABLE = "SAML_REC_CACHE"
META = "meta.json"
BLOCK_BYTES = 128 * HEAD_BYTES


def cache_directory(given: str | Path | None = None) -> Path:
    """Where data are kept between runs: ``given``, what SAML_REC_CACHE says, or the user's cache directory."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("saml-rec"))


def key_of(files: tuple[Path, ...], schema: Schema, seed: int, csv: CsvOptions) -> str:
    """The name of what is made of the files, 32 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    at_random = schema.time is None and schema.split_column is None
    made_of = {"format": FORMAT, "schema": schema.to_dict(), "seed": seed if at_random else None}
    made_of["csv"] = csv.to_dict()
    made_of["files"] = [_digest(file) for file in files]
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class Cache:
    """One directory of encoded tables.

    Args:
        directory: as :func:`cache_directory` gives it.
        key: as :func:`key_of` gives it.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.root = directory / "encoded"
        self.path = self.root / key

    def meta(self) -> dict[str, Any] | None:
        """What :meth:`make` wrote, if it is there and no file is missing or cut short."""
        try:
            meta: dict[str, Any] = json.loads((self.path / META).read_text(encoding="utf-8"))
            files = [
                file
                for table in meta["tables"].values()
                for shard in table["shards"]
                for file in shard["files"].items()
            ]
            is_whole = all((self.path / name).stat().st_size == size for name, size in files)
        except (OSError, ValueError, KeyError):
            return None
        return meta if is_whole else None

    def make(self, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """What is there, or else what ``write`` makes, given an empty directory: its files and their meta.

        Of several processes that want the same, one makes it and the others wait.

        Raises:
            InputError: the directory cannot be written to.
            OSError: the disk refuses the files.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.root}: cannot make the cache there: {error.strerror}; see --cache") from None
        with self._held():
            if (meta := self.meta()) is not None:
                return meta
            shutil.rmtree(self.path, ignore_errors=True)
            unfinished = self.path.with_name(f"{self.path.name}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                meta = write(unfinished)
                write_json(unfinished / META, meta)
                unfinished.rename(self.path)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            sync_directory(self.root)
            return meta

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Until the block ends, or the process does, however that ends. Windows has no such lock."""
        with self.path.with_name(f"{self.path.name}.lock").open("wb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
