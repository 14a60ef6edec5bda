"""Makes docs/figures/*.svg and the tables of docs/benchmarks.md from results/trunk_*.json.

    python benchmarks/figures.py

A table replaces what stands between ``<!-- table:NAME -->`` and ``<!-- end -->``; no number is typed by hand.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import timing
from contenders import PASSES

HERE: Final = Path(__file__).resolve().parent
DOCS: Final = HERE.parent / "docs"
Record = dict[str, Any]

# Okabe and Ito's palette: apart for every kind of colour vision. Markers differ as well.
STYLES: Final = {
    "cpp": ("#0072B2", "o"),
    "cpp, foreign bfloat16": ("#56B4E9", "s"),
    "all_towers": ("#D55E00", "^"),
    "loop_gather": ("#E69F00", "v"),
    "grouped": ("#009E73", "D"),
    "grouped_onednn": ("#CC79A7", "P"),
    "grouped, compiled": ("#000000", "X"),
}
MARKERS: Final = "osD^vPX"
OURS: Final = ("cpp", "cpp, foreign bfloat16")
FIXED_ROWS: Final = 4096
FIXED_SCENARIOS: Final = 8


class Cell:
    """One cell of a results file, with what the tables and figures ask of it."""

    def __init__(self, data: Record) -> None:
        self.data = data
        self.B: int = data["B"]
        self.M: int = data["M"]
        self.contenders: dict[str, Record] = {entry["name"]: entry for entry in data["contenders"]}

    def seconds(self, name: str, kind: str) -> list[float] | None:
        """Per round; None for a contender without a figure, or one screened out."""
        seconds: list[float] | None = self.data["passes"][kind]["seconds"].get(name)
        return seconds

    def median(self, name: str, kind: str) -> float | None:
        """Seconds; of a peer that was screened out, those of its one call."""
        seconds = self.seconds(name, kind)
        once: float | None = self.data["passes"][kind]["screened_out"].get(name)
        return once if seconds is None else timing.summary(seconds).median

    def best_peer(self, dtype: str, kind: str) -> str | None:
        """The fastest peer in ``dtype``; None where none has a figure."""
        peers = {
            name: seconds
            for name, entry in self.contenders.items()
            if entry["peer"] and entry["dtype"] == dtype and (seconds := self.seconds(name, kind)) is not None
        }
        return timing.fastest(peers) if peers else None

    def speed_up(self, name: str, kind: str) -> timing.Summary | None:
        """Over the best peer of the same precision."""
        if name not in self.contenders:
            return None
        best, seconds = self.best_peer(self.contenders[name]["dtype"], kind), self.seconds(name, kind)
        if best is None or seconds is None:
            return None
        return timing.ratio(self.data["passes"][kind]["seconds"][best], seconds)

    def product_rate(self, dtype: str, kind: str) -> float | None:
        """FLOP/s of the faster product of layer 1's size in ``dtype``."""
        names = [entry["name"] for entry in self.data["products"] if entry["dtype"] == dtype]
        medians = [seconds for name in names if (seconds := self.median(name, kind)) is not None]
        return self.data["operations"]["layer_one"] / min(medians) if medians else None

    def title(self) -> str:
        """The shapes in words."""
        widths = ", ".join(map(str, self.data["hidden_dims"]))
        return (
            f"B = {self.B}, M = {self.M}, D_l = {self.data['local_dim']}, D_g = {self.data['global_dim']}, "
            f"widths ({widths}), scenarios {self.data['distribution']}"
        )


def cells(record: Record) -> list[Cell]:
    """Of a results file."""
    return [Cell(data) for data in record["cells"]]


def headline_table(record: Record) -> str:
    """Every contender of every cell."""
    return "\n\n".join(f"{cell.title()}\n\n{_contender_table(cell)}" for cell in cells(record))


def _contender_table(cell: Cell) -> str:
    head = ["contender", *(f"{kind}, ms" for kind in PASSES), *(f"{kind}, ×" for kind in PASSES)]
    head += ["GFLOP/s", "of a product", "peak, MiB", "error"]
    rows = []
    for name, entry in cell.contenders.items():
        label = f"**{name}**" if not entry["peer"] and entry["implementation"] != "reference" else name
        if entry["gate"]["failure"] is not None:
            rows.append([label, *["–"] * (len(head) - 2), entry["gate"]["failure"].replace("|", "\\|")])
            continue
        rows.append(
            [
                label,
                *[_milliseconds(cell.seconds(name, kind)) for kind in PASSES],
                *[_times(cell.speed_up(name, kind)) for kind in PASSES],
                *_rate(cell, name),
                _mebibytes(entry["memory"]),
                f"{max(entry['gate']['errors'].values()):.0e}",
            ]
        )
    return _markdown(head, rows)


def _milliseconds(seconds: list[float] | None) -> str:
    if seconds is None:
        return "–"
    figures = timing.summary(seconds)
    return f"{_digits(figures.median * 1e3)} ({_digits(figures.p20 * 1e3)}–{_digits(figures.p80 * 1e3)})"


