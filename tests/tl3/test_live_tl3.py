"""Live scores under TransformerLens 3.9: of every way to run or generate, those of a full recompute with Hugging Face."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import PROMPTS, assert_monitor, assert_row, expected_logits, make_probe, padded, some_probes

from lmprobe_tl import attach_probes, monitored_generate
from lmprobe_tl.errors import IncompatibleProbeError, InputError, MonitorError, ProbeNeverFiredError
from lmprobe_tl.generation import GenerationResult
from lmprobe_tl.live.events import TokenEvent
from lmprobe_tl.weights import ProbeWeights

NEW = 8
GREEDY = {"do_sample": False, "verbose": False}
CACHE = pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])


def generate(tiny: Tiny, probes: Any, prompts: Any = PROMPTS, **more: Any) -> list[GenerationResult]:
    return monitored_generate(tiny.model, prompts, probes, **({"max_new_tokens": NEW, "do_sample": False} | more))


def cache_of(tiny: Tiny, batch: int = 1) -> Any:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(tiny.model.cfg, "cpu", batch)


def end_rows_at(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, row: int) -> int:
    """Make an EOS of a token that this row generates before its end, and no other row does."""
    generated = [one.tokens[one.prompt_length :].tolist() for one in generate(tiny, make_probe())]
    others = {token for index, ids in enumerate(generated) if index != row for token in ids}
    end = next(token for token in generated[row][:-2] if token not in others)
    # A field of the bridge's config, and none of HookedTransformer's.
    monkeypatch.setattr(tiny.model.cfg, "eos_token_id", end, raising=False)
    return end


# --- monitored_generate ------------------------------------------------------------------------------------------------


@CACHE
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_every_live_score_equals_a_full_recompute(tiny: Tiny, do_sample: bool, use_past_kv_cache: bool) -> None:
    probes = some_probes()
    torch.manual_seed(5)
    results = generate(tiny, probes, do_sample=do_sample, use_past_kv_cache=use_past_kv_cache)
    for result, text in zip(results, PROMPTS, strict=True):
        ids = result.tokens.tolist()
        assert ids[: result.prompt_length] == tiny.encode(text)
        ended = ids[-1] == tiny.model.tokenizer.eos_token_id
        assert result.stopped_by == ("eos" if ended else "max_new_tokens")
        assert ended or len(ids) == result.prompt_length + NEW
        assert_row(tiny, ids[:-1], probes, result.scores, result.running)  # the last token was never seen by the model


@CACHE
def test_greedy_text_is_that_of_hugging_face_for_each_row_alone(tiny: Tiny, use_past_kv_cache: bool) -> None:
    for result, text in zip(generate(tiny, make_probe(), use_past_kv_cache=use_past_kv_cache), PROMPTS, strict=True):
        ids = torch.tensor([tiny.encode(text)])
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        expected = tiny.reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert result.tokens.tolist() == expected[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter_and_is_left_alone(
    tiny: Tiny, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [result.tokens.tolist() for result in generate(tiny, make_probe())]
    monkeypatch.setattr(tiny.model.tokenizer, "padding_side", side)
    after = generate(tiny, some_probes(), score_last_token=True)
    assert [result.tokens.tolist() for result in after] == before
    for result in after:
        assert_row(tiny, result.tokens.tolist(), some_probes(), result.scores, result.running)
    assert tiny.model.tokenizer.padding_side == side
    assert tiny.model.cfg.default_prepend_bos is True


@CACHE
def test_the_cache_is_used_or_not_as_asked(tiny: Tiny, use_past_kv_cache: bool) -> None:
    widths: list[int] = []
    watch = [("blocks.1.hook_resid_pre", lambda activations, hook: widths.append(activations.shape[1]))]
    with tiny.model.hooks(fwd_hooks=watch):
        (result,) = generate(tiny, make_probe(), ["cats"], max_new_tokens=4, use_past_kv_cache=use_past_kv_cache)
    prompt = result.prompt_length
    assert widths == ([prompt, 1, 1, 1] if use_past_kv_cache else [prompt, prompt + 1, prompt + 2, prompt + 3])


def test_prompts_without_bos_and_of_one_token(tiny: Tiny) -> None:
    for cache in (True, False):
        for result, text in zip(
            generate(tiny, some_probes(), prepend_bos=False, use_past_kv_cache=cache), PROMPTS, strict=True
        ):
            assert result.tokens[: result.prompt_length].tolist() == tiny.encode(text, bos=False)
            assert_row(tiny, result.tokens.tolist()[:-1], some_probes(), result.scores, result.running)


@CACHE
def test_nothing_after_a_rows_end_of_sequence_is_scored(
    tiny: Tiny, use_past_kv_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = generate(tiny, make_probe())
    end = end_rows_at(tiny, monkeypatch, row=1)
    results = generate(tiny, some_probes(), use_past_kv_cache=use_past_kv_cache)
    cut = free[1].tokens.tolist().index(end, free[1].prompt_length) + 1
    assert results[1].stopped_by == "eos"
    assert results[1].tokens.tolist() == free[1].tokens.tolist()[:cut]
    assert cut < len(free[1].tokens)
    for row in (0, 2):
        assert results[row].tokens.tolist() == free[row].tokens.tolist()
    for result in results:
        assert_row(tiny, result.tokens.tolist()[:-1], some_probes(), result.scores, result.running)


def test_each_scored_token_is_told_exactly_once(tiny: Tiny) -> None:
    events: list[TokenEvent] = []
    results = generate(tiny, some_probes(), on_token=events.append)
    for row, result in enumerate(results):
        told = [event for event in events if event.row == row]
        assert [event.position for event in told] == list(range(len(result.tokens) - 1))
        assert [event.token_id for event in told] == result.tokens.tolist()[:-1]
        assert [event.generated for event in told] == [at >= result.prompt_length for at in range(len(told))]
        for name, scores in result.scores.items():
            assert [event.logits[name] for event in told] == scores.tolist()


def test_sampled_text_is_what_it_would_have_been_without_probes(hooked: Tiny) -> None:
    tokens, _ = padded([hooked.encode(text) for text in PROMPTS], hooked.model.tokenizer.pad_token_id, "left")
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "padding_side": "left", "prepend_bos": True, "temperature": 0.8, "top_k": 10}
    plain = hooked.model.generate(tokens, verbose=False, **options)
    torch.manual_seed(3)
    for result, row in zip(
        generate(hooked, make_probe(), do_sample=True, temperature=0.8, top_k=10), plain.tolist(), strict=True
    ):
        new = result.tokens[result.prompt_length :].tolist()
        assert new == row[tokens.shape[1] :][: len(new)]


# --- stopping ----------------------------------------------------------------------------------------------------------


def crossing_probe(tiny: Tiny, results: Sequence[GenerationResult]) -> tuple[ProbeWeights, int]:
    """A probe whose largest logit of all rows stands in the middle of what one of them generated, and a threshold below that
    alone; with the row."""
    for seed in range(200):
        probe = make_probe(seed=seed)
        logits = [torch.tensor(expected_logits(tiny, one.tokens.tolist(), probe)) for one in results]
        first, second = torch.cat([one[1:] for one in logits]).topk(2).values.tolist()
        for row, one in enumerate(results):
            middle = logits[row][one.prompt_length + 1 : -2]
            if first - second > 0.05 and first in middle.tolist():
                return probe.with_threshold((first + second) / 2, unit="logit"), row
    raise AssertionError("no seed gives such a probe")


@CACHE
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_stop_ends_its_row_at_the_first_crossing_and_leaves_the_others_alone(
    tiny: Tiny, use_past_kv_cache: bool, do_sample: bool
) -> None:
    options = {"use_past_kv_cache": use_past_kv_cache, "do_sample": do_sample}
    torch.manual_seed(1)
    free = generate(tiny, make_probe(), **options)
    probe, row = crossing_probe(tiny, free)
    torch.manual_seed(1)
    stopped = generate(tiny, probe, stop=True, **options)
    logits = expected_logits(tiny, free[row].tokens.tolist(), probe)
    crossing = next(at for at, logit in enumerate(logits) if at > 0 and logit >= probe.threshold.value)  # type: ignore[union-attr]
    assert [one.stopped_by for one in stopped] == ["p" if at == row else free[at].stopped_by for at in range(3)]
    for index, (one, other) in enumerate(zip(stopped, free, strict=True)):
        end = crossing + 1 if index == row else len(other.tokens)
        assert one.tokens.tolist() == other.tokens.tolist()[:end]
        seen = one.tokens.tolist() if index == row else one.tokens.tolist()[:-1]
        assert_row(tiny, seen, [probe], one.scores, one.running)
    (alarm,) = stopped[row].alarms
    assert (alarm.probe, alarm.row, alarm.position) == ("p", row, crossing)
    assert stopped[row].prompt_length < len(stopped[row].tokens) < len(free[row].tokens)


def test_generation_ends_once_every_row_has_stopped(tiny: Tiny) -> None:
    widths: list[int] = []
    watch = [("blocks.1.hook_resid_pre", lambda activations, hook: widths.append(activations.shape[1]))]
    with tiny.model.hooks(fwd_hooks=watch):
        results = generate(tiny, make_probe().with_threshold(0.0), stop=True, max_new_tokens=30)
    assert len(widths) == 1
    assert [(one.stopped_by, one.text) for one in results] == [("p", "")] * 3
    assert [one.alarms[0].position for one in results] == [1, 1, 1]  # BOS does not count


def test_a_soft_cap_on_the_logits_does_not_hinder_a_stop(hooked: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a cap this low other tokens keep a chance beside the end token: of -cap and 0, one row in four goes wrong."""
    monkeypatch.setattr(hooked.model.cfg, "output_logits_soft_cap", 5.0)
    torch.manual_seed(0)
    results = generate(hooked, make_probe().with_threshold(0.0), PROMPTS * 8, stop=True, do_sample=True)
    assert [(one.stopped_by, one.text) for one in results] == [("p", "")] * 24


