"""Steering among other things on the model: what is left behind, other hooks, dtypes, gradients and residual bases."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from conftest import D_MODEL, Tiny, blocks_of, load_tiny
from live_reference import BOS, PROMPTS, assert_same, encode, left_padded, make_probe
from steering_reference import (
    EVERYWHERE,
    HOOK,
    assert_logits,
    batch_of,
    by_hand,
    logits_of,
    raised_by,
    scores_in,
    vector_of,
    without,
)

from lmprobe_tl import ablate, attach_probes, extract_activations, steer
from lmprobe_tl.errors import (
    IncompatibleProbeError,
    NothingChangedWarning,
)
from lmprobe_tl.live.edit import Reading, projection
from lmprobe_tl.weights import ProbeWeights


def test_nothing_leaks_after_the_block_or_an_exception(tiny: Tiny) -> None:
    _, tokens, mask = batch_of(tiny)
    plain = logits_of(tiny, tokens, mask)
    with ablate(tiny.bridge, make_probe(), hook_points="all"):
        changed = logits_of(tiny, tokens, mask)
    assert (plain - changed)[mask.bool()].abs().max() > 1e-2
    torch.testing.assert_close(logits_of(tiny, tokens, mask), plain, rtol=0, atol=0)
    with raised_by(RuntimeError, "stop here", steer(tiny.bridge, make_probe(), coefficient=1.0)) as change:
        logits_of(tiny, tokens, mask)
        raise RuntimeError("stop here")
    assert change[HOOK].n_positions > 0
    torch.testing.assert_close(logits_of(tiny, tokens, mask), plain, rtol=0, atol=0)


def test_a_users_own_hooks_stay(gpt2: Tiny) -> None:
    seen = []
    with gpt2.bridge.hooks(fwd_hooks=[(HOOK, lambda x, hook: seen.append(1))]):
        with steer(gpt2.bridge, make_probe(), coefficient=1.0):
            logits_of(gpt2, torch.tensor([[5, 6]]))
        logits_of(gpt2, torch.tensor([[5, 6]]))
    assert len(seen) == 2


def test_probes_see_what_blocks_before_theirs_made(gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    here, later = make_probe("here"), make_probe("later", "blocks.3.hook_out", seed=1)
    plain = scores_in(gpt2, [here, later], tokens, mask)
    with steer(gpt2.bridge, here, coefficient=3.0, unit="logit"):
        inside = scores_in(gpt2, [here, later], tokens, mask)
    with attach_probes(gpt2.bridge, [here, later]) as outside, steer(gpt2.bridge, here, coefficient=3.0, unit="logit"):
        logits_of(gpt2, tokens, mask)
    for row, before in enumerate(plain["here"]):
        assert_same(inside["here"][row][1:], before[1:] + 3.0)
        assert_same(outside.token_scores("here")[row], before)
        assert_same(outside.token_scores("later")[row], inside["later"][row])
        assert (inside["later"][row] - plain["later"][row])[1:].abs().max() > 1e-2


def test_nested_blocks_act_one_after_another(gpt2: Tiny) -> None:
    tokens, mask = left_padded([encode(gpt2, PROMPTS[1], bos=True)])
    first, second = make_probe("first"), make_probe("second", seed=1)
    with steer(gpt2.bridge, first, coefficient=2.0, **EVERYWHERE), ablate(gpt2.bridge, second, **EVERYWHERE):
        found = logits_of(gpt2, tokens, mask)
    take_out = without(second.direction[0])
    assert_logits(found, by_hand(gpt2, tokens, mask, lambda x: take_out(x + vector_of(first, 2.0))), mask)


def test_extraction_inside_the_block_sees_the_change(gpt2: Tiny) -> None:
    probe = make_probe()
    with ablate(gpt2.bridge, probe):
        found = extract_activations(gpt2.bridge, PROMPTS, HOOK, pooling="last_token").values[HOOK]
    assert_same(probe.logits(found), probe.intercept.expand(len(PROMPTS)))


def test_passes_inside_a_callback_are_not_changed(gpt2: Tiny) -> None:
    """A judge asks the model as it is, in the midst of a pass that is steered."""
    tokens = torch.tensor([[BOS, 5, 6, 7]])
    plain, asked = logits_of(gpt2, tokens), []
    probe = make_probe("watch", "blocks.0.hook_out")
    with (
        steer(gpt2.bridge, make_probe(), coefficient=5.0) as change,
        attach_probes(gpt2.bridge, probe, on_token=lambda event: asked.append(logits_of(gpt2, tokens))),
    ):
        steered = logits_of(gpt2, torch.tensor([[BOS, 5, 6, 9]]))
    expected = by_hand(
        gpt2,
        torch.tensor([[BOS, 5, 6, 9]]),
        torch.ones(1, 4, dtype=torch.long),
        lambda x: x + vector_of(make_probe(), 5.0),
        torch.tensor([[False, True, True, True]]),
    )
    assert len(asked) == 4
    torch.testing.assert_close(asked[0], plain)
    assert_same(steered, expected)
    assert change[HOOK].n_positions == 3


def test_the_models_dtype_is_kept_and_the_report_is_of_what_really_changed(tiny_folders: Any) -> None:
    tiny = load_tiny("llama", tiny_folders["llama"])
    tiny.bridge.to(torch.bfloat16)
    kinds, tokens = [], torch.tensor([encode(tiny, PROMPTS[1], bos=True)])
    record = [(HOOK, lambda x, hook: kinds.append(x.dtype))]
    with steer(tiny.bridge, make_probe(), coefficient=3.0) as change, tiny.bridge.hooks(fwd_hooks=record):
        found = logits_of(tiny, tokens)
    assert kinds == [torch.bfloat16] and found.dtype == torch.bfloat16
    assert change[HOOK].mean_norm == pytest.approx(3.0, rel=0.02)
    with (
        pytest.warns(NothingChangedWarning, match="the activations were so already"),
        steer(tiny.bridge, make_probe(), coefficient=1e-12) as change,
    ):
        logits_of(tiny, tokens)
    assert change[HOOK].max_norm < 1e-9


def test_autocast_does_not_narrow_the_change(gpt2: Tiny) -> None:
    edit = projection([Reading("p", HOOK, make_probe().direction, make_probe().intercept)])
    x = 100 * torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        changed, reading = edit.apply(x), edit.read(x)
    torch.testing.assert_close(changed, edit.apply(x), rtol=0, atol=0)
    torch.testing.assert_close(reading, edit.read(x), rtol=0, atol=0)


def test_gradients_flow_through_a_change(gpt2: Tiny) -> None:
    with ablate(gpt2.bridge, make_probe()):
        logits = gpt2.bridge(torch.tensor([[5, 6, 7]]))
    (gradient,) = torch.autograd.grad(logits[0, -1, 0], blocks_of(gpt2.bridge.original_model)[0].parameters().__next__())
    assert gradient.abs().max() > 0


@pytest.fixture(scope="module")
def centred(tiny_folders: Any) -> Tiny:
    tiny = load_tiny("gpt2", tiny_folders["gpt2"])
    tiny.bridge.enable_compatibility_mode(disable_warnings=True)
    return tiny


@cache
def zero_sum() -> ProbeWeights:
    direction = make_probe().direction
    direction = direction - direction.mean(dim=-1, keepdim=True)
    return ProbeWeights.from_direction(direction, 0.5, name="p", hook_points=HOOK, residual_basis="any")


def test_a_raw_probe_is_refused_on_the_centred_stream_and_another_does_the_same_on_both(gpt2: Tiny, centred: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    with pytest.raises(IncompatibleProbeError, match="raw residual stream"), ablate(centred.bridge, make_probe()):
        logits_of(centred, tokens, mask)
    with (
        pytest.raises(IncompatibleProbeError, match="raw residual stream"),
        ablate(centred.bridge, make_probe(), hook_points=1),
    ):
        logits_of(centred, tokens, mask)
    centred_basis = make_probe(residual_basis="centered")
    plain = logits_of(gpt2, tokens, mask).log_softmax(dim=-1)
    for probe in (zero_sum(), centred_basis):
        for act in (
            lambda model, probe=probe: steer(model, probe, coefficient=5.0),
            lambda model, probe=probe: ablate(model, probe, to=0.25),
        ):
            changes, logits = [], []
            for tiny in (gpt2, centred):
                with act(tiny.bridge) as change:  # type: ignore[misc]
                    logits.append(logits_of(tiny, tokens, mask).log_softmax(dim=-1))
                changes.append(change[HOOK])
            assert_logits(logits[0], logits[1], mask)
            assert (logits[0] - plain)[mask.bool()].abs().max() > 1e-2
            assert changes[0].mean_norm == pytest.approx(changes[1].mean_norm, rel=1e-3)
            assert changes[0].before["p"] == pytest.approx(changes[1].before["p"], abs=1e-3)
