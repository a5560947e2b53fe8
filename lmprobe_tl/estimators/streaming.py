"""Named classifiers fitted in passes over blocks of examples, none of which has to be in memory with the others.

Each fit gives what the in-memory one gives, up to rounding: sums are taken in float64, and those of squares about the mean.
Logistic regression is the exception: it comes closer to the optimum than scikit-learn's default tolerance does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, lstsq, solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import expit, log_softmax
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.blocks import Block, Blocks, Moments, Passes, standard_deviation
from lmprobe_tl.estimators.fitting import fit_classifier, no_weights_error
from lmprobe_tl.estimators.mass_mean import MassMeanClassifier

Array: TypeAlias = NDArray[np.float64]

GRADIENT_TOLERANCE = 1e-8
WIDEST_PRECONDITIONER = 8192  # features, whose matrix takes half a GiB
EXAMPLES_PER_FEATURE = 32  # of a preconditioner; 8 make a third more passes, 1000 hardly fewer


def can_stream(classifier: Any) -> bool:
    """Whether a classifier is one of the names that `fit_blocks` knows."""
    return isinstance(classifier, str) and classifier in _FITS


def fit_blocks(name: str, classifier: Any, blocks: Blocks, classes: NDArray[Any]) -> Any:
    """A fitted clone of the named classifier, as `make_classifier` gives it, from passes over the blocks.

    classes: sorted, at least two, each with weight in some block; the indices in the blocks stand for them. At most two
    blocks are alive at once, the one in use and the one that is read. Raises InputError as `Passes` does, for a name that
    cannot be fitted so, and for weights where the classifier takes none.
    """
    if not can_stream(name):
        raise InputError(f"{name!r} cannot be fitted in blocks. Those that can: {', '.join(map(repr, sorted(_FITS)))}.")
    return _FITS[name](Passes(blocks, np.asarray(classes)), np.asarray(classes), clone(classifier))


def fit_features(
    given: Any,
    classifier: Any,
    features: NDArray[Any],
    labels: NDArray[Any],
    *,
    groups: NDArray[Any] | None = None,
    sample_weight: Array | None = None,
) -> Any:
    """Fit on features that are in memory: a named classifier as one block, so that blocks and memory give the same; any
    other by its own `fit`.

    given: the name or instance that `classifier` was made from; the rest as in `fit_classifier`.
    """
    if not can_stream(given):
        return fit_classifier(classifier, features, labels, groups=groups, sample_weight=sample_weight)
    classes, index = np.unique(labels, return_inverse=True)
    return fit_blocks(given, classifier, lambda: [Block(features, index, sample_weight)], classes)


def _fit_mass_mean(passes: Passes, classes: NDArray[Any], classifier: MassMeanClassifier) -> MassMeanClassifier:
    """Class means, and with covariance=True the pooled scatter, in one pass; the scale of the logit in a second."""
    return classifier.fit_blocks(passes, classes)


def _fit_on_zeros(classifier: Any, classes: NDArray[Any], n_features: int) -> None:
    """Set what scikit-learn keeps privately in a fitted classifier; what is learnt is put in its place afterwards."""
    labels = np.tile(classes, 2)
    classifier.fit(np.zeros((len(labels), n_features)), labels)


# --- Linear discriminant analysis


def _fit_lda(passes: Passes, classes: NDArray[Any], classifier: LinearDiscriminantAnalysis) -> LinearDiscriminantAnalysis:
    """Means and scatter in one pass; with shrinkage='auto' (Ledoit and Wolf 2004) a second for their fourth moments.

    As scikit-learn's solver 'lsqr': each class has its own shrunk covariance, on its own standardised features, and the
    classifier takes their mean weighted by the classes' shares.
    """
    moments = Moments(len(classes), with_scatter=True)
    for block in passes():
        if block.weight is not None:
            raise no_weights_error(classifier)
        moments.add(block)
    del block  # or it would be alive beside those of the next pass
    if passes.n_examples <= len(classes):
        raise InputError(f"{passes.n_examples} examples of {len(classes)} classes show no variance within them; give more.")
    means, shares = moments.means, moments.weight / moments.weight.sum()
    if classifier.shrinkage == "auto":
        covariances = _ledoit_wolf(passes, moments)
    else:
        covariances = (_shrunk(scatter / n, classifier.shrinkage or 0.0) for scatter, n in _by_class(moments))
    covariance = sum(share * one for share, one in zip(shares, covariances, strict=True))
    if len(classes) == 2:
        # From the difference of the means: far from zero, that of two intercepts would lose the digits that they share.
        coef = lstsq(covariance, means[1] - means[0])[0][None]
        intercept = -0.5 * coef @ (means[0] + means[1]) + np.log(shares[1] / shares[0])
    else:
        coef = lstsq(covariance, means.T)[0].T
        intercept = -0.5 * (means * coef).sum(axis=1) + np.log(shares)
    _fit_on_zeros(classifier, classes, min(len(classes) - 1, passes.n_features))  # as many as it has components
    classifier.coef_, classifier.intercept_, classifier.n_features_in_ = coef, intercept, passes.n_features
    classifier.priors_, classifier.means_, classifier.covariance_ = shares, means, covariance
    return classifier


def _by_class(moments: Moments) -> Iterator[tuple[Array, float]]:
    return zip(moments.scatter, moments.weight, strict=True)


def _shrunk(covariance: Array, share: float) -> Array:
    """The covariance drawn towards a multiple of the identity."""
    target = np.trace(covariance) / len(covariance)
    return (1 - share) * covariance + share * target * np.eye(len(covariance))


def _ledoit_wolf(passes: Passes, moments: Moments) -> Iterator[Array]:
    """The shrunk covariance of each class, as scikit-learn's `ledoit_wolf` gives it for standardised features."""
    deviations = []
    for (scatter, n), mean in zip(_by_class(moments), moments.means, strict=True):
        deviation = standard_deviation(np.diag(scatter) / n, mean, int(n))
        deviations.append(np.where(deviation == 0, 1.0, deviation))
    fourth = np.zeros(len(deviations))
    for block in passes():
        for index in np.unique(block.classes):
            scaled = (block.features[block.classes == index] - moments.means[index]) / deviations[index]
            fourth[index] += ((scaled**2).sum(axis=1) ** 2).sum()
    for (scatter, n), deviation, sum_of_fourths in zip(_by_class(moments), deviations, fourth, strict=True):
        covariance = scatter / n / deviation[:, None] / deviation
        n_features, squares = len(covariance), (covariance**2).sum()
        distance = (squares - np.trace(covariance) ** 2 / n_features) / n_features
        noise = min((sum_of_fourths / n - squares) / (n_features * n), distance)
        yield deviation[:, None] * _shrunk(covariance, noise / distance if noise > 0 else 0.0) * deviation


