"""Does the mutual unit find planted relations, and does a small scenario gain from them?

Every seed draws its own data (saml_rec.datasets.synthetic) with its own relation R between the scenarios, and every
variant is trained on them. Planted closeness of scenarios i and k is ⟨R_i, R_k⟩ / (‖R_i‖ ‖R_k‖); each scenario ranks
the others by it, and the learned weights, α averaged over the scenario's test rows, are judged by how well they agree.

    python benchmarks/synthetic_study.py --seeds 5         # writes benchmarks/results/synthetic_study.json
    python benchmarks/synthetic_study.py --render          # makes docs/synthetic.md and its figure from it

A training that is finished under --runs is not repeated.
"""

import dataclasses
import json
import re
import shlex
import statistics
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

import page as pages
import records
from ml100k_accuracy import cpu_name
from records import Record
from saml_rec import Schema
from saml_rec.data import PreparedData, prepare, write_synthetic
from saml_rec.evaluation.mutual_weights import mean_mutual_weights
from saml_rec.evaluation.scoring import load_trained
from saml_rec.files import check_output_file
from saml_rec.models import MODELS
from saml_rec.run_directory import RunDirectory, versions
from saml_rec.training import TrainOptions, train

RESULTS: Final = records.RESULTS / "synthetic_study.json"
PAGE: Final = pages.DOCS / "synthetic.md"
FIGURE: Final = pages.FIGURES / "synthetic_small_scenario.svg"
SCENARIOS: Final = 6
# Half of the rows are test rows: a scenario of half a percent is measured on few rows otherwise.
SPLIT: Final = (0.4, 0.1, 0.5)
SHARES: Final = (0.005, 0.02, 0.05)
ABLATION_SHARE: Final = 0.02
LOCAL_DIM: Final = 8
RANDOM_RANKINGS: Final = 2000


@dataclass(frozen=True)
class Variant:
    """One way to serve the scenarios.

    Args:
        label: in the tables.
        model: a name in MODELS.
        options: hyperparameters that differ from the model's defaults.
        tables: "aware" as in the schema; "global" without local tables; "wide" without them, and global tables as wide
            as global and local ones together.
        shares: of the smallest scenario, for which it is trained.
    """

    label: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tables: str = "aware"
    shares: Sequence[float] = (ABLATION_SHARE,)


CANDIDATES: Final[dict[str, Variant]] = {
    "saml": Variant("SAML, score ratio", "saml", shares=SHARES),
    "saml_softmax": Variant("SAML, score softmax", "saml", {"score": "softmax"}, shares=SHARES),
    "shared_bottom": Variant("shared bottom", "shared_bottom", shares=SHARES),
    "star": Variant("STAR", "star", shares=SHARES),
    "hmoe": Variant("HMoE", "hmoe", shares=SHARES),
    "no_mutual": Variant("SAML without mutual unit", "saml", {"mutual_layers": ()}),
    "no_aux_loss": Variant("SAML without auxiliary loss", "saml", {"aux_loss_weight": 0.0}),
    "no_stop_gradient": Variant("SAML without stop-gradient", "saml", {"stop_gradient": False}),
    "no_tables": Variant("SAML without scenario-aware tables", "saml", tables="global"),
    "wide_tables": Variant("SAML, wider tables of equal size instead", "saml", tables="wide"),
}


def variants() -> dict[str, Variant]:
    """Those whose model this version has."""
    return {name: variant for name, variant in CANDIDATES.items() if variant.model in MODELS}


def schema_text(text: str, tables: str) -> str:
    """The synthetic schema with the study's split and, where asked for, other tables."""
    text = re.sub(r"^split = .*$", f"split = {list(SPLIT)}", text, flags=re.MULTILINE)
    if tables == "aware":
        return text
    width = LOCAL_DIM * (1 + SCENARIOS) if tables == "wide" else LOCAL_DIM
    return text.replace(f"scenario_aware = true\ndim = {LOCAL_DIM}", f"scenario_aware = false\ndim = {width}")


