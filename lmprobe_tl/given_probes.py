"""Probes as users give them: weights, fitted estimators or files, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmprobe_tl.errors import InputError
from lmprobe_tl.probe_file import load_probe
from lmprobe_tl.weights import ProbeWeights


def as_probes(probes: Any) -> list[ProbeWeights]:
    """One probe or a list of them, as `ProbeWeights` for the raw residual stream, under distinct names."""
    listed = list(probes) if isinstance(probes, (list, tuple)) else [probes]
    if not listed:
        raise InputError("no probe to attach: the list is empty.")
    loaded = [as_weights(probe).to_raw_basis() for probe in listed]
    names = [weights.name for weights in loaded]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"two probes are named {repeated[0]!r}, and the name is the key of the scores; use weights.renamed(...)."
        )
    return loaded


def as_weights(probe: Any) -> ProbeWeights:
    """The ProbeWeights of a probe given as such, as a fitted estimator, or as the path of its file."""
    if isinstance(probe, ProbeWeights):
        return probe
    if isinstance(probe, (str, Path)):
        return load_probe(probe)
    if hasattr(probe, "to_weights"):
        return probe.to_weights()
    raise InputError(
        f"{type(probe).__name__} is no probe; expected ProbeWeights, a fitted Probe, or the path of a probe file."
    )


def recorded_prepend_bos(probes: Sequence[ProbeWeights]) -> bool | None:
    """Whether the probes were trained with BOS prepended, None where they do not say; InputError where they differ."""
    recorded = {weights.spec.tokenizer.prepend_bos for weights in probes if weights.spec.tokenizer.fingerprint is not None}
    if len(recorded) > 1:
        raise InputError(
            "some of the probes were trained with a BOS token and some without; run them apart, or pass prepend_bos."
        )
    return recorded.pop() if recorded else None
