"""Running maxima of whole sequences, which thresholds are set on: as TransformerLens computes them, or a vLLM engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.activation_source import (
    Engine,
    bare_model_of,
    check_installed,
    chosen_engine,
    engine_options,
    model_dtype,
    running_kind,
)
from lmprobe_tl.compatibility import check_compatible
from lmprobe_tl.hook_points import load_model
from lmprobe_tl.scoring import live_unit, prompt_rows, sequence_maxima
from lmprobe_tl.tokens import Prompt
from lmprobe_tl.weights import ProbeWeights


class LensMaxima:
    """By a model of TransformerLens. remark: what a record adds to the name of the number; dtype: in which it computes."""

    remark = ""

    def __init__(self, model: Any, weights: ProbeWeights, batching: dict[str, Any], strict: bool) -> None:
        self._model, self._weights, self._options = load_model(model), weights, {**batching, "strict": strict}
        self.dtype = model_dtype(self._model)

    def of(self, prompts: Sequence[Prompt], progress: bool | None, **tokenizing: Any) -> NDArray[np.float32]:
        """[n_prompts], in `live_unit`."""
        found = sequence_maxima(
            self._model,
            prompts,
            self._weights,
            unit=live_unit(self._weights),
            progress=progress,
            **tokenizing,
            **self._options,
        )
        return found.numpy()


class EngineMaxima:
    """By a running engine, which must have this probe. Its kernels and its dtype are those that will serve."""

    def __init__(self, engine: Any, weights: ProbeWeights, strict: bool) -> None:
        self._engine, self._weights = engine, weights
        self._model, self.dtype = bare_model_of(engine), engine.dtype
        if strict:
            check_compatible(self._model, [weights], strict=True)
        self.remark = f", scored by vLLM in {self.dtype}"

    def of(self, prompts: Sequence[Prompt], progress: bool | None, **tokenizing: Any) -> NDArray[np.float32]:
        """[n_prompts], in `live_unit`."""
        rows = prompt_rows(self._model, prompts, [self._weights], **tokenizing)
        return self._engine.sequence_maxima(rows, self._weights.name, live_unit(self._weights), progress=progress).numpy()


@contextmanager
def maxima_source(
    model: Any,
    weights: ProbeWeights,
    engine: Engine | None = None,
    *,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    strict: bool = False,
) -> Iterator[LensMaxima | EngineMaxima]:
    """What computes the maxima of a probe's live score. engine: None for what the model tells, a ProbedLLM or a model.

    An engine that is given scores with this probe inside the block, and with its own again after it.
    """
    if chosen_engine(model, engine, "ProbedLLM") == "transformer_lens":
        batching = {"max_tokens_per_batch": max_tokens_per_batch, "batch_size": batch_size}
        yield LensMaxima(model, weights, batching, strict)
        return
    is_running = running_kind(model) is not None
    options = engine_options(max_tokens_per_batch, batch_size, is_running=is_running)
    if not is_running:
        check_installed()
        from lmprobe_tl.vllm.offline import ProbedLLM

        with ProbedLLM(model, probes=[weights], **options) as started:
            yield EngineMaxima(started, weights, strict)
        return
    before = model.probes
    model.replace_probes([weights])
    try:
        yield EngineMaxima(model, weights, strict)
    finally:
        model.replace_probes(before)
