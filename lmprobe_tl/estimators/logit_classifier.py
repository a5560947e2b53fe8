"""What classifiers of our own share: probabilities and classes from logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin


class LogitClassifier(ClassifierMixin, BaseEstimator):
    """A classifier that says in `decision_function` what it has learnt; `fit` learns classes_, sorted."""

    classes_: NDArray[Any]

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Logits: [n_examples] for two classes (of classes_[1]), [n_examples n_classes] otherwise."""
        raise NotImplementedError

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
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
