"""What the differences of a comparison come to, as data and as sentences: the best network, and who is level with it.

Verdicts are those adjusted for the number of pairs: the best of many models is best by chance too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from saml_rec.comparison.significance import DIFFERS
from saml_rec.console import METRIC_NAMES
from saml_rec.models.registry import MODELS, is_fitted

SIGNS = {"auc": 1, "gauc": 1, "logloss": -1}
"""Metrics that models are ranked by, and whether more is better."""
BETTER, LEVEL, WORSE = "better", "level", "worse"

Record = Mapping[str, Any]


def verdicts(record: Record) -> dict[str, Any]:
    """Per metric of SIGNS that is defined, for all rows.

    Args:
        record: of compare.json, its ``models`` and ``differences``.

    Returns:
        By metric: ``best``, the network with the best mean; ``level`` and ``worse``, the other networks by whether they
        differ from it; ``fitted``, per model that is no network whether it is better than, level with or worse than
        the best network; ``pairs``, how many pairs were tested, and how many ``differ`` before and after adjustment
        (``adjusted_differ``). Without a network ``best`` is the best model.
    """
    return {metric: found for metric in SIGNS if (found := _verdict(record, metric)) is not None}


def _verdict(record: Record, metric: str) -> dict[str, Any] | None:
    means = {
        name: model["overall"][metric]["mean"] * SIGNS[metric]
        for name, model in record["models"].items()
        if model["overall"].get(metric) is not None
    }
    if not means:
        return None
    ranked = sorted(means, key=lambda name: -means[name])
    networks = [name for name in ranked if not _is_fitted(name)] or ranked
    best = networks[0]
    pairs = differences_of(record, metric, None)
    relations = {name: _relation(pairs, name, best, SIGNS[metric]) for name in ranked if name != best}
    return {
        "best": best,
        "level": [name for name in networks[1:] if relations[name] == LEVEL],
        "worse": [name for name in networks[1:] if relations[name] == WORSE],
        "fitted": {name: relations[name] for name in ranked if name not in networks},
        "pairs": len(pairs),
        "differ": sum(entry["verdict"] == DIFFERS for entry in pairs.values()),
        "adjusted_differ": sum(entry["adjusted_verdict"] == DIFFERS for entry in pairs.values()),
    }


def _is_fitted(model: str) -> bool:
    """A model that is not known here, as of a record from elsewhere, counts as a network."""
    return model in MODELS and is_fitted(model)


def differences_of(record: Record, metric: str, scenario: str | None) -> dict[tuple[str, str], Record]:
    """By pair of models; None for all rows."""
    return {
        (entry["first"], entry["second"]): entry
        for entry in record["differences"]
        if entry["measure"] == metric and entry["scenario"] == scenario
    }


def difference_of(pairs: Mapping[tuple[str, str], Record], first: str, second: str) -> tuple[Record | None, int]:
    """The difference of a pair in either order, and the sign that makes it first minus second."""
    if (first, second) in pairs:
        return pairs[first, second], 1
    return pairs.get((second, first)), -1


def _relation(pairs: Mapping[tuple[str, str], Record], model: str, best: str, sign: int) -> str:
    entry, order = difference_of(pairs, model, best)
    if entry is None or entry["adjusted_verdict"] != DIFFERS:
        return LEVEL
    return BETTER if entry["mean"] * order * sign > 0 else WORSE


def by_scenario(record: Record, metric: str) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Of every scenario that defines the metric: its name, the best model, those level with it, and the others."""
    for index, scenario in enumerate(record["scenarios"]):
        means = {
            name: model["scenarios"][index][metric]["mean"] * SIGNS[metric]
            for name, model in record["models"].items()
            if model["scenarios"][index][metric] is not None
        }
        if len(means) < 2:
            continue
        best, *others = sorted(means, key=lambda name: -means[name])
        pairs = differences_of(record, metric, scenario["name"])
        level = [name for name in others if _relation(pairs, name, best, SIGNS[metric]) == LEVEL]
        yield scenario["name"], best, level, [name for name in others if name not in level]


def sentences(record: Record, metric: str) -> list[str]:
    """A metric's verdict in words."""
    verdict = record["verdicts"].get(metric)
    if verdict is None or len(record["models"]) < 2:
        return []
    best, title = verdict["best"], METRIC_NAMES[metric]
    others = verdict["level"] + verdict["worse"]
    kind = "model" if _is_fitted(best) else "network"
    lines = [f"By {title}, {best} is the {'best' if others else 'only'} {kind}"]
    if verdict["level"]:
        lines[0] += f"; it cannot be told apart from {_listed(verdict['level'])}"
    if verdict["worse"]:
        lines[0] += f"; {_listed(verdict['worse'])} {'is' if len(verdict['worse']) == 1 else 'are'} worse"
    lines[0] += "."
    pairs = differences_of(record, metric, None)
    lines += [_of_fitted(name, relation, best, title, pairs) for name, relation in verdict["fitted"].items()]
    return lines


def _of_fitted(name: str, relation: str, best: str, title: str, pairs: Mapping[tuple[str, str], Record]) -> str:
    entry, order = difference_of(pairs, name, best)
    if entry is None or entry["interval"] is None:
        return f"Nothing can be said about {name} and {best}: these rows do not show how much they vary."
    low, high = sorted(order * end for end in entry["interval"])
    by = f"({title} difference {order * entry['mean']:+.4f}, 95 % interval over rows {low:+.4f} to {high:+.4f})"
    told = {
        BETTER: f"{name} is better than the best network, {best} {by}: take {name}.",
        LEVEL: f"{name} is level with the best network, {best} {by}: these rows do not show that a network pays.",
        WORSE: f"{name} is worse than the best network, {best} {by}.",
    }
    return told[relation]


def how_tested(record: Record) -> list[str]:
    """How many pairs there were, and what the verdicts rest on."""
    counts = [
        f"{METRIC_NAMES[metric]} {verdict['differ']} and {verdict['adjusted_differ']}"
        for metric, verdict in record["verdicts"].items()
        if verdict["pairs"]
    ]
    if not counts:
        return []
    pairs = max(verdict["pairs"] for verdict in record["verdicts"].values())
    lines = [
        f"{pairs} pair{'s' if pairs > 1 else ''} of models {'were' if pairs > 1 else 'was'} tested at 95 %; pairs that "
        f"differ alone and after Holm's adjustment for so many tests: {', '.join(counts)}. What is said above is "
        "adjusted."
    ]
    if len(record["seeds"]) == 1:
        lines.append("One seed: this rests on the test rows alone; another seed may turn it round.")
    return lines


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def all_sentences(record: Record) -> list[str]:
    """Of every metric that models are ranked by, and how they were tested."""
    return [line for metric in SIGNS for line in sentences(record, metric)] + how_tested(record)
