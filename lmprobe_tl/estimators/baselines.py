"""Classifiers that a probe has to beat: any direction at all, the length of a text, the group that it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

Array = NDArray[Any]


def make_length_classifier() -> Any:
    """Unfitted logistic regression on standardised lengths [n_examples n_lengths]."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


class RandomDirectionClassifier(ClassifierMixin, BaseEstimator):
    """Logistic regression on one number: the features along a random direction, the same in all of space.

    It learns the sign, the scale and the offset, and nothing of where the direction points.
    Learnt: `direction_` [n_features], `along_`, the classifier of that number, and `classes_`.
    """

    def __init__(self, random_state: int | None = None) -> None:
        self.random_state = random_state

    def fit(self, features: ArrayLike, labels: ArrayLike) -> RandomDirectionClassifier:
        """features: [n_examples n_features]; labels: [n_examples]."""
        features = np.asarray(features, dtype=np.float64)
        direction = np.random.default_rng(self.random_state).standard_normal(features.shape[1])
        self.direction_ = direction / np.linalg.norm(direction)
        self.along_ = make_length_classifier().fit(self._along(features), labels)
        self.classes_ = self.along_.classes_
        return self

    def decision_function(self, features: ArrayLike) -> Array:
        """Logits: [n_examples], or [n_examples n_classes]."""
        check_is_fitted(self, "along_")
        return self.along_.decision_function(self._along(features))

    def predict_proba(self, features: ArrayLike) -> Array:
        """[n_examples n_classes]."""
        check_is_fitted(self, "along_")
        return self.along_.predict_proba(self._along(features))

    def predict(self, features: ArrayLike) -> Array:
        """[n_examples]."""
        return self.classes_[self.predict_proba(features).argmax(axis=1)]

    def _along(self, features: ArrayLike) -> Array:
        return (np.asarray(features, dtype=np.float64) @ self.direction_)[:, None]


def shares_by_group(labels: Array, groups: Array, wanted: Array, n_classes: int) -> Array:
    """Share of each class in the groups `wanted`, [n_wanted n_classes], as one prompt of the overall mixture more would have
    it; a group that is not among `groups` has the overall shares.

    labels: [n_examples] from 0 on; groups: [n_examples].
    """
    overall = np.bincount(labels, minlength=n_classes) / len(labels)
    found, index = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(found), n_classes))
    np.add.at(counts, (index, labels), 1)
    shares = (counts + overall) / (counts.sum(axis=1, keepdims=True) + 1)
    place = {group: at for at, group in enumerate(found.tolist())}
    return np.array([shares[place[group]] if group in place else overall for group in wanted.tolist()])
