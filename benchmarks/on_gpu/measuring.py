"""Runs one section in a process of its own, which an error of the device may end; its file grows with what it finds.

python benchmarks/on_gpu/measuring.py REQUEST     REQUEST as JSON, see Request
"""

import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import records
from on_gpu.sections import SECTIONS, Run
from on_gpu.target import Target
from saml_kernels.testing.accuracy import one_line
from trunk import compiled_code_only


@dataclass(frozen=True)
class Request:
    """What the measuring process has to know."""

    file: str
    section: str
    seconds: float
    """After which it begins nothing new."""
    dry_run: bool
    compiled: bool
    """Peers under torch.compile take part."""
    warm_peer: str | None = None

    def command(self) -> list[str]:
        """Of the process."""
        return [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(self))]


def main(request: Request) -> int:
    """0, or 1 after a failure."""
    compiled_code_only()
    if request.dry_run:
        # Tiny shapes gain nothing from threads, and wait long for busy cores.
        torch.set_num_threads(1)
    started = time.monotonic()
    part: dict[str, Any] = {"status": "running"}

    def save(found: dict[str, Any]) -> None:
        part.update(found, seconds=round(time.monotonic() - started, 1))
        records.write(Path(request.file), part)

    save({})
    try:
        run = Run(Target(request.dry_run), request.compiled, request.warm_peer)
        SECTIONS[request.section][0](run, started + request.seconds, save)
    except Exception as error:
        trace = traceback.format_exc(limit=-4).replace(str(records.HERE), "benchmarks")
        save({"status": "failed", "reason": one_line(error), "trace": trace})
        return 1
    save({"status": "cut short" if time.monotonic() > started + request.seconds else "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main(Request(**json.loads(sys.argv[1]))))
