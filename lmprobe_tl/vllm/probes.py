"""Probes for an engine: what it has to be started with, and the checks that they fit the model that it serves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmprobe_tl.errors import EngineError, ModelMismatchWarning
from lmprobe_tl.given_probes import as_probes
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.probe_file import probe_to_bytes
from lmprobe_tl.provenance import vocabulary_fingerprint
from lmprobe_tl.vllm import _compat, wire
from lmprobe_tl.vllm.structure import CONFIG_KEY, WORKER_CLASS, ResidualPoint, Structure, check_shape
from lmprobe_tl.weights import ProbeWeights


def engine_kwargs(probes: Any, *, capacity: int | None = None, **engine_args: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM` or `AsyncEngineArgs` with which the engine can run these probes.

    capacity: columns to reserve at each hook point (a binary probe takes one), so that more probes can be loaded later.
    engine_args: vLLM's own, which come back with `worker_cls` and `additional_config` filled in. EngineError where these are
    taken.
    """
    _compat.check_version()
    plan = ScoringPlan(as_probes(probes))
    for name in plan.hooks:
        ResidualPoint.of(name)
    if engine_args.get("worker_cls", "auto") not in ("auto", WORKER_CLASS):
        raise EngineError(
            f"worker_cls is {engine_args['worker_cls']!r}; probes need {WORKER_CLASS!r}, and an engine has one worker class."
        )
    others = dict(engine_args.get("additional_config") or {})
    if CONFIG_KEY in others:
        raise EngineError(f"additional_config has {CONFIG_KEY!r} already; leave it to this function.")
    config = others | Structure.of(plan, capacity).to_config()
    return engine_args | {"worker_cls": WORKER_CLASS, "additional_config": config}


def check_fits_model(probes: Sequence[ProbeWeights], config: Any, tokenizer: Any) -> None:
    """Raise IncompatibleProbeError where a probe cannot score the served model; warn where it was made with another one.

    config: `vllm_config` of the engine.
    """
    sizes = _compat.sizes_of(config)
    vocabulary = None if tokenizer is None else vocabulary_fingerprint(tokenizer)
    for weights in probes:
        spec = weights.spec
        check_shape(weights, sizes.d_model, sizes.n_layers)
        served = str(config.model_config.model)
        # a folder of a hub's cache is called models--organisation--name/snapshots/revision
        names = {part.split("--")[-1] for part in Path(served).parts}
        trained = spec.model.id
        if trained is not None and trained.split("/")[-1] not in names:
            _warn(f"probe {spec.name!r}: trained on {trained!r}, served is {served!r}, a model of the same shape.")
        fingerprint = spec.tokenizer.fingerprint
        if fingerprint is not None and vocabulary is not None and fingerprint != vocabulary:
            _warn(f"probe {spec.name!r}: trained with another tokenizer (vocabulary {fingerprint}, here {vocabulary}).")


def _warn(text: str) -> None:
    warnings.warn(f"{text} Its scores may mean something else.", ModelMismatchWarning, stacklevel=4)


def load_message(plan: ScoringPlan, bos_token_id: int | None) -> bytes:
    """What `lmprobe_load` of the workers takes."""
    return wire.encode(wire.Load([probe_to_bytes(weights) for weights in plan.probes.values()], bos_token_id))


def check_loaded(answers: Sequence[bytes], plan: ScoringPlan) -> bool:
    """Whether the worker that reports of the probes is on the last pipeline stage. EngineError where none reports."""
    reports = [found for found in (wire.decode(answer, wire.Loaded) for answer in answers) if found.hook_points]
    if len(reports) != 1:
        raise EngineError(f"{len(reports)} workers report the hook points {', '.join(plan.hooks)}; expected one.")
    return reports[0].is_last_stage


def check_agreement(states: Sequence[wire.State]) -> None:
    """EngineError where two workers have computed different scores for the same tokens, as a faulty device would."""
    found = [state.first_readings for state in states if state.first_readings]
    for other in found[1:]:
        if any(abs(one - two) > 1e-3 * max(1.0, abs(one)) for one, two in zip(found[0], other, strict=True)):
            raise EngineError(f"workers disagree on the scores of the first tokens: {found[0][:4]} and {other[:4]}.")
