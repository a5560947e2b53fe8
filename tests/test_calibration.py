"""Thresholds keep what they promise: over many recalibrations with a known truth, by brute force, and by law."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm
from sklearn.linear_model import LogisticRegression

from lmprobe_tl.calibration import (
    METHODS,
    calibrate_threshold,
    check_recall,
    clopper_pearson,
    fit_probabilities,
    recall_at_threshold,
    required_negatives,
    share_record,
    threshold_rank,
)
from lmprobe_tl.errors import CalibrationError, InputError
from lmprobe_tl.probe_spec import HIGHEST_LOGIT, LOWEST_LOGIT, ThresholdRecord

FPR, DELTA, N, LENGTH, RUNS = 0.01, 0.05, 500, 20, 1000

# --- what is promised of new text: recalibrate a thousand times where the true FPR is known ------------------------------

Tokens = np.ndarray  # [n LENGTH], scores of n negative sequences
ThresholdOf = Callable[[Tokens], float]


def true_rates(threshold_of: ThresholdOf, grid: float | None = None, runs: int = RUNS) -> np.ndarray:
    """The true FPR of each of many calibrations, [runs].

    A sequence is LENGTH independent standard normal scores, so that P(maximum < t) = Phi(t)^LENGTH. With a grid, scores are
    rounded to multiples of it, which makes ties.
    """
    generator = np.random.default_rng(7)
    rates = []
    for _ in range(runs):
        tokens = generator.standard_normal((N, LENGTH)).astype(np.float32)
        if grid is not None:
            tokens = np.round(tokens / grid).astype(np.float32) * np.float32(grid)
        edge = threshold_of(tokens)
        if grid is not None:
            edge = (math.floor(edge / grid) + 0.5) * grid  # where rounding to the first flagged score begins
        rates.append(1 - norm.cdf(edge) ** LENGTH)
    return np.array(rates)


def by_method(method: str) -> ThresholdOf:
    return lambda tokens: calibrate_threshold(tokens.max(axis=1), FPR, DELTA, method=method).value


def by_quantile(tokens: Tokens) -> float:
    """What comes to mind first."""
    return float(np.quantile(tokens.max(axis=1), 1 - FPR))


def by_pooled_tokens(tokens: Tokens) -> float:
    """As if each token were a sequence of its own."""
    return float(calibrate_threshold(tokens.ravel(), FPR, DELTA).value)


def assert_pac(rates: np.ndarray) -> None:
    """P(FPR > fpr) <= delta, within sampling error."""
    exceeded = int((rates > FPR).sum())
    assert binomtest(exceeded, len(rates), DELTA, alternative="greater").pvalue > 1e-3, f"{exceeded} of {len(rates)}"


def assert_right_on_average(rates: np.ndarray) -> None:
    """E(FPR) <= fpr, within sampling error."""
    assert rates.mean() <= FPR + 3 * rates.std() / math.sqrt(len(rates)), rates.mean()


def test_pac_keeps_its_promise_and_wastes_little() -> None:
    rates = true_rates(by_method("pac"))
    assert_pac(rates)
    assert_right_on_average(rates)
    expected = binom.cdf(N - 499, N, FPR)  # 0.0398: a rank lower would be at 0.123
    assert binomtest(int((rates > FPR).sum()), RUNS, expected).pvalue > 1e-3


def test_conformal_is_right_on_average_and_often_wrong_in_a_single_calibration() -> None:
    rates = true_rates(by_method("conformal"))
    assert_right_on_average(rates)
    assert abs(rates.mean() - 5 / (N + 1)) < 3 * rates.std() / math.sqrt(RUNS)
    assert binomtest(int((rates > FPR).sum()), RUNS, 0.44).pvalue > 1e-3
    with pytest.raises(AssertionError, match="of 1000"):
        assert_pac(rates)


@pytest.mark.parametrize(("wrong", "share"), [(by_quantile, 0.62), (by_pooled_tokens, 1.0)])
def test_wrong_methods_fail_the_very_same_check(wrong: ThresholdOf, share: float) -> None:
    rates = true_rates(wrong)
    with pytest.raises(AssertionError, match="of 1000"):
        assert_pac(rates)
    assert (rates > FPR).mean() == pytest.approx(share, abs=0.05)


def test_the_empirical_method_promises_nothing() -> None:
    with pytest.raises(AssertionError, match="of 1000"):
        assert_pac(true_rates(by_method("empirical")))


@pytest.mark.parametrize("grid", [0.25, 1.0])
def test_ties_make_it_only_more_conservative(grid: float) -> None:
    rates = true_rates(by_method("pac"), grid, runs=300)
    assert_pac(rates)
    assert_right_on_average(true_rates(by_method("conformal"), grid, runs=300))
    assert len(np.unique(rates)) < 20, "there are ties"


# --- the rank ------------------------------------------------------------------------------------------------------------


def test_known_ranks() -> None:
    assert [threshold_rank(n, 0.01, 0.05) for n in (299, 500, 1000)] == [299, 499, 996]
    assert [threshold_rank(n, 0.01, method="conformal") for n in (99, 500, 999)] == [99, 496, 990]
    assert [threshold_rank(n, 0.01, method="empirical") for n in (1, 99, 100, 500)] == [1, 99, 99, 495]
    assert required_negatives(0.01, 0.05) == 299
    assert required_negatives(0.01, method="conformal") == 99
    assert required_negatives(0.01, method="empirical") == 1


@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.07, 0.1, 0.29, 0.5, 0.9])
@pytest.mark.parametrize("delta", [0.001, 0.05, 0.1, 0.5, 0.99])
def test_the_pac_rank_is_the_smallest_that_the_binomial_law_allows(fpr: float, delta: float) -> None:
    needed = required_negatives(fpr, delta)
    assert (1 - fpr) ** needed <= delta * (1 + 1e-12)
    assert needed == 1 or (1 - fpr) ** (needed - 1) > delta
    for n in {needed, needed + 1, needed + 7, 2 * needed, 3 * needed + 5}:
        good = [rank for rank in range(1, n + 1) if binom.cdf(n - rank, n, fpr) <= delta]
        assert threshold_rank(n, fpr, delta) == min(good)
    for n in {0, needed - 1}:
        with pytest.raises(
            CalibrationError, match=rf"^{n} negative sequences .*fpr {fpr:g}, delta {delta:g} .*least {needed}"
        ):
            threshold_rank(n, fpr, delta)


def test_rates_count_as_they_are_written() -> None:
    """In binary floating point 0.29 * 100 is below 29, and 10 * (1 - 0.7) above 3."""
    assert threshold_rank(100, 0.29, method="empirical") == 71
    assert threshold_rank(9, 0.7, method="conformal") == 3
    for hundredths in range(1, 100):
        assert threshold_rank(100, hundredths / 100, method="empirical") == 100 - hundredths
        assert threshold_rank(199, hundredths / 100, method="conformal") == 200 - 2 * hundredths
        assert required_negatives(hundredths / 100, method="conformal") == -(-100 // hundredths) - 1


@pytest.mark.parametrize("method", METHODS)
def test_too_few_sequences_say_how_many_are_needed(method: str) -> None:
    needed = required_negatives(0.1, 0.2, method)
    calibrate_threshold(np.arange(needed), 0.1, 0.2, method=method)
    with pytest.raises(
        CalibrationError, match=rf"^{needed - 1} negative sequences are too few: .*'{method}'.* at least {needed}"
    ):
        calibrate_threshold(np.zeros(needed - 1), 0.1, 0.2, method=method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fpr": 0}, "fpr is 0; expected a number between 0 and 1"),
        ({"fpr": 1.0}, "fpr is 1.0"),
        ({"fpr": 5}, "fpr is 5"),
        ({"fpr": "0.01"}, "fpr is '0.01'"),
        ({"fpr": float("nan")}, "fpr is nan"),
        ({"fpr": True}, "fpr is True"),
        ({"delta": 0.0}, r"delta is 0.0"),
        ({"delta": None}, "delta is None"),
        ({"method": "exact"}, "method is 'exact'; expected 'pac', 'conformal', 'empirical'"),
    ],
)
def test_rates_and_methods_that_mean_nothing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate_threshold(np.arange(500.0), **change)


# --- the threshold -------------------------------------------------------------------------------------------------------

scores = st.floats(-1e6, 1e6, width=32) | st.integers(-3, 3).map(float)
sequences = st.lists(scores, min_size=30, max_size=60)


def flagged(maxima: Any, threshold: ThresholdRecord) -> int:
    """How live scores are compared: float32 with float32."""
    return int((np.asarray(maxima, np.float32) >= np.float32(threshold.value)).sum())


@given(maxima=sequences, order=st.randoms(use_true_random=False), method=st.sampled_from(METHODS))
def test_the_order_of_the_sequences_does_not_matter(maxima: list[float], order: Any, method: str) -> None:
    shuffled = list(maxima)
    order.shuffle(shuffled)
    assert calibrate_threshold(maxima, 0.1, 0.1, method=method) == calibrate_threshold(shuffled, 0.1, 0.1, method=method)


@given(maxima=sequences, method=st.sampled_from(METHODS), fpr=st.floats(0.1, 0.9))
def test_the_threshold_stands_just_above_its_rank(maxima: list[float], method: str, fpr: float) -> None:
    threshold = calibrate_threshold(maxima, fpr, 0.1, method=method)
    assert threshold.rank is not None
    below = np.sort(np.float32(maxima))[threshold.rank - 1]
    assert np.float32(threshold.value) == threshold.value > below
    assert np.nextafter(np.float32(threshold.value), np.float32(-np.inf)) == below, "no float32 lies between"
    strictly_above = int((np.float32(maxima) > below).sum())
    assert flagged(maxima, threshold) == strictly_above <= len(maxima) - threshold.rank


@given(maxima=sequences, fpr=st.floats(0.01, 0.99))
def test_the_empirical_threshold_is_the_smallest_that_keeps_the_rate_on_these_sequences(
    maxima: list[float], fpr: float
) -> None:
    threshold = calibrate_threshold(maxima, fpr, method="empirical")
    allowed = Fraction(repr(fpr)) * len(maxima)  # as written: a third of 36 is 12, and 0.3333333333333333 of it is less
    assert flagged(maxima, threshold) <= allowed
    lower = np.nextafter(np.float32(threshold.value), np.float32(-np.inf))
    assert int((np.float32(maxima) >= lower).sum()) > allowed


@given(maxima=sequences, method=st.sampled_from(METHODS), rates=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)))
def test_more_false_alarms_allowed_never_raise_the_threshold(
    maxima: list[float], method: str, rates: tuple[float, float]
) -> None:
    low, high = (calibrate_threshold(maxima, fpr, 0.1, method=method).value for fpr in sorted(rates))
    assert low >= high


@given(maxima=sequences, deltas=st.tuples(st.floats(0.05, 0.9), st.floats(0.05, 0.9)))
def test_more_certainty_never_lowers_the_threshold(maxima: list[float], deltas: tuple[float, float]) -> None:
    sure, unsure = (calibrate_threshold(maxima, 0.1, delta).value for delta in sorted(deltas))
    assert sure >= unsure


@given(maxima=sequences, method=st.sampled_from(METHODS))
def test_among_equal_scores_none_is_flagged(maxima: list[float], method: str) -> None:
    equal = [maxima[0]] * len(maxima)
    assert flagged(equal, calibrate_threshold(equal, 0.1, 0.1, method=method)) == 0


def test_scores_in_double_precision_are_compared_as_float32() -> None:
    """0.1 is no float32; a threshold just above it in double precision would be reached by the float32 score itself."""
    threshold = calibrate_threshold([0.1] * 40, 0.1, 0.1)
    assert flagged([0.1], threshold) == 0
    assert threshold.value == np.nextafter(np.float32(0.1), np.float32(1))


def test_the_record_says_all() -> None:
    threshold = calibrate_threshold(np.arange(500), unit="logit", statistic="running maximum of score:max")
    assert threshold == ThresholdRecord(
        value=float(np.nextafter(np.float32(498), np.float32(999))),
        unit="logit",
        method="pac",
        fpr=0.01,
        delta=0.05,
        n=500,
        rank=499,
        statistic="running maximum of score:max",
        guarantee="With 95% confidence over the draw of the 500 calibration sequences, at most 1% of new negative sequences "
        "of the same source and length raise a false alarm.",
    )
    conformal = calibrate_threshold(np.arange(500), 0.025, 0.2, method="conformal")
    assert (conformal.method, conformal.fpr, conformal.delta, conformal.rank) == ("conformal", 0.025, None, 489)
    assert conformal.guarantee == (
        "On average over draws of 500 calibration sequences, at most 2.5% of new negative sequences of the same source and "
        "length raise a false alarm; a single calibration may let through more."
    )
    empirical = calibrate_threshold(np.arange(3), 0.07, method="empirical")
    assert (empirical.delta, empirical.n, empirical.rank) == (None, 3, 3)
    assert empirical.guarantee == ("None for new text: at most 7% of these very 3 calibration sequences raise an alarm.")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_scores_that_are_not_finite_name_their_sequences(bad: float) -> None:
    maxima = np.arange(400.0)
    maxima[[3, 120]] = bad
    with pytest.raises(
        CalibrationError, match=rf"negative sequences .*: sequence 3 \({bad}\), 120 \({bad}\)\. ".replace("+", r"\+")
    ):
        calibrate_threshold(maxima)
    with pytest.raises(CalibrationError, match=r"8 \(nan\), 9 \(nan\).* and 2 more"):
        calibrate_threshold(np.r_[np.arange(8.0), [math.nan] * 10])
    with pytest.raises(CalibrationError, match="positive sequences are not all finite .*sequence 0"):
        recall_at_threshold([bad], ThresholdRecord(value=0, unit="logit"))


@pytest.mark.parametrize("bad", [np.zeros((400, 2)), ["a"] * 400, 3.0, [True] * 400, [None] * 400])
def test_maxima_that_are_no_numbers(bad: Any) -> None:
    with pytest.raises(CalibrationError, match="expected one number a sequence"):
        calibrate_threshold(bad)


def test_a_threshold_that_no_score_can_reach_is_an_error() -> None:
    maxima = np.linspace(0, 1, 500, dtype=np.float32)
    assert calibrate_threshold(maxima, unit="probability").value < 1
    maxima[-2:] = 1
    with pytest.raises(
        CalibrationError, match="above every possible score: 2 of 500 negative sequences reach a probability of 1"
    ):
        calibrate_threshold(maxima, unit="probability")
    assert calibrate_threshold(maxima, unit="logit").value > 1
    assert calibrate_threshold(maxima, 0.02, unit="probability").value < 1
    with pytest.raises(CalibrationError, match="above every possible score: 400 of 400"):
        calibrate_threshold(np.full(400, np.finfo(np.float32).max))
    just_below = np.full(400, np.nextafter(np.float32(1), np.float32(0)))
    assert calibrate_threshold(just_below, unit="probability").value == 1


# --- recall --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 300])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_clopper_pearson_equals_scipy(n: int, confidence: float) -> None:
    for hits in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(hits, n).proportion_ci(confidence, method="exact")
        assert clopper_pearson(hits, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert clopper_pearson(0, n, confidence)[0] == 0 and clopper_pearson(n, n, confidence)[1] == 1


@pytest.mark.parametrize("bad", [(-1, 3, 0.95), (4, 3, 0.95), (0, 0, 0.95), (1, 3, 1.0)])
def test_shares_that_cannot_be(bad: tuple[int, int, float]) -> None:
    with pytest.raises(InputError, match="Expected 0 <= hits <= n"):
        clopper_pearson(*bad)


def test_recall_counts_what_reaches_the_threshold() -> None:
    threshold = ThresholdRecord(value=2.0, unit="logit")
    below = np.nextafter(np.float32(2), np.float32(0))
    assert recall_at_threshold([1, below, 2, 3, 9], threshold) == share_record(3, 5)
    assert share_record(3, 5).value == 0.6 and share_record(3, 5).n == 5 and share_record(3, 5).confidence == 0.95


@given(
    negatives=st.lists(scores, min_size=40, max_size=50),
    positives=st.lists(scores, min_size=1, max_size=30),
    target=st.floats(0.01, 1),
)
def test_a_missed_recall_tells_at_what_rate_it_would_be_reached(
    negatives: list[float], positives: list[float], target: float
) -> None:
    threshold = calibrate_threshold(negatives, 0.1, 0.1)
    recall = recall_at_threshold(positives, threshold)
    if recall.value >= target:
        check_recall(recall, target, negatives, positives, threshold)
        return
    # the highest threshold with the recall wanted, by trial
    good = [value for value in np.float32(positives) if (np.float32(positives) >= value).mean() >= target]
    alarms = int((np.float32(negatives) >= max(good)).sum())
    with pytest.raises(CalibrationError, match=rf" in {alarms} of these {len(negatives)} negative sequences, an FPR of"):
        check_recall(recall, target, negatives, positives, threshold)


def test_a_missed_recall_is_told_with_its_interval() -> None:
    threshold = calibrate_threshold(np.arange(500.0))
    positives = [*range(490, 510)]
    recall = recall_at_threshold(positives, threshold)
    with pytest.raises(CalibrationError) as caught:
        check_recall(recall, 0.9, np.arange(500.0), positives, threshold)
    low, high = clopper_pearson(11, 20)
    assert str(caught.value) == (
        f"the recall is 0.550 [{low:.3f}, {high:.3f}] on 20 positive sequences at the threshold 498 (logit, method pac, fpr "
        "0.01), below the target 0.9. A threshold that reaches the target raises an alarm in 8 of these 500 negative "
        "sequences, an FPR of 0.016."
    )


# --- probabilities -------------------------------------------------------------------------------------------------------


def cloud(n_negative: int, n_positive: int, gap: float, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    below, above = generator.normal(0, spread, n_negative), generator.normal(gap, spread, n_positive)
    return below.astype(np.float32), above.astype(np.float32)


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    gap=st.sampled_from([0.5, 3.0, 40.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    offset=st.sampled_from([0.0, -5.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_the_curve_is_where_the_cross_entropy_with_platts_targets_is_least(
    sizes: tuple[int, int], gap: float, scale: float, offset: float, seed: int
) -> None:
    """Least where its slope vanishes, since it is convex: sum (p - t) = 0 and sum (p - t) z = 0."""
    below, above = cloud(*sizes, gap, seed=seed)
    if above.mean() <= below.mean() + 0.1:
        return
    below, above = (np.float32((values + offset) * scale) for values in (below, above))
    curve = fit_probabilities(below, above)
    z = np.r_[below, above].astype(np.float64)
    targets = np.r_[[1 / (sizes[0] + 2)] * sizes[0], [(sizes[1] + 1) / (sizes[1] + 2)] * sizes[1]]
    p = 1 / (1 + np.exp(-(curve.slope * z + curve.intercept)))
    assert abs((p - targets).mean()) < 1e-6
    assert abs(((p - targets) * (z - z.mean()) / z.std()).mean()) < 1e-6
    assert (curve.n_negative, curve.n_positive) == sizes


def test_the_curve_equals_a_weighted_logistic_regression_of_scikit_learn() -> None:
    below, above = cloud(80, 40, 1.5)
    z = np.r_[below, above].astype(np.float64)
    targets = np.r_[[1 / 82] * 80, [41 / 42] * 40]
    reference = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000)  # each sequence in both classes, by its target
    reference.fit(np.r_[z, z][:, None], [1] * 120 + [0] * 120, sample_weight=np.r_[targets, 1 - targets])
    curve = fit_probabilities(below, above, statistic="running maximum of mean")
    assert curve.slope == pytest.approx(reference.coef_[0, 0], rel=1e-4)
    assert curve.intercept == pytest.approx(reference.intercept_[0], rel=1e-4)
    assert curve.statistic == "running maximum of mean"


def test_losses_are_those_of_the_probabilities_before_and_after() -> None:
    below, above = cloud(300, 200, 2.0)
    z, truth = np.r_[below, above].astype(np.float64) * 4 + 1, np.r_[np.zeros(300), np.ones(200)]  # far too certain
    curve = fit_probabilities(below * 4 + 1, above * 4 + 1)
    for p, log_loss, brier in (
        (1 / (1 + np.exp(-z)), curve.log_loss_before, curve.brier_before),
        (1 / (1 + np.exp(-curve.slope * z - curve.intercept)), curve.log_loss_after, curve.brier_after),
    ):
        assert log_loss == pytest.approx(-np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p)), rel=1e-5)
        assert brier == pytest.approx(np.mean((p - truth) ** 2), rel=1e-5)
    assert curve.log_loss_after < curve.log_loss_before / 2
    assert curve.brier_after < curve.brier_before
    # calibrated: of sequences with a probability around p, a share of about p is positive
    p = 1 / (1 + np.exp(-curve.slope * z - curve.intercept))
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (p >= low) & (p < low + 0.25)
        assert abs(p[inside].mean() - truth[inside].mean()) < 0.12


def test_separated_scores_get_a_finite_curve() -> None:
    curve = fit_probabilities([-1.0] * 50, [1.0] * 50)
    assert 1 / (1 + math.exp(-curve.slope - curve.intercept)) == pytest.approx(51 / 52)
    assert 1 / (1 + math.exp(curve.slope - curve.intercept)) == pytest.approx(1 / 52)


def test_probabilities_count_as_their_logits_and_certain_ones_stay_finite() -> None:
    below, above = cloud(60, 60, 2.0)
    squashed = [1 / (1 + np.exp(-values.astype(np.float64))) for values in (below, above)]
    found, expected = fit_probabilities(*squashed, unit="probability"), fit_probabilities(below, above)
    assert found.slope == pytest.approx(expected.slope, rel=1e-4)
    assert found.intercept == pytest.approx(expected.intercept, rel=1e-3)
    certain = fit_probabilities([0.0, 0.5], [0.5, 1.0], unit="probability")
    same = fit_probabilities([LOWEST_LOGIT, 0.0], [0.0, HIGHEST_LOGIT])
    assert certain.slope == pytest.approx(same.slope, rel=1e-5)


def test_scores_that_give_no_rising_curve_are_an_error() -> None:
    below, above = cloud(50, 50, 3.0)
    with pytest.raises(CalibrationError, match=r"50 positive sequences do not score above the 50 .*slope -.*swapped"):
        fit_probabilities(above, below)
    with pytest.raises(CalibrationError, match="all 4 sequences have the same running maximum, 2"):
        fit_probabilities([2.0, 2.0], [2.0, 2.0])
    with pytest.raises(CalibrationError, match="expected negative and positive sequences, got 2 and 0"):
        fit_probabilities([2.0, 3.0], np.zeros(0))
    with pytest.raises(CalibrationError, match="negative sequences are not all finite"):
        fit_probabilities([math.nan, 3.0], [2.0])
