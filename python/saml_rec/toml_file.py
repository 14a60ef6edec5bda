"""TOML as users write it: a schema, or options for ``--config``."""

import tomllib
from pathlib import Path
from typing import Any

from saml_rec.errors import InputError, shortened
from saml_rec.files import require_regular


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file (UTF-8, with or without a byte-order mark).

    The bytes are decoded as they are: read as text, a carriage return alone, which TOML refuses, would be a line's end.

    Args:
        path: the file.
        what: what it should be, for messages: ``"schema file"``.

    Raises:
        InputError: the file cannot be read, or is not TOML; names the file.
    """
    require_regular(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory; expected a {what} (TOML)") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); expected a {what} (TOML)") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError(f"{path} is not a {what}: its values are nested too deeply") from None
    except ValueError as error:
        # Besides TOMLDecodeError that of an integer of thousands of digits.
        raise InputError(f"{path} is not valid TOML: {shortened(' '.join(str(error).split()))}") from None
