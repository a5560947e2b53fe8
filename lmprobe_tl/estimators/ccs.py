"""Contrast-consistent search: a direction of truth from pairs without labels (Burns et al. 2022, arXiv:2212.03827)."""

from __future__ import annotations

import reprlib
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.pairs import PairedClassifier

Array: TypeAlias = NDArray[np.float64]


class CcsClassifier(PairedClassifier):
    """A linear classifier that finds what is true of one text of a pair and false of the other, and is not told of which.

    The classes are the two sides of a pair ("... Yes" and "... No", a statement and its negation), and say nothing about
    truth: of some pairs the positive side must be true, of others the negative one. With z the logit, each side measured
    from its own mean, and p = sigmoid(z), it minimises the mean over pairs of (p+ + p- - 1)^2 + min(p+, p-)^2, plus
    l2 |w|^2 / 2 with features in units of the root mean square of half a pair's difference; the best of n_restarts random
    starts. z has no bias: the loss would use it to put all probabilities near 0.4, which costs less than 0.5.

    Each side's mean is taken off, or what tells the sides apart would be found in place of truth. **If all positives are
    true, that takes the truth away, too**; use 'pca' or 'mass_mean' there. A text in use has no side, so that one rule
    serves all: z = w . (x - m), with m halfway between the two means. From the rule of its side a text is off by half of
    w . (the difference of the means), which is small where that difference is the same in all pairs: w has no part outside
    the span of the variation about the means. (A w orthogonal to the difference would not be off at all, but loses what the
    truth shares with it, which is something wherever more positives than negatives are true.)

    The loss does not tell truth from falsehood, so that which of them classes_[1] means is arbitrary: `fit` takes the one
    that makes more positives than negatives stand above their side's mean; `orient` decides it by labels.

    Learnt: classes_; coef_ [1 n_features]; intercept_ [1]; loss_, the best mean loss without the penalty (0.25 is that of
    p = 0.5 everywhere); pair_gaps_ [n_pairs], z+ - z-, in the order of the positives.
    """

    def __init__(self, *, l2: float = 0.01, n_restarts: int = 10, random_state: Any = None) -> None:
        self.l2 = l2
        self.n_restarts = n_restarts
        self.random_state = random_state

    def _fit_pairs(self, negative: Array, positive: Array) -> None:
        if not (self.l2 > 0 and np.isfinite(self.l2)):
            raise InputError(f"l2 is {self.l2!r}; expected a positive number: without it, separable pairs have no optimum.")
        if isinstance(self.n_restarts, bool) or not isinstance(self.n_restarts, Integral) or self.n_restarts < 1:
            raise InputError(f"n_restarts is {self.n_restarts!r}; expected an integer from 1 on.")
        n_pairs, n_features = negative.shape
        means = negative.mean(axis=0), positive.mean(axis=0)
        examples = np.concatenate([negative - means[0], positive - means[1]])
        unit = _root_mean_square(examples[n_pairs:] - examples[:n_pairs]) / 2
        if not unit > 1e-9 * max(map(_root_mean_square, (negative - means[1], positive - means[0]))):
            raise InputError(
                f"The pairs differ in nothing but what tells all negatives from all positives (n_samples = {2 * n_pairs}, "
                f"n_features = {n_features}), so there is no truth to find. Give more pairs, some with a true positive and "
                "some with a true negative."
            )
        _, lengths, axes = svd(examples, full_matrices=False)
        axes = axes[lengths > 1e-9 * lengths[0]]
        found, self.loss_ = self._search(examples @ axes.T / unit)
        coef = found @ axes / unit
        self.coef_ = coef[None]
        self.pair_gaps_: Array = (examples[n_pairs:] - examples[:n_pairs]) @ coef
        self.intercept_ = -self.coef_ @ ((means[0] + means[1]) / 2)
        self._orient(np.ones(n_pairs, dtype=np.float64))

    def _search(self, examples: Array) -> tuple[Array, float]:
        """Weights [n_features] and loss of the best start; examples: the negatives and then the positives."""
        random = check_random_state(self.random_state)
        least, best = np.inf, np.zeros(examples.shape[1])
        for _ in range(self.n_restarts):
            start = random.standard_normal(examples.shape[1])
            start /= (examples @ start).std() or 1.0  # logits of about one, where no sigmoid is flat
            found = minimize(_penalised, start, (examples, self.l2), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
            if found.fun < least:
                least, best = found.fun, found.x
        return best, contrast_loss(*expit(examples @ best).reshape(2, -1))

    def orient(self, truth: Any) -> CcsClassifier:
        """Let classes_[1] mean true, by the votes of pairs whose truth is known, and return self.

        truth: [n_pairs] of True where the positive is the true one, False where the negative is; in the order of the
        positives in `fit`. Raises InputError where all are the same: such pairs say nothing after `fit` took away what all
        of them share.
        """
        check_is_fitted(self)
        self._orient(2.0 * check_truth(truth, len(self.pair_gaps_)) - 1.0)
        return self

    def _orient(self, signs: NDArray[Any]) -> None:
        """Turn the rule over if more pairs have a gap against their sign [n_pairs] than along with it."""
        along = signs * self.pair_gaps_
        if (np.sign(along).sum() or along.sum()) < 0:
            self.coef_, self.intercept_, self.pair_gaps_ = -self.coef_, -self.intercept_, -self.pair_gaps_


def contrast_loss(negative: Array, positive: Array) -> float:
    """Mean over pairs of (p+ + p- - 1)^2 + min(p+, p-)^2, of probabilities [n_pairs] of truth."""
    return float(((negative + positive - 1) ** 2 + np.minimum(negative, positive) ** 2).mean())


def _penalised(weights: Array, examples: Array, l2: float) -> tuple[float, Array]:
    """The loss with its penalty, and its gradient with respect to the weights."""
    probabilities = expit(examples @ weights).reshape(2, -1)
    is_least = probabilities == probabilities.min(axis=0)
    slope = 2 * (probabilities.sum(axis=0) - 1 + is_least * probabilities) / probabilities.shape[1]
    slope = (slope * probabilities * (1 - probabilities)).ravel()
    return contrast_loss(*probabilities) + 0.5 * l2 * float(weights @ weights), slope @ examples + l2 * weights


def check_truth(truth: Any, n_pairs: int) -> NDArray[np.bool_]:
    """truth as bool [n_pairs]; InputError for another shape, other values, or the same one throughout."""
    values = np.asarray(truth)
    if values.shape != (n_pairs,) or not np.isin(values, (0, 1)).all():
        raise InputError(
            f"truth is {reprlib.repr(truth)}; expected {n_pairs} of True or False, one a pair: whether its positive is true."
        )
    if len(np.unique(values)) < 2:
        raise InputError(
            f"truth says that of all {n_pairs} pairs the {'positive' if values[0] else 'negative'} is the true one. 'ccs' "
            "takes away what all pairs share, and so the truth of these. Give pairs of both kinds, or use 'pca' or "
            "'mass_mean'."
        )
    return values.astype(bool)


def _root_mean_square(rows: Array) -> float:
    """Root of the mean squared length of rows [n n_features]."""
    return float(np.sqrt((rows**2).sum(axis=1).mean()))