def test_hooked_transformers_own_generate_would_pass_over_the_criteria_so_they_are_refused(hooked: Tiny) -> None:
    with (
        pytest.raises(InputError, match=r"no argument stopping_criteria.* end rows by an EOS token with stop=True"),
        attach_probes(hooked.model, make_probe()) as monitor,
    ):
        hooked.model.generate("cats", stopping_criteria=monitor.stopping_criteria(), **GREEDY)
    with pytest.warns(UserWarning, match="ignoring"):  # the control: had they come through
        hooked.model.generate("cats", stopping_criteria=[], **GREEDY)


def test_a_stop_needs_a_probe_with_two_classes(tiny: Tiny) -> None:
    direction = make_probe(seed=1).direction.repeat(3, 1)
    probe = ProbeWeights.from_direction(direction, name="three", hook_points="blocks.2.hook_resid_post", labels=(0, 1, 2))
    with pytest.raises(InputError, match="no attached probe has two classes"):
        generate(tiny, probe, stop=True)


def test_a_stop_without_any_end_token_is_refused(hooked: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooked.model, "tokenizer", None)
    prompt = torch.tensor([5, 6, 7])
    with pytest.raises(InputError, match=r"where the model has none, pass attach_probes\(\.\.\., eos_token_id"):
        generate(hooked, make_probe(), [prompt], stop=True)
    (result,) = generate(hooked, make_probe(), [prompt])
    assert (result.stopped_by, len(result.tokens)) == ("max_new_tokens", 3 + NEW)


