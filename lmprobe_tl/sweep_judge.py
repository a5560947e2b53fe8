"""How a sweep scores a combination: on its validation splits, and once on its test set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from lmprobe_tl.estimators.fitting import logits_of, probabilities_of
from lmprobe_tl.estimators.streaming import fit_features
from lmprobe_tl.evaluation import Evaluation, evaluate_scores
from lmprobe_tl.metrics import Interval, auroc, bootstrap_interval
from lmprobe_tl.splits import Indices
from lmprobe_tl.sweep_examples import SweepExamples

Array = NDArray[Any]


@dataclass(frozen=True)
class SweepJudge:
    """Scores of classifiers on the splits of a sweep. selection, test: indices of examples; splits: of the selection."""

    examples: SweepExamples
    selection: Indices
    test: Indices
    splits: list[tuple[Indices, Indices]]
    n_bootstrap: int
    confidence: float
    random_state: int | None

    def validated(self, given: Any, classifier: Any, values: Array) -> Interval:
        """AUROC of a classifier on features [n_selection ...] of the selection: the mean over splits.

        given: the name or instance that the unfitted `classifier` was made from.
        """
        labels, groups = self.examples.labels[self.selection], self.examples.groups[self.selection]
        parts = []
        for fold, (train, validate) in enumerate(self.splits):
            fitted = fit_features(given, clone(classifier), values[train], labels[train], groups=groups[train])
            scores = _scores(fitted, values[validate])
            parts.append((validate, np.column_stack([np.full(len(validate), fold), scores])))
        order = np.concatenate([validate for validate, _ in parts])
        return bootstrap_interval(
            _mean_auroc,
            labels[order],
            np.concatenate([columns for _, columns in parts]),
            groups=groups[order],
            n_bootstrap=self.n_bootstrap,
            confidence=self.confidence,
            random_state=self.random_state,
        )

    def fitted(self, given: Any, classifier: Any, values: Array) -> Any:
        labels, groups = self.examples.labels[self.selection], self.examples.groups[self.selection]
        return fit_features(given, clone(classifier), values[self.selection], labels, groups=groups)

    def tested(self, fitted: Any, values: Array, pooling: str) -> Evaluation:
        probabilities = probabilities_of(fitted, values[self.test])
        return evaluate_scores(
            self.examples.labels[self.test],
            _scores(fitted, values[self.test]),
            fitted.classes_[probabilities.argmax(axis=1)],
            self.examples.prompts[self.test],
            level=self.examples.level,
            pooling=pooling,
            n_bootstrap=self.n_bootstrap,
            confidence=self.confidence,
            random_state=self.random_state,
        )


def _scores(fitted: Any, values: Array) -> Array:
    """Logits of two classes, which keep apart what probabilities near 1 do not; else probabilities."""
    return logits_of(fitted, values) if len(fitted.classes_) == 2 else probabilities_of(fitted, values)


def _mean_auroc(labels: Array, columns: Array, sample_weight: Array | None = None) -> float:
    """Mean over folds, since logits of different fits have no common scale. columns: [n 1+n_scores], the fold first."""
    weight = np.ones(len(labels)) if sample_weight is None else np.asarray(sample_weight)
    n_classes = len(np.unique(labels))
    found = []
    for fold in np.unique(columns[:, 0]):
        member = (columns[:, 0] == fold) & (weight > 0)
        if len(np.unique(labels[member])) == n_classes:  # a resample may have lost a class in this fold
            scores = columns[member, 1:]
            found.append(auroc(labels[member], scores[:, 0] if scores.shape[1] == 1 else scores, weight[member]))
    return float(np.mean(found)) if found else 0.5
