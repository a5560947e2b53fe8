"""How well scores separate labels, and how sure that is: AUROC, TPR at a bounded FPR, accuracy, bootstrap intervals.

Scores are high for the positive class. With two classes the positive one is the greater label (1 of 0 and 1, True, the last
in alphabetical order), as in scikit-learn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmprobe_tl.errors import InputError

Array: TypeAlias = NDArray[np.float64]
Metric: TypeAlias = Callable[..., float]  # (labels, scores) -> float, or (labels, scores, sample_weight=...) -> float


_FEWEST_GROUPS = 5


def auroc(labels: ArrayLike, scores: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    labels: [n_examples]; scores: [n_examples] for two classes; for more, [n_examples n_classes] with columns in the order of
    the sorted labels, and the result is the mean over classes, each against the rest.
    Raises InputError where the labels hold a single class.
    """
    labels, scores, weight = _weighed(labels, scores, sample_weight)
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(f"AUROC needs two classes, but the labels hold a single class: {classes.tolist()}.")
    n_columns = 1 if scores.ndim == 1 else scores.shape[1]
    if n_columns != (1 if len(classes) == 2 else len(classes)):
        raise InputError(
            f"The labels hold {len(classes)} classes ({classes.tolist()}), but scores has shape {scores.shape}. "
            f"Expected one score an example for two classes, and one column per class for more."
        )
    if scores.ndim == 1:
        return _area(labels == classes[1], scores, weight)
    return float(np.mean([_area(labels == label, column, weight) for label, column in zip(classes, scores.T, strict=True)]))


def tpr_at_fpr(labels: ArrayLike, scores: ArrayLike, fpr: float, sample_weight: ArrayLike | None = None) -> float:
    """The best true positive rate of any threshold whose false positive rate does not exceed fpr.

    labels, scores: [n_examples], two classes. A threshold flags every score >= it, so ties are flagged together, and nothing
    is interpolated: with fpr below 1 / n_negatives no negative may be flagged.
    Raises InputError where the labels hold a single class, or more than two.
    """
    if not 0.0 <= fpr <= 1.0:
        raise InputError(f"fpr must be between 0 and 1, got {fpr}.")
    labels, scores, weight = _weighed(labels, scores, sample_weight)
    classes = np.unique(labels)
    if len(classes) != 2 or scores.ndim != 1:
        raise InputError(
            f"tpr_at_fpr needs two classes and one score an example, got the classes {classes.tolist()} and scores of shape "
            f"{scores.shape}."
        )
    false_positives, true_positives = _flagged(labels == classes[1], scores, weight)
    rounding = 1.0 + 1e-12  # 0.29 * 100 is just below 29
    allowed = false_positives <= fpr * false_positives[-1] * rounding
    return float(true_positives[allowed][-1] / true_positives[-1])


