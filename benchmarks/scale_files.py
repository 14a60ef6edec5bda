"""What rows cost: memory, rows a second from a file to gradients, and two processes beside one.

    python benchmarks/scale_files.py              writes results/scale_files.json and the tables of docs/scale.md
    python benchmarks/scale_files.py --render     the tables from the committed result

Rows are those of ``saml-rec data synthetic``. Every figure is of a process of its own: ``saml-rec train`` for one
epoch, without a cache before it, and ``saml-rec predict``; beside them the whole table in memory and dense tables
(benchmarks/peers/plain_training.py), whose epoch is cut off after LIMIT seconds and counted by its rate.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click

import page
import records
from saml_kernels.testing import timing
from saml_rec.datasets.synthetic import write_synthetic

RESULT: Final = records.RESULTS / "scale_files.json"
PAGE: Final = page.DOCS / "scale.md"
SIZES: Final = (100_000, 1_000_000, 8_000_000)
BATCH: Final = 4096
LIMIT: Final = 60.0
PROCESS_ROWS: Final = 1_000_000
PAIRS: Final = 2
PEER: Final = records.HERE / "peers" / "plain_training.py"
MIB: Final = 2**20


def run(command: list[str]) -> tuple[str, float, int]:
    """Output, seconds, and the most memory that the process held."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise click.ClickException(f"{' '.join(command)} ended with status {child.returncode}")
        out.seek(0)
        return out.read(), seconds, usage.ru_maxrss * 1024


def first_rows(data: Path, rows: int, out: Path) -> Path:
    """A table of the first rows of another."""
    with data.open(encoding="utf-8") as whole, out.open("w", encoding="utf-8") as part:
        part.writelines(islice(whole, rows + 1))
    return out


def command_of(data: Path, schema: Path, out: Path, *more: str) -> list[str]:
    """One epoch of training."""
    given = ["train", "--data", str(data), "--schema", str(schema), "--out", str(out), "--epochs", "1"]
    return ["-m", "saml_rec", *given, "--batch-size", str(BATCH), "--cache", str(out.parent / "cache"), *more]


def one_size(rows: int, data: Path, schema: Path, folder: Path) -> dict[str, Any]:
    """Training, prediction and the peer on one table."""
    out = folder / "run"
    _, seconds, peak = run([sys.executable, *command_of(data, schema, out)])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"rows": rows, "bytes": data.stat().st_size, "train_rows": metrics["data"]["rows"]["train"]}
    found["saml_rec"] = {
        "epoch_seconds": metrics["timing"]["seconds_per_epoch"],
        "seconds": seconds,
        "peak_bytes": peak,
        "tables": metrics["tables"]["engine"],
    }
    told, _, _ = run([sys.executable, str(PEER), str(data), str(schema), str(BATCH), str(LIMIT)])
    plain = json.loads(told)
    plain["epoch_seconds"] = plain["seconds"] * plain["train_rows"] / plain["rows"]
    found["plain"] = plain
    for path in (out, folder / "cache"):
        shutil.rmtree(path, ignore_errors=True)
    click.echo(json.dumps(found))
    return found


def predictions(parts: Mapping[int, Path], schema: Path, folder: Path) -> dict[str, Any]:
    """``saml-rec predict`` of every table, by a model of the smallest."""
    out = folder / "run"
    run([sys.executable, *command_of(parts[SIZES[0]], schema, out)])
    found: dict[str, Any] = {"commit": records.head()["commit"], "sizes": []}
    for rows, data in parts.items():
        given = ["predict", str(out), "--data", str(data), "--out", str(folder / "out.csv")]
        _, seconds, peak = run([sys.executable, "-m", "saml_rec", *given])
        found["sizes"].append({"rows": rows, "seconds": seconds, "peak_bytes": peak})
        click.echo(json.dumps(found["sizes"][-1]))
    shutil.rmtree(out)
    return found


