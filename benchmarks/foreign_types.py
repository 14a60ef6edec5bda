"""What rounding the other scenarios' branches costs SAML: AUC of test rows, and how far logits move.

Per type of the foreign branches (full, bfloat16, int8) the model trained in full precision and served in that type, and
the one that trained and is served in it, 5 seeds on MovieLens-100k. Differences are of the same seed.

    python benchmarks/foreign_types.py             writes results/foreign_types.json and the table of docs/results.md
    python benchmarks/foreign_types.py --render    the table from the committed result
"""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from numpy.typing import NDArray

import page
import records
from accuracy import DATA_SETS
from saml_rec import load_schema
from saml_rec.data import PreparedData, prepare
from saml_rec.data.schema import Schema
from saml_rec.evaluation.metrics import score_rows
from saml_rec.evaluation.scoring import labelled_rows, load_trained, score
from saml_rec.models.construction import build_model
from saml_rec.models.saml import FOREIGN_TYPES, SAML
from saml_rec.training import TrainOptions, train

RESULT: Final = records.RESULTS / "foreign_types.json"
PAGE: Final = page.DOCS / "results.md"
NAMES: Final = ("age", "occupation")
PLACE: Final = "foreign types"


def logits_in(model: torch.nn.Module, foreign_type: str, data: PreparedData) -> NDArray[np.float64]:
    """Of the test rows, with the foreign branches in that type."""
    assert isinstance(model, SAML)
    model.trunk.foreign_dtype = FOREIGN_TYPES[foreign_type]
    return score(model, data.tables["test"], torch.device("cpu"))


def distance(logits: NDArray[np.float64], full: NDArray[np.float64]) -> float:
    """‖logits − full‖ / ‖full‖."""
    return float(np.linalg.norm(logits - full) / np.linalg.norm(full))


def measure_seed(data: PreparedData, schema: Schema, options: TrainOptions, folder: Path) -> list[records.Record]:
    """A row a type."""
    rows = labelled_rows(data.tables["test"])
    torch.manual_seed(options.seed)
    initial = build_model("saml", {}, schema, data.encoder).eval()
    trained: dict[str, torch.nn.Module] = {}
    for foreign_type in FOREIGN_TYPES:
        run = folder / f"{foreign_type}-{options.seed}"
        train(data, schema, replace(options, model_options={"foreign_type": foreign_type}), run)
        model = load_trained(run, device="cpu").model
        assert isinstance(model, torch.nn.Module)
        trained[foreign_type] = model
    started, full = logits_in(initial, "full", data), logits_in(trained["full"], "full", data)
    found = []
    for foreign_type in FOREIGN_TYPES:
        served = logits_in(trained["full"], foreign_type, data)
        own = logits_in(trained[foreign_type], foreign_type, data)
        found.append(
            {
                "seed": options.seed,
                "foreign_type": foreign_type,
                "distance_initial": distance(logits_in(initial, foreign_type, data), started),
                "distance_trained": distance(served, full),
                "auc_served": score_rows(rows, served)["auc"],
                "auc_trained": score_rows(rows, own)["auc"],
            }
        )
    return found


def measure(seeds: int) -> records.Record:
    """The content of the results file."""
    record: records.Record = records.training_head() | {"seeds": seeds, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            data_path, schema_path, *_ = DATA_SETS[name].write(Path(folder) / name)
            schema = load_schema(schema_path)
            data = prepare(data_path, schema, seed=0)
            for seed in range(seeds):
                options = TrainOptions(model="saml", device="cpu", seed=seed)
                for row in measure_seed(data, schema, options, Path(folder) / f"{name}-runs"):
                    record["runs"].append({"data": name} | row)
                    click.echo(json.dumps(record["runs"][-1]))
    return record


def table(record: records.Record) -> str:
    """A line a data set and type: distances of logits, and what the type adds to the AUC of the same seed."""
    runs = {(row["data"], row["foreign_type"], row["seed"]): row for row in record["runs"]}
    seeds = range(record["seeds"])

    def gain(name: str, foreign_type: str, key: str) -> str:
        each = [runs[name, foreign_type, seed][key] - runs[name, "full", seed][key] for seed in seeds]
        error = statistics.stdev(each) / len(each) ** 0.5
        return f"{statistics.mean(each):+.5f} ± {error:.5f}"

    def mean(name: str, foreign_type: str, key: str) -> float:
        return statistics.mean(runs[name, foreign_type, seed][key] for seed in seeds)

    lines: list[list[Any]] = []
    for name in dict.fromkeys(row["data"] for row in record["runs"]):
        for foreign_type in list(FOREIGN_TYPES)[1:]:
            lines.append(
                [
                    name,
                    f"`{foreign_type}`",
                    f"{mean(name, foreign_type, 'distance_initial'):.1e}",
                    f"{mean(name, foreign_type, 'distance_trained'):.1e}",
                    f"{mean(name, 'full', 'auc_trained'):.4f}",
                    gain(name, foreign_type, "auc_served"),
                    gain(name, foreign_type, "auc_trained"),
                ]
            )
    head = [
        "",
        "foreign branches",
        "logits move, initial",
        "trained",
        "AUC in full",
        "served so adds",
        "trained so adds",
    ]
    return page.markdown(head, lines)


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--render", is_flag=True, help="Only the table of the page, from the committed result.")
def main(seeds: int, render: bool) -> None:
    torch.set_num_threads(1)
    if not render:
        records.write(RESULT, measure(seeds))
    text = table(json.loads(RESULT.read_text(encoding="utf-8"))) + "\n"
    PAGE.write_text(page.fill(PAGE.read_text(encoding="utf-8"), {PLACE: text}), encoding="utf-8")


if __name__ == "__main__":
    main()
