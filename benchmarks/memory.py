"""Peak memory of one training step, measured in a process of its own (Linux).

The resident set's high-water mark is reset after warm-up (/proc/self/clear_refs) and read after one more step; the
resident set before that step, with inputs, parameters and libraries in it and no gradients, is subtracted. The result
counts everything the step holds at its worst moment: what it saves for backward, its temporaries, scratch memory
outside torch's allocator (matrix libraries, kernels), and the gradients.

glibc keeps freed blocks below a threshold that grows at run time, which blurs the mark by tens of MB. The process
therefore runs with a fixed threshold (ENVIRONMENT); its results then agree with the sum over the allocations that
torch.profiler records to 0.3 MB for the eager peers, which allocate through torch alone.

    python benchmarks/memory.py REQUEST     REQUEST as written by request(); prints the bytes
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from contenders import Contender, short
from saml_kernels.testing.problem import make
from workload import Cell

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WARM_UP_STEPS = 2


def unavailable() -> str | None:
    """Why it cannot be measured here; None if it can."""
    return None if os.access("/proc/self/clear_refs", os.W_OK) else "needs Linux's /proc/self/clear_refs"


def request(contender: Contender, cell: Cell, seed: int, threads: int) -> str:
    """What the measuring process has to know, as JSON."""
    fields = asdict(contender)
    fields["dtype"] = short(contender.dtype)
    fields["foreign_dtype"] = short(contender.foreign_dtype) if contender.foreign_dtype else None
    return json.dumps({"contender": fields, "cell": asdict(cell), "seed": seed, "threads": threads})


def peak(contender: Contender, cell: Cell, seed: int) -> dict[str, Any]:
    """``peak_bytes`` from a fresh process; without them ``peak_failure``."""
    if (reason := unavailable()) is not None:
        return {"peak_failure": reason}
    command = [sys.executable, str(Path(__file__).resolve())]
    command.append(request(contender, cell, seed, torch.get_num_threads()))
    process = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if process.returncode == 0:
        return {"peak_bytes": int(process.stdout.split()[-1])}
    return {"peak_failure": (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]}


def measure(text: str) -> int:
    """Bytes, in this process."""
    asked = json.loads(text)
    types = {name: getattr(torch, value) for name, value in asked["contender"].items() if "dtype" in name and value}
    contender = Contender(**asked["contender"] | types)
    cell = Cell(**asked["cell"] | {"hidden_dims": tuple(asked["cell"]["hidden_dims"])})
    torch.set_num_threads(asked["threads"])
    step = make(cell.case(asked["seed"])).to(contender.dtype).leaves().call("step", contender.function())
    for _ in range(WARM_UP_STEPS):
        step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


if __name__ == "__main__":
    print(measure(sys.argv[1]))