@pytest.mark.parametrize("way", ["generate", "generate without cache", "stream"])
def test_a_stop_works_in_the_models_own_ways_to_generate(hooked: Tiny, way: str) -> None:
    row = hooked.encode("cats")
    free = WAYS[way](hooked, torch.tensor([row]))[0].tolist()
    probe, at = new_maximum(hooked, free, first=len(row) + 1)
    crossings: list[Any] = []
    with attach_probes(hooked.model, probe, stop=True, on_crossing=crossings.append) as monitor:
        output = ENDED_WAYS[way](hooked, torch.tensor([row]))[0].tolist()
    assert output == [*free[: at + 1], hooked.model.tokenizer.eos_token_id]
    assert_monitor(hooked, monitor, [free[: at + 1]], [probe])
    assert [(alarm.position, alarm.row) for alarm in crossings] == [(at, 0)]


def new_maximum(tiny: Tiny, ids: Sequence[int], first: int) -> tuple[ProbeWeights, int]:
    """A probe with a logit above all before it at a position from `first` on, and a threshold just below; the position."""
    for seed in range(50):
        logits = expected_logits(tiny, ids, make_probe(seed=seed))
        for at in range(first, len(ids) - 2):
            before = max(logits[1:at])  # BOS does not count
            if logits[at] > before + 0.05:
                return make_probe(seed=seed).with_threshold((before + logits[at]) / 2, unit="logit"), at
    raise AssertionError("no seed gives such a probe")


