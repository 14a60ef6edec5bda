"""What a search found: tables of what was tried for whom, and the best options for a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from saml_rec.console import decimals, table_of
from saml_rec.data.preparation import PreparedData
from saml_rec.data.splits import SPLITS
from saml_rec.errors import InputError, shortened
from saml_rec.tuning.search import Record, read_tuning
from saml_rec.tuning.space import space_of, text


@dataclass(frozen=True)
class Tuned:
    """The content of a tune.json, as far as a comparison uses it.

    Args:
        path: of the file.
        record: its content.
        models: those that are compared.
    """

    path: Path
    record: Record
    models: Sequence[str]

    def best_options(self, model: str) -> dict[str, Any]:
        """Options of the best trial of a model, as :func:`saml_rec.comparison.options_of` takes them."""
        options = best_trial(self.record["models"][model])["options"]
        return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}

    def require_same_data(self, data: PreparedData) -> None:
        """InputError for other rows: the options may have been chosen by rows that are test rows now."""
        found = self.record["data"]
        if changed := [name for name in SPLITS if data.tables[name].fingerprint() != found[name]]:
            raise InputError(f"{self.path}: was tuned on other data or another split: {', '.join(changed)} rows differ")

    def to_dict(self) -> dict[str, Any]:
        """What a comparison keeps of it."""
        models = {model: self.record["models"][model] for model in self.models}
        return {
            "path": str(self.path),
            "trials": self.record["trials"],
            "seed": self.record["seed"],
            "options": self.record["options"],
            "models": {
                model: {
                    "tried": list(entry["space"]),
                    "best": best_trial(entry)["options"],
                    "default_valid_logloss": entry["trials"][0]["valid_logloss"],
                    "best_valid_logloss": best_trial(entry)["valid_logloss"],
                    "seconds": seconds(entry),
                }
                for model, entry in models.items()
            },
        }


def load_tuned(path: Path, models: Sequence[str]) -> Tuned:
    """What was tuned, for a comparison of these models.

    Raises:
        InputError: the file was not written by a search, that is not at its end, or a model was not tuned in it.
        OSError: it cannot be opened.
    """
    record = read_tuning(path)
    for model in models:
        entry = record["models"].get(model)
        if entry is None:
            raise InputError(f"{path}: {model} was not tuned there (models: {shortened(', '.join(record['models']))})")
        if len(entry["trials"]) < record["trials"] or entry["best"] is None:
            raise InputError(
                f"{path}: has {len(entry['trials'])} of {record['trials']} trials of {model}; repeat saml-rec tune"
            )
    return Tuned(path, record, models)


def best_trial(entry: Mapping[str, Any]) -> Record:
    """Of one model's entry of the record."""
    trial: Record = entry["trials"][entry["best"]]
    return trial


def seconds(entry: Mapping[str, Any]) -> float:
    """All trials of a model took together."""
    return float(sum(trial["seconds"] for trial in entry["trials"]))


def tuning_table(record: Record) -> Table:
    """A row a model: trials, those that failed, validation log loss with defaults and at best, seconds."""
    table = table_of("model", ("trials", "failed", "defaults", "best", "seconds"), caption="validation log loss")
    for model, entry in record["models"].items():
        trials = entry["trials"]
        table.add_row(
            Text(model),
            str(len(trials)),
            str(sum(trial["error"] is not None for trial in trials)),
            decimals(trials[0]["valid_logloss"]),
            decimals(best_trial(entry)["valid_logloss"]),
            f"{seconds(entry):,.0f}",
        )
    return table


def tried_table(record: Record) -> Table:
    """What was tried for whom: a row an option of a model, with its range, default and best value."""
    table = table_of("option", ("tried", "default", "best"))
    for model, entry in record["models"].items():
        table.add_section()
        table.add_row(Text(model, style="bold"))
        first, best = entry["trials"][0]["options"], best_trial(entry)["options"]
        for name, each in space_of(model).items():
            table.add_row(f"  {name.replace('_', ' ')}", str(each), text(first[name]), text(best[name]))
    return table
