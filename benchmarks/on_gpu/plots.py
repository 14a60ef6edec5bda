"""gpu_*.svg from a record."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import page as pages
from cells import GRAPH
from on_gpu import floors
from records import Cell
from saml_kernels.testing.problem import PASSES

Record = dict[str, Any]


Line = Sequence[tuple[float, float | None]]


def speed_up(record: Record) -> Figure | None:
    """Over the best peer against B, a line per M, from CUDA graphs."""
    points = floors.timed(record, "grid")
    if not points:
        return None

    def lines(kind: str) -> dict[str, Line]:
        found = [(point.M, point.B, floors.row(point, kind)) for point in points]
        scenarios = sorted({point.M for point in points})
        return {f"M = {M}": [(B, row and row.ratio) for m, B, row in found if m == M] for M in scenarios}

    figure, axes = _against_rows(points, lines, "speed-up over the best peer")
    for panel in axes:
        panel.axhline(1, color="0.4", lw=1, ls="--")
    return figure


def roofline(record: Record) -> Figure | None:
    """The fraction reached against B, a line per schedule, at one M."""
    ceilings, points = floors.rates(record), floors.timed(record, "grid")
    if not points or not ceilings:
        return None
    same = [point for point in points if point.M == points[0].M]

    def lines(kind: str) -> dict[str, Line]:
        return {
            f"schedule {schedule}": [(point.B, floors.fraction(point, kind, ceilings, schedule)) for point in same]
            for schedule in ("auto", "persistent", "per_layer")
        }

    return _against_rows(same, lines, f"fraction of the roofline, M = {same[0].M}")[0]


def _against_rows(points: Sequence[Cell], lines: Callable[[str], dict[str, Line]], label: str) -> tuple[Figure, Any]:
    """A panel a pass with lines over B, and the panels."""
    figure, axes = pages.panels(1, len(PASSES), 3.6)
    for panel, kind in zip(axes[0], PASSES, strict=True):
        found = lines(kind)
        for (name, line), colour, marker in zip(found.items(), pages.shades(len(found)), pages.MARKERS, strict=False):
            pages.line(panel, line, color=colour, marker=marker, label=name)
        panel.set_title(kind)
        panel.set_ylim(bottom=0)
        pages.powers_of_two(panel, [point.B for point in points], "rows in the batch, B")
    axes[0][0].set_ylabel(label)
    pages.legend(figure, axes[0][0], 5)
    return figure, axes[0]


def times(record: Record) -> Figure | None:
    """Every contender of the headline's first cell, eager and from a graph."""
    points = floors.timed(record, "headline")
    if not points:
        return None
    point = points[0]
    every = [(name + mode, entry["peer"]) for name, entry in point.contenders.items() for mode in ("", GRAPH)]
    names = {name: peer for name, peer in every if any(point.timed(name, kind) for kind in PASSES)}
    figure, axes = plt.subplots(1, len(PASSES), figsize=(8, 0.24 * len(names) + 1), sharey=True)
    for panel, kind in zip(axes, PASSES, strict=True):
        values = [(point.median(name, kind) or 0) * 1e3 for name in names]
        panel.barh(list(names), values, color=["0.6" if peer else "#0072B2" for peer in names.values()])
        panel.set(title=f"{kind}, {point.name}", xlabel="ms")
    # The panels share it: turned twice it would stand as before.
    axes[0].invert_yaxis()
    return figure


def stages(record: Record) -> Figure | None:
    """Every stage alone, and the launches of all of them, of the first cell."""
    points = floors.timed(record, "stages")
    if not points or not points[0].rows:
        return None
    rows = {f"{row.measured}: {row.contender}": row.median * 1e6 for row in points[0].rows.values()}
    return _bars(rows, f"µs in a launch of its own; {points[0].name}")


def backward(record: Record) -> Figure | None:
    """Backward alone against M."""
    found = record["sections"].get("backward", {}).get("cells", [])
    if not found:
        return None
    figure, panel = plt.subplots(figsize=(5, 3.6))
    pages.line(panel, [(cell["M"], cell["median"] * 1e3) for cell in found], marker="o", label="measured")
    if copy := floors.rates(record).get("copy"):
        rest = [(cell["M"], (cell["median"] - cell["foreign_bytes"] / copy) * 1e3) for cell in found]
        pages.line(panel, rest, marker="s", label="less its read of the foreign streams")
    panel.set(xlabel=f"scenarios, M; B = {found[0]['B']}", ylabel="ms")
    panel.set_ylim(bottom=0)
    pages.legend(figure, panel, 5)
    return figure


def memory(record: Record) -> Figure | None:
    """Peak of a training step of the headline's first cell."""
    points = floors.timed(record, "headline")
    entries = points[0].contenders if points else {}
    known = {name: entry["peak_bytes"] / 2**20 for name, entry in entries.items() if entry.get("peak_bytes")}
    return _bars(known, f"peak of a training step, MiB; {points[0].name}") if known else None


def _bars(values: dict[str, float], label: str) -> Figure:
    figure, panel = plt.subplots(figsize=(8, 0.24 * len(values) + 1))
    panel.barh(list(values), list(values.values()), color="0.6")
    panel.invert_yaxis()
    panel.set_xlabel(label)
    return figure


FIGURES: Final[dict[str, Callable[[Record], Figure | None]]] = {
    "gpu_speed_up": speed_up,
    "gpu_roofline": roofline,
    "gpu_times": times,
    "gpu_stages": stages,
    "gpu_backward": backward,
    "gpu_memory": memory,
}


def save(record: Record, folder: Path) -> list[Path]:
    """Every figure whose numbers are there; a dry run's say so across the whole picture."""
    written = []
    with pages.drawing():
        for name, function in FIGURES.items():
            if (figure := function(record)) is None:
                continue
            if record["dry_run"]:
                figure.text(0.5, 0.5, "dry run on a CPU", fontsize=30, color="red", alpha=0.4, ha="center", rotation=20)
            else:
                figure.suptitle(record["device"]["name"])
            written.append(pages.save(figure, folder / f"{name}.svg", Title=record["kind"]))
    return written
