"""Fitted classifiers on a model's activations: logits and probabilities of prompts or of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit, logit
from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.fitting import logits_of, probabilities_of
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.extraction import extract_rows
from lmprobe_tl.forward_batches import Batch, run_batches, token_activations
from lmprobe_tl.pooling import PoolingStrategy, parse_pooling_strategy, reduce_scores
from lmprobe_tl.probe_spec import OWN_POOLING
from lmprobe_tl.reductions import REDUCTIONS
from lmprobe_tl.tokens import bos_id, check_rows_count, counted_lengths

_SEES_BOS = ("last_token", "first_token")
_TINY = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class TokenOutputs:
    """Outputs for each token that counts, prompt after prompt.

    logits: [n_tokens] or [n_tokens n_classes]; probabilities: [n_tokens n_classes]; lengths: tokens of each prompt.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    lengths: list[int]

    def by_prompt(self, values: np.ndarray) -> list[np.ndarray]:
        return np.split(values, np.cumsum(self.lengths)[:-1])

    def padded(self, values: np.ndarray) -> np.ndarray:
        """[n_prompts pos] for two classes, [n_prompts pos n_classes] else; NaN where a prompt has no such token."""
        if values.ndim == 2 and values.shape[1] == 2:
            values = values[:, 1]
        result = np.full((len(self.lengths), max(self.lengths), *values.shape[1:]), np.nan)
        for row, part in enumerate(self.by_prompt(values)):
            result[row, : len(part)] = part
        return result

    def winners(self) -> np.ndarray:
        return self.probabilities.argmax(axis=1)


def token_outputs(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    classifiers: Sequence[Any],
    *,
    include_bos: bool,
    **settings: Any,
) -> list[TokenOutputs]:
    """Outputs of every token that counts, of each of several classifiers on the same features."""
    lengths = counted_lengths(rows, bos_id(model), include_bos)
    check_rows_count(lengths)
    logits: list[list[Any]] = [[None] * len(rows) for _ in classifiers]
    probabilities: list[list[Any]] = [[None] * len(rows) for _ in classifiers]
    for batch, features in _token_features(model, rows, hook_names, include_bos, settings):
        ends = np.cumsum([lengths[index] for index in batch.indices])[:-1]
        for at, classifier in enumerate(classifiers):
            pieces = zip(
                batch.indices,
                np.split(logits_of(classifier, features), ends),
                np.split(probabilities_of(classifier, features), ends),
                strict=True,
            )
            for index, piece_logits, piece_probabilities in pieces:
                logits[at][index], probabilities[at][index] = piece_logits, piece_probabilities
    return [
        TokenOutputs(np.concatenate(one), np.concatenate(both), lengths)
        for one, both in zip(logits, probabilities, strict=True)
    ]


def prompt_outputs(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    classifiers: Sequence[Any],
    pooling: str | PoolingStrategy,
    *,
    include_bos: bool,
    **settings: Any,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits ([n] or [n n_classes]) and probabilities [n n_classes] of each prompt under an inference pooling, of each of
    several classifiers on the same features."""
    if pooling == OWN_POOLING:
        return _reduced_by_classifiers(model, rows, hook_names, classifiers, include_bos=include_bos, **settings)
    if not callable(pooling):
        parsed = parse_pooling_strategy(pooling)
        if parsed.is_score_pooling:
            return _score_pooled(model, rows, hook_names, classifiers, pooling, include_bos=include_bos, **settings)
        pooling = f"activation:{parsed.base_strategy}"
    features = extract_rows(model, rows, hook_names, pooling, include_bos=include_bos, **settings).concatenated()
    values = features.numpy().astype(np.float64)
    return [(logits_of(one, values), probabilities_of(one, values)) for one in classifiers]


def _reduced_by_classifiers(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    classifiers: Sequence[Any],
    *,
    include_bos: bool,
    **settings: Any,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of sequence classifiers, which get all tokens of a prompt."""
    lengths = counted_lengths(rows, bos_id(model), include_bos)
    check_rows_count(lengths)
    found = [np.empty(len(rows)) for _ in classifiers]
    for batch, features in _token_features(model, rows, hook_names, include_bos, settings):
        offsets = np.concatenate([[0], np.cumsum([lengths[index] for index in batch.indices])])
        sequences = TokenSequences(features, offsets)
        for classifier, logits in zip(classifiers, found, strict=True):
            logits[batch.indices] = classifier.decision_function(sequences)
    return [(logits, np.stack([expit(-logits), expit(logits)], axis=1)) for logits in found]


def _score_pooled(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    classifiers: Sequence[Any],
    pooling: str,
    *,
    include_bos: bool,
    **settings: Any,
) -> list[tuple[np.ndarray, np.ndarray]]:
    name = parse_pooling_strategy(pooling).base_strategy
    n_classes = len(classifiers[0].classes_)
    if REDUCTIONS[name].on == "logit" and n_classes > 2:
        raise InputError(f"inference pooling {pooling!r} works on the logit of two classes; this probe has {n_classes}.")
    sees_bos = include_bos or name in _SEES_BOS
    check_rows_count(counted_lengths(rows, bos_id(model), sees_bos))
    found: list[tuple[list[Any], list[Any]]] = [([None] * len(rows), [None] * len(rows)) for _ in classifiers]
    for batch, features in _token_features(model, rows, hook_names, sees_bos, settings):
        mask = batch.mask(sees_bos, torch.device("cpu"))
        for classifier, (logits, probabilities) in zip(classifiers, found, strict=True):
            reduced = _reduced(classifier, features, mask, pooling, name)
            for index, one, both in zip(batch.indices, *reduced, strict=True):
                logits[index], probabilities[index] = one, both
    return [(np.array(logits), np.array(probabilities)) for logits, probabilities in found]


def _reduced(classifier: Any, features: np.ndarray, mask: Tensor, pooling: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    def spread(values: np.ndarray) -> Tensor:
        full = torch.zeros(*mask.shape, *values.shape[1:], dtype=torch.float64)
        full[mask] = torch.from_numpy(np.asarray(values, dtype=np.float64))
        return full

    binary = len(classifier.classes_) == 2
    if binary and REDUCTIONS[name].on == "logit":
        reduced = reduce_scores(spread(logits_of(classifier, features)), pooling, mask).numpy()
        return reduced, np.stack([expit(-reduced), expit(reduced)], axis=1)
    probabilities = reduce_scores(spread(probabilities_of(classifier, features)), pooling, mask).numpy()
    if not binary:
        with np.errstate(divide="ignore"):
            return np.log(probabilities), probabilities
    if REDUCTIONS[name].selects:
        # On logits, where scores near 0 and 1 stay apart.
        return reduce_scores(spread(logits_of(classifier, features)), pooling, mask).numpy(), probabilities
    return logit(np.clip(probabilities[:, 1], _TINY, 1 - _TINY)), probabilities


def _token_features(
    model: Any, rows: list[list[int]], hook_names: Sequence[str], sees_bos: bool, settings: dict[str, Any]
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with the activations [n_tokens n_features] (float64) of its tokens, row after row."""
    centre, batching = settings["centre"], {name: value for name, value in settings.items() if name != "centre"}

    def keep(activations: Tensor, batch: Batch) -> Tensor:
        return token_activations(activations, batch, sees_bos, centre=centre)

    for batch, kept in run_batches(model, rows, hook_names, keep, **batching):
        yield batch, torch.cat([kept[name].cpu() for name in hook_names], dim=-1).numpy().astype(np.float64)