def accuracy(labels: ArrayLike, predictions: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """The share of predictions that equal their label; labels, predictions: [n_examples]."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape or not labels.size:
        raise InputError(f"Expected one prediction a label, got shapes {predictions.shape} and {labels.shape}.")
    return float(np.average(labels == predictions, weights=_weights(sample_weight, len(labels))))


@dataclass(frozen=True)
class Interval:
    """A metric on all data, and its confidence interval; low and high are None where the data are too few to tell.

    n: how many groups were resampled. n_skipped: how many resamples were left out, because they missed a class.
    """

    value: float
    low: float | None
    high: float | None
    confidence: float
    n: int
    n_skipped: int = 0


def bootstrap_interval(
    metric: Metric,
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    random_state: int | None = 0,
) -> Interval:
    """Percentile bootstrap of metric(labels, scores), resampling whole groups (Efron and Tibshirani 1993).

    labels: [n_examples]; scores: [n_examples] or [n_examples n_classes], for accuracy the predictions. groups: [n_examples],
    the prompt of each example: the tokens of one prompt are no independent evidence. None makes each example a group.
    A metric that takes `sample_weight` gets how often an example was drawn; another one gets the examples repeated.
    A resample that misses a class is skipped; low and high are None if more than half are, or where a class is in fewer than
    five groups: resampling so few says nothing of others.
    """
    check_bootstrap(n_bootstrap, confidence)
    labels, scores = np.asarray(labels), np.asarray(scores)
    group_ids = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if not labels.shape == group_ids.shape == scores.shape[:1]:
        raise InputError(
            f"Expected one label, score and group an example, got shapes {labels.shape}, {scores.shape}, {group_ids.shape}."
        )
    if scores.ndim == 1:  # sorting a resample is quick if all examples are sorted once
        order = np.argsort(scores, kind="stable")[::-1]
        labels, scores, group_ids = labels[order], scores[order], group_ids[order]
    value = float(metric(labels, scores))

    group_index = np.unique(group_ids, return_inverse=True)[1]
    n_groups = int(group_index.max()) + 1
    class_index = np.unique(labels, return_inverse=True)[1]
    holds_class = np.zeros((n_groups, class_index.max() + 1), dtype=bool)
    holds_class[group_index, class_index] = True

    rng = np.random.default_rng(random_state)
    values = []
    for _ in range(n_bootstrap):
        drawn = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        if holds_class[drawn > 0].any(axis=0).all():
            values.append(_resampled(metric, labels, scores, drawn[group_index]))
    n_skipped = n_bootstrap - len(values)
    if holds_class.sum(axis=0).min() < _FEWEST_GROUPS or n_skipped > n_bootstrap / 2:
        return Interval(value, None, None, confidence, n_groups, n_skipped)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high), confidence, n_groups, n_skipped)


def check_bootstrap(n_bootstrap: int, confidence: float) -> None:
    """InputError for a number of resamples or a confidence that `bootstrap_interval` cannot use."""
    if n_bootstrap < 1 or not 0.0 < confidence < 1.0:
        raise InputError(f"Expected n_bootstrap >= 1 and 0 < confidence < 1, got {n_bootstrap} and {confidence}.")


def _resampled(metric: Metric, labels: NDArray[Any], scores: NDArray[Any], times: NDArray[np.int64]) -> float:
    """The metric with example i taken times[i] times."""
    if "sample_weight" in inspect.signature(metric).parameters:
        return float(metric(labels, scores, sample_weight=times))
    rows = np.repeat(np.arange(len(labels)), times)
    return float(metric(labels[rows], scores[rows]))


def _weighed(labels: ArrayLike, scores: ArrayLike, sample_weight: ArrayLike | None) -> tuple[NDArray[Any], Array, Array]:
    """Labels [n], scores [n] or [n n_classes] and weights [n], checked, without the examples of weight 0."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or scores.ndim not in (1, 2) or len(labels) != len(scores):
        raise InputError(f"Expected labels [n], scores [n] or [n n_classes], got shapes {labels.shape} and {scores.shape}.")
    n_missing = int(np.isnan(scores).sum())
    if n_missing:
        raise InputError(f"{n_missing} of the scores are NaN. Drop the positions without a token before measuring.")
    weight = _weights(sample_weight, len(labels))
    kept = weight > 0
    return labels[kept], scores[kept], weight[kept]


def _weights(sample_weight: ArrayLike | None, n_examples: int) -> Array:
    if sample_weight is None:
        return np.ones(n_examples)
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (n_examples,) or not (np.isfinite(weight) & (weight >= 0)).all() or not weight.any():
        raise InputError(
            f"sample_weight must hold {n_examples} finite weights, none negative and not all 0, got shape {weight.shape}."
        )
    return weight


def _flagged(is_positive: NDArray[np.bool_], scores: Array, weight: Array) -> tuple[Array, Array]:
    """Weight of the negatives and of the positives flagged, for no threshold and then for each distinct score, falling."""
    order = np.argsort(-scores, kind="stable")
    scores, weight, is_positive = scores[order], weight[order], is_positive[order]
    last_of_tie = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    counts = (np.cumsum(weight * flags)[last_of_tie] for flags in (~is_positive, is_positive))
    false_positives, true_positives = (np.concatenate([[0.0], count]) for count in counts)
    return false_positives, true_positives


def _area(is_positive: NDArray[np.bool_], scores: Array, weight: Array) -> float:
    """Area under the ROC curve by the trapezoidal rule, which counts ties half."""
    false_positives, true_positives = _flagged(is_positive, scores, weight)
    area = np.diff(false_positives) @ (true_positives[1:] + true_positives[:-1]) / 2
    return float(area / (true_positives[-1] * false_positives[-1]))
