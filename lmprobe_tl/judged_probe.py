"""A probe to evaluate, whatever it came as: what it says of labelled prompts, and the recipe that it was made by."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.base import clone

from lmprobe_tl.artefact import pooling_name
from lmprobe_tl.errors import InputError, PoolingMismatchWarning
from lmprobe_tl.estimators import CLASSIFIERS, own_pooling
from lmprobe_tl.given_probes import as_probes, as_weights, recorded_prepend_bos
from lmprobe_tl.hook_points import load_model
from lmprobe_tl.inference import TokenOutputs
from lmprobe_tl.labels import are_token_labels, check_labels, check_token_labels
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.pooling import PoolingStrategy
from lmprobe_tl.probe import Probe
from lmprobe_tl.probe_poolings import probe_poolings
from lmprobe_tl.probe_spec import HIGHEST_LOGIT, LOWEST_LOGIT, Label, ProbeSpec, TrainingRecord
from lmprobe_tl.scored import Scored
from lmprobe_tl.scoring import prompt_rows, score_batches
from lmprobe_tl.tokens import Prompt, bos_id, check_prompts, counted_lengths, tokenize_prompts
from lmprobe_tl.weights import ProbeWeights

Array = NDArray[Any]


class JudgedProbe(ABC):
    """A fitted probe on its model. recipe: an unfitted `Probe` with the same hook points, poolings and classifier; notes:
    what in it had to be guessed."""

    name: str
    model: Any
    hook_names: tuple[str, ...]
    classes: tuple[Label, ...]
    recipe: Probe
    training: TrainingRecord | None
    trained_on: frozenset[bytes] | None
    notes: tuple[str, ...] = ()

    @abstractmethod
    def judged(self, prompts: Sequence[Prompt], labels: Any) -> Scored:
        """Labels and scores of each prompt or, with token labels or inference pooling 'all', of each token."""

    @abstractmethod
    def token_logits(self, prompts: Sequence[Prompt]) -> list[Array]:
        """Logits of the tokens of each prompt that count, [n_tokens] or [n_tokens n_classes]."""

    @property
    def inference(self) -> str | PoolingStrategy:
        return self.recipe.poolings()[1]

    def rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt as the probe sees them."""
        recipe = self.recipe
        return tokenize_prompts(
            self.model,
            prompts,
            prepend_bos=recipe.prepend_bos,
            max_length=recipe.max_length,
            truncation=recipe.truncation,
        )

    def counted(self, rows: Sequence[list[int]]) -> list[list[int]]:
        """The tokens of each row that count: all but a leading BOS, unless the probe includes it."""
        lengths = counted_lengths(rows, bos_id(self.model), self.recipe.include_bos)
        return [row[len(row) - length :] for row, length in zip(rows, lengths, strict=True)]


class FittedProbe(JudgedProbe):
    """A fitted `Probe`."""

    def __init__(self, probe: Probe) -> None:
        self._probe, self.recipe = probe, clone(probe).set_params(model=probe.model_)
        self.name, self.model, self.hook_names = probe.name, probe.model_, tuple(probe.hook_names_)
        self.classes = tuple(probe.classes_.tolist())
        self.training, self.trained_on = probe.training_, probe._trained_on

    def judged(self, prompts: Sequence[Prompt], labels: Any) -> Scored:
        return self._probe.judged(prompts, labels)

    def token_logits(self, prompts: Sequence[Prompt]) -> list[Array]:
        outputs = self._probe._outputs(prompts, "all")
        assert isinstance(outputs, TokenOutputs)
        return outputs.by_prompt(outputs.logits)


