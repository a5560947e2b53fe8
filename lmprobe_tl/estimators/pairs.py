"""Contrast pairs: which examples belong together, and the classifiers that learn from them."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import validate_data

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.linear_classifier import LinearClassifier

Array: TypeAlias = NDArray[np.float64]


class PairedClassifier(LinearClassifier):
    """A linear classifier of two classes whose examples come in pairs of one negative and one positive.

    See `pair_rows` for which examples make a pair. A split of examples, as in a cross-validation, parts pairs that go by
    order, so that it needs `pairs` and folds by them. A subclass learns from the pairs in `_fit_pairs`.
    """

    def fit(self, X: Any, y: Any, pairs: Any = None) -> Any:
        """X: [n_examples n_features]; y: [n_examples] of two classes, the second is positive; pairs: [n_examples] or None.

        Raises InputError for examples without a partner, and for pairs that show no difference.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, rows = pair_rows(y, pairs)
        self._fit_pairs(X[rows[:, 0]], X[rows[:, 1]])
        return self

    def _fit_pairs(self, negative: Array, positive: Array) -> None:
        """Set coef_ and intercept_; negative, positive: [n_pairs n_features]."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def pair_rows(labels: Any, pairs: Any = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The two classes, and rows of the negative and the positive of each pair [n_pairs 2], in the order of the positives.

    labels: [n_examples], the second of the two classes is positive. pairs: [n_examples] of numbers or strings; the two rows
    with equal values make a pair. None: the i-th negative and the i-th positive do.
    Raises InputError for another number of classes, and for rows without exactly one partner, which it names.
    """
    classes, class_index = np.unique(labels, return_inverse=True)
    if len(classes) != 2:
        raise InputError(
            f"Only binary classification is supported. The type of the target is {type_of_target(labels)}: pairs need two "
            f"classes, but the labels hold {len(classes)} class{'es' * (len(classes) > 1)}."
        )
    sides = [np.flatnonzero(class_index == side) for side in (0, 1)]
    names = classes.tolist()
    if pairs is None:
        if len(sides[0]) != len(sides[1]):
            alone = max(sides, key=len)[min(map(len, sides)) :]
            raise InputError(
                f"The i-th example of class {names[0]!r} and the i-th of class {names[1]!r} make a pair, but there are "
                f"{len(sides[0])} and {len(sides[1])} of them: {_listed(alone)} no partner. Leave these out, or say with "
                "`pairs` which belong together."
            )
        return classes, np.column_stack(sides)
    keys = np.asarray(pairs)
    if keys.shape != (len(class_index),):
        raise InputError(f"pairs has shape {keys.shape}, expected one value an example: {(len(class_index),)}.")
    members = [Counter(keys[rows].tolist()) for rows in sides]
    wrong = np.array([[side[key] for side in members] != [1, 1] for key in keys.tolist()])
    if wrong.any():
        shown = keys[wrong][0].item()
        counts = [side[shown] for side in members]
        raise InputError(
            f"A pair is one example of class {names[0]!r} and one of class {names[1]!r}, but pair {shown!r} holds "
            f"{counts[0]} and {counts[1]} of them: {_listed(np.flatnonzero(wrong))} not exactly one partner. Leave these "
            "out, or correct `pairs`."
        )
    negative_of = dict(zip(keys[sides[0]].tolist(), sides[0], strict=True))
    return classes, np.array([(negative_of[keys[row].item()], row) for row in sides[1]])


def _listed(rows: NDArray[Any]) -> str:
    """'row 3 has', or 'rows 3, 4 have'; at most ten of them."""
    shown = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    return f"row {shown} has" if len(rows) == 1 else f"rows {shown} have"


def learns_from_pairs(classifier: Any) -> bool:
    """Whether a classifier, or the last step of a pipeline, is one that needs its examples in pairs."""
    return isinstance(last_step(classifier), PairedClassifier)


def last_step(classifier: Any) -> Any:
    """The classifier itself, or that at the end of a pipeline."""
    return last_step(classifier.steps[-1][1]) if isinstance(classifier, Pipeline) else classifier
