"""Monitored generation: live scores are those of a full recompute, a stop ends its row and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import Tiny
from live_reference import (
    BOS,
    EOS,
    PROMPTS,
    assert_row,
    assert_same,
    encode,
    expected_running,
    features_of,
    left_padded,
    make_probe,
    many_probes,
)

from lmprobe_tl.errors import InputError, MonitorError, PromptTooLongError
from lmprobe_tl.generation import GenerationResult, monitored_generate
from lmprobe_tl.live.records import TokenEvent
from lmprobe_tl.weights import ProbeWeights

NEW = 8


def generate(tiny: Tiny, probes: Any, prompts: Any = PROMPTS, **settings: Any) -> list[GenerationResult]:
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    return monitored_generate(tiny.bridge, prompts, probes, **settings)


def plain_rows(tiny: Tiny, **settings: Any) -> list[list[int]]:
    """Token rows of the model's own generation, without any probe, cut at EOS."""
    prompts = [encode(tiny, text) for text in PROMPTS]
    tokens, mask = left_padded(prompts)
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    output = tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **settings)
    rows = []
    for prompt, generated in zip(prompts, output[:, tokens.shape[1] :].tolist(), strict=True):
        ends = tiny.bridge.cfg.eos_token_id
        cut = next((at + 1 for at, token in enumerate(generated) if token == ends), len(generated))
        rows.append(prompt + generated[:cut])
    return rows


def token_of_one_row(rows: Sequence[Sequence[int]], tiny: Tiny, row: int) -> int:
    """A token that this row generates, not at the very end, and no other row does."""
    generated = [list(ids[len(encode(tiny, text)) :]) for ids, text in zip(rows, PROMPTS, strict=True)]
    others = {token for index, ids in enumerate(generated) if index != row for token in ids}
    return next(token for token in generated[row][:-2] if token not in others)


# --- scores ---


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_every_live_score_equals_a_full_recompute(tiny: Tiny, do_sample: bool, use_past_kv_cache: bool) -> None:
    probes = many_probes()
    torch.manual_seed(5)
    results = generate(tiny, probes, do_sample=do_sample, use_past_kv_cache=use_past_kv_cache)
    assert [result.prompt_length for result in results] == [len(encode(tiny, text)) for text in PROMPTS]
    for result, text in zip(results, PROMPTS, strict=True):
        ids = result.tokens.tolist()
        assert ids[: result.prompt_length] == encode(tiny, text)
        assert result.text == tiny.tokenizer.decode(ids[result.prompt_length :], skip_special_tokens=True)
        ended = ids[-1] == EOS
        assert result.stopped_by == ("eos" if ended else "max_new_tokens")
        assert ended or len(ids) == result.prompt_length + NEW
        # The last sampled token was never seen by the model.
        assert_row(tiny, ids[:-1], probes, result.scores, result.running)
        assert_same(result.scores["alias"], result.scores["canonical"])


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
def test_the_cache_is_used_or_not_as_asked(gpt2: Tiny, use_past_kv_cache: bool) -> None:
    widths: list[int] = []
    watch = [("blocks.0.hook_in", lambda activations, hook: widths.append(activations.shape[1]))]
    with gpt2.bridge.hooks(fwd_hooks=watch):
        (result,) = generate(gpt2, make_probe(), ["cats"], max_new_tokens=4, use_past_kv_cache=use_past_kv_cache)
    prompt = result.prompt_length
    assert widths == ([prompt, 1, 1, 1] if use_past_kv_cache else [prompt, prompt + 1, prompt + 2, prompt + 3])


@pytest.mark.parametrize("hook_name", ["blocks.1.hook_in", "blocks.2.hook_resid_post"])
def test_one_probe_one_prompt_and_one_new_token(tiny: Tiny, hook_name: str) -> None:
    probe = make_probe(hook_points=hook_name)
    (result,) = generate(tiny, probe, ["rain and sun"], max_new_tokens=1)
    assert len(result.tokens) == result.prompt_length + 1
    assert_row(tiny, result.tokens.tolist()[:-1], [probe], result.scores, result.running)