# --- Ridge regression


def _fit_ridge(passes: Passes, classes: NDArray[Any], pipeline: Pipeline) -> Pipeline:
    """Standardised features and least squares on targets of 1 and -1, in one pass."""
    scaler, ridge = pipeline.named_steps.values()
    moments = Moments(len(classes), with_scatter=True, only_pooled=True)
    for block in passes():
        scaler.partial_fit(block.features)
        moments.add(block)
    shares = moments.weight / moments.weight.sum()
    mean = shares @ moments.means
    between = (moments.means - mean) / scaler.scale_  # [n_classes n_features]
    weighted = between * moments.weight[:, None]
    scatter = moments.scatter[0] / scaler.scale_[:, None] / scaler.scale_ + weighted.T @ between
    scatter[np.diag_indices_from(scatter)] += ridge.alpha
    targets = 2.0 * np.eye(len(classes)) - 1.0  # [n_classes n_outputs]
    targets = targets[:, 1:] if len(classes) == 2 else targets
    coef = solve(scatter, weighted.T @ targets, assume_a="pos").T
    intercept = shares @ targets - coef @ ((mean - scaler.mean_) / scaler.scale_)
    _fit_on_zeros(ridge, classes, 1)
    # Versions of scikit-learn differ in the shape for two classes: [n_features] or [1 n_features].
    ridge.coef_ = coef.reshape(*ridge.coef_.shape[:-1], passes.n_features)
    ridge.intercept_ = intercept.reshape(np.shape(ridge.intercept_))
    ridge.n_features_in_ = passes.n_features
    return pipeline


# --- Logistic regression


