"""Metrics against formulas and libraries, weights against repeated rows, groups one by one."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from saml_rec.console import metrics_table, total_name
from saml_rec.evaluation.metrics import (
    CALIBRATION_BINS,
    LARGEST_LOSS,
    GroupedAUC,
    LabelledRows,
    calibration,
    evaluate_scores,
    score_rows,
    sigmoid,
)


def evaluate(labels, logits, scenarios, names=("a", "b"), **more):
    rows = LabelledRows(np.array(labels, np.float32), np.array(scenarios, int), **more)
    return evaluate_scores(rows, np.array(logits, np.float64), names)


def draw_rows(count, seed=0, groups=12, most=4, dtype=np.float64):
    """Rows with ties, integer weights of 0 and more, groups of which some have one label; and their logits."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=count).round(1).astype(dtype)
    labels = (draw.random(count) < sigmoid(logits - 0.5)).astype(np.float32)
    group = draw.integers(0, groups, count)
    labels[group == 0] = 1
    weights = draw.integers(0, most, count).astype(np.float32)
    return LabelledRows(labels, draw.integers(0, 2, count), weights, group - 5), logits


@pytest.mark.parametrize("given", [("weights", "groups"), ("weights",), ("groups",), ()], ids=str)
def test_rows_are_chosen_and_joined(given):
    rows, _ = draw_rows(9)
    rows = LabelledRows(
        rows.labels,
        rows.scenarios,
        rows.weights if "weights" in given else None,
        rows.groups if "groups" in given else None,
    )
    chosen = np.arange(9) % 3 == 0
    joined = LabelledRows.joined([rows.where(chosen), rows.where(~chosen)])
    order = [0, 3, 6, 1, 2, 4, 5, 7, 8]
    assert len(rows.where(chosen)) == 3
    for name in ("labels", "scenarios", "weights", "groups"):
        before, after = getattr(rows, name), getattr(joined, name)
        if name in ("weights", "groups") and name not in given:
            assert after is None
        else:
            np.testing.assert_array_equal(after, before[order])


def test_documented_constants():
    assert CALIBRATION_BINS == 10
    assert pytest.approx(52 * math.log(2)) == LARGEST_LOSS


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


def test_auc_orders_scores_whose_probabilities_are_equal():
    """Above 37 the sigmoid is 1."""
    scores = evaluate([0, 1, 0, 1], [40.0, 50.0, 60.0, 70.0], [0, 0, 0, 0])["overall"]
    assert scores["auc"] == 0.75


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_log_loss_but_no_auc(label):
    scores = evaluate([label, 0, 1], [1.0, -1.0, 1.0], [0, 1, 1])["scenarios"]["a"]
    assert scores["auc"] is scores["pr_auc"] is scores["normalised_entropy"] is None
    assert scores["logloss"] == pytest.approx(math.log1p(math.exp(1 - 2 * label)))
    assert scores["predicted_over_observed"] == (pytest.approx(1 / (1 + math.exp(-1))) if label else None)
    assert scores["ece"] == pytest.approx(abs(label - 1 / (1 + math.exp(-1))))
    assert scores["rows"] == 1


def test_no_rows_have_no_measures():
    metrics = evaluate([], [], [])
    names = ("auc", "logloss", "pr_auc", "normalised_entropy", "predicted_over_observed", "ece")
    nothing = {**dict.fromkeys(names), "rows": 0}
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
        ([0, 1], [0.0], [0, 0], "equally long, got 2 labels, 1 logits, 2 scenarios"),
    ],
)
def test_refuses_what_has_no_measure(labels, logits, scenarios, message):
    with pytest.raises(ValueError, match=message):
        evaluate(labels, logits, scenarios)


