"""Which probes can score which model: the checks before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lmprobe_tl.direction_blocks import blocks_with_a_sum
from lmprobe_tl.errors import IncompatibleProbeError, ModelMismatchWarning
from lmprobe_tl.hook_points import layer_count, model_record, unknown_hook_point, width
from lmprobe_tl.probe_spec import ModelRecord, ProbeSpec
from lmprobe_tl.tokens import tokenizer_record
from lmprobe_tl.weights import ProbeWeights


def check_compatible(model: Any, probes: Sequence[ProbeWeights], *, strict: bool = False) -> None:
    """Raise where a probe cannot score this model; warn, or raise if `strict`, where it was made with another one."""
    # Of a thousand probes, each would ask the model for the same again.
    hook_points, here = model.hook_dict, model_record(model)
    known = getattr(model, "tokenizer", None) is not None and any(one.spec.tokenizer.fingerprint for one in probes)
    vocabulary = tokenizer_record(model, None).fingerprint if known else None
    for weights in probes:
        spec = weights.spec
        for hook_name in spec.hook_points:
            if hook_name not in hook_points:
                raise IncompatibleProbeError(
                    f"probe {spec.name!r} cannot be attached: {unknown_hook_point(model, hook_name)}"
                )
        if spec.d_model != width(model):
            raise IncompatibleProbeError(
                f"probe {spec.name!r} expects d_model {spec.d_model}, but this model has {width(model)}. It was trained on "
                f"{spec.model.id if spec.model else 'another model'!r}; load that model."
            )
        if spec.n_layers is not None and spec.n_layers != layer_count(model):
            raise IncompatibleProbeError(
                f"probe {spec.name!r} was trained on a model of {spec.n_layers} layers, but this one has "
                f"{layer_count(model)}."
            )
        for difference in _differences(spec, here, vocabulary):
            if strict:
                raise IncompatibleProbeError(f"probe {spec.name!r}: {difference}")
            warnings.warn(
                f"probe {spec.name!r}: {difference} Its scores may mean something else.", ModelMismatchWarning, stacklevel=5
            )


def _differences(spec: ProbeSpec, here: ModelRecord, vocabulary: str | None) -> Iterator[str]:
    there = spec.model
    if there.config_fingerprint is not None and there.config_fingerprint != here.config_fingerprint:
        yield (
            f"trained on {there.id!r} (config {there.config_fingerprint}), "
            f"attached to {here.id!r} ({here.config_fingerprint})."
        )
    elif there.id is not None and not _same_name(there.id, here.id):
        yield f"trained on {there.id!r}, attached to {here.id!r}, a model of the same shape."
    fingerprint = spec.tokenizer.fingerprint
    if fingerprint is not None and vocabulary is not None and fingerprint != vocabulary:
        yield f"trained with another tokenizer (vocabulary {fingerprint}, here {vocabulary})."


def _same_name(one: str, other: str | None) -> bool:
    """Whether two names are one; HookedTransformer leaves out the organisation, 'gpt2' for 'openai-community/gpt2'."""
    return one == other or one.endswith(f"/{other}") or str(other).endswith(f"/{one}")


def needs_raw_basis(probe: ProbeWeights, hook_name: str) -> bool:
    """Whether the probe reads this hook point in the raw basis alone; where its direction sums to zero, any will do."""
    if hook_name not in probe.hook_points or probe.spec.residual_basis != "raw":
        return False
    return bool(blocks_with_a_sum(probe.direction_at(hook_name), probe.d_model).any())
