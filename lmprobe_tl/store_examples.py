"""Labelled examples that stand in an activation store, read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import DTypeLike, NDArray

from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.estimators.blocks import Block
from lmprobe_tl.features import are_constant, constant_error, evenly_spread
from lmprobe_tl.forward_batches import centred
from lmprobe_tl.hook_points import end_of_sequence_ids
from lmprobe_tl.labels import are_token_labels, check_classes, check_labels, check_token_labels
from lmprobe_tl.tokens import bos_id, tokenizer_record
from lmprobe_tl.weights_fingerprint import weights_sha256

_BLOCK_ELEMENTS = 2**22  # 32 MiB of float64


class StoreExamples:
    """Features and labels of a store's prompts or, with pooling 'all', tokens; one block of them in memory at a time.

    labels: one a prompt, or with pooling 'all' one sequence a prompt. centre: take each hook point's mean over d_model off.
    Learnt from the labels: `classes`, `labels` [n_examples], `groups` [n_examples] with pooling 'all', else None.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_names: Sequence[str],
        pooling: str,
        labels: Any,
        *,
        centre: bool,
        equal_prompt_weight: bool = False,
    ) -> None:
        self._store, self._hook_names, self._pooling, self._centre = store, list(hook_names), pooling, centre
        per_token = are_token_labels(labels)
        if per_token and pooling != "all":
            raise InputError(f"labels has one sequence a prompt, but pooling is {pooling!r}; token labels need 'all'.")
        lengths = store.lengths() if pooling == "all" else np.ones(store.n_prompts, dtype=np.int64)
        self.groups = np.repeat(np.arange(store.n_prompts), lengths) if pooling == "all" else None
        if per_token:
            self.labels = np.concatenate(check_token_labels(labels, lengths.tolist()))
        else:
            self.labels = np.repeat(check_labels(labels, store.n_prompts), lengths)
        self.classes = check_classes(self.labels)
        self._class_index = np.searchsorted(self.classes, self.labels)
        self._weights: NDArray[np.float64] | None = None  # one a prompt
        if equal_prompt_weight and pooling == "all":
            self._weights = lengths.sum() / store.n_prompts / lengths  # as strong together as unweighted tokens
        self._sample: dict[int, NDArray[np.float64]] = {}
        self._is_sampled = False

    def blocks(self) -> Iterator[Block]:
        """One pass over all examples, in order. InputError at the end of the first where all of them are the same."""
        n_features = len(self._hook_names) * self._store.manifest.d_model
        wanted, is_first, done = evenly_spread(len(self.labels)), not self._is_sampled, 0
        for chunk in self._store.chunks(self._hook_names, self._pooling, max_rows=max(1, _BLOCK_ELEMENTS // n_features)):
            values = rearrange(chunk.values, "n (hook d_model) -> n hook d_model", hook=len(self._hook_names))
            values = centred(values) if self._centre else values
            features = rearrange(values, "n hook d_model -> n (hook d_model)").numpy().astype(np.float64)
            rows = slice(done, done + len(features))
            if is_first:
                for index in wanted[np.searchsorted(wanted, rows.start) : np.searchsorted(wanted, rows.stop)]:
                    self._sample[int(index)] = features[index - done].copy()
            weight = None if self._weights is None else self._weights[chunk.prompts]
            yield Block(features, self._class_index[rows], weight)
            done += len(features)
        self._is_sampled = True
        if is_first and are_constant(self.sample()):
            raise constant_error(self._pooling)

    def sample(self) -> NDArray[np.float64]:
        """Some of the features that the first pass saw, evenly spread, [n n_features]."""
        return np.stack([self._sample[index] for index in sorted(self._sample)])

    def in_memory(self, dtype: DTypeLike = np.float64) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
        """All features [n_examples n_features] at once, and their weights."""
        features, weights = [], []
        for block in self.blocks():
            features.append(block.features.astype(dtype, copy=False))
            if block.weight is not None:
                weights.append(block.weight)
        return np.concatenate(features), np.concatenate(weights) if weights else None


def check_store_is_of(
    store: ActivationStore,
    model: Any,
    *,
    prepend_bos: bool | None,
    include_bos: bool,
    max_length: int | None,
    truncation: str | None,
) -> None:
    """Raise StoreError where a store was not made with this model and these settings, saying what differs."""
    manifest, tokenizer = store.manifest, tokenizer_record(model, prepend_bos)
    pairs = {
        "weights": (manifest.weights_sha256[:16], weights_sha256(model)[:16]),
        "tokenizer": (manifest.tokenizer.fingerprint, tokenizer.fingerprint),
        "chat template": (manifest.tokenizer.chat_template_fingerprint, tokenizer.chat_template_fingerprint),
        "BOS id": (manifest.bos_id, bos_id(model)),
        "EOS ids": (manifest.eos_ids, end_of_sequence_ids(model)),
        "prepend_bos": (manifest.tokenizer.prepend_bos, tokenizer.prepend_bos),
        "include_bos": (manifest.include_bos, include_bos),
        "max_length": (manifest.max_length, max_length),
        "truncation": (manifest.truncation, truncation),
    }
    different = [f"{name} {there!r}, here {here!r}" for name, (there, here) in pairs.items() if there != here]
    if different:
        raise StoreError(
            f"{str(store.path)!r} was not made as this probe sees its prompts: {'; '.join(different)}. Extract with the "
            "probe's model and settings, or give the probe those of the store."
        )
