"""Errors of metrics over test rows against slow formulas, repeated samples and simulations; verdicts of differences."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ttest_rel
from scipy.stats import t as student
from sklearn.metrics import average_precision_score, roc_auc_score

from saml_rec.comparison import significance
from saml_rec.comparison.significance import (
    RowError,
    clustered_covariance,
    delong_covariance,
    holm,
    judge,
    placements,
    row_errors,
    verdict_of,
)
from saml_rec.comparison.verdicts import all_sentences, by_scenario, verdicts
from saml_rec.evaluation.metrics import LabelledRows, score_rows, sigmoid


@pytest.fixture
def few_replicates(monkeypatch):
    """For tests that do not look at metrics of ranked rows."""
    monkeypatch.setattr(significance, "RANKED_REPLICATES", 2)
    monkeypatch.setattr(significance, "FEWEST_REPLICATES", 2)


def auc_of(placed, labels):
    return float(placed[labels == 1].mean())


def slow_placements(labels, scores):
    """Row by row: the share of rows of the other label that are on the right side, ties half."""
    result = []
    for label, score in zip(labels, scores, strict=True):
        others = [other for wrong, other in zip(labels, scores, strict=True) if wrong != label]
        right = [(score > other if label else score < other) + 0.5 * (score == other) for other in others]
        result.append(sum(right) / len(right))
    return np.array(result)


def slow_delong(labels, first, second):
    """Variance of a difference of AUCs as in DeLong et al. 1988, equations 4 to 6, over all pairs of rows."""
    positives, negatives = (np.flatnonzero(np.array(labels) == label) for label in (1, 0))
    m, n = len(positives), len(negatives)
    kernel = [
        np.array([[(s[i] > s[j]) + 0.5 * (s[i] == s[j]) for j in negatives] for i in positives])
        for s in (first, second)
    ]
    v10 = [k.mean(axis=1) for k in kernel]
    v01 = [k.mean(axis=0) for k in kernel]
    auc = [k.mean() for k in kernel]

    def s(r, t):
        s10 = sum((v10[r][i] - auc[r]) * (v10[t][i] - auc[t]) for i in range(m)) / (m - 1)
        s01 = sum((v01[r][j] - auc[r]) * (v01[t][j] - auc[t]) for j in range(n)) / (n - 1)
        return s10 / m + s01 / n

    return s(0, 0) + s(1, 1) - 2 * s(0, 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(-2, 2)), min_size=6, max_size=30))
def test_delong_is_that_of_all_pairs(rows):
    rows += [(0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)]
    labels, first, second = (np.array(column, float) for column in zip(*rows, strict=True))
    placed = np.array([placements(labels, scores) for scores in (first, second)])
    np.testing.assert_allclose(placed[0], slow_placements(labels, first), atol=1e-12)
    assert placed[0][labels == 1].mean() == pytest.approx(roc_auc_score(labels, first))
    assert placed[0][labels == 0].mean() == pytest.approx(roc_auc_score(labels, first))
    covariance = delong_covariance(labels, placed)
    difference = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert difference == pytest.approx(slow_delong(labels, first, second), abs=1e-12)


def two_scores(draw, rows, gap=0.0, noise=1.0):
    """Labels and two models' scores that are as good as each other but for ``gap``, with a common part."""
    labels = (draw.random(rows) < 0.4).astype(np.float32)
    common = draw.normal(size=rows)
    return labels, [labels + gap * labels * k + common + noise * draw.normal(size=rows) for k in (0, 1)]


def test_the_interval_covers_no_difference_as_often_as_it_says():
    draw = np.random.default_rng(7)
    trials, rows = 1000, 150
    covered = significant = 0
    for _ in range(trials):
        labels, scores = two_scores(draw, rows)
        placed = np.array([placements(labels, each) for each in scores])
        covariance = delong_covariance(labels, placed)
        error = RowError(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), "DeLong")
        verdict = judge(*([auc_of(each, labels)] for each in placed), error)
        low, high = verdict["interval"]
        covered += low <= 0 <= high
        significant += verdict["verdict"] == "differs"
    least, most = binom.interval(0.999, trials, 0.95)
    assert least <= covered <= most
    assert significant == trials - covered