def processes(data: Path, schema: Path, folder: Path) -> dict[str, Any]:
    """One process and two, in turn."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found: dict[str, Any] = {"commit": records.head()["commit"], "rows": PROCESS_ROWS, "one": [], "two": []}
    for _ in range(PAIRS):
        for name, first in (("one", []), ("two", launcher)):
            out = folder / name
            run([sys.executable, *first, *command_of(data, schema, out, "--overwrite")])
            (epoch,) = json.loads((out / "history.json").read_text(encoding="utf-8"))
            found[name].append({key: epoch[key] for key in ("train_loss", "rows_per_second", "valid")})
            click.echo(json.dumps({name: epoch}))
    return found


def rate(entry: dict[str, Any], of: str) -> float:
    """Training rows a second, from the file to the last gradient of the epoch."""
    one = entry[of]
    # What is not an epoch: reading and encoding; for saml-rec also start, validation, test and writing.
    total = one["seconds"] if of == "saml_rec" else one["prepare_seconds"] + one["epoch_seconds"]
    return float(entry["train_rows"] / total)


def sizes_table(record: dict[str, Any]) -> str:
    """Rows by memory and rates."""
    head = ["rows", "CSV", "train: peak memory", "predict: peak memory", "train: rows/s", "of the epoch alone"]
    head += ["plain: peak memory", "plain: rows/s", "of the epoch alone"]

    def mib(value: float) -> str:
        return f"{value / MIB:,.0f} MiB"

    predicted = {entry["rows"]: entry["peak_bytes"] for entry in record["predict"]["sizes"]}
    return page.markdown(
        head,
        [
            [
                f"{entry['rows']:,}",
                mib(entry["bytes"]),
                mib(entry["saml_rec"]["peak_bytes"]),
                mib(predicted[entry["rows"]]),
                f"{rate(entry, 'saml_rec'):,.0f}",
                f"{entry['train_rows'] / entry['saml_rec']['epoch_seconds']:,.0f}",
                mib(entry["plain"]["peak_bytes"]),
                f"{rate(entry, 'plain'):,.0f}",
                f"{entry['train_rows'] / entry['plain']['epoch_seconds']:,.0f}",
            ]
            for entry in record["sizes"]
        ],
    )


def processes_table(record: dict[str, Any]) -> str:
    """One process and two."""
    found = record["processes"]
    rows = []
    for name in ("one", "two"):
        rates = [run["rows_per_second"] for run in found[name]]
        first = found[name][0]
        loss, valid = first["train_loss"], first["valid"]
        shown = " / ".join(f"{value:,.0f}" for value in rates)
        rows.append([name, shown, f"{loss:.7f}", f"{valid['logloss']:.7f}", f"{valid['auc']:.6f}"])
    return page.markdown(["processes", "training rows/s, each run", "train loss", "valid log loss", "valid AUC"], rows)


@click.command(help=__doc__)
@click.option(
    "--data", type=click.Path(path_type=Path), help="A folder that data synthetic wrote with the largest size."
)
@click.option("--only", type=click.Choice(["sizes", "predict", "processes"]), help="Measure that, and keep the rest.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--render", is_flag=True, help="Only the tables of the page, from --out.")
def main(data: Path | None, only: str | None, out: Path, render: bool) -> None:
    if not render:
        record = records.head() if only is None else json.loads(out.read_text(encoding="utf-8"))
        record.pop("columns", None)
        record |= {"batch": BATCH, "limit": LIMIT}
        with tempfile.TemporaryDirectory(dir=None if data is None else data.parent) as name, timing.Others() as others:
            folder = Path(name)
            if data is None:
                write_synthetic(folder, rows=SIZES[-1], scenarios=8, users=100_000, items=20_000)
                data = folder
            whole, schema = data / "synthetic.csv", data / "synthetic.toml"
            parts = {rows: first_rows(whole, rows, folder / f"{rows}.csv") for rows in SIZES[:-1]} | {SIZES[-1]: whole}
            if only in (None, "sizes"):
                record["sizes"] = [one_size(rows, part, schema, folder) for rows, part in parts.items()]
            if only in (None, "predict"):
                record["predict"] = predictions(parts, schema, folder)
            if only in (None, "processes"):
                record["processes"] = processes(parts[PROCESS_ROWS], schema, folder)
        if only is None:
            record["others"] = others.share
        records.write(out, record)
    record = json.loads(out.read_text(encoding="utf-8"))
    texts = {"sizes": sizes_table(record) + "\n", "processes": processes_table(record) + "\n"}
    PAGE.write_text(page.fill(PAGE.read_text(encoding="utf-8"), texts), encoding="utf-8")


if __name__ == "__main__":
    main()
