"""Attached probes: live scores in every way of running a model, none where they would be wrong, the model left as found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import D_MODEL, Tiny, load_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import (
    BOS,
    EOS,
    PAD,
    PROMPTS,
    assert_monitor,
    assert_same,
    encode,
    expected_running,
    features_of,
    left_padded,
    make_head_probe,
    make_probe,
    many_probes,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import (
    IncompatibleProbeError,
    InputError,
    ModelMismatchWarning,
    MonitorError,
    ProbeFileError,
    ProbeNeverFiredError,
)
from lmprobe_tl.hook_points import ForwardCall, model_record
from lmprobe_tl.live.records import TokenEvent
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.tokens import tokenizer_record
from lmprobe_tl.weights import ProbeWeights

NEW = 5
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


def batch_of(tiny: Tiny, texts: Sequence[str] = PROMPTS) -> tuple[list[list[int]], Tensor, Tensor]:
    rows = [encode(tiny, text, bos=True) for text in texts]
    return rows, *left_padded(rows)


def seen_of(rows: list[list[int]], generated: list[list[int]]) -> list[list[int]]:
    """What the model saw of each row before its end: all but the last token, or up to EOS without it."""
    return [row + (ids[: ids.index(EOS)] if EOS in ids[:-1] else ids[:-1]) for row, ids in zip(rows, generated, strict=True)]


# --- every way of running a model ---

WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "generate": lambda model, tokens, mask: model.generate(tokens, attention_mask=mask, verbose=False, **GREEDY),
    "no cache": lambda model, tokens, mask: model.generate(
        tokens, attention_mask=mask, use_past_kv_cache=False, verbose=False, **GREEDY
    ),
    "stream": lambda model, tokens, mask: torch.cat(
        list(model.generate_stream(tokens, attention_mask=mask, max_tokens_per_yield=2, verbose=False, **GREEDY)), dim=1
    ),
    "hf": lambda model, tokens, mask: model.hf_generate(tokens, attention_mask=mask, **GREEDY),
    "hf no cache": lambda model, tokens, mask: model.hf_generate(
        tokens, attention_mask=mask, use_past_kv_cache=False, use_cache=False, **GREEDY
    ),
    # The short rows' BOS and first tokens come in a later chunk.
    "hf chunks": lambda model, tokens, mask: model.hf_generate(
        tokens, attention_mask=mask, prefill_chunk_size=tokens.shape[1] // 2, **GREEDY
    ),
    # Here the last chunk is one column wide, as a generated token is.
    "hf odd chunks": lambda model, tokens, mask: model.hf_generate(
        tokens, attention_mask=mask, prefill_chunk_size=3, **GREEDY
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_scores_equal_a_full_recompute_however_the_model_generates(tiny: Tiny, way: str) -> None:
    rows, tokens, mask = batch_of(tiny)
    probes = many_probes()
    with attach_probes(tiny.bridge, probes) as monitor:
        output = WAYS[way](tiny.bridge, tokens, mask)
    assert output.shape == (3, tokens.shape[1] + NEW)
    assert_monitor(tiny, monitor, seen_of(rows, output[:, tokens.shape[1] :].tolist()), probes)


def test_strings_are_scored_without_their_padding(tiny: Tiny) -> None:
    with attach_probes(tiny.bridge, many_probes()) as monitor:
        output = tiny.bridge.generate(PROMPTS, return_type="tokens", verbose=False, **GREEDY)
    rows = [encode(tiny, text) for text in PROMPTS]
    assert_monitor(tiny, monitor, seen_of(rows, output[:, -NEW:].tolist()), many_probes())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_alone_is_scored_whatever_its_padding_side(tiny: Tiny, side: str) -> None:
    rows, tokens, mask = batch_of(tiny)
    if side == "right":
        tokens = torch.tensor([row + [PAD] * (tokens.shape[1] - len(row)) for row in rows])
        mask = mask.flip(1)
    with attach_probes(tiny.bridge, many_probes()) as monitor:
        tiny.bridge(tokens, attention_mask=mask)
    assert_monitor(tiny, monitor, rows, many_probes())


def test_one_unpadded_row_needs_no_mask(llama: Tiny) -> None:
    row = encode(llama, PROMPTS[1])
    with attach_probes(llama.bridge, many_probes()) as monitor:
        llama.bridge(PROMPTS[1])
    assert_monitor(llama, monitor, [row], many_probes())
    with attach_probes(llama.bridge, many_probes()) as monitor:
        llama.bridge.generate(torch.tensor([row, row]), verbose=False, **GREEDY)
    assert len(monitor.tokens()) == 2


def test_rows_of_one_prompt_each_keep_their_own_scores(gpt2: Tiny) -> None:
    rows, tokens, mask = batch_of(gpt2)
    torch.manual_seed(3)
    with attach_probes(gpt2.bridge, many_probes()) as monitor:
        output = gpt2.bridge.hf_generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=True, num_return_sequences=2
        )
    twice = [row for row in rows for _ in range(2)]
    assert output[0].tolist() != output[1].tolist()
    assert_monitor(gpt2, monitor, seen_of(twice, output[:, tokens.shape[1] :].tolist()), many_probes())


@pytest.fixture(scope="module")
def native() -> Any:
    """A model of TransformerLens' own, with random weights and no tokenizer; it has no cache."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    config = TransformerBridgeConfig(
        d_model=D_MODEL, d_head=8, n_heads=4, n_layers=4, n_ctx=64, d_vocab=60, act_fn="gelu", seed=0
    )
    return TransformerBridge.boot_native(config)


def test_a_native_model_without_cache_and_tokenizer_is_scored_too(native: Any) -> None:
    from lmprobe_tl.generation import monitored_generate

    prompts = [torch.tensor([3, 5, 7]), torch.arange(10, 18)]
    probe = make_probe(hook_points=("blocks.3.hook_resid_post", "blocks.1.hook_resid_post"))
    results = monitored_generate(native, prompts, probe, max_new_tokens=NEW, do_sample=False, score_last_token=True)
    for result, prompt in zip(results, prompts, strict=True):
        assert (result.text, result.prompt_length, len(result.tokens)) == ("", len(prompt), len(prompt) + NEW)
        _, cache = native.run_with_cache(result.tokens[None], names_filter=list(probe.hook_points))
        features = torch.cat([cache[name][0] for name in probe.hook_points], dim=-1)
        assert_same(result.scores["p"], probe.logits(features))
        assert_same(result.running["p"], probe.probabilities(features).cummax(dim=0).values)


