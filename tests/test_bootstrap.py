"""Resamples of groups: the draws of a plain loop, and on them the metrics of scikit-learn."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from lmprobe_tl.bootstrap import Interval, Resamples, bootstrap_interval, centre_interval
from lmprobe_tl.errors import InputError
from lmprobe_tl.measures import sampled_metrics
from lmprobe_tl.metrics import auroc, calibration_error
from lmprobe_tl.scored import Scored


def tokens_of_prompts(seed: int, n_prompts: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """labels, probabilities (rounded, so that many are equal) and prompts of a few tokens each."""
    rng = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(n_prompts), rng.integers(1, 8, n_prompts))
    labels = rng.integers(0, 2, len(prompts))
    scores = labels + rng.normal(size=n_prompts)[prompts] + rng.normal(size=len(prompts))
    return labels, (1 / (1 + np.exp(-scores))).round(2), prompts


def scored(labels: np.ndarray, probabilities: np.ndarray, prompts: np.ndarray) -> Scored:
    both = np.stack([1 - probabilities, probabilities], axis=1)
    return Scored(labels, probabilities, both, prompts, (0, 1), "token")


def drawn_rows(prompts: np.ndarray, n_bootstrap: int, seed: int) -> list[np.ndarray]:
    """Examples of each resample, by the definition: prompts drawn with replacement, and all their tokens."""
    rng, names = np.random.default_rng(seed), np.unique(prompts)
    draws = [rng.integers(len(names), size=len(names)) for _ in range(n_bootstrap)]
    return [np.concatenate([np.flatnonzero(prompts == names[at]) for at in draw]) for draw in draws]


def best_tpr(labels: np.ndarray, scores: np.ndarray, fpr: float) -> float:
    false_rates, true_rates, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(true_rates[false_rates <= fpr + 1e-12].max())


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_scikit_learn_on_explicit_resamples(seed: int) -> None:
    labels, probabilities, prompts = tokens_of_prompts(seed)
    order = np.random.default_rng(seed).permutation(len(labels))  # the tokens of a prompt need not stand together
    labels, probabilities, prompts = labels[order], probabilities[order], prompts[order]
    resamples = Resamples.drawn(labels, prompts, n_bootstrap=40, random_state=seed)
    found = sampled_metrics(scored(labels, probabilities, prompts), resamples, (0.3, 0.05))
    for at, rows in enumerate(drawn_rows(prompts, 40, seed)):
        y, p = labels[rows], probabilities[rows]
        expected = {
            "auroc": roc_auc_score(y, p),
            "auprc": average_precision_score(y, p),
            "accuracy": ((p > 0.5) == y).mean(),
            "tpr_at_fpr_0.3": best_tpr(y, p, 0.3),
            "tpr_at_fpr_0.05": best_tpr(y, p, 0.05),
            "brier": brier_score_loss(y, p),
            "calibration_error": calibration_error(y, p),
        }
        assert list(found) == [
            "auroc",
            "auprc",
            "accuracy",
            "tpr_at_fpr_0.3",
            "tpr_at_fpr_0.05",
            "calibration_error",
            "brier",
        ]
        for name, value in expected.items():
            assert found[name].values is not None
            assert found[name].values[at] == pytest.approx(value, abs=1e-12), name


def test_several_classes_equal_scikit_learn_on_explicit_resamples() -> None:
    rng = np.random.default_rng(0)
    labels, prompts = rng.integers(0, 3, 90), np.arange(90) // 2
    probabilities = rng.dirichlet(np.ones(3), 90) + np.eye(3)[labels] * 0.4
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    examples = Scored(labels, probabilities, probabilities, prompts, ("a", "b", "c"), "token")
    found = sampled_metrics(examples, Resamples.drawn(labels, prompts, n_bootstrap=20, random_state=4))
    for at, rows in enumerate(drawn_rows(prompts, 20, 4)):
        expected = roc_auc_score(labels[rows], probabilities[rows], multi_class="ovr", average="macro")
        assert found["auroc"].values is not None and found["accuracy"].values is not None
        assert found["auroc"].values[at] == pytest.approx(expected, abs=1e-12)
        assert found["accuracy"].values[at] == pytest.approx((probabilities[rows].argmax(axis=1) == labels[rows]).mean())
    for name in ("auprc", "tpr_at_fpr_0.01", "calibration_error", "brier"):
        assert found[name].value is None and found[name].note == "defined for two classes; there are 3"


def test_blocks_of_resamples_and_the_plain_loop_give_one_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities, prompts = tokens_of_prompts(0)
    expected = bootstrap_interval(auroc, labels, probabilities, groups=prompts, n_bootstrap=50, random_state=3)
    for size in (1, 1000, 10**6):
        monkeypatch.setattr("lmprobe_tl.bootstrap._ELEMENTS_AT_ONCE", size)
        resamples = Resamples.drawn(labels, prompts, n_bootstrap=50, random_state=3)
        one = sampled_metrics(scored(labels, probabilities, prompts), resamples)["auroc"]
        assert one.value is not None and one.values is not None
        found = resamples.interval(one.value, one.values)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert (found.value, found.n, found.n_skipped) == (pytest.approx(expected.value), expected.n, expected.n_skipped)


def test_counts_are_exact_where_one_group_is_drawn_every_time() -> None:
    for n_groups in (1, 255, 256, 300):
        resamples = Resamples.drawn(np.arange(n_groups) % 2, np.arange(n_groups), n_bootstrap=5)
        assert resamples.times.sum(axis=1).tolist() == [n_groups] * 5


def test_draws_depend_on_the_number_of_groups_and_the_seed_alone() -> None:
    one = Resamples.drawn([0, 1] * 10, np.arange(20), n_bootstrap=9, random_state=5)
    other = Resamples.drawn([1] * 19 + [0], [f"prompt {at:02}" for at in range(20)], n_bootstrap=9, random_state=5)
    assert np.array_equal(one.times, other.times)
    assert not np.array_equal(one.times, Resamples.drawn([0, 1] * 10, np.arange(20), n_bootstrap=9, random_state=6).times)
    assert one.enough and not other.enough


def test_resamples_without_a_class_are_left_out_and_counted() -> None:
    labels, scores = np.array([0] * 30 + [1]), np.arange(31.0)
    resamples = Resamples.drawn(labels, np.arange(31), n_bootstrap=200)
    found = sampled_metrics(scored(labels, scores / 31, np.arange(31)), resamples)
    one, missed = found["auroc"], resamples.times[:, 30] == 0
    assert one.values is not None and found["accuracy"].values is not None
    assert np.array_equal(np.isnan(found["accuracy"].values), missed), "the same resamples for every metric"
    assert 0 < missed.sum() < 200
    assert np.array_equal(np.isnan(one.values), missed)
    assert resamples.interval(1.0, one.values) == Interval(1.0, None, None, 0.95, 31, int(missed.sum()))


def test_a_bootstrap_that_cannot_be_is_named() -> None:
    with pytest.raises(InputError, match="n_bootstrap >= 1 and 0 < confidence < 1, got 0"):
        Resamples.drawn([0, 1], [0, 1], n_bootstrap=0)


@pytest.mark.parametrize("n", [8, 10, 15])
def test_the_interval_of_a_centre_covers_it_whatever_the_distribution(n: int) -> None:
    rng = np.random.default_rng(n)
    draws: list[Any] = [rng.standard_normal, rng.standard_cauchy, lambda size: np.where(rng.random(size) < 0.5, -1.0, 1.0)]
    for draw in draws:
        found = [centre_interval(draw(n), 0.9) for _ in range(400)]
        n_below, n_above = sum(high < 0 for _, high in found), sum(low > 0 for low, _ in found)
        assert max(n_below, n_above) <= 0.05 * 400 + 13  # three standard deviations
    normal = [centre_interval(rng.standard_normal(n), 0.9) for _ in range(400)]
    assert sum(low > 0 for low, _ in normal) >= 0.05 * 400 - 13  # it is no wider than it has to be


def test_the_interval_of_a_centre_is_made_of_the_means_of_subsets() -> None:
    values = np.random.default_rng(0).standard_normal(5)
    means = sorted(np.mean(one) for size in range(1, 6) for one in combinations(values, size))
    assert centre_interval(values, 1 - 2 * 3 / 32) == pytest.approx((means[2], means[-3]))
    with pytest.raises(InputError, match=r"5 values have no interval at a confidence of 0\.99; give more"):
        centre_interval(values, 0.99)
