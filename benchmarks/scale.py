"""What a training step costs as tables grow: SAML with user and item tables of V ids each, by engine of the tables.

    python benchmarks/scale.py                 writes benchmarks/results/scale.json and the table of docs/tables.md
    python benchmarks/scale.py --render        the table from the committed result

M scenarios, a history of HISTORY items, BATCH rows, one thread, fresh ids every step. All sizes of an engine take turns
in one run; ratios to the smallest are formed round by round. A size beside which the machine has no memory is left out,
and the record says so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
import torch

import page
import records
from saml_kernels.testing import timing
from saml_rec.data.schema import Schema
from saml_rec.models import SAML
from saml_rec.models.tables import TableOptions, table_options
from saml_rec.training.optimizers import Optimizers

M: Final = 8
HISTORY: Final = 20
BATCH: Final = 1024
DIM: Final = 16
SIZES: Final = (10_000, 100_000, 1_000_000)
LARGEST: Final = 10_000_000
ENGINES: Final = ("dense", "sparse", "fbgemm")
READY_BATCHES: Final = 16
RESULT: Final = records.RESULTS / "scale.json"
PAGE: Final = page.DOCS / "tables.md"
SCHEMA: Final = Schema.from_dict(
    {
        "label": "label",
        "scenario": "scenario",
        "features": {
            "user": {"kind": "sparse", "dim": DIM, "scenario_aware": True},
            "item": {"kind": "sparse", "dim": DIM, "scenario_aware": True},
            "history": {"kind": "sequence", "item": "item", "max_length": HISTORY},
        },
    }
)


def memory_of(engine: str, size: int) -> int:
    """Bytes of both tables, of their gradients and of the optimizer's state."""
    copies = {"dense": 4.0, "sparse": 1 + 1 / DIM, "fbgemm": 1 + 1 / DIM}[engine]
    return int(2 * (1 + M) * size * DIM * 4 * copies)


def available_memory() -> int:
    """Bytes, on Linux."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def batch_of(size: int, generator: torch.Generator) -> dict[str, Any]:
    """Random ids, as EncodedTable makes a batch."""

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(2, size, shape, generator=generator)

    return {
        "scenario": torch.randint(M, (BATCH,), generator=generator),
        "dense": torch.zeros(BATCH, 0),
        "features": {"user": ids(BATCH), "item": ids(BATCH), "history": ids(BATCH, HISTORY)},
        "label": torch.randint(2, (BATCH,), generator=generator).float(),
    }


def step_of(engine: str, size: int) -> Callable[[], None]:
    """One training step after another."""
    torch.manual_seed(0)
    options = TableOptions(engine)
    with table_options(options):
        model = SAML(SCHEMA, M, vocabulary_sizes={"user": size, "item": size})
    optimizers = Optimizers(model, 1e-3, 1e-5, options)
    generator = torch.Generator().manual_seed(1)
    batches = [batch_of(size, generator) for _ in range(READY_BATCHES)]
    done = 0

    def step() -> None:
        nonlocal done
        loss = model.loss(batches[done % READY_BATCHES])
        done += 1
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()

    step()
    return step


def measure(engine: str, sizes: Sequence[int], budget: float) -> list[dict[str, Any]]:
    """Seconds a step of every size, and the ratio to the first."""
    steps = {size: step_of(engine, size) for size in sizes}
    seconds = timing.interleave(steps, timing.Protocol(budget))
    found = []
    for size, values in seconds.items():
        summary, ratio = timing.summary(values), timing.ratio(values, seconds[sizes[0]])
        spread = {"median": summary.median, "p20": summary.p20, "p80": summary.p80, "rounds": summary.rounds}
        ratios = {"ratio": ratio.median, "ratio_p20": ratio.p20, "ratio_p80": ratio.p80}
        found.append({"engine": engine, "V": size, **spread, **ratios})
    return found


def table(record: Mapping[str, Any]) -> str:
    """Engines by V: milliseconds, and how many times the smallest V's."""
    sizes = [*SIZES, LARGEST]
    found = {(row["engine"], row["V"]): row for row in record["steps"]}

    def cell(engine: str, size: int) -> str:
        if (row := found.get((engine, size))) is None:
            return "–"
        spread = f" ({page.digits(row['ratio_p20'])}–{page.digits(row['ratio_p80'])})"
        return (
            f"{page.digits(row['median'] * 1e3)} ms, {page.digits(row['ratio'])}×{'' if size == SIZES[0] else spread}"
        )

    head = ["tables", *(f"V = {size:,}" for size in sizes)]
    return page.markdown(head, [[engine, *(cell(engine, size) for size in sizes)] for engine in ENGINES])


@click.command(help=__doc__)
@click.option("--budget", type=float, default=20.0, show_default=True, help="Seconds of rounds an engine.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--render", is_flag=True, help="Only the table of the page, from --out.")
def main(budget: float, out: Path, render: bool) -> None:
    torch.set_num_threads(1)
    if not render:
        record = records.head()
        del record["columns"]
        record |= {"M": M, "history": HISTORY, "batch": BATCH, "dim": DIM, "steps": [], "left_out": []}
        with timing.Others() as others:
            for engine in ENGINES:
                sizes = [size for size in SIZES if memory_of(engine, size) < 0.7 * available_memory()]
                record["steps"] += measure(engine, sizes, budget)
                # Beside the smallest alone, for its memory.
                if memory_of(engine, LARGEST) < 0.9 * available_memory():
                    record["steps"] += measure(engine, (SIZES[0], LARGEST), budget)[1:]
                else:
                    record["left_out"].append({"engine": engine, "V": LARGEST, "bytes": memory_of(engine, LARGEST)})
        record["others"] = others.share
        records.write(out, record)
    record = json.loads(out.read_text(encoding="utf-8"))
    PAGE.write_text(page.fill(PAGE.read_text(encoding="utf-8"), {"steps": table(record) + "\n"}), encoding="utf-8")


if __name__ == "__main__":
    main()