@pytest.mark.usefixtures("few_replicates")
def test_the_error_is_the_deviation_over_new_rows():
    draw = np.random.default_rng(3)
    aucs, losses, errors, loss_errors = [], [], [], []
    for trial in range(400):
        labels, scores = two_scores(draw, 400, gap=0.3)
        aucs.append(np.subtract(*(auc_of(placements(labels, each), labels) for each in scores)))
        losses.append(np.subtract(*(np.logaddexp(0, each * (1 - 2 * labels)).mean() for each in scores)))
        if trial < 5:
            found = row_errors(LabelledRows(labels, np.zeros(400, int)), {"a": [scores[0]], "b": [scores[1]]}, 0)
            errors.append(found.of("auc", None, "a", "b").standard_error)
            loss_errors.append(found.of("logloss", None, "a", "b").standard_error)
    assert np.mean(errors) == pytest.approx(np.std(aucs), rel=0.15)
    assert np.mean(loss_errors) == pytest.approx(np.std(losses), rel=0.15)


def grouped_rows(seed, groups=60, size=12, correlation=1.0):
    """Groups whose rows share a part of their scores' errors, and of their labels' log odds."""
    draw = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), size)
    labels = (draw.random(len(group)) < sigmoid(1.5 * draw.normal(size=groups))[group]).astype(np.float32)
    scores = []
    for _ in range(2):
        own = correlation * draw.normal(size=groups)[group]
        scores.append(labels + own + draw.normal(size=len(group)))
    return LabelledRows(labels, np.zeros(len(group), int), None, group * 7 - 3), scores


def test_rows_of_one_group_are_not_taken_for_independent():
    differences = []
    for seed in range(300):
        rows, scores = grouped_rows(seed)
        differences.append(np.subtract(*(auc_of(placements(rows.labels, each), rows.labels) for each in scores)))
    by_group, by_row = [], []
    for seed in range(20):
        rows, scores = grouped_rows(seed)
        placed = np.array([placements(rows.labels, each) for each in scores])
        group_of = np.unique(rows.groups, return_inverse=True)[1]
        for found, covariance in (
            (by_group, clustered_covariance(rows.labels, placed, group_of, 60)),
            (by_row, delong_covariance(rows.labels, placed)),
        ):
            found.append(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert np.mean(by_group) == pytest.approx(np.std(differences), rel=0.15)
    assert np.mean(by_row) < 0.75 * np.std(differences)
    # A row alone in its group is independent.
    labels, scores = two_scores(np.random.default_rng(0), 500)
    placed = np.array([placements(labels, each) for each in scores])
    alone = clustered_covariance(labels, placed, np.arange(500), 500)
    np.testing.assert_allclose(alone, delong_covariance(labels, placed), rtol=0.02, atol=1e-6)


def test_the_covariance_of_groups_is_that_of_their_sums():
    labels, group_of = np.array([1, 0, 1, 0, 1, 0, 1.0]), np.array([0, 0, 1, 1, 2, 2, 2])
    placed = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [0.1, 0.5, 0.2, 0.9, 0.4, 0.3, 0.6]])
    sums = np.zeros((2, 3))
    for row, (label, group) in enumerate(zip(labels, group_of, strict=True)):
        own = labels == label
        sums[:, group] += (placed[:, row] - placed[:, own].mean(axis=1)) / own.sum()
    expected = sum(np.outer(each, each) for each in sums.T) * 3 / 2
    np.testing.assert_allclose(clustered_covariance(labels, placed, group_of, 3), expected)


