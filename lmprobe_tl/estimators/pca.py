"""The reading vector of representation engineering: the main direction of paired differences (arXiv:2310.01405)."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.logit_scale import fit_scale
from lmprobe_tl.estimators.pairs import PairedClassifier

Array: TypeAlias = NDArray[np.float64]

LEAST_SCALE = 1e-3  # of a logit's standard deviation, where the projections say nothing of the classes


class PcaClassifier(PairedClassifier):
    """A linear classifier whose direction is the first principal component of positive - negative, pair by pair.

    The unit vector u that makes the sum of (u . difference)^2 largest: the differences are **not centred**, since centring
    takes their mean away, which is what tells the classes apart. (Zou et al. 2023 take differences in alternating order, and
    centre these: their mean is about zero, so that centring changes little.) More pairs with u . difference > 0 than
    below give its sign; where as many are below, the mean difference does.

    The logit is a * u . x + b with a > 0 and b from a logistic regression on the training projections, as in
    `MassMeanClassifier`.

    Learnt: classes_; coef_ [1 n_features]; intercept_ [1]; share_, the part of the sum of squared differences that is along
    the direction (1 where all pairs differ in the same direction).
    """

    def _fit_pairs(self, negative: Array, positive: Array) -> None:
        differences = positive - negative
        direction, self.share_ = _main_direction(differences)
        along = differences @ direction
        if ((along > 0).sum() - (along < 0).sum() or along.sum()) < 0:
            direction = -direction
        centre = (positive.mean(axis=0) + negative.mean(axis=0)) / 2
        projections = (np.concatenate([negative, positive]) - centre) @ direction
        n_pairs = len(differences)
        scale, shift = fit_scale(
            np.column_stack([np.zeros(2 * n_pairs), projections]),
            np.repeat([0, 1], n_pairs),
            np.ones(2 * n_pairs),
            np.full(2, float(n_pairs)),
            least=LEAST_SCALE,  # or a few wide pairs could turn the sign of the vote
        )
        self.coef_ = scale * direction[None]
        self.intercept_ = shift[1:] - shift[:1] - self.coef_ @ centre


def _main_direction(differences: Array) -> tuple[Array, float]:
    """The unit vector [n_features] along which the squares of differences [n_pairs n_features] are largest, and its share.

    From the smaller of the two Gram matrices; of both, the largest eigenvalue is the same.
    """
    n_pairs, n_features = differences.shape
    largest = np.abs(differences).max()
    if not largest:
        raise InputError(
            f"The two examples of each pair are equal (n_samples = {2 * n_pairs}, n_features = {n_features}), so no "
            "direction tells them apart. Use another pooling, or prompts that differ where it looks."
        )
    scaled = differences / largest
    is_wide = n_features > n_pairs
    gram = scaled @ scaled.T if is_wide else scaled.T @ scaled
    value, vector = eigh(gram, subset_by_index=[len(gram) - 1] * 2)
    direction = scaled.T @ vector[:, 0] if is_wide else vector[:, 0]
    return direction / np.linalg.norm(direction), float(value[0] / np.trace(gram))
