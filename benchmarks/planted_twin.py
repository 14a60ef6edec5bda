"""Does the mutual unit find a scenario's twin, and does the small one of the two gain from it?

Six scenarios of unrelated tastes, but that the last and smallest has the taste of one other, its twin
(saml_rec.datasets.synthetic, relation "twin"). A mutual unit that works gives the twin the weight, and the small
scenario an AUC that its own few rows cannot. Every data set has its own twin, items, users and initial weights; every
variant is trained on all of them, and variants are compared data set by data set.

    python benchmarks/planted_twin.py            # writes benchmarks/results/planted_twin.json and docs/synthetic.md
    python benchmarks/planted_twin.py --render   # makes the tables of docs/synthetic.md from it again

A training that is finished under --runs is not repeated.
"""

import json
import math
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from rich.console import Console

import page as pages
import records
from records import Record
from saml_rec import Schema
from saml_rec.data import PreparedData, prepare, write_synthetic
from saml_rec.evaluation.mutual_weights import mean_mutual_weights
from saml_rec.evaluation.scoring import load_trained
from saml_rec.files import check_output_file
from saml_rec.run_directory import RunDirectory
from saml_rec.training import TrainOptions, train

RESULTS: Final = records.RESULTS / "planted_twin.json"
PAGE: Final = pages.DOCS / "synthetic.md"
SCENARIOS: Final = 6
# Half of the rows are test rows: a scenario of half a percent is measured on few rows otherwise.
SPLIT: Final = (0.4, 0.1, 0.5)
SHARES: Final = (0.005, 0.02, 0.05)
BASE: Final = "paper"
SHORT: Final[Mapping[str, Any]] = {"epochs": 30, "patience": 3}
LONG: Final[Mapping[str, Any]] = {"epochs": 100, "patience": 15}


@dataclass(frozen=True)
class Variant:
    """One way to serve the scenarios.

    Args:
        label: in the tables.
        options: hyperparameters that differ from the paper's form.
        model: a name in MODELS.
        length: how long it may train.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "saml"
    length: Mapping[str, Any] = field(default_factory=lambda: SHORT)


PAPER: Final[Mapping[str, Any]] = {
    "scenario_dim": 0,
    "branch_views": "own",
    "branch_init": "independent",
    "score": "ratio",
    "mutual_layers": (1,),
}
EACH_SHARED: Final[Mapping[str, Any]] = {"branch_views": "each", "branch_init": "shared"}
VARIANTS: Final[dict[str, Variant]] = {
    BASE: Variant("the paper's form"),
    "each": Variant("views each", {"branch_views": "each"}),
    "shared": Variant("shared start", {"branch_init": "shared"}),
    "each_shared": Variant("views each, shared start", EACH_SHARED),
    "softmax": Variant("views each, shared start, softmax", {**EACH_SHARED, "score": "softmax"}),
    "softmax_all": Variant("the same, after both layers", {**EACH_SHARED, "score": "softmax", "mutual_layers": (1, 2)}),
    "none": Variant("no mutual unit", {"mutual_layers": ()}),
    "none_shared": Variant("no mutual unit, shared start", {"mutual_layers": (), "branch_init": "shared"}),
    "paper_long": Variant("the paper's form, longer", length=LONG),
    "none_long": Variant("no mutual unit, longer", {"mutual_layers": ()}, length=LONG),
    "softmax_long": Variant(
        "views each, shared start, softmax, longer", {**EACH_SHARED, "score": "softmax"}, length=LONG
    ),
    "none_shared_long": Variant(
        "no mutual unit, shared start, longer", {"mutual_layers": (), "branch_init": "shared"}, length=LONG
    ),
}
WITHOUT: Final[Mapping[str, str]] = {
    BASE: "none",
    "shared": "none_shared",
    "each_shared": "none_shared",
    "softmax": "none_shared",
    "softmax_all": "none_shared",
    "paper_long": "none_long",
    "softmax_long": "none_shared_long",
}
"""Variants with a mutual unit, and what they are without it."""


def schema_text(text: str) -> str:
    """The synthetic schema with the study's split."""
    return "\n".join(f"split = {list(SPLIT)}" if line.startswith("split =") else line for line in text.splitlines())


