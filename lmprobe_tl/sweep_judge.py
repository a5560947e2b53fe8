"""How a sweep scores a combination: on its validation splits, and once on its test set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.estimators import make_classifier
from lmprobe_tl.estimators.fitting import logits_of, probabilities_of
from lmprobe_tl.estimators.streaming import fit_features
from lmprobe_tl.evaluation import Evaluation, evaluate_scores
from lmprobe_tl.metrics import Interval, auroc, bootstrap_interval
from lmprobe_tl.splits import Indices
from lmprobe_tl.sweep_examples import SweepExamples

Array = NDArray[Any]


@dataclass(frozen=True)
class SweepJudge:
    """Scores of classifiers on the splits of a sweep. selection, test: indices of examples; splits: of the selection.

    Intervals are by bootstrap over groups: prompts of one group are no independent evidence.
    """

    examples: SweepExamples
    selection: Indices
    test: Indices
    splits: list[tuple[Indices, Indices]]
    n_bootstrap: int
    confidence: float
    random_state: int | None

    def validated(self, classifier: Any, values: Array) -> Interval:
        """AUROC of a classifier on features [n_selection ...] of the selection: the mean over splits. classifier: a name or
        an unfitted one."""
        labels, groups = self.examples.labels[self.selection], self.examples.groups[self.selection]
        scores = []
        for train, validate in self.splits:
            fitted = self._fit(classifier, values[train], labels[train], groups[train])
            scores.append(_scores(fitted, values[validate]))
        return self._mean_over_splits(scores)

    def blind(self) -> Interval:
        """0.5, as of features that are all the same: a classifier would learn from their rounding, or raise."""
        n_classes = len(np.unique(self.examples.labels))
        shape = () if n_classes == 2 else (n_classes,)
        return self._mean_over_splits([np.zeros((len(validate), *shape)) for _, validate in self.splits])

    def _mean_over_splits(self, scores: list[Array]) -> Interval:
        """scores: of each split's examples to validate on."""
        order = np.concatenate([validate for _, validate in self.splits])
        folds = np.concatenate([np.full(len(one), fold) for fold, one in enumerate(scores)])
        return bootstrap_interval(
            _mean_auroc,
            self.examples.labels[self.selection][order],
            np.column_stack([folds, np.concatenate(scores)]),
            groups=self.examples.groups[self.selection][order],
            n_bootstrap=self.n_bootstrap,
            confidence=self.confidence,
            random_state=self.random_state,
        )

    def fitted(self, classifier: Any, values: Array) -> Any:
        """A classifier fitted on the selection, of features [n_examples ...] of all examples."""
        labels, groups = self.examples.labels[self.selection], self.examples.groups[self.selection]
        return self._fit(classifier, values[self.selection], labels, groups)

    def _fit(self, classifier: Any, values: Array, labels: Array, groups: Array) -> Any:
        return fit_features(classifier, make_classifier(classifier, self.random_state), values, labels, groups=groups)

    def tested(self, fitted: Any, values: Array, pooling: str) -> Evaluation:
        """A fitted classifier on the test set, of features [n_examples ...] of all examples."""
        probabilities = probabilities_of(fitted, values[self.test])
        evaluation = evaluate_scores(
            self.examples.labels[self.test],
            _scores(fitted, values[self.test]),
            fitted.classes_[probabilities.argmax(axis=1)],
            self.examples.groups[self.test],
            level=self.examples.level,
            pooling=pooling,
            n_bootstrap=self.n_bootstrap,
            confidence=self.confidence,
            random_state=self.random_state,
        )
        return replace(evaluation, n_prompts=len(np.unique(self.examples.prompts[self.test])))


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
    if not found:
        return 0.5 if sample_weight is None else float("nan")  # a resample that measures nothing is left out
    return float(np.mean(found))
