"""Runs sections in a process of their own, which an error of the device may end, and writes what they found to a file.

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


@dataclass(frozen=True)
class Request:
    """What the measuring process has to know."""

    file: str
    sections: list[str]
    seconds: float
    """For all of them; each gets its share by weight of what is left when it starts."""
    dry_run: bool
    compiled: bool
    warm_peer: str | None = None

    def command(self) -> list[str]:
        """Of the process."""
        return [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(self))]


def limit(name: str, later: list[str], seconds: float) -> float:
    """Seconds of section ``name``, of those left for it and the ``later`` ones."""
    weights = [SECTIONS[section][1] for section in (name, *later)]
    return seconds * weights[0] / sum(weights) if sum(weights) else seconds


def main(request: Request) -> int:
    """0, or 1 after a section's failure; the rest is then for a fresh process."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    if request.dry_run:
        # Tiny shapes gain nothing from threads, and wait long for busy cores.
        torch.set_num_threads(1)
    run = Run(Target(request.dry_run), request.compiled, request.warm_peer)
    end = time.monotonic() + request.seconds
    parts: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(request.sections):
        started = time.monotonic()
        seconds = limit(name, request.sections[index + 1 :], end - started)
        part: dict[str, Any] = {"status": "running", "limit_seconds": round(seconds, 1)}

        def save(found: dict[str, Any], name: str = name, part: dict[str, Any] = part, begun: float = started) -> None:
            parts[name] = part | found | {"seconds": round(time.monotonic() - begun, 1)}
            records.write(Path(request.file), parts)

        save({})
        try:
            torch.compiler.reset()
            SECTIONS[name][0](run, started + seconds, save)
            cut = time.monotonic() > started + seconds
            save(parts[name] | {"status": "cut short" if cut else "done"})
        except Exception as error:
            lines = str(error).splitlines() or ["no message"]
            trace = traceback.format_exc(limit=-4).replace(str(records.HERE), "benchmarks")
            save(parts[name] | {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}", "trace": trace})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Request(**json.loads(sys.argv[1]))))
