"""Metrics of scored examples with intervals, and paired differences between them, on resamples that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.bootstrap import Array, Interval, Resamples, limit_without_failure
from lmprobe_tl.checked_record import Record, require
from lmprobe_tl.errors import InputError
from lmprobe_tl.metrics import CalibrationBins, Ranking
from lmprobe_tl.probe_spec import MetricRecord
from lmprobe_tl.scored import Scored

FPRS = (0.01, 0.001)
_CALIBRATED_AT = 0.95  # how often a calibrated probe shows less than what counts as miscalibration
_TWO_CLASSES = "defined for two classes; there are {n}"


@dataclass(frozen=True, kw_only=True)
class Measure(Record):
    """A metric on all examples with its interval. value is None where it is not defined, low and high where the data are too
    few to tell; `note` says why. n: how many prompts were resampled."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    note: str = ""

    def _validate(self) -> None:
        require((self.low is None) == (self.high is None), "(low, high)", (self.low, self.high), "both, or None for both")
        require(self.value is not None or bool(self.note), "note", self.note, "why there is no value")


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """One metric of two scorings, the second subtracted from the first, on the same resamples.

    share_at_most_zero: of the resamples, where the difference is 0 or below. None, as low and high, for too few data.
    """

    value: float
    low: float | None
    high: float | None
    share_at_most_zero: float | None

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True, eq=False)
class Sampled:
    """A metric on all examples, and on each resample [n_bootstrap], NaN in those that it is not defined in."""

    value: float | None
    values: Array | None
    note: str = ""
    interval: tuple[float, float] | None = None  # where it is not the percentiles of the values
    n_trials: int | None = None  # how many independent trials all succeed where the value is 1, and all fail where it is 0


def sampled_metrics(
    examples: Scored, resamples: Resamples, fprs: Sequence[float] = FPRS, *, calibration: bool = True
) -> dict[str, Sampled]:
    """AUROC, AUPRC, accuracy, TPR at each FPR, and with `calibration` Brier score and calibration error, by name.

    With more than two classes AUROC (one against the rest, the mean over classes) and accuracy alone have values.
    """
    found = {name: Sampled(None, None, note) for name, note in _undefined(examples, fprs, calibration).items()}
    found["accuracy"] = sampled_share(examples.predicted == examples.labels, resamples)
    if "auroc" not in found:
        found |= sampled_ranks(examples.labels, examples.scores, resamples, [f for f in fprs if tpr_name(f) not in found])
    if "brier" not in found and calibration:
        found |= _sampled_calibration(examples, resamples)
    order = ["auroc", "auprc", "accuracy", *map(tpr_name, fprs), *["calibration_error", "brier"] * calibration]
    return {name: found[name] for name in order}


def sampled_ranks(
    labels: NDArray[np.int64], scores: Array, resamples: Resamples, fprs: Sequence[float]
) -> dict[str, Sampled]:
    """Metrics that depend on the ranks of the scores alone. labels: [n_examples] from 0 on, all of them there; scores:
    [n_examples], or [n_examples n_classes], for which there is AUROC alone."""
    if scores.ndim == 2:
        return {"auroc": sampled_auroc(labels, scores, resamples)}
    ranking = Ranking(labels == 1, scores)

    def measure(weight: Array) -> Array:
        curve = ranking.curve(weight)
        return np.stack([curve.auroc(), curve.average_precision(), *(curve.tpr_at_fpr(fpr) for fpr in fprs)], axis=-1)

    value, values = measure(np.ones(len(labels))), resamples.measured(measure, ranking.order)
    n_of_class = _prompts_by_class(labels, resamples)
    n_trials = {"auroc": min(n_of_class), "auprc": None} | dict.fromkeys(map(tpr_name, fprs), n_of_class[1])
    return {name: Sampled(float(value[at]), values[:, at], n_trials=n) for at, (name, n) in enumerate(n_trials.items())}