def test_refuses_weights_that_are_none():
    for weights in ([1.0, -1.0], [1.0, math.nan], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="weights must be finite and at least 0"):
            evaluate([0, 1], [0.0, 1.0], [0, 0], weights=np.array(weights))
    with pytest.raises(ValueError, match=r"2 labels, 2 logits, 2 scenarios, 3 weights$"):
        evaluate([0, 1], [0.0, 1.0], [0, 0], weights=np.ones(3))
    with pytest.raises(ValueError, match="2 labels, 2 logits, 2 scenarios, 3 groups"):
        evaluate([0, 1], [0.0, 1.0], [0, 0], groups=np.arange(3))


@pytest.mark.parametrize("seed", range(5))
def test_a_weight_counts_as_so_many_equal_rows(seed):
    rows, logits = draw_rows(300, seed)
    times = rows.weights.astype(int)
    repeated = LabelledRows(
        *(np.repeat(each, times) for each in (rows.labels, rows.scenarios)), None, rows.groups.repeat(times)
    )
    weighted = evaluate_scores(rows, logits, ("a", "b"))
    expected = evaluate_scores(repeated, np.repeat(logits, times), ("a", "b"))
    for found, wanted in zip(
        (weighted["overall"], *weighted["scenarios"].values()),
        (expected["overall"], *expected["scenarios"].values()),
        strict=True,
    ):
        for metric in set(wanted) - {"rows", "gauc_rows"}:
            assert found[metric] == pytest.approx(wanted[metric], rel=1e-12), metric
    bins = zip(calibration(rows, logits), calibration(repeated, np.repeat(logits, times)), strict=True)
    for found, wanted in bins:
        assert found == pytest.approx(wanted, rel=1e-9)


def test_metrics_are_those_of_scikit_learn_and_of_their_formulas():
    rows, logits = draw_rows(500, groups=30)
    scores = score_rows(rows, logits)
    y, w, p = rows.labels.astype(float), rows.weights.astype(float), 1 / (1 + np.exp(-logits))
    assert scores["rows"] == 500
    assert scores["auc"] == pytest.approx(roc_auc_score(y, logits, sample_weight=w))
    assert scores["pr_auc"] == pytest.approx(average_precision_score(y, logits, sample_weight=w))
    assert scores["logloss"] == pytest.approx(log_loss(y, p, sample_weight=w))
    constant = np.full(len(y), (w * y).sum() / w.sum())
    assert scores["normalised_entropy"] == pytest.approx(
        log_loss(y, p, sample_weight=w) / log_loss(y, constant, sample_weight=w)
    )
    assert scores["predicted_over_observed"] == pytest.approx((w * p).sum() / (w * y).sum())


@pytest.mark.parametrize("weighted", [True, False])
def test_gauc_is_the_weighted_mean_of_every_group_alone(weighted):
    rows, logits = draw_rows(600, seed=3, groups=90)
    w = rows.weights if weighted else np.ones(600)
    rows = LabelledRows(rows.labels, rows.scenarios, rows.weights if weighted else None, rows.groups)
    aucs, weights, count = [], [], 0
    for group in np.unique(rows.groups):
        own = (rows.groups == group) & (w > 0)
        if len(set(rows.labels[own])) == 2:
            aucs.append(roc_auc_score(rows.labels[own], logits[own], sample_weight=w[own]))
            weights.append(w[own].sum())
            count += own.sum()
    scores = score_rows(rows, logits)
    assert scores["gauc"] == pytest.approx(np.average(aucs, weights=weights))
    assert 50 < scores["gauc_groups"] == len(aucs) < 90
    assert scores["gauc_rows"] == count


def test_groups_without_two_labels_have_no_gauc_and_one_group_has_the_auc():
    labels, logits = [1, 0, 1, 0], [0.5, 0.1, 0.3, 0.4]
    alone = evaluate(labels, logits, [0] * 4, groups=np.arange(4))["overall"]
    assert (alone["gauc"], alone["gauc_groups"], alone["gauc_rows"]) == (None, 0, 0)
    together = evaluate(labels, logits, [0] * 4, groups=np.full(4, -(2**63)))["overall"]
    assert together["gauc"] == together["auc"] == 0.75
    assert "gauc" not in evaluate(labels, logits, [0] * 4)["overall"]
    nothing = evaluate([], [], [], groups=np.zeros(0, int))["overall"]
    assert (nothing["gauc"], nothing["gauc_groups"], nothing["gauc_rows"]) == (None, 0, 0)


