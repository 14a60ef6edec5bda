"""Accuracy of SAML on MovieLens 100k with dense tables and with tables trained by row-wise Adagrad, side by side.

    python benchmarks/table_accuracy.py              writes results/table_accuracy.json and the table of docs/tables.md
    python benchmarks/table_accuracy.py --render     the table from the committed result

The same split, seeds and epochs at most; early stopping by the validation log loss in all. Dense tables have AdamW's
weight decay, 3 as chosen in docs/results.md or the default; the others have none, and a learning rate of their own.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Final

import click
import torch

import page
import records
from saml_rec import load_schema
from saml_rec.comparison.compare import Summary
from saml_rec.data import prepare, write_ml100k
from saml_rec.training import TrainOptions, train

RESULT: Final = records.RESULTS / "table_accuracy.json"
PAGE: Final = page.DOCS / "tables.md"
DENSE_DECAYS: Final = (1e-5, 3.0)
RATES: Final = (0.005, 0.01, 0.02, 0.05)
METRICS: Final = ("auc", "logloss")


def variants() -> dict[str, dict[str, Any]]:
    """Training options by what the table calls them."""
    dense = {f"dense, weight decay {decay:g}": {"tables": "dense", "weight_decay": decay} for decay in DENSE_DECAYS}
    # The network's weight decay is that of the better dense variant.
    rest = {"tables": "fbgemm", "weight_decay": DENSE_DECAYS[-1]}
    return dense | {f"fbgemm, learning rate {rate:g}": rest | {"table_learning_rate": rate} for rate in RATES}


def measure(seeds: int) -> list[dict[str, Any]]:
    """Per variant the validation and test metrics of every seed."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data_path, schema_path = write_ml100k(Path(folder))
        schema = load_schema(schema_path)
        data = prepare(data_path, schema, seed=0)
        for name, options in variants().items():
            runs = []
            for seed in range(seeds):
                chosen = TrainOptions(seed=seed, device="cpu", **options)
                runs.append(train(data, schema, chosen, Path(folder) / "run", overwrite=True).metrics)
            row: dict[str, Any] = {"variant": name}
            row |= {"best_epochs": [run["best_epoch"] for run in runs]}
            for split, place in (("valid", "valid"), ("test", "overall")):
                row[split] = {metric: Summary.of([run[place][metric] for run in runs]).to_dict() for metric in METRICS}
            found.append(row)
            click.echo(f"{name}: {row['test']}")
    return found


def table(record: dict[str, Any]) -> str:
    """Variants by metrics, mean ± deviation over seeds."""

    def cell(summary: dict[str, float]) -> str:
        return f"{summary['mean']:.4f} ± {summary['deviation']:.4f}"

    head = ["tables", "valid log loss", "test AUC", "test log loss", "best epochs"]
    rows = [
        [
            row["variant"],
            cell(row["valid"]["logloss"]),
            cell(row["test"]["auc"]),
            cell(row["test"]["logloss"]),
            ", ".join(map(str, row["best_epochs"])),
        ]
        for row in record["variants"]
    ]
    return page.markdown(head, rows)


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--render", is_flag=True, help="Only the table of the page, from --out.")
def main(seeds: int, out: Path, render: bool) -> None:
    torch.set_num_threads(1)
    if not render:
        record = records.head()
        del record["columns"]
        records.write(out, record | {"seeds": seeds, "variants": measure(seeds)})
    record = json.loads(out.read_text(encoding="utf-8"))
    PAGE.write_text(page.fill(PAGE.read_text(encoding="utf-8"), {"accuracy": table(record) + "\n"}), encoding="utf-8")


if __name__ == "__main__":
    main()
