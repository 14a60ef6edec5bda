"""What a process that runs a section is told."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

PROGRAM: Final = Path(__file__).resolve().with_name("measuring.py")


@dataclass(frozen=True)
class Request:
    """What the measuring process has to know."""

    file: str
    """Where its part of the record goes."""
    section: str
    seconds: float
    """After which it begins nothing new."""
    dry_run: bool
    compiled: bool
    """Peers under torch.compile take part."""
    argument: dict[str, Any] = field(default_factory=dict)
    """Which piece of its work, for a section that is made for pieces: see catalogue.PIECES."""

    def command(self) -> list[str]:
        """Of the process."""
        return [sys.executable, str(PROGRAM), json.dumps(asdict(self))]
