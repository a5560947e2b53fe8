"""What a fitted probe says of prompts: logits and probabilities, and these beside labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.inference import TokenOutputs, prompt_outputs, token_outputs
from lmprobe_tl.labels import are_token_labels, check_labels, check_token_labels
from lmprobe_tl.pooling import PoolingStrategy
from lmprobe_tl.probe_poolings import check_reads_as_fitted
from lmprobe_tl.probe_settings import feature_settings, rows_of
from lmprobe_tl.scored import Scored
from lmprobe_tl.tokens import Prompt, check_prompts

Outputs: TypeAlias = TokenOutputs | tuple[NDArray[Any], NDArray[Any]]


def outputs_of(
    probe: Any, classifiers: Sequence[Any], prompts: Sequence[Prompt], inference: str | PoolingStrategy | None = None
) -> Sequence[Outputs]:
    """(logits, probabilities) of each prompt, or of each token with inference pooling 'all', of each of several fitted
    classifiers in the place of the probe's own. inference: None takes the probe's."""
    check_reads_as_fitted(probe)
    model, names = probe.model_, probe.hook_names_
    rows, settings = rows_of(probe, model, check_prompts(prompts)), feature_settings(probe, model)
    inference = inference or probe.poolings()[1]
    if inference == "all":
        return token_outputs(model, rows, names, classifiers, **settings)
    return prompt_outputs(model, rows, names, classifiers, inference, **settings)


def judged_by(probe: Any, classifiers: Sequence[Any], prompts: Sequence[Prompt], labels: Any) -> list[Scored]:
    """Labels and scores of each prompt or, with token labels or inference pooling 'all', of each token, by each of several
    fitted classifiers of the probe's classes."""
    prompts = check_prompts(prompts)
    token_labels = are_token_labels(labels)
    if not token_labels:
        labels = check_labels(labels, len(prompts))
    classes, found = probe.classes_.tolist(), []
    for outputs in outputs_of(probe, classifiers, prompts, "all" if token_labels else None):
        if isinstance(outputs, TokenOutputs):
            owners = np.repeat(np.arange(len(prompts)), outputs.lengths)
            truth = np.concatenate(check_token_labels(labels, outputs.lengths)) if token_labels else labels[owners]
            one = Scored.of(truth, outputs.logits, outputs.probabilities, owners, classes, "token")
        else:
            one = Scored.of(labels, *outputs, np.arange(len(prompts)), classes, "prompt")
        found.append(one)
    return found
