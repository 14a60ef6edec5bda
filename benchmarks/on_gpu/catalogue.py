"""Every section, in the order in which they run, and the commands that run several."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from on_gpu import checks, launch_times, sections, smoke, trials, tune
from on_gpu.run import Run, Save

Function = Callable[[Run, float, Save], None]
"""Fills its part of the record until a deadline (time.monotonic)."""
DEBUG_WAITS: Final = "SAML_KERNELS_DEBUG_WAITS"
"""Bounds every wait within a kernel, which then says what it waited for: for what checks, not for what is timed."""
POLLS: Final = "20000000"


@dataclass(frozen=True)
class Section:
    """One section of a record, in a process of its own."""

    function: Function
    weight: float
    """Its share of the time that is left when it starts."""
    check: bool = False
    """It finds out whether results are right; nothing is timed."""
    beside: bool = False
    """It runs at the same time as its neighbours of that kind."""

    def environment(self) -> dict[str, str | None]:
        """Of its process."""
        return {DEBUG_WAITS: POLLS if self.check else None}


SECTIONS: Final[Mapping[str, Section]] = {
    "smoke": Section(smoke.smoke, 60, check=True),
    "tests": Section(checks.tests, 150, check=True, beside=True),
    "sanitize": Section(checks.sanitize, 150, check=True, beside=True),
    "launches_timed": Section(launch_times.launches_timed, 150),
    "tune": Section(tune.tune, 130),
    "ceilings": Section(sections.ceilings, 8),
    "headline": Section(sections.headline, 105),
    "stages": Section(sections.stages, 45),
    "launches": Section(sections.launches, 15),
    "grid": Section(sections.grid, 100),
    "backward": Section(sections.backward, 12),
    "foreign": Section(sections.foreign, 15),
    "precision": Section(sections.precision, 15),
}
CHECKS: Final = tuple(name for name, section in SECTIONS.items() if section.check)
TUNING: Final = ("launches_timed", "tune")
MEASURED: Final = tuple(name for name in SECTIONS if name not in (*CHECKS, *TUNING))
"""What floors and figures are made from: with all of it a record is complete."""
COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {"check": CHECKS, "tune": TUNING, "measure": MEASURED}
"""The first day on a GPU, in order."""
COMPILING: Final = ("headline", "grid")
"""Sections with peers under torch.compile."""
PIECES: Final[Mapping[str, Function]] = {
    "form": smoke.form,
    "repeated": smoke.repeated,
    "trial": trials.trial,
    "warm": sections.warm,
}
"""Parts of sections that run in processes of their own."""


def function(name: str) -> Function:
    """Of a section or a piece."""
    return PIECES[name] if name in PIECES else SECTIONS[name].function
