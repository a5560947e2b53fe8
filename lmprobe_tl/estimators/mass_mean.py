"""Mass-mean probing: the direction between the class means (Marks & Tegmark 2023, arXiv:2310.06824)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.blocks import Block, Blocks, Moments, standard_deviation
from lmprobe_tl.estimators.linear_classifier import LinearClassifier
from lmprobe_tl.estimators.logit_scale import fit_scale
from lmprobe_tl.estimators.sample_weight import validated_weight

Array: TypeAlias = NDArray[np.float64]


class MassMeanClassifier(LinearClassifier):
    """A linear classifier whose direction is theta = mean(positive) - mean(negative).

    covariance=True takes Sigma^-1 theta, with Sigma pooled within the classes: Sigma^-1 = D^-1 R^-1 D^-1, where D are the
    standard deviations and R is the correlation matrix, shrunk towards the identity by the share of Chen et al. 2010
    (arXiv:0907.4698), which goes to 0 with many examples. Unshrunk, R has no inverse where features are more than examples,
    and one that is mostly noise where they are nearly as many. The result does not depend on the unit of the activations.

    theta . x has an arbitrary scale, and its sigmoid would be 0 or 1 almost everywhere. The logit is therefore
    a * theta . x + b, where a > 0 and b come from a logistic regression on the training projections, with the smoothed
    targets of Platt (1999) that keep a finite when the classes are separable. The direction and its sign stay theta's.
    As for any classifier with few examples and many features, probabilities on new data are less sure than these.

    With more than two classes, class k has the logit a * (mean_k . x - |mean_k|^2 / 2) + b_k: without b, the nearest mean.

    Learnt: classes_; class_means_ [n_classes n_features]; coef_ [n_outputs n_features] and intercept_ [n_outputs], with
    n_outputs = 1 for two classes (the logit of classes_[1]) and n_classes otherwise.
    """

    def __init__(self, *, covariance: bool = False) -> None:
        self.covariance = covariance

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> MassMeanClassifier:
        """X: [n_examples n_features]; y: [n_examples]; sample_weight: [n_examples] or None, a weight of 2 is two copies.

        Raises InputError where fewer than two classes have weight, or where covariance=True finds no variance.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weight = validated_weight(sample_weight, len(y))
        X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
        self.classes_, class_index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"A classifier needs at least two classes, but the labels hold one class: {self.classes_}.")

        return self.fit_blocks(lambda: [Block(X, class_index, weight)], self.classes_)

    def fit_blocks(self, blocks: Blocks, classes: NDArray[Any]) -> MassMeanClassifier:
        """Fit in two passes over blocks, one for the moments and one for the logit's scale; see `Blocks`.

        classes: sorted, at least two, each with weight in some block; the indices in the blocks stand for them. Of all
        examples at once only the projections [n_examples n_classes] are kept. Raises InputError where covariance=True finds
        no variance.
        """
        moments = Moments(len(classes), with_scatter=self.covariance, only_pooled=True)
        for block in blocks():
            moments.add(block)
        self.classes_, self.class_means_, self.n_features_in_ = classes, moments.means, moments.means.shape[1]

        # Softmax ignores what all classes share, so means may be measured from their midpoint, where digits are not lost
        midpoint = self.class_means_.mean(axis=0)
        means = self.class_means_ - midpoint
        directions = _whiten(moments, means) if self.covariance else means
        offsets = -0.5 * (directions * means).sum(axis=1)

        scores, class_index, weight = [], [], []
        for block in blocks():
            scores.append((block.features - midpoint) @ directions.T + offsets)
            class_index.append(block.classes)
            weight.append(np.ones(len(block.classes)) if block.weight is None else block.weight)
        scale, shift = fit_scale(np.concatenate(scores), np.concatenate(class_index), np.concatenate(weight), moments.weight)
        coef = scale * directions
        intercept = scale * offsets + shift - coef @ midpoint
        if len(classes) == 2:
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = coef, intercept
        return self


def _whiten(moments: Moments, means: Array) -> Array:
    """Sigma^-1 means: [n_classes n_features]; Sigma is the pooled scatter of the moments over their weight."""
    covariance = moments.scatter[0] / moments.weight.sum()
    largest = np.abs(moments.means).max(axis=0)
    deviation = standard_deviation(np.diag(covariance), largest, int(moments.count.sum()))
    if not deviation.any():
        raise InputError(
            "covariance=True needs classes with some variance, but within each class all examples are equal. "
            "Give more examples, or use covariance=False."
        )
    varying = np.flatnonzero(deviation)  # a constant feature correlates with none, and has no part in the direction
    deviation = deviation[varying]
    correlation = covariance[np.ix_(varying, varying)] / deviation[:, None] / deviation
    shrunk = _shrunk(correlation, float(moments.weight.sum()))
    directions = np.zeros_like(means)
    directions[:, varying] = solve(shrunk, (means[:, varying] / deviation).T, assume_a="pos").T / deviation
    return directions


def _shrunk(correlation: Array, n_examples: float) -> Array:
    """(1 - s) correlation + s identity, with s as the oracle approximating shrinkage of Chen et al. 2010 has it."""
    n_features = len(correlation)
    squares = (correlation**2).mean()
    spread = (n_examples + 1) * (squares - 1 / n_features)
    share = min(1.0, (squares + 1) / spread) if spread > 0 else 1.0
    return (1 - share) * correlation + share * np.eye(n_features)
