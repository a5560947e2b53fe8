"""Classifiers by name, or any scikit-learn classifier of your own.

Most take pooled activations [n_examples n_features]; sequence classifiers take all tokens of a prompt and pool themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.ccs import CcsClassifier
from lmprobe_tl.estimators.fitted_head import FittedHead, fitted_head
from lmprobe_tl.estimators.layer_stack import LayerStackClassifier
from lmprobe_tl.estimators.linear_rule import LinearRule, linear_rule
from lmprobe_tl.estimators.mass_mean import MassMeanClassifier
from lmprobe_tl.estimators.pca import PcaClassifier
from lmprobe_tl.estimators.sequence_classifier import SequenceClassifier
from lmprobe_tl.estimators.sequence_classifiers import (
    SEQUENCE_CLASSIFIERS,
    AttentionClassifier,
    MultiMaxClassifier,
    RollingAttentionClassifier,
    SoftmaxClassifier,
    WindowedClassifier,
)
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.estimators.vector_classifiers import VECTOR_CLASSIFIERS, MlpClassifier, PolynomialClassifier

__all__ = [
    "CLASSIFIERS",
    "SEQUENCE_CLASSIFIERS",
    "AttentionClassifier",
    "CcsClassifier",
    "FittedHead",
    "LayerStackClassifier",
    "LinearRule",
    "MassMeanClassifier",
    "MlpClassifier",
    "MultiMaxClassifier",
    "PcaClassifier",
    "PolynomialClassifier",
    "RollingAttentionClassifier",
    "SequenceClassifier",
    "SoftmaxClassifier",
    "TokenSequences",
    "WindowedClassifier",
    "fitted_head",
    "linear_rule",
    "make_classifier",
    "own_pooling",
]

_C = 0.03


def _logistic_regression(random_state: int | None) -> BaseEstimator:
    """Standardised features and L2-penalised logistic regression, C = 0.03.

    C is fixed, so that a fit is one fit. The best C is low where the noise is white, and high where most features repeat
    each other; a low one is also less sure of itself on new data. To choose it on your data, pass a GridSearchCV or
    LogisticRegressionCV instead of the name.
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=2000, random_state=random_state))


def _ridge(random_state: int | None) -> BaseEstimator:
    """Standardised features and least squares on targets y of 1 and -1, plus alpha |w|^2, alpha = 4 / 0.03.

    The penalty is as strong as that of logistic regression is at its start, where its C is 0.03. There the log loss of a
    logit z is (z - 2 y)^2 / 8 up to a constant and z^4: its slope is -y / 2, its curvature 1 / 4. Eight times the sum of
    these and |w|^2 / 2C is sum (z - 2 y)^2 + 4 |w|^2 / C. Twice the w that is best for sum (z - y)^2 + 4 |w|^2 / C is best
    for it. So alpha is 4 / C.
    """
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=4.0 / _C))


def _lda(random_state: int | None) -> BaseEstimator:
    """Linear discriminant analysis; the covariance of each class is shrunk as in Ledoit and Wolf (2004)."""
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _mass_mean(random_state: int | None) -> BaseEstimator:
    """The difference of class means; nothing in it is random."""
    return MassMeanClassifier()


def _mass_mean_whitened(random_state: int | None) -> BaseEstimator:
    """The difference of class means, whitened by the covariance within the classes."""
    return MassMeanClassifier(covariance=True)


def _pca(random_state: int | None) -> BaseEstimator:
    """The main direction of the differences of pairs; nothing in it is random."""
    return PcaClassifier()


def _ccs(random_state: int | None) -> BaseEstimator:
    """Contrast-consistent search on pairs."""
    return CcsClassifier(random_state=random_state)


def _stacking(random_state: int | None) -> BaseEstimator:
    """A logistic regression a layer, and one on their logits."""
    return LayerStackClassifier(random_state=random_state)


CLASSIFIERS: dict[str, Callable[[int | None], BaseEstimator]] = {
    "ccs": _ccs,
    "lda": _lda,
    "logistic_regression": _logistic_regression,
    "mass_mean": _mass_mean,
    "mass_mean_whitened": _mass_mean_whitened,
    "pca": _pca,
    "ridge": _ridge,
    "stacking": _stacking,
    **VECTOR_CLASSIFIERS,
    **SEQUENCE_CLASSIFIERS,
}


def own_pooling(classifier: Any) -> str | None:
    """How a sequence classifier, by name or instance, reduces the tokens of a prompt itself: 'sequence', or the reduction of
    its token logits, such as 'score:softmax(5)'. None for a classifier of pooled activations."""
    if isinstance(classifier, str) and classifier in SEQUENCE_CLASSIFIERS:
        classifier = SEQUENCE_CLASSIFIERS[classifier](None)
    return classifier.own_pooling if isinstance(classifier, SequenceClassifier) else None


def make_classifier(classifier: Any, random_state: int | None) -> BaseEstimator:
    """An unfitted classifier: a fresh one by name, or a clone of the instance given, which stays untouched.

    random_state reaches the named classifiers only; an instance keeps its own.
    Raises InputError for an unknown name, for anything that is no scikit-learn classifier instance, and for a sequence
    classifier inside another one, which would give it pooled activations.
    """
    if isinstance(classifier, str):
        return _named_classifier(classifier, random_state)
    if isinstance(classifier, type):
        raise InputError(
            f"classifier must be a name or an instance, got the class {classifier.__name__}. Pass {classifier.__name__}()."
        )
    missing = [method for method in ("fit", "predict", "get_params") if not callable(getattr(classifier, method, None))]
    if missing:
        raise InputError(
            f"classifier must be a name ({_names()}) or a scikit-learn classifier instance, got {classifier!r}, "
            f"which has no {' and no '.join(missing)}."
        )
    if not is_classifier(classifier):
        raise InputError(
            f"classifier must be a classifier, got {classifier!r}, which scikit-learn does not count as one (a regressor, a "
            f"transformer or an outlier detector). For a linear probe pass 'logistic_regression' or RidgeClassifier()."
        )
    for name, part in classifier.get_params(deep=True).items():
        if isinstance(part, SequenceClassifier):
            raise InputError(
                f"{type(part).__name__} learns from token sequences, but {type(classifier).__name__} would give it pooled "
                f"activations (as its {name!r}). Pass {type(part).__name__} itself, which standardises tokens; to choose "
                "its parameters, search over the Probe: GridSearchCV(probe, {'classifier__learning_rate': [...]})."
            )
    return clone(classifier)


def _named_classifier(name: str, random_state: int | None) -> BaseEstimator:
    if name not in CLASSIFIERS:
        closest = difflib.get_close_matches(name, CLASSIFIERS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"Unknown classifier {name!r}. Closest: {closest!r}. All names: {_names()}. "
            f"Any scikit-learn classifier instance works too."
        )
    return CLASSIFIERS[name](random_state)


def _names() -> str:
    return ", ".join(repr(name) for name in sorted(CLASSIFIERS))
