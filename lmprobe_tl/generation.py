"""Generate with probes attached: prompts in, text with live scores out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import InputError, PromptTooLongError
from lmprobe_tl.generate_call import generate_without_mask, ignores
from lmprobe_tl.given_probes import as_probes, recorded_prepend_bos
from lmprobe_tl.hook_points import context_length, device_of, end_of_sequence_ids, forward_once, inference_mode, load_model
from lmprobe_tl.live.records import Alarm, Escalate, OnCrossing, OnToken, first_alarms, verdicts_of
from lmprobe_tl.live.run import LiveRun
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.special_tokens import frame_ids
from lmprobe_tl.tokens import Prompt, pad_id, pad_rows, tokenize_prompts


@dataclass(frozen=True)
class GenerationResult:
    """One row of a monitored generation.

    text: what was generated, without special tokens. tokens: prompt and generated token ids [n], no pads; the first
    `prompt_length` are the prompt.
    scores: logits by probe name, [n] or [n n_classes], one for each token from the first on; the last sampled token has none
    unless it was asked for. running: the running score after each of these.
    alarms: first crossing of each probe. stopped_by: the name of the probe that ended the row, 'eos', or 'max_new_tokens'.
    verdicts: by name of each probe with two classes 'negative' or 'positive', and in a cascade also 'deferred', 'confirmed'
    or 'cleared'.
    maxima: by name of each probe with two classes, the highest running score in the unit that thresholds are calibrated in:
    a logit, or a probability for means of probabilities. NaN where nothing has counted.
    """

    text: str
    tokens: Tensor
    prompt_length: int
    scores: dict[str, Tensor]
    running: dict[str, Tensor]
    alarms: tuple[Alarm, ...]
    stopped_by: str
    verdicts: dict[str, str]
    maxima: dict[str, float] = field(default_factory=dict)


def monitored_generate(
    model: Any,
    prompts: Sequence[Prompt],
    probes: Any,
    *,
    max_new_tokens: int = 64,
    stop: bool = False,
    keep_crossing: bool = True,
    on_crossing: OnCrossing | None = None,
    escalate: Escalate | Mapping[str, Escalate] | None = None,
    on_token: OnToken | None = None,
    score_last_token: bool = False,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    strict: bool = False,
) -> list[GenerationResult]:
    """Generate from all prompts as one batch and score every token live; results in the order of the prompts.

    probes: as in `attach_probes`. stop: end a row at the first token whose running score reaches a probe's threshold. No
    token is sampled after it: it is the row's last, or, with keep_crossing=False, the one before it is. A prompt that
    crosses by itself gets no continuation. on_crossing, escalate: as in `attach_probes`. on_token: called with a
    `TokenEvent` for each token as it is scored, the crossing one included. prepend_bos: None does as the probe files say.
    score_last_token: score the last sampled token too, by one more forward pass over the whole batch. Sampling follows
    the model's own `generate` and torch's global seed; `do_sample=False` is greedy.

    Raises what `attach_probes` raises, InputError for an encoder, and PromptTooLongError where prompt and new tokens exceed
    the model's context.

    >>> results = monitored_generate(model, ["Dear diary,"], weights, max_new_tokens=64, stop=True)  # doctest: +SKIP
    >>> results[0].text, results[0].scores["deceit"], results[0].stopped_by  # doctest: +SKIP
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; expected an integer of at least 1.")
    if not isinstance(stop, bool):
        raise InputError(
            f"stop is {stop!r}; expected True (a row ends where any attached probe reaches its threshold) or False."
        )
    for name, function, of in (("on_token", on_token, "TokenEvent"), ("on_crossing", on_crossing, "Alarm")):
        if function is not None and not callable(function):
            raise InputError(f"{name} is {function!r}; expected a function of one {of}, or None.")
    model = load_model(model)
    if frame_ids(model) is not None:
        raise InputError(
            "this model is an encoder, which generates nothing. Score whole texts with score_prompts, or run the model in "
            "an attach_probes block."
        )
    loaded = as_probes(probes)
    prepend = recorded_prepend_bos(loaded) if prepend_bos is None else prepend_bos
    rows = tokenize_prompts(model, prompts, prepend_bos=prepend, add_generation_prompt=True)
    _check_lengths(model, rows, max_new_tokens)
    # Left padding: generation continues at the right edge of every row.
    tokens, mask = pad_rows(rows, pad_token_id=pad_id(model), side="left", device=device_of(model))
    eos = end_of_sequence_ids(model)
    # Without an EOS a stop has nothing to put after the crossing token, and has to act a token later.
    forces = stop and bool(eos)
    with (
        inference_mode(model),
        attach_probes(
            model, loaded, on_token=on_token, stop=forces, on_crossing=on_crossing, escalate=escalate, strict=strict
        ) as monitor,
    ):
        settings = {
            "max_new_tokens": max_new_tokens,
            "stop_at_eos": bool(eos),
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "use_past_kv_cache": use_past_kv_cache,
            "return_type": "tokens",
            "verbose": False,
        }
        criteria = monitor.stopping_criteria() if stop and not forces else None
        if ignores(model, "attention_mask"):
            output = generate_without_mask(model, tokens, mask, settings, end_ids=eos)
        else:
            output = model.generate(tokens, attention_mask=mask, stopping_criteria=criteria, **settings)
        ends = _ends(monitor, rows, output[:, tokens.shape[1] :], eos, stop, keep_crossing)
        finished = [row + generated for row, (generated, _) in zip(rows, ends, strict=True)]
        live = _Scores.of(monitor.runs[-1])
        if score_last_token:
            live = live.completed(_Scores.of(_score_again(model, monitor, finished)), [len(row) for row in finished])
    binary = [weights.name for weights in loaded if weights.is_binary]
    return [
        _result(model, live, index, prompt, tokens, reason, binary)
        for index, (prompt, tokens, (_, reason)) in enumerate(zip(rows, finished, ends, strict=True))
    ]


