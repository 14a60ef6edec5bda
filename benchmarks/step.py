"""Rows a second that SAML trains on MovieLens 100k, in this checkout and in another: side by side, one thread.

    git worktree add --detach ../before COMMIT           and build the extension there
    python benchmarks/step.py --against ../before        writes benchmarks/results/features_step.json

Each side is a process of its own that trains one epoch after another from the same start, with the defaults of
``saml-rec train``. They take turns in rounds, one epoch each; the first epoch of each is not timed. Ratios are formed
round by round. A first epoch that ends at another training loss has no figure.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

import click

import page
import records
from saml_kernels.testing import timing
from saml_rec.data import write_ml100k

PAGE: Final = page.DOCS / "scale.md"
RESULT: Final = records.RESULTS / "features_step.json"
LOSS_TOLERANCE: Final = 1e-5
HERE, THERE = "here", "against"


class Side:
    """A process that trains epochs with the code of one checkout."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.last: dict[str, float] = {}
        self.others: list[float] = []
        """Of every epoch the share of processor time that was not this side's; none where it is not known."""

    def epoch(self) -> float:
        """Seconds of one epoch's steps."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        self.last = json.loads(self._process.stdout.readline())
        if self.last["others"] is not None:
            self.others.append(self.last["others"])
        return self.last["seconds"]


@contextlib.contextmanager
def side(checkout: Path, data: Path, schema: Path) -> Iterator[Side]:
    """Started, and ended with the block."""
    path = os.pathsep.join(map(str, (checkout, checkout / "python")))
    with subprocess.Popen(
        [sys.executable, str(records.HERE / "epochs.py"), str(data), str(schema)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Side(process)
        process.stdin.close()  # type: ignore[union-attr]


def commit_of(checkout: Path) -> str:
    """Its commit, with "+changes" where tracked files differ."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", checkout, *arguments], capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno") else "")


def measure(sides: Mapping[str, Side], budget: float) -> dict[str, Any]:
    """Rows a second of both, and how many times as many these are here.

    Raises:
        click.ClickException: the training losses differ.
    """
    for each in sides.values():
        each.epoch()
    losses = {name: each.last["train_loss"] for name, each in sides.items()}
    if not math.isclose(*losses.values(), rel_tol=LOSS_TOLERANCE):
        raise click.ClickException(f"the training losses differ: {losses}")
    rows = sides[HERE].last["seconds"] * sides[HERE].last["rows_per_second"]
    seconds = timing.interleave(
        {name: each.epoch for name, each in sides.items()},
        timing.Protocol(budget),
        # An epoch's own seconds: without validation and files, which both sides write.
        clock=lambda call, repeats: cast(float, call()),
    )
    found = {name: asdict(timing.summary([rows / each for each in values])) for name, values in seconds.items()}
    ratio = asdict(timing.ratio(seconds[THERE], seconds[HERE]))
    others = {name: asdict(timing.summary(each.others)) for name, each in sides.items() if each.others}
    return {"rows_per_second": found, "ratio": ratio, "train_loss": losses, "others": others}


def compare(against: Path, budget: float) -> dict[str, Any]:
    """The record of this checkout and another."""
    record = records.head()
    del record["columns"]
    record |= {"threads": 1, "against": commit_of(against)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data, schema = write_ml100k(folder)
        checkouts = {THERE: against.resolve(), HERE: records.HERE.parent}
        sides = {name: stack.enter_context(side(each, data, schema)) for name, each in checkouts.items()}
        record |= measure(sides, budget)
    return record


def sentence(record: Mapping[str, Any]) -> str:
    """What the page says of a record."""
    rates, ratio = record["rows_per_second"], record["ratio"]
    return (
        f"{rates[HERE]['median']:,.0f} rows a second against {rates[THERE]['median']:,.0f} at commit "
        f"{record['against'][:7]}: {page.digits(ratio['median'])} times as many "
        f"({page.digits(ratio['p20'])}–{page.digits(ratio['p80'])} over {ratio['rounds']} rounds)."
    )


@click.command(help=__doc__)
@click.option(
    "--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Without it: only the page."
)
@click.option("--budget", type=float, default=90.0, show_default=True, help="Seconds of rounds.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
def main(against: Path | None, budget: float, out: Path) -> None:
    if against is not None:
        record = compare(against, budget)
        records.write(out, record)
        click.echo(json.dumps(record["rows_per_second"] | {"ratio": record["ratio"]}))
    record = json.loads(out.read_text(encoding="utf-8"))
    text = page.fill(PAGE.read_text(encoding="utf-8"), {"step": sentence(record) + "\n"})
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
