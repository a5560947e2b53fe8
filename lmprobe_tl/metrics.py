"""How well scores separate labels: AUROC, AUPRC, TPR at a bounded FPR, accuracy, Brier score, calibration error.

Scores are high for the positive class. With two classes the positive one is the greater label (1 of 0 and 1, True, the last
in alphabetical order), as in scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmprobe_tl.bootstrap import Interval as Interval
from lmprobe_tl.bootstrap import bootstrap_interval as bootstrap_interval
from lmprobe_tl.bootstrap import check_bootstrap as check_bootstrap
from lmprobe_tl.errors import InputError

Array: TypeAlias = NDArray[np.float64]

N_BINS = 10  # of a calibration error


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
        return float(_curve(labels == classes[1], scores, weight).auroc())
    areas = [_curve(labels == label, column, weight).auroc() for label, column in zip(classes, scores.T, strict=True)]
    return float(np.mean(areas))


def tpr_at_fpr(labels: ArrayLike, scores: ArrayLike, fpr: float, sample_weight: ArrayLike | None = None) -> float:
    """The best true positive rate of any threshold whose false positive rate does not exceed fpr.

    labels, scores: [n_examples], two classes. A threshold flags every score >= it, so ties are flagged together, and nothing
    is interpolated: with fpr below 1 / n_negatives no negative may be flagged.
    Raises InputError where the labels hold a single class, or more than two.
    """
    if not 0.0 <= fpr <= 1.0:
        raise InputError(f"fpr must be between 0 and 1, got {fpr}.")
    return float(_two_class_curve("tpr_at_fpr", labels, scores, sample_weight).tpr_at_fpr(fpr))


def accuracy(labels: ArrayLike, predictions: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """The share of predictions that equal their label; labels, predictions: [n_examples]."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape or not labels.size:
        raise InputError(f"Expected one prediction a label, got shapes {predictions.shape} and {labels.shape}.")
    return float(np.average(labels == predictions, weights=_weights(sample_weight, len(labels))))


def average_precision(labels: ArrayLike, scores: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Area under the precision-recall curve as a step function (AUPRC): the sum over thresholds of the recall that each adds
    times its precision, as scikit-learn's `average_precision_score`.

    labels, scores: [n_examples], two classes. Raises InputError as `tpr_at_fpr`.
    """
    return float(_two_class_curve("average_precision", labels, scores, sample_weight).average_precision())


def brier_score(labels: ArrayLike, probabilities: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Mean squared distance of the positive class's probability [n_examples] from the truth, 0 or 1 (Brier 1950)."""
    is_positive, probabilities, weight = _two_classes("brier_score", labels, probabilities, sample_weight)
    return float(np.average((probabilities - is_positive) ** 2, weights=weight))


def calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, sample_weight: ArrayLike | None = None, *, n_bins: int = N_BINS
) -> float:
    """Expected calibration error: the mean over bins of equal mass of |share of positives - mean probability|.

    labels, probabilities: [n_examples], the latter of the positive class. Equal probabilities are never parted. It is above
    0 even for a perfectly calibrated probe, by what a bin's share of positives differs from its chance.
    """
    is_positive, probabilities, weight = _two_classes("calibration_error", labels, probabilities, sample_weight)
    bins = CalibrationBins(is_positive, probabilities, n_bins)
    return float(bins.error(weight[bins.order]))


class Ranking:
    """Examples of two classes, sorted by score once, to be counted under many weightings.

    order: [n_examples], from the highest score to the lowest; weights come in this order.
    """

    def __init__(self, is_positive: NDArray[np.bool_], scores: Array) -> None:
        self.order: NDArray[np.int64] = np.argsort(-scores, kind="stable")
        self._is_positive = is_positive[self.order].astype(np.float64)
        ranked = scores[self.order]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self._last_of_tie = None if len(ends) == len(ranked) else ends

    def curve(self, weight: Array) -> RocCounts:
        """weight: [... n_examples], in the order of `order`."""
        positives = weight * self._is_positive
        counts = []
        for part in (weight - positives, positives):
            flagged = np.zeros((*part.shape[:-1], part.shape[-1] + 1))
            np.cumsum(part, axis=-1, out=flagged[..., 1:])
            if self._last_of_tie is not None:
                flagged = flagged[..., np.concatenate([[0], self._last_of_tie + 1])]
            counts.append(flagged)
        return RocCounts(*counts)


