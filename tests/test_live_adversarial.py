"""Live scoring where it is likeliest to go wrong: callbacks that use the model, readers in other threads, interrupts."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from conftest import CONTEXT, D_MODEL, N_LAYERS, Tiny, blocks_of, build_tokenizer, load_tiny
from live_reference import (
    BOS,
    EOS,
    assert_monitor,
    assert_same,
    features_of,
    left_padded,
    make_probe,
    many_probes,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import InputError, MonitorError, ProbeNeverFiredError
from lmprobe_tl.live.records import Alarm, Escalate
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.scoring import score_prompts

NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
PROMPT = [BOS, 40, 50, 60, 61]


def call_the_model(tiny: Tiny, ids: Tensor) -> None:
    with torch.no_grad():
        tiny.bridge(ids[None])


JUDGES = {
    "model": call_the_model,
    "generate": lambda tiny, ids: tiny.bridge.generate(ids[None], max_new_tokens=2, verbose=False),
    "larger probe": lambda tiny, ids: score_prompts(tiny.bridge, [ids], make_probe("larger", seed=3)),
    "attached probe": lambda tiny, ids: attached_call(tiny, ids),
}


def attached_call(tiny: Tiny, ids: Tensor) -> None:
    """Another monitor on the same model, in the middle of the first one's forward pass."""
    probe = make_probe("inner", seed=3)
    with attach_probes(tiny.bridge, probe) as inner:
        call_the_model(tiny, ids)
    assert_monitor(tiny, inner, [ids.tolist()], [probe])


# --- callbacks that use the model ---


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("judge", JUDGES)
def test_a_judge_may_run_the_very_model_that_is_monitored(tiny: Tiny, judge: str, use_past_kv_cache: bool) -> None:
    asked: list[Alarm] = []

    def clear(alarm: Alarm, ids: Tensor) -> bool:
        asked.append(alarm)
        JUDGES[judge](tiny, ids)
        return False

    probe = make_probe()
    options = {"use_past_kv_cache": use_past_kv_cache, "verbose": False, **GREEDY}
    free = tiny.bridge.generate(torch.tensor([PROMPT]), **options)
    with attach_probes(tiny.bridge, probe, stop=True, escalate=Escalate(low=1e-6, high=1 - 1e-6, judge=clear)) as monitor:
        output = tiny.bridge.generate(torch.tensor([PROMPT]), **options)
    assert output.tolist() == free.tolist()
    assert (len(asked), len(monitor.runs)) == (1, 1)
    assert_monitor(tiny, monitor, [output[0, :-1].tolist()], [probe])
    assert monitor.runs[0].verdicts("p") == ["cleared"]


def test_a_callback_that_raises_inside_its_own_pass_leaves_the_next_generation_whole(llama: Tiny) -> None:
    raises = [True]

    def on_token(event: Any) -> None:
        call_the_model(llama, torch.tensor([5, 6, 7]))
        if event.generated and raises.pop():
            raise ZeroDivisionError

    probes = many_probes()
    with attach_probes(llama.bridge, probes, on_token=on_token) as monitor:
        with pytest.raises(ZeroDivisionError):
            llama.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)
        raises += [False] * NEW
        output = llama.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)
        assert_monitor(llama, monitor, [output[0, :-1].tolist()], probes)
    assert [run.tokens()[0].tolist() for run in monitor.runs] == [output[0, :6].tolist(), output[0, :-1].tolist()]


# --- readers and interrupts ---


def test_another_thread_may_read_in_the_middle_of_a_pass(gpt2: Tiny) -> None:
    found: list[int] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            found.append(len(monitor.token_scores("p")[0]))
        except BaseException as error:
            errors.append(error)

    def read_elsewhere(*_: Any) -> None:
        if monitor.runs and monitor.runs[0].n_columns:
            thread = threading.Thread(target=read)
            thread.start()
            thread.join(30)

    handle = blocks_of(gpt2.bridge.original_model)[0].register_forward_hook(read_elsewhere)
    try:
        with attach_probes(gpt2.bridge, make_probe()) as monitor:
            gpt2.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)
    finally:
        handle.remove()
    assert not errors, errors
    assert found == list(range(5, 5 + NEW - 1))


def test_what_was_scored_before_an_interrupt_can_be_read_and_no_cache_is_kept(gpt2: Tiny) -> None:
    caches: list[weakref.ref[Any]] = []

    def interrupt(_: Any, args: tuple[Any, ...], __: Any) -> None:
        caches.append(weakref.ref(args[1]))
        if len(caches) == 4:
            raise KeyboardInterrupt

    probe = make_probe(hook_points="blocks.3.hook_resid_post")
    free = gpt2.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)[0].tolist()
    handle = blocks_of(gpt2.bridge.original_model)[1].register_forward_hook(interrupt)
    try:
        with attach_probes(gpt2.bridge, probe) as monitor:
            gpt2.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)
    except KeyboardInterrupt:
        pass
    finally:
        handle.remove()
    assert_monitor(gpt2, monitor, [free[: len(PROMPT) + 2]], [probe])
    gc.collect()
    assert caches[-1]() is None