def run_variant(variant: Variant, data: PreparedData, schema: Schema, out: Path, seed: int, training: Record) -> Record:
    """Trains unless ``out`` holds the finished run; its measures and what its mutual units weigh."""
    model_options = {**PAPER, **variant.options} if variant.model == "saml" else dict(variant.options)
    options = TrainOptions(
        model=variant.model, seed=seed, model_options=model_options, **{**variant.length, **training}
    )
    result = train(data, schema, options, out, resume=RunDirectory(out).started)
    trained = load_trained(out)
    weights = mean_mutual_weights(trained.model, data.tables["test"], trained.device) or {}
    scenarios = result.metrics["scenarios"]
    return {
        "overall": result.metrics["overall"]["auc"],
        "small": list(scenarios.values())[-1]["auc"],
        "valid": result.metrics["valid"]["logloss"],
        "best_epoch": result.metrics["best_epoch"],
        "epochs": result.metrics["epochs"],
        # Of the smallest scenario's rows: the weights of the others, by mutual layer.
        "weights": {str(layer): [float(f"{w:.4g}") for w in alpha[-1, :-1]] for layer, alpha in weights.items()},
    }


def measure(share: float, seed: int, rows: int, training: Record, runs: Path, console: Console) -> Record:
    """One data set: its twin, and every variant on it."""
    folder = runs / f"share-{share}-seed-{seed}"
    data_path, schema_path, planted_path = write_synthetic(
        folder, scenarios=SCENARIOS, rows=rows, seed=seed, smallest_share=share, relation="twin"
    )
    planted = json.loads(planted_path.read_text(encoding="utf-8"))
    schema = Schema.from_dict(
        tomllib.loads(schema_text(schema_path.read_text(encoding="utf-8"))), source=str(schema_path)
    )
    data = prepare(data_path, schema, seed=0)
    results: dict[str, Record] = {}
    for name, variant in VARIANTS.items():
        results[name] = run_variant(variant, data, schema, folder / name, seed, training)
        console.print(f"share {share}, data set {seed}, {name}: {results[name]}", highlight=False, soft_wrap=True)
    bayes = list(planted["bayes"]["scenarios"].values())[-1]["auc"]
    twin = int(np.array(planted["relation"])[-1].argmax())
    return {"share": share, "seed": seed, "twin": twin, "bayes": bayes, "results": results}


def paired(values: Sequence[float]) -> str:
    """Mean ± standard error of differences data set by data set; bold where the mean exceeds two of them."""
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    text = f"{mean:+.4f} ± {error:.4f}"
    return f"**{text}**" if abs(mean) > 2 * error else text


def _differences(record: Record, name: str, measure: str, other: str = BASE) -> list[str]:
    """Of every share, and of all: there the mean over shares of each seed, whose data sets have much in common."""
    by_share = {
        share: [
            cell["results"][name][measure] - cell["results"][other][measure]
            for cell in record["cells"]
            if cell["share"] == share
        ]
        for share in record["shares"]
    }
    by_seed = [statistics.mean(values) for values in zip(*by_share.values(), strict=True)]
    return [paired(values) for values in (*by_share.values(), by_seed)]


def _gains(record: Record, measure: str) -> str:
    shares = record["shares"]
    head = ["", *(f"{share:.1%}" for share in shares), "all"]
    cells = record["cells"]
    base = [[cell["results"][BASE][measure] for cell in cells if cell["share"] == share] for share in shares]
    means = [statistics.mean(values) for values in (*base, [v for values in base for v in values])]
    rows = [[f"{record['variants'][BASE]}, AUC", *(f"{mean:.4f}" for mean in means)]]
    for name, label in record["variants"].items():
        if name != BASE:
            rows.append([label, *_differences(record, name, measure)])
    if measure == "small":
        true = [statistics.mean(cell["bayes"] for cell in cells if cell["share"] == share) for share in shares]
        rows.append(["true probabilities, AUC", *(f"{value:.4f}" for value in true), f"{statistics.mean(true):.4f}"])
    return pages.markdown(head, rows) + "\n"


