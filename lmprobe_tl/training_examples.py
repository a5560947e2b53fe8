"""What a probe learns from: features and labels of prompts, or of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.artefact import pooling_name
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import make_classifier, own_pooling
from lmprobe_tl.estimators.contrast import check_paired
from lmprobe_tl.estimators.layer_stack import with_n_blocks
from lmprobe_tl.extraction import extract_rows
from lmprobe_tl.features import are_constant, constant_error
from lmprobe_tl.hook_points import load_model, resolve_hook_points
from lmprobe_tl.labels import are_token_labels, check_classes, check_labels, check_token_labels
from lmprobe_tl.pooling import PoolingStrategy, parse_pooling_strategy
from lmprobe_tl.probe_settings import feature_settings, rows_of
from lmprobe_tl.tokens import Prompt, bos_id, check_prompts, check_rows_count, counted_lengths, row_digest


@dataclass(frozen=True, eq=False)
class TrainingExamples:
    """features: [n_examples n_features]; labels: [n_examples]; groups: [n_examples], the prompt of each token, None where
    each example is a prompt; weight: [n_examples] or None; digests: of each prompt's token ids.

    offsets: [n_prompts+1] for a sequence classifier, whose features are those of tokens, in float32, and its labels those of
    prompts: prompt i has rows offsets[i] to offsets[i+1].
    """

    model: Any
    hook_names: tuple[str, ...]
    features: NDArray[Any]
    labels: NDArray[Any]
    groups: NDArray[np.int64] | None
    weight: NDArray[np.float64] | None
    digests: list[bytes]
    offsets: NDArray[np.int64] | None = None


def training_examples(probe: Any, prompts: Sequence[Prompt], labels: Any) -> TrainingExamples:
    """Prompts and labels as `Probe.fit` learns from them; InputError for what cannot be used, before the model runs."""
    train, _ = probe.poolings()
    prompts = check_prompts(prompts)
    per_token = are_token_labels(labels)
    if per_token and train != "all":
        raise InputError(
            f"labels has one sequence a prompt, but train_pooling is {pooling_name(train)!r}; token labels need 'all'."
        )
    if not per_token:
        labels = check_labels(labels, len(prompts))
        check_classes(labels)
    model = load_model(probe.model)
    names = resolve_hook_points(model, probe.hook_points)
    classifier = with_n_blocks(make_classifier(probe.classifier, probe.random_state), len(names))
    check_paired(classifier, labels, per_token=train == "all")
    rows = rows_of(probe, model, prompts)
    lengths = counted_lengths(rows, bos_id(model), probe.include_bos)
    digests = [row_digest(row) for row in rows]
    if own_pooling(probe.classifier) is not None:
        check_rows_count(lengths)
        tokens = _extracted(probe, model, rows, names, "all")
        features, offsets = tokens.concatenated().numpy(), tokens.offsets.numpy()
        return TrainingExamples(model, names, features, labels, None, None, digests, offsets)
    if train == "all":
        check_rows_count(lengths)
        groups = np.repeat(np.arange(len(rows)), lengths)
        y = np.concatenate(check_token_labels(labels, lengths)) if per_token else labels[groups]
    else:
        groups, y = None, labels
    check_classes(y)
    features = _extracted(probe, model, rows, names, train).concatenated().numpy().astype(np.float64)
    if are_constant(features):
        raise constant_error(train)
    weight = None
    if groups is not None and probe.equal_prompt_weight:
        weight = 1 / np.asarray(lengths, dtype=np.float64)[groups]
        weight *= len(weight) / weight.sum()  # as strong together as unweighted tokens: C keeps its meaning
    return TrainingExamples(model, names, features, y, groups, weight, digests)


def _extracted(probe: Any, model: Any, rows: list[list[int]], names: Sequence[str], pooling: str | PoolingStrategy) -> Any:
    if not callable(pooling) and pooling != "all":
        pooling = f"activation:{parse_pooling_strategy(pooling).base_strategy}"
    return extract_rows(model, rows, names, pooling, **feature_settings(probe, model))