def _fit_logistic_regression(passes: Passes, classes: NDArray[Any], pipeline: Pipeline) -> Pipeline:
    """Standardised features and L2-penalised logistic regression by L-BFGS, each step of which is a pass.

    Activations are strongly correlated, which makes L-BFGS slow. It therefore looks for the direction in coordinates in
    which the curvature at the start is about one in each. The loss stays what it is, so that these coordinates may come
    from some of the examples: on 65,000 activations [384] of a small Llama, 26 passes in place of 237.
    """
    scaler, logistic = pipeline.named_steps.values()
    for block in passes():
        scaler.partial_fit(block.features)
    del block  # or it would be alive beside those of the next pass
    n_features, n_outputs = passes.n_features, 1 if len(classes) == 2 else len(classes)
    total = passes.class_weight.sum()
    penalty = 1.0 / (logistic.C * total)
    root = _curvature_root(passes, scaler, 0.25 if n_outputs == 1 else 1.0 / n_outputs, penalty)

    def unpacked(parameters: Array) -> tuple[Array, Array]:
        table = parameters.reshape(n_outputs, n_features + 1)
        return _solved(root, table[:, :-1], transposed=True), table[:, -1]

    def loss_and_gradient(parameters: Array) -> tuple[float, Array]:
        coef, intercept = unpacked(parameters)
        loss, slope, slope_sum = 0.0, np.zeros((n_outputs, n_features)), np.zeros((n_outputs, 1))
        for block in passes():
            centred = block.features - scaler.mean_  # its scale may be folded in, but a large mean would cost digits
            block_loss, excess = _log_loss(centred @ (coef / scaler.scale_).T + intercept, block)
            loss += block_loss
            slope += excess.T @ centred
            slope_sum += excess.sum(axis=0)[:, None]
        slope = slope / scaler.scale_ / total + penalty * coef
        gradient = np.hstack([_solved(root, slope, transposed=False), slope_sum / total])
        return loss / total + 0.5 * penalty * float((coef**2).sum()), gradient.ravel()

    start = np.zeros(n_outputs * (n_features + 1))
    options = {"maxiter": logistic.max_iter, "ftol": 0.0, "gtol": GRADIENT_TOLERANCE, "maxls": 50}
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    steepest = np.abs(found.jac).max()
    if steepest > 100 * GRADIENT_TOLERANCE:  # closer than that, a search that ends early has met rounding
        warnings.warn(
            f"Logistic regression has not converged in {found.nit} steps: {found.message}. The largest slope left is "
            f"{steepest:.2g}, and should be {GRADIENT_TOLERANCE:.0e}.",
            ConvergenceWarning,
            stacklevel=2,
        )
    logistic.coef_, logistic.intercept_ = unpacked(found.x)
    logistic.classes_, logistic.n_features_in_ = classes, n_features
    logistic.n_iter_ = np.array([found.nit], dtype=np.int32)
    return pipeline


def _curvature_root(passes: Passes, scaler: StandardScaler, curvature: float, penalty: float) -> Array | None:
    """L with L L' = curvature * covariance + penalty, from evenly spaced examples; None where it would be too large."""
    n_features = passes.n_features
    if n_features > WIDEST_PRECONDITIONER:
        return None
    step = max(1, passes.n_examples // (EXAMPLES_PER_FEATURE * n_features))
    scatter, n_sampled, n_seen = np.zeros((n_features, n_features)), 0, 0
    for block in passes():
        sample = block.features[-n_seen % step :: step]  # the same examples, however they are cut into blocks
        scaled = (sample - scaler.mean_) / scaler.scale_
        scatter += scaled.T @ scaled
        n_sampled, n_seen = n_sampled + len(sample), n_seen + len(block.features)
    scatter *= curvature / n_sampled
    scatter[np.diag_indices_from(scatter)] += penalty
    return cholesky(scatter, lower=True, overwrite_a=True)


def _solved(root: Array | None, rows: Array, *, transposed: bool) -> Array:
    """root^-1 (or root'^-1) times each row: [n_rows n_features]; the rows themselves without a root."""
    return rows if root is None else solve_triangular(root, rows.T, lower=True, trans="T" if transposed else "N").T


def _log_loss(raw: Array, block: Block) -> tuple[float, Array]:
    """Weighted sum of the log losses of raw scores [n n_outputs], and its gradient with respect to them."""
    if raw.shape[1] == 1:
        losses = np.logaddexp(0.0, np.where(block.classes == 1, -raw[:, 0], raw[:, 0]))
        excess = expit(raw) - block.classes[:, None]
    else:
        log_probabilities, rows = log_softmax(raw, axis=1), np.arange(len(raw))
        losses = -log_probabilities[rows, block.classes]
        excess = np.exp(log_probabilities)
        excess[rows, block.classes] -= 1.0
    if block.weight is not None:
        losses, excess = losses * block.weight, excess * block.weight[:, None]
    return float(losses.sum()), excess


_FITS: dict[str, Callable[..., Any]] = {
    "lda": _fit_lda,
    "logistic_regression": _fit_logistic_regression,
    "mass_mean": _fit_mass_mean,
    "mass_mean_whitened": _fit_mass_mean,
    "ridge": _fit_ridge,
}
