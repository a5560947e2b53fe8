"""Generations side by side, in turns, in threads and abandoned; what reorders rows or takes hooks away is refused."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import Tiny, load_tiny
from live_reference import (
    BOS,
    PROMPTS,
    assert_monitor,
    assert_same,
    encode,
    features_of,
    left_padded,
    make_probe,
    many_probes,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import MonitorError, ProbeNeverFiredError

NEW = 5
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


def prompt_of(tiny: Tiny, text: str) -> Tensor:
    return torch.tensor([encode(tiny, text)])


# --- several generations ---


def test_each_generation_in_a_block_is_a_run_of_its_own(gpt2: Tiny) -> None:
    probe = make_probe(inference="score:ema_max(0.5)").with_threshold(-100.0, unit="logit")
    outputs = []
    with attach_probes(gpt2.bridge, probe) as monitor:
        for text in PROMPTS:
            outputs.append(gpt2.bridge.generate(prompt_of(gpt2, text), verbose=False, **GREEDY)[0, :-1].tolist())
    assert [run.index for run in monitor.runs] == [0, 1, 2]
    for run, ids in zip(monitor.runs, outputs, strict=True):
        assert run.tokens()[0].tolist() == ids
        assert_same(run.token_scores("p")[0], probe.logits(features_of(gpt2, ids, probe)))
        with attach_probes(gpt2.bridge, probe) as alone:
            gpt2.bridge(torch.tensor([ids]))
        assert_same(run.running_scores("p")[0], alone.running_scores("p")[0])
    assert [(event.run, event.position) for event in monitor.events] == [(0, 1), (1, 1), (2, 1)]


def test_generators_that_take_turns_keep_their_own_scores(gpt2: Tiny) -> None:
    """Prompts of the same length, so that only their caches tell them apart."""
    first, second = torch.tensor([[BOS, 40, 50, 60]]), torch.tensor([[BOS, 61, 51, 41]])
    with attach_probes(gpt2.bridge, many_probes()) as monitor:
        caches = []
        for tokens in (first, second):
            with torch.no_grad():
                logits, cache = gpt2.bridge(tokens, return_type="logits_and_cache", use_cache=True)
            caches.append((tokens, logits[:, -1].argmax(dim=-1, keepdim=True), cache))
        for _ in range(3):
            following = []
            for tokens, new, cache in caches:
                with torch.no_grad():
                    logits, cache = gpt2.bridge(new, past_key_values=cache, return_type="logits_and_cache", use_cache=True)
                following.append((torch.cat([tokens, new], dim=1), logits[:, -1].argmax(dim=-1, keepdim=True), cache))
            caches = following
    assert len(monitor.runs) == 2
    for run, (tokens, _, _) in zip(monitor.runs, caches, strict=True):
        assert run.tokens()[0].tolist() == tokens[0].tolist()
        for probe in many_probes():
            assert_same(run.token_scores(probe.name)[0], probe.logits(features_of(gpt2, tokens[0].tolist(), probe)))


def test_a_generator_that_is_abandoned_leaves_its_scores_and_no_state(llama: Tiny) -> None:
    with attach_probes(llama.bridge, many_probes()) as monitor:
        stream = llama.bridge.generate_stream(prompt_of(llama, PROMPTS[1]), max_tokens_per_yield=1, verbose=False, **GREEDY)
        seen = [next(stream), next(stream)]
        stream.close()
        output = llama.bridge.generate(prompt_of(llama, PROMPTS[0]), verbose=False, **GREEDY)
        assert_monitor(llama, monitor, [output[0, :-1].tolist()], many_probes())
    assert len(monitor.runs) == 2
    ids = torch.cat(seen, dim=1)[0, :-1].tolist()
    assert monitor.runs[0].tokens()[0].tolist() == ids
    probe = many_probes()[0]
    assert_same(monitor.runs[0].token_scores("late")[0], probe.logits(features_of(llama, ids, probe)))


def test_a_copy_of_a_cache_is_not_taken_for_the_original(gpt2: Tiny) -> None:
    with torch.no_grad(), attach_probes(gpt2.bridge, make_probe()):
        _, cache = gpt2.bridge(torch.tensor([[5, 6, 7]]), return_type="logits_and_cache", use_cache=True)
        another = copy.deepcopy(cache)
        with pytest.raises(MonitorError, match="columns 0 to 2 were never scored: .* a copy of a cache is not known"):
            gpt2.bridge(torch.tensor([[8]]), past_key_values=another)


def test_two_monitors_at_once_do_not_touch_each_other(tiny: Tiny) -> None:
    rows = [encode(tiny, text) for text in PROMPTS]
    tokens, mask = left_padded(rows)
    half = many_probes()
    with attach_probes(tiny.bridge, half[:3]) as outer:
        with attach_probes(tiny.bridge, half[3:]) as inner:
            output = tiny.bridge.generate(tokens, attention_mask=mask, verbose=False, **GREEDY)
        later = tiny.bridge.generate(prompt_of(tiny, "cats"), verbose=False, **GREEDY)
    seen = [row + ids[:-1] for row, ids in zip(rows, output[:, tokens.shape[1] :].tolist(), strict=True)]
    assert_monitor(tiny, inner, seen, half[3:])
    assert_monitor(tiny, outer, [later[0, :-1].tolist()], half[:3])
    assert outer.runs[0].tokens()[2].tolist() == seen[2]


def test_threads_have_runs_of_their_own(llama: Tiny) -> None:
    """The prompts are equally long, and each pass waits for the other thread's, so that steps take turns."""
    prompts = [torch.tensor([[BOS, 40, 50, 60]]), torch.tensor([[BOS, 61, 51, 41]])]
    barrier = threading.Barrier(2, timeout=30)
    outputs: dict[int, list[int]] = {}
    errors: list[BaseException] = []

    def generate(at: int) -> None:
        try:
            output = llama.bridge.hf_generate(prompts[at], use_past_kv_cache=True, **GREEDY)
            outputs[at] = output[0, :-1].tolist()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    def wait(*_: Any) -> None:
        barrier.wait()

    handle = llama.bridge.original_model.lm_head.register_forward_hook(wait)
    with attach_probes(llama.bridge, many_probes()) as monitor, ExitStack() as stack:
        stack.callback(handle.remove)
        threads = [threading.Thread(target=generate, args=(at,)) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors, errors
    assert len(monitor.runs) == 2
    found = {tuple(run.tokens()[0].tolist()): run for run in monitor.runs}
    for ids in outputs.values():
        run = found[tuple(ids)]
        for probe in many_probes():
            assert_same(run.token_scores(probe.name)[0], probe.logits(features_of(llama, ids, probe)))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_beams": 2}, r"beam search \(num_beams > 1\)"),
        ({"num_beams": 2, "num_return_sequences": 2, "do_sample": True}, r"beam search"),
        ({"prompt_lookup_num_tokens": 2}, r"speculative decoding"),
        ({"guidance_scale": 1.5}, r"classifier-free guidance \(guidance_scale\)"),
    ],
)
def test_searches_are_refused_by_name(gpt2: Tiny, options: dict[str, Any], name: str) -> None:
    tokens = torch.tensor([[BOS, 40, 50, 40, 50, 40, 50]])
    with (
        pytest.raises(MonitorError, match=f"{name}.* reorders rows, takes tokens back or adds a text"),
        attach_probes(gpt2.bridge, make_probe()),
    ):
        gpt2.bridge.hf_generate(tokens, **{**GREEDY, **options})
    plain = gpt2.bridge.hf_generate(tokens, **{**GREEDY, **options})  # and works without probes
    assert plain.shape[1] > tokens.shape[1]


