"""Result files: where the code came from, and for every cell summary rows of what was timed in it.

A record has a head, ``columns`` (the fields of Row) and ``cells``; a cell has its shapes, ``contenders`` with what the
gate says of each, ``others`` (the share of processor time that was not the benchmark's, by pass) and ``rows``.
"""

import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import torch

import workload
from saml_kernels import doctor
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import Verdict
from saml_rec.run_directory import versions

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results"
PUBLIC: Final = "all_towers"
"""The peer that does what public code does."""
PRODUCT: Final = "product"
QUIET_SHARE: Final = 0.05
"""Processor time of others, as a share of all, above which figures are not to be kept."""
DIGITS: Final = 7
LINE: Final = 360
Record = dict[str, Any]


class Row(NamedTuple):
    """One contender in one pass: seconds a call, and how many times as fast it is as others, formed round by round."""

    contender: str
    measured: str
    """The pass."""
    median: float
    p20: float | None
    p80: float | None
    rounds: int
    """0: not in the rounds; ``median`` is the fastest of a few calls, of a peer that was too slow to stay."""
    ratio: float | None = None
    """Over the best peer of its precision; median."""
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    public: float | None = None
    """Over PUBLIC, eager, in its precision; median."""
    product: float | None = None
    """Over the matrix product PRODUCT; median."""


def rows(
    measured: str,
    seconds: Mapping[str, Sequence[float]],
    peers_of: Mapping[str, Iterable[str]],
    screened: Mapping[str, float] | None = None,
) -> list[Row]:
    """The summary of one pass's rounds; ``peers_of`` has the peers that a contender is compared with."""
    found = []
    for name, values in seconds.items():
        peers = {peer: seconds[peer] for peer in peers_of.get(name, ()) if peer in seconds}
        ratio = timing.ratio(peers[timing.fastest(peers)], values) if peers else None
        public = next((peer for peer in peers if peer.split(", ")[0] == PUBLIC and "compiled" not in peer), PUBLIC)
        against = peers.get(public), seconds.get(PRODUCT)
        over = [None if other is None else timing.ratio(other, values).median for other in against]
        parts = (ratio.median, ratio.p20, ratio.p80) if ratio else (None, None, None)
        found.append(Row(name, measured, *asdict(timing.summary(values)).values(), *parts, *over))
    return found + [Row(name, measured, once, None, None, 0) for name, once in (screened or {}).items()]


def verdict(found: Verdict) -> Record:
    """The gate's, in short: the largest error, whose it is, and its bound."""
    short: Record = {"failure": found.failure} if found.failure else {}
    if found.errors:
        worst = max(found.errors, key=lambda name: found.errors[name])
        short |= {"error": found.errors[worst], "tensor": worst, "bound": found.bounds[worst]}
    return short | ({} if found.distance is None else {"distance": found.distance})


class Cell:
    """One cell of a record, with what tables, figures and floors ask of it."""

    def __init__(self, data: Record) -> None:
        self.data = data
        self.B: int = data["B"]
        self.M: int = data["M"]
        self.contenders: dict[str, Record] = {entry["name"]: entry for entry in data["contenders"]}
        self.rows = {(row.contender, row.measured): row for row in map(Row._make, data["rows"])}

    @property
    def name(self) -> str:
        return f"B={self.B} M={self.M}"

    @property
    def shapes(self) -> workload.Cell:
        """Of a cell of the trunk."""
        names = ("B", "M", "local_dim", "global_dim", "distribution")
        return workload.Cell(**{n: self.data[n] for n in names}, hidden_dims=tuple(self.data["hidden_dims"]))

    def timed(self, name: str, measured: str) -> Row | None:
        """None for a contender without a figure, or one that was screened out."""
        row = self.rows.get((name, measured))
        return row if row and row.rounds else None

    def median(self, name: str, measured: str) -> float | None:
        """Seconds; of a peer that was screened out, those of its fastest call."""
        row = self.rows.get((name, measured))
        return row.median if row else None

    def best_peer(self, dtype: str, measured: str) -> str | None:
        """The fastest peer in ``dtype``; None where none has a figure."""
        peers = {
            name: row.median
            for name, entry in self.contenders.items()
            if entry["peer"] and entry["dtype"] == dtype and (row := self.timed(name, measured))
        }
        return min(peers, key=lambda name: peers[name]) if peers else None

    def speed_up(self, name: str, measured: str) -> Row | None:
        """The row whose ratio to the best peer of the same precision is known."""
        row = self.timed(name, measured)
        return row if row and row.ratio is not None else None


