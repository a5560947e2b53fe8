"""What a classifier trained with torch has learnt, as the numbers of a head (heads.py) in the space of the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.errors import InputError
from lmprobe_tl.heads import HeadKind


@dataclass(frozen=True, eq=False, kw_only=True)
class FittedHead:
    """readings = direction @ x + intercept on unscaled activations, and the head of that kind does the rest.

    direction: [n_readings d], intercept: [n_readings], readout: [n_outputs n_readings], readout_intercept: [n_outputs], all
    float64. The readings of attention kinds are all queries, then all values. What a kind does not have is None.

    own_pooling: how tokens became the score of a sequence in training. None for classifiers of vectors, 'sequence' for kinds
    that reduce the tokens themselves, 'score:softmax(5)' for a linear head trained through that reduction, and
    'score:rolling_max(16)' for one trained on windows of 16 tokens. At inference the paper of the latter (Constitutional
    Classifiers++, arXiv:2601.04603) replaces the windows by a moving average, 'score:ema_max(alpha)', which needs no memory
    of past tokens: alpha = 2 / (window + 1) looks back as far on average, by (window - 1) / 2 tokens; 0.118 for 16.
    """

    kind: HeadKind
    direction: NDArray[np.float64]
    intercept: NDArray[np.float64]
    readout: NDArray[np.float64] | None = None
    readout_intercept: NDArray[np.float64] | None = None
    n_heads: int | None = None
    window: int | None = None
    n_hidden: int | None = None
    degree: int | None = None
    rank: int | None = None
    own_pooling: str | None = None


def fitted_head(classifier: Any) -> FittedHead:
    """The head of a fitted classifier of this package that was trained with torch, or of the best one of a search.

    Raises scikit-learn's NotFittedError, and InputError for any other classifier.
    """
    check_is_fitted(classifier)
    classifier = getattr(classifier, "best_estimator_", classifier)
    head = getattr(classifier, "head_", None)
    if not isinstance(head, FittedHead):
        raise InputError(
            f"{type(classifier).__name__} has no head; expected a sequence classifier such as AttentionClassifier, or an "
            "MlpClassifier or PolynomialClassifier. For a linear classifier use linear_rule. These standardise by "
            "themselves, so they need no pipeline around them."
        )
    return head
