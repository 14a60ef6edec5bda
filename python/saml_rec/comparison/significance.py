"""Whether two models differ, or chance does: of the test rows, and of the seeds.

Other test rows would give other metrics. How much a difference between two models, averaged over seeds, varies with the
rows is estimated on the rows that both were measured on:

    AUC              DeLong, DeLong and Clarke-Pearson, Biometrics 1988, by midranks (Sun and Xu, IEEE Signal Processing
                     Letters 2014). The seed mean of an AUC has the seed means of its rows' placements, so its variance
                     over rows is that of those. Rows of one group are not independent: there the placements of a group
                     are summed first (Obuchowski, Biometrics 1997, with G/(G − 1) as the only correction)
    other metrics,   bootstrap of the groups, or of the rows where they have no groups (Efron and Tibshirani, 1993,
    AUC of weights   chapter 8): the same draws for all models

Both are covariances of the models' metrics. Other seeds would train other models: that is the standard error of the
differences seed by seed. A difference is judged by both errors together (:func:`judge`).
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from saml_rec.evaluation.metrics import LARGEST_LOSS, Array, GroupedAUC, LabelledRows, binned, entropy, sigmoid

LEVEL = 0.95
NORMAL = float(student.ppf((1 + LEVEL) / 2, np.inf))
DIFFERS, DOES_NOT = "differs", "does not"
DELONG, CLUSTERED, BOOTSTRAP = "DeLong", "DeLong by group", "bootstrap"

REPLICATES = 1000
"""Of metrics that are ratios of sums over rows."""
RANKED_REPLICATES = 200
"""Of metrics that need the rows in order; down to FEWEST_REPLICATES where they would look at RANKED_VISITS rows."""
FEWEST_REPLICATES = 50
RANKED_VISITS = 10**9
DRAWN_AT_ONCE = 2**22
"""Counts of how often rows or groups are drawn that are in memory."""
RANKED = ("pr_auc", "ece")

Logits = Mapping[str, Sequence[NDArray[np.floating]]]
"""Per model, in one order, and per seed the (N,) scores of the same rows."""


@dataclass(frozen=True)
class RowError:
    """Standard error of a metric or a difference over sets of test rows, how it was estimated, by how many draws."""

    standard_error: float
    method: str
    replicates: int | None = None

    @property
    def half_width(self) -> float:
        """Of the interval that holds the value of all rows there could be with probability LEVEL."""
        return NORMAL * self.standard_error


class Errors(Protocol):
    """Standard errors over test rows."""

    def of(self, measure: str, scenario: int | None, first: str, second: str | None = None) -> RowError | None:
        """Of a model's metric, or of the first model's minus the second's; None where it cannot be estimated.

        Args:
            measure: as in metrics.json.
            scenario: id; None for all rows.
            first, second: models.
        """


@dataclass(frozen=True)
class _Covariance:
    """Of the models' metrics over sets of rows, (models, models)."""

    matrix: Array
    method: str
    replicates: int | None = None


@dataclass(frozen=True)
class RowErrors:
    """What :func:`row_errors` found.

    Args:
        models: in the order of the matrices.
        covariances: by measure and scenario.
    """

    models: tuple[str, ...]
    covariances: Mapping[tuple[str, int | None], _Covariance]

    def of(self, measure: str, scenario: int | None, first: str, second: str | None = None) -> RowError | None:
        """As :class:`Errors`."""
        found = self.covariances.get((measure, scenario))
        if found is None:
            return None
        contrast = np.array([(name == first) - float(name == second) for name in self.models])
        variance = float(contrast @ found.matrix @ contrast)
        return RowError(max(variance, 0.0) ** 0.5, found.method, found.replicates)


