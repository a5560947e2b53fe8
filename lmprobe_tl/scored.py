"""Examples with their labels and what a classifier says of them: all that a metric needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.errors import InputError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Scored:
    """Labelled prompts (`level` 'prompt') or tokens (`level` 'token'), scored.

    labels: [n_examples], index of each one's class in `classes`. scores: [n_examples], high for the second of two classes,
    or [n_examples n_classes]. probabilities: [n_examples n_classes]. prompts: [n_examples], index of each one's prompt.
    """

    labels: NDArray[np.int64]
    scores: Array
    probabilities: Array
    prompts: NDArray[np.int64]
    classes: Array
    level: str

    @property
    def is_binary(self) -> bool:
        return len(self.classes) == 2

    @property
    def predicted(self) -> NDArray[np.int64]:
        """[n_examples]: index of the most probable class."""
        return self.probabilities.argmax(axis=1)

    @property
    def n_prompts(self) -> int:
        return len(np.unique(self.prompts))

    def of_prompts(self, chosen: NDArray[np.bool_]) -> Scored:
        """The examples of some prompts. chosen: [n_prompts]."""
        kept = chosen[self.prompts]
        return replace(
            self,
            labels=self.labels[kept],
            scores=self.scores[kept],
            probabilities=self.probabilities[kept],
            prompts=self.prompts[kept],
        )


def scored(truth: Array, logits: Array, probabilities: Array, prompts: Array, classes: Array, level: str) -> Scored:
    """truth: [n_examples] labels; logits, probabilities: as `logits_of` and `probabilities_of` give them.

    InputError for a label that is no class.
    """
    unknown = set(np.unique(truth).tolist()) - set(classes.tolist())
    if unknown:
        raise InputError(f"labels holds {sorted(unknown, key=str)[0]!r}, but the probe knows only {classes.tolist()}.")
    # Two classes are ranked by logits: probabilities near 1 are all the same number.
    scores = logits if len(classes) == 2 else probabilities
    return Scored(np.searchsorted(classes, truth), scores, probabilities, prompts, classes, level)
