"""Examples with their labels and what a classifier says of them: all that a metric needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.errors import InputError
from lmprobe_tl.probe_spec import Label

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
    classes: tuple[Label, ...]
    level: str

    @classmethod
    def of(
        cls, truth: Array, logits: Array, probabilities: Array, prompts: Array, classes: Sequence[Label], level: str
    ) -> Scored:
        """truth: [n_examples] labels; logits, probabilities: as `logits_of` and `probabilities_of` give them.

        InputError for a label that is no class.
        """
        found, index = np.unique(truth, return_inverse=True)
        place = {label: at for at, label in enumerate(classes)}
        unknown = [label for label in found.tolist() if label not in place]
        if unknown:
            raise InputError(f"labels holds {unknown[0]!r}, but the probe knows only {list(classes)}.")
        labels = np.array([place[label] for label in found.tolist()], dtype=np.int64)[index]
        # Two classes are ranked by logits: probabilities near 1 are all the same number.
        scores = logits if len(classes) == 2 else probabilities
        return cls(labels, scores, probabilities, prompts, tuple(classes), level)

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

    def with_classes(self, classes: tuple[Label, ...]) -> Scored:
        """The same with the classes in another order, of which the second of two is the positive one."""
        if classes == self.classes:
            return self
        order = [self.classes.index(label) for label in classes]
        scores = -self.scores if self.is_binary else self.scores[:, order]
        return replace(
            self,
            labels=np.argsort(order)[self.labels],
            scores=scores,
            probabilities=self.probabilities[:, order],
            classes=classes,
        )