@dataclass(frozen=True, eq=False)
class RocCounts:
    """Weight of the negatives and of the positives flagged, [... n_thresholds], for no threshold and then for each distinct
    score, falling."""

    false_positives: Array
    true_positives: Array

    def auroc(self) -> Array:
        """[...]: the area by the trapezoidal rule, which counts ties half."""
        heights = self.true_positives[..., 1:] + self.true_positives[..., :-1]
        area = np.einsum("...i,...i->...", np.diff(self.false_positives), heights) / 2
        return area / (self.true_positives[..., -1] * self.false_positives[..., -1])

    def average_precision(self) -> Array:
        """[...]: see `average_precision`."""
        hits, flagged = self.true_positives[..., 1:], (self.true_positives + self.false_positives)[..., 1:]
        precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
        gained = np.einsum("...i,...i->...", np.diff(self.true_positives), precision)
        return gained / self.true_positives[..., -1]

    def tpr_at_fpr(self, fpr: float) -> Array:
        """[...]: see `tpr_at_fpr`."""
        rounding = 1.0 + 1e-12  # 0.29 * 100 is just below 29
        allowed = self.false_positives <= fpr * self.false_positives[..., -1:] * rounding
        last = allowed.sum(axis=-1, keepdims=True) - 1
        return np.take_along_axis(self.true_positives, last, axis=-1)[..., 0] / self.true_positives[..., -1]


class CalibrationBins:
    """Examples of two classes, sorted by probability once, whose calibration error is measured under many weightings.

    order: [n_examples], from the lowest probability to the highest; weights come in this order.
    """

    def __init__(self, is_positive: NDArray[np.bool_], probabilities: Array, n_bins: int = N_BINS) -> None:
        self.order: NDArray[np.int64] = np.argsort(probabilities, kind="stable")
        ranked = probabilities[self.order]
        self._gap = is_positive[self.order] - ranked
        self._first_of_tie = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        self._n_bins = n_bins

    def error(self, weight: Array) -> Array:
        """[...] for weight [... n_examples], in the order of `order`."""
        return np.abs(self.gaps(weight)).sum(axis=-1)

    def gaps(self, weight: Array) -> Array:
        """What each bin adds to share of positives - mean probability, [... n_bins]."""
        mass, gap = weight, weight * self._gap
        if len(self._first_of_tie) < weight.shape[-1]:
            mass, gap = (np.add.reduceat(part, self._first_of_tie, axis=-1) for part in (mass, gap))
        bins, total = self._bins(mass)
        rows = np.arange(bins[..., 0].size).reshape(*bins.shape[:-1], 1)
        sums = np.bincount((bins + rows * self._n_bins).ravel(), weights=gap.ravel(), minlength=rows.size * self._n_bins)
        return sums.reshape(*bins.shape[:-1], self._n_bins) / total

    def index(self) -> NDArray[np.int64]:
        """The bin of each example, [n_examples] in the order of `order`, where all weigh the same."""
        ends = np.append(self._first_of_tie[1:], len(self.order))
        n_tied = ends - self._first_of_tie
        return np.repeat(self._bins(n_tied.astype(np.float64))[0], n_tied)

    def _bins(self, mass: Array) -> tuple[NDArray[np.int64], Array]:
        """The bin of each run of equal probabilities and the whole mass, for mass [... n_runs]."""
        below = np.cumsum(mass, axis=-1)
        total = below[..., -1:]
        # multiplied first: a quotient that is a whole number comes out as one
        bins = np.minimum((below - mass / 2) * self._n_bins / total, self._n_bins - 1).astype(np.int64)
        return bins, total


def _two_classes(
    name: str, labels: ArrayLike, scores: ArrayLike, sample_weight: ArrayLike | None
) -> tuple[NDArray[np.bool_], Array, Array]:
    labels, scores, weight = _weighed(labels, scores, sample_weight)
    classes = np.unique(labels)
    if len(classes) != 2 or scores.ndim != 1:
        raise InputError(
            f"{name} needs two classes and one score an example, got the classes {classes.tolist()} and scores of shape "
            f"{scores.shape}."
        )
    return labels == classes[1], scores, weight


def _two_class_curve(name: str, labels: ArrayLike, scores: ArrayLike, sample_weight: ArrayLike | None) -> RocCounts:
    return _curve(*_two_classes(name, labels, scores, sample_weight))


def _curve(is_positive: NDArray[np.bool_], scores: Array, weight: Array) -> RocCounts:
    ranking = Ranking(is_positive, scores)
    return ranking.curve(weight[ranking.order])


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