def test_one_prompt_scores_the_same_alone_and_among_others(tiny: Tiny) -> None:
    probes = many_probes()
    together = generate(tiny, probes)
    for result, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = generate(tiny, probes, [prompt])
        assert alone.tokens.tolist() == result.tokens.tolist()
        for probe in probes:
            assert_same(alone.scores[probe.name], result.scores[probe.name])


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
def test_nothing_after_a_rows_end_of_sequence_is_scored(
    tiny: Tiny, use_past_kv_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = many_probes()
    free = plain_rows(tiny)
    end = token_of_one_row(free, tiny, row=1)
    monkeypatch.setattr(tiny.bridge.cfg, "eos_token_id", end)
    results = generate(tiny, probes, use_past_kv_cache=use_past_kv_cache)
    assert [result.stopped_by for result in results] == ["max_new_tokens", "eos", "max_new_tokens"]
    start = results[1].prompt_length
    assert results[1].tokens.tolist() == free[1][: free[1].index(end, start) + 1]
    assert [results[row].tokens.tolist() for row in (0, 2)] == [free[0], free[2]]
    for result in results:
        assert_row(tiny, result.tokens.tolist()[:-1], probes, result.scores, result.running)


def test_rows_may_end_at_any_of_several_end_of_sequence_tokens(gpt2: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    free = plain_rows(gpt2)
    ends = [token_of_one_row(free, gpt2, row=0), token_of_one_row(free, gpt2, row=1), EOS]
    monkeypatch.setattr(gpt2.bridge.cfg, "eos_token_id", ends)
    results = generate(gpt2, many_probes())
    assert [result.stopped_by for result in results] == ["eos", "eos", "max_new_tokens"]
    for result in results:
        assert_row(gpt2, result.tokens.tolist()[:-1], many_probes(), result.scores, result.running)


def test_the_text_has_no_special_tokens_and_the_tokens_have(gpt2: Tiny) -> None:
    steps: list[int] = []

    def end_at_the_third_step(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        steps.append(0)
        changed = logits.clone()
        changed[:, -1, EOS] = 1e4 if len(steps) == 3 else -1e4
        return changed

    with gpt2.bridge.hooks(fwd_hooks=[("unembed.hook_out", end_at_the_third_step)]):
        (result,) = generate(gpt2, make_probe(), ["cats"])
    assert (result.stopped_by, len(result.tokens), result.tokens[-1]) == ("eos", result.prompt_length + 3, EOS)
    assert result.text == gpt2.tokenizer.decode(result.tokens[result.prompt_length : -1])
    assert "<eos>" not in result.text


def test_an_end_of_sequence_token_in_the_prompt_ends_nothing(llama: Tiny) -> None:
    prompts = [torch.tensor([EOS, 5, EOS, 9]), torch.tensor([7, 8, 9, 10, 11, EOS])]
    results = generate(llama, many_probes(), prompts)
    for result, prompt in zip(results, prompts, strict=True):
        assert result.prompt_length == len(prompt) < len(result.tokens)
        assert_row(llama, result.tokens.tolist()[:-1], many_probes(), result.scores, result.running)


def test_the_last_token_gets_exactly_one_score_on_request(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = many_probes()
    end = token_of_one_row(plain_rows(tiny), tiny, row=1)
    monkeypatch.setattr(tiny.bridge.cfg, "eos_token_id", end)
    events: list[TokenEvent] = []
    without = generate(tiny, probes)
    with_last = generate(tiny, probes, score_last_token=True, on_token=events.append)
    assert [result.stopped_by for result in with_last] == ["max_new_tokens", "eos", "max_new_tokens"]
    for row, (short, long) in enumerate(zip(without, with_last, strict=True)):
        assert long.tokens.tolist() == short.tokens.tolist()
        assert_row(tiny, long.tokens.tolist(), probes, long.scores, long.running)
        for probe in probes:
            # what was seen live stays as it was
            torch.testing.assert_close(long.scores[probe.name][:-1], short.scores[probe.name], rtol=0, atol=0)
        assert_events([event for event in events if event.row == row], long)
        assert long.alarms[: len(short.alarms)] == short.alarms


def test_the_last_token_alone_can_raise_the_alarm(gpt2: Tiny) -> None:
    free = generate(gpt2, make_probe(), score_last_token=True)
    probe, row = crossing_probe(gpt2, [result.tokens.tolist() for result in free], columns=slice(-1, None))
    live = generate(gpt2, probe)
    asked = generate(gpt2, probe, score_last_token=True)
    assert [result.alarms for result in live] == [(), (), ()]
    last = len(asked[row].tokens) - 1
    assert [[alarm.position for alarm in result.alarms] for result in asked] == [
        [last] if index == row else [] for index in range(3)
    ]
    assert asked[row].stopped_by == "max_new_tokens"


def test_sampled_text_is_what_it_would_have_been_without_probes(tiny: Tiny) -> None:
    for settings in ({"temperature": 0.7, "top_k": 20}, {"top_p": 0.9, "use_past_kv_cache": False}):
        torch.manual_seed(11)
        plain = plain_rows(tiny, do_sample=True, **settings)
        torch.manual_seed(11)
        monitored = generate(tiny, many_probes(), do_sample=True, **settings)
        assert [result.tokens.tolist() for result in monitored] == plain
        assert plain != plain_rows(tiny, do_sample=True, **settings)  # the control: another state of the generator


def test_greedy_text_is_that_of_hugging_face(tiny: Tiny) -> None:
    for result, prompt in zip(generate(tiny, make_probe()), PROMPTS, strict=True):
        ids = torch.tensor([encode(tiny, prompt)])
        expected = tiny.reference.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=EOS)
        assert result.tokens.tolist() == expected[0].tolist()


def test_chats_go_through_the_template_with_a_generation_prompt(gpt2: Tiny) -> None:
    chat = [{"role": "user", "content": "cats"}]
    (result,) = generate(gpt2, make_probe(), [chat], max_new_tokens=2)
    text = gpt2.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert result.tokens[: result.prompt_length].tolist() == encode(gpt2, text, bos=False)
    assert_row(gpt2, result.tokens.tolist()[:-1], [make_probe()], result.scores, result.running)


def test_prepend_bos_follows_the_probe_file_unless_it_is_asked_for(gpt2: Tiny) -> None:
    from lmprobe_tl.tokens import tokenizer_record

    without = make_probe(tokenizer=tokenizer_record(gpt2.bridge, False))
    with_bos = make_probe("q", tokenizer=tokenizer_record(gpt2.bridge, True))
    lengths = [len(encode(gpt2, text, bos=False)) for text in PROMPTS]
    assert [one.prompt_length for one in generate(gpt2, without)] == lengths
    assert [one.prompt_length for one in generate(gpt2, without, prepend_bos=True)] == [length + 1 for length in lengths]
    with pytest.raises(InputError, match="some of the probes were trained with a BOS token and some without"):
        generate(gpt2, [without, with_bos])
    assert [one.prompt_length for one in generate(gpt2, [without, with_bos], prepend_bos=False)] == lengths


# --- stopping ---


def crossing_probe(
    tiny: Tiny, rows: Sequence[Sequence[int]], columns: slice, **probe_settings: Any
) -> tuple[ProbeWeights, int]:
    """A probe whose largest token logit of all rows stands among these generated columns of one row, and a threshold below
    that alone; with the row."""
    for seed in range(200):
        probe = make_probe(seed=seed, **probe_settings)
        logits = [probe.logits(features_of(tiny, ids, probe)) for ids in rows]
        scores = torch.cat([one[int(ids[0] == BOS) :] for one, ids in zip(logits, rows, strict=True)])
        first, second = scores.topk(2).values.tolist()
        for row, (ids, text) in enumerate(zip(rows, PROMPTS, strict=True)):
            generated = list(range(len(encode(tiny, text)), len(ids)))
            if first - second > 0.05 and any(float(logits[row][at]) == first for at in generated[columns]):
                return probe.with_threshold((first + second) / 2, unit="logit"), row
    raise AssertionError("no seed gives such a probe")


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
def test_a_stop_ends_its_row_at_the_first_crossing_and_leaves_the_others_alone(tiny: Tiny, use_past_kv_cache: bool) -> None:
    free = plain_rows(tiny)
    probe, row = crossing_probe(tiny, free, columns=slice(1, -2))
    bystander = make_probe("bystander", "blocks.0.hook_out", seed=3).with_threshold(1e6, unit="logit")
    unstopped = generate(tiny, [bystander, probe], use_past_kv_cache=use_past_kv_cache)
    stopped = generate(tiny, [bystander, probe], use_past_kv_cache=use_past_kv_cache, stop=True)
    (alarm,) = unstopped[row].alarms
    assert [result.stopped_by for result in stopped] == ["p" if at == row else unstopped[at].stopped_by for at in range(3)]
    for index, (one, other) in enumerate(zip(stopped, unstopped, strict=True)):
        end = alarm.position + 1 if index == row else len(other.tokens)
        assert one.tokens.tolist() == other.tokens.tolist()[:end] == free[index][:end]
        seen = one.tokens.tolist() if index == row else one.tokens.tolist()[:-1]
        assert_row(tiny, seen, [bystander, probe], one.scores, one.running)
        assert one.alarms == other.alarms
    assert stopped[row].prompt_length < len(stopped[row].tokens) < len(free[row])
    logits = probe.logits(features_of(tiny, free[row], probe))
    assert (alarm.probe, alarm.row, alarm.token_id) == ("p", row, free[row][alarm.position])
    assert alarm.position == int((logits >= alarm.threshold).nonzero()[0])
    assert alarm.logit == pytest.approx(float(logits[alarm.position]), rel=1e-4)
    assert alarm.score == alarm.logit  # the largest so far
    assert (alarm.threshold, alarm.unit) == (probe.threshold.value, "logit")  # type: ignore[union-attr]


def test_a_crossing_by_the_last_forward_pass_still_takes_back_the_token_after_it(tiny: Tiny) -> None:
    free = plain_rows(tiny)
    probe, row = crossing_probe(tiny, free, columns=slice(-2, -1))
    stopped = generate(tiny, probe, stop=True)
    assert stopped[row].tokens.tolist() == free[row][:-1]
    assert stopped[row].stopped_by == "p"
    assert len(stopped[row].scores["p"]) == len(stopped[row].tokens)


def test_a_prompt_that_crosses_gets_no_continuation(tiny: Tiny) -> None:
    prompt_rows = [encode(tiny, text) for text in PROMPTS]
    probe = make_probe(seed=2)
    best = [float(probe.logits(features_of(tiny, row, probe))[int(row[0] == BOS) :].max()) for row in prompt_rows]
    row = best.index(max(best))
    threshold = sorted(best)[-1] - 1e-3
    results = generate(tiny, probe.with_threshold(threshold, unit="logit"), stop=True, score_last_token=True)
    assert results[row].tokens.tolist() == prompt_rows[row]
    assert (results[row].text, results[row].stopped_by) == ("", "p")
    assert len(results[row].scores["p"]) == len(prompt_rows[row])
    assert results[row].alarms[0].position < len(prompt_rows[row])
    assert all(
        len(result.tokens) > result.prompt_length for at, result in enumerate(results) if at != row and not result.alarms
    )


def test_generation_ends_once_every_row_has_stopped(llama: Tiny) -> None:
    passes: list[Any] = []
    handle = llama.bridge.original_model.register_forward_pre_hook(lambda *_: passes.append(0))
    try:
        results = generate(llama, make_probe().with_threshold(0.0), stop=True, max_new_tokens=30)
    finally:
        handle.remove()
    assert len(passes) == 1
    assert [result.stopped_by for result in results] == ["p"] * 3
    # BOS does not count, so that the first alarm is at the first token of the text.
    assert [result.alarms[0].position for result in results] == [1, 1, 1]


def test_each_row_is_stopped_by_the_probe_that_crosses_first(gpt2: Tiny) -> None:
    free = plain_rows(gpt2)
    early, early_row = crossing_probe(gpt2, free, columns=slice(1, 3))
    late, late_row = crossing_probe(gpt2, free, columns=slice(4, -2), name="q", hook_points="blocks.3.hook_resid_post")
    both = {alarm.probe: alarm for result in generate(gpt2, [late, early]) for alarm in result.alarms}
    assert both["p"].row == early_row
    assert both["q"].row == late_row
    expected = ["max_new_tokens"] * 3
    expected[late_row] = "q"
    if early_row != late_row or both["p"].position < both["q"].position:
        expected[early_row] = "p"
    assert [result.stopped_by for result in generate(gpt2, [late, early], stop=True)] == expected
    same_row = make_probe("r").with_threshold(0.0)
    assert [result.stopped_by for result in generate(gpt2, [late, same_row, early], stop=True)] == ["r"] * 3


@pytest.mark.parametrize("unit", ["logit", "probability"])
@pytest.mark.parametrize("inference", ["score:max", "score:mean", "mean", "score:ema_max(0.5)", "all"])
def test_a_threshold_read_off_a_running_score_is_reached_by_that_very_score(gpt2: Tiny, inference: str, unit: str) -> None:
    probe = make_probe(seed=7, inference=inference)
    raised = generate(gpt2, probe.with_threshold(0.0 if unit == "probability" else -1e6, unit=unit))
    assert all(result.alarms[0].position == 1 and result.alarms[0].unit == unit for result in raised)
    reached = max(raised, key=lambda result: result.alarms[0].score)
    value = reached.alarms[0].score
    found = generate(gpt2, probe.with_threshold(value, unit=unit))[reached.alarms[0].row].alarms[0]
    assert (found.position, found.score, found.threshold) == (1, value, value)
    above = float(torch.nextafter(torch.tensor(value), torch.tensor(torch.inf)))
    later = generate(gpt2, probe.with_threshold(above, unit=unit))[reached.alarms[0].row].alarms
    assert all(alarm.position > 1 and alarm.score > value for alarm in later)


@pytest.mark.parametrize("inference", ["score:max", "mean", "score:mean", "score:last_token", "score:softmax(2)"])
def test_thresholds_as_probability_and_as_logit_raise_the_same_alarms(gpt2: Tiny, inference: str) -> None:
    probability = 0.6
    logit = float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
    probe = make_probe(seed=7, inference=inference)
    as_probability = generate(gpt2, probe.with_threshold(probability))
    as_logit = generate(gpt2, probe.with_threshold(logit, unit="logit"))
    found = [result.alarms for result in as_probability]
    assert sum(map(len, found)) > 0
    for ours, theirs in zip(as_probability, as_logit, strict=True):
        assert [alarm.position for alarm in ours.alarms] == [alarm.position for alarm in theirs.alarms]
        for one, other in zip(ours.alarms, theirs.alarms, strict=True):
            # each score in its threshold's unit
            assert one.score >= one.threshold == pytest.approx(probability)
            assert other.score >= other.threshold == pytest.approx(logit)
            assert torch.tensor(other.score).sigmoid().item() == pytest.approx(one.score, rel=1e-5)


def test_without_a_threshold_of_its_own_a_probe_flags_at_one_half(gpt2: Tiny) -> None:
    probe = make_probe(seed=7)
    for result in generate(gpt2, probe):
        ids = result.tokens.tolist()[:-1]
        over = (expected_running(features_of(gpt2, ids, probe), probe, ids) >= 0.5).nonzero().flatten().tolist()
        assert [alarm.position for alarm in result.alarms] == over[:1]
        assert all((alarm.threshold, alarm.unit) == (0.5, "probability") for alarm in result.alarms)


def test_stopping_needs_a_probe_with_two_classes(gpt2: Tiny) -> None:
    with pytest.raises(InputError, match="no attached probe has two classes"):
        generate(gpt2, make_probe(n_classes=3), stop=True)
    assert all(result.alarms == () for result in generate(gpt2, make_probe(n_classes=3)))


# --- events ---


def assert_events(events: Sequence[TokenEvent], result: GenerationResult) -> None:
    """One event for each scored position of the row, in order, with the result's values."""
    names = [name for name, scores in result.scores.items() if scores.ndim == 1]
    assert [event.position for event in events] == list(range(len(result.scores[names[0]])))
    assert [event.token_id for event in events] == result.tokens.tolist()[: len(events)]
    assert [event.generated for event in events] == [event.position >= result.prompt_length for event in events]
    for name in names:
        assert [event.logits[name] for event in events] == result.scores[name].tolist()
        running = [float("nan") if event.running[name] is None else event.running[name] for event in events]
        torch.testing.assert_close(torch.tensor(running), result.running[name], rtol=0, atol=0, equal_nan=True)
    assert all(list(event.logits) == list(event.running) == names for event in events)
    assert tuple(alarm for event in events for alarm in event.alarms) == result.alarms
    assert all(alarm.position == event.position for event in events for alarm in event.alarms)


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("stop", [False, True], ids=["free", "stop"])
def test_each_scored_token_is_told_exactly_once(
    gpt2: Tiny, stop: bool, use_past_kv_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = plain_rows(gpt2)
    probe, stopped_row = crossing_probe(gpt2, free, columns=slice(1, -2))
    ended_row = next(row for row in (0, 1, 2) if row != stopped_row)
    monkeypatch.setattr(gpt2.bridge.cfg, "eos_token_id", token_of_one_row(free, gpt2, ended_row))
    events: list[TokenEvent] = []
    results = generate(gpt2, [*many_probes(), probe], stop=stop, on_token=events.append, use_past_kv_cache=use_past_kv_cache)
    for row, result in enumerate(results):
        assert_events([event for event in events if event.row == row], result)
    # in the order of arrival: the prompts row by row, then a row after the other in every step
    prompts = [(row, at) for row, result in enumerate(results) for at in range(result.prompt_length)]
    steps = sorted(
        (at - results[row].prompt_length, row, at)
        for row, result in enumerate(results)
        for at in range(result.prompt_length, len(result.scores["p"]))
    )
    assert [(event.row, event.position) for event in events] == prompts + [(row, at) for _, row, at in steps]


def test_running_is_none_before_the_first_token_that_counts(gpt2: Tiny) -> None:
    events: list[TokenEvent] = []
    generate(gpt2, make_probe(), ["cats"], on_token=events.append, max_new_tokens=2)
    assert [event.running["p"] is None for event in events] == [event.position == 0 for event in events]


def test_an_exception_in_the_callback_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    before = plain_rows(tiny)

    def fail(event: TokenEvent) -> None:
        if event.generated:
            raise KeyError("stop here")

    with pytest.raises(KeyError, match="stop here"):
        generate(tiny, many_probes(), on_token=fail)
    assert not [name for name, point in tiny.bridge.hook_dict.items() if point.fwd_hooks or point._forward_hooks]
    assert not tiny.bridge.original_model._forward_pre_hooks
    assert plain_rows(tiny) == before


# --- requests that cannot be met ---


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_the_number_of_new_tokens_must_be_a_positive_integer(gpt2: Tiny, bad: Any) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens is .*; expected an integer of at least 1"):
        generate(gpt2, make_probe(), max_new_tokens=bad)


def test_prompt_and_new_tokens_must_fit_the_context(gpt2: Tiny) -> None:
    prompts = ["cats", torch.arange(5, 95)]
    with pytest.raises(
        PromptTooLongError, match=r"prompt 1 has 90 tokens; with max_new_tokens=7 .* context of 96"
    ) as caught:
        generate(gpt2, make_probe(), prompts, max_new_tokens=7)
    assert caught.value.rows == [1]
    (_, result) = generate(gpt2, make_probe(), prompts, max_new_tokens=6, score_last_token=True)
    assert result.stopped_by == "eos" or len(result.tokens) == 96
    assert len(result.scores["p"]) == len(result.tokens)


def test_a_prompt_without_any_token_is_refused(gpt2: Tiny) -> None:
    with pytest.raises(InputError, match="prompt 1 has no token; generation needs at least one"):
        generate(gpt2, make_probe(), ["cats", ""], prepend_bos=False)
    assert len(generate(gpt2, make_probe(), ["cats", ""], max_new_tokens=2)[1].tokens) == 3


def test_activations_that_are_not_finite_are_an_error_and_no_score(gpt2: Tiny) -> None:
    calls: list[int] = []

    def spoil(activations: torch.Tensor, hook: Any) -> torch.Tensor:
        calls.append(activations.shape[1])
        spoiled = activations.clone()
        spoiled[1, -1] = torch.nan
        return spoiled if len(calls) == 3 else activations

    with gpt2.bridge.hooks(fwd_hooks=[("blocks.2.hook_out", spoil)]), pytest.raises(MonitorError) as caught:
        generate(gpt2, make_probe())
    assert f"not finite at position {len(encode(gpt2, PROMPTS[1])) + 1} of row 1" in str(caught.value)
