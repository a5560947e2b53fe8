"""Metrics against scikit-learn and plain loops; bootstrap intervals against a simulation with known truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import accuracy_score, roc_auc_score

from lmprobe_tl.errors import InputError
from lmprobe_tl.metrics import Interval, accuracy, auroc, bootstrap_interval, tpr_at_fpr

# few distinct values, so that ties are common
TIED_SCORES = st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0])


@st.composite
def scored_examples(draw):
    """labels, scores and weights of 2 to 30 examples, with both classes present."""
    n_positives, n_negatives = draw(st.integers(1, 15)), draw(st.integers(1, 15))
    n = n_positives + n_negatives
    labels = np.array(draw(st.permutations([1] * n_positives + [0] * n_negatives)))
    scores = np.array(draw(st.lists(TIED_SCORES, min_size=n, max_size=n)))
    weights = np.array(draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=n, max_size=n)))
    return labels, scores, weights


def auroc_by_pairs(labels, scores, weights):
    """The definition: every positive against every negative."""
    won = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            pair = weights[i] * weights[j]
            total += pair
            won += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return won / total


def tpr_by_loop(labels, scores, fpr, weights):
    """The definition: try every threshold, and one above all scores."""
    best = 0.0
    for threshold in scores:
        flagged = scores >= threshold
        false_rate = weights[flagged & (labels == 0)].sum() / weights[labels == 0].sum()
        true_rate = weights[flagged & (labels == 1)].sum() / weights[labels == 1].sum()
        if false_rate <= fpr:
            best = max(best, true_rate)
    return best


@settings(deadline=None, max_examples=100)
@given(scored_examples())
def test_auroc_equals_the_loop_over_pairs(examples):
    labels, scores, weights = examples
    assert auroc(labels, scores, sample_weight=weights) == pytest.approx(auroc_by_pairs(labels, scores, weights), abs=1e-12)
    assert auroc(labels, scores) == pytest.approx(auroc_by_pairs(labels, scores, np.ones(len(labels))), abs=1e-12)


def test_auroc_equals_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 500), rng.integers(0, 40, 500) / 7
    weights = rng.integers(0, 4, 500)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert auroc(labels, scores, sample_weight=weights) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_more_classes_is_the_mean_of_one_against_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.choice(["c", "a", "b"], 300)
    probabilities = rng.dirichlet(np.ones(3), 300) + 0.3 * (labels[:, None] == np.array(["a", "b", "c"]))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert 0.6 < expected < 1.0
    assert auroc(labels, probabilities) == pytest.approx(expected, abs=1e-12)
    # logits need not sum to 1: any increasing map of a column leaves its ranking alone
    assert auroc(labels, np.log(probabilities)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("positive", "negative"), [(1, 0), (True, False), (1, -1), ("true", "lie"), (2.0, 1.0)])
def test_the_greater_label_is_the_positive_one(positive, negative):
    labels, scores = np.array([negative, negative, positive, positive]), np.array([0.0, 1.0, 2.0, 3.0])
    assert auroc(labels, scores) == 1.0
    assert tpr_at_fpr(labels, scores, 0.0) == 1.0
    assert auroc(labels, -scores) == 0.0


@settings(deadline=None, max_examples=150)
@given(scored_examples(), st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.9, 1.0]))
def test_tpr_at_fpr_equals_the_loop_over_thresholds(examples, fpr):
    labels, scores, weights = examples
    assert tpr_at_fpr(labels, scores, fpr, sample_weight=weights) == pytest.approx(tpr_by_loop(labels, scores, fpr, weights))
    assert tpr_at_fpr(labels, scores, fpr) == pytest.approx(tpr_by_loop(labels, scores, fpr, np.ones(len(labels))))


def test_tpr_at_fpr_flags_ties_together_and_never_interpolates():
    labels = np.array([1, 0, 1, 0])
    assert tpr_at_fpr(labels, np.array([2.0, 2.0, 1.0, 0.0]), fpr=0.4) == 0.0  # the tie at 2 costs FPR 0.5
    assert tpr_at_fpr(labels, np.array([2.0, 2.0, 1.0, 0.0]), fpr=0.5) == 1.0
    assert tpr_at_fpr(labels, np.array([3.0, 2.0, 1.0, 0.0]), fpr=0.4) == 0.5


@pytest.mark.parametrize("percent", range(101))
def test_an_fpr_reached_exactly_is_allowed(percent):
    scores = np.arange(200.0)
    labels = np.arange(200) % 2  # below positive 2k + 1 stands negative 2k: flagging m negatives flags m + 1 positives
    assert tpr_at_fpr(labels, scores, fpr=percent / 100) == min(1.0, (percent + 1) / 100)


def test_accuracy_equals_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predictions, weights = rng.integers(0, 3, 50), rng.integers(0, 3, 50), rng.random(50)
    assert accuracy(labels, predictions) == pytest.approx(accuracy_score(labels, predictions))
    expected = accuracy_score(labels, predictions, sample_weight=weights)
    assert accuracy(labels, predictions, sample_weight=weights) == pytest.approx(expected)


SCORES = np.array([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([1, 1, 1], SCORES), r"two classes.*single class: \[1\]"),
        (lambda: auroc([0, 1, 1], SCORES, sample_weight=[0, 1, 1]), r"single class: \[1\]"),
        (lambda: auroc([0, 1, 2], SCORES), r"3 classes \(\[0, 1, 2\]\).*shape \(3,\)"),
        (lambda: auroc([0, 1, 1], np.ones((3, 3))), r"2 classes.*shape \(3, 3\)"),
        (lambda: auroc([0, 1], SCORES), r"shapes \(2,\) and \(3,\)"),
        (lambda: auroc([0, 1, 1], [0.1, np.nan, 0.3]), "1 of the scores are NaN"),
        (lambda: auroc([0, 1, 1], SCORES, sample_weight=[1, -1, 1]), "sample_weight must hold 3"),
        (lambda: tpr_at_fpr([0, 1, 1], SCORES, fpr=1.5), "between 0 and 1, got 1.5"),
        (lambda: tpr_at_fpr([1, 1, 1], SCORES, fpr=0.1), "two classes"),
        (lambda: accuracy([0, 1], [0, 1, 1]), r"shapes \(3,\) and \(2,\)"),
        (lambda: bootstrap_interval(auroc, [0, 1, 1], SCORES, confidence=95), "confidence.*95"),
        (lambda: bootstrap_interval(auroc, [0, 1, 1], SCORES, groups=[0, 1]), r"\(3,\), \(3,\), \(2,\)"),
        (lambda: bootstrap_interval(auroc, [1, 1, 1], SCORES), "single class"),
    ],
)
def test_unusable_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- Bootstrap

TRUE_SHIFT, GROUP_NOISE, TOKEN_NOISE = 1.0, 1.0, 0.5
TRUE_AUROC = norm.cdf(TRUE_SHIFT / np.sqrt(2 * (GROUP_NOISE**2 + TOKEN_NOISE**2)))


def grouped_data(rng, n_groups=60, group_size=10):
    """Prompts with one label each, whose tokens share most of their noise: labels, scores, groups, each [n_examples]."""
    groups = np.repeat(np.arange(n_groups), group_size)
    labels = groups % 2
    scores = TRUE_SHIFT * labels + rng.normal(0, GROUP_NOISE, n_groups)[groups] + rng.normal(0, TOKEN_NOISE, len(groups))
    return labels, scores, groups


def coverage(use_groups):
    """How often a 95 % interval holds the true AUROC, over 120 simulated data sets."""
    n_covered = 0
    for seed in range(120):
        labels, scores, groups = grouped_data(np.random.default_rng(seed))
        interval = bootstrap_interval(auroc, labels, scores, groups=groups if use_groups else None, n_bootstrap=100)
        n_covered += interval.low <= TRUE_AUROC <= interval.high
    return n_covered / 120


def test_intervals_over_prompts_cover_the_truth():
    assert 0.90 <= coverage(use_groups=True) <= 0.99


def test_control_intervals_that_ignore_prompts_miss_the_truth():
    assert coverage(use_groups=False) < 0.75


def test_weights_and_repeated_examples_give_the_same_interval():
    labels, scores, groups = grouped_data(np.random.default_rng(0), n_groups=20)
    weighted = bootstrap_interval(auroc, labels, scores, groups=groups, n_bootstrap=50)

    def unweighted(labels, scores):
        return auroc(labels, scores)

    repeated = bootstrap_interval(unweighted, labels, scores, groups=groups, n_bootstrap=50)
    assert weighted.low == pytest.approx(repeated.low)
    assert weighted.high == pytest.approx(repeated.high)
    assert weighted.low < weighted.value < weighted.high
    assert weighted.value == auroc(labels, scores)
    assert weighted.n == 20


def test_the_interval_equals_a_plain_loop():
    labels, scores, groups = grouped_data(np.random.default_rng(0), n_groups=20)
    rng, values = np.random.default_rng(7), []
    for _ in range(40):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in rng.integers(20, size=20)])
        values.append(roc_auc_score(labels[rows], scores[rows]))
    interval = bootstrap_interval(auroc, labels, scores, groups=groups, n_bootstrap=40, confidence=0.8, random_state=7)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.1, 0.9])))


def test_the_interval_depends_on_the_seed_alone():
    labels, scores, groups = grouped_data(np.random.default_rng(0), n_groups=20)
    order = np.random.default_rng(1).permutation(len(labels))
    interval = bootstrap_interval(auroc, labels, scores, groups=groups, n_bootstrap=50)
    shuffled = bootstrap_interval(auroc, labels[order], scores[order], groups=groups[order], n_bootstrap=50)
    assert (shuffled.low, shuffled.high) == pytest.approx((interval.low, interval.high))
    other = bootstrap_interval(auroc, labels, scores, groups=groups, n_bootstrap=50, random_state=1)
    assert other.low != interval.low


def test_other_metrics_take_part():
    labels, scores, groups = grouped_data(np.random.default_rng(0))
    at_5_percent = functools.partial(tpr_at_fpr, fpr=0.05)
    for metric, values in [(at_5_percent, scores), (accuracy, (scores > 0.5).astype(int))]:
        interval = bootstrap_interval(metric, labels, values, groups=groups, n_bootstrap=100)
        assert interval.value == metric(labels, values)
        assert 0.0 <= interval.low < interval.value < interval.high <= 1.0


def test_scores_of_more_classes_are_resampled_by_row():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    scores = np.eye(3)[labels] + rng.normal(0, 0.7, (60, 3))
    interval = bootstrap_interval(auroc, labels, scores, n_bootstrap=100)
    assert 0.5 < interval.low < interval.value < interval.high < 1.0


def test_too_few_groups_give_no_interval():
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.0, 1.0, 2.0, 3.0])
    assert bootstrap_interval(auroc, labels, scores, groups=np.zeros(4)) == Interval(0.75, None, None, 0.95, 1)


def test_resamples_that_miss_a_class_are_counted_and_spoil_the_interval_only_in_the_majority():
    one_each = bootstrap_interval(auroc, [0, 1], [0.0, 1.0], n_bootstrap=1000)  # half of the draws hold one example twice
    assert 400 < one_each.n_skipped < 600
    rare = bootstrap_interval(auroc, np.arange(30) == 0, np.arange(30.0), n_bootstrap=300)  # missed with (29/30)^30 = .36
    assert 0.25 < rare.n_skipped / 300 < 0.48
    assert rare.low is None  # one group with the positive class says nothing of others
    enough = bootstrap_interval(auroc, np.arange(30) < 5, np.arange(30.0), n_bootstrap=100)
    assert enough.low is not None
    assert bootstrap_interval(auroc, np.arange(30) < 4, np.arange(30.0), n_bootstrap=100).low is None
    scarce = bootstrap_interval(auroc, [0, 1, 2], np.eye(3), n_bootstrap=300)  # all three drawn with 6/27
    assert scarce.n_skipped > 200
    assert scarce.low is None
    assert scarce.high is None
    assert scarce.value == 1.0