def _times(ratio: timing.Summary | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} ({ratio.p20:.2f}–{ratio.p80:.2f})"


def _rate(cell: Cell, name: str) -> tuple[str, str]:
    """The forward pass's useful GFLOP/s, and its share of a product's rate in the contender's precision."""
    seconds = cell.median(name, "forward")
    product = cell.product_rate(cell.contenders[name]["dtype"], "forward")
    if seconds is None or product is None:
        return "–", "–"
    rate = cell.data["operations"]["forward"] / seconds
    return f"{rate / 1e9:.0f}", f"{rate / product:.0%}".replace("%", " %")


def _mebibytes(memory: Record | None) -> str:
    return "–" if memory is None or memory["peak_bytes"] is None else f"{memory['peak_bytes'] / 2**20:.0f}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed_up_table(record: Record) -> str:
    """The kernels' speed-up over the best peer: a row per batch size, a column per number of scenarios."""
    by_shape = {(cell.B, cell.M): cell for cell in cells(record)}
    scenarios = sorted({M for _, M in by_shape})
    parts = []
    for kind in PASSES:
        for name in OURS:
            rows = []
            for B in sorted({B for B, _ in by_shape}):
                entries = [by_shape.get((B, M)) for M in scenarios]
                rows.append([str(B), *[_speed_up_entry(cell, name, kind) for cell in entries]])
            parts.append(f"{kind.capitalize()}, {name}\n\n{_markdown(['B', *[f'M = {M}' for M in scenarios]], rows)}")
    return "\n\n".join(parts)


def _speed_up_entry(cell: Cell | None, name: str, kind: str) -> str:
    ratio = cell.speed_up(name, kind) if cell is not None else None
    if cell is None or ratio is None:
        return "–"
    return f"{ratio.median:.2f} ({cell.best_peer(cell.contenders[name]['dtype'], kind)})"


def overhead_table(record: Record) -> str:
    """Microseconds a call."""
    parts = []
    for cell in cells(record):
        rows = []
        for name, entry in cell.contenders.items():
            values = [cell.median(name, kind) for kind in PASSES]
            reason = entry["gate"]["failure"]
            rows.append([name, *[reason or "–" if value is None else _digits(value * 1e6) for value in values]])
        parts.append(f"{cell.title()}\n\n{_markdown(['contender', 'forward, µs', 'step, µs'], rows)}")
    return "\n\n".join(parts)


def machine_table(record: Record) -> str:
    """Where, when and how the headline was measured."""
    facts = record["machine"] | {
        "libraries": record["versions"]["libraries"],
        "threads": f"{record['threads']} used, {record['machine']['threads']}",
        "processor time of others": _others(record),
        "commit": record["commit"] or "unknown",
        "started": record["started"],
        "command": f"`{record['command']}`",
    }
    return _markdown(["", ""], [[name, value] for name, value in facts.items()])


def _others(record: Record) -> str:
    """The largest share of any cell and pass."""
    shares = [timed["others"] for cell in record["cells"] for timed in cell["passes"].values()]
    return "not known" if None in shares else f"at most {max(shares):.1%}".replace("%", " %")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: Final[dict[str, tuple[str, Callable[[Record], str]]]] = {
    "machine": ("headline", machine_table),
    "headline": ("headline", headline_table),
    "grid": ("grid", speed_up_table),
    "small": ("small", speed_up_table),
    "overhead": ("overhead", overhead_table),
}
"""Marker on the page -> suite and function."""


def speed_up_figure(record: Record, axis: str) -> Figure:
    """Speed-up over the best peer against B (a line per M) or M (a line per B), with p20 to p80 shaded."""
    other = "M" if axis == "B" else "B"
    points = cells(record)
    figure, axes = plt.subplots(len(OURS), len(PASSES), figsize=(8, 5.6), sharex=True, sharey=True, squeeze=False)
    series = sorted({getattr(cell, other) for cell in points})
    colours = mpl.colormaps["viridis"]([0.85 * index / max(len(series) - 1, 1) for index in range(len(series))])
    for row, name in zip(axes, OURS, strict=True):
        for panel, kind in zip(row, PASSES, strict=True):
            for value, colour, marker in zip(series, colours, MARKERS, strict=False):
                line = [
                    (getattr(cell, axis), ratio)
                    for cell in points
                    if getattr(cell, other) == value and (ratio := cell.speed_up(name, kind)) is not None
                ]
                line.sort(key=lambda point: point[0])
                x, ratios = [point[0] for point in line], [point[1] for point in line]
                panel.plot(x, [r.median for r in ratios], color=colour, marker=marker, label=f"{other} = {value}")
                panel.fill_between(x, [r.p20 for r in ratios], [r.p80 for r in ratios], color=colour, alpha=0.15, lw=0)
            panel.axhline(1, color="0.4", lw=1, ls="--")
            panel.set_title(f"{kind}, {name}")
            panel.set_ylim(bottom=0)
            _powers_of_two(panel, axis, points)
        row[0].set_ylabel("speed-up over the best peer")
    for panel in axes[-1]:
        panel.set_xlabel(_AXES[axis])
    _legend(figure, axes[0][0], len(series))
    return figure


