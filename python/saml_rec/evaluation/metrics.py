"""Metrics of predicted click probabilities, overall and for every scenario; rows may have weights and groups.

A row of weight w counts as w equal rows would. With W the sum of the weights w, labels y and probabilities p:

    log loss             L = −Σ w (y log p + (1 − y) log(1 − p)) / W
    normalised entropy   L / H, H the log loss of the constant Σ w y / W        He et al., ADKDD 2014
    predicted/observed   Σ w p / Σ w y
    ECE                  Σ over bins |Σ w (y − p)| / W, bins of equal weight by score      Naeini et al., AAAI 2015
    GAUC                 Σ over groups W_g AUC_g / Σ W_g, of groups with both labels       Zhu et al., KDD 2017
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

CALIBRATION_BINS = 10
LARGEST_LOSS = float(-np.log(np.finfo(np.float64).eps))
"""Of a row, in nats: what scikit-learn's clipping of probabilities leaves."""

Array = NDArray[np.float64]


class Scores(TypedDict):
    """Metrics of one set of rows; None where one is not defined for it. Those of groups only where rows have groups."""

    auc: float | None
    logloss: float | None
    rows: int
    pr_auc: float | None
    normalised_entropy: float | None
    predicted_over_observed: float | None
    ece: float | None
    gauc: NotRequired[float | None]
    gauc_groups: NotRequired[int]
    gauc_rows: NotRequired[int]


class Evaluation(TypedDict):
    """Measures over all rows and for every scenario, in the order of the scenario ids."""

    overall: Scores
    scenarios: dict[str, Scores]


@dataclass(frozen=True)
class LabelledRows:
    """What rows are measured against.

    Args:
        labels: (N,) zeros and ones.
        scenarios: (N,) scenario ids in 0..M-1.
        weights: (N,) finite and at least 0; None counts every row once.
        groups: (N,) numbers, equal in rows of one group, or None.
    """

    labels: NDArray[np.floating]
    scenarios: NDArray[np.integer]
    weights: NDArray[np.floating] | None = None
    groups: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, chosen: NDArray[np.bool_]) -> "LabelledRows":
        """The rows at which ``chosen`` (N,) is true."""
        return LabelledRows(
            self.labels[chosen],
            self.scenarios[chosen],
            None if self.weights is None else self.weights[chosen],
            None if self.groups is None else self.groups[chosen],
        )

    @classmethod
    def joined(cls, parts: Sequence["LabelledRows"]) -> "LabelledRows":
        """The rows of all parts, at least one; all have weights, or none has, and so for groups."""
        weights = [part.weights for part in parts if part.weights is not None]
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.scenarios for part in parts]),
            np.concatenate(weights) if weights else None,
            np.concatenate(groups) if groups else None,
        )

    @property
    def counts(self) -> Array:
        """(N,) what each row counts."""
        return np.ones(len(self)) if self.weights is None else self.weights.astype(np.float64)


def score_rows(rows: LabelledRows, logits: NDArray[np.floating]) -> Scores:
    """Metrics of one set of rows.

    Args:
        rows: N of them.
        logits: (N,) scores before the sigmoid.

    Returns:
        ``rows`` is N. Of the rows with weight above 0: AUC, area under the precision-recall curve (average precision)
        and normalised entropy, None unless both labels occur; mean log loss in nats and ECE in CALIBRATION_BINS bins,
        None without rows; predicted/observed, None without label 1; GAUC, None without a group that has both labels,
        with the number of groups and rows that it is of. For the logarithm probabilities are clipped to
        [2.2e-16, 1 - 2.2e-16], which bounds the loss of a row by 36.
    """
    grouped = rows.groups is not None
    count = len(rows)
    if rows.weights is not None:
        counted = rows.weights > 0
        rows, logits = rows.where(counted), logits[counted]
    labels, weights = rows.labels, rows.counts
    given = None if rows.weights is None else weights
    probabilities = sigmoid(logits)
    positive = float(weights @ labels)
    has_both = 0 < labels.sum() < len(rows)
    loss = float(log_loss(labels, probabilities, labels=[0, 1], sample_weight=given)) if len(rows) else None
    scores = Scores(
        # From the logits: the sigmoid would tie the largest of them.
        auc=float(roc_auc_score(labels, logits, sample_weight=given)) if has_both else None,
        logloss=loss,
        rows=count,
        pr_auc=float(average_precision_score(labels, logits, sample_weight=given)) if has_both else None,
        normalised_entropy=loss / float(entropy(positive / weights.sum())) if has_both and loss is not None else None,
        predicted_over_observed=float(weights @ probabilities) / positive if positive else None,
        ece=_calibration_error(rows, logits) if len(rows) else None,
    )
    if grouped:
        by_group = GroupedAUC.of(rows, logits)
        scores["gauc"] = by_group.mean
        scores["gauc_groups"] = int(by_group.has_both.sum())
        scores["gauc_rows"] = int(by_group.has_both[by_group.group_of].sum())
    return scores


def evaluate_scores(rows: LabelledRows, logits: NDArray[np.floating], scenario_names: Sequence[str]) -> Evaluation:
    """Metrics overall and for every scenario.

    Args:
        rows: N of them.
        logits: (N,) finite scores before the sigmoid.
        scenario_names: the M names, by id.

    Returns:
        As :func:`score_rows`: plain numbers that strict JSON can hold.

    Raises:
        ValueError: a logit is not finite, a label is neither 0 nor 1, a weight is negative or not finite, or the
            lengths differ.
    """
    check_rows(rows, logits)
    return Evaluation(
        overall=score_rows(rows, logits),
        scenarios={
            name: score_rows(rows.where(rows.scenarios == scenario), logits[rows.scenarios == scenario])
            for scenario, name in enumerate(scenario_names)
        },
    )


