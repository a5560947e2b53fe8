"""What a probe has learnt: a fitted classifier, and all that is remembered of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.artefact import pooling_name
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import make_classifier, own_pooling
from lmprobe_tl.estimators.contrast import check_paired
from lmprobe_tl.estimators.fitting import fit_classifier
from lmprobe_tl.estimators.layer_stack import with_n_blocks
from lmprobe_tl.estimators.streaming import can_stream, fit_blocks, fit_features
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.features import are_constant, constant_error, evenly_spread
from lmprobe_tl.hook_points import load_model, normalization, resolve_hook_points
from lmprobe_tl.labels import are_token_labels, check_classes
from lmprobe_tl.probe_settings import text_settings
from lmprobe_tl.probe_spec import TrainingRecord
from lmprobe_tl.provenance import classifier_name, data_hash
from lmprobe_tl.store_examples import StoreExamples, check_store_is_of
from lmprobe_tl.training_examples import TrainingExamples


@dataclass(frozen=True, eq=False)
class Learnt:
    """labels, groups: label and prompt of each example, groups None where each is a prompt; digests: of each prompt's token
    ids; sample: some of the features, to prove on them that a linear rule says what the classifier says."""

    model: Any
    hook_names: tuple[str, ...]
    classifier: Any
    labels: NDArray[Any]
    groups: NDArray[np.int64] | None
    digests: Sequence[bytes]
    sample: NDArray[np.float64]


def training_record(probe: Any, learnt: Learnt) -> TrainingRecord:
    """What the file of the probe says of its training."""
    classes = check_classes(learnt.labels)
    return TrainingRecord(
        data_sha256=data_hash(learnt.digests, learnt.labels),
        n_prompts=len(learnt.digests),
        n_examples=len(learnt.labels),
        class_counts=tuple(int((learnt.labels == one).sum()) for one in classes),
        classifier=classifier_name(probe.classifier),
        random_state=probe.random_state,
    )


def learnt_from_examples(probe: Any, examples: TrainingExamples) -> Learnt:
    """What a probe learns from the `training_examples` of one with the same parameters."""
    names, digests = examples.hook_names, examples.digests
    classifier = with_n_blocks(make_classifier(probe.classifier, probe.random_state), len(names))
    features, y, groups = examples.features, examples.labels, examples.groups
    if examples.offsets is not None:
        sequences = TokenSequences(features, examples.offsets)
        return _learnt_from_sequences(examples.model, names, classifier, sequences, y, digests)
    fitted = fit_features(probe.classifier, classifier, features, y, groups=groups, sample_weight=examples.weight)
    sample = features[evenly_spread(len(features))]
    return Learnt(examples.model, names, fitted, y, groups, digests, sample)


def learnt_from_store(probe: Any, store: ActivationStore | str | Path, labels: Any) -> Learnt:
    """What a probe learns from a store; see `Probe.fit_store`."""
    store = store if isinstance(store, ActivationStore) else ActivationStore(store)
    train, _ = probe.poolings()
    if callable(train):
        raise InputError(f"pooling {pooling_name(train)!r} is a function, and a store holds named poolings alone.")
    model = load_model(probe.model)
    names = resolve_hook_points(model, probe.hook_points)
    # These raise before the model's weights are read.
    reads_sequences = own_pooling(probe.classifier) is not None
    pooling = "all" if reads_sequences else train
    store.hook_names(names)
    store.check_pooling(pooling)
    store.check_complete()
    check_store_is_of(store, model, include_bos=probe.include_bos, **text_settings(probe))
    classifier = with_n_blocks(make_classifier(probe.classifier, probe.random_state), len(names))
    if reads_sequences and are_token_labels(labels):
        raise InputError(f"labels has one sequence a prompt; {classifier_name(probe.classifier)} takes one label a prompt.")
    examples = StoreExamples(
        store,
        names,
        pooling,
        labels,
        centre=normalization(model) == "layernorm",
        equal_prompt_weight=probe.equal_prompt_weight,
    )
    check_paired(classifier, examples.labels, per_token=train == "all")
    digests = [bytes(row) for row in store.digests()]
    if reads_sequences:
        sequences = TokenSequences(examples.in_memory(np.float32)[0], np.concatenate([[0], np.cumsum(store.lengths())]))
        of_prompts = examples.labels[sequences.offsets[:-1]]
        return _learnt_from_sequences(model, names, classifier, sequences, of_prompts, digests)
    if can_stream(probe.classifier):
        fitted = fit_blocks(probe.classifier, classifier, examples.blocks, examples.classes)
    else:
        features, weight = examples.in_memory()
        fitted = fit_classifier(classifier, features, examples.labels, groups=examples.groups, sample_weight=weight)
    return Learnt(model, names, fitted, examples.labels, examples.groups, digests, examples.sample())


def _learnt_from_sequences(
    model: Any,
    names: tuple[str, ...],
    classifier: Any,
    sequences: TokenSequences,
    labels: NDArray[Any],
    digests: list[bytes],
) -> Learnt:
    """By a sequence classifier; equal prompts are never both learnt from and held out for early stopping."""
    sample = np.asarray(sequences.values[evenly_spread(len(sequences.values))], dtype=np.float64)
    if are_constant(sample):
        raise constant_error("all")
    classifier.fit(sequences, labels, groups=np.unique(digests, return_inverse=True)[1])
    return Learnt(model, names, classifier, labels, None, digests, sample)
