"""Where a run measures: a GPU with its events and graphs, or, in a dry run, the CPU in its place."""

import gc
import subprocess
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cells import Host
from contenders import Contender
from saml_kernels.backends.triton import availability
from saml_kernels.testing import timing
from saml_kernels.testing.problem import Call
from workload import Cell

CACHE_FACTOR = 2.5
"""Calls take turns over as many copies of their inputs as exceed the last-level cache this many times."""
MAX_COPIES = 8


@dataclass(frozen=True)
class Target(Host):
    """The device, its clock, and which backend stands for the kernels there."""

    dry_run: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def clock(self) -> timing.Clock:
        return timing.clock_of(torch.device(self.device))

    @property
    def ours(self) -> str:
        """The backend under measurement; in a dry run the reference, or the kernels in Triton's interpreter."""
        return "reference" if self.dry_run and not availability.INTERPRETED else "triton"

    @property
    def schedules(self) -> tuple[str, ...]:
        """Of the forward, by name; only the kernels have them."""
        return ("persistent", "per_layer") if self.ours == "triton" else ()

    @property
    def dtype(self) -> torch.dtype:
        """What is measured most. In a dry run the one whose bounds tiny shapes do not blur."""
        return torch.float32 if self.dry_run else torch.bfloat16

    def lacks(self, contender: Contender) -> str | None:
        """As Host's; every GPU that the kernels run on multiplies bfloat16."""
        return None

    def unavailable(self) -> str | None:
        """Why nothing can be measured here; None if it can."""
        if self.dry_run or torch.cuda.is_available():
            return None
        return "torch sees no GPU; --dry-run goes through the motions on the CPU"

    def facts(self) -> dict[str, Any]:
        """Of the device: what a figure depends on."""
        if self.dry_run:
            return {"name": "dry run on a CPU: not a GPU"}
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
            "driver": _driver(),
        }

    def synchronize(self) -> None:
        """Waits for everything that was asked of the device."""
        if not self.dry_run:
            torch.cuda.synchronize()

    @cached_property
    def _stream(self) -> Any:
        # Blocks of a pool belong to a stream: graphs that share one must share the other.
        return torch.cuda.Stream()

    def graph_pool(self) -> Any:
        return None if self.dry_run else torch.cuda.graph_pool_handle()

    def capture(self, call: Call, pool: Any, warm_ups: int) -> tuple[Any, Any]:
        if self.dry_run:
            return super().capture(call, pool, warm_ups)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            results = call()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, results

    def copies(self, bytes_: int) -> int:
        if self.dry_run:
            return 2
        cache: int = torch.cuda.get_device_properties(0).L2_cache_size
        return min(MAX_COPIES, max(1, -(-int(CACHE_FACTOR * cache) // bytes_)))

    def free_bytes(self) -> int | None:
        """Torch's idle blocks included; None in a dry run."""
        if self.dry_run:
            return None
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + idle

    def peak_bytes(self, contender: Contender, cell: Cell, step: Call) -> dict[str, Any]:
        """The most that torch's allocator held during a step, above what it held before; nothing in a dry run."""
        if self.dry_run:
            return {}
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before}

    def collect(self) -> None:
        gc.collect()
        if not self.dry_run:
            torch.cuda.empty_cache()


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None
