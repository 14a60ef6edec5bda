"""Which model serves the scenarios best: all of them on seven data sets, with equal budgets.

Every model has its default options, the same epochs and patience, and the same seeds; the best epoch is chosen on the
validation rows. Each data set is compared twice: as the models are by default, and with local tables for every model
that may read them, so that a difference from SAML can be told from one of tables.

    python benchmarks/accuracy.py                  # writes benchmarks/results/accuracy_*.json and docs/results.md
    python benchmarks/accuracy.py --data-set age   # one of them
    python benchmarks/accuracy.py --render         # makes the tables of docs/results.md from the results again

A training that is finished under --runs is not repeated.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

import page as pages
import records
from flights import write_flights
from package_tables import write_films, write_lectures
from records import Record
from saml_rec import load_schema
from saml_rec.comparison import compare
from saml_rec.data import PreparedData, prepare, write_ml100k, write_synthetic
from saml_rec.files import check_output_file
from saml_rec.models.registry import hyperparameters, installed_models
from saml_rec.training import TrainOptions

PAGE: Final = pages.DOCS / "results.md"
SHOWN: Final = ("auc", "logloss")
"""Metrics whose differences are kept."""
KEPT: Final = (*SHOWN, "gauc", "predicted_over_observed", "pr_auc")
"""Metrics that are kept, where they are defined."""
TABLES_OF: Final[Mapping[str, bool | None]] = {"default": None, "local": True}
"""Tables of the models in the two comparisons: whether they are local; None for each model's own default."""
LOCAL_SEEDS: Final = 3
"""At most, of the comparison with local tables."""


@dataclass(frozen=True)
class DataSet:
    """Rows to compare models on.

    Args:
        title: in the page.
        write: writes the table and its schema into a directory, and gives their paths first.
    """

    title: str
    write: Callable[[Path], Sequence[Path]]


DATA_SETS: Final[Mapping[str, DataSet]] = {
    "age": DataSet("MovieLens-100k by age group", lambda out: write_ml100k(out, scenario="age")),
    "occupation": DataSet("MovieLens-100k by occupation", lambda out: write_ml100k(out, scenario="occupation")),
    "synthetic": DataSet(
        "synthetic, tastes shared to drawn degrees",
        lambda out: write_synthetic(out, scenarios=6, rows=40_000, smallest_share=0.02),
    ),
    "twin": DataSet(
        "synthetic, one planted twin",
        lambda out: write_synthetic(out, scenarios=6, rows=40_000, smallest_share=0.02, relation="twin"),
    ),
    "flights": DataSet("flights from New York by carrier", write_flights),
    "lectures": DataSet("lectures of ETH Zurich by department", write_lectures),
    "films": DataSet("films by decade", write_films),
}


def results_of(name: str) -> Path:
    """Where a data set's results are committed."""
    return records.RESULTS / f"accuracy_{name}.json"


def measure(name: str, seeds: int, runs: Path, console: Console) -> Record:
    """Both comparisons on one data set; the content of its results file."""
    folder = runs / name
    data_path, schema_path, *_ = DATA_SETS[name].write(folder / "data")
    schema = load_schema(schema_path)
    data = prepare(data_path, schema, seed=0)
    comparisons = {}
    for tables, local in TABLES_OF.items():
        models = [model for model in installed_models() if local is None or "local_features" in hyperparameters(model)]
        changes: dict[str, dict[str, Any]] = {
            model: {"local_features": local}
            for model in models
            if local is not None and hyperparameters(model)["local_features"] != local
        }
        out = folder / tables
        of_these = seeds if local is None else min(seeds, LOCAL_SEEDS)
        record = compare(data, schema, models, of_these, TrainOptions(), out, changes=changes, console=console)
        comparisons[tables] = condense(record)
    return {**records.training_head(), "seeds": seeds, "rows": rows_of(data), "comparisons": comparisons}


def rows_of(data: PreparedData) -> Record:
    """Rows of every split, by scenario, and how many of a split's users the training rows know."""
    names = data.encoder.scenario_names
    return {
        split: {"rows": len(table), "scenarios": dict(zip(names, table.scenario_counts().tolist(), strict=True))}
        for split, table in data.tables.items()
    }


