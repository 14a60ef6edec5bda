"""The table of MovieLens 100k by occupation in docs/results.md, from a comparison.

python benchmarks/occupation_table.py runs/occupation/compare/compare.json    # keeps its numbers, renders the page
python benchmarks/occupation_table.py                                         # renders the page again
"""

import json
from pathlib import Path
from typing import Final

import click

import page as pages
import records
from records import Record
from saml_rec.console import spread

RESULTS: Final = records.RESULTS / "ml100k_occupation.json"
PAGE: Final = pages.DOCS / "results.md"
MEASURES: Final = ("auc", "logloss")
BULKY: Final = ("calibration", "history", "mutual_weights")


def exceeds_spread(entry: Record) -> bool:
    """Whether a mean is above the pooled deviation and above two standard errors of the differences seed by seed."""
    return bool(abs(entry["mean"]) > max(entry["pooled_deviation"], 2 * entry["seed_standard_error"]))


def condense(record: Record) -> Record:
    """Without what only the pictures need; of the AUCs and losses within scenarios, how many exceed the spread."""
    models = {
        name: {key: value for key, value in model.items() if key not in BULKY}
        for name, model in record["models"].items()
    }
    differences = [
        entry | {"exceeds_spread": exceeds_spread(entry)}
        for entry in record["differences"]
        if entry["measure"] in MEASURES
    ]
    single = [entry["exceeds_spread"] for entry in differences if entry["scenario"] is not None]
    overall = [entry for entry in differences if entry["scenario"] is None]
    counted = {"differences": len(single), "exceeding": sum(single)}
    return record | {"models": models, "differences": overall, "within_scenarios": counted}


def table(record: Record) -> str:
    """Test AUC of every scenario and overall, then overall log loss and parameters; a column per model."""
    models = record["models"]
    head = ["test AUC", "rows", *models]
    rows = [
        [scenario["name"], f"{scenario['rows']:,}", *(spread(m["scenarios"][i]["auc"]) for m in models.values())]
        for i, scenario in enumerate(record["scenarios"])
    ]
    rows += [
        ["**overall**", f"{record['data']['rows']['test']:,}", *(spread(m["overall"]["auc"]) for m in models.values())],
        ["overall log loss", "", *(spread(m["overall"]["logloss"]) for m in models.values())],
        ["parameters", "", *(f"{m['parameters']:,}" for m in models.values())],
    ]
    return pages.markdown(head, rows)


def verdicts(record: Record) -> str:
    """The differences over all rows, and how many of the scenarios' exceed the spread."""
    lines = [
        f"- {entry['measure']}, {entry['first']} − {entry['second']}: {entry['mean']:+.4f}, spread "
        f"{entry['pooled_deviation']:.4f}: {'exceeds it' if entry['exceeds_spread'] else 'within it'}"
        for entry in record["differences"]
    ]
    single = record["within_scenarios"]
    return "\n".join(
        [*lines, f"- single scenarios: {single['exceeding']} of {single['differences']} differences exceed it"]
    )


def render_page(page: str, record: Record) -> str:
    """The page with what stands between ``<!-- occupation -->`` and ``<!-- end -->`` made anew."""
    means = f"Overall differences, means over {len(record['seeds'])} seeds:"
    return pages.fill(page, {"occupation": f"{table(record)}\n\n{means}\n\n{verdicts(record)}\n"})


@click.command(help=__doc__)
@click.argument("comparison", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
def main(comparison: Path | None) -> None:
    if comparison is not None:
        records.write(RESULTS, condense(json.loads(comparison.read_text(encoding="utf-8"))))
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    click.echo(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
