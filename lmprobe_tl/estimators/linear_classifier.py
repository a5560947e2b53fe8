"""What linear classifiers of our own share: logits from a linear rule."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted, validate_data

from lmprobe_tl.estimators.logit_classifier import LogitClassifier

Array: TypeAlias = NDArray[np.float64]


class LinearClassifier(LogitClassifier):
    """A classifier whose `fit` learns classes_, coef_ [n_outputs n_features] and intercept_ [n_outputs].

    n_outputs is 1 for two classes (the logit of classes_[1]) and n_classes otherwise.
    """

    coef_: Array
    intercept_: Array

    def decision_function(self, X: Any) -> Array:
        """Logits: [n_examples] for two classes, [n_examples n_classes] otherwise."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        logits = X @ self.coef_.T + self.intercept_
        return logits[:, 0] if len(self.classes_) == 2 else logits
