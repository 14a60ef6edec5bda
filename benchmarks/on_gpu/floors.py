"""The floors a run is held to, and whether they hold. Pure arithmetic on a record."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import records
from cells import GRAPH
from on_gpu import roofline
from records import Cell, Row
from saml_kernels.testing.problem import PASSES

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


def timed(record: Record, section: str) -> list[Cell]:
    """The cells of a section, none where it did not run."""
    part = record["sections"].get(section, {})
    return records.cells(part) if "columns" in part else []


def rates(record: Record) -> roofline.Rates:
    """The ceilings, none where they were not measured."""
    found: roofline.Rates = record["sections"].get("ceilings", {}).get("rates", {})
    return found


def ours(cell: Cell, schedule: str = "auto", foreign: str | None = None) -> Record | None:
    """The kernels' entry; None where they did not take part."""
    for entry in cell.contenders.values():
        if not entry["peer"] and (entry.get("schedule", "auto"), entry.get("foreign_dtype")) == (schedule, foreign):
            return entry
    return None


def row(cell: Cell, kind: str, mode: str = GRAPH, schedule: str = "auto", foreign: str | None = None) -> Row | None:
    """The kernels' figures in a pass, from graphs or (mode "") eager."""
    entry = ours(cell, schedule, foreign)
    return cell.timed(entry["name"] + mode, kind) if entry else None


def best_peer(cell: Cell, kind: str, mode: str) -> str:
    """The fastest peer; against graphs, what cannot be captured counts as it runs eagerly. "" where there is none."""
    medians = {}
    for name, entry in cell.contenders.items():
        found = cell.timed(name + mode, kind) or (cell.timed(name, kind) if entry.get("no_graph") else None)
        if entry["peer"] and found:
            medians[name] = found.median
    return min(medians, key=lambda name: medians[name]) if medians else ""


def fraction(cell: Cell, kind: str, ceilings: roofline.Rates, schedule: str = "auto") -> float | None:
    """The roof's share of the measured time, from CUDA graphs."""
    entry, found = ours(cell, schedule), row(cell, kind, schedule=schedule)
    if entry is None or found is None:
        return None
    single = entry["dtype"] == "float32"
    rate = "tf32" if cell.data.get("tf32") and single else entry["dtype"]
    roof = roofline.roof_seconds(cell.shapes, kind, rate, 4 if single else 2, entry.get("foreign_dtype"), ceilings)
    return None if roof is None else roof / found.median


def evaluate(record: Record) -> list[Floor]:
    """Every floor of every cell that a record has."""
    ceilings = rates(record)
    headline = [floor for cell in timed(record, "headline") for floor in _headline(cell, ceilings)]
    grid = [floor for cell in timed(record, "grid") for floor in _grid(cell)]
    return [*headline, *grid, *_backward(record, ceilings)]


def _over_best(
    statement: str, cell: Cell, kind: str, needed: float, mode: str = GRAPH, foreign: str | None = None
) -> Floor:
    found = row(cell, kind, mode, foreign=foreign)
    return Floor(statement, cell.name, needed, found and found.ratio, best_peer(cell, kind, mode))


def _headline(cell: Cell, ceilings: roofline.Rates) -> Iterator[Floor]:
    for kind in PASSES:
        yield _over_best(f"{kind}, graphs", cell, kind, FORWARD_AND_STEP[kind])
        yield _over_best(f"{kind}, graphs, foreign int8", cell, kind, INT8[kind], foreign="int8")
        yield _over_best(f"{kind}, eager", cell, kind, SMALL_OR_EAGER[kind], "")
        found = row(cell, kind)
        name = f"{kind}, graphs, against {records.PUBLIC}"
        yield Floor(name, cell.name, PUBLIC_CODE, found and found.public, records.PUBLIC)
        if cell.B >= ROOFLINE_ROWS and ours(cell) is not None:
            yield Floor(f"{kind}, fraction of the roofline", cell.name, ROOFLINE, fraction(cell, kind, ceilings))


def _grid(cell: Cell) -> Iterator[Floor]:
    for kind in PASSES:
        needed = SMALL_OR_EAGER[kind] if cell.B <= SMALL_ROWS else 1.0
        yield _over_best(f"{kind}, graphs, grid", cell, kind, needed)


def _backward(record: Record, ceilings: roofline.Rates) -> Iterator[Floor]:
    """Largest over smallest time less one, after the read of the foreign streams at the copy's rate is taken off."""
    found = record["sections"].get("backward", {}).get("cells", [])
    if not found:
        return
    spread, copy = None, ceilings.get("copy")
    if len(found) > 1 and copy:
        rest = [cell["median"] - cell["foreign_bytes"] / copy for cell in found]
        spread = max(rest) / min(rest) - 1 if min(rest) > 0 else None
    scenarios = "/".join(str(cell["M"]) for cell in found)
    yield Floor("backward, spread over M", f"B={found[0]['B']} M={scenarios}", BACKWARD_SPREAD, spread, at_most=True)