def cost_figure(record: Record, axis: str) -> Figure:
    """Time against B at fixed M, or against M at fixed B: how the cost of each contender grows."""
    other, fixed = ("M", FIXED_SCENARIOS) if axis == "B" else ("B", FIXED_ROWS)
    points = sorted((cell for cell in cells(record) if getattr(cell, other) == fixed), key=lambda c: getattr(c, axis))
    figure, axes = plt.subplots(1, len(PASSES), figsize=(8, 3.6), sharey=True, squeeze=False)
    for panel, kind in zip(axes[0], PASSES, strict=True):
        for name, (colour, marker) in STYLES.items():
            line = [(getattr(cell, axis), cell.median(name, kind)) for cell in points]
            known = [(x, seconds * 1e3) for x, seconds in line if seconds is not None]
            if known:
                panel.plot(*zip(*known, strict=True), color=colour, marker=marker, label=name)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(f"{kind}, {other} = {fixed}")
        panel.set_xlabel(_AXES[axis])
        _powers_of_two(panel, axis, points)
    axes[0][0].set_ylabel("ms")
    _legend(figure, axes[0][0], 4)
    return figure


def memory_figure(record: Record) -> Figure:
    """Peak memory of a training step against M at fixed B."""
    points = sorted((cell for cell in cells(record) if cell.B == FIXED_ROWS), key=lambda cell: cell.M)
    figure, panel = plt.subplots(figsize=(8, 3.6))
    for name, (colour, marker) in STYLES.items():
        known = [
            (cell.M, entry["memory"]["peak_bytes"] / 2**20)
            for cell in points
            if (entry := cell.contenders.get(name)) and entry["memory"] and entry["memory"]["peak_bytes"] is not None
        ]
        if known:
            panel.plot(*zip(*known, strict=True), color=colour, marker=marker, label=name)
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylabel("peak of a training step, MiB")
    panel.set_xlabel(f"{_AXES['M']}; B = {FIXED_ROWS}")
    _powers_of_two(panel, "M", points)
    _legend(figure, panel, 4)
    return figure


_AXES: Final = {"B": "rows in the batch, B", "M": "scenarios, M"}


def _powers_of_two(panel: Axes, axis: str, points: Sequence[Cell]) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sorted({getattr(cell, axis) for cell in points})))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(True, color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panel: Axes, columns: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


FIGURES: Final[dict[str, tuple[str, Callable[[Record], Figure]]]] = {
    "trunk_speed_up_rows": ("grid", lambda record: speed_up_figure(record, "B")),
    "trunk_speed_up_scenarios": ("grid", lambda record: speed_up_figure(record, "M")),
    "trunk_cost_rows": ("grid", lambda record: cost_figure(record, "B")),
    "trunk_cost_scenarios": ("grid", lambda record: cost_figure(record, "M")),
    "trunk_memory": ("grid", memory_figure),
    "trunk_small_speed_up": ("small", lambda record: speed_up_figure(record, "B")),
}
"""File name without suffix -> suite and function."""


def load(results: Path, suite: str) -> Record | None:
    """A suite's results; None without a file. Raises click.ClickException for one that an interrupted run left."""
    path = results / f"trunk_{suite}.json"
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    if not record["complete"]:
        raise click.ClickException(f"{path} holds an unfinished run; repeat: {record['command']}")
    return record


def render_page(page: str, results: Path) -> str:
    """The page with every table made anew. Raises click.ClickException for a marker no table belongs to."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise click.ClickException(f"the page asks for table {name!r}; there are {', '.join(TABLES)}")
        suite, function = TABLES[name]
        record = load(results, suite)
        text = f"Not measured yet: `python benchmarks/trunk.py --suite {suite}`" if record is None else function(record)
        return f"<!-- table:{name} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- table:(?P<name>\S+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def save_figures(results: Path, folder: Path) -> list[Path]:
    """Writes every figure whose results exist; returns the files."""
    written = []
    # A fixed salt and no date: the same results make the same file.
    with mpl.rc_context({"svg.hashsalt": "saml", "font.size": 9, "figure.constrained_layout.use": True}):
        for name, (suite, function) in FIGURES.items():
            record = load(results, suite)
            if record is None:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            figure = function(record)
            path = folder / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None}, facecolor="white")
            plt.close(figure)
            written.append(path)
    return written


@click.command(help=__doc__)
@click.option("--results", type=click.Path(exists=True, file_okay=False, path_type=Path), default=HERE / "results")
@click.option("--page", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=DOCS / "benchmarks.md")
@click.option("--figures", type=click.Path(file_okay=False, path_type=Path), default=DOCS / "figures")
def main(results: Path, page: Path, figures: Path) -> None:
    old = page.read_text(encoding="utf-8")
    new = render_page(old, results)
    if new != old:
        page.write_text(new, encoding="utf-8")
        click.echo(f"wrote {page}")
    for path in save_figures(results, figures):
        click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
