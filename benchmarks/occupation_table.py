"""The table of MovieLens 100k by occupation in docs/results.md, from a comparison.

python benchmarks/occupation_table.py runs/occupation/compare/compare.json    # keeps its numbers, renders the page
python benchmarks/occupation_table.py                                         # renders the page again
"""

import json
import re
from pathlib import Path
from typing import Any, Final

import click

from saml_rec.files import write_json
from saml_rec.report import spread

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "ml100k_occupation.json"
PAGE: Final = HERE.parent / "docs" / "results.md"
BULKY: Final = ("calibration", "history", "mutual_weights")
Record = dict[str, Any]


def condense(record: Record) -> Record:
    """Without what only the pictures need."""
    models = {
        name: {key: value for key, value in model.items() if key not in BULKY}
        for name, model in record["models"].items()
    }
    return record | {"models": models}


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
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(record: Record) -> str:
    """The differences over all rows, and how many of the scenarios' exceed the spread."""
    lines = [
        f"- {entry['measure']}, {entry['first']} − {entry['second']}: {entry['mean']:+.4f}, spread "
        f"{entry['pooled_deviation']:.4f}: {'exceeds it' if entry['exceeds_spread'] else 'within it'}"
        for entry in record["differences"]
        if entry["scenario"] is None
    ]
    single = [entry for entry in record["differences"] if entry["scenario"] is not None]
    beyond = sum(entry["exceeds_spread"] for entry in single)
    return "\n".join([*lines, f"- single scenarios: {beyond} of {len(single)} differences exceed it"])


def render_page(page: str, record: Record) -> str:
    """The page with what stands between ``<!-- occupation -->`` and ``<!-- end -->`` made anew."""
    text = f"<!-- occupation -->\n{table(record)}\n\nOverall differences, means over {len(record['seeds'])} seeds:\n\n"
    text += f"{verdicts(record)}\n<!-- end -->"
    return re.sub(r"<!-- occupation -->.*?<!-- end -->", lambda _: text, page, flags=re.DOTALL)


@click.command(help=__doc__)
@click.argument("comparison", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
def main(comparison: Path | None) -> None:
    if comparison is not None:
        write_json(RESULTS, condense(json.loads(comparison.read_text(encoding="utf-8"))))
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    click.echo(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
