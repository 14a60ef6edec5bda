"""Runs one section in a process of its own, which an error of the device may end; its file grows with what it finds.

python benchmarks/on_gpu/measuring.py REQUEST     REQUEST as JSON, see Request
"""

import faulthandler
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

import torch

import records
from on_gpu import catalogue, processes
from on_gpu.request import Request
from on_gpu.run import Run
from on_gpu.target import Target
from saml_kernels.testing.accuracy import one_line
from trunk import compiled_code_only

SECONDS_BEFORE: Final = 5.0
LEAST_SECONDS: Final = 1.0


def main(request: Request) -> int:
    """0, or 1 after a failure."""
    if request.compiled:
        compiled_code_only()
    if request.dry_run:
        # Tiny shapes gain nothing from threads, and wait long for busy cores.
        torch.set_num_threads(1)
    started = time.monotonic()
    file = Path(request.file)
    part: dict[str, Any] = {"status": "running"}

    def save(found: dict[str, Any]) -> None:
        part.update(found, seconds=round(time.monotonic() - started, 1))
        records.write(file, part)

    save({})
    try:
        run = Run(Target(request.dry_run), request.compiled, request.argument, file.parent)
        catalogue.function(request.section)(run, started + request.seconds, save)
    except Exception as error:
        trace = traceback.format_exc(limit=-4).replace(str(records.HERE), "benchmarks")
        save({"status": "failed", "reason": one_line(error), "trace": trace})
        return 1
    save({"status": "cut short" if time.monotonic() > started + request.seconds else "done"})
    return 0


def say_where(seconds: float) -> None:
    """Prints every thread's place shortly before time is up, for the case that it hangs."""
    faulthandler.dump_traceback_later(max(LEAST_SECONDS, seconds - SECONDS_BEFORE))


if __name__ == "__main__":
    processes.end_with_this_process()
    request = Request(**json.loads(sys.argv[1]))
    say_where(request.seconds)
    sys.exit(main(request))
