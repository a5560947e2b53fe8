"""Stacking over layers: one classifier a hook point, combined by a logistic regression on out-of-fold logits."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import check_cv
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.fitting import logits_of
from lmprobe_tl.estimators.linear_classifier import LinearClassifier
from lmprobe_tl.estimators.linear_rule import linear_rule
from lmprobe_tl.estimators.pairs import last_step
from lmprobe_tl.estimators.sample_weight import validated_weight
from lmprobe_tl.estimators.streaming import fit_features

Array: TypeAlias = NDArray[np.float64]

COMBINER_C = 0.1


class LayerStackClassifier(LinearClassifier):
    """A linear classifier stacked over the layers whose activations stand side by side in the features.

    One `base` classifier learns from each block of n_features / n_blocks features. A logistic regression on their logits,
    standardised, learns how to add them up; each example's logits come from classifiers fitted on the other folds, since on
    their own training examples all look sure (Wolpert 1992). As all of it is affine, it folds into one direction.

    Its weights may be negative, since a layer without the signal can tell the noise of one with it; C = 0.1.

    n_blocks: how many layers; None is for a `Probe`, which sets it to its number of hook points.
    base: the name of a classifier, or an instance, with a linear rule.
    cv: folds, as scikit-learn's `check_cv` takes them; every example must be held out once. A `Probe` with train_pooling
    'all' keeps the tokens of a prompt in one fold.

    Learnt: classes_; coef_ [n_outputs n_features] and intercept_ [n_outputs]; estimators_, the classifier of each block;
    combiner_, a pipeline on their logits [n_examples n_blocks * n_outputs].
    """

    def __init__(
        self, n_blocks: int | None = None, base: Any = "logistic_regression", *, cv: Any = 5, random_state: Any = None
    ) -> None:
        self.n_blocks = n_blocks
        self.base = base
        self.cv = cv
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LayerStackClassifier:
        """X: [n_examples n_features]; y: [n_examples]; sample_weight: [n_examples] or None.

        Raises InputError for features that n_blocks does not divide, for folds that do not hold every example out once or
        lack a class, and for weights where the base takes none; NonlinearClassifierError for a base without a linear rule.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weight = None if sample_weight is None else validated_weight(sample_weight, len(y))
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise InputError(f"A classifier needs at least two classes, but the labels hold one class: {self.classes_}.")
        blocks = np.split(X, self._checked_n_blocks(), axis=1)
        folds = self._folds(X, y)
        logits = np.concatenate([self._held_out_logits(block, y, weight, folds) for block in blocks], axis=1)
        self.estimators_ = [self._fit_base(block, y, weight) for block in blocks]
        combiner = make_pipeline(StandardScaler(), LogisticRegression(C=COMBINER_C, max_iter=1000))
        weights = {f"{name}__sample_weight": weight for name in combiner.named_steps}
        self.combiner_ = combiner.fit(logits, y, **weights)
        combined = linear_rule(self.combiner_, logits)
        rules = [linear_rule(one, block) for one, block in zip(self.estimators_, blocks, strict=True)]
        shares = np.split(combined.direction, len(blocks), axis=1)  # [n_outputs n_outputs] of each block
        self.coef_ = np.concatenate([share @ rule.direction for share, rule in zip(shares, rules, strict=True)], axis=1)
        self.intercept_ = combined.intercept + sum(share @ rule.intercept for share, rule in zip(shares, rules, strict=True))
        return self

    def _checked_n_blocks(self) -> int:
        n_blocks = self.n_blocks
        if isinstance(n_blocks, bool) or not isinstance(n_blocks, Integral) or n_blocks < 1:
            raise InputError(
                f"n_blocks is {n_blocks!r}; expected the number of layers whose activations stand side by side in the "
                "features. Only a Probe sets it by itself."
            )
        if self.n_features_in_ % n_blocks:
            raise InputError(
                f"{self.n_features_in_} features cannot be split into n_blocks={n_blocks} layers of equal width."
            )
        return int(n_blocks)

    def _folds(self, X: Array, y: NDArray[Any]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        smallest = min((y == one).sum() for one in self.classes_)
        if isinstance(self.cv, Integral) and smallest < self.cv:
            raise InputError(
                f"The smallest class has {smallest} examples, fewer than the cv={self.cv} folds. Give more examples, or "
                "fewer folds."
            )
        folds = list(check_cv(self.cv, y, classifier=True).split(X, y))
        held_out = np.concatenate([np.asarray(test) for _, test in folds])
        if sorted(held_out.tolist()) != list(range(len(y))):
            raise InputError(f"cv={self.cv!r} does not hold every one of the {len(y)} examples out exactly once.")
        for train, _ in folds:
            missing = np.setdiff1d(self.classes_, y[train])
            if len(missing):
                raise InputError(
                    f"cv={self.cv!r} has a fold without class {missing[0].item()!r} to learn from. Give more examples of it."
                )
        return folds

    def _held_out_logits(self, block: Array, y: NDArray[Any], weight: Array | None, folds: Any) -> Array:
        """Logits [n_examples n_outputs] of each example from a classifier that did not see it."""
        found = np.empty((len(y), 1 if len(self.classes_) == 2 else len(self.classes_)))
        for train, test in folds:
            fitted = self._fit_base(block[train], y[train], None if weight is None else weight[train])
            found[test] = logits_of(fitted, block[test]).reshape(len(test), -1)
        return found

    def _fit_base(self, features: Array, labels: NDArray[Any], weight: Array | None) -> Any:
        # The names hold this class, too, so that they are looked up late.
        from lmprobe_tl.estimators import make_classifier

        base = make_classifier(self.base, self.random_state)
        return fit_features(self.base, base, features, labels, sample_weight=weight)


def with_n_blocks(classifier: Any, n_hook_points: int) -> Any:
    """The unfitted classifier, which learns how many hook points stand in its features if it asks for that."""
    last = last_step(classifier)
    if isinstance(last, LayerStackClassifier) and last.n_blocks is None:
        last.set_params(n_blocks=n_hook_points)
    return classifier