def test_the_token_that_crossed_can_be_left_out(tiny: Tiny) -> None:
    probe, row = crossing_probe(tiny, generate(tiny, make_probe()))
    kept, cut = generate(tiny, probe, stop=True)[row], generate(tiny, probe, stop=True, keep_crossing=False)[row]
    assert cut.tokens.tolist() == kept.tokens.tolist()[:-1]
    assert kept.stopped_by == cut.stopped_by == "p"


# --- the model's own ways to run ---------------------------------------------------------------------------------------


def stepwise(tiny: Tiny, tokens: torch.Tensor) -> torch.Tensor:
    """A prompt in two chunks, then a token a step, with a cache by hand."""
    cache = cache_of(tiny, len(tokens))
    tiny.model(tokens[:, :2], past_kv_cache=cache)
    logits = tiny.model(tokens[:, 2:], past_kv_cache=cache)
    for _ in range(NEW):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
        logits = tiny.model(tokens[:, -1:], past_kv_cache=cache)
    return torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)


def stream(tiny: Tiny, tokens: torch.Tensor, *, stop_at_eos: bool) -> torch.Tensor:
    pieces = tiny.model.generate_stream(
        tokens, max_new_tokens=NEW, max_tokens_per_yield=2, stop_at_eos=stop_at_eos, **GREEDY
    )
    return torch.cat(list(pieces), dim=1)


OPTIONS = {"max_new_tokens": NEW, "stop_at_eos": False, "return_type": "tokens"} | GREEDY
WAYS: dict[str, Callable[[Tiny, torch.Tensor], torch.Tensor]] = {
    "generate": lambda tiny, tokens: tiny.model.generate(tokens, **OPTIONS),
    "generate without cache": lambda tiny, tokens: tiny.model.generate(tokens, use_past_kv_cache=False, **OPTIONS),
    "stream": partial(stream, stop_at_eos=False),
    "stepwise": stepwise,
}
# The same, ended by EOS.
ENDED: dict[str, Any] = OPTIONS | {"stop_at_eos": True}
ENDED_WAYS: dict[str, Callable[[Tiny, torch.Tensor], torch.Tensor]] = {
    "generate": lambda tiny, tokens: tiny.model.generate(tokens, **ENDED),
    "generate without cache": lambda tiny, tokens: tiny.model.generate(tokens, use_past_kv_cache=False, **ENDED),
    "stream": partial(stream, stop_at_eos=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_scores_of_the_models_own_ways_to_generate_equal_a_full_recompute(hooked: Tiny, way: str) -> None:
    rows = [hooked.encode("the model reads every word"), hooked.encode("cats dogs rain sun music")]
    with attach_probes(hooked.model, some_probes(), eos_token_id=[]) as monitor:
        output = WAYS[way](hooked, torch.tensor(rows))
    assert output.shape == (2, 6 + NEW) if way != "stepwise" else (2, 7 + NEW)
    assert_monitor(hooked, monitor, output[:, :-1].tolist(), some_probes())


def test_strings_are_tokenized_and_padded_by_the_model_itself(hooked: Tiny) -> None:
    with attach_probes(hooked.model, some_probes(), eos_token_id=[]) as monitor:
        output = hooked.model.generate(PROMPTS, **OPTIONS)
    prompts = [hooked.encode(text) for text in PROMPTS]
    rows = [prompt + row[-NEW:-1] for prompt, row in zip(prompts, output.tolist(), strict=True)]
    assert_monitor(hooked, monitor, rows, some_probes())


def test_one_generation_after_another_is_a_new_run(hooked: Tiny) -> None:
    with attach_probes(hooked.model, some_probes(), eos_token_id=[]) as monitor:
        for cache in (True, False, True, False):
            hooked.model.generate(torch.tensor([hooked.encode("a short line")]), use_past_kv_cache=cache, **OPTIONS)
            output = hooked.model.generate(torch.tensor([hooked.encode("cats")]), use_past_kv_cache=cache, **OPTIONS)
            assert_monitor(hooked, monitor, output[:, :-1].tolist(), some_probes())
    assert len(monitor.runs) == 8


def test_generations_that_take_turns_are_known_by_their_caches(hooked: Tiny) -> None:
    rows = [hooked.encode("the model reads every word"), hooked.encode("cats dogs rain sun music")]
    caches = [cache_of(hooked), cache_of(hooked)]
    with attach_probes(hooked.model, some_probes(), eos_token_id=[]) as monitor, torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, 6)):
            for row, cache in zip(rows, caches, strict=True):
                chunk = torch.tensor([row[start:end]])
                hooked.model(chunk, past_kv_cache=cache, attention_mask=torch.ones_like(chunk))
    for run, row in zip(monitor.runs, rows, strict=True):
        assert_monitor(hooked, run, [row], some_probes())