def condense(record: Record) -> Record:
    """Of compare.json what the page shows, and the differences from the best network and from SAML, in five digits."""
    models = {
        name: {
            "overall": {metric: _short(model["overall"][metric]) for metric in KEPT if metric in record["metrics"]},
            "scenarios": [
                None if scores["auc"] is None else _digits(scores["auc"]["mean"]) for scores in model["scenarios"]
            ],
            **{key: model[key] for key in ("parameters", "changes", "best_epochs", "stopped_by", "cut_off")},
            "rows_per_second": round(model["rows_per_second"]["mean"]),
        }
        for name, model in record["models"].items()
    }
    kept = ("first", "second", "mean", "interval", "total_standard_error", "p_value", "verdict", "adjusted_verdict")
    differences = [
        {key: _rounded(entry[key]) for key in kept} | {"measure": entry["measure"]}
        for entry in record["differences"]
        if entry["scenario"] is None and entry["measure"] in SHOWN and is_kept(entry, record["verdicts"])
    ]
    scenarios = [scenario["name"] for scenario in record["scenarios"]]
    return {"scenarios": scenarios, "models": models, "differences": differences, "verdicts": record["verdicts"]}


def is_kept(difference: Mapping[str, Any], verdicts: Mapping[str, Any]) -> bool:
    """Whether one of the pair is SAML or the best network by the difference's metric."""
    return not {"saml", verdicts[difference["measure"]]["best"]}.isdisjoint((difference["first"], difference["second"]))


def _short(summary: Mapping[str, Any] | None) -> Record | None:
    return None if summary is None else {name: _rounded(value) for name, value in summary.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return _digits(value) if isinstance(value, float) else value


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def models_table(record: Record) -> str:
    """A line a model: by default, with local tables, and what the test rows and seeds say of it."""
    by_default, local = (record["comparisons"][tables] for tables in TABLES_OF)
    verdict = by_default["verdicts"]["auc"]
    rows = []
    ranked = sorted(by_default["models"].items(), key=lambda item: -item[1]["overall"]["auc"]["mean"])
    for name, model in ranked:
        overall = model["overall"]
        low, high = overall["auc"]["interval"]
        with_tables = local["models"].get(name)
        rows.append(
            [
                f"`{name}`",
                mean_and_spread(overall["auc"]),
                f"{low:.3f} to {high:.3f}",
                mean_and_spread(overall["logloss"]),
                "–" if overall.get("gauc") is None else f"{overall['gauc']['mean']:.4f}",
                f"{overall['predicted_over_observed']['mean']:.3f}",
                "–" if with_tables is None else mean_and_spread(with_tables["overall"]["auc"]),
                f"{model['parameters']:,}",
                relation(name, verdict),
            ]
        )
    head = [
        "",
        "test AUC ± seeds",
        "95 % over rows",
        "log loss ± seeds",
        "GAUC",
        "predicted / observed",
        "AUC with local tables",
        "parameters",
        "to the best network",
    ]
    return pages.markdown(head, rows)


def relation(name: str, verdict: Mapping[str, Any]) -> str:
    """Of a model to the best network, adjusted for the number of pairs."""
    if name == verdict["best"]:
        return "the best network"
    if name in verdict["fitted"]:
        return str(verdict["fitted"][name])
    return "level" if name in verdict["level"] else "worse"


def mean_and_spread(summary: Mapping[str, Any]) -> str:
    """Over seeds, four decimals."""
    deviation = summary["deviation"]
    return f"{summary['mean']:.4f}" + (f" ± {deviation:.4f}" if deviation else "")


def facts(record: Record) -> str:
    """What was run, and where."""
    rows = record["rows"]
    counts = ", ".join(f"{split} {each['rows']:,}" for split, each in rows.items())
    late = [name for name, model in record["comparisons"]["default"]["models"].items() if model["cut_off"]]
    ended = f" Cut off at the last epoch: {', '.join(late)}." if late else ""
    return (
        f"`{record['command']}`, {record['started'][:10]}, {record['processor']}, {threads(record)}; rows: "
        f"{counts}; {record['seeds']} seeds, with local tables {min(record['seeds'], LOCAL_SEEDS)}.{ended}"
    )


def threads(record: Record) -> str:
    """How many were used."""
    return f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def render(page: str) -> str:
    """The page with what the committed results say in its places."""
    texts = {}
    for name in DATA_SETS:
        if results_of(name).exists():
            record = json.loads(results_of(name).read_text(encoding="utf-8"))
            texts[f"accuracy:{name}"] = f"{models_table(record)}\n\n{facts(record)}\n"
    return pages.fill(page, texts)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--data-set", "names", type=click.Choice(list(DATA_SETS)), multiple=True, help="Only these")
@click.option("--seeds", type=click.IntRange(2), default=5)
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/accuracy"))
@click.option("--render", "only_render", is_flag=True, help="Only the page, from the results")
def main(names: Sequence[str], seeds: int, runs: Path, only_render: bool) -> None:
    for name in () if only_render else names or DATA_SETS:
        check_output_file(results_of(name))
        records.write(results_of(name), measure(name, seeds, runs, Console()))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
