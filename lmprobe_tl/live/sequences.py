"""Sequences as a live run sees them: where each probe's alarm came, and how high its running score went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tqdm.auto import tqdm

from lmprobe_tl.errors import InputError
from lmprobe_tl.generation import monitored_generate
from lmprobe_tl.hook_points import context_length
from lmprobe_tl.live.records import Alarm
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.scoring import live_unit, score_batches
from lmprobe_tl.tokens import (
    Prompt,
    batches_by_length,
    bos_id,
    check_rows_count,
    token_budget,
    tokenize_prompts,
)
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True)
class LiveSequence:
    """One sequence and what a probe's live run said of it.

    n_tokens: all tokens, BOS and a final EOS included. prompt_length: how many of them were given and not generated; with
    whole texts just a leading BOS, so that the text counts as if it had been generated. crossing: index of the first token
    at which the running score reached the threshold, as `Alarm.position`, or None. maximum: of the running score, in
    `live_unit`.
    """

    n_tokens: int
    prompt_length: int
    crossing: int | None
    maximum: float

    @property
    def n_generated(self) -> int:
        return self.n_tokens - self.prompt_length

    @property
    def lead(self) -> int | None:
        """Tokens from the crossing to the end of the sequence: how many came after it. 0 if the last token crossed."""
        return None if self.crossing is None else self.n_tokens - 1 - self.crossing

    @property
    def saved(self) -> int:
        """Generated tokens after the crossing, which a stop would have left out: `monitored_generate(stop=True)` keeps the
        token that crossed and none after it. All of them where the prompt itself crossed; 0 without a crossing."""
        return 0 if self.lead is None else min(self.lead, self.n_generated)


SeenSequences: TypeAlias = dict[str, list[LiveSequence]]  # by probe name, one a prompt in their order


def whole_texts(model: Any, rows: list[list[int]], probes: list[ProbeWeights], **running: Any) -> SeenSequences:
    """What live runs say of whole texts, given as token ids; running: as in `score_batches`."""
    seen: dict[str, list[Any]] = {weights.name: [None] * len(rows) for weights in probes}
    bos = bos_id(model)

    def read(indices: list[int], monitor: Monitor) -> None:
        alarms = monitor.alarms()
        for weights in probes:
            maxima = monitor.runs[-1].maxima(weights.name, live_unit(weights))
            for index, raised, maximum in zip(indices, alarms, maxima.tolist(), strict=True):
                row = rows[index]
                given = int(row[0] == bos)
                seen[weights.name][index] = LiveSequence(len(row), given, _crossing(raised, weights.name), maximum)

    score_batches(model, rows, probes, read, **running)
    return seen


def _crossing(alarms: Sequence[Alarm], name: str) -> int | None:
    return next((alarm.position for alarm in alarms if alarm.probe == name), None)


def rows_to_continue(
    model: Any, prompts: Sequence[Prompt], max_new_tokens: int, *, max_length: int | None, **texts: Any
) -> list[list[int]]:
    """Token ids of prompts that leave room for the continuation."""
    context = context_length(model)
    if context is not None and context <= max_new_tokens:
        raise InputError(f"max_new_tokens is {max_new_tokens}, but the model's context has only {context} tokens.")
    if context is not None:
        room = context - max_new_tokens
        max_length = room if max_length is None else min(max_length, room)
    rows = tokenize_prompts(model, prompts, max_length=max_length, add_generation_prompt=True, **texts)
    check_rows_count([len(row) for row in rows])
    return rows


def continued_texts(
    model: Any,
    rows: list[list[int]],
    probes: list[ProbeWeights],
    max_new_tokens: int,
    sampling: dict[str, Any],
    *,
    max_tokens_per_batch: int | None,
    batch_size: int | None,
    progress: bool | None,
    strict: bool,
) -> SeenSequences:
    """What live runs say of prompts, given as token ids, and their continuations; sampling: as in `monitored_generate`."""
    seen: dict[str, list[Any]] = {weights.name: [None] * len(rows) for weights in probes}
    hidden = None if progress is None else not progress
    with tqdm(total=len(rows), desc="generation", unit="prompt", disable=hidden, leave=False) as bar:
        lengths = [len(row) + max_new_tokens for row in rows]
        for indices in batches_by_length(lengths, batch_size, max_tokens=token_budget(model, max_tokens_per_batch)):
            prompts = [np.array(rows[index], dtype=np.int64) for index in indices]
            results = monitored_generate(model, prompts, probes, max_new_tokens=max_new_tokens, strict=strict, **sampling)
            for weights in probes:
                for index, one in zip(indices, results, strict=True):
                    crossing = _crossing(one.alarms, weights.name)
                    seen[weights.name][index] = LiveSequence(
                        len(one.tokens), one.prompt_length, crossing, one.maxima[weights.name]
                    )
            bar.update(len(indices))
    return seen
