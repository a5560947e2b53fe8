"""What classifiers of our own share: logits, probabilities and classes from a linear rule."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

Array: TypeAlias = NDArray[np.float64]


class LinearClassifier(ClassifierMixin, BaseEstimator):
    """A classifier whose `fit` learns classes_, coef_ [n_outputs n_features] and intercept_ [n_outputs].

    n_outputs is 1 for two classes (the logit of classes_[1]) and n_classes otherwise.
    """

    classes_: NDArray[Any]
    coef_: Array
    intercept_: Array

    def decision_function(self, X: Any) -> Array:
        """Logits: [n_examples] for two classes, [n_examples n_classes] otherwise."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        logits = X @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Array:
        """Sigmoid or softmax of the logits: [n_examples n_classes]."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return np.column_stack([expit(-logits), expit(logits)])
        return softmax(logits, axis=1)

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of the highest logit: [n_examples]."""
        logits = self.decision_function(X)
        index = (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)
        return self.classes_[index]
