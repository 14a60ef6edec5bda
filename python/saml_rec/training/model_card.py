"""What a finished run is, on a page for people: data, schema, metrics by scenario, versions, how to do it again."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saml_rec.console import IN_TABLE, METRIC_NAMES, decimals, total_name
from saml_rec.errors import escaped, shortened


def model_card(metrics: Mapping[str, Any], schema: Mapping[str, Any], configuration: Mapping[str, Any] | None) -> str:
    """Markdown.

    Args:
        metrics: the content of metrics.json.
        schema: as :meth:`saml_rec.data.schema.Schema.to_dict` gives it.
        configuration: the content of run.toml; None: the run has none.
    """
    data, options = metrics["data"], metrics["options"]
    paths = [data["path"]] if isinstance(data["path"], str) else data["path"] or ["not known"]
    roles = ("label", "scenario", "time", "split_column", "weight", "group")
    parts = [
        f"# Model card: {_text(metrics['model'])}",
        f"A model of saml-rec that predicts the probability of {_text(schema['label'])} in "
        f"{len(metrics['scenarios'])} scenarios: {metrics['parameters']:,} parameters, epoch {metrics['best_epoch']} "
        f"of {metrics['epochs']} by validation log loss, seed {metrics['seed']}, on {_text(metrics['device'])}.",
        "## Data",
        _bullets(map(_text, paths)),
        _table(("split", "rows"), [(name, f"{rows:,}") for name, rows in data["rows"].items()]),
        "## Schema",
        _table(("role", "column"), [(role, schema[role]) for role in roles if schema.get(role)]),
        _table(
            ("feature", "kind", "by scenario"),
            [(name, each["kind"], each.get("scenario_aware", False)) for name, each in schema["features"].items()],
        ),
        "## Metrics on the test rows",
        _metrics(metrics),
        "## Options",
        _table(("option", "value"), _flat(options)),
        "## Versions",
        _table(("package", "version"), metrics["versions"].items()),
        "## The same again",
        "The run was made from Python; its options stand above."
        if configuration is None
        else "In the directory of this run, on the same data:\n\n    saml-rec train --config run.toml --out DIRECTORY",
    ]
    return "\n\n".join(parts) + "\n"


def _metrics(metrics: Mapping[str, Any]) -> str:
    shown = [metric for metric in IN_TABLE if metric in metrics["overall"]]
    rows = [*metrics["scenarios"].items(), (total_name(metrics["scenarios"]), metrics["overall"])]
    return _table(
        ("scenario", *(METRIC_NAMES[metric] for metric in shown), "rows"),
        [(name, *(decimals(each[metric]) for metric in shown), f"{each['rows']:,}") for name, each in rows],
    )


def _flat(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options, those of the model among them, that are set."""
    own = {name: value for name, value in options.items() if not isinstance(value, Mapping)}
    every = own | dict(options["model_options"])
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in every.items()
        if value is not None
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _text(value: Any) -> str:
    """Data as a page shows them: on one line, with no sign that Markdown would take for its own."""
    text = escaped(str(value))
    text = text if len(text) <= 200 else shortened(text, 200)
    return "".join(f"\\{letter}" if letter in "|`<[*" else letter for letter in text)
