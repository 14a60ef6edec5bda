"""The processes of a training job that torchrun started, and what they do together; one process without it.

All of them call the same functions in the same order. The first one prints and writes.
"""

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saml_rec.console import LOGGER
from saml_rec.errors import InputError

Result = TypeVar("Result")

PATIENCE = timedelta(days=1)
"""How long the others wait for one: encoding a large file takes hours. Who ends shows at once."""
COUNT_VARIABLE = "WORLD_SIZE"
OTHERS_STATUS = 3
"""Exit status of a process that ends because another one did."""
OTHERS_SECONDS = 5
SAID = "said why"
_ENDING = threading.Lock()


@dataclass(frozen=True)
class Processes:
    """The processes of a job, seen from one of them.

    Args:
        rank: of this process, from 0.
        count: of all.
        local_rank: of this process on its machine.
        machine_count: of those on its machine.
        before: process ids of those on its machine that have a lower rank.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    machine_count: int = 1
    before: tuple[int, ...] = ()

    @property
    def is_first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.count > 1

    def wait(self) -> None:
        """Until all are here."""
        if self.are_several:
            dist.barrier()

    def in_turn(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives, done on every machine by one process first, which may leave files for the others."""
        result = work() if self.local_rank == 0 else None
        self.wait()
        return work() if result is None else result

    def sum(self, values: Tensor) -> Tensor:
        """Over processes, in all of them."""
        if self.are_several:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """What the first one has, in all of them."""
        if not self.are_several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def interleaved(self, own: Tensor, rows: int) -> Tensor:
        """Of rows whose position modulo ``count`` is the rank, ``own`` (n, ...) → all of them in order, (rows, ...)."""
        if not self.are_several:
            return own
        most = -(-rows // self.count)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:rows]

    def to_first(self, shard: Tensor, rows: int) -> Tensor:
        """Of ``rows`` rows in shards of ⌈rows / count⌉, the last ones shorter: all in the first process, else none."""
        if not self.are_several:
            return shard
        most = -(-rows // self.count)
        padded = shard.new_zeros(most, *shard.shape[1:])
        padded[: len(shard)] = shard
        parts = [torch.empty_like(padded) for _ in range(self.count)] if self.is_first else None
        dist.gather(padded, parts, dst=0)
        return shard.new_empty(0, *shard.shape[1:]) if parts is None else torch.cat(parts)[:rows]

    def fill_from_first(self, shard: Tensor, whole: Tensor) -> None:
        """The inverse of :meth:`to_first`: ``whole`` is read in the first process only."""
        if not self.are_several:
            shard.copy_(whole)
            return
        rows = torch.tensor([len(whole)])
        dist.broadcast(rows, src=0)
        most = -(-int(rows) // self.count)
        mine = shard.new_zeros(most, *shard.shape[1:])
        parts = None
        if self.is_first:
            padded = shard.new_zeros(most * self.count, *shard.shape[1:])
            padded[: len(whole)] = whole
            parts = list(padded.split(most))
        dist.scatter(mine, parts, src=0)
        shard.copy_(mine[: len(shard)])


ALONE = Processes()


def are_launched() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get(COUNT_VARIABLE, "1")) > 1


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The job's processes while the block runs; one alone unless torchrun started several.

    They speak by gloo, and by NCCL about tensors on GPUs.

    Raises:
        InputError: the launcher did not say what torchrun says.
    """
    if not are_launched():
        yield ALONE
        return
    try:
        names = ("RANK", COUNT_VARIABLE, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, count, local_rank, machine_count = (int(os.environ[name]) for name in names)
        processes = Processes(rank, count, local_rank, machine_count)
    except (KeyError, ValueError) as error:
        raise InputError(f"{COUNT_VARIABLE} is set, but not {error}; start several processes with torchrun") from None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=count)
    pids: list[Any] = [None] * processes.count
    dist.all_gather_object(pids, (platform.node(), os.getpid()))
    before = tuple(pid for machine, pid in pids[: processes.rank] if machine == platform.node())
    processes = replace(processes, before=before)
    # Heard by a thread of its own: the main thread may be deep in waiting for a process that is gone.
    heard, told = os.pipe()
    # Lines of the others are those of the first.
    LOGGER.disabled = not processes.is_first
    os.set_blocking(told, False)
    threading.Thread(target=_end_on_signal, args=(heard, processes, store), name="signals", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield processes
    except InputError:
        if processes.is_first:
            store.set(SAID, "1")
        else:
            # The first one finds the same, and torchrun ends the others.
            time.sleep(OTHERS_SECONDS)
        raise
    except RuntimeError as error:
        if _is_about_others(error):
            _end(processes, store)
        raise
    dist.destroy_process_group()


def _end_on_signal(heard: int, processes: Processes, store: Any) -> None:
    """torchrun ends all processes when one has failed. ``heard`` gives the number of every signal, as a byte."""
    while os.read(heard, 1) != bytes([signal.SIGTERM]):
        pass
    _end(processes, store)


def _end(processes: Processes, store: Any) -> None:
    """Ends this process at once; with a line, from the first on the machine that still runs, unless one said why."""
    with _ENDING:
        if not _is_said(store) and not any(_runs(pid) for pid in processes.before):
            print(
                f"error: process {processes.rank} of {processes.count}: another process of the job failed or was "
                "ended; start the job again with --resume, with as many processes or another number of them",
                file=sys.stderr,
                flush=True,
            )
        # To leave in order, all processes would have to.
        os._exit(OTHERS_STATUS)


def _is_said(store: Any) -> bool:
    """Whether the first process has said why; not known where the store ended with its machine."""
    try:
        return bool(store.check([SAID]))
    except RuntimeError:
        return False


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _is_about_others(error: BaseException) -> bool:
    """Whether an exception says that another process of the job is gone."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "connection closed by peer", "connection reset", "nccl", "processgroup")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
