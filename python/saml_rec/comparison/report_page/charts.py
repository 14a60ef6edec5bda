"""Charts by matplotlib as inline SVG, 360 units wide so that their text is legible on a phone.

A chart is drawn in stand-in colours, which become the variables of report.css: so it follows the page's light and dark.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import BytesIO
from math import isfinite
from typing import Any, ParamSpec
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

WIDTH = 360
# On the right there is room for half of the last tick's number.
LEFT, RIGHT, TOP, BOTTOM = 96, 24, 8, 36
UNITS_PER_INCH = 72
LONGEST_NAME = 14
TICKS: dict[str, Any] = {"nbins": 5, "steps": [1, 2, 5, 10]}
BAR_OPACITY = 0.55
MANY_LINES = 10
# Marks and cells carry this and their text as the name of their group, which becomes the group's <title>.
TITLE = "title:"

# Shapes that differ without colour too.
MARKERS = "os^DvPx+"
COLOURS = {
    name: f"#0000{number:02x}"
    for number, name in enumerate(["text", "line", "accent", *(f"s{index}" for index in range(len(MARKERS)))], start=1)
}
TEXT, LINE, ACCENT = COLOURS["text"], COLOURS["line"], COLOURS["accent"]

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.labelsize": "medium",
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.xmargin": 0.06,
    "axes.ymargin": 0.06,
    "axes.formatter.useoffset": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 8,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.major.pad": 5 for axis in "xy"},
    **{f"{axis}tick.labelcolor": TEXT for axis in "xy"},
}

Points = Sequence[tuple[float, float]]
Summary = Mapping[str, Any]
Parameters = ParamSpec("Parameters")


def _chart(draw: Callable[Parameters, tuple[Figure, str]]) -> Callable[Parameters, Markup]:
    """Makes inline SVG of a function that draws a figure and gives the chart's label."""

    @wraps(draw)
    def inline(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Markup:
        # Identifiers within a page are one space: what is drawn tells those of two charts apart.
        salt = {"svg.hashsalt": f"{draw.__name__} {args} {kwargs}"}
        with style.context(["default", STYLE | salt]), warnings.catch_warnings():
            # The reader's browser has the font, for whatever script a scenario is named in.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure, label = draw(*args, **kwargs)
            file = BytesIO()
            figure.savefig(file, format="svg")
        return _for_the_page(file.getvalue(), label)

    return inline


def _for_the_page(svg: bytes, label: str) -> Markup:
    """An ``svg`` element with the page's colours, tooltips and an accessible name, and nothing that leaks out of it."""
    root = ElementTree.fromstring(svg)
    for parent, child in [(element, child) for element in root.iter() for child in element]:
        if child.tag.endswith(("}metadata", "}style")):
            parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"]} | (
        {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    )
    names = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
    for element in list(root.iter()):
        # In HTML names have no namespace. Texts stand in leaves: the rest is indentation.
        element.tail = None
        if len(element):
            element.text = None
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "style" in element.attrib:
            element.attrib["style"] = re.sub("#0000..", lambda match: names[match[0]], element.attrib["style"])
        if element.tag == "g" and "id" in element.attrib:
            name = element.attrib.pop("id")
            if name.startswith(TITLE):
                title = ElementTree.Element("title")
                title.text = name.removeprefix(TITLE)
                element.insert(0, title)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _axes(
    height: float, *, left: float = LEFT, right: float = RIGHT, top: float = TOP, bottom: float = BOTTOM
) -> tuple[Figure, Axes]:
    """Axes with margins in units, on a figure of their own."""
    figure = Figure(figsize=(WIDTH / UNITS_PER_INCH, height / UNITS_PER_INCH))
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    return figure, figure.add_axes(box)


def _nothing(text: str, label: str) -> tuple[Figure, str]:
    figure = Figure(figsize=(WIDTH / UNITS_PER_INCH, 40 / UNITS_PER_INCH))
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure, label


def _look(index: int) -> dict[str, Any]:
    """Colour and marker of a series; no two of up to 64 have both in common."""
    round_of_colours, colour = divmod(index, len(MARKERS))
    return {"color": COLOURS[f"s{colour}"], "marker": MARKERS[(colour + round_of_colours) % len(MARKERS)]}


def _defined(summary: Summary | None) -> bool:
    return summary is not None and isfinite(summary["mean"])


def _printable(name: str) -> str:
    """Without what neither a line of a chart nor XML can hold."""
    return "".join(character if character.isprintable() else " " for character in name)


def short(name: str) -> str:
    """A name that fits beside an axis."""
    name = _printable(name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _row_names(axes: Axes, positions: Sequence[float], names: Sequence[str]) -> None:
    """Names at the left edge of the chart, whole ones as tooltips."""
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", pad=LEFT)
    for label, name in zip(axes.set_yticks(positions, [short(name) for name in names]), names, strict=True):
        label.label1.set(ha="left", gid=TITLE + _printable(name))


@_chart
def mark(index: int) -> tuple[Figure, str]:
    """The mark of a series, for the legend: its name stands beside it."""
    side = 14 / UNITS_PER_INCH
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.plot(0, 0, linestyle="none", clip_on=False, **_look(index))
    return figure, ""


@_chart
def dots(rows: Sequence[tuple[str, Sequence[Summary | None]]], names: Sequence[str], unit: str) -> tuple[Figure, str]:
    """One line of marks a group: mean and, where there are several seeds, ± one standard deviation of each series.

    Args:
        rows: per group its name and a summary (``mean``, ``deviation``) or None per series.
        names: of the series.
        unit: of the axis.
    """
    label = f"{unit} of every scenario and model"
    if not any(_defined(entry) for _, entries in rows for entry in entries):
        return _nothing("not defined for these rows", unit)
    pitch = 9 * len(names) + 8
    left_edge = -LEFT / (WIDTH - LEFT - RIGHT)
    figure, axes = _axes(TOP + pitch * len(rows) + BOTTOM)
    for position, (group, entries) in enumerate(rows):
        axes.axhline(pitch * (position + 1), xmin=left_edge, color=LINE, linewidth=0.7, clip_on=False)
        for index, entry in enumerate(entries):
            if entry is None or not _defined(entry):
                continue
            mean, deviation = entry["mean"], entry["deviation"]
            told = f"{group}, {names[index]}: {mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
            place = pitch * position + 8 + 9 * index
            drawn = axes.errorbar(mean, place, xerr=deviation, linestyle="none", elinewidth=1, **_look(index))
            for artist in drawn.get_children():
                artist.set_gid(TITLE + _printable(told))
    axes.set_ylim(pitch * len(rows), 0)
    axes.locator_params(axis="x", **TICKS)
    _row_names(axes, [pitch * (position + 0.5) for position in range(len(rows))], [name for name, _ in rows])
    axes.set_xlabel(unit)
    return figure, label


@_chart
def lines(
    series: Sequence[Sequence[Points]], x_unit: str, y_unit: str, *, diagonal: bool = False, whole: bool = False
) -> tuple[Figure, str]:
    """A line a run, in the colour of its series.

    Args:
        series: per series its runs, each a list of (x, y).
        x_unit, y_unit: of the axes.
        diagonal: also draws y = x, on axes of equal range.
        whole: x counts something, so that only whole numbers are ticks.
    """
    points = [point for runs in series for run in runs for point in run if all(map(isfinite, point))]
    if not points:
        return _nothing("no validation rows", y_unit)
    figure, axes = _axes(274, left=72)
    lines_drawn = sum(len(runs) for runs in series)
    # Many lines are thinner, or they hide one another.
    thin: dict[str, Any] = {"linewidth": 0.9, "markersize": 4} if lines_drawn > MANY_LINES else {}
    for index, runs in enumerate(series):
        for run in runs:
            axes.plot(*zip(*run, strict=True), **_look(index), **thin)
    if diagonal:
        low, high = min(map(min, points)), max(map(max, points))
        axes.axline((low, low), slope=1, color=LINE, linewidth=0.7)
        axes.update_datalim([(low, low), (high, high)])
        axes.autoscale_view()
    axes.locator_params(axis="x", **TICKS, integer=whole)
    axes.locator_params(axis="y", **TICKS)
    axes.set(xlabel=x_unit, ylabel=y_unit)
    return figure, f"{y_unit} against {x_unit}"


@_chart
def bars(values: Sequence[tuple[str, Summary]], unit: str) -> tuple[Figure, str]:
    """A bar a series: mean, with ± one standard deviation as a line."""
    pitch = 34
    figure, axes = _axes(TOP + pitch * len(values) + BOTTOM, right=32)
    for position, (_, entry) in enumerate(values):
        colour = _look(position)["color"]
        looks = {"facecolor": (colour, BAR_OPACITY), "edgecolor": colour, "ecolor": colour}
        axes.barh(position, entry["mean"], height=18 / pitch, xerr=entry["deviation"], **looks)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", **TICKS | ({"nbins": 3} if axes.get_xlim()[1] >= 1e6 else {}))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _row_names(axes, range(len(values)), [name for name, _ in values])
    axes.set_xlabel(unit)
    return figure, unit


@_chart
def heat_map(matrix: Sequence[Sequence[float | None]], names: Sequence[str]) -> tuple[Figure, str]:
    """Row i shows how scenario i weighs the others; the darkest cell is the largest weight. The diagonal is empty.

    Args:
        matrix: (M, M), None where there is no row to average over.
        names: of the scenarios.
    """
    label = "learned mutual weights"
    cells = {
        (i, j): value
        for i, row in enumerate(matrix)
        for j, value in enumerate(row)
        if i != j and value is not None and isfinite(value)
    }
    if not cells:
        return _nothing("no scenario weighs another", label)
    count = len(names)
    size = min(36.0, (WIDTH - RIGHT - LEFT) / count)
    figure, axes = _axes(100 + size * count + 26, right=WIDTH - LEFT - size * count, top=100, bottom=26)
    axes.grid(visible=False)
    low, high = min(cells.values()), max(cells.values())
    for (i, j), value in cells.items():
        shade = 0.05 + 0.95 * (value - low) / ((high - low) or 1)
        told = f"{names[i]} ← {names[j]}: {value:.3f}"
        cell = Rectangle((j, i), 1, 1, facecolor=(ACCENT, shade), edgecolor=LINE, linewidth=0.4)
        cell.set_gid(TITLE + _printable(told))
        axes.add_patch(cell)
    axes.set(xlim=(0, count), ylim=(count, 0))
    axes.xaxis.tick_top()
    centres, shown = [index + 0.5 for index in range(count)], [short(name) for name in names]
    fontsize = 11 if size >= 16 else min(9, 0.8 * size)
    axes.set_yticks(centres, shown, fontsize=fontsize)
    axes.set_xticks(centres, shown, fontsize=fontsize, rotation=90, rotation_mode="anchor", ha="left", va="center")
    axes.set_xlabel(f"palest {low:.3f}, strongest {high:.3f}", loc="left")
    return figure, label
