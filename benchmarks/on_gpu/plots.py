"""gpu_*.svg from a record."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from contenders import PASSES
from on_gpu.floors import Timed, timed

Record = dict[str, Any]
MARKERS: Final = "osD^vPX"


def speed_up(record: Record) -> Figure | None:
    """Over the best peer against B, a line per M, from CUDA graphs."""
    points = timed(record, "grid")
    if not points:
        return None
    figure, axes = plt.subplots(1, len(PASSES), figsize=(8, 3.6), sharey=True, squeeze=False)
    scenarios = sorted({point.cell.M for point in points})
    colours = mpl.colormaps["viridis"]([0.85 * index / max(len(scenarios) - 1, 1) for index in range(len(scenarios))])
    for panel, kind in zip(axes[0], PASSES, strict=True):
        for M, colour, marker in zip(scenarios, colours, MARKERS, strict=False):
            ratios = [(p.cell.B, p.speed_up(kind, "graph")[0]) for p in points if p.cell.M == M]
            line = [(B, ratio) for B, ratio in ratios if ratio is not None]
            _line(panel, line, color=colour, marker=marker, label=f"M = {M}")
        panel.axhline(1, color="0.4", lw=1, ls="--")
        panel.set(title=kind, xlabel="rows in the batch, B")
        panel.set_ylim(bottom=0)
        _rows_axis(panel, points)
    axes[0][0].set_ylabel("speed-up over the best peer")
    _legend(figure, axes[0][0])
    return figure


def roofline(record: Record) -> Figure | None:
    """The fraction reached against B, a line per schedule, at one M."""
    rates = record["sections"].get("ceilings", {}).get("rates", {})
    points = timed(record, "grid")
    if not points or not rates:
        return None
    M = points[0].cell.M
    figure, axes = plt.subplots(1, len(PASSES), figsize=(8, 3.6), sharey=True, squeeze=False)
    for panel, kind in zip(axes[0], PASSES, strict=True):
        for schedule, marker in zip(("auto", "persistent", "per_layer"), MARKERS, strict=False):
            line = []
            for point in points:
                entry = point.ours(schedule)
                fraction = point.roofline(kind, rates, entry) if entry and point.cell.M == M else None
                line += [(point.cell.B, fraction)] if fraction is not None else []
            _line(panel, line, marker=marker, label=f"schedule {schedule}")
        panel.set(title=f"{kind}, M = {M}", xlabel="rows in the batch, B")
        panel.set_ylim(0, 1)
        _rows_axis(panel, points)
    axes[0][0].set_ylabel("fraction of the roofline")
    _legend(figure, axes[0][0])
    return figure


def times(record: Record) -> Figure | None:
    """Every contender of the headline's first cell, eager and from a graph."""
    points = timed(record, "headline")
    if not points:
        return None
    point = points[0]
    figure, axes = plt.subplots(1, len(PASSES), figsize=(8, 0.24 * len(point.entries) * 2 + 1), sharey=True)
    names = [name for name in _timed_names(point) if any(point.median(name, kind) for kind in PASSES)]
    for panel, kind in zip(axes, PASSES, strict=True):
        values = [(point.median(name, kind) or 0) * 1e3 for name in names]
        ours = {entry["name"] for entry in point.entries.values() if not entry["peer"]}
        colours = ["#0072B2" if name.removesuffix(", graph") in ours else "0.6" for name in names]
        panel.barh(names, values, color=colours)
        panel.set(title=f"{kind}, {point.name}", xlabel="ms")
    # The panels share it: turned twice it would stand as before.
    axes[0].invert_yaxis()
    return figure


def backward(record: Record) -> Figure | None:
    """Backward alone against M."""
    cells = record["sections"].get("backward", {}).get("cells", [])
    if not cells:
        return None
    figure, panel = plt.subplots(figsize=(5, 3.6))
    rate = record["sections"].get("ceilings", {}).get("rates", {}).get("copy")
    medians = [statistics.median(cell["seconds"]) * 1e3 for cell in cells]
    scenarios = [cell["M"] for cell in cells]
    _line(panel, list(zip(scenarios, medians, strict=True)), marker="o", label="measured")
    if rate:
        reads = [cell["foreign_bytes"] / rate * 1e3 for cell in cells]
        rest = [(M, t - read) for M, t, read in zip(scenarios, medians, reads, strict=True)]
        _line(panel, rest, marker="s", label="less its read of the foreign streams")
    panel.set(xlabel=f"scenarios, M; B = {cells[0]['B']}", ylabel="ms")
    panel.set_ylim(bottom=0)
    _legend(figure, panel)
    return figure


def memory(record: Record) -> Figure | None:
    """Peak of a training step of the headline's first cell."""
    points = timed(record, "headline")
    peaks = {name: entry["peak_bytes"] for name, entry in points[0].entries.items()} if points else {}
    known = {name: peak / 2**20 for name, peak in peaks.items() if peak is not None}
    if not known:
        return None
    figure, panel = plt.subplots(figsize=(8, 0.24 * len(known) + 1))
    panel.barh(list(known), list(known.values()), color="0.6")
    panel.invert_yaxis()
    panel.set(xlabel=f"peak of a training step, MiB; {points[0].name}")
    return figure


FIGURES: Final[dict[str, Callable[[Record], Figure | None]]] = {
    "gpu_speed_up": speed_up,
    "gpu_roofline": roofline,
    "gpu_times": times,
    "gpu_backward": backward,
    "gpu_memory": memory,
}


def save(record: Record, folder: Path) -> list[Path]:
    """Every figure whose numbers are there; a dry run's say so across the whole picture."""
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "saml", "font.size": 9, "figure.constrained_layout.use": True}):
        for name, function in FIGURES.items():
            figure = function(record)
            if figure is None:
                continue
            if record["dry_run"]:
                figure.text(0.5, 0.5, "dry run on a CPU", fontsize=30, color="red", alpha=0.4, ha="center", rotation=20)
            else:
                figure.suptitle(record["device"]["name"])
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None, "Title": record["kind"]}, facecolor="white")
            plt.close(figure)
            written.append(path)
    return written


def _timed_names(point: Timed) -> list[str]:
    return [f"{name}{suffix}" for name in point.entries for suffix in ("", ", graph")]


def _line(panel: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    if points:
        panel.plot(*zip(*sorted(points), strict=True), **style)


def _rows_axis(panel: Any, points: list[Timed]) -> None:
    rows = sorted({point.cell.B for point in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(rows, [str(B) for B in rows])
    panel.minorticks_off()


def _legend(figure: Figure, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
