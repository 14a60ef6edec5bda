"""Makes the tables of docs/benchmarks.md and docs/figures/*.svg from results/trunk_*.json.

    python benchmarks/figures.py

A table replaces what stands between ``<!-- table:NAME -->`` and ``<!-- end -->``; no number is typed by hand.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

import ceilings
import front_page
import page as pages
import workload
from page import markdown
from records import RESULTS, Cell, Record, Row, cells
from saml_kernels.testing.problem import PASSES

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
OURS: Final = ("cpp", "cpp, foreign bfloat16")
FIXED: Final = {"B": 4096, "M": 8}
AXES: Final = {"B": "rows in the batch, B", "M": "scenarios, M"}


def title(cell: Cell) -> str:
    """The shapes in words."""
    widths = ", ".join(map(str, cell.data["hidden_dims"]))
    return (
        f"B = {cell.B}, M = {cell.M}, D_l = {cell.data['local_dim']}, D_g = {cell.data['global_dim']}, "
        f"widths ({widths}), scenarios {cell.data['distribution']}"
    )


def headline_table(record: Record) -> str:
    """Every contender of every cell."""
    return "\n\n".join(f"{title(cell)}\n\n{_contender_table(cell)}" for cell in cells(record))


def _contender_table(cell: Cell) -> str:
    head = ["contender", *(f"{kind}, ms" for kind in PASSES), *(f"{kind}, ×" for kind in PASSES)]
    head += ["GFLOP/s", "of a product", "peak, MiB", "error"]
    lines = []
    for name, entry in cell.contenders.items():
        label = name if entry["peer"] or name == "reference" else f"**{name}**"
        if (failure := entry.get("failure")) is not None:
            lines.append([label, *["–"] * (len(head) - 2), failure.replace("|", "\\|")])
            continue
        timed = [cell.timed(name, kind) for kind in PASSES]
        peak = entry.get("peak_bytes")
        lines.append(
            [
                label,
                *map(_milliseconds, timed),
                *map(times, timed),
                *_rate(cell, name),
                "–" if peak is None else f"{peak / 2**20:.0f}",
                f"{entry['error']:.0e}",
            ]
        )
    return markdown(head, lines)


def _milliseconds(row: Row | None) -> str:
    if row is None or row.p20 is None or row.p80 is None:
        return "–"
    return f"{pages.digits(row.median * 1e3)} ({pages.digits(row.p20 * 1e3)}–{pages.digits(row.p80 * 1e3)})"


def times(row: Row | None) -> str:
    """The ratio to the best peer."""
    return "–" if row is None or row.ratio is None else f"{row.ratio:.2f} ({row.ratio_p20:.2f}–{row.ratio_p80:.2f})"


def _rate(cell: Cell, name: str) -> tuple[str, str]:
    """The forward pass's useful GFLOP/s, and its share of the rate of the faster product in the same precision."""
    dtype = cell.contenders[name]["dtype"]
    products = [
        cell.median(product["name"], "forward") for product in cell.data["products"] if product["dtype"] == dtype
    ]
    known = [seconds for seconds in products if seconds is not None]
    seconds = cell.median(name, "forward")
    if seconds is None or not known:
        return "–", "–"
    operations = workload.operations(cell.shapes)
    rate = operations.forward / seconds
    return f"{rate / 1e9:.0f}", f"{rate * min(known) / operations.layer_one:.0%}".replace("%", " %")


def speed_up_table(record: Record) -> str:
    """The kernels' speed-up over the best peer: a row per batch size, a column per number of scenarios."""
    by_shape = {(cell.B, cell.M): cell for cell in cells(record)}
    scenarios = sorted({M for _, M in by_shape})
    entries = [item for cell in by_shape.values() for item in cell.contenders.items()]
    kernels = dict.fromkeys(name for name, entry in entries if not entry["peer"])
    parts = []
    for kind in PASSES:
        for name in kernels:
            lines = [
                [str(B), *[_speed_up_entry(by_shape.get((B, M)), name, kind) for M in scenarios]]
                for B in sorted({B for B, _ in by_shape})
            ]
            table = markdown(["B", *[f"M = {M}" for M in scenarios]], lines)
            parts.append(f"{kind.capitalize()}, {name}\n\n{table}")
    return "\n\n".join(parts)


def _speed_up_entry(cell: Cell | None, name: str, kind: str) -> str:
    if cell is None or (row := cell.speed_up(name, kind)) is None:
        return "–"
    return f"{row.ratio:.2f} ({cell.best_peer(cell.contenders[name]['dtype'], kind)})"


def overhead_table(record: Record) -> str:
    """Microseconds a call."""
    parts = []
    for cell in cells(record):
        lines = []
        for name, entry in cell.contenders.items():
            values = [cell.median(name, kind) for kind in PASSES]
            missing = entry.get("failure") or "–"
            lines.append([name, *[missing if value is None else pages.digits(value * 1e6) for value in values]])
        parts.append(f"{title(cell)}\n\n{markdown(['contender', 'forward, µs', 'step, µs'], lines)}")
    return "\n\n".join(parts)


