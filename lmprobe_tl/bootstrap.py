"""Bootstrap over groups of examples: how often each resample draws a group, and the intervals that follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmprobe_tl.errors import InputError

Array: TypeAlias = NDArray[np.float64]
Metric: TypeAlias = Callable[..., float]  # (labels, scores) -> float, or (labels, scores, sample_weight=...) -> float

_FEWEST_GROUPS = 5
_MOST_VALUES = 12  # whose subsets are all taken
_ELEMENTS_AT_ONCE = 2**18  # of a block of weights: 2 MiB, which a core's cache holds


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


@dataclass(frozen=True, eq=False)
class Resamples:
    """How often each resample draws each group: the same for all that is measured on it, so that differences are paired.

    times: [n_bootstrap n_groups]; group_index: [n_examples], the group of each example; usable: [n_bootstrap], whether a
    resample holds every class; enough: whether every class is in at least five groups and most resamples are usable.
    Resampling fewer groups says nothing of others.
    """

    times: NDArray[Any]
    group_index: NDArray[np.int64]
    usable: NDArray[np.bool_]
    enough: bool
    confidence: float

    @classmethod
    def drawn(
        cls,
        labels: ArrayLike,
        groups: ArrayLike,
        *,
        n_bootstrap: int = 1000,
        confidence: float = 0.95,
        random_state: int | None = 0,
    ) -> Resamples:
        """labels, groups: [n_examples]. The draws depend on the number of groups and random_state alone."""
        check_bootstrap(n_bootstrap, confidence)
        group_index = np.unique(np.asarray(groups), return_inverse=True)[1]
        class_index = np.unique(np.asarray(labels), return_inverse=True)[1]
        n_groups = int(group_index.max()) + 1
        holds_class = np.zeros((n_groups, class_index.max() + 1), dtype=bool)
        holds_class[group_index, class_index] = True
        rng = np.random.default_rng(random_state)
        times = np.empty((n_bootstrap, n_groups), dtype=np.min_scalar_type(n_groups))
        for row in times:
            row[:] = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        usable = np.all([(times[:, holds] > 0).any(axis=1) for holds in holds_class.T], axis=0)
        enough = holds_class.sum(axis=0).min() >= _FEWEST_GROUPS and usable.sum() >= n_bootstrap / 2
        return cls(times, group_index, usable, bool(enough), confidence)

    @property
    def n_groups(self) -> int:
        return self.times.shape[1]

    def weights(self, order: NDArray[np.int64] | None = None) -> Iterator[tuple[slice, Array]]:
        """How often each example is drawn, [n_resamples n_examples], a few resamples at a time. order: [n_examples], in
        which the examples come."""
        index = self.group_index if order is None else self.group_index[order]
        step = max(1, _ELEMENTS_AT_ONCE // len(index))
        for start in range(0, len(self.times), step):
            rows = slice(start, start + step)
            yield rows, self.times[rows].take(index, axis=1).astype(np.float64)

    def measured(self, metric: Callable[[Array], Array], order: NDArray[np.int64] | None = None) -> Array:
        """metric(weights [n_resamples n_examples]) -> [n_resamples ...] for all resamples, NaN for unusable ones."""
        with np.errstate(invalid="ignore", divide="ignore"):  # in resamples that miss a class
            values = np.concatenate([metric(weights) for _, weights in self.weights(order)])
        values[~self.usable] = np.nan
        return values

    def interval(self, value: float, values: ArrayLike) -> Interval:
        """Percentile interval of values [n_bootstrap]; those that are NaN are left out."""
        values = np.asarray(values, dtype=np.float64)
        kept = values[~np.isnan(values)]
        n_skipped = len(values) - len(kept)
        if not self.enough or n_skipped > len(values) / 2:
            return Interval(value, None, None, self.confidence, self.n_groups, n_skipped)
        low, high = np.quantile(kept, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return Interval(value, float(low), float(high), self.confidence, self.n_groups, n_skipped)


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
    resamples = Resamples.drawn(labels, group_ids, n_bootstrap=n_bootstrap, confidence=confidence, random_state=random_state)
    values = np.full(n_bootstrap, np.nan)
    for row in np.flatnonzero(resamples.usable):
        values[row] = _resampled(metric, labels, scores, resamples.times[row][resamples.group_index])
    return resamples.interval(value, values)


def limit_without_failure(n: int, confidence: float) -> float:
    """What the chance of a success is at least, at this confidence, where n independent trials had no failure:
    (1 - confidence)^(1 / n) (Hanley and Lippman-Hand 1983). Resamples of such trials are all the same and tell nothing."""
    return (1 - confidence) ** (1 / n)


def centre_interval(values: ArrayLike, confidence: float) -> tuple[float, float]:
    """Interval of the centre that independent values [n] are symmetric about, whatever their distribution, two-peaked too.

    The means of all subsets divide the line into parts that hold the centre equally often (typical values, Hartigan 1969);
    of many values a random selection of subsets does. InputError for too few values: that takes 2^n >= 2 / (1 - confidence).
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n <= _MOST_VALUES:
        chosen = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        chosen = np.random.default_rng(0).integers(2, size=(2**_MOST_VALUES - 1, n))
        chosen = chosen[chosen.any(axis=1)]
    means = np.sort(chosen @ values / chosen.sum(axis=1))
    n_outside = int((1 - confidence) / 2 * (len(means) + 1) + 1e-9)
    if n_outside < 1:
        raise InputError(f"{n} values have no interval at a confidence of {confidence:g}; give more.")
    return float(means[n_outside - 1]), float(means[-n_outside])


def check_bootstrap(n_bootstrap: int, confidence: float) -> None:
    """InputError for a number of resamples or a confidence that a bootstrap cannot use."""
    if n_bootstrap < 1 or not 0.0 < confidence < 1.0:
        raise InputError(f"Expected n_bootstrap >= 1 and 0 < confidence < 1, got {n_bootstrap} and {confidence}.")


def _resampled(metric: Metric, labels: NDArray[Any], scores: NDArray[Any], times: NDArray[Any]) -> float:
    """The metric with example i taken times[i] times."""
    if "sample_weight" in inspect.signature(metric).parameters:
        return float(metric(labels, scores, sample_weight=times))
    rows = np.repeat(np.arange(len(labels)), times)
    return float(metric(labels[rows], scores[rows]))
