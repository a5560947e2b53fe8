"""Thresholds with a stated guarantee, and probabilities, from one number a sequence.

The number is the running maximum of a probe's live score over the whole sequence: a live run raises an alarm in it exactly
where that maximum reaches the threshold. Live scores are float32, and so are all comparisons here.

With the negatives' maxima in order, s_(1) <= ... <= s_(n), the threshold is the next float32 above s_(rank). For negatives
drawn independently from one source, the share of that source above s_(rank) has the law of Beta(n - rank + 1, rank) where
there are no ties, and is stochastically smaller where there are. Hence two guarantees, and a method without one:

    pac         P(FPR > fpr) <= delta: the smallest rank with P(Binomial(n, fpr) <= n - rank) <= delta (the tolerance limits
                of Wilks 1941, as used for conformal prediction by Vovk 2012)
    conformal   E(FPR) <= fpr: rank = ceil((n + 1) (1 - fpr)) (split conformal prediction: Papadopoulos et al. 2002)
    empirical   at most fpr of these very negatives; of new ones nothing is promised
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import bdtr, betaincinv, expit, logit

from lmprobe_tl.errors import CalibrationError, InputError
from lmprobe_tl.probe_spec import (
    HIGHEST_LOGIT,
    LOWEST_LOGIT,
    MetricRecord,
    ProbabilityRecord,
    ThresholdRecord,
    ThresholdUnit,
)

Method: TypeAlias = Literal["pac", "conformal", "empirical"]
METHODS: tuple[str, ...] = get_args(Method)
_NAMED_SEQUENCES = 8


@dataclass(frozen=True)
class Calibration:
    """What a calibration found: a threshold, and where there were positives the recall at it and a probability curve."""

    threshold: ThresholdRecord
    recall: MetricRecord | None = None
    probability: ProbabilityRecord | None = None


# --- the rank ----------------------------------------------------------------------------------------------------------


def required_negatives(fpr: float, delta: float = 0.05, method: str = "pac") -> int:
    """The fewest negative sequences with which the method can keep its promise.

    >>> required_negatives(0.01, 0.05), required_negatives(0.01, method="conformal")
    (299, 99)
    """
    check_rates(fpr, delta, method)
    if method == "empirical":
        return 1
    if method == "conformal":
        return math.ceil(1 / _exact(fpr)) - 1
    n = max(1, math.floor(math.log(delta) / math.log1p(-fpr)))  # (1 - fpr)^n <= delta, up to rounding
    while bdtr(0, n, fpr) > delta:
        n += 1
    return n


def threshold_rank(n: int, fpr: float, delta: float = 0.05, method: str = "pac") -> int:
    """Which of the n negatives in rising order, from 1 on, the threshold stands just above.

    CalibrationError where n is too small; it says how many are needed.

    >>> threshold_rank(500, 0.01, 0.05), threshold_rank(1000, 0.01, 0.05), threshold_rank(500, 0.01, method="conformal")
    (499, 996, 496)
    """
    needed = required_negatives(fpr, delta, method)
    if n < needed:
        promise = {"pac": f", delta {delta:g}", "conformal": "", "empirical": ""}[method]
        raise CalibrationError(
            f"{n} negative sequences are too few: method {method!r} with fpr {fpr:g}{promise} needs at least {needed}. Give "
            f"more, or allow a higher fpr{' or delta' if method == 'pac' else ''}."
        )
    if method == "empirical":
        return n - math.floor(n * _exact(fpr))
    if method == "conformal":
        return math.ceil((n + 1) * (1 - _exact(fpr)))
    above = 0  # how many negatives may stand above the threshold
    step = 1 << n.bit_length()
    while step := step // 2:
        if above + step < n and bdtr(above + step, n, fpr) <= delta:
            above += step
    return n - above


def check_rates(fpr: float, delta: float, method: str) -> None:
    """InputError for a rate outside (0, 1) or an unknown method."""
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected {', '.join(map(repr, METHODS))}.")
    for name, rate in (("fpr", fpr), ("delta", delta)):
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or not 0 < rate < 1:
            raise InputError(f"{name} is {rate!r}; expected a number between 0 and 1, such as 0.01.")


def _exact(rate: float) -> Fraction:
    """The rate as it is written: in binary, 0.29 * 100 is below 29."""
    return Fraction(repr(float(rate)))


# --- the threshold -----------------------------------------------------------------------------------------------------


def calibrate_threshold(
    negatives: ArrayLike,
    fpr: float = 0.01,
    delta: float = 0.05,
    *,
    method: str = "pac",
    unit: ThresholdUnit = "logit",
    statistic: str = "running maximum",
) -> ThresholdRecord:
    """The threshold for the running maxima of negative sequences, [n], one a sequence, in `unit`.

    CalibrationError: too few, values that are not finite (it names the sequences), or a threshold above every possible
    score.

    >>> calibrate_threshold(np.arange(500.0)).value  # just above the 499th of 500
    498.0000305175781
    """
    maxima = np.sort(checked_maxima(negatives, "negative"))
    rank = threshold_rank(len(maxima), fpr, delta, method)
    below = maxima[rank - 1]
    with np.errstate(over="ignore"):  # past the greatest float32 comes inf
        value = np.nextafter(below, np.float32(np.inf))
    if not np.isfinite(value) or (unit == "probability" and value > 1):
        count = int((maxima >= below).sum())
        raise CalibrationError(
            f"the threshold would lie above every possible score: {count} of {len(maxima)} negative sequences reach a "
            f"{unit} of {below:g}. Allow a higher fpr, or use an inference pooling of logits, such as 'score:max'."
        )
    return ThresholdRecord(
        value=float(value),
        unit=unit,
        method=method,
        fpr=float(fpr),
        delta=float(delta) if method == "pac" else None,
        n=len(maxima),
        rank=rank,
        statistic=statistic,
        guarantee=_guarantee(len(maxima), fpr, delta, method),
    )


def checked_maxima(values: ArrayLike, kind: str) -> NDArray[np.float32]:
    """Running maxima as float32 [n]; `kind`, 'negative' or 'positive', is for the CalibrationError."""
    given = np.asarray(values)
    if given.ndim != 1 or given.dtype.kind not in "fiu":
        raise CalibrationError(
            f"the running maxima of {kind} sequences have shape {given.shape} and dtype {given.dtype}; expected one number "
            "a sequence."
        )
    with np.errstate(over="ignore"):
        maxima = given.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(maxima))
    if len(wrong):
        more = f" and {len(wrong) - _NAMED_SEQUENCES} more" if len(wrong) > _NAMED_SEQUENCES else ""
        named = ", ".join(f"{index} ({given[index]})" for index in wrong[:_NAMED_SEQUENCES])
        raise CalibrationError(
            f"the running maxima of {kind} sequences are not all finite in float32: sequence {named}{more}. Nothing counts "
            "in such a sequence, or its activations overflow."
        )
    return maxima


def _guarantee(n: int, fpr: float, delta: float, method: str) -> str:
    share = f"at most {100 * fpr:g}% of new negative sequences of the same source and length raise a false alarm"
    if method == "pac":
        return f"With {100 * (1 - delta):g}% confidence over the draw of the {n} calibration sequences, {share}."
    if method == "conformal":
        return f"On average over draws of {n} calibration sequences, {share}; a single calibration may let through more."
    return f"None for new text: at most {100 * fpr:g}% of these very {n} calibration sequences raise an alarm."


# --- recall ------------------------------------------------------------------------------------------------------------


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share, hits of n (Clopper and Pearson 1934)."""
    if not (0 <= hits <= n and n >= 1 and 0 < confidence < 1):
        raise InputError(f"Expected 0 <= hits <= n, n >= 1, 0 < confidence < 1; got {hits}, {n} and {confidence}.")
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