def test_the_cache_of_an_interrupted_prompt_is_not_that_of_the_next(llama: Tiny) -> None:
    from transformers import DynamicCache

    def fail(*_: Any) -> None:
        handle.remove()
        raise ZeroDivisionError

    module, old, new = llama.bridge.original_model, DynamicCache(), DynamicCache()
    handle = blocks_of(module)[1].register_forward_hook(fail)
    with torch.no_grad(), attach_probes(llama.bridge, make_probe(hook_points="blocks.3.hook_resid_post")) as monitor:
        with pytest.raises(ZeroDivisionError):
            module(torch.tensor([[BOS, 40, 50]]), past_key_values=old)
        module(torch.tensor([[BOS, 61, 51]]), past_key_values=new)
        with pytest.raises(MonitorError, match="columns 0 to 2 were never scored"):
            module(torch.tensor([[7]]), past_key_values=old)
        module(torch.tensor([[8]]), past_key_values=new)
        assert [run.tokens()[0].tolist() for run in monitor.runs] == [[BOS, 61, 51, 8]]


def test_many_threads_find_their_runs(llama: Tiny) -> None:
    """With a switch of threads every few instructions."""
    outputs: list[list[int]] = []
    errors: list[BaseException] = []

    def generate(at: int) -> None:
        try:
            for _ in range(2):
                outputs.append(llama.bridge.hf_generate(torch.tensor([[BOS, 40 + at, 50]]), **GREEDY)[0, :-1].tolist())
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with attach_probes(llama.bridge, make_probe()) as monitor:
            threads = [threading.Thread(target=generate, args=(at,)) for at in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors
    assert [run.index for run in monitor.runs] == list(range(8))
    assert sorted(run.tokens()[0].tolist() for run in monitor.runs) == sorted(outputs)
    for run in monitor.runs:
        ids = run.tokens()[0].tolist()
        assert_same(run.token_scores("p")[0], make_probe().logits(features_of(llama, ids, make_probe())))


def test_a_pass_that_ends_early_is_still_an_error_where_nothing_was_raised(gpt2: Tiny) -> None:
    def run() -> None:
        gpt2.bridge(torch.tensor([PROMPT]))
        score_prompts(gpt2.bridge, ["cats"], make_probe("early", "blocks.0.hook_resid_post"))

    with (
        pytest.raises(ProbeNeverFiredError, match="did not reach all hook points"),
        attach_probes(gpt2.bridge, make_probe()),
    ):
        run()


# --- prompts ---


@pytest.mark.parametrize("last", [62, EOS])
@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_the_last_chunk_of_a_prompt_may_be_one_token(tiny: Tiny, chunk: int, last: int) -> None:
    prompt = [*PROMPT, 63, last]
    told: list[tuple[int, bool]] = []
    with attach_probes(
        tiny.bridge, make_probe(), on_token=lambda event: told.append((event.position, event.generated))
    ) as monitor:
        output = tiny.bridge.hf_generate(torch.tensor([prompt]), prefill_chunk_size=chunk, max_new_tokens=3, do_sample=False)
    generated = output[0, len(prompt) :].tolist()
    n_scored = generated.index(EOS) if EOS in generated else len(generated) - 1  # an EOS is not fed, the last is not either
    rows = [prompt + generated[:n_scored]]
    assert_monitor(tiny, monitor, rows, [make_probe()])
    assert monitor.runs[-1].prompt_lengths() == [len(prompt)]
    assert told == [(at, at >= len(prompt)) for at in range(len(rows[0]))]


@pytest.fixture
def one_special(gpt2: Tiny) -> Any:
    """A model that has one special token, as GPT-2 has."""
    before = {name: getattr(gpt2.tokenizer, name) for name in ("pad_token", "bos_token")}
    for name in before:
        setattr(gpt2.tokenizer, name, "<eos>")
    yield gpt2
    for name, token in before.items():
        setattr(gpt2.tokenizer, name, token)


@pytest.mark.parametrize("way", ["generate", "hf"])
def test_where_pad_eos_and_bos_are_one_token(one_special: Tiny, way: str) -> None:
    """A row of one BOS beside long ones, padded by the same id."""
    gpt2 = one_special
    rows = [[EOS], [EOS, 40, 50, 60], [EOS, EOS, 41]]
    tokens, mask = left_padded(rows)
    tokens[mask == 0] = EOS
    probes = [make_probe(inference="score:mean"), make_probe("three", n_classes=3, inference="score:mean")]
    with attach_probes(gpt2.bridge, probes) as monitor:
        if way == "hf":
            output = gpt2.bridge.hf_generate(tokens, attention_mask=mask, pad_token_id=EOS, **GREEDY)
        else:
            output = gpt2.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
    generated = [ids[: ids.index(EOS)] if EOS in ids else ids[:-1] for ids in output[:, tokens.shape[1] :].tolist()]
    assert [ids.tolist() for ids in monitor.tokens()] == [row + new for row, new in zip(rows, generated, strict=True)]
    for probe in probes:
        for found, ids, running in zip(
            monitor.token_scores(probe.name), monitor.tokens(), monitor.running_scores(probe.name), strict=True
        ):
            features = features_of(gpt2, ids.tolist(), probe)
            assert_same(found, probe.logits(features))
            expected = probe.probabilities(features)[1:].double().cumsum(0)  # the first EOS is the BOS
            count = torch.arange(1, len(expected) + 1).view(-1, *[1] * (expected.ndim - 1))
            assert_same(running[1:], (expected / count).float())


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model whose cache holds the last six columns alone."""
    from transformers import MistralConfig, MistralForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("models") / "tiny-mistral", build_tokenizer()
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        sliding_window=6,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_tiny("mistral", folder)


@pytest.mark.parametrize("way", ["generate", "no cache", "hf", "hf chunks"])
def test_a_sliding_window_changes_nothing(sliding: Tiny, way: str) -> None:
    rows = [[BOS, 40, 50, 60, 61, 62, 63, 64], [BOS, 41], [BOS, 42, 43, 44, 45]]
    tokens, mask = left_padded(rows)
    with attach_probes(sliding.bridge, many_probes()) as monitor:
        if way.startswith("hf"):
            chunk = 3 if way == "hf chunks" else None
            output = sliding.bridge.hf_generate(tokens, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
        else:
            output = sliding.bridge.generate(
                tokens, attention_mask=mask, use_past_kv_cache=way == "generate", verbose=False, **GREEDY
            )
    generated = output[:, tokens.shape[1] :].tolist()
    assert not any(EOS in ids for ids in generated)
    assert_monitor(sliding, monitor, [row + new[:-1] for row, new in zip(rows, generated, strict=True)], many_probes())


def test_a_cache_of_a_fixed_size_is_scored_by_hand_and_refused_in_generate(llama: Tiny) -> None:
    from transformers import StaticCache

    module = llama.bridge.original_model
    with attach_probes(llama.bridge, make_probe()) as monitor, torch.no_grad():
        cache = StaticCache(config=module.config, max_cache_len=20)
        for ids in (PROMPT, [7], [8], [9]):
            module(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    assert_monitor(llama, monitor, [[*PROMPT, 7, 8, 9]], [make_probe()])
    with pytest.raises(MonitorError, match="attention mask"), attach_probes(llama.bridge, make_probe()):
        llama.bridge.hf_generate(torch.tensor([PROMPT]), cache_implementation="static", **GREEDY)


@pytest.mark.parametrize("inference", ["score:rolling_max(3)", "score:ema_max(0.5)", "score:softmax(1)", "score:mean"])
def test_steps_may_take_turns_between_inference_mode_and_no_grad(llama: Tiny, inference: str) -> None:
    probe, ids, cache = make_probe(inference=inference), list(PROMPT), None
    with attach_probes(llama.bridge, probe, on_crossing=lambda alarm: None, eos_token_id=[]) as monitor:
        for at in range(8):
            new = PROMPT if at == 0 else [60 + at]
            ids += new if at else []
            with torch.inference_mode() if at % 3 == 0 else torch.no_grad():
                cache = llama.bridge.original_model(
                    torch.tensor([new]), past_key_values=cache, use_cache=True
                ).past_key_values
                if at == 0:  # the keys of a prompt in inference mode may not be written to outside of it, so copies
                    for layer in cache.layers:
                        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert_monitor(llama, monitor, [ids], [probe])


@pytest.mark.parametrize("max_new_tokens", [1, 2, NEW])
@pytest.mark.parametrize("way", ["generate", "hf", "no cache"])
def test_the_output_of_a_generation_may_be_the_prompt_of_the_next(tiny: Tiny, way: str, max_new_tokens: int) -> None:
    """That is the scored tokens and one more, as a step without a cache has it."""

    def generate(tokens: Tensor) -> Tensor:
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if way == "hf":
            return tiny.bridge.hf_generate(tokens, **options)
        return tiny.bridge.generate(tokens, use_past_kv_cache=way == "generate", verbose=False, **options)

    with attach_probes(tiny.bridge, make_probe()) as monitor:
        first = generate(torch.tensor([PROMPT]))
        output = generate(first)
    assert_monitor(tiny, monitor, [output[0, :-1].tolist()], [make_probe()])
    if way != "no cache" and max_new_tokens > 1:
        assert [run.prompt_lengths() for run in monitor.runs] == [[len(PROMPT)], [first.shape[1]]]


def test_a_mask_counts_however_it_is_passed(tiny: Tiny) -> None:
    rows = [[BOS, 41], [BOS, 40, 50, 60]]
    tokens, mask = left_padded(rows)
    tokens[0, :2] = 5  # so that nothing but the mask gives the padding away
    module = tiny.bridge.original_model
    place = list(inspect.signature(module.forward).parameters).index("attention_mask")
    with attach_probes(tiny.bridge, make_probe()) as monitor, torch.no_grad():
        module(tokens, *[None] * (place - 1), mask)
    assert [ids.tolist() for ids in monitor.tokens()] == rows


# --- cascades ---


def test_a_token_that_reaches_both_thresholds_is_positive_and_no_judge_is_asked(gpt2: Tiny) -> None:
    asked: list[Alarm] = []
    told: list[Alarm] = []

    def judge(alarm: Alarm, _: Tensor) -> bool:
        asked.append(alarm)
        return False

    options = {"escalate": Escalate(low=1e-6, high=2e-6, judge=judge), "on_crossing": told.append}
    with attach_probes(gpt2.bridge, make_probe(), **options) as monitor:
        gpt2.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)
    assert asked == []
    assert [alarm.verdict for alarm in told] == ["positive"]
    assert monitor.events == tuple(told)
    silent = Escalate(low=1e-6, high=2e-6)
    with attach_probes(gpt2.bridge, make_probe(), escalate=silent) as monitor:
        gpt2.bridge.generate(torch.tensor([PROMPT]), verbose=False, **GREEDY)
    assert [alarm.verdict for alarm in monitor.events] == ["positive"]


def test_judges_of_two_probes_may_confirm_one_row_in_passes_of_any_kind(llama: Tiny) -> None:
    module, steps = llama.bridge.original_model, [PROMPT, [62], [63], [64], [65]]
    ids = [token for step in steps for token in step]
    for seed in range(100):  # a probe that reaches its highest score after the prompt
        later = make_probe("later", seed=seed)
        tops = later.logits(features_of(llama, ids, later))[1:]
        if tops.argmax() > len(PROMPT):
            break
    low = float(tops[tops.argmax()] - 1e-3)
    cascades = {
        "p": Escalate(low=1e-6, high=1 - 1e-6, judge=lambda alarm, _: True),
        "later": Escalate(low=low, high=low + 9, unit="logit", judge=lambda alarm, _: True),
    }
    with attach_probes(llama.bridge, [make_probe(), later], escalate=cascades, eos_token_id=[]) as monitor:
        cache = None
        for at, step in enumerate(steps):
            with torch.inference_mode() if at == 0 else torch.no_grad():
                cache = module(torch.tensor([step]), past_key_values=cache, use_cache=True).past_key_values
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    found = [(event.probe, event.position, event.verdict) for event in monitor.events]
    assert found == [("p", 1, "confirmed"), ("later", int(tops.argmax()) + 1, "confirmed")]


@pytest.mark.parametrize(("own", "unit"), [(0.2, "probability"), (0.9, "probability"), (1.0, "logit")])
def test_a_low_threshold_above_the_probes_own_is_refused(gpt2: Tiny, own: float, unit: Any) -> None:
    probe = make_probe().with_threshold(own, unit=unit)
    message = rf"low is 0.9 \(probability\), and the threshold of probe 'p' is {own} \({unit}\); expected low below it"
    with pytest.raises(InputError, match=message), attach_probes(gpt2.bridge, probe, escalate=Escalate(low=0.9)):
        pass
    with attach_probes(gpt2.bridge, probe, escalate=Escalate(low=0.1)):  # below it in every case
        gpt2.bridge(torch.tensor([PROMPT]))


# --- devices ---


class Copies(TorchDispatchMode):
    """Copies from one device to another: each one that goes to a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy" and result.device != args[0].device:
            self.found += 1
        return result


@pytest.mark.parametrize("probes", [many_probes(), [many_probes()[at] for at in (0, 6, 1)]], ids=["several hooks", "moved"])
def test_only_the_first_step_copies_anything_to_the_device(probes: Any) -> None:
    """On the meta device, which has no data, but is another one than the CPU."""
    plan = ScoringPlan(probes)
    partials = [torch.empty(2, 1, len(hook.columns), device="meta") for hook in plan.hooks.values()]
    found = []
    for _ in range(3):
        with Copies() as copies:
            plan.combine(partials, torch.device("meta"))
        found.append(copies.found)
    assert found[0] > 0
    assert found[1:] == [0, 0]