def test_a_pass_of_another_thread_does_not_come_between(hooked: Tiny) -> None:
    """One thread embeds its tokens and waits before its first block; meanwhile another one runs through."""
    rows = [hooked.encode("the model reads"), hooked.encode("cats dogs rain")]
    embedded, passed = threading.Event(), threading.Event()

    def wait(activations: torch.Tensor, hook: Any) -> None:
        if threading.current_thread() is first:
            embedded.set()
            assert passed.wait(timeout=30)

    def run_first() -> None:
        with torch.no_grad():
            hooked.model(torch.tensor([rows[0]]))

    first = threading.Thread(target=run_first)
    with hooked.model.hooks(fwd_hooks=[("hook_embed", wait)]), attach_probes(hooked.model, some_probes()) as monitor:
        first.start()
        assert embedded.wait(timeout=30)
        with torch.no_grad():
            hooked.model(torch.tensor([rows[1]]))
        passed.set()
        first.join()
    assert_monitor(hooked, monitor.runs[0], [rows[1]], some_probes())
    assert_monitor(hooked, monitor.runs[1], [rows[0]], some_probes())


def test_hooks_that_were_reset_inside_the_block_are_an_error(hooked: Tiny) -> None:
    tokens = torch.tensor([hooked.encode("cats")])

    def reset_and_go_on() -> None:
        hooked.model.reset_hooks()
        hooked.model.generate(tokens, **GREEDY)

    with pytest.raises(MonitorError, match="were removed"), attach_probes(hooked.model, make_probe()):
        reset_and_go_on()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["call", "run_with_cache", "run_with_hooks"])
def test_plain_passes_with_a_mask_score_real_tokens_alone(tiny: Tiny, side: str, way: str) -> None:
    rows = [tiny.encode(text) for text in PROMPTS]
    tokens, mask = padded(rows, tiny.model.tokenizer.pad_token_id, side)
    run = tiny.model if way == "call" else getattr(tiny.model, way)
    with attach_probes(tiny.model, some_probes()) as monitor, torch.no_grad():
        run(tokens, attention_mask=mask)
    assert_monitor(tiny, monitor, rows, some_probes())