@pytest.mark.usefixtures("few_replicates")
def test_the_variance_of_a_seed_mean_is_that_of_the_mean_placements():
    draw = np.random.default_rng(5)
    labels, first = two_scores(draw, 300)
    runs = {"a": [first[0], first[1]], "b": [first[0] + 0.1 * draw.normal(size=300), draw.normal(size=300)]}
    found = row_errors(LabelledRows(labels, np.zeros(300, int)), runs, 1)
    # By bilinearity, from the covariances of every pair of runs.
    placed = np.array([placements(labels, scores) for scores in (*runs["a"], *runs["b"])])
    contrast = np.array([0.5, 0.5, -0.5, -0.5])
    expected = contrast @ delong_covariance(labels, placed) @ contrast
    assert found.of("auc", None, "a", "b").standard_error == pytest.approx(math.sqrt(expected))
    assert found.of("auc", None, "a", "b").method == "DeLong"
    assert found.of("auc", 0, "a", "b").standard_error == pytest.approx(math.sqrt(expected))


def slow_bootstrap(rows, runs, measures, replicates):
    """Covariances over draws of groups, each drawn group's rows repeated, of seed means by :func:`score_rows`."""
    draw = np.random.default_rng(123)
    names = np.unique(rows.groups)
    of_group = {name: np.flatnonzero(rows.groups == name) for name in names}
    values = {measure: [] for measure in measures}
    for _ in range(replicates):
        chosen = draw.choice(names, len(names))
        index = np.concatenate([of_group[name] for name in chosen])
        # A group that is drawn twice is two groups.
        again = np.concatenate([np.full(len(of_group[name]), place) for place, name in enumerate(chosen)])
        weights = None if rows.weights is None else rows.weights[index]
        drawn = LabelledRows(rows.labels[index], rows.scenarios[index], weights, again)
        scored = [[score_rows(drawn, scores[index]) for scores in each] for each in runs.values()]
        for measure in measures:
            values[measure].append([np.mean([scores[measure] for scores in each]) for each in scored])
    return {measure: np.cov(np.array(each), rowvar=False) for measure, each in values.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_every_metric_are_those_of_drawing_groups_again(weighted):
    rows, scores = grouped_rows(1, groups=50, size=8)
    weights = np.random.default_rng(2).integers(0, 4, len(rows)).astype(np.float32) if weighted else None
    rows = LabelledRows(rows.labels, rows.scenarios, weights, rows.groups)
    runs = {"a": [scores[0], scores[0] + 0.3], "b": [scores[1]]}
    measures = ("logloss", "gauc", "normalised_entropy", "predicted_over_observed", "pr_auc", "ece", "auc")
    covariances = slow_bootstrap(rows, runs, measures, 250)
    found = row_errors(rows, runs, 0)
    for measure in measures:
        for pair, contrast in ((("a",), [1, 0]), (("b",), [0, 1]), (("a", "b"), [1, -1])):
            expected = math.sqrt(np.array(contrast) @ covariances[measure] @ contrast)
            error = found.of(measure, None, *pair)
            # Deviations of 250 and of 200 draws: each is off by 5 % where it is normal.
            assert error.standard_error == pytest.approx(expected, rel=0.25), (measure, pair)
            assert error.method == ("bootstrap" if weighted or measure != "auc" else "DeLong by group")


RATIOS = ("logloss", "normalised_entropy", "predicted_over_observed", "gauc")


def test_weights_are_rows_drawn_together_and_their_unit_is_none(monkeypatch):
    monkeypatch.setattr(significance, "RANKED_REPLICATES", 20)
    rows, scores = grouped_rows(3, groups=20, size=6)
    weights = np.random.default_rng(4).integers(0, 4, len(rows))
    weighted = LabelledRows(rows.labels, rows.scenarios, weights.astype(np.float64), rows.groups)
    repeated = LabelledRows(*(np.repeat(each, weights) for each in (rows.labels, rows.scenarios)), None, None)
    units = np.ones(len(repeated))
    repeated = LabelledRows(repeated.labels, repeated.scenarios, units, np.repeat(rows.groups, weights))
    small = LabelledRows(rows.labels, rows.scenarios, weights / 8, rows.groups)
    runs = {"a": [scores[0], scores[1]], "b": [scores[1] - 0.5]}
    expected = row_errors(repeated, {name: [np.repeat(each, weights) for each in own] for name, own in runs.items()}, 0)
    for found in (row_errors(weighted, runs, 0), row_errors(small, runs, 0)):
        assert found.covariances.keys() == expected.covariances.keys()
        for key, covariance in expected.covariances.items():
            assert (found.covariances[key].method, found.covariances[key].replicates) == (
                covariance.method,
                covariance.replicates,
            )
            np.testing.assert_allclose(found.covariances[key].matrix, covariance.matrix, rtol=1e-9, atol=1e-15)


def test_how_many_draws_there_are(monkeypatch):
    rows, scores = grouped_rows(3, groups=20, size=6)
    runs = {"a": [scores[0], scores[1]], "b": [scores[1]]}
    visits = 3 * len(rows)

    def replicates():
        found = row_errors(rows, runs, 0)
        return {measure: found.of(measure, None, "a").replicates for measure, _ in found.covariances}

    ratios = dict.fromkeys(RATIOS, 1000)
    assert replicates() == {"auc": None, "pr_auc": 200, "ece": 200} | ratios
    for most, number in ((100 * visits, 100), (100 * visits - 1, 99), (1, 50), (0, 50)):
        monkeypatch.setattr(significance, "RANKED_VISITS", most)
        assert replicates() == {"auc": None, "pr_auc": number, "ece": number} | ratios
    # However many are in memory at once, they are the same.
    expected = row_errors(rows, runs, 0)
    monkeypatch.setattr(significance, "DRAWN_AT_ONCE", 3 * 20)
    found = row_errors(rows, runs, 0)
    for key, covariance in expected.covariances.items():
        assert found.covariances[key].replicates == covariance.replicates
        np.testing.assert_allclose(found.covariances[key].matrix, covariance.matrix)


def test_two_rows_and_two_draws_have_an_error_and_one_has_none(monkeypatch):
    rows, scores = LabelledRows(np.array([0, 1.0]), np.zeros(2, int)), np.array([0.0, 2.0])
    losses = np.logaddexp(0, scores * [1, -1])
    found = row_errors(rows, {"a": [scores]}, 0)
    assert found.of("logloss", None, "a").standard_error == pytest.approx(np.std(losses) / math.sqrt(2), rel=0.1)
    assert row_errors(rows.where(np.array([True, False])), {"a": [scores[:1]]}, 0).covariances == {}
    monkeypatch.setattr(significance, "REPLICATES", 2)
    assert row_errors(rows, {"a": [scores]}, 0).of("logloss", None, "a") is not None
    monkeypatch.setattr(significance, "REPLICATES", 1)
    assert row_errors(rows, {"a": [scores]}, 0).of("logloss", None, "a") is None


@pytest.mark.parametrize("by_group", [False, True])
def test_rows_without_a_weight_are_no_rows(by_group):
    """Neither drawn nor counted, in all rows and within scenarios."""
    draw = np.random.default_rng(8)
    labels, scenarios = draw.integers(0, 2, 90).astype(float), draw.integers(0, 2, 90)
    weights = draw.integers(0, 3, 90) / 4
    groups = np.sort(draw.integers(0, 20, 90)).astype(str) if by_group else None
    runs = {name: [draw.normal(size=90)] for name in "ab"}
    all_rows, kept = LabelledRows(labels, scenarios, weights, groups), weights > 0
    found = row_errors(all_rows, runs, 2)
    expected = row_errors(all_rows.where(kept), {name: [each[kept] for each in own] for name, own in runs.items()}, 2)
    assert found.covariances.keys() == expected.covariances.keys()
    for key, each in expected.covariances.items():
        np.testing.assert_array_equal(found.covariances[key].matrix, each.matrix)
        assert found.covariances[key].replicates == each.replicates
    own = scenarios == 1
    alone = row_errors(all_rows.where(own), {name: [each[own] for each in runs[name]] for name in runs}, 0)
    for measure in ("auc", "logloss"):
        np.testing.assert_array_equal(found.covariances[measure, 1].matrix, alone.covariances[measure, None].matrix)


def test_draws_do_not_depend_on_the_models_and_scenarios_are_rows_of_their_own():
    draw = np.random.default_rng(0)
    labels, scores = two_scores(draw, 200)
    scenarios = draw.integers(0, 2, 200)
    rows = LabelledRows(labels, scenarios)
    both = row_errors(rows, {"a": [scores[0]], "b": [scores[1]]}, 2)
    alone = row_errors(rows, {"b": [scores[1]]}, 2)
    for measure in ("auc", "logloss", "ece", "pr_auc"):
        assert both.of(measure, None, "b").standard_error == pytest.approx(
            alone.of(measure, None, "b").standard_error, rel=1e-9
        )
    own = rows.where(scenarios == 1)
    inside = row_errors(LabelledRows(own.labels, own.scenarios * 0), {"a": [scores[0][scenarios == 1]]}, 1)
    for measure in ("auc", "logloss"):
        assert both.of(measure, 1, "a").standard_error == pytest.approx(inside.of(measure, None, "a").standard_error)
    assert both.of("ece", 1, "a") is None
    same = row_errors(rows, {"a": [scores[0]], "b": [scores[0]]}, 2)
    assert same.of("auc", None, "a", "b").standard_error == pytest.approx(0, abs=1e-9)


def test_rows_that_show_no_spread_have_no_error():
    scores = {"a": [np.array([0.1, 0.2, 0.3])]}
    one_positive = row_errors(LabelledRows(np.array([0, 0, 1.0]), np.zeros(3, int)), scores, 1)
    assert one_positive.of("auc", None, "a") is None
    assert one_positive.of("logloss", None, "a") is not None
    one_negative = row_errors(LabelledRows(np.array([1, 0, 1.0]), np.zeros(3, int)), scores, 1)
    assert one_negative.of("auc", None, "a") is one_negative.of("ece", None, "a") is None
    two = row_errors(LabelledRows(np.array([1, 0, 1.0, 0]), np.zeros(4, int)), {"a": [np.arange(4.0)]}, 1)
    assert two.of("auc", None, "a").standard_error > 0
    nothing = row_errors(LabelledRows(np.zeros(0), np.zeros(0, int)), {"a": [np.zeros(0)]}, 2)
    assert nothing.covariances == {}
    weightless = LabelledRows(np.array([0, 1.0, 0]), np.zeros(3, int), np.zeros(3))
    assert row_errors(weightless, scores, 1).covariances == {}


def test_draws_without_one_of_the_labels_are_left_out_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for groups in (None, np.array([1, 1, 2, 2])):
            negative = row_errors(LabelledRows(np.zeros(4), np.zeros(4, int), None, groups), {"a": [np.arange(4.0)]}, 1)
            assert {measure for measure, _ in negative.covariances} == {"logloss"}
        labels, weights = np.array([1, 1, 0, 0.0]), np.array([1, 2, 1, 0.5])
        some = row_errors(LabelledRows(labels, np.zeros(4, int), weights), {"a": [np.array([0.1, 0.3, 0.2, 0.4])]}, 0)
    found = {measure: some.of(measure, None, "a").replicates for measure in ("auc", "pr_auc", "ece")}
    assert found["ece"] == 200
    # Of four rows one draw in 16 has no label 1, and as many no label 0, which only the AUC needs.
    assert found["auc"] < found["pr_auc"] < 200
    assert found["auc"] == pytest.approx(200 * 14 / 16, abs=15)


def test_ranked_metrics_are_those_of_scikit_learn():
    draw = np.random.default_rng(1)
    labels, (scores, _) = two_scores(draw, 200)
    scores = scores.round(1)
    weights = draw.integers(0, 4, 200) / 8
    weights[scores == scores.max()] = 0
    cells = significance.RankedRows(labels, scores).cells(weights)
    expected = score_rows(LabelledRows(labels, np.zeros(200, int), weights), scores)
    assert significance.RANKED_METRICS["auc"](*cells) == pytest.approx(
        roc_auc_score(labels, scores, sample_weight=weights)
    )
    assert significance.RANKED_METRICS["pr_auc"](*cells) == pytest.approx(
        average_precision_score(labels, scores, sample_weight=weights)
    )
    assert significance.RANKED_METRICS["ece"](*cells) == pytest.approx(expected["ece"])


def test_a_verdict_rests_on_rows_and_seeds():
    first, second = [0.70, 0.71, 0.72], [0.60, 0.62, 0.615]
    differences = np.subtract(first, second)
    verdict = judge(first, second, RowError(0.01, "DeLong"))
    seeds = differences.std(ddof=1) / math.sqrt(3)
    assert verdict["mean"] == pytest.approx(differences.mean())
    assert verdict["pooled_deviation"] == pytest.approx(math.sqrt((np.var(first, ddof=1) + np.var(second, ddof=1)) / 2))
    assert verdict["seed_standard_error"] == pytest.approx(seeds)
    assert verdict["total_standard_error"] == pytest.approx(math.hypot(0.01, seeds))
    assert verdict["interval"] == pytest.approx([differences.mean() - 0.0196, differences.mean() + 0.0196], abs=1e-5)
    assert verdict["verdict"] == "differs"
    assert (verdict["method"], verdict["replicates"]) == ("DeLong", None)
    assert judge(first, second, RowError(0.01, "bootstrap", 200))["replicates"] == 200
    # Student's t with as few degrees of freedom as the seeds have, the more the less of the error is theirs.
    total = math.hypot(0.01, seeds)
    expected = 2 * student.sf(differences.mean() / total, 2 / (seeds / total) ** 4)
    assert verdict["p_value"] == pytest.approx(expected)
    # As far as rows say nothing, it is the paired t test.
    assert judge(first, second, RowError(0.0, "DeLong"))["p_value"] == pytest.approx(ttest_rel(first, second).pvalue)
    # As far as seeds say nothing, it is the normal distribution's.
    alone = judge([0.7], [0.7 - 1.96 * 0.01], RowError(0.01, "DeLong"))
    assert alone["p_value"] == pytest.approx(0.05, abs=1e-4)
    assert alone["pooled_deviation"] is alone["seed_standard_error"] is None
    assert judge([0.7], [0.69], RowError(0.01, "DeLong"))["verdict"] == "does not"
    # Two seeds that happen to agree do not make the rows certain.
    assert judge([0.71, 0.71], [0.70, 0.70], RowError(0.01, "DeLong"))["verdict"] == "does not"
    assert judge([0.7, 0.7], [0.7, 0.7], RowError(0.0, "DeLong"))["p_value"] == 1
    assert judge([0.7], [0.6], RowError(0.0, "DeLong"))["p_value"] == 0
    assert verdict_of(1 - 0.95) == "does not"
    unknown = judge(first, second, None)
    assert unknown.keys() == verdict.keys()
    assert unknown["verdict"] is unknown["p_value"] is unknown["interval"] is None
    assert unknown["mean"] == verdict["mean"]
    with pytest.raises(ValueError, match="zip"):
        judge([0.7, 0.8], [0.7], None)


# With one seed nothing is known of the others: then it holds for the rows alone.
@pytest.mark.parametrize(("seeds", "deviation"), [(1, 0.0), *itertools.product((2, 3, 10), (0.5, 2.0, 20.0))])
def test_models_that_are_alike_differ_in_one_of_twenty_comparisons(seeds, deviation):
    draw = np.random.default_rng(seeds)
    trials = 1500
    rows, of_seeds = draw.normal(size=trials), deviation * draw.normal(size=(trials, seeds))
    found = [
        judge(list(own + row), [0.0] * seeds, RowError(1.0, "DeLong"))["verdict"]
        for row, own in zip(rows, of_seeds, strict=True)
    ]
    # Satterthwaite's degrees of freedom are an approximation, farthest off for two seeds.
    least, most = binom.interval(0.999, trials, 0.05)
    assert (0 if seeds == 2 else least) <= found.count("differs") <= most + 0.02 * trials * (seeds == 2)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    draw = np.random.default_rng(0)
    p_values = list(draw.random(20) ** 3)
    adjusted = holm(p_values)
    for p_value, other in itertools.pairwise(np.argsort(p_values)):
        assert adjusted[p_value] <= adjusted[other]
    assert min(adjusted) == pytest.approx(min(1, 20 * min(p_values)))


def record_of(means, error, seeds=(0, 1), scenario=None):
    """A record with AUCs, and verdicts as errors of that size give them."""
    names = list(means)
    entries = [
        {"first": a, "second": b, "scenario": None, "measure": "auc"}
        | judge([means[a]] * len(seeds), [means[b]] * len(seeds), RowError(error, "DeLong"))
        for a, b in itertools.combinations(names, 2)
    ]
    for entry, p_value in zip(entries, holm([entry["p_value"] for entry in entries]), strict=True):
        entry["adjusted_verdict"] = "differs" if p_value < 0.05 else "does not"
    scenarios = [{"name": "s", "rows": 9}] if scenario else []
    models = {
        name: {"overall": {"auc": {"mean": mean}}, "scenarios": [{"auc": {"mean": mean}}] * len(scenarios)}
        for name, mean in means.items()
    }
    entries += [entry | {"scenario": "s"} for entry in entries] if scenario else []
    record = {"models": models, "differences": entries, "scenarios": scenarios, "seeds": list(seeds)}
    return record | {"verdicts": verdicts(record)}


def test_the_best_network_and_who_is_level_with_it():
    record = record_of({"shared_bottom": 0.70, "saml": 0.750, "star": 0.748, "hmoe": 0.751}, 0.005)
    assert record["verdicts"]["auc"] == {
        "best": "hmoe",
        "level": ["saml", "star"],
        "worse": ["shared_bottom"],
        "fitted": {},
        "pairs": 6,
        "differ": 3,
        "adjusted_differ": 3,
    }
    assert all_sentences(record) == [
        "By AUC, hmoe is the best network; it cannot be told apart from saml and star; shared_bottom is worse.",
        "6 pairs of models were tested at 95 %; pairs that differ alone and after Holm's adjustment for so many tests: "
        "AUC 3 and 3. What is said above is adjusted.",
    ]


@pytest.mark.parametrize(
    ("auc", "said"),
    [
        (
            0.76,
            "is better than the best network, saml (AUC difference +0.0100, 95 % interval over rows "
            "+0.0061 to +0.0139)",
        ),
        (
            0.751,
            "is level with the best network, saml (AUC difference +0.0010, 95 % interval over rows -0.0029 to +0.0049)",
        ),
        (
            0.74,
            "is worse than the best network, saml (AUC difference -0.0100, 95 % interval over rows -0.0139 to -0.0061)",
        ),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_what_a_model_that_is_no_network_is_told(auc, said, order):
    means = dict([("saml", 0.75), ("star", 0.70), ("logistic_regression", auc)][::order])
    first, second, *_ = all_sentences(record_of(means, 0.002))
    assert first == "By AUC, saml is the best network; star is worse."
    assert second.startswith(f"logistic_regression {said}")
    assert second.endswith(": take logistic_regression.") == (auc == 0.76)
    assert ("these rows do not show that a network pays" in second) == (auc == 0.751)


def test_one_seed_one_model_and_models_that_are_no_networks():
    one = record_of({"saml": 0.7, "star": 0.6}, 0.01, seeds=(0,))
    assert all_sentences(one)[-1].startswith("One seed: this rests on the test rows alone")
    assert all_sentences(record_of({"saml": 0.7}, 0.01)) == []
    fitted = record_of({"lightgbm": 0.72, "logistic_regression": 0.7}, 0.001)
    assert all_sentences(fitted)[0] == "By AUC, lightgbm is the best model; logistic_regression is worse."


def test_many_pairs_are_adjusted_for():
    names = [f"model {index}" for index in range(12)]
    record = record_of({name: 0.7 + 0.0025 * (index == 11) for index, name in enumerate(names)}, 0.001)
    found = record["verdicts"]["auc"]
    assert (found["pairs"], found["differ"], found["adjusted_differ"]) == (66, 11, 0)
    assert found["level"] == names[:11]


def test_the_best_of_every_scenario():
    record = record_of({"saml": 0.75, "star": 0.749, "hmoe": 0.7}, 0.005, scenario="s")
    assert list(by_scenario(record, "auc")) == [("s", "saml", ["star"], ["hmoe"])]
