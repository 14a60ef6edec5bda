"""The floors a run is held to, and whether they hold. Pure arithmetic on a record."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from contenders import PASSES
from on_gpu import roofline
from on_gpu.cells import GRAPH
from workload import Cell

Record = dict[str, Any]
FORWARD_AND_STEP = dict(zip(PASSES, (1.3, 1.6), strict=True))
INT8 = dict(zip(PASSES, (1.8, 2.1), strict=True))
SMALL_OR_EAGER = dict(zip(PASSES, (2.0, 2.5), strict=True))
PUBLIC_CODE = 5.0
SMALL_ROWS = 1024
ROOFLINE = 0.6
ROOFLINE_ROWS = 16384
BACKWARD_SPREAD = 0.10


@dataclass(frozen=True)
class Floor:
    """One statement about one cell."""

    statement: str
    cell: str
    needed: float
    measured: float | None
    """None where a figure is missing."""
    against: str = ""
    at_most: bool = False
    """The measured figure may not exceed the needed one, rather than fall below it."""

    @property
    def holds(self) -> bool | None:
        """None where it could not be told."""
        if self.measured is None:
            return None
        return self.measured <= self.needed if self.at_most else self.measured >= self.needed


class Timed:
    """Medians of one cell of a record."""

    def __init__(self, data: Record) -> None:
        self.data = data
        names = ("B", "M", "local_dim", "global_dim", "distribution")
        self.cell = Cell(**{name: data[name] for name in names}, hidden_dims=tuple(data["hidden_dims"]))
        self.entries: dict[str, Record] = {entry["name"]: entry for entry in data["contenders"]}

    @property
    def name(self) -> str:
        return f"B={self.cell.B} M={self.cell.M}"

    def median(self, name: str, kind: str) -> float | None:
        """Seconds; None without a figure, or for a peer that was too slow to stay for the rounds."""
        timed = self.data["passes"].get(kind)
        values = timed["seconds"].get(name) if timed else None
        return statistics.median(values) if values else None

    def of(self, entry: Record, kind: str, mode: str) -> float | None:
        """In ``mode``; from graphs, what cannot be captured counts as it runs eagerly."""
        eager = self.median(entry["name"], kind)
        if mode == "eager":
            return eager
        graph = self.median(entry["name"] + GRAPH, kind)
        return eager if graph is None and entry["peer"] and entry["no_graph"] else graph

    def ours(self, schedule: str = "auto", foreign: str | None = None) -> Record | None:
        """The kernels' entry; None where they did not take part."""
        for entry in self.entries.values():
            if not entry["peer"] and entry["schedule"] == schedule and entry["foreign_dtype"] == foreign:
                return entry
        return None

    def best_peer(self, kind: str, mode: str) -> tuple[str, float] | None:
        """The fastest peer and its seconds."""
        times = {
            name: seconds
            for name, entry in self.entries.items()
            if entry["peer"] and (seconds := self.of(entry, kind, mode)) is not None
        }
        return min(times.items(), key=lambda item: item[1]) if times else None

    def speed_up(self, kind: str, mode: str, foreign: str | None = None) -> tuple[float | None, str]:
        """Over the best peer, and that peer's name."""
        entry, best = self.ours(foreign=foreign), self.best_peer(kind, mode)
        seconds = self.of(entry, kind, mode) if entry else None
        if seconds is None or best is None:
            return None, best[0] if best else ""
        return best[1] / seconds, best[0]

    def roofline(self, kind: str, rates: roofline.Rates, entry: Record) -> float | None:
        """The roof's share of the measured time, from CUDA graphs."""
        seconds = self.of(entry, kind, "graph")
        rate = "tf32" if self.data.get("tf32") and entry["dtype"] == "float32" else entry["dtype"]
        itemsize = 4 if entry["dtype"] == "float32" else 2
        roof = roofline.roof_seconds(self.cell, kind, rate, itemsize, entry["foreign_dtype"], rates)
        return None if seconds is None or roof is None else roof / seconds


def timed(record: Record, section: str) -> list[Timed]:
    """The cells of a section, none where it did not run."""
    return [Timed(data) for data in record["sections"].get(section, {}).get("cells", [])]


def evaluate(record: Record) -> list[Floor]:
    """Every floor of every cell that a record has."""
    rates = record["sections"].get("ceilings", {}).get("rates", {})
    return [*_headline(timed(record, "headline"), rates), *_grid(timed(record, "grid"), rates), *_backward(record)]


def _headline(cells: list[Timed], rates: roofline.Rates) -> Iterator[Floor]:
    for cell in cells:
        for kind in PASSES:
            ratio, peer = cell.speed_up(kind, "graph")
            yield Floor(f"{kind}, graphs", cell.name, FORWARD_AND_STEP[kind], ratio, peer)
            ratio, peer = cell.speed_up(kind, "graph", "int8")
            yield Floor(f"{kind}, graphs, foreign int8", cell.name, INT8[kind], ratio, peer)
            ratio, peer = cell.speed_up(kind, "eager")
            yield Floor(f"{kind}, eager", cell.name, SMALL_OR_EAGER[kind], ratio, peer)
            yield _public_code(cell, kind)
        yield from _roofline(cell, rates)


def _public_code(cell: Timed, kind: str) -> Floor:
    """Against all towers for all rows, from graphs on both sides."""
    ours, theirs = cell.ours(), next((e for e in cell.entries.values() if e["implementation"] == "all_towers"), None)
    a, b = (cell.of(entry, kind, "graph") if entry else None for entry in (theirs, ours))
    ratio = None if a is None or b is None else a / b
    return Floor(f"{kind}, graphs, against all_towers", cell.name, PUBLIC_CODE, ratio, "all_towers")


def _roofline(cell: Timed, rates: roofline.Rates) -> Iterator[Floor]:
    entry = cell.ours()
    if cell.cell.B >= ROOFLINE_ROWS and entry is not None:
        for kind in PASSES:
            fraction = cell.roofline(kind, rates, entry)
            yield Floor(f"{kind}, fraction of the roofline", cell.name, ROOFLINE, fraction)


def _grid(cells: list[Timed], rates: roofline.Rates) -> Iterator[Floor]:
    for cell in cells:
        for kind in PASSES:
            ratio, peer = cell.speed_up(kind, "graph")
            needed = SMALL_OR_EAGER[kind] if cell.cell.B <= SMALL_ROWS else 1.0
            yield Floor(f"{kind}, graphs, grid", cell.name, needed, ratio, peer)


def _backward(record: Record) -> Iterator[Floor]:
    """Largest over smallest time less one, after the read of the foreign streams at the copy's rate is taken off."""
    section, rates = record["sections"].get("backward", {}), record["sections"].get("ceilings", {}).get("rates", {})
    cells = section.get("cells", [])
    if not cells:
        return
    spread = None
    if len(cells) > 1 and rates.get("copy"):
        rest = [statistics.median(cell["seconds"]) - cell["foreign_bytes"] / rates["copy"] for cell in cells]
        spread = max(rest) / min(rest) - 1 if min(rest) > 0 else None
    scenarios = "/".join(str(cell["M"]) for cell in cells)
    yield Floor("backward, spread over M", f"B={cells[0]['B']} M={scenarios}", BACKWARD_SPREAD, spread, at_most=True)
