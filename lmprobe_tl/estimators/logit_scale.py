"""The scale of a logit whose direction is known: logistic regression on the training projections, as Platt (1999) has it."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

Array: TypeAlias = NDArray[np.float64]


def fit_scale(
    scores: Array, class_index: NDArray[Any], weight: Array, class_weight: Array, *, least: float | None = None
) -> tuple[float, Array]:
    """Scale a and shifts b [n_classes] that make softmax(a * scores + b) most likely; scores: [n_examples n_classes].

    Targets as Platt (1999) smooths them: (n_k + 1) / (n_k + n_classes) for the own class k of an example, the rest shared.
    least: bound of a, for scores of standard deviation one; None where classes score highest at their own means anyway,
    which keeps a from being negative.
    """
    n_classes = len(class_weight)
    smoothed = (np.eye(n_classes) * class_weight[:, None] + 1.0) / (class_weight[:, None] + n_classes)
    targets = smoothed[class_index]
    unit = float((scores - scores.mean(axis=1, keepdims=True)).std()) or 1.0
    scores = scores / unit

    def loss_and_gradient(parameters: Array) -> tuple[float, Array]:
        log_probabilities = log_softmax(parameters[0] * scores + parameters[1:], axis=1)
        loss = -(weight @ (targets * log_probabilities)).sum() / weight.sum()
        excess = (np.exp(log_probabilities) - targets) * weight[:, None] / weight.sum()
        return loss, np.concatenate([[(excess * scores).sum()], excess.sum(axis=0)])

    start = np.concatenate([[0.0 if least is None else least], np.log(class_weight / class_weight.sum())])
    bounds = None if least is None else [(least, None)] + [(None, None)] * n_classes
    options = {"maxiter": 1000, "ftol": 0.0, "gtol": 1e-10}
    fitted = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return float(fitted[0] / unit), fitted[1:]