def share_record(hits: int, n: int, confidence: float = 0.95) -> MetricRecord:
    """A share, hits of n, with its Clopper-Pearson interval."""
    low, high = clopper_pearson(hits, n, confidence)
    return MetricRecord(value=hits / n, low=low, high=high, confidence=confidence, n=n)


def recall_at_threshold(positives: ArrayLike, threshold: ThresholdRecord, confidence: float = 0.95) -> MetricRecord:
    """The share of positive sequences whose running maximum [n] reaches the threshold, with a Clopper-Pearson interval."""
    maxima = checked_maxima(positives, "positive")
    return share_record(int((maxima >= np.float32(threshold.value)).sum()), len(maxima), confidence)


def check_recall(
    recall: MetricRecord, min_recall: float, negatives: ArrayLike, positives: ArrayLike, threshold: ThresholdRecord
) -> None:
    """CalibrationError where the recall is below the target; it says at what FPR the target would be reached."""
    if recall.value >= min_recall:
        return
    below, above = checked_maxima(negatives, "negative"), np.sort(checked_maxima(positives, "positive"))
    needed = math.ceil(len(above) * _exact(min_recall))
    alarms = int((below >= above[len(above) - needed]).sum())
    raise CalibrationError(
        f"the recall is {recall.value:.3f} [{recall.low:.3f}, {recall.high:.3f}] on {recall.n} positive sequences at the "
        f"threshold {threshold.value:g} ({threshold.unit}, method {threshold.method}, fpr {threshold.fpr:g}), below the "
        f"target {min_recall:g}. A threshold that reaches the target raises an alarm in {alarms} of these {len(below)} "
        f"negative sequences, an FPR of {alarms / len(below):.3g}."
    )