# --- the running score ---

POOLINGS = (
    "score:max", "max", "score:min", "score:mean", "score:last_token", "score:first_token", "mean", "activation:mean",
    "last_token", "first_token", "all", "score:ema_max(0.5)", "score:rolling_max(3)", "score:softmax(2)",
)  # fmt: skip
FOR_CLASSES = tuple(name for name in POOLINGS if "(" not in name)


@pytest.mark.parametrize("include_bos", [False, True], ids=["no bos", "bos"])
def test_the_running_score_is_the_inference_pooling_of_all_tokens_so_far(tiny: Tiny, include_bos: bool) -> None:
    hooks = ("blocks.2.hook_resid_post", "blocks.0.hook_resid_post")
    probes = [
        make_probe(f"{pooling} {n_classes}", hooks, seed=3, n_classes=n_classes, inference=pooling, include_bos=include_bos)
        for n_classes, poolings in ((2, POOLINGS), (3, FOR_CLASSES))
        for pooling in poolings
    ]
    rows, tokens, mask = batch_of(tiny)
    with attach_probes(tiny.bridge, probes) as monitor:
        output = tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
    # every reduction is a different one, so that each comparison can fail
    ends = [monitor.running_scores(f"{pooling} 2")[1][-1].item() for pooling in POOLINGS]
    assert len({round(value, 5) for value in ends}) >= 8
    assert_monitor(tiny, monitor, seen_of(rows, output[:, tokens.shape[1] :].tolist()), probes)


def test_bos_has_a_logit_and_stays_out_of_the_running_score_unless_included(gpt2: Tiny) -> None:
    rows, tokens, mask = batch_of(gpt2)
    without, including = make_probe("without"), make_probe("including", include_bos=True)
    with attach_probes(gpt2.bridge, [without, including]) as monitor:
        gpt2.bridge(tokens, attention_mask=mask)
    for row, ids in enumerate(rows):
        logits = without.logits(features_of(gpt2, ids, without))
        for name in ("without", "including"):
            assert_same(monitor.token_scores(name)[row], logits)
        assert monitor.running_scores("without")[row][0].isnan()
        assert_same(monitor.running_scores("without")[row][1:], logits[1:].sigmoid().cummax(dim=0).values)
        assert_same(monitor.running_scores("including")[row], logits.sigmoid().cummax(dim=0).values)


def test_a_later_token_with_the_id_of_bos_counts(llama: Tiny) -> None:
    ids = [BOS, 5, BOS, 6]
    probe = make_probe(inference="score:mean")
    with attach_probes(llama.bridge, probe) as monitor:
        llama.bridge(torch.tensor([ids]))
    scores = probe.probabilities(features_of(llama, ids, probe))
    assert_same(monitor.running_scores("p")[0][-1], scores[1:].mean())
    with attach_probes(llama.bridge, probe) as monitor, torch.no_grad():  # in passes of their own, too
        _, cache = llama.bridge(torch.tensor([ids[:2]]), return_type="logits_and_cache", use_cache=True)
        llama.bridge(torch.tensor([ids[2:]]), past_key_values=cache)
    assert_same(monitor.running_scores("p")[0][-1], scores[1:].mean())


class Fake:
    """As much of a model as a Monitor asks for, so that a run can be cut into any passes."""

    cfg = SimpleNamespace(eos_token_id=EOS)
    tokenizer = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


def test_minima_of_classes_that_all_vanish_give_equal_shares() -> None:
    probe = make_probe(n_classes=3, inference="score:min")
    monitor = Monitor(Fake(), [probe])
    # at each position another class takes it all
    activations = 1e4 * torch.linalg.pinv(probe.direction).T[None]
    feed(monitor, torch.full((1, 3), 9), None, activations, 0, 3)
    assert monitor.token_scores("p")[0].softmax(dim=-1).tolist() == torch.eye(3).tolist()
    expected = torch.tensor([[1.0, 0.0, 0.0], [1 / 3] * 3, [1 / 3] * 3])
    assert_same(monitor.running_scores("p")[0], expected)