def sampled_auroc(labels: NDArray[np.int64], scores: Array, resamples: Resamples) -> Sampled:
    """As `sampled_ranks` gives it, in less time."""
    if scores.ndim == 2:
        columns = enumerate(scores.T)
        areas = [sampled_auroc((labels == at).astype(np.int64), column, resamples) for at, column in columns]
        return replace(mean_of(areas), n_trials=min(area.n_trials or 0 for area in areas))
    ranking = Ranking(labels == 1, scores)
    area = _sampled(lambda weight: ranking.curve(weight).auroc(), resamples, ranking.order)
    # The AUROC is the chance that a pair of a positive and a negative is in order; so many pairs share no prompt.
    return replace(area, n_trials=min(_prompts_by_class(labels, resamples)))


def sampled_share(hits: NDArray[Any], resamples: Resamples) -> Sampled:
    """The share of examples that are hits [n_examples]."""
    return replace(sampled_mean(hits, resamples), n_trials=resamples.n_groups)


def sampled_mean(values: NDArray[Any], resamples: Resamples) -> Sampled:
    """The mean over examples of values [n_examples]."""
    numbers = np.asarray(values, dtype=np.float64)
    return _sampled(lambda weight: weight @ numbers / weight.sum(axis=-1), resamples)


def tpr_name(fpr: float) -> str:
    return f"tpr_at_fpr_{fpr:g}"


def mean_of(samples: Sequence[Sampled]) -> Sampled:
    """The mean of several, resample by resample; without a value where one of them has none."""
    values = [one.values for one in samples if one.values is not None]
    if len(values) < len(samples):
        return Sampled(None, None, next(one.note for one in samples if one.values is None))
    return Sampled(float(np.mean([one.value for one in samples if one.value is not None])), np.mean(values, axis=0))


def measures_of(samples: Mapping[str, Sampled], resamples: Resamples) -> dict[str, Measure]:
    """The records, with intervals."""
    return {name: _measure(one, resamples) for name, one in samples.items()}


def differences_of(
    first: Mapping[str, Sampled],
    second: Mapping[str, Sampled],
    resamples: Resamples,
    resamples_of_second: Resamples | None = None,
) -> dict[str, Difference]:
    """First less second for each metric that both have. Of a calibration error there is none: chance adds to both, but not
    the same. resamples_of_second: for independent data, which have resamples of their own."""
    both = [name for name in first if name in second and name != "calibration_error"]
    found = {name: _difference(first[name], second[name], resamples, resamples_of_second or resamples) for name in both}
    return {name: one for name, one in found.items() if one is not None}


def _difference(first: Sampled, second: Sampled, resamples: Resamples, resamples_of_second: Resamples) -> Difference | None:
    """None where one of them has no value."""
    if first.value is None or second.value is None or first.values is None or second.values is None:
        return None
    n_bootstrap = min(len(first.values), len(second.values))
    values = first.values[:n_bootstrap] - second.values[:n_bootstrap]
    interval = resamples.interval(first.value - second.value, values)
    if interval.low is None or not resamples_of_second.enough:
        return Difference(value=interval.value, low=None, high=None, share_at_most_zero=None)
    share = float((values[~np.isnan(values)] <= 0).mean())
    return Difference(value=interval.value, low=interval.low, high=interval.high, share_at_most_zero=share)


def metric_records(
    measures: Mapping[str, Measure], n_examples: int, confidence: float, level: str
) -> dict[str, MetricRecord]:
    """The measures that have a value, as a probe file keeps them; names of metrics of tokens begin with 'token_'."""
    prefix = "token_" if level == "token" else ""
    return {
        prefix + name: MetricRecord(
            value=one.value, low=one.low, high=one.high, confidence=None if one.low is None else confidence, n=n_examples
        )
        for name, one in measures.items()
        if one.value is not None
    }


def _measure(one: Sampled, resamples: Resamples) -> Measure:
    if one.value is None or one.values is None:
        return Measure(value=None, n=resamples.n_groups, note=one.note)
    interval = interval_of(one, resamples)
    note = one.note or _interval_note(one, interval, resamples)
    return Measure(value=one.value, low=interval.low, high=interval.high, n=resamples.n_groups, note=note)


def _interval_note(one: Sampled, interval: Interval, resamples: Resamples) -> str:
    spread = resamples.interval(interval.value, [] if one.values is None else one.values)
    if spread.low is None:
        return "too few prompts for an interval"
    if spread.low != spread.high:
        return ""
    if interval.low is None:
        return "no spread, so no interval"
    return "all resamples are the same" if interval.low == interval.high else "no spread; limit from counts"


