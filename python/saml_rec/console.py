"""What commands print: a line an epoch, a progress bar on a terminal, tables of metrics.

Lines are also records of the logger ``saml_rec``, information and warnings, so that a program that trains finds them
where its own are. As libraries should be it is silent until somebody gives it, or the root, a handler.
"""

import errno
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LOGGER = logging.getLogger("saml_rec")
LOGGER.addHandler(logging.NullHandler())


def decimals(value: float | None) -> str:
    """Four decimals, or a dash for a metric that is not defined."""
    return "-" if value is None else f"{value:.4f}"


def spread(summary: Mapping[str, float | None] | None) -> str:
    """``mean ± deviation`` with four decimals, or a dash."""
    if summary is None:
        return decimals(None)
    deviation = summary["deviation"]
    return decimals(summary["mean"]) + ("" if deviation is None else f" ± {deviation:.4f}")


def interval(summary: Mapping[str, Any] | None) -> str:
    """``low – high`` of a summary's interval with four decimals, or nothing where it has none."""
    if summary is None or summary["interval"] is None:
        return ""
    low, high = summary["interval"]
    return f"{low:.4f} – {high:.4f}"


def table_of(names: str, numbers: Iterable[str], caption: str | None = None) -> Table:
    """An empty table: a column of names, which fold if they are too long for the terminal, and columns of numbers."""
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True, caption=caption, caption_justify="left"
    )
    table.add_column(names, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


METRIC_NAMES = {
    "auc": "AUC",
    "logloss": "log loss",
    "gauc": "GAUC",
    "pr_auc": "PR AUC",
    "normalised_entropy": "normalised entropy",
    "predicted_over_observed": "predicted/observed",
    "ece": "ECE",
}
"""What metrics are called for people, by their names in metrics.json."""
IN_TABLE = ("auc", "logloss", "gauc", "predicted_over_observed")


def total_name(scenarios: Collection[str]) -> str:
    """What stands for all rows beside the names of scenarios: a name that none of them has."""
    name = "overall"
    while name in scenarios:
        name = f"({name})" if name != "overall" else "all rows"
    return name


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """AUC, log loss, GAUC where rows have groups, predicted/observed and row count, of every scenario and overall.

    Args:
        metrics: with ``overall`` and ``scenarios`` as :func:`saml_rec.evaluation.metrics.evaluate_scores` gives them.
    """
    shown = [metric for metric in IN_TABLE if metric in metrics["overall"]]
    table = table_of("scenario", (*(METRIC_NAMES[metric] for metric in shown), "rows"))
    for name, scores in metrics["scenarios"].items():
        # Names are data: Text keeps brackets in them from being read as markup.
        table.add_row(Text(name), *_cells(scores, shown))
    table.add_section()
    table.add_row(total_name(metrics["scenarios"]), *_cells(metrics["overall"], shown), style="bold")
    return table


def _cells(scores: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    return [*(decimals(scores[metric]) for metric in shown), f"{scores['rows']:,}"]


def epoch_line(history: Sequence[Mapping[str, Any]], epochs: int, best: int) -> str:
    """The last epoch of the history on one line, with a star if it is the best one so far."""
    entry = history[-1]
    return (
        f"epoch {entry['epoch']}/{epochs}  train loss {decimals(entry['train_loss'])}  "
        f"valid log loss {decimals(entry['valid']['logloss'])}  valid AUC {decimals(entry['valid']['auc'])}  "
        f"{entry['seconds']:.1f} s  {entry['rows_per_second']:,.0f} rows/s{'  *' if entry['epoch'] == best else ''}"
    )


def backend_seconds(seconds: Mapping[str, float]) -> str:
    """Seconds by the backends that ran: ``cpp 1.2 s, reference 4.8 s``."""
    return ", ".join(f"{backend} {value:.1f} s" for backend, value in seconds.items())


def say(console: Console | None, message: str) -> None:
    """Logs one line, and prints it as it is: no markup, no highlighting, no wrapping."""
    LOGGER.info("%s", message)
    if console is not None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(console: Console | None, description: str, steps: int) -> Iterator[Callable[[], None]]:
    """A function to call after every step. It moves a bar on a terminal, and prints nothing elsewhere."""
    if console is None or not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=steps)
        yield lambda: bar.advance(task)


def print_written(paths: Iterable[Path]) -> None:
    """One line a file."""
    for path in paths:
        print(f"wrote {path}")


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Leaves the exit status to the command: rich's own would be that of a defect."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


def stdout() -> Console:
    """The terminal, or where a pipe leads."""
    return _Stdout(highlight=False)
