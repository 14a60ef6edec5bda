"""A comparison's record as a page: what report.html.jinja is filled with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from saml_rec.console import decimals, spread
from saml_rec.files import replacing

METRIC_NAMES = {"auc": "AUC", "logloss": "log loss"}

Record = Mapping[str, Any]

environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
environment.filters |= {"metric": decimals, "spread": spread, "count": lambda value: f"{value:,.0f}"}


def write_page(record: Record, path: Path) -> None:
    """Writes :func:`render_page`, whole or not at all.

    Raises:
        OSError: the directory or the disk refuses the file.
    """
    with replacing(path) as file:
        file.write(render_page(record).encode())


def render_page(record: Record) -> str:
    """HTML with style and pictures inside and no script; the same text for the same record.

    Args:
        record: the content of compare.json.

    Raises:
        KeyError, jinja2.UndefinedError: the record lacks something that the page shows.
    """
    # matplotlib takes about a second to import, and only the page needs it.
    from saml_rec.comparison.report_page import charts

    return environment.get_template("report.html.jinja").render(
        record=record,
        metric_names=METRIC_NAMES,
        notes=_notes(record),
        verdict=_verdict(record),
        marks=[charts.mark(index) for index in range(len(record["models"]))],
        figures=_figures(record),
    )


def _notes(record: Record) -> list[str]:
    """What the table of models does not say: options that are one model's own, and what peak memory counts."""
    models = record["models"]
    changed = [
        f"{name}: " + ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in model["changes"].items())
        for name, model in models.items()
        if model["changes"]
    ]
    notes = [f"Options of one model only: {'; '.join(changed)}."] if changed else []
    if (tuned := record["tuned"]) is not None:
        losses = [
            f"{name} {decimals(entry['default_valid_logloss'])} to {decimals(entry['best_valid_logloss'])}"
            for name, entry in tuned["models"].items()
        ]
        notes.append(
            f"Options tuned on the validation rows, {tuned['trials']} trials a model ({tuned['path']}); validation log "
            f"loss from the defaults to the best: {', '.join(losses)}."
        )
    cut_off = [
        f"{name} in {model['cut_off']} of {len(model['best_epochs'])} runs"
        for name, model in models.items()
        if model["cut_off"]
    ]
    if cut_off:
        notes.append(f"The last epoch was still the best one, so that more may be better: {', '.join(cut_off)}.")
    if any(model["device"] == "cpu" and model["peak_bytes"] is not None for model in models.values()):
        notes.append("Peak memory on the CPU is that of the whole process, data and libraries included.")
    return notes


def _verdict(record: Record) -> dict[str, Any]:
    """A sentence for every difference that exceeds the spread between seeds, and the number of those that do not."""
    sentences: dict[str, list[str]] = {"overall": [], "scenarios": []}
    found = [entry for entry in record["differences"] if entry["exceeds_spread"]]
    for entry in found:
        everywhere = entry["scenario"] is None
        sentences["overall" if everywhere else "scenarios"].append(
            f"{'overall' if everywhere else entry['scenario']}: {entry['first']} "
            f"{'above' if entry['mean'] > 0 else 'below'} {entry['second']} "
            f"by {abs(entry['mean']):.4f} {METRIC_NAMES[entry['measure']]} "
            f"(spread between seeds {entry['pooled_deviation']:.4f})"
        )
    return {**sentences, "within": len(record["differences"]) - len(found)}


def _figures(record: Record) -> list[tuple[str, Markup]]:
    """Captions and charts."""
    from saml_rec.comparison.report_page import charts

    models = record["models"]
    scenario_names = [scenario["name"] for scenario in record["scenarios"]]
    groups = [("overall", [model["overall"]["auc"] for model in models.values()])] + [
        (name, [model["scenarios"][index]["auc"] for model in models.values()])
        for index, name in enumerate(scenario_names)
    ]
    losses = [
        [
            [(epoch, entry["valid"]["logloss"]) for epoch, entry in enumerate(run, start=1)]
            for run in model["history"]
            if run[0]["valid"]["logloss"] is not None
        ]
        for model in models.values()
    ]
    calibrated = [
        [[(group["predicted"], group["observed"]) for group in run] for run in model["calibration"]]
        for model in models.values()
    ]
    speeds = [(name, model["rows_per_second"]) for name, model in models.items()]
    figures = [
        (
            "AUC per scenario; the line is ± one standard deviation over seeds",
            charts.dots(groups, list(models), "test AUC"),
        ),
        (
            "Calibration: test rows in ten groups by score, one line a seed; on the diagonal, predictions are right",
            charts.lines(calibrated, "mean prediction", "share of label 1", diagonal=True),
        ),
        (
            "Validation log loss after every epoch, one line a seed",
            charts.lines(losses, "epoch", "log loss", whole=True),
        ),
        ("Training speed", charts.bars(speeds, "rows per second")),
    ]
    for name, model in models.items():
        for layer, matrix in (model["mutual_weights"] or {}).items():
            caption = (
                f"{name}, layer {layer}: how much the scenario of a row takes from the scenario of a column "
                "(α averaged over the test rows of the scenario, mean over seeds)"
            )
            figures.append((caption, charts.heat_map(matrix, scenario_names)))
    return figures