def test_the_auc_of_a_group_is_0_where_it_is_not_defined():
    rows = LabelledRows(np.array([1, 1, 0, 1]), np.zeros(4, int), None, np.array([5, 5, 7, 7]))
    assert GroupedAUC.of(rows, np.array([0.1, 0.2, 0.3, 0.4])).auc.tolist() == [0, 1]


def test_ece_is_that_of_bins_of_equal_size_whatever_the_order_of_rows():
    draw = np.random.default_rng(1)
    logits = draw.normal(size=1000)
    labels = (draw.random(1000) < sigmoid(logits + 0.4)).astype(np.float32)
    observed, predicted = calibration_curve(labels, sigmoid(logits), n_bins=CALIBRATION_BINS, strategy="quantile")
    rows = LabelledRows(labels, np.zeros(1000, int))
    assert score_rows(rows, logits)["ece"] == pytest.approx(np.abs(observed - predicted).mean())
    found = calibration(rows, logits)
    assert [group["predicted"] for group in found] == pytest.approx(predicted)
    assert [group["observed"] for group in found] == pytest.approx(observed)
    # Ties across the border of two bins are shared between them.
    tied = logits.round(1)
    order = draw.permutation(1000)
    shuffled = LabelledRows(labels[order], np.zeros(1000, int))
    assert score_rows(rows, tied)["ece"] == pytest.approx(score_rows(shuffled, tied[order])["ece"], rel=1e-12)


def test_calibration_does_not_depend_on_the_unit_of_weights():
    rows, logits = draw_rows(200)
    small = LabelledRows(rows.labels, rows.scenarios, rows.weights / 2**20)
    for found, expected in zip(calibration(small, logits), calibration(rows, logits), strict=True):
        assert found["observed"] == pytest.approx(expected["observed"])
        assert found["weight"] * 2**20 == pytest.approx(expected["weight"])


def test_calibration_of_right_probabilities_lies_on_the_diagonal():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=50_000)
    labels = (draw.random(50_000) < 1 / (1 + np.exp(-logits))).astype(float)
    rows = LabelledRows(labels, np.zeros(50_000, int))
    groups = calibration(rows, logits)
    assert [group["weight"] for group in groups] == pytest.approx([5000] * 10)
    for group in groups:
        assert group["observed"] == pytest.approx(group["predicted"], abs=0.025)
    shifted = calibration(rows, logits + 1)
    assert all(group["predicted"] - group["observed"] > 0.05 for group in shifted)
    assert len(calibration(LabelledRows(labels[:3], np.zeros(3, int)), logits[:3])) == 3
    assert score_rows(rows, logits)["ece"] < 0.01 < 0.1 < score_rows(rows, logits + 1)["ece"]
    assert score_rows(rows, logits)["predicted_over_observed"] == pytest.approx(1, abs=0.02)


def test_the_total_has_a_name_of_its_own():
    assert total_name(["a"]) == "overall"
    assert total_name(["overall"]) == "all rows"
    assert total_name(["overall", "all rows", "(all rows)"]) == "((all rows))"
    metrics = evaluate([0, 1, 1, 0], [0.0, 1.0, 2.0, -1.0], [0, 0, 1, 1], ("overall", "all rows"))
    assert metrics["scenarios"]["overall"]["rows"] == 2
    assert metrics["overall"]["rows"] == 4
    assert [str(cell) for cell in metrics_table(metrics).columns[0].cells] == ["overall", "all rows", "(all rows)"]
