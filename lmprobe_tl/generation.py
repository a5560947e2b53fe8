"""Generate with probes attached: prompts in, text with live scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError, PromptTooLongError
from lmprobe_tl.hook_points import context_length, device_of, end_of_sequence_ids, forward_once, load_model
from lmprobe_tl.live_events import OnToken
from lmprobe_tl.live_run import Alarm, LiveRun
from lmprobe_tl.monitor import Monitor, as_probes, attach_probes, recorded_prepend_bos
from lmprobe_tl.tokens import Prompt, pad_id, pad_rows, tokenize_prompts


@dataclass(frozen=True)
class GenerationResult:
    """One row of a monitored generation.

    text: what was generated, without special tokens. tokens: prompt and generated token ids [n], no pads; the first
    `prompt_length` are the prompt.
    scores: logits by probe name, [n] or [n n_classes], one for each token from the first on; the last sampled token has none
    unless it was asked for. running: the running score after each of these.
    alarms: first crossing of each probe. stopped_by: the name of the probe that ended the row, 'eos', or 'max_new_tokens'.
    """

    text: str
    tokens: Tensor
    prompt_length: int
    scores: dict[str, Tensor]
    running: dict[str, Tensor]
    alarms: tuple[Alarm, ...]
    stopped_by: str


def monitored_generate(
    model: Any,
    prompts: Sequence[Prompt],
    probes: Any,
    *,
    max_new_tokens: int = 64,
    stop: bool = False,
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

    probes: as in `attach_probes`. stop: end a row at the first token whose running score reaches a probe's threshold; that
    token is the row's last. A prompt that crosses by itself gets no continuation. on_token: called with a `TokenEvent` for
    each token as it is scored. prepend_bos: None does as the probe files say. score_last_token: score the last sampled token
    too, by one more forward pass over the whole batch. Sampling follows `TransformerBridge.generate` and torch's global
    seed; `do_sample=False` is greedy.

    Raises what `attach_probes` raises, and PromptTooLongError where prompt and new tokens exceed the model's context.

    >>> results = monitored_generate(model, ["Dear diary,"], weights, max_new_tokens=64, stop=True)  # doctest: +SKIP
    >>> results[0].text, results[0].scores["deceit"], results[0].stopped_by  # doctest: +SKIP
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; expected an integer of at least 1.")
    model = load_model(model)
    loaded = as_probes(probes)
    prepend = recorded_prepend_bos(loaded) if prepend_bos is None else prepend_bos
    rows = tokenize_prompts(model, prompts, prepend_bos=prepend, add_generation_prompt=True)
    _check_lengths(model, rows, max_new_tokens)
    # Left padding: generation continues at the right edge of every row.
    tokens, mask = pad_rows(rows, pad_token_id=pad_id(model), side="left", device=device_of(model))
    eos = end_of_sequence_ids(model)
    with attach_probes(model, loaded, on_token=on_token, strict=strict) as monitor:
        output = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            stop_at_eos=bool(eos),
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            use_past_kv_cache=use_past_kv_cache,
            return_type="tokens",
            verbose=False,
            stopping_criteria=monitor.stopping_criteria() if stop else None,
        )
        ends = _ends(monitor, rows, output[:, tokens.shape[1] :], eos, stop)
        finished = [row + generated for row, (generated, _) in zip(rows, ends, strict=True)]
        run, last = monitor.runs[-1], None
        if score_last_token:
            last = _score_again(model, monitor, finished)
    return [_result(model, run, last, index, rows[index], finished[index], ends[index][1]) for index in range(len(rows))]


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
    monitor: Monitor, rows: list[list[int]], generated: Tensor, eos: tuple[int, ...], stop: bool
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
            # The token after the crossing was sampled already, before the stop could act: it goes.
            ids, reason = ids[: max(0, raised[0].position + 1 - len(row))], raised[0].probe
        ends.append((ids, reason))
    return ends


def _score_again(model: Any, monitor: Monitor, rows: list[list[int]]) -> LiveRun:
    tokens, mask = pad_rows(rows, pad_token_id=pad_id(model), side="left", device=device_of(model))
    monitor.begin_run()
    forward_once(model, tokens, mask)
    return monitor.runs[-1]


def _result(
    model: Any, run: LiveRun, last: LiveRun | None, index: int, prompt: list[int], tokens: list[int], stopped_by: str
) -> GenerationResult:
    scores = {name: run.row_logits(name)[index][: len(tokens)] for name in run.plan.probes}
    running = {name: run.row_running(name)[index][: len(tokens)] for name in run.plan.probes}
    alarms = run.row_alarms()[index]
    if last is not None:
        # Of the extra pass only what is missing: the scores that were seen live stay the ones reported.
        scores = {name: torch.cat([seen, last.row_logits(name)[index][len(seen) :]]) for name, seen in scores.items()}
        running = {name: torch.cat([seen, last.row_running(name)[index][len(seen) :]]) for name, seen in running.items()}
        raised = {alarm.probe for alarm in alarms}
        alarms += tuple(a for a in last.row_alarms()[index] if a.probe not in raised and a.position == len(tokens) - 1)
    text = model.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True) if model.tokenizer is not None else ""
    return GenerationResult(text, torch.tensor(tokens), len(prompt), scores, running, alarms, stopped_by)