# --- probabilities -----------------------------------------------------------------------------------------------------


def fit_probabilities(
    negatives: ArrayLike, positives: ArrayLike, *, unit: ThresholdUnit = "logit", statistic: str = "running maximum"
) -> ProbabilityRecord:
    """Platt scaling (Platt 1999, with his smoothed targets) of running maxima [n] in `unit`; apart from any threshold.

    The targets are (n_pos + 1) / (n_pos + 2) and 1 / (n_neg + 2) and not 1 and 0, so that a best curve exists also where the
    scores separate the sequences. A probability is taken as its logit first.
    CalibrationError where all maxima are equal, or where the positives do not score above the negatives.
    """
    below, above = checked_maxima(negatives, "negative"), checked_maxima(positives, "positive")
    if not (len(below) and len(above)):
        raise CalibrationError(f"expected negative and positive sequences, got {len(below)} and {len(above)}.")
    maxima = np.concatenate([below, above]).astype(np.float64)
    z = _finite_logits(maxima) if unit == "probability" else maxima
    is_positive = np.repeat([False, True], [len(below), len(above)])
    slope, intercept = _fit_sigmoid(z, np.where(is_positive, (len(above) + 1) / (len(above) + 2), 1 / (len(below) + 2)))
    if not slope > 0:
        raise CalibrationError(
            f"no rising probability curve fits: the {len(above)} positive sequences do not score above the {len(below)} "
            f"negative ones (slope {slope:.3g}). Check that the two lists are not swapped."
        )
    before, after = _losses(z, is_positive), _losses(slope * z + intercept, is_positive)
    return ProbabilityRecord(
        slope=slope,
        intercept=intercept,
        n_negative=len(below),
        n_positive=len(above),
        statistic=statistic,
        log_loss_before=before[0],
        log_loss_after=after[0],
        brier_before=before[1],
        brier_after=after[1],
    )


def _finite_logits(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(logit(probabilities), LOWEST_LOGIT, HIGHEST_LOGIT)


def _fit_sigmoid(z: NDArray[np.float64], targets: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and intercept that minimise the cross entropy of sigmoid(slope z + intercept) [n] with the targets [n]."""
    centre, spread = z.mean(), z.std()
    if not spread > 0:
        raise CalibrationError(f"all {len(z)} sequences have the same running maximum, {z[0]:g}: nothing tells them apart.")
    x = np.stack([(z - centre) / spread, np.ones_like(z)], axis=1)  # of unit size: the search steps in a ball

    def loss(w: NDArray[np.float64]) -> float:
        return float(np.mean(np.logaddexp(0, x @ w) - targets * (x @ w)))

    def gradient(w: NDArray[np.float64]) -> NDArray[np.float64]:
        return (expit(x @ w) - targets) @ x / len(x)

    def hessian(w: NDArray[np.float64]) -> NDArray[np.float64]:
        p = expit(x @ w)
        return x.T @ (x * (p * (1 - p))[:, None]) / len(x)

    start = np.array([0.0, logit(targets.mean())])
    found = minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-10})
    # the least loss may lie where rounding ends the search, short of gtol
    if not np.abs(gradient(found.x)).max() < 1e-6:
        raise CalibrationError(f"the probability curve did not converge ({found.message}).")
    slope = found.x[0] / spread
    return float(slope), float(found.x[1] - slope * centre)


def _losses(z: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> tuple[float, float]:
    """Log loss and Brier score of the probabilities sigmoid(z) [n]."""
    log_loss = np.logaddexp(0, np.where(is_positive, -z, z)).mean()
    return float(log_loss), float(np.square(expit(z) - is_positive).mean())
