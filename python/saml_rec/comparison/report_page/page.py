"""A comparison's record as a page: what report.html.jinja is filled with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from saml_rec.comparison.significance import DIFFERS
from saml_rec.comparison.verdicts import SIGNS, by_scenario, difference_of, differences_of, how_tested, sentences
from saml_rec.console import METRIC_NAMES, decimals, interval, spread, total_name
from saml_rec.files import replacing

MANY_MODELS = 4
"""Above it a chart of lines shows the mean over seeds alone."""
MANY_DIFFERENCES = 1000
"""Above it the page lists the differences over all rows alone."""
ALONE, ADJUSTED = "○", "●"
"""Beside a difference that counts: before adjustment for the number of pairs only, and after it too."""

Record = Mapping[str, Any]
Line = list[tuple[float, float]]

environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
environment.filters |= {
    "metric": decimals,
    "spread": spread,
    "interval": interval,
    "count": lambda value: f"{value:,.0f}",
}


def write_page(record: Record, path: Path) -> None:
    """Writes :func:`render_page`, whole or not at all.

    Raises:
        OSError: the directory or the disk refuses the file.
    """
    with replacing(path) as file:
        # A file name that is no text is shown escaped.
        file.write(render_page(record).encode("utf-8", "backslashreplace"))


def render_page(record: Record) -> str:
    """HTML with style and pictures inside and no script; the same text for the same record.

    Args:
        record: the content of compare.json.

    Raises:
        KeyError, jinja2.UndefinedError: the record lacks something that the page shows.
    """
    # matplotlib takes about a second to import, and only the page needs it.
    from saml_rec.comparison.report_page import charts

    total = total_name([scenario["name"] for scenario in record["scenarios"]])
    shown = record["differences"]
    if len(shown) > MANY_DIFFERENCES:
        shown = [entry for entry in shown if entry["scenario"] is None]
    return environment.get_template("report.html.jinja").render(
        record=record,
        total=total,
        metric_names={metric: METRIC_NAMES[metric] for metric in record["metrics"]},
        overall=_overall(record),
        notes=_notes(record),
        verdicts=[line for metric in SIGNS for line in sentences(record, metric)],
        how_tested=how_tested(record),
        matrices={
            METRIC_NAMES[metric]: _matrix(record, metric) for metric in record["metrics"] if _is_tested(record, metric)
        },
        by_scenario={METRIC_NAMES[metric]: list(by_scenario(record, metric)) for metric in record["verdicts"]},
        differences=shown,
        marks=[charts.mark(index) for index in range(len(record["models"]))],
        figures=_figures(record, total),
    )


def _overall(record: Record) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of the metrics over all rows, a row per model: of those that models are ranked by, and of the others."""
    ranked = [metric for metric in record["metrics"] if metric in SIGNS]
    others = [metric for metric in record["metrics"] if metric not in SIGNS]
    heads = [head for metric in ranked for head in (METRIC_NAMES[metric], "interval")]
    first, second = [], []
    for name, model in record["models"].items():
        summaries, speed, peak = model["overall"], model["rows_per_second"], model["peak_bytes"]
        cells = [text(summaries[metric]) for metric in ranked for text in (spread, interval)]
        speeds = [f"{speed[part]:,.0f}" for part in ("mean", "deviation") if speed[part] is not None]
        memory = "-" if peak is None else f"{peak / 2**20:,.0f}"
        first.append([name, *cells, f"{model['parameters']:,}", " ± ".join(speeds), memory])
        second.append([name, *(spread(summaries[metric]) for metric in others)])
    return [
        ("overall metrics", ["model", *heads, "parameters", "training rows/s", "peak memory, MiB"], first),
        ("other metrics", ["model", *(METRIC_NAMES[metric] for metric in others)], second),
    ]


def _own(value: Any) -> Any:
    """An option's value; None is what the model decides itself."""
    return "default" if value is None else value


def _notes(record: Record) -> list[str]:
    """What the table of models does not say: options that are one model's own, and what peak memory counts."""
    models = record["models"]
    changed = [
        f"{name}: "
        + ", ".join(f"{option.replace('_', ' ')} {_own(value)}" for option, value in model["changes"].items())
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


def _is_tested(record: Record, metric: str) -> bool:
    return any(entry["p_value"] is not None for entry in differences_of(record, metric, None).values())


def _matrix(record: Record, metric: str) -> list[list[str]]:
    """Row minus column over all rows, with a mark where they differ."""
    pairs = differences_of(record, metric, None)
    models = list(record["models"])
    return [[_cell(*difference_of(pairs, row, column)) for column in models] for row in models]


def _cell(entry: Record | None, sign: int) -> str:
    if entry is None:
        return ""
    mark = ADJUSTED if entry["adjusted_verdict"] == DIFFERS else ALONE if entry["verdict"] == DIFFERS else ""
    return f"{sign * entry['mean']:+.4f} {mark}".rstrip()


def _mean_line(runs: Sequence[Line]) -> list[Line]:
    """The mean of lines, as far as all of them go, as the only line."""
    if not runs:
        return []
    count = len(runs)
    return [
        [(sum(x for x, _ in points) / count, sum(y for _, y in points) / count) for points in zip(*runs, strict=False)]
    ]


def _figures(record: Record, total: str) -> list[tuple[str, Markup]]:
    """Captions and charts."""
    from saml_rec.comparison.report_page import charts

    models = record["models"]
    scenario_names = [scenario["name"] for scenario in record["scenarios"]]
    groups = [(total, [model["overall"]["auc"] for model in models.values()])] + [
        (name, [model["scenarios"][index]["auc"] for model in models.values()])
        for index, name in enumerate(scenario_names)
    ]
    losses: list[list[Line]] = [
        [
            [(epoch, entry["valid"]["logloss"]) for epoch, entry in enumerate(run, start=1)]
            for run in model["history"]
            # A model that is fitted at once has no epochs.
            if run and run[0]["valid"]["logloss"] is not None
        ]
        for model in models.values()
    ]
    calibrated: list[list[Line]] = [
        [[(group["predicted"], group["observed"]) for group in run] for run in model["calibration"]]
        for model in models.values()
    ]
    each = "one line a seed"
    if len(models) > MANY_MODELS and len(record["seeds"]) > 1:
        each = "mean over seeds"
        losses, calibrated = [_mean_line(runs) for runs in losses], [_mean_line(runs) for runs in calibrated]
    speeds = [(name, model["rows_per_second"]) for name, model in models.items()]
    figures = [
        (
            "AUC per scenario; the line is ± one standard deviation over seeds",
            charts.dots(groups, list(models), "test AUC"),
        ),
        (
            f"Calibration: test rows in ten groups by score, {each}; on the diagonal, predictions are right",
            charts.lines(calibrated, "mean prediction", "share of label 1", diagonal=True),
        ),
        (
            f"Validation log loss after every epoch, {each}",
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