def limits_table(record: Record) -> str:
    """How near the kernels are to what the processor can do, and by how much the best peer could be beaten at most."""
    head = ["B", "M", "scenarios", "contender", "pass", "ms", "least, ms", "of the ceiling", "best peer ÷ least"]
    lines = []
    for cell in cells(record):
        for name, entry in cell.contenders.items():
            if entry["peer"] or name.split(", ")[0] != "cpp":
                continue
            for kind in PASSES:
                if (seconds := cell.median(name, kind)) is None:
                    continue
                least = _least_seconds(cell, entry, kind)
                best = cell.best_peer(entry["dtype"], kind)
                peer = None if best is None else cell.median(best, kind)
                numbers = [pages.digits(seconds * 1e3), pages.digits(least * 1e3)]
                numbers.append(f"{least / seconds:.0%}".replace("%", " %"))
                numbers.append("–" if peer is None else f"{peer / least:.2f}")
                lines.append([str(cell.B), str(cell.M), cell.data["distribution"], name, kind, *numbers])
    return markdown(head, lines) + f"\n\n{_ceilings(record)}"


def _least_seconds(cell: Cell, entry: Record, kind: str) -> float:
    shapes, rates = cell.shapes, cell.data["ceilings"]
    return ceilings.least_seconds(
        shapes, kind, entry["dtype"], entry.get("foreign_dtype"), cell.data["own_scenarios"], rates
    )


def _ceilings(record: Record) -> str:
    """The rates themselves, the lowest and the highest of all cells."""
    found = [cell.data["ceilings"] for cell in cells(record)]
    parts = []
    for name in found[0]:
        rates = sorted(rates[name] / 1e9 for rates in found)
        between = " to ".join(dict.fromkeys(pages.digits(rate) for rate in (rates[0], rates[-1])))
        parts.append(f"{name} {between} {'GB/s' if name == 'read' else 'GFLOP/s'}")
    return f"Ceilings, all threads together: {'; '.join(parts)}."


def where(record: Record) -> str:
    """On what, of which commit and when a suite was run, in a line."""
    machine = record["machine"]
    instructions = record.get("instruction_set", machine["cpu capability"])
    commit, plus, changes = (record["commit"] or "unknown").partition("+")
    return (
        f"{machine['processor']}, {instructions}, {record['threads']} threads, torch {machine['torch']}; "
        f"`{record['command']}`, commit {commit[:10]}{plus}{changes}, {record['started'][:10]}."
    )


def machine_table(record: Record) -> str:
    """Where, when and how the headline was measured."""
    shares = [share for cell in cells(record) for share in cell.data["others"].values()]
    facts = record["machine"] | {
        "libraries": record["versions"]["libraries"],
        "threads": f"{record['threads']} used, {record['machine']['threads']}",
        "processor time of others": "not known" if None in shares else f"at most {max(shares):.1%}".replace("%", " %"),
        "commit": record["commit"] or "unknown",
        "started": record["started"],
        "command": f"`{record['command']}`",
    }
    return markdown(["", ""], [[name, value] for name, value in facts.items()])


TABLES: Final[dict[str, tuple[str, Callable[[Record], str]]]] = {
    "machine": ("headline", machine_table),
    "headline": ("headline", headline_table),
    "grid": ("grid", speed_up_table),
    "grid_bfloat16": ("grid_bfloat16", speed_up_table),
    "grid_bfloat16_limits": ("grid_bfloat16", limits_table),
    "small": ("small", speed_up_table),
    "few_rows": ("few_rows", speed_up_table),
    "few_rows_limits": ("few_rows", limits_table),
    "few_rows_kept": ("few_rows_kept", speed_up_table),
    "limits": ("headline", limits_table),
    "foreign_limits": ("foreign", limits_table),
    "foreign": ("foreign", headline_table),
    "overhead": ("overhead", overhead_table),
}
"""Marker on the page -> suite and function."""


def speed_up_figure(record: Record, axis: str) -> Figure:
    """Speed-up over the best peer against B (a line per M) or M (a line per B), with p20 to p80 shaded."""
    other = "M" if axis == "B" else "B"
    points = cells(record)
    figure, axes = pages.panels(len(OURS), len(PASSES), 5.6)
    series = sorted({getattr(cell, other) for cell in points})
    for row, name in zip(axes, OURS, strict=True):
        for panel, kind in zip(row, PASSES, strict=True):
            for value, colour, marker in zip(series, pages.shades(len(series)), pages.MARKERS, strict=False):
                line = sorted(
                    (getattr(cell, axis), timed.ratio, timed.ratio_p20, timed.ratio_p80)
                    for cell in points
                    if getattr(cell, other) == value and (timed := cell.speed_up(name, kind))
                )
                x, medians, low, high = zip(*line, strict=True) if line else ((), (), (), ())
                panel.plot(x, medians, color=colour, marker=marker, label=f"{other} = {value}")
                panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            panel.axhline(1, color="0.4", lw=1, ls="--")
            panel.set_title(f"{kind}, {name}")
            panel.set_ylim(bottom=0)
            _axis(panel, axis, points)
        row[0].set_ylabel("speed-up over the best peer")
    for panel in axes[:-1].flat:
        panel.set_xlabel("")
    pages.legend(figure, axes[0][0], len(series))
    return figure


