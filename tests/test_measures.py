"""Metrics, paired differences and their intervals: laws, references, and simulations whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import average_precision_score, brier_score_loss

from lmprobe_tl.bootstrap import Resamples
from lmprobe_tl.errors import InputError
from lmprobe_tl.evaluation import evaluate_scores
from lmprobe_tl.measures import (
    check_fprs,
    differences_of,
    interval_of,
    measures_of,
    sampled_auroc,
    sampled_metrics,
)
from lmprobe_tl.metrics import average_precision, brier_score, calibration_error
from lmprobe_tl.scored import Scored

# few distinct values, so that ties are common
LOGITS = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])


@st.composite
def examples(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """labels, logits and how often each of 2 to 30 examples is there, with both classes present."""
    n_positives, n_negatives = draw(st.integers(1, 15)), draw(st.integers(1, 15))
    n = n_positives + n_negatives
    labels = np.array(draw(st.permutations([1] * n_positives + [0] * n_negatives)))
    logits = np.array(draw(st.lists(LOGITS, min_size=n, max_size=n)))
    return labels, logits, np.array(draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)))


def scored(labels: Any, logits: Any, prompts: Any = None) -> Scored:
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels).astype(np.int64)
    prompts = np.arange(len(labels)) if prompts is None else prompts
    return Scored(labels, logits, np.stack([expit(-logits), expit(logits)], axis=1), prompts, (0, 1), "prompt")


def values_of(labels: Any, logits: Any) -> dict[str, float | None]:
    resamples = Resamples.drawn(labels, np.arange(len(labels)), n_bootstrap=1)
    return {name: one.value for name, one in sampled_metrics(scored(labels, logits), resamples, (0.0, 0.5)).items()}


# --- metrics -------------------------------------------------------------------------------------------------------------


def calibration_by_loop(labels: np.ndarray, probabilities: np.ndarray, n_bins: int) -> float:
    """The definition: sort, give each set of equal probabilities the bin of its middle, and sum the gaps."""
    gaps, below = np.zeros(n_bins), 0.0
    for value in np.unique(probabilities):
        members = probabilities == value
        middle = below + members.sum() / 2
        gaps[int(middle * n_bins / len(labels))] += labels[members].sum() - value * members.sum()
        below += members.sum()
    return float(np.abs(gaps).sum() / len(labels))


@settings(max_examples=100)
@given(examples(), st.integers(1, 12))
def test_calibration_error_equals_the_plain_loop(drawn: Any, n_bins: int) -> None:
    labels, logits, times = drawn
    expected = calibration_by_loop(np.repeat(labels, times), np.repeat(expit(logits), times), n_bins)
    assert calibration_error(labels, expit(logits), times, n_bins=n_bins) == pytest.approx(expected, abs=1e-12)


def test_bins_have_equal_mass() -> None:
    probabilities = np.linspace(0.01, 0.9, 20)
    labels = np.zeros(20)
    labels[[3, 4, 19]] = 1
    parts = np.split(np.arange(20), 10)
    expected = np.mean([abs(labels[part].mean() - probabilities[part].mean()) for part in parts])
    assert calibration_error(labels, probabilities) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100)
@given(examples())
def test_average_precision_and_brier_score_equal_scikit_learn(drawn: Any) -> None:
    labels, logits, times = drawn
    expected = average_precision_score(labels, logits, sample_weight=times)
    assert average_precision(labels, logits, times) == pytest.approx(expected, abs=1e-12)
    expected = brier_score_loss(labels, expit(logits), sample_weight=times)
    assert brier_score(labels, expit(logits), times) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60)
@given(examples())
def test_a_weight_is_a_repetition(drawn: Any) -> None:
    labels, logits, times = drawn
    rows = np.repeat(np.arange(len(labels)), times)
    assert average_precision(labels, logits, times) == pytest.approx(average_precision(labels[rows], logits[rows]))
    assert brier_score(labels, expit(logits), times) == pytest.approx(brier_score(labels[rows], expit(logits)[rows]))
    repeated = calibration_error(labels[rows], expit(logits)[rows])
    assert calibration_error(labels, expit(logits), times) == pytest.approx(repeated, abs=1e-12)


@settings(max_examples=60)
@given(examples())
def test_an_increasing_map_leaves_the_metrics_of_ranks_alone(drawn: Any) -> None:
    labels, logits, _ = drawn
    first, second = values_of(labels, logits), values_of(labels, np.exp(logits) * 3 + 7)
    for name in ("auroc", "auprc", "tpr_at_fpr_0", "tpr_at_fpr_0.5"):
        assert first[name] == second[name], name


@pytest.mark.parametrize(("n_negatives", "resolved"), [(99, False), (100, True), (1000, True)])
def test_a_rate_that_the_negatives_cannot_resolve_has_no_value(n_negatives: int, resolved: bool) -> None:
    labels = [0] * n_negatives + [1] * 20
    resamples = Resamples.drawn(labels, np.arange(len(labels)), n_bootstrap=10)
    found = measures_of(sampled_metrics(scored(labels, np.arange(len(labels))), resamples), resamples)
    assert (found["tpr_at_fpr_0.01"].value == 1.0) is resolved
    assert (found["tpr_at_fpr_0.001"].value == 1.0) is (n_negatives >= 1000)
    if not resolved:
        assert found["tpr_at_fpr_0.01"].note == "needs 100 negatives, has 99"


def test_a_missing_class_leaves_accuracy_alone() -> None:
    resamples = Resamples.drawn([1] * 8, np.arange(8), n_bootstrap=20)
    found = measures_of(sampled_metrics(scored([1] * 8, [1, -1] * 4), resamples), resamples)
    assert found["accuracy"].value == 0.5 and found["accuracy"].low is not None
    assert {one.note for name, one in found.items() if name != "accuracy"} == {"no prompt of class 0"}
    assert all(one.value is None for name, one in found.items() if name != "accuracy")


def test_a_perfect_or_hopeless_result_is_as_sure_as_its_count_of_prompts() -> None:
    labels = [0, 1, 1] * 6
    resamples = Resamples.drawn(labels, np.arange(18), n_bootstrap=20)
    for sign in (1, -1):
        samples = sampled_metrics(scored(labels, [sign * (2 * label - 1) for label in labels]), resamples, [0.5])
        found = measures_of(samples, resamples)
        for name, n_trials in {"auroc": 6, "accuracy": 18, "tpr_at_fpr_0.5": 12}.items():
            limit = 0.05 ** (1 / n_trials)
            expected = (limit, 1.0) if sign > 0 else (0.0, 1 - limit)
            assert (found[name].low, found[name].high) == pytest.approx(expected), name
            assert found[name].note == "no spread; limit from counts"
    perfect = measures_of(sampled_metrics(scored(labels, labels), resamples), resamples)["auprc"]
    assert (perfect.value, perfect.low, perfect.note) == (1.0, None, "no spread, so no interval")
    flat = measures_of(sampled_metrics(scored(labels, [0] * 18), resamples), resamples)["auroc"]
    assert (flat.low, flat.high, flat.note) == (0.5, 0.5, "all resamples are the same")
    tokens = Resamples.drawn(labels, np.arange(18) // 3, n_bootstrap=20)  # one prompt has one say
    found = measures_of(sampled_metrics(scored(labels, [2 * label - 1 for label in labels]), tokens), tokens)
    assert (found["accuracy"].low, found["accuracy"].n) == (pytest.approx(0.05 ** (1 / 6)), 6)


@pytest.mark.parametrize("share", [0.5, 0.54, 0.6, 0.8])
def test_perfect_separation_by_luck_is_covered(share: float) -> None:
    """Positives of two kinds, one above all negatives and one below: nothing is as often perfect at this AUROC."""
    rng = np.random.default_rng(0)
    labels = [0] * 12 + [1] * 5
    resamples = Resamples.drawn(labels, np.arange(17), n_bootstrap=20)
    n_missed = 0
    for _ in range(400):
        scores = [*rng.normal(size=12), *np.where(rng.random(5) < share, 9.0, -9.0)]
        area = sampled_auroc(np.array(labels), np.array(scores), resamples)
        n_missed += area.value == 1.0 and interval_of(area, resamples).low > share
    assert n_missed <= 0.05 * 400 + 13  # three standard deviations
    assert (n_missed > 0) is (share < 0.05 ** (1 / 5))  # the limit is no lower than it has to be


def test_the_quick_evaluation_of_a_fit_has_the_same_limits() -> None:
    labels = np.array([0, 1] * 6)
    found = evaluate_scores(
        labels, labels - 0.5, labels, np.arange(12), level="prompt", pooling="mean", fpr=0.5, n_bootstrap=20
    )
    assert (found.auroc.low, found.accuracy.low) == (pytest.approx(0.05 ** (1 / 6)), pytest.approx(0.05 ** (1 / 12)))


def test_a_result_of_few_prompts_has_no_interval() -> None:
    few = Resamples.drawn([0, 1] * 4, np.arange(8), n_bootstrap=20)
    one = measures_of(sampled_metrics(scored([0, 1] * 4, [-1, 1] * 4), few), few)["auroc"]
    assert (one.low, one.note) == (None, "too few prompts for an interval")


@pytest.mark.parametrize("fprs", [(0.01, 0.01), (2.0,), (-0.1,), ("a",)])
def test_rates_that_cannot_be_are_named(fprs: Any) -> None:
    with pytest.raises(InputError, match="expected false positive rates from 0 to 1, all different"):
        check_fprs(fprs)


# --- differences ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(examples(), st.integers(0, 5))
def test_a_difference_changes_its_sign_with_the_order(drawn: Any, seed: int) -> None:
    labels, logits, _ = drawn
    others = np.random.default_rng(seed).permutation(logits)
    resamples = Resamples.drawn(labels, np.arange(len(labels)), n_bootstrap=30, random_state=seed)
    first, second = (sampled_metrics(scored(labels, one), resamples) for one in (logits, others))
    forth, back = differences_of(first, second, resamples), differences_of(second, first, resamples)
    assert "auroc" in forth and "calibration_error" not in forth
    for name, one in forth.items():
        assert one.value == -back[name].value
        if one.low is not None and back[name].high is not None:
            assert (one.low, one.high) == pytest.approx((-back[name].high, -back[name].low), abs=1e-12)
            one_values, other_values = first[name].values, second[name].values
            assert one_values is not None and other_values is not None
            ties = (one_values == other_values)[~np.isnan(one_values)].mean()
            assert one.share_at_most_zero + back[name].share_at_most_zero == pytest.approx(1 + ties)
    same = differences_of(first, first, resamples)["auroc"]
    assert (same.value, same.low, same.share_at_most_zero) in [(0.0, 0.0, 1.0), (0.0, None, None)]


def test_a_difference_is_taken_resample_by_resample() -> None:
    """Two scores that share their noise: each alone is uncertain, their difference is not."""
    rng = np.random.default_rng(0)
    labels, noise = np.arange(200) % 2, rng.normal(size=200)
    better, worse = labels * 1.2 + noise, labels * 1.0 + noise
    resamples = Resamples.drawn(labels, np.arange(200), n_bootstrap=300)
    first, second = (sampled_metrics(scored(labels, one), resamples) for one in (better, worse))
    difference = differences_of(first, second, resamples)["auroc"]
    alone = measures_of(first, resamples)["auroc"]
    assert difference.is_above_zero and difference.high - difference.low < 0.5 * (alone.high - alone.low)
    other = Resamples.drawn(labels, np.arange(200), n_bootstrap=300, random_state=1)
    unpaired = differences_of(first, sampled_metrics(scored(labels, worse), other), resamples, other)["auroc"]
    assert not unpaired.is_above_zero


# --- coverage ------------------------------------------------------------------------------------------------------------


def test_intervals_of_metrics_and_differences_cover_the_truth() -> None:
    """Tokens in prompts that share their noise; the truth is that of a very large data set."""

    def data(seed: int, n_prompts: int) -> tuple[Scored, Scored]:
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(n_prompts), 4)
        labels = prompts % 2
        shared = 2 * labels - 1 + rng.normal(0, 1, n_prompts)[prompts]
        first, second = (shared + rng.normal(0, noise, len(prompts)) for noise in (0.5, 1.5))
        return scored(labels, first, prompts), scored(labels, second, prompts)

    names = ("auroc", "auprc", "accuracy", "tpr_at_fpr_0.1", "brier")
    large, one = data(10**6, 50_000), None
    resamples = Resamples.drawn(large[0].labels, large[0].prompts, n_bootstrap=1)
    truth, other_truth = (sampled_metrics(part, resamples, (0.1,)) for part in large)
    assert truth["auroc"].value == pytest.approx(norm.cdf(2 / np.sqrt(2 * (1 + 0.25))), abs=5e-3)
    covered: dict[str, int] = dict.fromkeys([*names, *(f"difference in {name}" for name in names)], 0)
    for seed in range(120):
        one, other = data(seed, 80)
        resamples = Resamples.drawn(one.labels, one.prompts, n_bootstrap=150, random_state=seed)
        first, second = (sampled_metrics(part, resamples, (0.1,)) for part in (one, other))
        found, differences = measures_of(first, resamples), differences_of(first, second, resamples)
        for name in names:
            covered[name] += found[name].low <= truth[name].value <= found[name].high
            true_difference = truth[name].value - other_truth[name].value
            covered[f"difference in {name}"] += differences[name].low <= true_difference <= differences[name].high
    for name, count in covered.items():
        assert 0.86 <= count / 120 <= 1.0, (name, count / 120)
    assert min(covered.values()) < 120, "intervals that always cover are too wide"


@pytest.mark.parametrize("overconfidence", [1.0, 1.3, 2.5])
def test_intervals_of_the_calibration_error_cover_the_truth_of_a_calibrated_probe_too(overconfidence: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 200_000)
    order = np.argsort(logits)
    gaps = (expit(logits) - expit(overconfidence * logits))[order]
    truth = np.mean([abs(part.mean()) for part in np.split(gaps, 10)])
    covered = percentiles_cover = flagged = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, 300)
        labels = (rng.random(300) < expit(logits)).astype(int)
        resamples = Resamples.drawn(labels, np.arange(300), n_bootstrap=150, random_state=seed)
        samples = sampled_metrics(scored(labels, overconfidence * logits), resamples)
        one = measures_of(samples, resamples)["calibration_error"]
        covered += one.low <= truth <= one.high
        flagged += one.low > 0
        low, high = np.nanquantile(samples["calibration_error"].values, [0.025, 0.975])
        percentiles_cover += low <= truth <= high
    assert covered / 60 > 0.88
    if overconfidence == 1.0:
        assert flagged / 60 < 0.15
        assert percentiles_cover == 0, "control: what chance adds makes plain percentiles miss"
    if overconfidence == 2.5:
        assert flagged / 60 > 0.9, "control: real miscalibration is seen"
