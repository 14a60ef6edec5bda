"""AUC and log loss on MovieLens 100k: SAML, a shared bottom, and logistic regression on the same features and split.

The split is by time, so most users of the validation and test rows are new. Scenarios are age groups. Everything is
chosen on the validation rows, by log loss: the epoch of the networks and C of the logistic regressions, of which
logistic_crossed also has a column for every pair of scenario and item.

    python benchmarks/ml100k_accuracy.py --seeds 3
"""

import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.sparse as sp
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from saml_rec import load_schema
from saml_rec.data import EncodedTable, Encoder, PreparedData, prepare, write_ml100k
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.evaluation.metrics import Evaluation, LabelledRows, evaluate_scores
from saml_rec.files import check_output_file, write_json
from saml_rec.models import MODELS
from saml_rec.run_directory import versions
from saml_rec.training import TrainOptions, train

# Chosen for both networks on the validation rows, among 1e-5, 0.1, 1, 3, 10 and 30; see docs/results.md.
WEIGHT_DECAY = 3.0
RESULTS = Path(__file__).parent / "results" / "ml100k_accuracy.json"
INVERSE_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CROSSED = "item_id"

Result = dict[str, Any]


def indicator(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> sp.csr_matrix:
    """Row n holds 1 / count at each of its ``count`` columns. Column 0, the empty cell, stays zero."""
    kept = columns != 0
    rows, columns = rows[kept], columns[kept]
    counts = torch.bincount(rows, minlength=shape[0])
    return sp.csr_matrix(((1 / counts[rows].double()).numpy(), (rows.numpy(), columns.numpy())), shape=shape)


def one_hot(table: EncodedTable, encoder: Encoder) -> sp.csr_matrix:
    """All features of a table for a linear model: (N, columns).

    Sparse features and the scenario one-hot, over the ids that the networks see; dense features as they see them,
    normalised and with a flag for missing values. The one-hot vectors of a multi-valued feature or sequence are
    averaged, as the networks average embeddings: their sum lets the history outweigh everything else.
    """
    n = len(table)
    item_of = {feature.name: feature.item for feature in encoder.schema.of_kind("sequence")}
    blocks = [sp.csr_matrix(table.dense.numpy()), _scenario_columns(table)]
    for name, ids in table.sparse.items():
        blocks.append(indicator(torch.arange(n), ids, (n, encoder.vocabulary_sizes[name])))
    for name, ragged in table.ragged.items():
        rows = torch.repeat_interleave(torch.arange(n), ragged.offsets.diff())
        width = encoder.vocabulary_sizes[item_of.get(name) or name]
        blocks.append(indicator(rows, ragged.values.long(), (n, width)))
    return sp.hstack(blocks, format="csr")


def one_hot_with_crosses(table: EncodedTable, encoder: Encoder) -> sp.csr_matrix:
    """:func:`one_hot`, and a column for every pair of scenario and item."""
    ids, width = table.sparse[CROSSED], encoder.vocabulary_sizes[CROSSED]
    pairs = torch.where(ids == 0, 0, table.scenario * width + ids)
    crossed = indicator(torch.arange(len(table)), pairs, (len(table), encoder.num_scenarios * width))
    return sp.hstack([one_hot(table, encoder), crossed], format="csr")


def _scenario_columns(table: EncodedTable) -> sp.csr_matrix:
    # Scenario ids count from 0, which is no empty cell here.
    return indicator(torch.arange(len(table)), table.scenario + 1, (len(table), table.num_scenarios + 1))


def fit_logistic_regression(
    data: PreparedData, features: Callable[[EncodedTable, Encoder], sp.csr_matrix], console: Console
) -> Result:
    """The C with the lowest validation log loss; its measures on the validation and test rows."""
    start = time.perf_counter()
    x = {name: features(table.whole(), data.encoder) for name, table in data.tables.items()}
    labels = {name: _labels(table.whole()) for name, table in data.tables.items()}

    def measure(model: LogisticRegression, split: str) -> Evaluation:
        rows = LabelledRows(labels[split], data.tables[split].scenario.numpy())
        return evaluate_scores(rows, model.decision_function(x[split]), data.encoder.scenario_names)

    trials = []
    for c in INVERSE_PENALTIES:
        model = LogisticRegression(C=c, solver="lbfgs", max_iter=5000)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            model.fit(x["train"], labels["train"])
        valid = measure(model, "valid")["overall"]
        assert valid["logloss"] is not None
        console.print(f"C = {c}: valid log loss {valid['logloss']:.4f}  valid AUC {valid['auc']:.4f}", highlight=False)
        trials.append((valid["logloss"], c, model, valid))
    _, c, model, valid = min(trials, key=lambda trial: trial[0])
    if c in (INVERSE_PENALTIES[0], INVERSE_PENALTIES[-1]):
        raise click.ClickException(f"the best C, {c}, is at the end of the grid: the grid has to be widened")
    return {
        **measure(model, "test"),
        "valid": valid,
        "C": c,
        "tried": [{"C": c, "valid": valid} for _, c, _, valid in trials],
        "columns": x["train"].shape[1],
        "seconds": time.perf_counter() - start,
    }


def train_network(
    data: PreparedData, schema: Schema, model: str, seed: int, run: Path, console: Console
) -> tuple[Result, dict[str, Any]]:
    """A network with the command line's options but for the weight decay; its measures, and these options."""
    start = time.perf_counter()
    train_options = TrainOptions(model=model, seed=seed, weight_decay=WEIGHT_DECAY)
    metrics = train(data, schema, train_options, run, console=console).metrics
    kept = ("overall", "scenarios", "valid", "seed", "best_epoch", "epochs", "parameters")
    options = {name: value for name, value in metrics["options"].items() if name != "seed"}
    return {name: metrics[name] for name in kept} | {"seconds": time.perf_counter() - start}, options


def _labels(table: EncodedTable) -> np.ndarray:
    assert table.label is not None
    return table.label.numpy()


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds; the value alone if there is one."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean}±{statistics.stdev(values):.4f}"


def results_table(results: Mapping[str, Sequence[Result]], scenario_names: Sequence[str], measure: str) -> Table:
    """Test rows: a line per method, a column per scenario and overall."""
    table = Table(title=f"test {'AUC' if measure == 'auc' else 'log loss'}", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in (*scenario_names, "overall"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for method, runs in results.items():
        groups = [[run["scenarios"][name] for run in runs] for name in scenario_names] + [
            [run["overall"] for run in runs]
        ]
        table.add_row(method, *(spread([scores[measure] for scores in group]) for group in groups))
    return table


@click.command(context_settings={"show_default": True})
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Runs of each network, with seeds 0, 1, ...")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, help="JSON file to write.")
@click.option("--quiet", is_flag=True, help="Print the tables only.")
def main(seeds: int, out: Path, quiet: bool) -> None:
    """Compare SAML, a shared bottom and logistic regression on MovieLens 100k."""
    try:
        compare(seeds, out, quiet)
    except InputError as error:
        raise click.ClickException(str(error)) from error


def compare(seeds: int, out: Path, quiet: bool) -> None:
    """Prepares the data, trains everything, prints the tables and writes the results."""
    check_output_file(out)
    console, progress = Console(), Console(quiet=quiet)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data_path, schema_path = write_ml100k(work)
        schema = load_schema(schema_path)
        data = prepare(data_path, schema, seed=0)
        results: dict[str, list[Result]] = {}
        options: dict[str, Any] = {}
        for model in MODELS:
            results[model] = []
            for seed in range(seeds):
                progress.print(f"{model}, seed {seed}", style="bold", highlight=False)
                directory = work / f"{model}-{seed}"
                result, options[model] = train_network(data, schema, model, seed, directory, progress)
                results[model].append(result)
        for name, features in (("logistic", one_hot), ("logistic_crossed", one_hot_with_crosses)):
            progress.print(name, style="bold", highlight=False)
            results[name] = [fit_logistic_regression(data, features, progress)]

    names = data.encoder.scenario_names
    for measure in ("auc", "logloss"):
        console.print(results_table(results, names, measure))
    rows = {
        split: {"rows": len(table), "scenarios": dict(zip(names, table.scenario_counts().tolist(), strict=True))}
        for split, table in data.tables.items()
    }
    known = {split: float((table.whole().sparse["user_id"] > 1).float().mean()) for split, table in data.tables.items()}
    write_json(
        out,
        {
            "command": shlex.join(["python", "benchmarks/ml100k_accuracy.py", *sys.argv[1:]]),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": versions() | {"numpy": np.__version__, "scipy": version("scipy")},
            "schema": schema.to_dict(),
            "data": rows,
            "rows_of_users_seen_in_training": known,
            "options": options,
            "results": results,
        },
    )
    console.print(f"wrote {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
