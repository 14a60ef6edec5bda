"""Charts as inline SVG, 360 units wide so that their text is legible on a phone. Colours come from the page's style."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any

from saml_rec.report_page.style import SERIES

WIDTH = 360
PLOT_HEIGHT = 230
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 8, 36
TICKS = 4
LONGEST_NAME = 14

Points = Sequence[tuple[float, float]]


# Shapes of about radius 4 around (0, 0), so that series differ without colour too.
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.5 -3.5h7v7h-7Z",
    "M0 -4.6L4.4 3.4H-4.4Z",
    "M0 -4.8L4.8 0L0 4.8L-4.8 0Z",
    "M0 4.6L4.4 -3.4H-4.4Z",
    "M-4.5 -1.3h3.2v-3.2h2.6v3.2h3.2v2.6h-3.2v3.2h-2.6v-3.2h-3.2Z",
    "M-4 -4L4 4M4 -4L-4 4",
    "M-4.5 0h9M0 -4.5v9",
)


def marker(index: int, x: float, y: float) -> str:
    """The mark of a series."""
    path = MARKERS[index % SERIES]
    return f'<path class="s{index % SERIES}" d="{path}" transform="translate({x:.1f} {y:.1f})"/>'


def legend(names: Sequence[str]) -> str:
    """Marks and names, as a list."""
    items = (
        f'<li><svg viewBox="-7 -7 14 14" aria-hidden="true">{marker(index, 0, 0)}</svg>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from within [low, high], three to eight of them."""
    step: float = 10 ** floor(log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS + 1)
    return [index * step for index in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """With a margin; never empty."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or max(abs(high), 1e-3) * 0.05
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'


def short(name: str) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def dots(rows: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]], names: Sequence[str], unit: str) -> str:
    """One line of marks a group: mean and, where there are several seeds, ± one standard deviation of each series.

    Args:
        rows: per group its name and a summary (``mean``, ``deviation``) or None per series.
        names: of the series.
        unit: of the axis.
    """
    known = [entry for _, entries in rows for entry in entries if entry is not None]
    if not known:
        return _svg(40, unit, [_text(WIDTH / 2, 24, "not defined for these rows")])
    spans = [(entry["mean"] - (entry["deviation"] or 0), entry["mean"] + (entry["deviation"] or 0)) for entry in known]
    low, high = _range([value for span in spans for value in span])
    left = 96
    x = _scale(low, high, left, WIDTH - RIGHT)
    pitch = 9 * len(names) + 8
    bottom = TOP + pitch * len(rows)
    parts = []
    for value in ticks(low, high):
        parts += [_line(x(value), TOP, x(value), bottom, "grid"), _text(x(value), bottom + 14, f"{value:.4g}")]
    for position, (name, entries) in enumerate(rows):
        top = TOP + pitch * position
        parts.append(_line(0, top + pitch, WIDTH - RIGHT, top + pitch, "grid"))
        parts.append(f"<g><title>{escape(name)}</title>{_text(0, top + pitch / 2 + 4, short(name), 'start')}</g>")
        for index, entry in enumerate(entries):
            if entry is None:
                continue
            y = top + 8 + 9 * index
            mean, deviation = entry["mean"], entry["deviation"]
            told = f"{name}, {names[index]}: {mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
            bar = (
                "" if deviation is None else _line(x(mean - deviation), y, x(mean + deviation), y, f"s{index % SERIES}")
            )
            parts.append(f"<g><title>{escape(told)}</title>{bar}{marker(index, x(mean), y)}</g>")
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 30, unit))
    return _svg(bottom + BOTTOM, f"{unit} of every scenario and model", parts)


def lines(
    series: Sequence[Sequence[Points]], x_unit: str, y_unit: str, *, diagonal: bool = False, whole: bool = False
) -> str:
    """A line a run, in the colour of its series.

    Args:
        series: per series its runs, each a list of (x, y).
        x_unit, y_unit: of the axes.
        diagonal: also draws y = x, on axes of equal range.
        whole: x counts something, so that only whole numbers are ticks.
    """
    points = [point for runs in series for run in runs for point in run]
    if not points:
        return _svg(40, y_unit, [_text(WIDTH / 2, 24, "no validation rows")])
    x_low, x_high = _range([point[0] for point in points])
    y_low, y_high = _range([point[1] for point in points])
    if diagonal:
        x_low = y_low = min(x_low, y_low)
        x_high = y_high = max(x_high, y_high)
    bottom = TOP + PLOT_HEIGHT
    x, y = _scale(x_low, x_high, LEFT, WIDTH - RIGHT), _scale(y_low, y_high, bottom, TOP)
    parts = []
    for value in ticks(x_low, x_high):
        if not whole or float(value).is_integer():
            parts += [_line(x(value), TOP, x(value), bottom, "grid"), _text(x(value), bottom + 14, f"{value:.4g}")]
    for value in ticks(y_low, y_high):
        parts += [_line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")]
        parts += [_text(LEFT - 5, y(value) + 4, f"{value:.4g}", "end")]
    if diagonal:
        parts.append(_line(x(x_low), y(y_low), x(x_high), y(y_high), "grid"))
    for index, runs in enumerate(series):
        for run in runs:
            places = [(x(a), y(b)) for a, b in run]
            strokes = (_line(*start, *end, f"line s{index % SERIES}") for start, end in pairwise(places))
            parts += [*strokes, *(marker(index, *place) for place in places)]
    parts.append(_text((LEFT + WIDTH) / 2, bottom + 30, x_unit))
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(_text(10, middle, y_unit, extra=f' transform="rotate(-90 10 {middle})"'))
    return _svg(bottom + BOTTOM, f"{y_unit} against {x_unit}", parts)


def bars(values: Sequence[tuple[str, Mapping[str, Any]]], unit: str) -> str:
    """A bar a series: mean, with ± one standard deviation as a line."""
    highest = max(entry["mean"] + (entry["deviation"] or 0) for _, entry in values)
    left = 96
    x = _scale(0, highest * 1.05, left, WIDTH - RIGHT)
    pitch = 34
    bottom = TOP + pitch * len(values)
    parts = []
    for value in ticks(0, highest):
        parts += [_line(x(value), TOP, x(value), bottom, "grid"), _text(x(value), bottom + 14, f"{value:,.0f}")]
    for index, (name, entry) in enumerate(values):
        y = TOP + pitch * index
        parts.append(_text(0, y + 19, short(name), "start"))
        width = x(entry["mean"]) - left
        css = f"s{index % SERIES}"
        parts.append(
            f'<rect class="{css}" x="{left}" y="{y + 6}" width="{width:.1f}" height="18" fill-opacity="0.55"/>'
        )
        if entry["deviation"] is not None:
            ends = x(max(0.0, entry["mean"] - entry["deviation"])), x(entry["mean"] + entry["deviation"])
            parts.append(_line(ends[0], y + 15, ends[1], y + 15, css))
    parts.append(_text((left + WIDTH - RIGHT) / 2, bottom + 30, unit))
    return _svg(bottom + BOTTOM, unit, parts)


def heat_map(matrix: Sequence[Sequence[float | None]], names: Sequence[str]) -> str:
    """Row i shows how scenario i weighs the others; the darkest cell is the largest weight. The diagonal is empty.

    Args:
        matrix: (M, M), None where there is no row to average over.
        names: of the scenarios.
    """
    count = len(names)
    left, top = 96, 100
    size = min(36.0, (WIDTH - RIGHT - left) / count)
    values = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j and value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    parts = []
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        css = ' class="small"' if size < 16 else ""
        centre = left + size * (i + 0.5)
        turn = f' transform="rotate(-90 {centre:.1f} {top - 5}) translate(0 4)"'
        parts.append(_text(left - 5, top + size * (i + 0.5) + 3, short(name), "end", css))
        parts.append(_text(centre, top - 5, short(name), "start", css + turn))
        for j, value in enumerate(row):
            if i == j or value is None:
                continue
            shade = 0.05 + 0.95 * (value - low) / ((high - low) or 1)
            place = f'x="{left + size * j:.1f}" y="{top + size * i:.1f}" width="{size:.1f}" height="{size:.1f}"'
            told = f"{name} ← {names[j]}: {value:.3f}"
            parts.append(f'<rect class="cell" {place} fill-opacity="{shade:.3f}"><title>{escape(told)}</title></rect>')
    bottom = top + size * count
    parts.append(_text(left, bottom + 18, f"palest {low:.3f}, strongest {high:.3f}", "start"))
    return _svg(bottom + 26, "learned mutual weights", parts)