def test_without_a_mask_the_one_that_the_model_makes_is_seen(hooked: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a left-padding tokenizer HookedTransformer guesses the mask; else it has none, and pads are refused."""
    rows = [hooked.encode(text) for text in PROMPTS]
    tokens, _ = padded(rows, hooked.model.tokenizer.pad_token_id, "left")
    monkeypatch.setattr(hooked.model.tokenizer, "padding_side", "left")
    with attach_probes(hooked.model, some_probes()) as monitor, torch.no_grad():
        hooked.model(tokens)
    assert_monitor(hooked, monitor, rows, some_probes())
    monkeypatch.setattr(hooked.model.tokenizer, "padding_side", "right")
    with pytest.raises(MonitorError, match="called without an attention mask"), attach_probes(hooked.model, make_probe()):
        hooked.model(padded([row[1:] for row in rows], hooked.model.tokenizer.pad_token_id, "right")[0])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_of_a_row_into_chunks_gives_the_same_scores(
    all_tiny: dict[tuple[str, str], Tiny], data: st.DataObject
) -> None:
    tiny = all_tiny[data.draw(st.sampled_from([("layernorm", "hooked"), ("rmsnorm", "hooked")]))]
    row = [tiny.bos, *data.draw(st.lists(st.integers(5, 40), min_size=1, max_size=12))]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(row) - 1), max_size=4)))
    cache, tokens = cache_of(tiny), torch.tensor([row])
    with attach_probes(tiny.model, some_probes(), eos_token_id=[]) as monitor, torch.no_grad():
        for start, end in zip([0, *cuts], [*cuts, len(row)], strict=True):
            # Without a mask, HookedTransformer would take a chunk that is a BOS alone for a pad, where both have one id.
            chunk = tokens[:, start:end]
            tiny.model(chunk, past_kv_cache=cache, attention_mask=torch.ones_like(chunk))
    assert_monitor(tiny, monitor, [row], some_probes())


# --- what cannot be scored ---------------------------------------------------------------------------------------------


def test_a_mask_that_the_model_guesses_wrong_is_an_error(all_tiny: dict[tuple[str, str], Tiny]) -> None:
    """GPT-2's pad is its BOS: of prompts with and without BOS, HookedTransformer takes one kind wrong."""
    tiny = all_tiny["layernorm", "hooked"]
    mixed = [torch.tensor([0, 5, 6]), torch.tensor([7, 8, 9, 10, 11])]
    with pytest.raises(MonitorError, match=r"it took a token of prompt 0 \(id 0\) for a pad.*one prompt at a time"):
        generate(tiny, make_probe(), mixed)
    with pytest.raises(MonitorError, match=r"it took a token of prompt 1 \(id 0\) for a pad"):
        generate(tiny, make_probe(), [torch.tensor([0, 5, 6]), torch.tensor([0, 0, 9])])
    for prompts in ([mixed[0]], [mixed[1]], [mixed[1], mixed[1][:2]], [mixed[0], torch.tensor([0, 9])]):
        for result in generate(tiny, some_probes(), prompts):
            assert_row(tiny, result.tokens.tolist()[:-1], some_probes(), result.scores, result.running)
    bridge = all_tiny["layernorm", "bridge"]  # it takes the mask that it is given
    for result in generate(bridge, some_probes(), mixed):
        assert_row(bridge, result.tokens.tolist()[:-1], some_probes(), result.scores, result.running)


def test_pads_are_an_error_where_the_model_has_no_tokenizer_to_guess_a_mask_with(
    hooked: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooked.model, "tokenizer", None)
    with pytest.raises(MonitorError, match=r"it took a pad of prompt 0 \(id 0\) for a token"):
        generate(hooked, make_probe(), [torch.tensor([5, 6]), torch.tensor([7, 8, 9])])
    assert len(generate(hooked, make_probe(), [torch.tensor([5, 6]), torch.tensor([7, 8])])) == 2


def test_embeddings_in_place_of_tokens_are_an_error(hooked: Tiny) -> None:
    tokens = torch.tensor([hooked.encode("the model reads")])
    residual = hooked.model.input_to_embed(tokens)[0]
    message = r"needs token ids.*embeddings of shape \(1, 4\).*start_at_layer, or embeddings as the prompt"
    for run in (
        lambda: hooked.model(residual, start_at_layer=0),
        lambda: hooked.model.generate(hooked.model.W_E[tokens], **GREEDY),
        lambda: [hooked.model(tokens), hooked.model(residual, start_at_layer=0)],
    ):
        with pytest.raises(MonitorError, match=message), attach_probes(hooked.model, make_probe()):
            run()
    with attach_probes(hooked.model, some_probes()) as monitor, torch.no_grad():  # embedded within the block: they are known
        residual = hooked.model.input_to_embed(tokens)[0]
        hooked.model.embed(tokens[0])  # one row, as a look-up
        hooked.model(residual, start_at_layer=0)
    assert_monitor(hooked, monitor, tokens.tolist(), some_probes())
    with pytest.raises(MonitorError, match=message), attach_probes(hooked.model, make_probe()):  # one row of two
        hooked.model(hooked.model.input_to_embed(tokens.repeat(2, 1))[0][:1], start_at_layer=0)
    # The model itself would take this mask for both rows.
    options = {"start_at_layer": 0, "attention_mask": torch.ones_like(tokens)}
    with (
        pytest.raises(MonitorError, match=r"covers the 4 columns.*shape \(1, 4\)"),
        attach_probes(hooked.model, make_probe()),
    ):
        hooked.model(hooked.model.input_to_embed(tokens.repeat(2, 1))[0], **options)


def test_probes_attached_in_the_middle_of_a_generation_are_an_error(hooked: Tiny) -> None:
    cache, tokens = cache_of(hooked), torch.tensor([hooked.encode("the model reads")])
    hooked.model(tokens[:, :2], past_kv_cache=cache)
    with pytest.raises(MonitorError, match="columns 0 to 1 were never scored"), attach_probes(hooked.model, make_probe()):
        hooked.model(tokens[:, 2:], past_kv_cache=cache)


@pytest.mark.parametrize("hook_name", ["hook_embed", "hook_pos_embed"])
def test_hook_points_before_the_blocks_are_refused(all_tiny: dict[tuple[str, str], Tiny], hook_name: str) -> None:
    model = all_tiny["layernorm", "hooked"].model
    with (
        pytest.raises(
            IncompatibleProbeError, match=rf"'{hook_name}' fires before; train the probe on 'blocks\.0\.hook_resid_pre'"
        ),
        attach_probes(model, make_probe(hook_points=hook_name)),
    ):
        pass


def test_a_probe_of_the_raw_stream_is_refused_where_the_model_carries_the_centred_one(tiny: Tiny) -> None:
    probe = make_probe(zero_sum=False)
    if tiny.is_centred:
        with pytest.raises(IncompatibleProbeError, match="this model carries the centred one"):
            generate(tiny, probe)
    else:
        for result in generate(tiny, probe):
            assert_row(tiny, result.tokens.tolist()[:-1], [probe], result.scores, result.running)


def test_a_probe_that_never_fired_is_an_error(hooked: Tiny) -> None:
    tokens = torch.tensor([hooked.encode("cats")])
    with (
        pytest.raises(ProbeNeverFiredError, match=r"probes \['p'\] saw no activation"),
        attach_probes(hooked.model, make_probe()),
    ):
        pass
    with pytest.raises(ProbeNeverFiredError, match="no early stop_at_layer"), attach_probes(hooked.model, make_probe()):
        hooked.model(tokens, stop_at_layer=2)
    with attach_probes(hooked.model, make_probe()) as monitor:
        hooked.model(tokens, stop_at_layer=3)
    assert_monitor(hooked, monitor, tokens.tolist(), [make_probe()])


def test_a_hook_point_replaced_inside_the_block_is_an_error(hooked: Tiny) -> None:
    """As an SAE does: another module stands in the hook point's place."""
    model, block = hooked.model, hooked.model.blocks[2]
    tokens, point = torch.tensor([hooked.encode("cats dogs")]), block.hook_resid_post

    def replace() -> None:
        block.hook_resid_post = torch.nn.Identity()

    def never() -> None:
        replace()
        model(tokens)

    def in_a_second_run() -> None:
        model(tokens)
        replace()
        model(tokens + 1)

    def in_the_next_step() -> None:
        cache = cache_of(hooked)
        model(tokens[:, :2], past_kv_cache=cache)
        replace()
        model(tokens[:, 2:], past_kv_cache=cache)

    def in_a_generation() -> None:
        replace()
        model.generate(tokens, **OPTIONS)

    message = "did not fire in a forward pass.* after anything that replaces hook points"
    for run in (never, in_a_second_run, in_the_next_step, in_a_generation):
        try:
            with (
                pytest.raises(ProbeNeverFiredError, match=message),
                attach_probes(model, make_probe()),
            ):
                run()
        finally:
            block.hook_resid_post = point


def test_an_exception_inside_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    before = [result.tokens.tolist() for result in generate(tiny, make_probe())]

    def fail(event: TokenEvent) -> None:
        if event.generated:
            raise KeyError("stop here")

    with pytest.raises(KeyError, match="stop here"):
        generate(tiny, make_probe().with_threshold(1e6, unit="logit"), on_token=fail, stop=True)
    assert not tiny.left_over_hooks()
    assert tiny.model.cfg.default_prepend_bos is True
    assert [result.tokens.tolist() for result in generate(tiny, make_probe())] == before