def feed(monitor: Monitor, tokens: Tensor, mask: Tensor | None, activations: Tensor, start: int, end: int) -> None:
    """One forward pass on columns `start` to `end`, of the whole batch's tokens and activations."""
    part = None if mask is None else mask[:, :end]
    monitor.before_forward(ForwardCall(tokens[:, start:end], start, part))
    for hook_name in monitor.plan.hooks:
        monitor.on_activations(hook_name, activations[:, start:end])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_scores_do_not_depend_on_how_a_run_is_cut_into_passes(data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    prompt, new = max(lengths), data.draw(st.integers(0, 4))
    rows = [[BOS, *range(5, 4 + length + new)] for length in lengths]
    tokens = torch.tensor([[PAD] * (prompt - length) + row for length, row in zip(lengths, rows, strict=True)])
    mask = torch.tensor([[0] * (prompt - length) + [1] * (length + new) for length in lengths])
    inference = data.draw(st.sampled_from(POOLINGS))
    probe = make_probe(inference=inference, include_bos=data.draw(st.booleans()))
    activations = torch.randn(*tokens.shape, D_MODEL, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    clean = activations.clone()
    activations[mask == 0] = torch.nan  # what stands at a pad reaches nothing
    monitor = Monitor(Fake(), [probe])
    if data.draw(st.booleans()):
        for end in range(prompt, prompt + new + 1):
            feed(monitor, tokens, mask, activations, 0, end)
    else:
        cuts = sorted(data.draw(st.sets(st.integers(1, prompt - 1)))) if prompt > 1 else []
        for start, end in zip(
            [0, *cuts, *range(prompt, prompt + new)], [*cuts, *range(prompt, prompt + new + 1)], strict=True
        ):
            feed(monitor, tokens, mask, activations, start, end)
    assert len(monitor.runs) == 1
    for row, (ids, length) in enumerate(zip(rows, lengths, strict=True)):
        features = clean[row, prompt - length :]
        assert monitor.tokens()[row].tolist() == ids
        assert_same(monitor.token_scores("p")[row], probe.logits(features))
        assert_same(monitor.running_scores("p")[row], expected_running(features, probe, ids))


# --- runs ---


def test_generations_in_one_block_are_separate_runs(tiny: Tiny) -> None:
    probes = many_probes()
    rows, tokens, mask = batch_of(tiny)
    single = encode(tiny, "music and light")
    found = []
    with attach_probes(tiny.bridge, probes) as monitor:
        for _ in range(2):  # the same prompt twice, then another of another batch size
            output = tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
            assert_monitor(tiny, monitor, seen_of(rows, output[:, tokens.shape[1] :].tolist()), probes)
            found.append(monitor.running_scores("late"))
        tiny.bridge(torch.tensor([single]))
        assert_monitor(tiny, monitor, [single], probes)
    assert len(monitor.runs) == 3
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert_monitor(tiny, monitor, [single], probes)  # after the block, too


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
def test_the_next_turn_of_a_chat_is_scored_in_full(gpt2: Tiny, use_past_kv_cache: bool) -> None:
    """Its tokens extend those of the turn before, whose end is no end here."""
    turn = encode(gpt2, PROMPTS[0])
    with attach_probes(gpt2.bridge, many_probes()) as monitor:
        gpt2.bridge(torch.tensor([turn]))
        following = [*turn, 9, EOS, 11, 12, 13]
        output = gpt2.bridge.generate(
            torch.tensor([following]), use_past_kv_cache=use_past_kv_cache, verbose=False, **GREEDY
        )
    assert len(monitor.runs) == 2
    generated = output[0, len(following) :].tolist()
    assert_monitor(gpt2, monitor, seen_of([following], [generated]), many_probes())


def test_a_second_prompt_on_the_same_cache_goes_on_with_its_run(llama: Tiny) -> None:
    first, second = encode(llama, PROMPTS[0]), encode(llama, PROMPTS[1], bos=False)
    with attach_probes(llama.bridge, many_probes()) as monitor, torch.no_grad():
        _, cache = llama.bridge(torch.tensor([first]), return_type="logits_and_cache", use_cache=True)
        _, cache = llama.bridge(torch.tensor([[EOS]]), past_key_values=cache, return_type="logits_and_cache")
        _, cache = llama.bridge(torch.tensor([second]), past_key_values=cache, return_type="logits_and_cache")
        llama.bridge(torch.tensor([[7]]), past_key_values=cache)
    # EOS ended the first answer and has no score there; what the user says next is scored again.
    assert len(monitor.runs) == 1
    whole = [*first, EOS, *second, 7]
    probe = many_probes()[0]
    expected = probe.logits(features_of(llama, whole, probe))
    assert monitor.tokens()[0].tolist() == [*first, *second, 7]
    assert_same(monitor.token_scores("late")[0], torch.cat([expected[: len(first)], expected[len(first) + 1 :]]))


def test_attaching_midway_is_an_error(llama: Tiny) -> None:
    row = encode(llama, PROMPTS[1])
    with torch.no_grad():
        _, cache = llama.bridge(torch.tensor([row]), return_type="logits_and_cache", use_cache=True)
        message = f"columns 0 to {len(row) - 1} were never scored: .* Attach the probes before"
        with attach_probes_expecting(MonitorError, message, llama.bridge):
            llama.bridge(torch.tensor([[7]]), past_key_values=cache)


def attach_probes_expecting(error: type[Exception], message: str, model: Any, probes: Any = None) -> Any:
    """A block with probes attached that must end in this error."""
    from contextlib import ExitStack, contextmanager

    @contextmanager
    def block() -> Any:
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(error, match=message))
            yield stack.enter_context(attach_probes(model, make_probe() if probes is None else probes))

    return block()


def test_a_cache_that_was_used_before_is_an_error(llama: Tiny) -> None:
    """Two continuations of one cached prompt: the second would be taken for tokens that were scored already."""
    row = encode(llama, PROMPTS[1])
    with (
        torch.no_grad(),
        attach_probes_expecting(MonitorError, f"went back to column {len(row)} of {len(row) + 1}", llama.bridge),
    ):
        _, cache = llama.bridge(torch.tensor([row]), return_type="logits_and_cache", use_cache=True)
        llama.bridge(torch.tensor([[7]]), past_key_values=cache)
        cache.crop(-1)
        llama.bridge(torch.tensor([[8]]), past_key_values=cache)


def test_a_batch_that_changes_within_a_generation_is_an_error() -> None:
    monitor = Monitor(Fake(), [make_probe()])
    tokens, activations = torch.full((2, 4), 9), torch.randn(2, 4, D_MODEL)
    feed(monitor, tokens, None, activations, 0, 3)
    with pytest.raises(MonitorError, match="from 2 to 1 rows within one generation"):
        feed(monitor, tokens[:1], None, activations[:1], 3, 4)


# --- rows that end ---


@pytest.mark.parametrize("way", ["generate", "no cache", "stream", "hf"])
def test_a_row_that_ends_early_is_scored_no_further(tiny: Tiny, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS is made likely by force, in one row alone, so that the others go on."""
    rows, tokens, mask = batch_of(tiny)
    steps: list[int] = []

    def force(logits: Tensor, hook: Any) -> Tensor:
        steps.append(logits.shape[1])
        forced = logits.clone()
        forced[:, -1, EOS] = -1e4
        forced[1, -1, EOS] = 1e4 if len(steps) == 2 else -1e4
        return forced

    probes = many_probes()
    if way == "hf":  # its own loop asks the wrapped head
        head = tiny.bridge.original_model.get_output_embeddings()
        handle = head.register_forward_hook(lambda _, __, logits: force(logits, None))
    else:
        handle = None
    try:
        with attach_probes(tiny.bridge, probes) as monitor:
            if handle is not None:
                output = WAYS[way](tiny.bridge, tokens, mask)
            else:
                with tiny.bridge.hooks(fwd_hooks=[("unembed.hook_out", force)]):
                    output = WAYS[way](tiny.bridge, tokens, mask)
    finally:
        if handle is not None:
            handle.remove()
    generated = output[:, tokens.shape[1] :].tolist()
    assert [ids.index(EOS) if EOS in ids else None for ids in generated] == [None, 1, None]
    expected = seen_of(rows, generated)
    assert [len(ids) - len(row) for ids, row in zip(expected, rows, strict=True)] == [NEW - 1, 1, NEW - 1]
    assert_monitor(tiny, monitor, expected, probes)


def forced(token: int, at_step: int, row: int) -> Callable[[Tensor, Any], Tensor]:
    """A hook on the logits that makes one row emit a token at one step."""
    steps: list[int] = []

    def hook(logits: Tensor, hook: Any) -> Tensor:
        steps.append(0)
        changed = logits.clone()
        changed[row, -1, token] = 1e4 if len(steps) == at_step else -1e4
        return changed

    return hook


def test_a_row_that_goes_on_after_eos_is_never_cut_in_silence(gpt2: Tiny) -> None:
    rows, tokens, mask = batch_of(gpt2)
    hooks = [("unembed.hook_out", forced(EOS, 2, row=1))]

    def generate() -> Tensor:
        with gpt2.bridge.hooks(fwd_hooks=hooks):
            return gpt2.bridge.generate(tokens, attention_mask=mask, stop_at_eos=False, verbose=False, **GREEDY)

    message = r"row 1 went on after it had ended .*eos_token_id"
    with attach_probes_expecting(MonitorError, message, gpt2.bridge) as monitor:  # also where nobody reads
        generate()
    for read in (monitor.tokens, monitor.alarms, lambda: monitor.token_scores("p"), lambda: monitor.running_scores("p")):
        with pytest.raises(MonitorError, match=message):
            read()
    hooks[0] = ("unembed.hook_out", forced(EOS, 2, row=1))
    with attach_probes(gpt2.bridge, make_probe(), eos_token_id=[]) as monitor:
        output = generate()
    full = [row + ids[:-1] for row, ids in zip(rows, output[:, tokens.shape[1] :].tolist(), strict=True)]
    assert EOS in full[1]
    assert_monitor(gpt2, monitor, full, [make_probe()])


def test_generation_that_ends_at_another_token_can_say_so(gpt2: Tiny) -> None:
    rows, tokens, mask = batch_of(gpt2)
    other = 50
    with (
        attach_probes(gpt2.bridge, make_probe(), eos_token_id=other) as monitor,
        gpt2.bridge.hooks(fwd_hooks=[("unembed.hook_out", forced(other, 3, row=2))]),
    ):
        output = gpt2.bridge.generate(tokens, attention_mask=mask, eos_token_id=other, verbose=False, **GREEDY)
    generated = output[:, tokens.shape[1] :].tolist()
    assert generated[2][2:] == [other] * 3
    expected = [rows[0] + generated[0][:-1], rows[1] + generated[1][:-1], rows[2] + generated[2][:2]]
    assert_monitor(gpt2, monitor, expected, [make_probe()])


# --- stopping from the user's own generate ---


@pytest.mark.parametrize("way", ["generate", "hf"])
def test_the_stopping_criterion_ends_one_row_and_leaves_the_others(tiny: Tiny, way: str) -> None:
    rows, tokens, mask = batch_of(tiny)
    free = WAYS[way](tiny.bridge, tokens, mask)[:, tokens.shape[1] :].tolist()
    probe, row, position = crossing(tiny, rows, free)
    call = {"generate": tiny.bridge.generate, "hf": tiny.bridge.hf_generate}[way]
    extra = {"verbose": False} if way == "generate" else {}
    with attach_probes(tiny.bridge, probe) as monitor:
        output = call(tokens, attention_mask=mask, stopping_criteria=monitor.stopping_criteria(), **GREEDY, **extra)
    generated = output[:, tokens.shape[1] :].tolist()
    kept = position + 1 - len(rows[row])
    assert 0 < kept < NEW - 1
    assert generated[row][: kept + 1] == free[row][: kept + 1]  # one token was sampled before the criterion was asked
    assert set(generated[row][kept + 1 :]) <= {EOS, PAD}
    expected = seen_of(rows, generated)
    expected[row] = rows[row] + free[row][:kept]
    assert [ids for at, ids in enumerate(generated) if at != row] == [ids for at, ids in enumerate(free) if at != row]
    assert_monitor(tiny, monitor, expected, [probe])
    assert [[alarm.position for alarm in found] for found in monitor.alarms()] == [
        [position] if at == row else [] for at in range(3)
    ]


def crossing(tiny: Tiny, rows: list[list[int]], generated: list[list[int]]) -> tuple[ProbeWeights, int, int]:
    """A probe that crosses its threshold at one generated position of one row, and nowhere else; with row and position."""
    seen = [row + ids for row, ids in zip(rows, generated, strict=True)]
    for seed in range(300):
        probe = make_probe(seed=seed)
        logits = [probe.logits(features_of(tiny, ids, probe)) for ids in seen]
        first, second = torch.cat([one[1:] for one in logits]).topk(2).values.tolist()
        for row, ids in enumerate(rows):
            at = int(logits[row].argmax())
            if first - second > 0.05 and logits[row][at] == first and len(ids) <= at < len(ids) + NEW - 2:
                if EOS in generated[row]:
                    continue
                return probe.with_threshold((first + second) / 2, unit="logit"), row, at
    raise AssertionError("no seed gives such a probe")


def test_the_stopping_criterion_fails_where_the_model_never_ran(gpt2: Tiny) -> None:
    with (
        pytest.raises(ProbeNeverFiredError, match="the stopping criterion was asked, but"),
        attach_probes(gpt2.bridge, make_probe()) as monitor,
    ):
        monitor.stopping_criteria()(torch.zeros(1, 4), None)


def test_the_stopping_criterion_checks_the_number_of_rows(gpt2: Tiny) -> None:
    with attach_probes(gpt2.bridge, make_probe()) as monitor:
        gpt2.bridge(torch.tensor([[5, 6]]))
        with pytest.raises(MonitorError, match="1 rows were scored, but generate asks about 2"):
            monitor.stopping_criteria()(torch.zeros(2, 4), None)


@pytest.mark.parametrize("inference", ["score:max", "last_token"])
def test_a_row_that_has_crossed_stays_stopped_whatever_comes_after(inference: str) -> None:
    probe = make_probe(inference=inference).with_threshold(0.0, unit="logit")
    high = 50 * probe.direction[0] / probe.direction.norm()
    activations = torch.stack([torch.stack([-high] * 6), torch.stack([-high, high, *[-high] * 4])])
    monitor = Monitor(Fake(), [probe])
    criterion = monitor.stopping_criteria()
    tokens = torch.arange(5, 11).repeat(2, 1)
    tokens[1, 5] = PAD  # after the token that was sampled with the stop, generation feeds fillers
    feed(monitor, tokens, None, activations, 0, 2)
    feed(monitor, tokens, None, activations, 2, 4)  # the prompt in two chunks
    for column in (4, 5):
        assert criterion(tokens[:, : column + 1], None).tolist() == [False, True]
        feed(monitor, tokens, None, activations, column, column + 1)
    assert [len(scores) for scores in monitor.token_scores("p")] == [6, 4]
    assert [[alarm.position for alarm in found] for found in monitor.alarms()] == [[], [1]]


def test_a_generation_that_goes_on_after_a_stop_is_another_one(gpt2: Tiny) -> None:
    """Its scores are all there; or, where other rows had not stopped, an error says that some are not."""
    always = make_probe().with_threshold(0.0)
    tokens = torch.tensor([[BOS, 40, 50, 60]])
    with attach_probes(gpt2.bridge, always) as monitor:
        stopped = gpt2.bridge.generate(tokens, stopping_criteria=monitor.stopping_criteria(), verbose=False, **GREEDY)
        output = gpt2.bridge.generate(stopped, stop_at_eos=False, verbose=False, **GREEDY)
    assert len(monitor.runs) == 2
    assert_monitor(gpt2, monitor, [output[0, :-1].tolist()], [always])

    probe = make_probe().with_threshold(0.0, unit="logit")
    high = 50 * probe.direction[0] / probe.direction.norm()
    monitor, both = Monitor(Fake(), [probe]), torch.arange(5, 11).repeat(2, 1)
    activations = torch.stack([torch.stack([-high] * 6), torch.stack([high] * 6)])
    criterion = monitor.stopping_criteria()
    for column in range(6):  # row 1 stops at once, and real tokens go on
        feed(monitor, both, None, activations, column, column + 1)
        criterion(both[:, : column + 1], None)
    with pytest.raises(MonitorError, match="row 1 went on after it had ended"):
        monitor.token_scores("p")


def test_a_model_with_dropout_at_work_is_refused(gpt2: Tiny) -> None:
    dropout = next(part for part in gpt2.bridge.original_model.modules() if isinstance(part, torch.nn.Dropout))
    dropout.training, rate, dropout.p = True, dropout.p, 0.1
    try:
        with pytest.raises(MonitorError, match="model.eval"), attach_probes(gpt2.bridge, make_probe()):
            pass
    finally:
        dropout.training, dropout.p = False, rate


# --- events ---


@pytest.mark.parametrize("way", ["generate", "no cache", "hf chunks"])
def test_events_tell_each_position_once_in_every_way_of_running(gpt2: Tiny, way: str) -> None:
    rows, tokens, mask = batch_of(gpt2, [*PROMPTS[:2], "the model reads"])
    events: list[TokenEvent] = []
    with attach_probes(gpt2.bridge, make_probe(), on_token=events.append) as monitor:
        for _ in range(2):  # a second run tells its own tokens
            events.clear()
            WAYS[way](gpt2.bridge, tokens, mask)
    for row, (scores, running) in enumerate(zip(monitor.token_scores("p"), monitor.running_scores("p"), strict=True)):
        told = [event for event in events if event.row == row]
        assert [event.position for event in told] == list(range(len(scores)))
        assert [event.logits["p"] for event in told] == scores.tolist()
        assert [event.running["p"] for event in told][1:] == running.tolist()[1:]
        assert told[0].running["p"] is None
        assert [event.token_id for event in told] == monitor.tokens()[row].tolist()
        assert [event.generated for event in told] == [at >= len(rows[row]) for at in range(len(told))]


def test_events_come_also_for_a_run_that_was_begun_by_hand(gpt2: Tiny) -> None:
    events: list[TokenEvent] = []
    with attach_probes(gpt2.bridge, make_probe(), on_token=events.append) as monitor:
        monitor.begin_run()
        gpt2.bridge(torch.tensor([[5, 6, 7]]))
    assert [event.position for event in events] == [0, 1, 2]


def test_an_exception_in_the_callback_removes_the_hooks(gpt2: Tiny) -> None:
    def fail(event: TokenEvent) -> None:
        raise ZeroDivisionError

    tokens = torch.tensor([[5, 6, 7]])
    before = gpt2.bridge(tokens)
    with pytest.raises(ZeroDivisionError), attach_probes(gpt2.bridge, many_probes(), on_token=fail):
        gpt2.bridge(tokens)
    assert not any(point.fwd_hooks or point._forward_hooks for point in gpt2.bridge.hook_dict.values())
    torch.testing.assert_close(gpt2.bridge(tokens), before, rtol=0, atol=0)


# --- the model is left as it was ---


def test_only_our_own_hooks_go_with_the_block(gpt2: Tiny) -> None:
    seen: list[int] = []
    gpt2.bridge.hook_dict["blocks.1.hook_out"].add_hook(lambda activations, hook: seen.append(activations.shape[1]))
    try:
        with attach_probes(gpt2.bridge, make_probe("outer", "blocks.1.hook_out")) as outer:
            with attach_probes(gpt2.bridge, make_probe("inner", "blocks.1.hook_resid_post")) as inner:
                gpt2.bridge(torch.tensor([[5, 6, 7]]))
            gpt2.bridge(torch.tensor([[5, 6, 7, 8, 9]]))
        gpt2.bridge(torch.tensor([[5]]))
    finally:
        gpt2.bridge.reset_hooks()
    assert seen == [3, 5, 1]
    assert [len(scores) for scores in (*outer.token_scores("outer"), *inner.token_scores("inner"))] == [5, 3]


def test_activations_and_gradients_pass_unchanged(llama: Tiny) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    plain = llama.bridge(tokens)
    with attach_probes(llama.bridge, many_probes()) as monitor:
        watched = llama.bridge(tokens)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    assert watched.requires_grad
    assert not monitor.token_scores("late")[0].requires_grad


def test_scores_are_float32_whatever_autocast_says(llama: Tiny) -> None:
    ids = encode(llama, PROMPTS[1])
    seen: list[Tensor] = []
    probe = make_probe()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        attach_probes(llama.bridge, probe) as monitor,
        llama.bridge.hooks(fwd_hooks=[("blocks.2.hook_out", lambda activations, hook: seen.append(activations.detach()))]),
    ):
        llama.bridge(torch.tensor([ids]))
        assert (seen[0].float() @ probe.direction.T).dtype == torch.bfloat16  # the control: autocast is really on
    (scores,) = monitor.token_scores("p")
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, probe.logits(seen[0][0]), rtol=1e-5, atol=1e-5)


def test_scores_of_a_run_in_inference_mode_can_be_used_afterwards(gpt2: Tiny) -> None:
    rows, tokens, mask = batch_of(gpt2)
    with torch.inference_mode(), attach_probes(gpt2.bridge, many_probes()) as monitor:
        gpt2.bridge(tokens, attention_mask=mask)
    assert_monitor(gpt2, monitor, rows, many_probes())


# --- cost ---


class Products(TorchDispatchMode):
    """Counts matrix products with a matrix of this many columns, and the rows that went in."""

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        self.n_columns, self.rows = n_columns, list[int]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            left, right = arguments[-2:]
            if right.shape == (D_MODEL, self.n_columns):
                self.rows.append(left.shape[0])
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("way", ["generate", "no cache"])
def test_all_probes_of_a_hook_point_take_one_product_a_step_and_no_column_twice(gpt2: Tiny, way: str) -> None:
    probes = [make_probe(f"p{index}", "blocks.1.hook_resid_post", seed=index) for index in range(11)]
    probes += [make_probe(f"c{index}", "blocks.3.hook_resid_post", seed=index, n_classes=3) for index in range(3)]
    probes += [make_probe("wide", ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post"))]
    _, tokens, mask = batch_of(gpt2)
    for n_columns in (12, 10):  # of the two hook points
        with attach_probes(gpt2.bridge, probes), Products(n_columns) as products:
            WAYS[way](gpt2.bridge, tokens, mask)
        assert products.rows == [tokens.numel()] + [3] * (NEW - 1)


# --- a probe that sees nothing, or something wrong ---


def test_a_block_in_which_the_model_never_runs_is_an_error(gpt2: Tiny) -> None:
    with attach_probes_expecting(ProbeNeverFiredError, r"probes \['p'\] saw no activation: hook points", gpt2.bridge):
        pass


def test_a_pass_that_stops_below_the_probe_is_an_error(gpt2: Tiny) -> None:
    probes = [make_probe("low", "blocks.0.hook_resid_post"), make_probe("high", "blocks.3.hook_resid_post")]
    message = r"probes \['high'\] saw no activation: hook points \['blocks.3.hook_resid_post'\] never fired"
    with attach_probes_expecting(ProbeNeverFiredError, message, gpt2.bridge, probes):
        gpt2.bridge(torch.tensor([[5, 6]]), stop_at_layer=2)
    message = "the last forward pass did not reach all hook points"
    with attach_probes_expecting(ProbeNeverFiredError, message, gpt2.bridge, probes):
        gpt2.bridge(torch.tensor([[5, 6]]))
        gpt2.bridge(torch.tensor([[5, 7]]), stop_at_layer=2)


def test_hooks_that_were_reset_are_noticed(gpt2: Tiny) -> None:
    message = r"hooks of the attached probes on \['blocks.2.hook_resid_post'\] were removed \(by reset_hooks"
    with attach_probes_expecting(MonitorError, message, gpt2.bridge):
        gpt2.bridge.reset_hooks()
        gpt2.bridge(torch.tensor([[5, 6]]))
    with attach_probes_expecting(MonitorError, message, gpt2.bridge):
        gpt2.bridge(torch.tensor([[5, 6]]))
        gpt2.bridge.reset_hooks()
        gpt2.bridge(torch.tensor([[5, 7]]))


def test_scores_cannot_be_read_before_the_model_ran(gpt2: Tiny) -> None:
    with attach_probes(gpt2.bridge, make_probe()) as monitor:
        for read in (monitor.tokens, monitor.alarms, lambda: monitor.token_scores("p"), lambda: monitor.running_scores("p")):
            with pytest.raises(ProbeNeverFiredError, match="saw no activation"):
                read()
        gpt2.bridge(torch.tensor([[5, 6]]))
        for read_one in (monitor.token_scores, monitor.running_scores):
            with pytest.raises(InputError, match=r"no probe 'q' is attached; attached are \['p'\]"):
                read_one("q")


@pytest.mark.parametrize("kind", ["mlp", "polynomial", "attention", "multimax", "rolling_attention"])
def test_an_infinite_reading_is_an_error_for_every_kind(gpt2: Tiny, kind: str) -> None:
    """relu(-inf) is 0, and an infinite query of attention is in no token logit: neither may pass for a score."""
    probe = make_head_probe(kind, "blocks.2.hook_out")
    probe = replace(probe, direction=-probe.direction.abs())

    def spoil(activations: Tensor, hook: Any) -> Tensor:
        spoiled = activations.clone()
        spoiled[:, 1, 3] = math.inf
        return spoiled

    message = f"logit of probe '{kind}' is not finite at position 1 of row 0"
    with (
        gpt2.bridge.hooks(fwd_hooks=[("blocks.2.hook_out", spoil)]),
        attach_probes_expecting(MonitorError, message, gpt2.bridge, [probe]),
    ):
        gpt2.bridge(torch.tensor([[5, 6, 7]]))


def test_activations_that_are_not_finite_are_an_error_when_read(gpt2: Tiny) -> None:
    rows, tokens, mask = batch_of(gpt2)
    for bad in (math.nan, math.inf):

        def spoil(activations: Tensor, hook: Any, bad: float = bad) -> Tensor:
            spoiled = activations.clone()
            spoiled[0, :-2] = bad  # of which most are pads
            return spoiled

        message = "logit of probe 'p' is not finite at position 0 of row 0"
        probes = [make_probe(), make_probe("fine", "blocks.1.hook_out")]
        with (
            gpt2.bridge.hooks(fwd_hooks=[("blocks.2.hook_out", spoil)]),
            attach_probes_expecting(MonitorError, message, gpt2.bridge, probes) as monitor,  # also where nobody reads
        ):
            gpt2.bridge(tokens, attention_mask=mask)
        reads = (monitor.alarms, lambda: monitor.token_scores("p"), lambda: monitor.running_scores("p"))
        for read in reads:
            with pytest.raises(MonitorError, match=message):
                read()
        assert [len(scores) for scores in monitor.running_scores("fine")] == list(map(len, rows))


def test_a_padded_prompt_without_a_mask_is_an_error(gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    message = r"begin or end with the pad token \(id 2\), and the model was called without an attention mask"
    for run in (
        lambda: gpt2.bridge(PROMPTS),
        lambda: gpt2.bridge(tokens),
        lambda: gpt2.bridge.generate(tokens, verbose=False, **GREEDY),
    ):
        with attach_probes_expecting(MonitorError, message, gpt2.bridge):
            run()
    with attach_probes(gpt2.bridge, make_probe()) as monitor:
        gpt2.bridge(tokens, attention_mask=torch.ones_like(mask))  # the user's word that these are tokens
        gpt2.bridge(torch.tensor([[2, 5], [2, 6]]))  # no padding: nothing would be left of it
    assert [ids.tolist() for ids in monitor.tokens()] == [[2, 5], [2, 6]]


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, D_MODEL), torch.zeros(1, 2, 3, dtype=torch.long)])
def test_inputs_that_are_no_tokens_are_an_error(gpt2: Tiny, bad: Tensor) -> None:
    with attach_probes_expecting(MonitorError, r"needs token ids \[batch pos\]", gpt2.bridge):
        gpt2.bridge.original_model(bad)


def test_a_hook_point_that_fires_at_other_positions_is_an_error() -> None:
    monitor = Monitor(Fake(), [make_probe()])
    monitor.before_forward(ForwardCall(torch.zeros(1, 5, dtype=torch.long), 0, None))
    with pytest.raises(MonitorError, match=r"shape \(1, 4, 32\) in a forward pass on tokens of shape \(1, 5\)"):
        monitor.on_activations("blocks.2.hook_resid_post", torch.zeros(1, 4, D_MODEL))


# --- the residual basis ---


@pytest.fixture(scope="module")
def centred(tiny_folders: Any) -> Tiny:
    tiny = load_tiny("gpt2", tiny_folders["gpt2"])
    tiny.bridge.enable_compatibility_mode(disable_warnings=True)
    return tiny


def zero_sum(probe: ProbeWeights, basis: str) -> ProbeWeights:
    """The probe with blocks that sum to zero."""
    blocks = probe.direction.reshape(len(probe.direction), -1, D_MODEL)
    direction = (blocks - blocks.mean(dim=-1, keepdim=True)).reshape(probe.direction.shape)
    return ProbeWeights.from_direction(
        direction, probe.intercept, name=probe.name, hook_points=probe.hook_points, residual_basis=basis
    )


def run_on(tiny: Tiny, probe: ProbeWeights) -> tuple[list[list[int]], list[Tensor]]:
    rows, tokens, mask = batch_of(tiny)
    with attach_probes(tiny.bridge, probe) as monitor, torch.no_grad():
        tiny.bridge(tokens, attention_mask=mask)
    return rows, monitor.token_scores(probe.name)


WIDE = ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")


def test_a_raw_probe_is_refused_by_a_model_that_carries_the_centred_stream(gpt2: Tiny, centred: Tiny) -> None:
    run_on(gpt2, make_probe(hook_points=WIDE))  # the control
    with pytest.raises(
        IncompatibleProbeError, match=r"'p' was trained on the raw .*, and this model carries the centred one"
    ):
        run_on(centred, make_probe(hook_points=WIDE))


@pytest.mark.parametrize("basis", ["any", "raw"])
def test_a_probe_that_sums_to_zero_scores_the_same_on_both_streams(gpt2: Tiny, centred: Tiny, basis: str) -> None:
    probe = zero_sum(make_probe(hook_points=WIDE), basis)
    rows, raw_scores = run_on(gpt2, probe)
    _, centred_scores = run_on(centred, probe)
    for row, raw, moved in zip(rows, raw_scores, centred_scores, strict=True):
        assert_same(raw, probe.logits(features_of(gpt2, row, probe)))
        assert_same(moved, raw)


def test_a_probe_of_the_centred_stream_is_moved_to_the_raw_one(gpt2: Tiny, centred: Tiny) -> None:
    probe = make_probe(hook_points=WIDE, residual_basis="centered")
    rows, raw_scores = run_on(gpt2, probe)
    _, centred_scores = run_on(centred, probe)
    for row, raw, moved in zip(rows, raw_scores, centred_scores, strict=True):
        blocks = features_of(gpt2, row, probe).reshape(len(row), 2, D_MODEL)
        expected = probe.logits((blocks - blocks.mean(dim=-1, keepdim=True)).flatten(1))
        assert_same(raw, expected)
        assert_same(moved, expected)


def test_one_token_that_looks_centred_by_chance_is_no_evidence() -> None:
    tokens, activations = torch.tensor([[BOS, 9, 10]] * 2), torch.randn(2, 3, D_MODEL)
    activations[:, 0] -= activations[:, 0].mean(dim=-1, keepdim=True)
    monitor = Monitor(Fake(), [make_probe()])
    for end in (1, 2, 3):
        feed(monitor, tokens, None, activations, end - 1, end)
    assert len(monitor.token_scores("p")[0]) == 3
    activations -= activations.mean(dim=-1, keepdim=True)
    monitor = Monitor(Fake(), [make_probe()])
    feed(monitor, tokens, None, activations, 0, 1)
    with pytest.raises(IncompatibleProbeError, match="raw residual stream"):
        feed(monitor, tokens, None, activations, 1, 2)
    with pytest.raises(IncompatibleProbeError, match="raw residual stream"):  # one token a row, but several
        feed(Monitor(Fake(), [make_probe()]), tokens.T[1:], None, activations.transpose(0, 1)[1:], 0, 1)


def test_with_rmsnorm_there_is_no_other_basis() -> None:
    model = Fake()
    model.cfg = SimpleNamespace(eos_token_id=EOS, normalization_type="RMS")  # type: ignore[misc]
    monitor = Monitor(model, [make_probe()])
    feed(monitor, torch.tensor([[5, 6, 7]]), None, torch.zeros(1, 3, D_MODEL), 0, 3)
    assert len(monitor.tokens()[0]) == 3


def test_a_chunk_of_nothing_but_pads_says_nothing_of_the_basis() -> None:
    monitor = Monitor(Fake(), [make_probe()])
    tokens = torch.arange(5, 11).repeat(2, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    activations = torch.randn(2, 6, D_MODEL)
    feed(monitor, tokens, mask, activations, 0, 2)
    feed(monitor, tokens, mask, activations, 2, 6)
    assert [len(scores) for scores in monitor.token_scores("p")] == [4, 4]
    monitor = Monitor(Fake(), [make_probe()])
    feed(monitor, tokens, mask, activations, 0, 2)
    with pytest.raises(IncompatibleProbeError, match="raw residual stream"):
        feed(monitor, tokens, mask, activations - activations.mean(dim=-1, keepdim=True), 2, 6)


# --- probes that do not fit ---


def refused(gpt2: Tiny, probes: Any, error: type[Exception], message: str, **settings: Any) -> None:
    """Attaching fails before the block is entered."""
    with pytest.raises(error, match=message), attach_probes(gpt2.bridge, probes, **settings):
        raise AssertionError("the block was entered")


def test_probes_that_cannot_be_attached_are_refused_with_a_reason(gpt2: Tiny, tmp_path: Any) -> None:
    narrow = ProbeWeights.from_direction(torch.ones(8), name="p", hook_points="blocks.2.hook_resid_post")
    refused(gpt2, narrow, IncompatibleProbeError, "'p' expects d_model 8, but this model has 32")
    deep = make_probe(n_layers=12)
    refused(gpt2, deep, IncompatibleProbeError, "'p' was trained on a model of 12 layers, but this one has 4")
    misspelt = make_probe(hook_points="blocks.2.hook_resid_pots")
    refused(gpt2, misspelt, IncompatibleProbeError, "no hook point 'blocks.2.hook_resid_pots'.*'blocks.2.hook_resid_post'")
    refused(gpt2, [make_probe(), make_probe(seed=1)], InputError, r"two probes are named 'p', .*renamed")
    refused(gpt2, [], InputError, "the list is empty")
    refused(gpt2, [make_probe(), 3], InputError, "int is no probe; expected ProbeWeights, a fitted Probe, or the path")
    refused(gpt2, tmp_path / "none.safetensors", ProbeFileError, "none.safetensors")
    with pytest.raises(InputError, match="a int has no hook points"), attach_probes(3, make_probe()):
        pass


@pytest.mark.parametrize("pooling", ["activation:max", "activation:min", "eos"])
def test_poolings_without_a_token_by_token_form_are_refused(gpt2: Tiny, pooling: str) -> None:
    message = f"'p' pools activations by '{pooling}', which has no token-by-token form"
    refused(gpt2, make_probe(inference=pooling), IncompatibleProbeError, message)


def test_poolings_of_one_logit_are_refused_for_several_classes(gpt2: Tiny) -> None:
    probe = make_probe(n_classes=3, inference="score:ema_max(0.5)")
    refused(gpt2, probe, IncompatibleProbeError, "'p' has 3 classes, .* works on the logit of two")


def test_a_probe_of_another_model_or_tokenizer_warns_and_is_refused_if_strict(gpt2: Tiny, llama: Tiny) -> None:
    here, there = model_record(gpt2.bridge), model_record(llama.bridge)
    renamed = type(here)(id="another", revision=None, config_fingerprint=here.config_fingerprint)
    same = tokenizer_record(gpt2.bridge, None)
    other = type(same)(fingerprint="0" * 16, prepend_bos=True, chat_template_fingerprint=None)
    cases = [
        (make_probe(model=there), "trained on 'tiny-llama' .*, attached to 'tiny-gpt2'"),
        (make_probe(model=renamed), "trained on 'another', attached to 'tiny-gpt2', a model of the same shape"),
        (make_probe(tokenizer=other), "trained with another tokenizer"),
    ]
    for probe, message in cases:
        with pytest.warns(ModelMismatchWarning, match=message), attach_probes(gpt2.bridge, probe):
            gpt2.bridge(torch.tensor([[5]]))
        refused(gpt2, probe, IncompatibleProbeError, message, strict=True)
    # the control: nothing to complain of, be it recorded or not
    for fitting in (make_probe(model=here, tokenizer=same), make_probe()):
        with attach_probes(gpt2.bridge, fitting, strict=True):
            gpt2.bridge(torch.tensor([[5]]))


def test_probes_come_as_weights_as_files_or_as_anything_that_makes_weights(gpt2: Tiny, tmp_path: Any) -> None:
    path = make_probe("from file", seed=1).save(tmp_path / "probe.safetensors")
    fitted = SimpleNamespace(to_weights=lambda: make_probe("fitted", seed=2))
    ids = encode(gpt2, PROMPTS[1])
    with attach_probes(gpt2.bridge, (make_probe(), path, fitted)) as monitor:
        gpt2.bridge(torch.tensor([ids]))
    for name, seed in (("p", 0), ("from file", 1), ("fitted", 2)):
        probe = make_probe(seed=seed)
        assert_same(monitor.token_scores(name)[0], probe.logits(features_of(gpt2, ids, probe)))


# --- units ---


@pytest.mark.parametrize("inference", ["score:max", "mean", "score:mean", "last_token", "score:ema_max(0.5)"])
def test_running_scores_come_in_either_unit(gpt2: Tiny, inference: str) -> None:
    tokens, mask = left_padded([encode(gpt2, text, bos=True) for text in PROMPTS])
    with attach_probes(gpt2.bridge, make_probe(inference=inference)) as monitor:
        gpt2.bridge(tokens, attention_mask=mask)
    for row, own in enumerate(monitor.running_scores("p")):
        logits = monitor.running_scores("p", unit="logit")[row]
        probabilities = monitor.running_scores("p", unit="probability")[row]
        assert torch.equal(own.isnan(), logits.isnan()) and torch.equal(own.isnan(), probabilities.isnan())
        torch.testing.assert_close(logits.sigmoid(), probabilities, equal_nan=True)
        exact = logits if inference == "score:ema_max(0.5)" else probabilities
        assert torch.equal(own.nan_to_num(), exact.nan_to_num())


def test_logits_of_running_scores_do_not_saturate(gpt2: Tiny) -> None:
    tokens, mask = left_padded([encode(gpt2, text) for text in PROMPTS])
    with attach_probes(gpt2.bridge, make_probe(scale=50.0)) as monitor:
        gpt2.bridge(tokens, attention_mask=mask)
    final = [row[-1] for row in monitor.running_scores("p", unit="logit")]
    logits = [row[1:].max() if encode(gpt2, PROMPTS[0])[0] == BOS else row.max() for row in monitor.token_scores("p")]
    assert final == logits and min(final) < -104, "as a probability this is 0"


def test_a_unit_that_a_probe_does_not_have_is_refused(gpt2: Tiny) -> None:
    with attach_probes(gpt2.bridge, [make_probe(), make_probe("classes", n_classes=3)]) as monitor:
        gpt2.bridge(torch.tensor([[5, 6]]))
    with pytest.raises(InputError, match="unit is 'percent'; expected 'logit' or 'probability'"):
        monitor.running_scores("p", "percent")
    with pytest.raises(InputError, match="unit is 'logit'; expected .* for a probe with two classes, or None"):
        monitor.running_scores("classes", "logit")
    assert monitor.running_scores("classes")[0].shape == (2, 3)
