"""AUC and log loss of predicted click probabilities, overall and for every scenario."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score


class Scores(TypedDict):
    """Metrics of one group of rows; None where one is not defined for it."""

    auc: float | None
    logloss: float | None
    rows: int


class Evaluation(TypedDict):
    """Measures over all rows and for every scenario, in the order of the scenario ids."""

    overall: Scores
    scenarios: dict[str, Scores]


def score_rows(labels: NDArray[np.floating], logits: NDArray[np.floating]) -> Scores:
    """Metrics of one group of rows.

    Args:
        labels: (N,) zeros and ones.
        logits: (N,) scores before the sigmoid.

    Returns:
        AUC (None unless both classes occur), mean log loss in nats (None for N = 0), and N. Probabilities
        are clipped to [2.2e-16, 1 - 2.2e-16] before the logarithm, which bounds the loss of a row by 36.
    """
    if len(labels) == 0:
        return Scores(auc=None, logloss=None, rows=0)
    both_classes = len(np.unique(labels)) == 2
    probabilities = np.exp(-np.logaddexp(0, -logits.astype(np.float64)))  # the sigmoid, without overflow
    return Scores(
        # From the logits: the sigmoid would tie the largest of them.
        auc=float(roc_auc_score(labels, logits)) if both_classes else None,
        logloss=float(log_loss(labels, probabilities, labels=[0, 1])),
        rows=len(labels),
    )


def evaluate_scores(
    labels: NDArray[np.floating],
    logits: NDArray[np.floating],
    scenarios: NDArray[np.integer],
    scenario_names: Sequence[str],
) -> Evaluation:
    """AUC and log loss, overall and for every scenario.

    Args:
        labels: (N,) zeros and ones.
        logits: (N,) finite scores before the sigmoid.
        scenarios: (N,) scenario ids in 0..M-1.
        scenario_names: the M names, by id.

    Returns:
        Plain numbers that strict JSON can hold: a scenario with one class has ``auc`` None, one without a
        row ``auc`` and ``logloss`` None.

    Raises:
        ValueError: a logit is not finite, a label is neither 0 nor 1, or the lengths differ.
    """
    if not len(labels) == len(logits) == len(scenarios):
        raise ValueError(
            f"labels, logits and scenarios must be equally long, got {len(labels)}, {len(logits)} and {len(scenarios)}"
        )
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).sum())} of {len(logits)} logits are not finite")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    return Evaluation(
        overall=score_rows(labels, logits),
        scenarios={
            name: score_rows(labels[scenarios == scenario], logits[scenarios == scenario])
            for scenario, name in enumerate(scenario_names)
        },
    )
