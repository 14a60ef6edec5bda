"""A comparison's record as a page."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from saml_rec import report
from saml_rec.files import replacing
from saml_rec.report_page import charts
from saml_rec.report_page.style import STYLE

MEASURE_NAMES = {"auc": "AUC", "logloss": "log loss"}

Record = Mapping[str, Any]


def write_page(record: Record, path: Path) -> None:
    """Writes :func:`render_page`, whole or not at all.

    Raises:
        OSError: the directory or the disk refuses the file.
    """
    with replacing(path) as file:
        file.write(render_page(record).encode())


def render_page(record: Record) -> str:
    """HTML with style and pictures inside and no script.

    Args:
        record: the content of compare.json.
    """
    seeds = len(record["seeds"])
    rows = record["data"]["rows"]
    facts = (
        f"{len(record['models'])} models, {len(record['scenarios'])} scenarios, {seeds} "
        f"seed{'s' if seeds > 1 else ''}, one split: {rows['train']:,} training, {rows['valid']:,} validation and "
        f"{rows['test']:,} test rows. Measures are of the test rows, mean ± standard deviation over seeds."
    )
    body = [
        f"<h1>Comparison: {escape(', '.join(record['models']))}</h1>",
        f'<p class="muted">{facts}</p>',
        "<h2>Overall</h2>",
        _models_table(record),
        _notes(record),
        "<h2>What differs</h2>",
        _verdict(record),
        "<h2>Pictures</h2>",
        charts.legend(list(record["models"])),
        f'<div class="figures">{"".join(_figures(record))}</div>',
        "<h2>Every scenario</h2>",
        *(_scenario_table(record, measure) for measure in MEASURE_NAMES),
        "<h2>Every difference</h2>",
        f"<details><summary>Show all pairs of models</summary>{_differences_table(record)}</details>",
        f'<p class="muted">{_machine(record)}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Without an icon of its own a browser asks the server for one.
        '<link rel="icon" href="data:,">'
        f"<title>saml-rec compare</title><style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself when it is wider than the page, with the keyboard too."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _models_table(record: Record) -> str:
    rows = []
    for name, model in record["models"].items():
        speed, peak = model["rows_per_second"], model["peak_bytes"]
        rows.append(
            [
                name,
                *(report.spread(model["overall"][measure]) for measure in MEASURE_NAMES),
                f"{model['parameters']:,}",
                f"{speed['mean']:,.0f}" + ("" if speed["deviation"] is None else f" ± {speed['deviation']:,.0f}"),
                "-" if peak is None else f"{peak / 2**20:,.0f}",
            ]
        )
    head = ["model", "AUC", "log loss", "parameters", "training rows/s", "peak memory, MiB"]
    return _table("overall measures", head, rows)


def _notes(record: Record) -> str:
    """What the table of models does not say: options that are one model's own, and what peak memory counts."""
    models = record["models"]
    changed = [f"{name}: {_listed(model['changes'])}" for name, model in models.items() if model["changes"]]
    notes = [f"Options of one model only: {'; '.join(changed)}."] if changed else []
    if any(model["device"] == "cpu" and model["peak_bytes"] is not None for model in models.values()):
        notes.append("Peak memory on the CPU is that of the whole process, data and libraries included.")
    return f'<p class="muted">{escape(" ".join(notes))}</p>' if notes else ""


def _listed(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in changes.items())


def _scenario_table(record: Record, measure: str) -> str:
    head = [f"{MEASURE_NAMES[measure]} by scenario", "rows", *record["models"]]
    rows = [
        [
            scenario["name"],
            f"{scenario['rows']:,}",
            *(report.spread(model["scenarios"][index][measure]) for model in record["models"].values()),
        ]
        for index, scenario in enumerate(record["scenarios"])
    ]
    return f"<p></p>{_table(head[0], head, rows)}"


def verdict(record: Record) -> tuple[list[str], int]:
    """A sentence for every difference that exceeds the spread between seeds, and the number of those that do not."""
    found = [entry for entry in record["differences"] if entry["exceeds_spread"]]
    sentences = [
        f"{_where(entry)}: {entry['first']} {'above' if entry['mean'] > 0 else 'below'} {entry['second']} "
        f"by {abs(entry['mean']):.4f} {MEASURE_NAMES[entry['measure']]} "
        f"(spread between seeds {entry['pooled_deviation']:.4f})"
        for entry in found
    ]
    return sentences, len(record["differences"]) - len(found)


def _where(entry: Record) -> str:
    return "overall" if entry["scenario"] is None else entry["scenario"]


def _verdict(record: Record) -> str:
    if len(record["seeds"]) == 1:
        return "<p>One seed shows no spread: nothing can be said about the differences.</p>"
    if not record["differences"]:
        return "<p>There is nothing to compare.</p>"
    sentences, rest = verdict(record)
    rule = (
        "A difference counts when its mean is above the pooled standard deviation of both models and above two "
        "standard errors of the differences seed by seed. The spread is that of seeds on these very test rows; other "
        "rows would add to it."
    )
    overall = [sentence for sentence in sentences if sentence.startswith("overall: ")]
    others = [sentence for sentence in sentences if sentence not in overall]
    parts = [f"<p>{rest} of {len(record['differences'])} differences stay within the spread between seeds.</p>"]
    if overall:
        parts.append(_list(overall))
    else:
        parts.append("<p>Overall, no two models differ by more than that spread.</p>")
    if others:
        summary = f"<summary>{len(others)} differences in single scenarios exceed it</summary>"
        parts.append(f"<details>{summary}{_list(others)}</details>")
    return "".join([*parts, f'<p class="muted">{rule}</p>'])


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _differences_table(record: Record) -> str:
    head = ["scenario", "measure", "difference", "mean", "pooled deviation", "exceeds the spread"]
    answer = {True: "yes", False: "no", None: "-"}
    rows = (
        [
            _where(entry),
            MEASURE_NAMES[entry["measure"]],
            f"{entry['first']} − {entry['second']}",
            f"{entry['mean']:+.4f}",
            report.measure(entry["pooled_deviation"]),
            answer[entry["exceeds_spread"]],
        ]
        for entry in record["differences"]
    )
    return _table("differences", head, rows)


def _figures(record: Record) -> list[str]:
    models = record["models"]
    names = list(models)
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
        ("AUC per scenario; the line is ± one standard deviation over seeds", charts.dots(groups, names, "test AUC")),
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
    return [f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>" for caption, chart in figures]


def _machine(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    engines = "; ".join(
        f"{name} on {model['device']}: {', '.join(f'{op} by {by}' for op, by in model['backend'].items()) or 'PyTorch'}"
        for name, model in record["models"].items()
    )
    return escape(f"{engines}. Threads: {record['threads']}. {versions}.")
