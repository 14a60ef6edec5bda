"""Peak memory of one training step, measured in a process of its own (Linux).

The resident set's high-water mark is reset after warm-up (/proc/self/clear_refs) and read after two more steps; the
resident set before these, with inputs, parameters and libraries in it, no gradients and nothing that kernels keep
between steps, is subtracted. The result counts everything a step holds at its worst moment: what it saves for
backward, its temporaries, scratch memory outside torch's allocator (matrix libraries, kernels), the gradients, and
what the step before it left.

glibc keeps freed blocks below a threshold that grows at run time, which blurs the mark by tens of MB. The process
therefore runs with a fixed threshold (ENVIRONMENT); its results then agree with the sum over the allocations that
torch.profiler records to 0.3 MB for the eager peers, which allocate through torch alone.
"""

import ctypes
import gc
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from contenders import Contender
from saml_kernels import release_memory
from saml_kernels.testing.accuracy import one_line
from saml_kernels.testing.problem import make
from workload import Cell

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WARM_UP_STEPS = 2
MEASURED_STEPS = 2


def unavailable() -> str | None:
    """Why it cannot be measured here; None if it can."""
    return None if os.access("/proc/self/clear_refs", os.W_OK) else "needs Linux's /proc/self/clear_refs"


def peak(contender: Contender, cell: Cell, seed: int) -> dict[str, Any]:
    """``peak_bytes`` from a fresh process; without them ``peak_failure``."""
    if (reason := unavailable()) is not None:
        return {"peak_failure": reason}
    # The allocator reads the environment when the process starts.
    with patch.dict(os.environ, ENVIRONMENT), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return {"peak_bytes": pool.submit(measure, contender, cell, seed, torch.get_num_threads()).result()}
        except Exception as error:  # Out of memory has many faces, one of them a killed process.
            return {"peak_failure": one_line(error)}


def measure(contender: Contender, cell: Cell, seed: int, threads: int) -> int:
    """Bytes, in this process."""
    torch.set_num_threads(threads)
    step = make(cell.case(seed)).to(contender.dtype).leaves().call("step", contender.function())
    for _ in range(WARM_UP_STEPS):
        step()
    gc.collect()
    release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(MEASURED_STEPS):
        step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024
