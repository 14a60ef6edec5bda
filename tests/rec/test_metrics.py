import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saml_rec.evaluation.metrics import evaluate_scores


def evaluate(labels, logits, scenarios, names=("a", "b")):
    return evaluate_scores(np.array(labels, np.float32), np.array(logits, np.float64), np.array(scenarios, int), names)


def test_measures_of_known_rows():
    metrics = evaluate([0, 1, 1, 0, 1], [0.0, 0.0, 2.0, -1.0, -2.0], [0, 0, 0, 1, 1])
    # Pairs (positive, negative) in order, ties half: a (0.5 + 1) / 2, b 0 / 1.
    assert metrics["scenarios"]["a"]["auc"] == pytest.approx(0.75)
    assert metrics["scenarios"]["b"]["auc"] == 0
    losses = [math.log(2), math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    assert metrics["overall"]["logloss"] == pytest.approx(sum(losses) / 5)
    assert metrics["scenarios"]["a"]["logloss"] == pytest.approx(sum(losses[:3]) / 3)
    assert [scores["rows"] for scores in (metrics["overall"], *metrics["scenarios"].values())] == [5, 3, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auc_counts_pairs_in_order(rows):
    labels, logits = zip(*rows, strict=True)
    auc = evaluate(labels, logits, [0] * len(rows), ("a",))["overall"]["auc"]
    pairs = [(p > n) + 0.5 * (p == n) for y, p in rows if y for other, n in rows if not other]
    assert auc == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_log_loss_but_no_auc(label):
    scores = evaluate([label, 0, 1], [1.0, -1.0, 1.0], [0, 1, 1])["scenarios"]["a"]
    assert scores == {"auc": None, "logloss": pytest.approx(math.log1p(math.exp(1 - 2 * label))), "rows": 1}


def test_no_rows_have_no_measures():
    metrics = evaluate([], [], [])
    nothing = {"auc": None, "logloss": None, "rows": 0}
    assert metrics == {"overall": nothing, "scenarios": {"a": nothing, "b": nothing}}


def test_scenarios_stand_in_order_of_their_ids():
    assert list(evaluate([1], [0.0], [2], ("z", "a", "m"))["scenarios"]) == ["z", "a", "m"]


def test_extreme_logits_give_strict_json():
    metrics = evaluate([1, 0, 1], [-1e30, 1e30, 1e30], [0, 0, 0])
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    # The two wrong rows lose all that clipping leaves: -log(2.2e-16).
    assert metrics["overall"]["logloss"] == pytest.approx(2 / 3 * -math.log(np.finfo(np.float64).eps), rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "logits", "scenarios", "message"),
    [
        ([0, 1], [0.0, math.nan], [0, 0], "1 of 2 logits are not finite"),
        ([0, 1], [math.inf, 0.0], [0, 0], "1 of 2 logits are not finite"),
        ([0, 0.5], [0.0, 0.0], [0, 0], "labels must be 0 or 1"),
        ([0, 1], [0.0], [0, 0], "equally long, got 2, 1 and 2"),
    ],
)
def test_refuses_what_has_no_measure(labels, logits, scenarios, message):
    with pytest.raises(ValueError, match=message):
        evaluate(labels, logits, scenarios)
