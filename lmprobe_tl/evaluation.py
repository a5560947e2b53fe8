"""How good a probe is: frozen records of metrics with bootstrap intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmprobe_tl.bootstrap import Interval, Resamples
from lmprobe_tl.measures import interval_of, sampled_ranks, sampled_share, tpr_name
from lmprobe_tl.metrics import auroc
from lmprobe_tl.probe_spec import MetricRecord


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a probe on labelled prompts.

    auroc: one-vs-rest macro mean with more than two classes. tpr_at_fpr: best true-positive rate whose false-positive rate
    does not exceed `fpr`; None with more than two classes. level: 'prompt', or 'token' where each token had a label.
    Intervals come from a percentile bootstrap that draws whole prompts, in a sweep whole groups of prompts;
    where all is right, or all wrong, from the count alone (`limit_without_failure`).
    """

    auroc: Interval
    accuracy: Interval
    tpr_at_fpr: Interval | None
    fpr: float
    level: str
    pooling: str
    n_prompts: int
    n_examples: int
    n_bootstrap: int
    random_state: int | None

    def records(self) -> dict[str, MetricRecord]:
        """The metrics as a probe file keeps them; names of metrics of single tokens begin with 'token_'."""
        named = {"auroc": self.auroc, "accuracy": self.accuracy, f"tpr_at_fpr_{self.fpr:g}": self.tpr_at_fpr}
        prefix = "token_" if self.level == "token" else ""
        return {prefix + name: self._record(interval) for name, interval in named.items() if interval is not None}

    def _record(self, interval: Interval) -> MetricRecord:
        confidence = None if interval.low is None else interval.confidence
        return MetricRecord(
            value=interval.value, low=interval.low, high=interval.high, confidence=confidence, n=self.n_examples
        )


def evaluate_scores(
    labels: np.ndarray,
    scores: np.ndarray,
    predicted: np.ndarray,
    groups: np.ndarray,
    *,
    level: str,
    pooling: str,
    fpr: float = 0.01,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    random_state: int | None = 0,
) -> Evaluation:
    """Metrics of scores [n] (binary, of the positive class) or [n n_classes] and predicted labels [n], in prompts `groups`
    [n]."""
    auroc(labels, scores)  # raises what cannot be measured
    resamples = Resamples.drawn(labels, groups, n_bootstrap=n_bootstrap, confidence=confidence, random_state=random_state)
    ranks = sampled_ranks(np.unique(labels, return_inverse=True)[1], scores, resamples, [fpr])

    return Evaluation(
        auroc=interval_of(ranks["auroc"], resamples),
        accuracy=interval_of(sampled_share(predicted == labels, resamples), resamples),
        tpr_at_fpr=interval_of(ranks[tpr_name(fpr)], resamples) if scores.ndim == 1 else None,
        fpr=fpr,
        level=level,
        pooling=pooling,
        n_prompts=len(np.unique(groups)),
        n_examples=len(labels),
        n_bootstrap=n_bootstrap,
        random_state=random_state,
    )
