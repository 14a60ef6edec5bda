"""A tuned SAML against other tuned networks: as many trials for each, chosen on validation rows, then fresh seeds.

The search is that of `saml-rec tune`: the first trial of every model has its defaults, the others are drawn from ranges
of all its options. The best trial's options then train with five seeds, the defaults with the same ones beside them.

    python benchmarks/tuned.py             # writes benchmarks/results/tuned_*.json and the tables of docs/results.md
    python benchmarks/tuned.py --render    # the tables from the committed results

Trials and trainings that are finished under --runs are not repeated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

import page as pages
import records
from accuracy import DATA_SETS, PAGE, condense, mean_and_spread, relation, threads
from records import Record
from saml_rec import load_schema
from saml_rec.comparison import compare
from saml_rec.data import prepare
from saml_rec.files import check_output_file
from saml_rec.training import TrainOptions
from saml_rec.tuning import load_tuned, tune

MODELS: Final = ("saml", "star", "shared_bottom", "mlp_scenario")
SEARCHED: Final = ("age",)


def results_of(name: str) -> Path:
    """Where a data set's results are committed."""
    return records.RESULTS / f"tuned_{name}.json"


def measure(name: str, trials: int, seeds: int, runs: Path, console: Console) -> Record:
    """The search, and the comparison of what it found; the content of the results file."""
    folder = runs / name
    data_path, schema_path, *_ = DATA_SETS[name].write(folder / "data")
    schema = load_schema(schema_path)
    data = prepare(data_path, schema, seed=0)
    tune(data, schema, MODELS, trials, TrainOptions(), folder / "search", console=console)
    found = load_tuned(folder / "search" / "tune.json", MODELS)
    options = TrainOptions()
    best = {model: found.best_options(model) for model in MODELS}
    before = compare(data, schema, MODELS, seeds, options, folder / "defaults", console=console)
    after = compare(data, schema, MODELS, seeds, options, folder / "tuned", changes=best, console=console)
    searched = found.to_dict()["models"]
    return {
        **records.training_head(),
        "trials": trials,
        "seeds": seeds,
        "search": {model: {key: entry[key] for key in entry if key != "seconds"} for model, entry in searched.items()},
        "defaults": condense(before),
        "tuned": condense(after),
    }


def table(record: Record) -> str:
    """A line a model: what the search did to the validation rows, and to the test rows."""
    before, after = record["defaults"]["models"], record["tuned"]["models"]
    verdict = record["tuned"]["verdicts"]["auc"]
    rows = []
    for model, entry in record["search"].items():
        best: dict[str, Any] = entry["best"]
        rows.append(
            [
                f"`{model}`",
                f"{entry['default_valid_logloss']:.4f} → {entry['best_valid_logloss']:.4f}",
                mean_and_spread(before[model]["overall"]["auc"]),
                mean_and_spread(after[model]["overall"]["auc"]),
                relation(model, verdict),
                ", ".join(f"{name} {shown(value)}" for name, value in best.items()),
            ]
        )
    head = ["", "validation log loss, one seed", "test AUC, defaults", "test AUC, tuned", "tuned", "options found"]
    return pages.markdown(head, rows)


def shown(value: Any) -> str:
    """An option's value, numbers in three digits; None is what the model decides itself."""
    if value is None:
        return "default"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def facts(record: Record) -> str:
    """What was run, and where."""
    return (
        f"`{record['command']}`, {record['started'][:10]}, {record['processor']}, {threads(record)}; "
        f"{record['trials']} trials a model, then {record['seeds']} seeds."
    )


def render(page: str) -> str:
    """The page with what the committed results say in its places."""
    texts = {}
    for name in SEARCHED:
        if results_of(name).exists():
            record = json.loads(results_of(name).read_text(encoding="utf-8"))
            texts[f"tuned:{name}"] = f"{table(record)}\n\n{facts(record)}\n"
    return pages.fill(page, texts)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--data-set", "names", type=click.Choice(SEARCHED), multiple=True, help="Only these")
@click.option("--trials", type=click.IntRange(1), default=12)
@click.option("--seeds", type=click.IntRange(2), default=5)
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs/tuned"))
@click.option("--render", "only_render", is_flag=True, help="Only the page, from the results")
def main(names: Sequence[str], trials: int, seeds: int, runs: Path, only_render: bool) -> None:
    for name in () if only_render else names or SEARCHED:
        check_output_file(results_of(name))
        records.write(results_of(name), measure(name, trials, seeds, runs, Console()))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