def small_table(record: Record) -> str:
    """AUC of the small scenario: the paper's form, and what variants add to it."""
    return _gains(record, "small")


def overall_table(record: Record) -> str:
    """The same over all rows."""
    return _gains(record, "overall")


def mutual_table(record: Record) -> str:
    """AUC of the small scenario with a mutual unit minus without one, the start and the length the same."""
    rows = []
    for name, other in WITHOUT.items():
        if name not in record["variants"]:
            continue
        label = f"{record['variants'][name]} − {record['variants'][other]}"
        rows.append([label, *_differences(record, name, "small", other)])
    return pages.markdown(["", *(f"{share:.1%}" for share in record["shares"]), "all"], rows) + "\n"


def weight_table(record: Record) -> str:
    """What the small scenario's rows give their twin, and how often it gets most."""
    rows = []
    for name, label in record["variants"].items():
        for layer in record["cells"][0]["results"][name]["weights"]:
            line = [label + (f", layer {layer}" if len(record["cells"][0]["results"][name]["weights"]) > 1 else "")]
            for share in record["shares"]:
                cells = [cell for cell in record["cells"] if cell["share"] == share]
                alpha = [cell["results"][name]["weights"][layer] for cell in cells]
                on_twin = [row[cell["twin"]] for row, cell in zip(alpha, cells, strict=True)]
                first = sum(max(row) == row[cell["twin"]] for row, cell in zip(alpha, cells, strict=True))
                error = statistics.stdev(on_twin) / math.sqrt(len(on_twin))
                line.append(f"{statistics.mean(on_twin):.2f} ± {error:.2f}, {first} of {len(cells)}")
            rows.append(line)
    return pages.markdown(["", *(f"{share:.1%}" for share in record["shares"])], rows) + "\n"


def setting_table(record: Record) -> str:
    facts = ("command", "rows", "train_rows", "data_sets", "training", "processor", "threads")
    rows = [[name.replace("_", " "), f"`{record[name]}`"] for name in facts]
    return pages.markdown(["", ""], rows) + "\n"


TABLES: Final[dict[str, Callable[[Record], str]]] = {
    "twin small": small_table,
    "twin overall": overall_table,
    "twin mutual": mutual_table,
    "twin weights": weight_table,
    "twin setting": setting_table,
}


def render(page: str, record: Record) -> str:
    """The page with the study's tables made anew."""
    return pages.fill(page, {f"table:{name}": table(record) for name, table in TABLES.items()})


def study(data_sets: int, rows: int, training: Record, runs: Path) -> Record:
    """Trains everything; the content of the results file."""
    console = Console()
    cells = [measure(share, seed, rows, training, runs, console) for seed in range(data_sets) for share in SHARES]
    return {
        **records.training_head(),
        "rows": rows,
        "train_rows": round(SPLIT[0] * rows),
        "data_sets": data_sets,
        "training": training,
        "shares": list(SHARES),
        "variants": {name: variant.label for name, variant in VARIANTS.items()},
        "cells": cells,
    }


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--data-sets", type=click.IntRange(2), default=10)
@click.option("--rows", type=click.IntRange(1), default=40_000)
@click.option("--batch-size", type=click.IntRange(1), default=TrainOptions().batch_size)
@click.option("--weight-decay", type=float, default=TrainOptions().weight_decay)
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/planted_twin"))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--render", "only_render", is_flag=True, help="Only the page, from the results")
def main(
    data_sets: int, rows: int, batch_size: int, weight_decay: float, runs: Path, out: Path, only_render: bool
) -> None:
    if not only_render:
        check_output_file(out)
        training = {"batch_size": batch_size, "weight_decay": weight_decay}
        records.write(out, study(data_sets, rows, training, runs))
    if out == RESULTS:
        record = json.loads(out.read_text(encoding="utf-8"))
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
