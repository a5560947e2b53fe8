"""The linear rule behind a fitted classifier: one direction and intercept per logit, or the news that there is none.

Only a linear rule can be saved in a probe file and run live. It is never trusted: whatever its origin, it is compared with
the classifier on training features and on random points around them before it is handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from einops import repeat
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.errors import InputError, NonlinearClassifierError

Array: TypeAlias = NDArray[np.float64]
Response: TypeAlias = Callable[[Array], Array]  # features [n_examples n_features] -> logits [n_examples n_outputs]

PROBABILITY_TOLERANCE = 1e-4
N_TRAINING_POINTS = 256
N_RANDOM_POINTS = 128
BATCH_ELEMENTS = 2**22  # 32 MiB of float64 at a time
LOG_ODDS_LIMIT = 10.0  # beyond it, probabilities near 0 and 1 keep too few digits to tell the log-odds


@dataclass(frozen=True, eq=False)
class LinearRule:
    """logits = features @ direction.T + intercept, in the unscaled space of the features.

    direction: [n_outputs n_features] float64; intercept: [n_outputs] float64. With two classes n_outputs is 1 and the logit
    is that of classes_[1]; otherwise there is one logit per class, and their softmax is the probability.
    """

    direction: Array
    intercept: Array

    def logits(self, features: ArrayLike) -> Array:
        """features: [n_examples n_features] -> [n_examples n_outputs]."""
        return np.asarray(features, dtype=np.float64) @ self.direction.T + self.intercept


def linear_rule(classifier: Any, features: ArrayLike, *, tolerance: float = 1e-4) -> LinearRule:
    """The linear rule that reproduces a fitted classifier, with scalers and other affine pipeline steps folded in.

    classifier: fitted, with decision_function or predict_proba. features: [n_examples n_features], those it was trained on,
    or others like them. tolerance: the largest deviation from the classifier, in standard deviations of its response;
    probabilities must agree to 1e-4.

    The rule equals decision_function. Where predict_proba says otherwise, or stands alone, it equals the log-odds of
    predict_proba (CalibratedClassifierCV with ensemble=False). A classifier without predict_proba (LinearSVC,
    RidgeClassifier) gives its decision value as logit, whose sigmoid is no calibrated probability.

    Raises NonlinearClassifierError if no linear rule does this, among them SVC(probability=True), whose probabilities are
    approximate; InputError for unusable features; scikit-learn's NotFittedError.
    """
    check_is_fitted(classifier, "classes_")
    cloud = _Cloud.around(_sampled(features))
    problems = {}
    contradiction = _contradiction(classifier, cloud.points)
    if contradiction:
        problems["predict"] = contradiction
    else:
        for name, rule, response, points in _candidates(classifier, cloud):
            problem = _deviation(name, rule, response(points), points, len(cloud.training), tolerance)
            problem = problem or _wrong_probability(name, rule, classifier, cloud.points)
            if problem is None:
                return rule
            problems[name] = problem
    raise NonlinearClassifierError(
        f"No linear rule reproduces {_name(classifier)}: {'; '.join(problems.values())}. It still works in predict and "
        f"predict_proba, but it cannot be saved or run live. For that use 'logistic_regression', 'mass_mean', 'mlp' or "
        f"'polynomial', or scikit-learn's LinearSVC, RidgeClassifier or LinearDiscriminantAnalysis."
    )


@dataclass(frozen=True, eq=False)
class _Cloud:
    """Points to compare on: training features, and random ones around them at one and three standard deviations."""

    training: Array  # [n_training n_features]
    points: Array  # [n_points n_features], training included
    center: Array  # [n_features]
    spread: Array  # [n_features], positive

    @classmethod
    def around(cls, training: Array) -> _Cloud:
        center, spread = training.mean(axis=0), training.std(axis=0)
        spread = np.where(spread > 0, spread, spread.mean() or 1.0)  # a constant feature may vary in use
        noise = np.random.default_rng(0).standard_normal((N_RANDOM_POINTS, training.shape[1])) * spread
        points = np.concatenate([training, center + noise, center + 3.0 * noise])
        return cls(training, points, center, spread)


def _sampled(features: ArrayLike) -> Array:
    """At most N_TRAINING_POINTS rows, evenly spaced, so that sorted classes all take part."""
    array = np.asarray(features)
    if array.ndim != 2 or not array.size:
        raise InputError(f"features must be [n_examples n_features] and not empty, got shape {array.shape}.")
    rows = np.linspace(0, len(array) - 1, min(len(array), N_TRAINING_POINTS)).astype(int)
    sample = array[rows].astype(np.float64)
    if not np.isfinite(sample).all():
        raise InputError("features must be finite, got NaN or infinite values.")
    return sample


def _candidates(classifier: Any, cloud: _Cloud) -> Iterator[tuple[str, LinearRule, Response, Array]]:
    """Rules that may reproduce the classifier, the exact one first: name of response, rule, response, points to compare."""
    if hasattr(classifier, "decision_function"):
        decision = _decision(classifier)
        folded = _folded(classifier)
        if folded is not None:
            yield "decision_function", folded, decision, cloud.points
        yield "decision_function", _measured(decision, cloud.center, cloud.spread), decision, cloud.points
    if hasattr(classifier, "predict_proba"):
        log_odds = _log_odds(classifier)
        base = _boundary_point(log_odds, cloud)
        rule = _measured(log_odds, base, cloud.spread)
        yield "log-odds of predict_proba", rule, log_odds, _towards(base, cloud.points, rule)


def _decision(classifier: Any) -> Response:
    def decision(points: Array) -> Array:
        values = np.asarray(classifier.decision_function(points), dtype=np.float64)
        return values[:, None] if values.ndim == 1 else values

    return decision


def _log_odds(classifier: Any) -> Response:
    """Two classes: log p_1 - log p_0. More: log p_k less its mean over classes, since softmax fixes them up to a shift."""

    def log_odds(points: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):  # log 0: the infinite logit is found later, and named
            logs = np.log(np.asarray(classifier.predict_proba(points), dtype=np.float64))
            return logs[:, 1:] - logs[:, :1] if logs.shape[1] == 2 else logs - logs.mean(axis=1, keepdims=True)

    return log_odds


# --- Where rules come from


def _folded(classifier: Any) -> LinearRule | None:
    """In closed form: coef_ and intercept_, and the scalers before them. None where a step is of another type."""
    *transforms, final = _steps(classifier)
    coef, intercept = getattr(final, "coef_", None), getattr(final, "intercept_", None)
    if not isinstance(coef, np.ndarray) or intercept is None:
        return None
    direction = np.atleast_2d(coef).astype(np.float64)
    intercept = np.zeros(len(direction)) + intercept
    for transform in reversed(transforms):
        if type(transform) not in _AFFINE:
            return None
        scale, offset = (np.broadcast_to(part, direction.shape[1]) for part in _AFFINE[type(transform)](transform))
        direction, intercept = direction * scale, intercept + direction @ offset
    return LinearRule(direction, intercept)


def _steps(classifier: Any) -> list[Any]:
    """The fitted steps behind pipelines and searches, the last being the classifier itself."""
    if isinstance(classifier, Pipeline):
        *transforms, final = [step for _, step in classifier.steps if step not in (None, "passthrough")]
        return [*transforms, *_steps(final)]
    if hasattr(classifier, "best_estimator_"):
        return _steps(classifier.best_estimator_)
    return [classifier]


def _centered(center: Any, scale: Any) -> tuple[Any, Any]:
    """(x - center) / scale as x * factor + offset; None, a step switched off, leaves x alone."""
    factor = 1.0 / (1.0 if scale is None else np.asarray(scale, dtype=np.float64))
    return factor, -factor * (0.0 if center is None else center)


# x -> x * scale + offset, elementwise. The exact types: a subclass may do anything.
_AFFINE: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    StandardScaler: lambda step: _centered(step.mean_ if step.with_mean else None, step.scale_),
    RobustScaler: lambda step: _centered(step.center_, step.scale_),
    MaxAbsScaler: lambda step: _centered(None, step.scale_),
    MinMaxScaler: lambda step: (step.scale_, step.min_),
}


def _measured(response: Response, base: Array, step: Array) -> LinearRule:
    """The rule through base [n_features] and, per feature, a point a tenth of step beside it; exact if affine."""
    at_base = response(base[None])[0]
    n_features = len(base)
    direction = np.empty((len(at_base), n_features))
    batch = max(1, BATCH_ELEMENTS // n_features)
    for start in range(0, n_features, batch):
        features = np.arange(start, min(start + batch, n_features))
        points = repeat(base, "n_features -> n n_features", n=len(features)).copy()
        points[np.arange(len(features)), features] += 0.1 * step[features]
        taken = points[np.arange(len(features)), features] - base[features]  # the step as rounded
        with np.errstate(invalid="ignore"):  # infinite log-odds are found when the rule is compared
            direction[:, features] = ((response(points) - at_base) / taken[:, None]).T
    with np.errstate(invalid="ignore"):
        return LinearRule(direction, at_base - direction @ base)


def _boundary_point(log_odds: Response, cloud: _Cloud) -> Array:
    """A point [n_features] where the two top classes are about even, so that neither probability is rounded to 0 or 1.

    Found by bisection between two training points of different predicted classes; the center where all have the same.
    """

    def top_class(points: Array) -> NDArray[np.int64]:
        logits = log_odds(points)
        return logits.argmax(axis=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).astype(np.int64)

    classes = top_class(cloud.training)
    others = np.flatnonzero(classes != classes[0])
    if not len(others):
        return cloud.center
    here, there = cloud.training[0], cloud.training[others[0]]
    for _ in range(50):
        middle = (here + there) / 2
        if top_class(middle[None])[0] == classes[0]:
            here = middle
        else:
            there = middle
    return (here + there) / 2


def _towards(base: Array, points: Array, rule: LinearRule) -> Array:
    """The points drawn towards base, until the rule puts no logit further than LOG_ODDS_LIMIT from that at base."""
    with np.errstate(invalid="ignore"):  # a rule that is not finite fails anyway
        distance = np.abs(rule.logits(points) - rule.logits(base[None])).max(axis=1, keepdims=True)
        fraction = np.nan_to_num(LOG_ODDS_LIMIT / np.maximum(distance, LOG_ODDS_LIMIT))
    return base + fraction * (points - base)


# --- What a rule must pass


def _deviation(name: str, rule: LinearRule, expected: Array, points: Array, n_training: int, tolerance: float) -> str | None:
    """What is wrong if the rule does not give the expected logits; their spread is that of the first n_training points."""
    if rule.direction.shape[0] != expected.shape[1]:
        return f"{name} has {expected.shape[1]} outputs, its coef_ {rule.direction.shape[0]}"
    if not (np.isfinite(expected).all() and np.isfinite(rule.direction).all()):
        return f"{name} is infinite or undefined at some points"
    deviation = np.abs(rule.logits(points) - expected).max()
    spread = expected[:n_training].std(axis=0).max()
    rounding = 1e-10 * np.abs(expected).max()
    if deviation <= tolerance * spread + rounding:
        return None
    return f"{name} deviates from a linear rule by up to {deviation:.3g}, at a standard deviation of {spread:.3g}"


def _wrong_probability(name: str, rule: LinearRule, classifier: Any, points: Array) -> str | None:
    """What is wrong if sigmoid or softmax of the rule is not predict_proba."""
    if not hasattr(classifier, "predict_proba"):
        return None
    logits = rule.logits(points)
    implied = np.hstack([expit(-logits), expit(logits)]) if logits.shape[1] == 1 else softmax(logits, axis=1)
    deviation = np.abs(implied - classifier.predict_proba(points)).max()
    if deviation <= PROBABILITY_TOLERANCE:
        return None
    return f"probabilities from {name} deviate from predict_proba by up to {deviation:.3g}"


def _contradiction(classifier: Any, points: Array) -> str | None:
    """What is wrong if predict does not name the class of the highest response: pairwise votes, a moved threshold."""
    name = "decision_function" if hasattr(classifier, "decision_function") else "predict_proba"
    if not hasattr(classifier, name):
        return "it has neither decision_function nor predict_proba"
    values = np.asarray(getattr(classifier, name)(points), dtype=np.float64)
    values = np.column_stack([-values, values]) if values.ndim == 1 else values
    n_classes = len(classifier.classes_)
    if values.shape[1] != n_classes:
        return f"{name} has {values.shape[1]} columns for {n_classes} classes"
    ordered = np.sort(values, axis=1)
    is_tie = ordered[:, -1] - ordered[:, -2] <= 1e-9 * np.abs(values).max()
    named = np.asarray(classifier.predict(points)) == np.asarray(classifier.classes_)[values.argmax(axis=1)]
    n_wrong = int((~named & ~is_tie).sum())
    return f"predict contradicts {name} on {n_wrong} of {len(points)} points, as with a moved threshold" if n_wrong else None


def _name(classifier: Any) -> str:
    return " of ".join(dict.fromkeys([type(classifier).__name__, type(_steps(classifier)[-1]).__name__]))