def interval_of(one: Sampled, resamples: Resamples) -> Interval:
    """The interval of a metric that has a value. Where all resamples show the best or the worst value, it is that of trials
    without a failure or a success, and low and high are None where there is none such."""
    assert one.value is not None and one.values is not None
    found = resamples.interval(one.value, one.values)
    if found.low is None or found.high is None:
        return found
    if one.interval is not None:
        return replace(found, low=one.interval[0], high=one.interval[1])
    if found.low < found.high or one.value not in (0.0, 1.0):
        return found
    if not one.n_trials:
        return replace(found, low=None, high=None)
    limit = limit_without_failure(one.n_trials, resamples.confidence)
    return replace(found, low=limit, high=1.0) if one.value == 1.0 else replace(found, low=0.0, high=1.0 - limit)


def _prompts_by_class(labels: NDArray[np.int64], resamples: Resamples) -> list[int]:
    """How many resampled groups hold each of two classes."""
    return [len(np.unique(resamples.group_index[labels == label])) for label in (0, 1)]


def _undefined(examples: Scored, fprs: Sequence[float], calibration: bool) -> dict[str, str]:
    """Why a metric has no value, by name."""
    of_two = ["auprc", *map(tpr_name, fprs), *["calibration_error", "brier"] * calibration]
    missing = sorted(set(range(len(examples.classes))) - set(examples.labels.tolist()))
    if missing:
        note = f"no {examples.level} of class {examples.classes[missing[0]]!r}"
        return dict.fromkeys(["auroc", *of_two], note)
    if not examples.is_binary:
        return dict.fromkeys(of_two, _TWO_CLASSES.format(n=len(examples.classes)))
    n_negatives = int((examples.labels == 0).sum())
    return {
        tpr_name(fpr): f"needs {needed:,} negatives, has {n_negatives:,}"
        for fpr in fprs
        if fpr > 0 and n_negatives < (needed := math.ceil(1 / fpr - 1e-9))
    }


def check_fprs(fprs: Sequence[float]) -> None:
    """InputError for what is no list of different rates."""
    if not all(isinstance(fpr, (int, float)) and 0 <= fpr <= 1 for fpr in fprs) or len(set(map(tpr_name, fprs))) < len(fprs):
        raise InputError(f"fprs is {list(fprs)!r}; expected false positive rates from 0 to 1, all different.")


def _sampled(metric: Callable[[Array], Array], resamples: Resamples, order: NDArray[np.int64] | None = None) -> Sampled:
    one = metric(np.ones(len(resamples.group_index)))
    return Sampled(float(one), resamples.measured(metric, order))


def _sampled_calibration(examples: Scored, resamples: Resamples) -> dict[str, Sampled]:
    probabilities, is_positive = examples.probabilities[:, 1], examples.labels == 1
    losses = (probabilities - is_positive) ** 2
    bins = CalibrationBins(is_positive, probabilities)
    gaps, resampled = bins.gaps(np.ones(len(losses))), resamples.measured(bins.gaps, bins.order)
    value, values = float(np.abs(gaps).sum()), np.abs(resampled).sum(axis=-1)
    by_chance = np.abs(resampled - gaps).sum(axis=-1)  # what resampling alone does to the bins
    note, interval = "", None
    if resamples.enough:
        limit = float(np.nanquantile(by_chance, _CALIBRATED_AT))
        low, high = np.nanquantile(values, [(1 - resamples.confidence) / 2, (1 + resamples.confidence) / 2]).tolist()
        # Chance only adds to it, and resampling adds that once more: percentiles alone would lie above the truth.
        bias = float(np.nanmean(values)) - value
        interval = (max(0.0, min(low - bias, 2 * value - high)), max(high, value))
        if value <= limit:
            interval = (0.0, interval[1])
            note = f"a calibrated probe reaches {limit:.3f} by chance"
    return {
        "calibration_error": Sampled(value, values, note, interval),
        "brier": sampled_mean(losses, resamples),
    }