def test_speculative_decoding_with_a_draft_model_is_refused_by_name(gpt2: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    draft = AutoModelForCausalLM.from_pretrained(gpt2.folder).eval()
    with pytest.raises(MonitorError, match="speculative decoding"), attach_probes(gpt2.bridge, make_probe()):
        gpt2.bridge.hf_generate(torch.tensor([[BOS, 40, 50]]), assistant_model=draft, **GREEDY)


def test_rows_that_move_inside_the_cache_are_noticed(tiny: Tiny) -> None:
    """A beam search of the user's own, which no name gives away."""
    tokens = torch.tensor([[BOS, 40, 50, 60], [BOS, 61, 51, 41]])

    def steps(order: list[int] | None) -> None:
        with torch.no_grad():
            _, cache = tiny.bridge(tokens, return_type="logits_and_cache", use_cache=True)
            for at in range(3):
                if at == 2 and order is not None:
                    cache.reorder_cache(torch.tensor(order))
                _, cache = tiny.bridge(
                    torch.tensor([[70 + at], [70 + at]]),
                    past_key_values=cache,
                    return_type="logits_and_cache",
                    use_cache=True,
                )

    with attach_probes(tiny.bridge, make_probe()) as monitor:
        steps(None)
        steps([0, 1])
    assert len(monitor.runs) == 2
    with (
        pytest.raises(MonitorError, match=r"rows \[0, 1\] of the KV cache were replaced"),
        attach_probes(tiny.bridge, make_probe()),
    ):
        steps([1, 0])
    with (
        pytest.raises(MonitorError, match=r"rows \[1\] of the KV cache were replaced"),
        attach_probes(tiny.bridge, make_probe()),
    ):
        steps([0, 0])


def test_hooks_that_go_in_the_middle_of_a_generation_stop_it(gpt2: Tiny) -> None:
    calls: list[int] = []

    def reset(event: Any) -> None:
        calls.append(event.position)
        if event.generated:
            gpt2.bridge.reset_hooks()

    with attach_probes(gpt2.bridge, make_probe(), on_token=reset), pytest.raises(MonitorError, match="were removed"):
        gpt2.bridge.generate(torch.tensor([[BOS, 40, 50]]), verbose=False, **GREEDY)
    assert calls == [0, 1, 2, 3]


class Doubling(torch.nn.Module):
    """Stands where an SAE would: the module in the hook point's place, which does not fire our hook."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.fwd_hooks = name, list[Any]()

    def forward(self, activations: Tensor) -> Tensor:
        return activations


def test_a_hook_point_that_is_replaced_after_attaching_is_an_error(gpt2: Tiny) -> None:
    own = load_tiny("gpt2", gpt2.folder).bridge  # a bridge forgets a hook point that was replaced once
    message = r"hook points \['blocks.2.hook_resid_post'\] did not fire in a forward pass.* replaces hook points"
    with pytest.raises(ProbeNeverFiredError, match=message), attach_probes(own, make_probe()):  # noqa: PT012
        own(torch.tensor([[BOS, 40]]))
        own.blocks[2].hook_out = Doubling("blocks.2.hook_out")
        own(torch.tensor([[BOS, 41]]))


# --- nothing waits for the device ---

WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
    "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Operations that make the host wait for a device, counted while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masked = name in ("aten::index", "aten::index_put_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1] if index is not None
        )
        if name in WAITS or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits_of_steps(tiny: Tiny, **options: Any) -> list[str]:
    """Waits in the decode steps of a manual generation with probes attached, prompts and readers left out."""
    probes = [*many_probes(), make_probe("thresholded", seed=9).with_threshold(0.9)]
    rows = [encode(tiny, text) for text in PROMPTS]
    tokens, mask = left_padded(rows)
    with torch.no_grad(), attach_probes(tiny.bridge, probes, **options):
        logits, cache = tiny.bridge(tokens, attention_mask=mask, return_type="logits_and_cache", use_cache=True)
        with Waits() as waits:
            for _ in range(70):  # more than wait for a common reduction
                mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
                new = logits[:, -1].argmax(dim=-1, keepdim=True)
                logits = tiny.bridge.original_model(new, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return waits.found


@pytest.mark.parametrize(
    "options", [{"eos_token_id": []}, {"stop": True}, {"keep_scores": False, "eos_token_id": []}], ids=str
)
def test_no_step_waits_for_the_device(llama: Tiny, options: dict[str, Any]) -> None:
    tiny_without = waits_of_bare_steps(llama)
    assert waits_of_steps(llama, **options) == tiny_without


def waits_of_bare_steps(tiny: Tiny) -> list[str]:
    with torch.no_grad():
        _, cache = tiny.bridge(torch.tensor([[5, 6]]), return_type="logits_and_cache", use_cache=True)
        mask = torch.ones(1, 2, dtype=torch.long)
        with Waits() as waits:
            for _ in range(70):
                mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], dim=1)
                tiny.bridge.original_model(torch.tensor([[40]]), attention_mask=mask, past_key_values=cache, use_cache=True)
    return waits.found


def test_a_callback_waits_and_the_count_sees_it(llama: Tiny) -> None:
    assert len(waits_of_steps(llama, on_crossing=lambda alarm: None, eos_token_id=[])) > len(waits_of_bare_steps(llama))