def row_errors(rows: LabelledRows, logits: Logits, num_scenarios: int) -> RowErrors:
    """How metrics and their differences vary with the rows, for all rows and within every scenario.

    Args:
        rows: N test rows.
        logits: of them.
        num_scenarios: M.

    Returns:
        For all rows auc, logloss, normalised_entropy, predicted_over_observed, pr_auc, ece, and gauc where rows have
        groups; within scenarios all but pr_auc and ece. A metric that these rows do not define is left out.
    """
    scopes: list[int | None] = [None, *range(num_scenarios)]
    found: dict[tuple[str, int | None], _Covariance] = {}
    for scenario in scopes:
        chosen = np.ones(len(rows), bool) if scenario is None else rows.scenarios == scenario
        if rows.weights is not None:
            chosen &= rows.weights > 0
        scope = _Scope(rows.where(chosen), {name: [each[chosen] for each in runs] for name, runs in logits.items()})
        for measure, covariance in scope.covariances(ranked=RANKED if scenario is None else ()):
            found[measure, scenario] = covariance
    return RowErrors(tuple(logits), found)


class _Scope:
    """Rows with weights above 0 that metrics are of, and their scores by every model and seed."""

    def __init__(self, rows: LabelledRows, logits: Logits) -> None:
        self.rows, self.logits = rows, logits
        if rows.groups is None:
            self.unit_of, self.units = np.arange(len(rows)), len(rows)
        else:
            names, self.unit_of = np.unique(rows.groups, return_inverse=True)
            self.units = len(names)

    def covariances(self, ranked: Sequence[str]) -> Iterator[tuple[str, _Covariance]]:
        if self.units < 2:
            return
        positives = int(self.rows.labels.sum())
        if min(positives, len(self.rows) - positives) < 2:
            # No spread to see within one of the labels.
            ranked = ()
        elif self.rows.weights is not None:
            ranked = ("auc", *ranked)
        else:
            yield "auc", self._delong()
        replicated = self._ratios()
        if ranked:
            replicated |= self._ranked(ranked)
        for measure, values in replicated.items():
            defined = values[np.isfinite(values).all(axis=1)]
            if len(defined) > 1:
                matrix = np.atleast_2d(np.cov(defined, rowvar=False))
                yield measure, _Covariance(matrix, BOOTSTRAP, len(defined))

    def _delong(self) -> _Covariance:
        labels = self.rows.labels
        placed = np.array(
            [np.mean([placements(labels, scores) for scores in runs], axis=0) for runs in self.logits.values()]
        )
        if self.rows.groups is None:
            return _Covariance(delong_covariance(labels, placed), DELONG)
        return _Covariance(clustered_covariance(labels, placed, self.unit_of, self.units), CLUSTERED)

    def _draws(self, replicates: int) -> Iterator[NDArray[np.integer]]:
        """How often each unit is drawn, (some replicates, units) at a time: the same draws for whoever asks."""
        draw = np.random.default_rng(self.units)
        at_once = max(1, DRAWN_AT_ONCE // self.units)
        for start in range(0, replicates, at_once):
            count = min(at_once, replicates - start)
            drawn = draw.integers(0, self.units, (count, self.units)) + self.units * np.arange(count)[:, None]
            yield np.bincount(drawn.ravel(), minlength=count * self.units).reshape(count, self.units)

    def _ratios(self) -> dict[str, Array]:
        """Per metric that is made of sums over units its seed means in every replicate, (replicates, models)."""
        weights, labels = self.rows.counts, self.rows.labels.astype(np.float64)
        shared = [self._by_unit(weights), self._by_unit(weights * labels), self._group_weights()]
        losses, predicted, within = (
            np.array(columns).T for columns in zip(*(self._sums(runs) for runs in self.logits.values()), strict=True)
        )
        sums = np.column_stack([*shared, losses, predicted, within])
        totals = np.concatenate([drawn.astype(np.float64) @ sums for drawn in self._draws(REPLICATES)])
        weight, positive, grouped = (totals[:, [column]] for column in range(len(shared)))
        losses, predicted, within = np.split(totals[:, len(shared) :], 3, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {
                "logloss": losses / weight,
                "normalised_entropy": losses / weight / entropy(positive / weight),
                "predicted_over_observed": predicted / positive,
            }
            return values if self.rows.groups is None else values | {"gauc": within / grouped}

    def _sums(self, runs: Sequence[NDArray[np.floating]]) -> tuple[Array, Array, Array]:
        """Per unit, means over seeds: Σ w · loss, Σ w p, and W · AUC of a group with both labels."""
        weights, labels = self.rows.counts, self.rows.labels
        losses, predicted = np.zeros(len(labels)), np.zeros(len(labels))
        within = np.zeros(self.units)
        for scores in runs:
            # log(1 + exp(−z)) for label 1 and log(1 + exp(z)) for label 0, no larger than the metric lets it be.
            losses += np.minimum(np.logaddexp(0, scores * (1 - 2 * labels.astype(np.float64))), LARGEST_LOSS)
            predicted += sigmoid(scores)
            if self.rows.groups is not None:
                by_group = GroupedAUC.of(self.rows, scores)
                within += by_group.auc * by_group.weight
        count = len(runs)
        by_unit = (self._by_unit(weights * losses / count), self._by_unit(weights * predicted / count))
        return *by_unit, within / count

    def _group_weights(self) -> Array:
        """W of every group with both labels, else 0."""
        if self.rows.groups is None:
            return np.zeros(self.units)
        # Which groups have both labels does not depend on the scores.
        by_group = GroupedAUC.of(self.rows, np.zeros(len(self.rows)))
        return by_group.weight * by_group.has_both

    def _by_unit(self, values: Array) -> Array:
        return np.asarray(np.bincount(self.unit_of, values, self.units), np.float64)

    def _ranked(self, measures: Sequence[str]) -> dict[str, Array]:
        """Per metric that needs the rows in order its seed means in every replicate, (replicates, models)."""
        runs = sum(len(each) for each in self.logits.values())
        replicates = max(FEWEST_REPLICATES, min(RANKED_REPLICATES, RANKED_VISITS // (runs * len(self.rows))))
        values = {measure: np.zeros((replicates, len(self.logits))) for measure in measures}
        weights = self.rows.counts
        for model, each in enumerate(self.logits.values()):
            ranked = [RankedRows(self.rows.labels, scores) for scores in each]
            draws = (drawn for block in self._draws(replicates) for drawn in block)
            for replicate, drawn in enumerate(draws):
                drawn_weights = drawn[self.unit_of] * weights
                for run in ranked:
                    cells = run.cells(drawn_weights)
                    for measure in measures:
                        values[measure][replicate, model] += RANKED_METRICS[measure](*cells) / len(each)
        return values


class RankedRows:
    """Rows in rising order of their scores, in cells of equal score.

    Args:
        labels, scores: (N,).
    """

    def __init__(self, labels: NDArray[np.floating], scores: NDArray[np.floating]) -> None:
        self._order = np.argsort(scores, kind="stable")
        ranked = scores[self._order]
        self._starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        self._labels = labels[self._order].astype(np.float64)
        self._probabilities = sigmoid(ranked[self._starts])

    def cells(self, weights: Array) -> tuple[Array, Array, Array]:
        """For weights (N,) of the rows as they were given, per cell the weight of label 1, of label 0, and p."""
        ranked = weights[self._order]
        whole = np.add.reduceat(ranked, self._starts)
        positive = np.add.reduceat(ranked * self._labels, self._starts)
        return positive, whole - positive, self._probabilities


def _auc(positive: Array, negative: Array, _: Array) -> float:
    with np.errstate(invalid="ignore"):
        in_order = positive @ (np.cumsum(negative) - negative / 2)
        return float(in_order / (positive.sum() * negative.sum()))


def _average_precision(positive: Array, negative: Array, _: Array) -> float:
    with np.errstate(invalid="ignore"):
        found = np.cumsum(positive[::-1])
        taken = found + np.cumsum(negative[::-1])
        precision = found / np.where(taken > 0, taken, 1)
        return float(positive[::-1] @ precision / found[-1])


def _calibration_error(positive: Array, negative: Array, probabilities: Array) -> float:
    weight = positive + negative
    return float(np.abs(binned(weight, positive - weight * probabilities)).sum() / weight.sum())


RANKED_METRICS = {"auc": _auc, "pr_auc": _average_precision, "ece": _calibration_error}


def placements(labels: NDArray[np.floating], scores: NDArray[np.floating]) -> Array:
    """DeLong's structural components, (N,).

    Of a row with label 1 the share of rows with label 0 that score below it, of a row with label 0 the share of rows
    with label 1 that score above it; equal scores count half. The mean over the rows of either label is the AUC.

    Args:
        labels: (N,) zeros and ones, both.
        scores: (N,).
    """
    ranks = rankdata(scores)
    result = np.empty(len(scores))
    for label in (0, 1):
        own = labels == label
        below = (ranks[own] - rankdata(scores[own])) / np.count_nonzero(~own)
        result[own] = below if label else 1 - below
    return result


def delong_covariance(labels: NDArray[np.floating], placed: Array) -> Array:
    """Covariance of AUCs over sets of independent rows, (models, models).

    Args:
        labels: (N,) with each label twice at least.
        placed: (models, N) placements, or means of them over seeds.
    """
    parts = [np.atleast_2d(np.cov(placed[:, labels == label])) / np.count_nonzero(labels == label) for label in (0, 1)]
    return np.asarray(parts[0] + parts[1])


def clustered_covariance(
    labels: NDArray[np.floating], placed: Array, group_of: NDArray[np.integer], groups: int
) -> Array:
    """Covariance of AUCs over sets of independent groups of rows, (models, models).

    Args:
        labels: (N,), both.
        placed: (models, N) placements, or means of them over seeds.
        group_of: (N,) in 0..groups-1.
        groups: at least 2.
    """
    influence = np.empty_like(placed)
    for label in (0, 1):
        own = labels == label
        influence[:, own] = (placed[:, own] - placed[:, own].mean(axis=1, keepdims=True)) / np.count_nonzero(own)
    sums = np.array([np.bincount(group_of, each, groups) for each in influence])
    return np.asarray(sums @ sums.T * groups / (groups - 1))


def judge(first: Sequence[float], second: Sequence[float], rows: RowError | None) -> dict[str, Any]:
    """Whether two models differ by more than test rows and seeds make them differ.

    Args:
        first, second: a metric by seed, the same seeds in both.
        rows: error of the difference of their means over sets of test rows; None if it is not known.

    Returns:
        ``mean``, of first − second. From the rows: ``row_standard_error``, ``interval`` (mean ± 1.96 of them),
        ``method`` and ``replicates``. From the seeds: ``pooled_deviation``, √((s₁² + s₂²) / 2), and
        ``seed_standard_error``, of the differences seed by seed; None for one seed. From both:
        ``total_standard_error``, √(rows² + seeds²); ``p_value``, two-sided, of Student's t with the degrees of freedom
        of Satterthwaite (rows count as infinitely many); ``verdict``, "differs" where that is below 0.05, "does
        not" else. With one seed it rests on the rows alone; without an error of rows there is none.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, seeds = statistics.mean(differences), len(differences)
    pooled = seed_error = None
    if seeds > 1:
        pooled = ((statistics.variance(first) + statistics.variance(second)) / 2) ** 0.5
        seed_error = statistics.stdev(differences) / seeds**0.5
    result: dict[str, Any] = {
        "mean": mean,
        "row_standard_error": None,
        "interval": None,
        "method": None,
        "replicates": None,
        "pooled_deviation": pooled,
        "seed_standard_error": seed_error,
        "total_standard_error": None,
        "p_value": None,
        "verdict": None,
    }
    if rows is None:
        return result
    total = (rows.standard_error**2 + (seed_error or 0.0) ** 2) ** 0.5
    p_value = _two_sided(mean, total, _freedom(total, seed_error, seeds))
    return result | {
        "row_standard_error": rows.standard_error,
        "interval": [mean - rows.half_width, mean + rows.half_width],
        "method": rows.method,
        "replicates": rows.replicates,
        "total_standard_error": total,
        "p_value": p_value,
        "verdict": verdict_of(p_value),
    }


def verdict_of(p_value: float) -> str:
    """At LEVEL."""
    return DIFFERS if p_value < 1 - LEVEL else DOES_NOT


def _freedom(total: float, seed_error: float | None, seeds: int) -> float:
    """Degrees of freedom of the total error: as few as the seeds have where it is theirs."""
    share = (seed_error / total) ** 4 if seed_error else 0.0
    return (seeds - 1) / share if share else np.inf


def _two_sided(mean: float, error: float, freedom: float) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * student.sf(abs(mean) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values for as many tests at once (Holm, Scandinavian Journal of Statistics 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.array(p_values, np.float64)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return [float(value) for value in adjusted]