def cost_figure(record: Record, axis: str) -> Figure:
    """Time against B at fixed M, or against M at fixed B: how the cost of each contender grows."""
    other = "M" if axis == "B" else "B"
    points = [cell for cell in cells(record) if getattr(cell, other) == FIXED[other]]
    figure, axes = pages.panels(1, len(PASSES), 3.6)
    for panel, kind in zip(axes[0], PASSES, strict=True):
        values = {name: [cell.median(name, kind) for cell in points] for name in STYLES}
        _lines(panel, axis, points, {name: [s and s * 1e3 for s in of_name] for name, of_name in values.items()}, 10)
        panel.set_title(f"{kind}, {other} = {FIXED[other]}")
    axes[0][0].set_ylabel("ms")
    pages.legend(figure, axes[0][0], 4)
    return figure


def memory_figure(record: Record) -> Figure:
    """Peak memory of a training step against M at fixed B."""
    rows = FIXED["B"]
    points = [cell for cell in cells(record) if rows == cell.B]
    figure, panel = plt.subplots(figsize=(8, 3.6))
    peaks = {name: [cell.contenders.get(name, {}).get("peak_bytes") for cell in points] for name in STYLES}
    _lines(panel, "M", points, {name: [p and p / 2**20 for p in of_name] for name, of_name in peaks.items()}, 2)
    panel.set_ylabel("peak of a training step, MiB")
    panel.set_xlabel(f"{AXES['M']}; B = {rows}")
    pages.legend(figure, panel, 4)
    return figure


def _lines(panel: Any, axis: str, points: Sequence[Cell], values: dict[str, list[float | None]], base: int) -> None:
    """A line a contender, on logarithmic axes."""
    x = [getattr(cell, axis) for cell in points]
    for name, (colour, marker) in STYLES.items():
        pages.line(panel, list(zip(x, values[name], strict=True)), color=colour, marker=marker, label=name)
    panel.set_yscale("log", base=base)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _axis(panel, axis, points)


def _axis(panel: Any, axis: str, points: Sequence[Cell]) -> None:
    pages.powers_of_two(panel, [getattr(cell, axis) for cell in points], AXES[axis])


FIGURES: Final[dict[str, tuple[str, Callable[[Record], Figure]]]] = {
    "trunk_speed_up_rows": ("grid", lambda record: speed_up_figure(record, "B")),
    "trunk_speed_up_scenarios": ("grid", lambda record: speed_up_figure(record, "M")),
    "trunk_cost_rows": ("grid", lambda record: cost_figure(record, "B")),
    "trunk_cost_scenarios": ("grid", lambda record: cost_figure(record, "M")),
    "trunk_memory": ("grid", memory_figure),
    "trunk_small_speed_up": ("small", lambda record: speed_up_figure(record, "B")),
    "front_page": ("headline", front_page.figure),
}
"""File name without suffix -> suite and function."""


def load(results: Path, suite: str) -> list[Record]:
    """A suite's results: ``trunk_<suite>.json``, then those of other processors, ``trunk_<suite>.<which>.json``.

    Raises:
        click.ClickException: an interrupted run left one of them.
    """
    found: list[Record] = []
    for path in (results / f"trunk_{suite}.json", *sorted(results.glob(f"trunk_{suite}.*.json"))):
        if not path.exists():
            continue
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        if not record["complete"]:
            raise click.ClickException(f"{path} holds an unfinished run; repeat: {record['command']}")
        found.append(record)
    return found


def render_page(page: str, results: Path) -> str:
    """The page with every table made anew. Raises click.ClickException for a marker no table belongs to."""
    texts = {}
    for name in re.findall(r"<!-- table:(\S+) -->", page):
        if name not in TABLES:
            raise click.ClickException(f"the page asks for table {name!r}; there are {', '.join(TABLES)}")
        suite, function = TABLES[name]
        found = [record for record in load(results, suite) if function is not limits_table or _has_ceilings(record)]
        parts = [f"{where(record)}\n\n{function(record)}" for record in found]
        text = "\n\n".join(parts) or f"Not measured yet: `python benchmarks/trunk.py --suite {suite}`"
        texts[f"table:{name}"] = f"\n{text}\n\n"
    return pages.fill(page, texts)


def _has_ceilings(record: Record) -> bool:
    """Runs from before they were measured have none."""
    return all("ceilings" in cell.data for cell in cells(record))


def save_figures(results: Path, folder: Path) -> list[Path]:
    """Writes every figure whose results exist, of the first processor; returns the files."""
    with pages.drawing():
        return [
            pages.save(function(found[0]), folder / f"{name}.svg")
            for name, (suite, function) in FIGURES.items()
            if (found := load(results, suite))
        ]


@click.command(help=__doc__)
@click.option("--results", type=click.Path(exists=True, file_okay=False, path_type=Path), default=RESULTS)
@click.option(
    "--page", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=pages.DOCS / "benchmarks.md"
)
@click.option("--figures", type=click.Path(file_okay=False, path_type=Path), default=pages.FIGURES)
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