class WeighedProbe(JudgedProbe):
    """`ProbeWeights`, scored as live runs score them. settings: of tokens and batches, as in `score_prompts`."""

    trained_on = None

    def __init__(self, weights: ProbeWeights, model: Any, **settings: Any) -> None:
        (self._weights,) = as_probes(weights)
        self.model = load_model(model)
        self.name, self.hook_names, self.classes = weights.name, weights.hook_points, weights.labels
        self.training = weights.spec.training
        texts = ("prepend_bos", "max_length", "truncation")
        self._texts = {name: settings.pop(name) for name in texts if name in settings}
        if self._texts.get("prepend_bos") is None:
            self._texts["prepend_bos"] = recorded_prepend_bos([weights])
        self._running = settings
        classifier, poolings, self.notes = _recipe_of(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoolingMismatchWarning)  # of whoever made the file
            self.recipe = Probe(
                self.model,
                list(weights.hook_points),
                **poolings,
                classifier=classifier,
                include_bos=weights.spec.pooling.include_bos,
                random_state=None if self.training is None else self.training.random_state,
                name=weights.name,
                **self._texts,
                **settings,
            )

    def judged(self, prompts: Sequence[Prompt], labels: Any) -> Scored:
        prompts = check_prompts(prompts)
        if are_token_labels(labels) or self.inference == "all":
            logits = self.token_logits(prompts)
            lengths = [len(one) for one in logits]
            owners = np.repeat(np.arange(len(prompts)), lengths)
            if are_token_labels(labels):
                truth = np.concatenate(check_token_labels(labels, lengths))
            else:
                truth = check_labels(labels, len(prompts))[owners]
            values = np.concatenate(logits)
            return Scored.of(truth, values, _probabilities(values), owners, self.classes, "token")
        truth, unit = check_labels(labels, len(prompts)), "logit" if self._weights.is_binary else None
        found: list[Any] = [None] * len(prompts)

        def read(indices: list[int], monitor: Monitor) -> None:
            for index, running in zip(indices, monitor.running_scores(self.name, unit), strict=True):
                found[index] = running[-1].double().nan_to_num(posinf=HIGHEST_LOGIT, neginf=LOWEST_LOGIT)

        self._run(self._rows(prompts), read)
        values = torch.stack(found).cpu().numpy()
        probabilities = _probabilities(values) if self._weights.is_binary else values
        return Scored.of(truth, values, probabilities, np.arange(len(prompts)), self.classes, "prompt")

    def token_logits(self, prompts: Sequence[Prompt]) -> list[Array]:
        rows = self._rows(prompts)
        found: list[Any] = [None] * len(rows)

        def read(indices: list[int], monitor: Monitor) -> None:
            for index, logits in zip(indices, monitor.token_scores(self.name), strict=True):
                found[index] = logits.double().cpu().numpy()

        self._run(rows, read)
        lengths = counted_lengths(rows, bos_id(self.model), self.recipe.include_bos)
        return [logits[len(logits) - length :] for logits, length in zip(found, lengths, strict=True)]

    def _rows(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return prompt_rows(self.model, prompts, [self._weights], **self._texts)

    def _run(self, rows: list[list[int]], read: Any) -> None:
        score_batches(self.model, rows, [self._weights], read, **self._running)


def _recipe_of(weights: ProbeWeights) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Classifier, poolings and notes of the recipe that a file tells of; where it does not, of the classifier that learns
    its kind of probe, or of logistic regression."""
    training, kind = weights.spec.training, weights.spec.kind
    named = None if training is None else training.classifier
    of = "no classifier" if named is None else f"the classifier {named}"
    if named in CLASSIFIERS:
        poolings = _poolings_for(named, weights.spec)
        if _go_with(named, poolings):
            return named, poolings, ()
        of += ", which does not go with its poolings"
    # the kinds are called as the classifiers that learn them
    classifier = kind if kind in CLASSIFIERS else "logistic_regression"
    notes = (f"the probe file names {of}, so controls are fitted with {classifier}",)
    return classifier, _poolings_for(classifier, weights.spec), notes


def _poolings_for(classifier: str, spec: ProbeSpec) -> dict[str, Any]:
    """Poolings with which a `Probe` of this classifier scores as the spec says."""
    train, inference, own = spec.pooling.train, spec.pooling.inference, own_pooling(classifier)
    if own is not None:
        return {"inference_pooling": None if inference == own else inference}
    # of vectors, the mean is the like of a score that is trained through
    return {"train_pooling": "mean" if train.startswith("score:") else train, "inference_pooling": inference}


def _go_with(classifier: str, poolings: dict[str, Any]) -> bool:
    try:
        probe_poolings(classifier, None, poolings.get("train_pooling"), poolings["inference_pooling"])
    except InputError:
        return False
    return True


def judged_probe(probe: Any, model: Any = None, **settings: Any) -> JudgedProbe:
    """probe: a fitted `Probe`, which has its model and settings, or `ProbeWeights` or a file with a model.

    InputError where a model or settings are missing or too many.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(probe, Probe):
        if model is not None or given:
            named = ", ".join([*["model"] * (model is not None), *given])
            raise InputError(f"{named}: a fitted Probe has its own; give these with ProbeWeights or a probe file alone.")
        if not hasattr(probe, "classifier_"):
            raise InputError(f"probe {probe.name!r} is not fitted; call fit first.")
        return FittedProbe(probe)
    if model is None:
        what = repr(str(probe)) if isinstance(probe, (str, Path)) else type(probe).__name__
        raise InputError(f"{what} comes without a model; pass model=, the one that it was trained on.")
    return WeighedProbe(as_weights(probe), model, **given)


def inference_name(probe: JudgedProbe) -> str:
    return pooling_name(probe.inference)


def _probabilities(logits: Array) -> Array:
    """[n_examples n_classes] of logits [n_examples] or [n_examples n_classes]."""
    if logits.ndim == 1:
        return np.stack([expit(-logits), expit(logits)], axis=1)
    return softmax(logits, axis=1)
