"""Where generated data sets go."""

import os
from pathlib import Path

from saml_rec.errors import InputError


def make_directory(path: str | Path) -> Path:
    """The directory, made where it is missing.

    Raises:
        InputError: it cannot be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make this directory: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no permission to write in this directory")
    return path