def check_rows(rows: LabelledRows, logits: NDArray[np.floating]) -> None:
    """ValueError for rows and scores that have no measure."""
    lengths = {"labels": rows.labels, "logits": logits, "scenarios": rows.scenarios}
    lengths |= {} if rows.weights is None else {"weights": rows.weights}
    lengths |= {} if rows.groups is None else {"groups": rows.groups}
    if len({len(each) for each in lengths.values()}) > 1:
        given = ", ".join(f"{len(each)} {name}" for name, each in lengths.items())
        raise ValueError(f"labels, logits, scenarios, weights and groups must be equally long, got {given}")
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).sum())} of {len(logits)} logits are not finite")
    if not np.isin(rows.labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if rows.weights is not None and not (np.isfinite(rows.weights) & (rows.weights >= 0)).all():
        raise ValueError("weights must be finite and at least 0")


def sigmoid(logits: NDArray[np.floating]) -> Array:
    """Probabilities, (N,), without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits.astype(np.float64))))


def entropy(rate: Array) -> Array:
    """Of shares of label 1, in nats: the log loss of such a share as the prediction of every row."""
    return np.asarray(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


@dataclass(frozen=True)
class GroupedAUC:
    """AUC within every group.

    Args:
        auc: (G,) of every group, 0 where it is not defined.
        weight: (G,) sum of the weights of its rows.
        has_both: (G,) whether both labels occur in it.
        group_of: (N,) the group of every row, in 0..G-1.
    """

    auc: Array
    weight: Array
    has_both: NDArray[np.bool_]
    group_of: NDArray[np.integer]

    @classmethod
    def of(cls, rows: LabelledRows, logits: NDArray[np.floating]) -> "GroupedAUC":
        """Of rows with weights above 0 and groups.

        scikit-learn's AUC of one group takes about a millisecond, and there may be a million groups: here all are
        counted at once, in float64.
        """
        assert rows.groups is not None
        names, group_of = np.unique(rows.groups, return_inverse=True)
        order = np.lexsort((logits, group_of))
        groups, scores = group_of[order], logits[order]
        is_first = np.ones(len(rows), bool)
        is_first[1:] = (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1])
        cell = np.cumsum(is_first) - 1
        # Weight of each label in every cell: the rows of a group with the same score.
        weights, labels = rows.counts[order], rows.labels[order]
        positive, negative = (np.bincount(cell, weights * (labels == label)) for label in (1, 0))
        of_cell = groups[is_first]
        positives, negatives = (
            np.asarray(np.bincount(of_cell, each, len(names)), np.float64) for each in (positive, negative)
        )
        before_group = np.cumsum(negatives) - negatives
        below = np.cumsum(negative) - negative - before_group[of_cell]
        in_order = np.bincount(of_cell, positive * (below + negative / 2), len(names))
        has_both = (positives > 0) & (negatives > 0)
        pairs = np.where(has_both, positives * negatives, 1.0)
        auc = np.asarray(np.where(has_both, in_order / pairs, 0.0), np.float64)
        return cls(auc, positives + negatives, has_both, group_of)

    @property
    def mean(self) -> float | None:
        """GAUC: the weighted mean over the groups with both labels."""
        if not self.has_both.any():
            return None
        return float(np.average(self.auc[self.has_both], weights=self.weight[self.has_both]))


def calibration(rows: LabelledRows, logits: NDArray[np.floating]) -> list[dict[str, float]]:
    """Rows in bins of equal weight by their score: mean prediction, share of label 1 and weight of each.

    There are CALIBRATION_BINS, or as many as there are different scores. A row, or the rows of one score, on the border
    of two bins belongs to both by parts, so that the order of rows does not matter.
    """
    if rows.weights is not None:
        counted = rows.weights > 0
        rows, logits = rows.where(counted), logits[counted]
    weight, predicted, observed = equal_mass_bins(rows, logits)
    return [
        {"predicted": float(p / w), "observed": float(o / w), "weight": float(w)}
        for w, p, o in zip(weight, predicted, observed, strict=True)
    ]


def equal_mass_bins(rows: LabelledRows, logits: NDArray[np.floating]) -> tuple[Array, Array, Array]:
    """Per bin of :func:`calibration` Σ w, Σ w p and Σ w y, of rows with weights above 0."""
    scores, score_of = np.unique(logits, return_inverse=True)
    weights = rows.counts
    weight = np.asarray(np.bincount(score_of, weights), np.float64)
    observed = np.bincount(score_of, weights * rows.labels)
    return binned(weight, weight), binned(weight, weight * sigmoid(scores)), binned(weight, observed)


def binned(weight: Array, sums: NDArray[np.number]) -> Array:
    """Sums over bins of equal weight, (bins,).

    Args:
        weight: (S,) of every score, in rising order; at least 0, and some above it.
        sums: (S,) of every score, divided between bins as its weight is.
    """
    ends = np.append(0, np.cumsum(weight))
    edges = np.linspace(0, ends[-1], min(CALIBRATION_BINS, int(np.count_nonzero(weight))) + 1)
    return np.asarray(np.diff(np.interp(edges, ends, np.append(0, np.cumsum(sums)))))


def _calibration_error(rows: LabelledRows, logits: NDArray[np.floating]) -> float:
    weight, predicted, observed = equal_mass_bins(rows, logits)
    return float(np.abs(observed - predicted).sum() / weight.sum())
