"""Contrast-consistent search: a direction of truth from pairs without labels (Burns et al. 2022, arXiv:2212.03827)."""

from __future__ import annotations

import reprlib
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.pairs import PairedClassifier

Array: TypeAlias = NDArray[np.float64]


class CcsClassifier(PairedClassifier):
    """A linear classifier that finds what is true of one text of each pair and false of the other, and is not told of which.

    The classes are the two sides of a pair ("... Yes" and "... No", a statement and its negation), and say nothing about
    truth: of some pairs the positive side must be true, of others the negative one. With p = sigmoid(w . x + b) it minimises
    the mean over pairs of (p+ + p- - 1)^2 + min(p+, p-)^2, plus l2 |w|^2 / 2 with features in units of the root mean square
    of half a pair's difference; the best of n_restarts random starts.

    What tells the sides apart in every pair is taken away, or it would be found in place of truth. Burns et al. take each
    side's own mean off, which cannot be done for a text of unknown side. Here w is orthogonal to the difference of the two
    means, so that taking off either mean is the same: training and use follow one rule for any text. The price is the part
    of the truth that lies along that difference: **if all positives are true, nothing of it is left** (use 'pca' or
    'mass_mean' there).

    The loss does not tell truth from falsehood. predict gives classes_[1] for one of the two: for that which `fit` sees more
    often on the positive side, an arbitrary choice where it is about as often on the other; `orient` decides it by labels.

    Learnt: classes_; coef_ [1 n_features]; intercept_ [1]; loss_, the best mean loss, without the penalty (0.25 is that of
    p = 0.5 everywhere); pair_logits_ [n_pairs 2], those of the negatives and positives, in the order of the positives.
    """

    def __init__(self, *, l2: float = 1e-3, n_restarts: int = 10, random_state: Any = None) -> None:
        self.l2 = l2
        self.n_restarts = n_restarts
        self.random_state = random_state

    def _fit_pairs(self, negative: Array, positive: Array) -> None:
        if not (self.l2 > 0 and np.isfinite(self.l2)):
            raise InputError(f"l2 is {self.l2!r}; expected a positive number: without it, separable pairs have no optimum.")
        if isinstance(self.n_restarts, bool) or not isinstance(self.n_restarts, Integral) or self.n_restarts < 1:
            raise InputError(f"n_restarts is {self.n_restarts!r}; expected an integer from 1 on.")
        n_pairs, n_features = negative.shape
        centre = (positive.mean(axis=0) + negative.mean(axis=0)) / 2
        sides = np.concatenate([negative, positive]) - centre
        gap = sides[n_pairs:].mean(axis=0)  # half the difference of the means
        gap = gap / (np.linalg.norm(gap) or 1.0)
        within = sides - np.outer(sides @ gap, gap)
        unit = _root_mean_square((within[n_pairs:] - within[:n_pairs]) / 2)
        if not unit > 1e-9 * _root_mean_square(sides):
            raise InputError(
                f"The pairs differ in nothing but what tells all negatives from all positives (n_samples = {2 * n_pairs}, "
                f"n_features = {n_features}), so there is no truth to find. Give more pairs, some with a true positive and "
                "some with a true negative."
            )
        # No optimum has a part outside the span of the examples, which may be far smaller than the feature space.
        basis = qr(within.T, mode="economic")[0] if len(within) < n_features else np.eye(n_features)
        found, bias, self.loss_ = self._search(within @ basis / unit)
        coef = basis @ found / unit
        self.coef_ = (coef - gap * (coef @ gap))[None]  # what is left along the gap is rounding, but a gap may be wide
        self.intercept_ = np.array([bias]) - self.coef_ @ centre
        self.pair_logits_ = (sides @ self.coef_[0] + bias).reshape(2, n_pairs).T
        self._orient(np.ones(n_pairs))

    def _search(self, examples: Array) -> tuple[Array, float, float]:
        """Weights [n_features], bias and loss of the best start; examples: the negatives and then the positives."""
        random = check_random_state(self.random_state)
        best: tuple[float, Array] = (np.inf, np.zeros(0))
        for _ in range(self.n_restarts):
            weights = random.standard_normal(examples.shape[1])
            weights /= (examples @ weights).std() or 1.0  # logits of about one, where no sigmoid is flat
            start = np.append(weights, 0.0)
            found = minimize(_penalised, start, (examples, self.l2), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
            if found.fun < best[0]:
                best = (float(found.fun), found.x)
        weights, bias = best[1][:-1], float(best[1][-1])
        return weights, bias, contrast_loss(*expit(examples @ weights + bias).reshape(2, -1))

    def orient(self, truth: Any) -> CcsClassifier:
        """Let classes_[1] mean true, by the votes of pairs whose truth is known, and return self.

        truth: [n_pairs] of True where the positive is the true one, False where the negative is; in the order of the
        positives in `fit`. Raises InputError where all are the same: such pairs say nothing after `fit` took away what all
        of them share.
        """
        check_is_fitted(self)
        self._orient(2.0 * check_truth(truth, len(self.pair_logits_)) - 1.0)
        return self

    def _orient(self, signs: Array) -> None:
        """Turn the rule over if more pairs have positive - negative against their sign [n_pairs] than along with it."""
        along = signs * (self.pair_logits_[:, 1] - self.pair_logits_[:, 0])
        if (np.sign(along).sum() or along.sum()) < 0:
            self.coef_, self.intercept_, self.pair_logits_ = -self.coef_, -self.intercept_, -self.pair_logits_


def contrast_loss(negative: Array, positive: Array) -> float:
    """Mean over pairs of (p+ + p- - 1)^2 + min(p+, p-)^2, of probabilities [n_pairs] of truth."""
    return float(((negative + positive - 1) ** 2 + np.minimum(negative, positive) ** 2).mean())


def _penalised(parameters: Array, examples: Array, l2: float) -> tuple[float, Array]:
    """The loss with its penalty, and its gradient with respect to the weights and the bias."""
    weights = parameters[:-1]
    probabilities = expit(examples @ weights + parameters[-1]).reshape(2, -1)
    is_least = probabilities == probabilities.min(axis=0)
    slope = 2 * (probabilities.sum(axis=0) - 1 + is_least * probabilities) / probabilities.shape[1]
    slope = (slope * probabilities * (1 - probabilities)).ravel()
    loss = contrast_loss(*probabilities) + 0.5 * l2 * float(weights @ weights)
    return loss, np.append(slope @ examples + l2 * weights, slope.sum())


def check_truth(truth: Any, n_pairs: int) -> NDArray[np.bool_]:
    """truth as bool [n_pairs]; InputError for another shape, other values, or the same one throughout."""
    values = np.asarray(truth)
    if values.shape != (n_pairs,) or not np.isin(values, (0, 1)).all():
        raise InputError(
            f"truth is {reprlib.repr(truth)}; expected {n_pairs} of True or False, one a pair: whether its positive is true."
        )
    if len(np.unique(values)) < 2:
        raise InputError(
            f"truth says that of all {n_pairs} pairs the {'positive' if values[0] else 'negative'} is the true one. 'ccs' takes "
            "away what all pairs share, and with it the truth of these. Swap positive and negative in some pairs, or use "
            "'pca' or 'mass_mean'."
        )
    return values.astype(bool)


def _root_mean_square(rows: Array) -> float:
    """Root of the mean squared length of rows [n n_features]."""
    return float(np.sqrt((rows**2).sum(axis=1).mean()))
