"""Tables in Markdown, their places on the documentation's pages, and figures that come out the same every time."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
FIGURES: Final = DOCS / "figures"
MARKERS: Final = "osD^vPX"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def fill(page: str, texts: Mapping[str, str]) -> str:
    """The page with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` replaced; no number is typed by hand."""
    for name, text in texts.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = place.sub(lambda match, text=text: f"{match[1]}{text}{match[2]}", page)  # type: ignore[misc]
    return page


def publish(
    record: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
    render: Callable[[dict[str, Any], str], str],
    page: Path | None,
) -> None:
    """Prints the record's table and, unless there is none, puts it onto its page."""
    click.echo(table(record))
    if page is not None:
        page.write_text(render(record, page.read_text(encoding="utf-8")), encoding="utf-8")


@contextmanager
def drawing() -> Iterator[None]:
    """A fixed salt and no date: the same results make the same file."""
    with mpl.rc_context({"svg.hashsalt": "saml", "font.size": 9, "figure.constrained_layout.use": True}):
        yield


def save(figure: Figure, path: Path, **metadata: str) -> Path:
    """As SVG; the figure is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} | metadata)
    plt.close(figure)
    return path


def panels(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    """A figure of panels with common axes, and the panels (rows, columns)."""
    return plt.subplots(rows, columns, figsize=(8, height), sharex=rows > 1, sharey=True, squeeze=False)


def shades(count: int) -> Any:
    """Colours of an ordered series."""
    return mpl.colormaps["viridis"]([0.85 * index / max(count - 1, 1) for index in range(count)])


def line(panel: Axes, points: Sequence[tuple[float, float | None]], **style: Any) -> None:
    """Through the points that are known; nothing where none is."""
    known = [(x, y) for x, y in points if y is not None]
    if known:
        panel.plot(*zip(*sorted(known), strict=True), **style)


def powers_of_two(panel: Axes, values: Sequence[float], label: str) -> None:
    """The x axis, with a tick at each of the values."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel(label)
    panel.grid(True, color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, panel: Axes, columns: int) -> None:
    """Below the panels."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