def _check_lengths(model: Any, rows: list[list[int]], max_new_tokens: int) -> None:
    empty = [index for index, row in enumerate(rows) if not row]
    if empty:
        raise InputError(f"prompt {empty[0]} has no token; generation needs at least one (a BOS will do).")
    context = context_length(model)
    too_long = [index for index, row in enumerate(rows) if context is not None and len(row) + max_new_tokens > context]
    if too_long:
        raise PromptTooLongError(
            f"prompt {too_long[0]} has {len(rows[too_long[0]])} tokens; with "
            f"max_new_tokens={max_new_tokens} that exceeds the model's "
            f"context of {context}. Shorten the prompt or generate less.",
            too_long,
        )


def _ends(
    monitor: Monitor, rows: list[list[int]], generated: Tensor, eos: tuple[int, ...], stop: bool, keep_crossing: bool
) -> list[tuple[list[int], str]]:
    """For each row its generated token ids up to its own end, and what ended it."""
    alarms = monitor.alarms() if stop else [()] * len(rows)
    ends: list[tuple[list[int], str]] = []
    for row, ids, raised in zip(rows, generated.tolist(), alarms, strict=True):
        reason = "max_new_tokens"
        at_eos = next((at for at, token in enumerate(ids) if token in eos), None)
        if at_eos is not None:
            ids, reason = ids[: at_eos + 1], "eos"
        if raised:
            # What follows the crossing is not the model's own: the EOS of the stop, or a token sampled before it acted.
            ids, reason = ids[: max(0, raised[0].position + keep_crossing - len(row))], raised[0].probe
        ends.append((ids, reason))
    return ends


def _score_again(model: Any, monitor: Monitor, rows: list[list[int]]) -> LiveRun:
    tokens, mask = pad_rows(rows, pad_token_id=pad_id(model), side="left", device=device_of(model))
    monitor.begin_run(again=True)
    forward_once(model, tokens, mask)
    return monitor.runs[-1]


@dataclass(frozen=True)
class _Scores:
    """Everything that a run says of its rows: logits and running scores by probe name and row, and its crossings.

    watched: the running scores of binary probes once more, in the unit that they are computed in.
    """

    logits: dict[str, list[Tensor]]
    running: dict[str, list[Tensor]]
    watched: dict[str, list[Tensor]]
    events: tuple[Alarm, ...]

    @staticmethod
    def of(run: LiveRun) -> _Scores:
        names = list(run.plan.probes)
        logits = {name: run.token_scores(name) for name in names}
        run.collect()
        running = {name: run.running_scores(name) for name in names}
        watched = {
            name: run.running_scores(name, run.plan.reductions[name].own_unit)
            for name in names
            if run.plan.probes[name].is_binary
        }
        return _Scores(logits, running, watched, tuple(run.events))

    def completed(self, last: _Scores, lengths: list[int]) -> _Scores:
        """With the scores of `last` where there are none here: those that were seen live stay the ones reported."""
        events = self.events + tuple(event for event in last.events if event.position == lengths[event.row] - 1)
        return _Scores(
            _completed(self.logits, last.logits),
            _completed(self.running, last.running),
            _completed(self.watched, last.watched),
            events,
        )


def _completed(live: dict[str, list[Tensor]], last: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {
        name: [torch.cat([seen, again[len(seen) :]]) for seen, again in zip(rows, last[name], strict=True)]
        for name, rows in live.items()
    }


def _result(
    model: Any, live: _Scores, index: int, prompt: list[int], tokens: list[int], stopped_by: str, binary: list[str]
) -> GenerationResult:
    def of_row(scores: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: rows[index][: len(tokens)] for name, rows in scores.items()}

    events = [event for event in live.events if event.row == index]
    text = model.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True) if model.tokenizer is not None else ""
    return GenerationResult(
        text=text,
        tokens=torch.tensor(tokens),
        prompt_length=len(prompt),
        scores=of_row(live.logits),
        running=of_row(live.running),
        alarms=next(iter(first_alarms(events).values()), ()),
        stopped_by=stopped_by,
        verdicts={name: verdicts_of(events, name).get(index, "negative") for name in binary},
        maxima={name: _maximum(row) for name, row in of_row(live.watched).items()},
    )


def _maximum(running: Tensor) -> float:
    counted = running[~running.isnan()]  # NaN stands before the first position that counts
    return counted.max().item() if len(counted) else math.nan
