"""Fit any scikit-learn classifier on features whose rows come in groups, and read logits and probabilities from it."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, softmax
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, StratifiedGroupKFold, check_cv
from sklearn.pipeline import Pipeline

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.torch_classifier import TorchClassifier

Array = NDArray[Any]
_CERTAIN = 1e-12


def fit_classifier(
    classifier: Any, features: Array, labels: Array, *, groups: Array | None = None, sample_weight: Array | None = None
) -> Any:
    """Fit in place and return the classifier.

    features: [n_examples n_features]; labels: [n_examples]. groups: [n_examples]; a cross-validation inside the classifier
    (a grid search, LogisticRegressionCV), and a held-out part for early stopping, then never parts a group. sample_weight:
    [n_examples]; InputError where it is not supported.
    """
    if groups is not None:
        _split_by_group(classifier, features, labels, groups)
    arguments = {} if sample_weight is None else _weight_argument(classifier, sample_weight)
    if groups is not None and isinstance(classifier, TorchClassifier):
        arguments["groups"] = groups
    return classifier.fit(features, labels, **arguments)


def _split_by_group(classifier: Any, features: Array, labels: Array, groups: Array) -> None:
    for name, value in classifier.get_params(deep=True).items():
        if name == "cv" or name.endswith("__cv"):
            splitter = check_cv(value, labels, classifier=True)
            if not isinstance(splitter, (GroupKFold, StratifiedGroupKFold, LeaveOneGroupOut)):
                splitter = StratifiedGroupKFold(splitter.get_n_splits(features, labels, groups))
            classifier.set_params(**{name: list(splitter.split(features, labels, groups))})


def _weight_argument(classifier: Any, sample_weight: Array) -> dict[str, Array]:
    if isinstance(classifier, Pipeline):
        last_name, last = classifier.steps[-1]
        if "sample_weight" in inspect.signature(last.fit).parameters:
            return {f"{last_name}__sample_weight": sample_weight}
    elif "sample_weight" in inspect.signature(classifier.fit).parameters:
        return {"sample_weight": sample_weight}
    raise no_weights_error(classifier)


def no_weights_error(classifier: Any) -> InputError:
    """What to raise where a classifier that takes no sample weights is given some."""
    return InputError(
        f"{type(classifier).__name__} takes no sample weights, so prompts cannot weigh the same; "
        "use a classifier that does, or equal_prompt_weight=False."
    )


def logits_of(classifier: Any, features: Array) -> Array:
    """Decision of a fitted classifier: [n] for the positive of two classes, [n n_classes] else.

    Its decision_function, or the log-odds (two classes) or logs of its probabilities where it has none.
    """
    if hasattr(classifier, "decision_function"):
        return np.asarray(classifier.decision_function(features))
    # Clipped, since a forest is easily certain, and infinite logits have no mean.
    probabilities = np.clip(classifier.predict_proba(features), _CERTAIN, 1 - _CERTAIN)
    return logit(probabilities[:, 1]) if probabilities.shape[1] == 2 else np.log(probabilities)


def probabilities_of(classifier: Any, features: Array) -> Array:
    """Probabilities [n n_classes]: the classifier's own, or sigmoid or softmax of its decision where it gives none."""
    if hasattr(classifier, "predict_proba"):
        return np.asarray(classifier.predict_proba(features))
    decision = logits_of(classifier, features)
    if decision.ndim == 1:
        positive = expit(decision)
        return np.stack([1 - positive, positive], axis=1)
    return softmax(decision, axis=1)
