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

import torch

import workload
from contenders import Contender, short, step_call
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


def peak_bytes(contender: Contender, cell: Cell, seed: int, threads: int) -> int:
    """Measured in a fresh process. Raises subprocess.CalledProcessError, with its stderr, where that one fails."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), request(contender, cell, seed, threads)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout.split()[-1])


def measure(text: str) -> int:
    """Bytes, in this process."""
    asked = json.loads(text)
    fields = asked["contender"]
    contender = Contender(
        fields["implementation"],
        fields["compiled"],
        getattr(torch, fields["dtype"]),
        getattr(torch, fields["foreign_dtype"]) if fields["foreign_dtype"] else None,
        fields["schedule"],
    )
    cell = Cell(**asked["cell"] | {"hidden_dims": tuple(asked["cell"]["hidden_dims"])})
    torch.set_num_threads(asked["threads"])
    problem = workload.make(cell, asked["seed"], avoid_kinks=False).to(contender.dtype)
    step = step_call(contender.function(), problem)
    for _ in range(WARM_UP_STEPS):
        step()
    for _, tensor in problem.named():
        tensor.grad = None
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
