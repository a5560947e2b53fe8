"""Named classifiers fitted in passes over blocks of examples, none of which has to be in memory with the others.

Each fit gives what the in-memory one gives, up to rounding: sums are taken in float64, and those of squares about the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import Pipeline

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.mass_mean import MassMeanClassifier

Array: TypeAlias = NDArray[np.float64]

_LOGISTIC_OPTIONS = {"maxiter": 2000, "ftol": 64 * np.finfo(float).eps, "gtol": 1e-8, "maxls": 50}


@dataclass(frozen=True)
class Block:
    """Some of the examples: `features` [n n_features], `classes` [n] as indices, `weight` [n] or None for ones."""

    features: Array
    classes: NDArray[np.int64]
    weight: Array | None = None


Blocks = Callable[[], Iterable[Block]]  # each call is a pass over all examples, in the same order


class Moments:
    """Counts, means and scatter of each class, added up block by block.

    weight: [n_classes]; means: [n_classes n_features]; scatter: [n_classes n_features n_features], the sum of
    w (x - mean)(x - mean)', or with only_pooled their sum [1 n_features n_features]. Two sets are joined as in Chan, Golub
    and LeVeque (1979), which keeps the digits that a difference of sums of squares would lose.
    """

    def __init__(self, n_classes: int, *, with_scatter: bool, only_pooled: bool = False) -> None:
        self.weight = np.zeros(n_classes)
        self.means: Array = np.zeros((n_classes, 0))
        self.scatter: Array = np.zeros((0, 0, 0))
        self._with_scatter, self._only_pooled = with_scatter, only_pooled

    def add(self, block: Block) -> None:
        n_classes, n_features = len(self.weight), block.features.shape[1]
        if not self.means.size:
            self.means = np.zeros((n_classes, n_features))
            n_scatters = 0 if not self._with_scatter else (1 if self._only_pooled else n_classes)
            self.scatter = np.zeros((n_scatters, n_features, n_features))
        for index in np.unique(block.classes):
            member = block.classes == index
            weight = np.ones(member.sum()) if block.weight is None else block.weight[member]
            if weight.sum() > 0:
                self._join(index, block.features[member], weight)

    def _join(self, index: int, features: Array, weight: Array) -> None:
        total = weight.sum()
        mean = weight @ features / total
        before, after = self.weight[index], self.weight[index] + total
        step = mean - self.means[index]
        if self._with_scatter:
            residuals = (features - mean) * np.sqrt(weight)[:, None]
            scatter = self.scatter[0 if self._only_pooled else index]
            scatter += residuals.T @ residuals
            scatter += np.outer(step, step) * (before * total / after)
        self.means[index] += step * (total / after)
        self.weight[index] = after


def fit_mass_mean(blocks: Blocks, classes: NDArray[Any], classifier: MassMeanClassifier) -> MassMeanClassifier:
    """Class means in one pass (with covariance=True the pooled scatter, too), and the scale of the logit in a second."""
    moments = Moments(len(classes), with_scatter=classifier.covariance, only_pooled=True)
    for block in blocks():
        moments.add(block)

    def rows() -> Iterable[tuple[Array, NDArray[np.int64], Array]]:
        for block in blocks():
            weight = np.ones(len(block.classes)) if block.weight is None else block.weight
            yield block.features, block.classes, weight

    covariance = moments.scatter[0] / moments.weight.sum() if classifier.covariance else None
    return classifier.fit_statistics(classes, moments.means, moments.weight, covariance, rows)


def fit_lda(blocks: Blocks, classes: NDArray[Any], classifier: LinearDiscriminantAnalysis) -> LinearDiscriminantAnalysis:
    """Means and scatter in one pass; with shrinkage='auto' (Ledoit and Wolf 2004) a second for their fourth moments.

    As scikit-learn's solver 'lsqr': each class has its own shrunk covariance, on its own standardised features, and the
    classifier takes their mean weighted by the classes' shares.
    """
    _refuse_weights(blocks, "LinearDiscriminantAnalysis")
    moments = Moments(len(classes), with_scatter=True)
    for block in blocks():
        moments.add(block)
    deviations = [
        _deviation(scatter, n, mean) for scatter, n, mean in zip(moments.scatter, moments.weight, moments.means, strict=True)
    ]
    fourth = np.zeros(len(classes))
    if classifier.shrinkage == "auto":
        for block in blocks():
            for index in np.unique(block.classes):
                scaled = (block.features[block.classes == index] - moments.means[index]) / deviations[index]
                fourth[index] += ((scaled**2).sum(axis=1) ** 2).sum()
    shares = moments.weight / moments.weight.sum()
    covariance = sum(
        share * _shrunk(scatter, n, deviation, classifier.shrinkage, sum_of_fourths)
        for share, scatter, n, deviation, sum_of_fourths in zip(
            shares, moments.scatter, moments.weight, deviations, fourth, strict=True
        )
    )
    coef = np.linalg.lstsq(covariance, moments.means.T, rcond=None)[0].T
    intercept = -0.5 * (moments.means * coef).sum(axis=1) + np.log(shares)
    if len(classes) == 2:
        coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    classifier.classes_, classifier.priors_, classifier.means_ = classes, shares, moments.means
    classifier.covariance_, classifier.coef_, classifier.intercept_ = covariance, coef, intercept
    classifier.xbar_ = shares @ moments.means
    classifier.n_features_in_ = coef.shape[1]
    classifier._max_components = min(len(classes) - 1, coef.shape[1])
    return classifier


def _deviation(scatter: Array, n: float, mean: Array) -> Array:
    """Standard deviations [n_features] of a class; 1 for a feature that is constant up to rounding, as StandardScaler."""
    variance, eps = np.diag(scatter) / n, np.finfo(np.float64).eps
    constant = variance <= n * eps * variance + (n * mean * eps) ** 2
    return np.where(constant, 1.0, np.sqrt(variance))


def _shrunk(scatter: Array, n: float, deviation: Array, shrinkage: Any, sum_of_fourths: float) -> Array:
    """The covariance of a class drawn towards a multiple of the identity."""
    if shrinkage is None:
        return scatter / n
    if shrinkage != "auto":
        covariance = scatter / n
        target = np.trace(covariance) / len(covariance)
        return (1 - shrinkage) * covariance + shrinkage * target * np.eye(len(covariance))
    covariance = scatter / n / deviation[:, None] / deviation
    n_features = len(covariance)
    target = np.trace(covariance) / n_features
    squares = (covariance**2).sum()
    distance = (squares - n_features * target**2) / n_features
    noise = min((sum_of_fourths / n - squares) / (n_features * n), distance)
    share = 0.0 if noise == 0 else noise / distance
    shrunk = (1 - share) * covariance + share * target * np.eye(n_features)
    return deviation[:, None] * shrunk * deviation


def fit_ridge(blocks: Blocks, classes: NDArray[Any], pipeline: Pipeline) -> Pipeline:
    """Standardised features and least squares on targets of 1 and -1, in one pass."""
    scaler, ridge = pipeline.named_steps.values()
    assert isinstance(ridge, RidgeClassifier)
    moments = Moments(len(classes), with_scatter=True, only_pooled=True)
    for block in blocks():
        scaler.partial_fit(block.features)
        moments.add(block)
    shares = moments.weight / moments.weight.sum()
    mean = shares @ moments.means
    between = moments.means - mean
    scatter = moments.scatter[0] + (between * moments.weight[:, None]).T @ between
    scatter = scatter / scaler.scale_[:, None] / scaler.scale_
    targets = 2.0 * np.eye(len(classes)) - 1.0  # [n_classes n_outputs]
    targets = targets[:, 1:] if len(classes) == 2 else targets
    mean_target = shares @ targets
    product = (between / scaler.scale_ * moments.weight[:, None]).T @ (targets - mean_target)
    scatter[np.diag_indices_from(scatter)] += ridge.alpha
    coef = np.linalg.solve(scatter, product).T
    ridge.coef_ = coef
    ridge.intercept_ = mean_target - coef @ ((mean - scaler.mean_) / scaler.scale_)
    ridge._label_binarizer = _binarizer(classes)
    ridge.n_features_in_ = coef.shape[1]
    return pipeline


def _binarizer(classes: NDArray[Any]) -> Any:
    from sklearn.preprocessing import LabelBinarizer

    return LabelBinarizer(pos_label=1, neg_label=-1).fit(classes)


def fit_logistic_regression(blocks: Blocks, classes: NDArray[Any], pipeline: Pipeline) -> Pipeline:
    """Standardised features and L2-penalised logistic regression by L-BFGS, each step of which is a pass."""
    scaler, logistic = pipeline.named_steps.values()
    assert isinstance(logistic, LogisticRegression)
    total = 0.0
    for block in blocks():
        scaler.partial_fit(block.features)
        total += len(block.classes) if block.weight is None else block.weight.sum()
    n_features, n_outputs = len(scaler.mean_), 1 if len(classes) == 2 else len(classes)
    penalty = 1.0 / (logistic.C * total)

    def loss_and_gradient(parameters: Array) -> tuple[float, Array]:
        coef, intercept = np.split(parameters.reshape(n_outputs, n_features + 1), [n_features], axis=1)
        # The scaler is folded into the direction, so that no scaled copy of a block is made.
        direction = coef / scaler.scale_
        offset = intercept[:, 0] - direction @ scaler.mean_
        loss, slope, slope_sum = 0.0, np.zeros((n_outputs, n_features)), np.zeros(n_outputs)
        for block in blocks():
            block_loss, excess = _log_loss(block.features @ direction.T + offset, block.classes, block.weight)
            loss += block_loss
            slope += excess.T @ block.features
            slope_sum += excess.sum(axis=0)
        slope = (slope - slope_sum[:, None] * scaler.mean_) / scaler.scale_
        gradient = np.hstack([slope / total + penalty * coef, slope_sum[:, None] / total])
        return loss / total + 0.5 * penalty * float((coef**2).sum()), gradient.ravel()

    start = np.zeros(n_outputs * (n_features + 1))
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=_LOGISTIC_OPTIONS)
    coef, intercept = np.split(found.x.reshape(n_outputs, n_features + 1), [n_features], axis=1)
    logistic.classes_, logistic.coef_, logistic.intercept_ = classes, coef, intercept[:, 0]
    logistic.n_iter_ = np.array([found.nit], dtype=np.int32)
    logistic.n_features_in_ = n_features
    return pipeline


def _log_loss(raw: Array, classes: NDArray[np.int64], weight: Array | None) -> tuple[float, Array]:
    """Weighted sum of the log losses of raw scores [n n_outputs], and its gradient with respect to them."""
    if raw.shape[1] == 1:
        signed = np.where(classes == 1, raw[:, 0], -raw[:, 0])
        losses = np.logaddexp(0.0, -signed)
        excess = (expit(raw[:, 0]) - classes)[:, None]
    else:
        log_probabilities = log_softmax(raw, axis=1)
        rows = np.arange(len(classes))
        losses = -log_probabilities[rows, classes]
        excess = np.exp(log_probabilities)
        excess[rows, classes] -= 1.0
    if weight is not None:
        losses, excess = losses * weight, excess * weight[:, None]
    return float(losses.sum()), excess


def _refuse_weights(blocks: Blocks, name: str) -> None:
    if next(iter(blocks())).weight is not None:
        raise InputError(f"{name} takes no sample weights, so prompts cannot weigh the same; use equal_prompt_weight=False.")


_FITS: dict[str, Callable[..., Any]] = {
    "lda": fit_lda,
    "logistic_regression": fit_logistic_regression,
    "mass_mean": fit_mass_mean,
    "ridge": fit_ridge,
}


def can_stream(classifier: Any) -> bool:
    """Whether a classifier, by name, can be fitted block by block."""
    return isinstance(classifier, str) and classifier in _FITS


def fit_blocks(name: str, classifier: Any, blocks: Blocks, classes: NDArray[Any]) -> Any:
    """Fit the named classifier, given unfitted, in passes over the blocks. classes: sorted, which indices stand for."""
    return _FITS[name](blocks, classes, classifier)
