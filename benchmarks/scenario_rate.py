"""How fast the parameters of single scenarios should learn, by validation log loss.

Every network that has such parameters, with their learning rate a share of the others': 1, and 1/√M for M scenarios.

    python benchmarks/scenario_rate.py              writes results/scenario_rate.json and the table of docs/results.md
    python benchmarks/scenario_rate.py --more       only what the result lacks
    python benchmarks/scenario_rate.py --render     the table from the committed result

Otherwise the command line's defaults; no test row is scored.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import click
import torch

import page
import records
from saml_rec import load_schema
from saml_rec.comparison.compare import Summary
from saml_rec.data import prepare, write_ml100k, write_synthetic
from saml_rec.training import TrainOptions, best_epoch, train_and_validate

RESULT: Final = records.RESULTS / "scenario_rate.json"
PAGE: Final = page.DOCS / "results.md"
MODELS: Final = ("saml", "star", "hmoe", "mmoe", "ple", "pepnet", "shared_bottom", "per_scenario")
RATES: Final[tuple[float | None, ...]] = (1.0, None)
DATA: Final[dict[str, Callable[[Path], Sequence[Path]]]] = {
    "occupation": lambda folder: write_ml100k(folder, scenario="occupation"),
    "synthetic": lambda folder: write_synthetic(folder, scenarios=6, rows=40_000, smallest_share=0.05, seed=100),
    "age": lambda folder: write_ml100k(folder, scenario="age"),
}
"""What writes a table and its schema."""


def measure(out: Path, record: dict[str, Any], seeds: int) -> None:
    """Adds the cells that ``record["runs"]`` lacks; writes after every one."""
    known = {(row["data"], row["model"], row["scenario_rate"]) for row in record["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in DATA.items():
            data_path, schema_path, *_ = write(Path(folder) / name)
            schema = load_schema(schema_path)
            data = prepare(data_path, schema, seed=0)
            for model, rate in product(MODELS, RATES):
                if (name, model, rate) in known:
                    continue
                options = [
                    TrainOptions(model=model, seed=seed, scenario_rate=rate, device="cpu") for seed in range(seeds)
                ]
                histories = [train_and_validate(data, schema, each) for each in options]
                best = [best_epoch(history) for history in histories]
                losses = [
                    history[epoch - 1]["valid"]["logloss"] for history, epoch in zip(histories, best, strict=True)
                ]
                row = {
                    "data": name,
                    "scenarios": data.encoder.num_scenarios,
                    "model": model,
                    "scenario_rate": rate,
                    "valid_logloss": Summary.of(losses).to_dict(),
                    "best_epochs": best,
                }
                record["runs"].append(row)
                click.echo(json.dumps(row))
                records.write(out, record)


def table(record: dict[str, Any]) -> str:
    """Per model and data set the log loss at rate 1 and what 1/√M adds to it; the mean over models below."""
    found = {(row["data"], row["model"], row["scenario_rate"]): row["valid_logloss"]["mean"] for row in record["runs"]}
    names = list(dict.fromkeys((row["data"], row["scenarios"]) for row in record["runs"]))
    rows = []
    for model in MODELS:
        line = [model]
        for name, _ in names:
            one, less = (found[name, model, rate] for rate in RATES)
            line += [f"{one:.4f}", f"{less - one:+.4f}"]
        rows.append(line)
    means: list[str] = ["mean"]
    for name, _ in names:
        means += ["", f"{statistics.mean(found[name, m, None] - found[name, m, 1.0] for m in MODELS):+.4f}"]
    head = [""]
    for name, scenarios in names:
        head += [f"{name}, M = {scenarios}: rate 1", "1/√M adds"]
    return page.markdown(head, [*rows, means])


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(2), default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--more", is_flag=True, help="Keeps what stands in --out, and adds what it lacks.")
@click.option("--render", is_flag=True, help="Only the table of the page, from --out.")
def main(seeds: int, out: Path, more: bool, render: bool) -> None:
    torch.set_num_threads(1)
    if not render:
        record = records.training_head() | {"seeds": seeds, "runs": []}
        if more:
            record["runs"] = json.loads(out.read_text(encoding="utf-8"))["runs"]
        measure(out, record, seeds)
    record = json.loads(out.read_text(encoding="utf-8"))
    filled = page.fill(PAGE.read_text(encoding="utf-8"), {"scenario rate": table(record) + "\n"})
    PAGE.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
