"""Microseconds a call of an exported SAML in a C++ process without Python, and of the same model in PyTorch.

    python benchmarks/serving.py        writes benchmarks/results/serving.json and the table of docs/serving.md

Both take the same encoded rows, on one thread. They take turns in rounds: calls of the model under inference_mode, then
as many in a process of examples/serve_cpp, each timed alone. The first call of each is not counted.
"""

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from torch import Tensor

import page
import records
from saml_kernels.testing import timing
from saml_rec.data import prepare, read_table, write_ml100k
from saml_rec.data.schema import load_schema
from saml_rec.evaluation.scoring import TrainedModel, load_trained
from saml_rec.export import export, tensors_of
from saml_rec.models.base import ScenarioModel
from saml_rec.training import TrainOptions, train

PAGE: Final = page.DOCS / "serving.md"
RESULT: Final = records.RESULTS / "serving.json"
EXAMPLE: Final = page.DOCS.parent / "examples" / "serve_cpp"
ROWS: Final = (1, 64, 512)
PERCENTILES: Final = (50, 99)
WAYS: Final = ("eager", "C++")


def score_program(folder: Path) -> Path:
    """examples/serve_cpp, built."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (("cmake", "-S", EXAMPLE, "-B", folder, prefix), ("cmake", "--build", folder)):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "score"


def exported(folder: Path) -> tuple[TrainedModel, list[str], Path]:
    """SAML on MovieLens 100k by age, its command but for the rows, and the table."""
    table, schema_path = write_ml100k(folder)[:2]
    schema = load_schema(schema_path)
    train(prepare(table, schema, seed=0), schema, TrainOptions(epochs=1), folder / "run", data_path=table)
    manifest = export(folder / "run", folder / "model.pt2")
    operators = folder / manifest["files"]["operators"]["name"]
    return load_trained(folder / "run", device="cpu"), [str(folder / "model.pt2"), str(operators)], table


def eager_times(model: ScenarioModel, batch: Any, calls: int) -> list[float]:
    """Microseconds of each call."""
    taken = []
    with torch.inference_mode():
        model(batch).logit.double().sigmoid()
        for _ in range(calls):
            start = time.perf_counter()
            model(batch).logit.double().sigmoid()
            taken.append((time.perf_counter() - start) * 1e6)
    return taken


def process_times(command: list[str], rows: Path, calls: int) -> list[float]:
    """Microseconds of each call in a process of its own."""
    done = subprocess.run([*command, str(rows), str(calls)], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stderr.split()]


def one_size(trained: TrainedModel, command: list[str], batch: Any, folder: Path, rounds: int, calls: int) -> Any:
    """Each round's percentiles by way, and the share of processor time that others had."""
    model = trained.model
    assert isinstance(model, ScenarioModel)
    given: list[Tensor] = list(tensors_of(trained.encoder, batch))
    torch.save(given, folder / "rows.pt")
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    shares = []
    for _ in range(rounds):
        # Of this process alone: the other one's time would count as that of others.
        with timing.Others() as others:
            found["eager"].append(percentiles(eager_times(model, batch, calls)))
        shares.append(others.share or 0.0)
        found["C++"].append(percentiles(process_times(command, folder / "rows.pt", calls)))
    return {"rows": len(batch["scenario"]), "others": statistics.median(shares), "microseconds": found}


def percentiles(taken: list[float]) -> list[float]:
    return [float(each) for each in np.percentile(taken, PERCENTILES)]


def table(record: Any) -> str:
    """Medians over the rounds, with the least and the largest."""

    def shown(values: list[float]) -> str:
        return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"

    lines = []
    for size in record["sizes"]:
        by_way = (zip(*size["microseconds"][way], strict=True) for way in WAYS)
        lines.append([str(size["rows"]), *(shown(list(each)) for columns in by_way for each in columns)])
    head = ["rows", *(f"{way}, p{percentile}" for way in WAYS for percentile in PERCENTILES)]
    others = max(size["others"] for size in record["sizes"])
    machine = record["machine"]
    return (
        f"Microseconds a call, one thread: median of {record['rounds']} rounds of {record['calls']} calls each, least "
        f"and largest round in brackets. SAML with its defaults on MovieLens 100k by age; eager is PyTorch under "
        f"inference_mode. {machine['processor']}, {machine['cpu capability']}, torch {machine['torch']}; other "
        f"processes had {others:.0%} of all cores meanwhile. `python benchmarks/serving.py`, "
        f"[result](../benchmarks/results/serving.json).\n\n{page.markdown(head, lines)}\n"
    )


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--calls", type=click.IntRange(1), default=500, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--render", is_flag=True, help="Only the table of the page, from --out.")
def main(rounds: int, calls: int, out: Path, render: bool) -> None:
    if not render:
        torch.set_num_threads(1)
        record = records.head() | {"rounds": rounds, "calls": calls}
        del record["columns"]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trained, arguments, data = exported(folder)
            command = ["env", "OMP_NUM_THREADS=1", str(score_program(folder / "build")), *arguments]
            encoded = trained.encoder.encode(read_table(data, trained.schema, need_label=False)[: max(ROWS)])
            batches = [encoded.batch(torch.arange(size)) for size in ROWS]
            record["sizes"] = [one_size(trained, command, each, folder, rounds, calls) for each in batches]
        records.write(out, record)
    record = json.loads(out.read_text(encoding="utf-8"))
    PAGE.write_text(page.fill(PAGE.read_text(encoding="utf-8"), {"serving": table(record)}), encoding="utf-8")


if __name__ == "__main__":
    main()