def closeness(relation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines between the rows of R, (M, M)."""
    direction = relation / np.linalg.norm(relation, axis=1, keepdims=True)
    result: NDArray[np.float64] = direction @ direction.T
    return result


def ranking(learned: NDArray[np.float64], planted: NDArray[np.float64]) -> dict[str, float]:
    """How well each row of ``learned`` (M, M) ranks the other scenarios by ``planted`` (M, M); means over rows.

    Returns:
        ``spearman`` in [-1, 1]; ``ndcg`` with the planted closeness as gain; ``top_1``, the share of rows whose largest
        weight is the closest scenario.
    """
    others = ~np.eye(len(learned), dtype=bool)
    rows = [(learned[i, others[i]], planted[i, others[i]]) for i in range(len(learned))]
    return {
        "spearman": float(np.mean([spearmanr(weights, target).statistic for weights, target in rows])),
        "ndcg": float(np.mean([ndcg_score([target], [weights]) for weights, target in rows])),
        "top_1": float(np.mean([weights.argmax() == target.argmax() for weights, target in rows])),
    }


def random_ranking(planted: NDArray[np.float64], seed: int) -> dict[str, float]:
    """What :func:`ranking` gives random weights on average."""
    draw = np.random.default_rng(seed)
    trials = [ranking(draw.random(planted.shape), planted) for _ in range(RANDOM_RANKINGS // len(planted))]
    return {name: statistics.mean(trial[name] for trial in trials) for name in trials[0]}


def run_variant(
    variant: Variant, data: PreparedData, schema: Schema, options: TrainOptions, out: Path, console: Console
) -> Record:
    """Trains unless ``out`` holds the finished run; its measures and learned weights."""
    result = train(data, schema, options, out, resume=RunDirectory(out).started, console=console)
    trained = load_trained(out)
    weights = mean_mutual_weights(trained.model, data.tables["test"], trained.device)
    return {
        "overall": result.metrics["overall"],
        "scenarios": result.metrics["scenarios"],
        "valid": result.metrics["valid"],
        "parameters": result.metrics["parameters"],
        "best_epoch": result.metrics["best_epoch"],
        "weights": None if weights is None else weights[1].tolist(),
    }


def measure_share(share: float, seed: int, rows: int, weight_decay: float, runs: Path, console: Console) -> Record:
    """One data set: what was planted, and every variant on it."""
    folder = runs / f"share-{share}-seed-{seed}"
    data_path, schema_path, planted_path = write_synthetic(
        folder, scenarios=SCENARIOS, rows=rows, seed=seed, smallest_share=share
    )
    planted = json.loads(planted_path.read_text(encoding="utf-8"))
    text = schema_path.read_text(encoding="utf-8")
    target = closeness(np.array(planted["relation"]))
    results: dict[str, Record] = {}
    for name, variant in variants().items():
        if share not in variant.shares:
            continue
        console.print(f"share {share}, seed {seed}, {name}", style="bold", highlight=False)
        schema = Schema.from_dict(tomllib.loads(schema_text(text, variant.tables)), source=str(schema_path))
        data = prepare(data_path, schema, seed=0)
        options = TrainOptions(
            model=variant.model, seed=seed, weight_decay=weight_decay, model_options=dict(variant.options)
        )
        results[name] = run_variant(variant, data, schema, options, folder / name, console)
        if (weights := results[name]["weights"]) is not None:
            results[name]["ranking"] = ranking(np.array(weights), target)
    return {
        "share": share,
        "seed": seed,
        "planted": {"relation": planted["relation"], "closeness": target.tolist(), "bayes": planted["bayes"]},
        "random_ranking": random_ranking(target, seed),
        "results": results,
    }


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def paired(differences: Sequence[float]) -> str:
    """Mean ± standard deviation of differences seed by seed; bold where their mean exceeds two standard errors."""
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    text = f"{mean:+.4f} ± {deviation:.4f}"
    return f"**{text}**" if abs(mean) > 2 * deviation / len(differences) ** 0.5 else text


def cells_of(record: Record, share: float) -> list[Record]:
    return [cell for cell in record["cells"] if cell["share"] == share]


def small_auc(cell: Record, variant: str) -> float:
    """Test AUC of the smallest scenario, the last one."""
    value: float = list(cell["results"][variant]["scenarios"].values())[-1]["auc"]
    return value


def ranking_table(record: Record) -> str:
    """Agreement of learned weights with planted closeness, over all data sets a variant was trained on."""
    measures = ("spearman", "ndcg", "top_1")
    rows = []
    for name, label in record["variants"].items():
        found = [c["results"][name]["ranking"] for c in record["cells"] if "ranking" in c["results"].get(name, {})]
        if found:
            rows.append([label, *(mean_and_spread([entry[m] for entry in found]) for m in measures), str(len(found))])
    chance = [cell["random_ranking"] for cell in record["cells"]]
    rows.append(
        ["random order", *(mean_and_spread([entry[m] for entry in chance]) for m in measures), str(len(chance))]
    )
    return pages.markdown(["", "Spearman", "NDCG", "top-1", "data sets"], rows)


def small_table(record: Record) -> str:
    """AUC of the smallest scenario by its share of the rows."""
    shares = record["shares"]
    rows = []
    for name, label in record["variants"].items():
        if all(name in cell["results"] for cell in record["cells"]):
            columns = [[small_auc(cell, name) for cell in cells_of(record, share)] for share in shares]
            rows.append([label, *map(mean_and_spread, columns)])
    bayes = [
        [list(c["planted"]["bayes"]["scenarios"].values())[-1]["auc"] for c in cells_of(record, s)] for s in shares
    ]
    rows.append(["true probabilities", *map(mean_and_spread, bayes)])
    head = ["AUC of the smallest scenario", *(f"{share:.1%} of rows" for share in shares)]
    return f"{pages.markdown(head, rows)}\n\n![AUC of the smallest scenario by its share](figures/{FIGURE.name})"


def ablation_table(record: Record) -> str:
    """Every variant at one share, and its difference from SAML with the ratio score, seed by seed."""
    cells = cells_of(record, ABLATION_SHARE)
    rows = []
    for name, label in record["variants"].items():
        overall = [cell["results"][name]["overall"]["auc"] for cell in cells]
        small = [small_auc(cell, name) for cell in cells]
        base = [cell["results"]["saml"]["overall"]["auc"] for cell in cells]
        base_small = [small_auc(cell, "saml") for cell in cells]
        changes = ["", ""]
        if name != "saml":
            changes = [
                paired([value - reference for value, reference in zip(values, references, strict=True)])
                for values, references in ((overall, base), (small, base_small))
            ]
        parameters = f"{cells[0]['results'][name]['parameters']:,}"
        rows.append([label, mean_and_spread(overall), changes[0], mean_and_spread(small), changes[1], parameters])
    head = ["", "AUC overall", "− SAML", "AUC of the smallest", "− SAML", "parameters"]
    return pages.markdown(head, rows)


def setting_table(record: Record) -> str:
    facts = ("command", "rows", "train_rows", "weight_decay", "seeds", "cpu", "threads")
    rows = [[name.replace("_", " "), f"`{record[name]}`"] for name in facts]
    return pages.markdown(["", ""], rows)


TABLES: Final[dict[str, Callable[[Record], str]]] = {
    "ranking": ranking_table,
    "small": small_table,
    "ablation": ablation_table,
    "setting": setting_table,
}


def render_page(page: str, record: Record) -> str:
    """The page with what stands between ``<!-- table:NAME -->`` and ``<!-- end -->`` made anew."""
    return pages.fill(page, {f"table:{name}": f"{table(record)}\n" for name, table in TABLES.items()})


def save_figure(record: Record, path: Path) -> None:
    """AUC of the smallest scenario against its share, mean and standard deviation over seeds."""
    with pages.drawing():
        figure, panel = plt.subplots(figsize=(7, 3.6))
        names = [name for name in record["variants"] if all(name in cell["results"] for cell in record["cells"])]
        for index, (name, marker) in enumerate(zip(names, "osD^vPX", strict=False)):
            columns = [[small_auc(cell, name) for cell in cells_of(record, share)] for share in record["shares"]]
            x = [100 * share * (1 + 0.04 * (index - len(names) / 2)) for share in record["shares"]]
            means, deviations = [statistics.mean(c) for c in columns], [statistics.stdev(c) for c in columns]
            panel.errorbar(x, means, deviations, marker=marker, capsize=3, label=record["variants"][name])
        panel.set_xscale("log")
        panel.set_xticks([100 * share for share in record["shares"]], [f"{share:.1%}" for share in record["shares"]])
        panel.minorticks_off()
        panel.set_xlabel("share of the rows")
        panel.set_ylabel("test AUC of the smallest scenario")
        panel.grid(True, color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
        pages.save(figure, path)


def study(seeds: int, rows: int, weight_decay: float, runs: Path, shares: Sequence[float]) -> Record:
    """Trains everything; the content of the results file."""
    console = Console(quiet=False)
    cells = [measure_share(share, seed, rows, weight_decay, runs, console) for seed in range(seeds) for share in shares]
    return {
        "command": shlex.join(["python", "benchmarks/synthetic_study.py", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": rows,
        "train_rows": round(SPLIT[0] * rows),
        "seeds": seeds,
        "weight_decay": weight_decay,
        "scenarios": SCENARIOS,
        "shares": list(shares),
        "variants": {name: variant.label for name, variant in variants().items()},
        "definitions": {name: dataclasses.asdict(variant) for name, variant in variants().items()},
        "cells": cells,
    }


def condense(record: Record) -> Record:
    """What the page is made from: without learned weights, planted relations, and the scenarios' log losses."""

    def summary(result: Record) -> Record:
        kept = {name: value for name, value in result.items() if name != "weights"}
        return kept | {"scenarios": {name: {"auc": found["auc"]} for name, found in result["scenarios"].items()}}

    cells = [
        cell
        | {"planted": {"bayes": cell["planted"]["bayes"]}}
        | {"results": {name: summary(result) for name, result in cell["results"].items()}}
        for cell in record["cells"]
    ]
    return record | {"cells": cells}


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--rows", type=click.IntRange(4000), default=40_000, show_default=True)
@click.option("--weight-decay", type=float, default=1e-5, show_default=True)
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), default=Path("runs/synthetic-study"))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--render", is_flag=True, help="Only make the page and the figure from --out.")
def main(seeds: int, rows: int, weight_decay: float, runs: Path, out: Path, render: bool) -> None:
    if not render:
        check_output_file(out)
        records.write(out, condense(study(seeds, rows, weight_decay, runs, SHARES)))
        click.echo(f"wrote {out}")
    record = json.loads(out.read_text(encoding="utf-8"))
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    save_figure(record, FIGURE)
    click.echo(f"wrote {PAGE}, {FIGURE}")


if __name__ == "__main__":
    main()
