"""What a fitted `Probe` has learnt, as the frozen `ProbeWeights` that is saved, shared and attached."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.direction_blocks import centred_direction
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.fitted_head import FittedHead, fitted_head
from lmprobe_tl.estimators.linear_rule import linear_rule
from lmprobe_tl.estimators.torch_classifier import TorchClassifier
from lmprobe_tl.hook_points import layer_count, model_record, normalization, width
from lmprobe_tl.pooling import PoolingStrategy
from lmprobe_tl.probe_poolings import check_reads_as_fitted
from lmprobe_tl.probe_spec import HeadRecord, PoolingRecord, ProbeSpec
from lmprobe_tl.provenance import package_versions
from lmprobe_tl.tokens import tokenizer_record
from lmprobe_tl.weights import ProbeWeights


def artefact_of(probe: Any) -> ProbeWeights:
    """The weights of a fitted probe, without a threshold.

    InputError for a pooling that a file cannot name, NonlinearClassifierError for a classifier that is of no kind of
    probe, and whose decisions no linear rule gives.
    """
    check_is_fitted(probe, "classifier_")
    check_reads_as_fitted(probe)
    train, inference = probe.poolings()
    for side in (train, inference):
        if callable(side):
            raise InputError(
                f"pooling {pooling_name(side)!r} is a function, and a probe file holds no code; use a named pooling to save."
            )
    d_model, norm = width(probe.model_), normalization(probe.model_)
    if norm == "layernorm" and inference in ("activation:max", "activation:min"):
        raise InputError(
            f"inference pooling {inference!r} on a LayerNorm model depends on whether its weights "
            "were centred, so such a "
            "probe would not mean the same elsewhere; use 'score:max' or another pooling to save."
        )
    head = _head_of(probe)
    direction = torch.from_numpy(head.direction)
    if norm == "layernorm":
        direction = centred_direction(direction, d_model)
    spec = ProbeSpec(
        name=probe.name,
        hook_points=tuple(probe.hook_names_),
        d_model=d_model,
        n_layers=layer_count(probe.model_),
        kind=head.kind,
        head=HeadRecord(
            n_hidden=head.n_hidden, degree=head.degree, rank=head.rank, n_heads=head.n_heads, window=head.window
        ),
        labels=tuple(probe.classes_.tolist()),
        model=model_record(probe.model_),
        tokenizer=tokenizer_record(probe.model_, probe.prepend_bos),
        residual_basis="any" if norm == "layernorm" else "raw",
        normalization=norm,
        pooling=PoolingRecord(train=str(train), inference=str(inference), include_bos=probe.include_bos),
        training=probe.training_,
        versions=package_versions(),
    )
    return ProbeWeights(
        direction.float(),
        torch.from_numpy(head.intercept).float(),
        spec,
        None if head.readout is None else torch.from_numpy(head.readout).float(),
        None if head.readout_intercept is None else torch.from_numpy(head.readout_intercept).float(),
    )


def _head_of(probe: Any) -> FittedHead:
    """The head that a classifier trained with torch has learnt, or the linear rule of any other."""
    classifier = getattr(probe.classifier_, "best_estimator_", probe.classifier_)
    if isinstance(classifier, TorchClassifier):
        return fitted_head(classifier)
    rule = linear_rule(probe.classifier_, probe._sample)
    return FittedHead(kind="linear", direction=rule.direction, intercept=rule.intercept)


def pooling_name(pooling: str | PoolingStrategy) -> str:
    """A strategy as given, or the name of a callable."""
    return pooling if isinstance(pooling, str) else getattr(pooling, "__name__", type(pooling).__name__)
