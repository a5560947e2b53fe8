"""A probe's recipe: the same hook points, pooling and classifier, fitted anew with something changed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from lmprobe_tl.labelled_prompts import LabelledPrompts
from lmprobe_tl.labels import are_token_labels, check_labels
from lmprobe_tl.probe import Probe


class Recipe:
    """How a probe was made, to fit it anew on what it learnt from, extracted once. note: where that was not its own training
    prompts."""

    def __init__(self, unfitted: Probe, source: LabelledPrompts, note: str = "") -> None:
        self.note = note
        self._unfitted, self._source = unfitted, source
        self._examples = unfitted.training_examples(source.prompts, source.labels)

    def fitted(self, *, shuffle_seed: int | None = None, classifier: Any = None) -> Probe:
        """A probe made by the recipe, from its labels in another order or by another classifier, where these are given."""
        probe, examples = clone(self._unfitted), self._examples
        if classifier is not None:
            probe.set_params(classifier=classifier)
        if shuffle_seed is not None:
            # What learns nothing stays near where it began, so each draw begins elsewhere.
            probe.set_params(random_state=shuffle_seed)
            if hasattr(probe.classifier, "random_state"):
                probe.set_params(classifier=clone(probe.classifier).set_params(random_state=shuffle_seed))
            examples = replace(examples, labels=self._shuffled(shuffle_seed))
        with warnings.catch_warnings():
            if shuffle_seed is not None:
                warnings.simplefilter("ignore", ConvergenceWarning)  # that nothing was learnt is what this is to show
            return probe.fit_examples(examples)

    def _shuffled(self, seed: int) -> NDArray[Any]:
        """[n_examples]; where each prompt has a label, those of whole prompts change places."""
        rng, groups = np.random.default_rng(seed), self._examples.groups
        if groups is None or are_token_labels(self._source.labels):
            return rng.permutation(self._examples.labels)
        return rng.permutation(check_labels(self._source.labels, len(self._source.prompts)))[groups]
