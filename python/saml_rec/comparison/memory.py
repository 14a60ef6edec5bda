"""The most memory a piece of work held."""

from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


class PeakMemory:
    """A block of work; afterwards ``peak_bytes`` says the most it held.

    On a GPU the bytes torch had allocated there; otherwise the resident set of the whole process, libraries and data
    included. None where the system does not tell: outside Linux, or where the peak may not be reset.

    Args:
        device: where the work runs, as :class:`torch.device` takes it.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.peak_bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._known = True
        else:
            self._known = _reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._known:
            lines = STATUS.read_text(encoding="ascii").splitlines()
            self.peak_bytes = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _reset() -> bool:
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True
