"""The examples of an evaluation's record, as the metrics take them."""

from __future__ import annotations

import numpy as np

from lmprobe_tl.bootstrap import Resamples
from lmprobe_tl.errors import InputError
from lmprobe_tl.probe_report import ControlReport, ProbeReport
from lmprobe_tl.scored import Array, Scored


def judged_examples(report: ProbeReport, what: str) -> Scored:
    """The examples of two classes, both of them there. what: begins the InputError for others, such as 'a ROC curve'."""
    if len(report.classes) != 2:
        raise InputError(f"{what} is of two classes; this report has {len(report.classes)}.")
    examples = report.examples
    labels, positive = np.array(examples.labels, dtype=np.int64), np.array(examples.probabilities[0])
    missing = sorted({0, 1} - set(labels.tolist()))
    if missing:
        raise InputError(f"{what} needs both classes; no {report.level} is of class {report.classes[missing[0]]!r}.")
    probabilities = np.stack([1 - positive, positive], axis=1)
    prompts = np.array(examples.prompts, dtype=np.int64)
    return Scored(labels, np.array(examples.scores[0]), probabilities, prompts, report.classes, report.level)


def resamples_of(report: ProbeReport, examples: Scored) -> Resamples:
    """Resamples of prompts as the report's own intervals have them."""
    return Resamples.drawn(
        examples.labels,
        examples.prompts,
        n_bootstrap=report.n_bootstrap,
        confidence=report.confidence,
        random_state=report.random_state,
    )


def control_scores(control: ControlReport, n_examples: int) -> Array | None:
    """Scores [n_examples] of a control with a single draw; None for the others."""
    known = len(control.scores) == 1 and len(control.scores[0]) == n_examples
    return np.array(control.scores[0]) if known else None