def cells(record: Record) -> list[Cell]:
    """Of a record.

    Raises:
        click.ClickException: its rows have other columns.
    """
    if record["columns"] != list(Row._fields):
        raise click.ClickException(f"expected the columns {', '.join(Row._fields)}, got {', '.join(record['columns'])}")
    return [Cell(data) for data in record["cells"]]


def head() -> Record:
    """Of a record that is begun now: command, with the names alone of this machine's paths, commit, machine."""
    given = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], HERE.parent), *given]),
        "commit": commit(),
        "machine": doctor.machine(),
        "threads": torch.get_num_threads(),
        "columns": list(Row._fields),
    }


def training_head() -> Record:
    """Of a record of trained models: as :func:`head`, with the processor's name alone of the machine."""
    found = head()
    machine = found.pop("machine")
    del found["columns"]
    return found | {"processor": machine["processor"], "versions": versions()}


def commit() -> str | None:
    """The checked-out commit, with "+changes" where tracked files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def quiet_cells(path: Path, record: Record, same: Sequence[str] = ()) -> list[Record]:
    """Those of an earlier run that need not be measured again; what ``same`` names must be as it was then."""
    cells = earlier_cells(path, record, same)
    return [cell for cell in cells if all((share or 0) <= QUIET_SHARE for share in cell["others"].values())]


def earlier_cells(path: Path, record: Record, same: Sequence[str] = ()) -> list[Record]:
    """All of an earlier run on this machine; what ``same`` names must be as it was then."""
    if not path.exists():
        raise click.BadParameter(f"there is no earlier run {path}", param_hint="--again")
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for what in ("columns", "machine", "threads", *same):
        # As it would be read back: JSON has lists only.
        if earlier[what] != json.loads(json.dumps(record[what])):
            raise click.BadParameter(f"{what} of {path} differs: {earlier[what]}", param_hint="--again")
    cells: list[Record] = earlier["cells"]
    return cells


def measure_cells(
    out: Path, record: Record, wanted: Sequence[Any], kept: Sequence[Record], measure: Callable[[Any], Record]
) -> None:
    """Fills ``record["cells"]`` with the wanted cells (dataclasses), kept or measured; writes after each."""

    def earlier(cell: Any) -> Record | None:
        shapes = json.loads(json.dumps(asdict(cell)))
        return next((found for found in kept if shapes.items() <= found.items()), None)

    for index, cell in enumerate(wanted, start=1):
        if (found := earlier(cell)) is not None:
            record["cells"].append(found)
            continue
        click.echo(f"[{index}/{len(wanted)}] {cell}", err=True)
        record["cells"].append(asdict(cell) | measure(cell))
        # What is known already of later cells stays, should this run end here.
        later = [found for after in wanted[index:] if (found := earlier(after)) is not None]
        write(out, record | {"cells": record["cells"] + later})


def write(out: Path, record: Record) -> None:
    """Whole or not at all; numbers with DIGITS significant digits, a row a line."""
    with tempfile.NamedTemporaryFile("w", dir=out.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        file.write(_text(_rounded(record)) + "\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(out)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def _text(value: Any, indent: int = 0) -> str:
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(short) + indent <= LINE:
        return short
    items = value.items() if isinstance(value, dict) else enumerate(value)
    lines = [
        " " * (indent + 1) + (f"{json.dumps(name)}: " if isinstance(value, dict) else "") + _text(entry, indent + 1)
        for name, entry in items
    ]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n" + ",\n".join(lines) + f"\n{' ' * indent}{right}"
