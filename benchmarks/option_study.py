"""One option of training at several values, by validation log loss: data sets, models, and the table of a study.

Everything else is the command line's default; no test row is scored.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import click
import torch

import page
import records
from flights import write_flights
from package_tables import write_lectures
from saml_rec import load_schema
from saml_rec.comparison.compare import Summary
from saml_rec.data import prepare, write_ml100k, write_synthetic
from saml_rec.models.registry import hyperparameters
from saml_rec.training import TrainOptions, best_epoch, train_and_validate

PAGE: Final = page.DOCS / "results.md"
DATA: Final[dict[str, Callable[[Path], Sequence[Path]]]] = {
    "occupation": lambda folder: write_ml100k(folder, scenario="occupation"),
    "synthetic": lambda folder: write_synthetic(folder, scenarios=6, rows=40_000, smallest_share=0.05, seed=100),
    "flights": write_flights,
    "lectures": write_lectures,
}
"""What writes a table and its schema."""


@dataclass(frozen=True)
class Study:
    """What is tried.

    Args:
        option: of training, or a hyperparameter that all the models have.
        values: the first is what others are compared with.
        models: names in MODELS.
        resolve: a value and M → what the option is given.
        name: of the result; that of the option unless given.
        data: in DATA.
    """

    option: str
    values: Sequence[Any]
    models: Sequence[str]
    resolve: Callable[[Any, int], Any] = lambda value, scenarios: value
    name: str | None = None
    data: Sequence[str] = ("occupation", "synthetic")

    @property
    def result(self) -> Path:
        """Where its record is committed."""
        return records.RESULTS / f"{self.name or self.option}.json"

    def options(self, model: str, value: Any, scenarios: int) -> TrainOptions:
        """Of a run with M scenarios, but for the seed."""
        common = TrainOptions(model=model, device="cpu")
        value = self.resolve(value, scenarios)
        if self.option in hyperparameters(model):
            return replace(common, model_options={self.option: value})
        return replace(common, **{self.option: value})


def measure(study: Study, out: Path, record: dict[str, Any], seeds: int) -> None:
    """Adds the cells that ``record["runs"]`` lacks; writes after every one."""
    known = {(row["data"], row["model"], row[study.option]) for row in record["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        for name in study.data:
            data_path, schema_path, *_ = DATA[name](Path(folder) / name)
            schema = load_schema(schema_path)
            data = prepare(data_path, schema, seed=0)
            for model, value in product(study.models, study.values):
                if (name, model, value) in known:
                    continue
                common = study.options(model, value, data.encoder.num_scenarios)
                histories = [train_and_validate(data, schema, replace(common, seed=seed)) for seed in range(seeds)]
                best = [best_epoch(history) for history in histories]
                found = zip(histories, best, strict=True)
                losses = [history[epoch - 1]["valid"]["logloss"] for history, epoch in found]
                row = {
                    "data": name,
                    "scenarios": data.encoder.num_scenarios,
                    "model": model,
                    study.option: value,
                    "valid_logloss": Summary.of(losses).to_dict(),
                    "best_epochs": best,
                }
                record["runs"].append(row)
                click.echo(json.dumps(row))
                records.write(out, record)


def table(study: Study, record: dict[str, Any], label: Callable[[Any], str]) -> str:
    """Log loss at the first value, and what others add: a line a model and their mean; of one model a line a value."""
    found = {(row["data"], row["model"], row[study.option]): row["valid_logloss"]["mean"] for row in record["runs"]}
    names = dict.fromkeys((row["data"], row["scenarios"]) for row in record["runs"])
    heads = [f"{name}, M = {scenarios}" for name, scenarios in names]
    first, *others = study.values

    def added(name: str, model: str, value: Any) -> float:
        return float(found[name, model, value] - found[name, model, first])

    if len(study.models) == 1:
        (model,) = study.models
        start = [label(first), *(f"{found[name, model, first]:.4f}" for name, _ in names)]
        rest = [[label(value), *(f"{added(name, model, value):+.4f}" for name, _ in names)] for value in others]
        return page.markdown(["", *heads], [start, *rest])
    head = [""]
    for each in heads:
        head += [f"{each}: {label(first)}", *(f"{label(value)} adds" for value in others)]
    rows = []
    for model in study.models:
        line = [model]
        for name, _ in names:
            line += [f"{found[name, model, first]:.4f}", *(f"{added(name, model, value):+.4f}" for value in others)]
        rows.append(line)
    means = ["mean"]
    for name, _ in names:
        gains = ([added(name, model, value) for model in study.models] for value in others)
        means += ["", *(f"{statistics.mean(each):+.4f}" for each in gains)]
    return page.markdown(head, [*rows, means])


def command(study: Study, place: str, label: Callable[[Any], str], text: str | None) -> click.Command:
    """The command of a study, which fills ``<!-- place -->`` of docs/results.md."""

    @click.command(help=text)
    @click.option("--seeds", type=click.IntRange(2), default=2, show_default=True)
    @click.option("--out", type=click.Path(path_type=Path), default=study.result)
    @click.option("--more", is_flag=True, help="Keeps what stands in --out, and adds what it lacks.")
    @click.option("--render", is_flag=True, help="Only the table of the page, from --out.")
    def main(seeds: int, out: Path, more: bool, render: bool) -> None:
        torch.set_num_threads(1)
        if not render:
            record = records.training_head() | {"seeds": seeds, "runs": []}
            if more:
                record["runs"] = json.loads(out.read_text(encoding="utf-8"))["runs"]
            measure(study, out, record, seeds)
        record = json.loads(out.read_text(encoding="utf-8"))
        filled = page.fill(PAGE.read_text(encoding="utf-8"), {place: table(study, record, label) + "\n"})
        PAGE.write_text(filled, encoding="utf-8")

    return main
