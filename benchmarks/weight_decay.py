"""Weight decay by validation log loss, on three data sets and four models, with embedding tables decayed or not.

    python benchmarks/weight_decay.py              writes results/weight_decay.json and the table of docs/results.md
    python benchmarks/weight_decay.py --more       only what the result lacks
    python benchmarks/weight_decay.py --render     the table from the committed result

Early stopping with the command line's epochs and patience; no test row is scored. The third data set has few users and
items and little noise: there decay can only take away.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import polars
import torch

import page
import records
from saml_rec import load_schema
from saml_rec.comparison.compare import Summary
from saml_rec.data import prepare, write_ml100k
from saml_rec.datasets.synthetic import write_synthetic
from saml_rec.models.tables import DenseTable
from saml_rec.run_directory import differences
from saml_rec.training import TrainOptions, best_epoch, stopped_by, train_and_validate
from saml_rec.training.decay import WITHOUT_DECAY

RESULT: Final = records.RESULTS / "weight_decay.json"
PAGE: Final = page.DOCS / "results.md"
MODELS: Final = ("saml", "shared_bottom", "star", "mmoe")
DECAYS: Final = (0.0, 1.0, 3.0)
EVERYTHING: Final = "network and tables"
NETWORK: Final = "network"
SETTINGS: Final = (*((EVERYTHING, decay) for decay in DECAYS), (NETWORK, 3.0))
"""What is decayed, and how much."""
EPOCHS: Final = 30
PATIENCE: Final = 3
CLEAR_ROWS: Final = 10_000
BATCH_SIZES: Final = {"clear": 256}
"""Where the command line's default would make too few steps for EPOCHS."""


def write_clear(folder: Path) -> tuple[Path, Path]:
    """Rows whose label is the sign of a product of the user's and the item's number, and little noise."""
    draw = np.random.default_rng(0)
    users, items, scenarios = (draw.integers(0, count, CLEAR_ROWS) for count in (20, 15, 3))
    taste = draw.normal(size=20)[users] * draw.normal(size=15)[items] + 0.5 * (scenarios == 0)
    columns = {
        "label": (taste + 0.3 * draw.normal(size=CLEAR_ROWS) > 0).astype(int),
        "scenario": scenarios,
        "user": users,
        "item": items,
    }
    folder.mkdir()
    polars.DataFrame(columns).write_csv(folder / "clear.csv")
    schema = 'label = "label"\nscenario = "scenario"\n[features.user]\nkind = "sparse"\nscenario_aware = true\n'
    (folder / "clear.toml").write_text(f'{schema}[features.item]\nkind = "sparse"\n', encoding="utf-8")
    return folder / "clear.csv", folder / "clear.toml"


DATA: Final[dict[str, Callable[[Path], Sequence[Path]]]] = {
    "ml-100k": write_ml100k,
    "synthetic": lambda folder: write_synthetic(folder, smallest_share=0.05),
    "clear": write_clear,
}
"""What writes a table and its schema."""


@contextmanager
def decaying(reach: str) -> Iterator[None]:
    """Weight decay reaches dense tables inside, or does not."""
    before = dict(WITHOUT_DECAY)
    if reach == NETWORK:
        WITHOUT_DECAY[DenseTable] = ("weight",)
    else:
        WITHOUT_DECAY.pop(DenseTable, None)
    try:
        yield
    finally:
        WITHOUT_DECAY.clear()
        WITHOUT_DECAY.update(before)


def measure(out: Path, record: dict[str, Any], seeds: int) -> None:
    """Adds the cells that ``record["runs"]`` lacks; writes after every one."""
    known = {(row["decayed"], row["weight_decay"], row["data"], row["model"]) for row in record["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        prepared = {}
        for name, write in DATA.items():
            data_path, schema_path, *_ = write(Path(folder) / name)
            schema = load_schema(schema_path)
            prepared[name] = schema, prepare(data_path, schema, seed=0)
        for (reach, decay), name, model in product(SETTINGS, DATA, MODELS):
            if (reach, decay, name, model) in known:
                continue
            schema, data = prepared[name]
            batch_size = BATCH_SIZES.get(name, TrainOptions().batch_size)
            row: dict[str, Any] = {"data": name, "model": model, "decayed": reach, "weight_decay": decay}
            histories = []
            for seed in range(seeds):
                options = TrainOptions(
                    model=model,
                    seed=seed,
                    batch_size=batch_size,
                    weight_decay=decay,
                    epochs=EPOCHS,
                    patience=PATIENCE,
                    device="cpu",
                )
                with decaying(reach):
                    histories.append(train_and_validate(data, schema, options))
            best = [best_epoch(history) for history in histories]
            row["valid_logloss"] = Summary.of(
                [history[epoch - 1]["valid"]["logloss"] for history, epoch in zip(histories, best, strict=True)]
            ).to_dict()
            row["best_epochs"] = best
            row["stopped_by"] = [stopped_by(history, options) for history in histories]
            record["runs"].append(row)
            click.echo(json.dumps(row))
            records.write(out, record)


def table(record: dict[str, Any]) -> str:
    """Data set, model and what is decayed by weight decay: validation log loss, mean over seeds, the best one bold."""
    found = {(row["data"], row["model"], row["decayed"], row["weight_decay"]): row for row in record["runs"]}
    head = ["data", "model", "decayed", *(f"{decay:g}" for decay in DECAYS)]
    rows = []
    for data, model in dict.fromkeys((row["data"], row["model"]) for row in record["runs"]):
        means = {
            setting: found[data, model, *setting]["valid_logloss"]["mean"]
            for setting in SETTINGS
            if (data, model, *setting) in found
        }
        reaches = (EVERYTHING, NETWORK) if any(reach == NETWORK for reach, _ in means) else (EVERYTHING,)
        for reach in reaches:
            shown = [means.get((reach, decay)) for decay in DECAYS]
            cells = ["" if mean is None else f"{mean:.4f}" for mean in shown]
            best = min(means.values())
            rows.append(
                [data, model, reach]
                + [f"**{cell}**" if mean == best else cell for cell, mean in zip(cells, shown, strict=True)]
            )
    return page.markdown(head, rows)


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(2), default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, show_default=True)
@click.option("--more", is_flag=True, help="Keeps what stands in --out, and adds what it lacks.")
@click.option("--render", is_flag=True, help="Only the table of the page, from --out.")
def main(seeds: int, out: Path, more: bool, render: bool) -> None:
    torch.set_num_threads(1)
    same = {"seeds": seeds, "epochs": EPOCHS, "patience": PATIENCE}
    if not render:
        record = records.head()
        del record["columns"]
        if more:
            earlier = json.loads(out.read_text(encoding="utf-8"))
            if changes := differences({name: earlier[name] for name in same}, same):
                raise click.BadParameter("; ".join(changes), param_hint="--more")
            record = earlier | {"continued": [*earlier.get("continued", []), record]}
        else:
            record |= same | {"runs": []}
        measure(out, record, seeds)
    record = json.loads(out.read_text(encoding="utf-8"))
    PAGE.write_text(page.fill(PAGE.read_text(encoding="utf-8"), {"decay": table(record) + "\n"}), encoding="utf-8")


if __name__ == "__main__":
    main()
