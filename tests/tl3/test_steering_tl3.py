"""Steering and ablation under TransformerLens 3.9: generation is that of a plain loop without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Tiny
from reference import PROMPTS, assert_same, make_probe, padded
from torch import Tensor

from lmprobe_tl import ablate, attach_probes, steer

NEW = 4
LENGTH = 12.0
HOOK = make_probe().hook_points[0]


def plain_loop(tiny: Tiny, row: list[int], positions: str) -> list[int]:
    """Greedy tokens of one row, the whole prefix anew in each step, changed by a hook of TransformerLens' own."""
    direction = make_probe().direction[0]
    ids, prompt = list(row), len(row)
    has_bos = row[0] == tiny.model.tokenizer.bos_token_id
    for _ in range(NEW):
        column = torch.arange(len(ids))
        chosen = {"all": column >= 0, "prompt": column < prompt, "generated": column >= prompt}[positions]
        chosen = (chosen & ((column > 0) | (not has_bos)))[None, :, None]

        def push(x: Tensor, hook: Any, chosen: Tensor = chosen) -> Tensor:
            return torch.where(chosen, x + LENGTH * direction / direction.norm(), x)

        with torch.no_grad():
            logits = tiny.model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(HOOK, push)])
        ids.append(int(logits[0, -1].argmax()))
    return ids[prompt:]


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_generation_is_that_of_a_plain_loop(tiny: Tiny, positions: Any, use_past_kv_cache: bool) -> None:
    row = tiny.encode(PROMPTS[1])
    options = {"max_new_tokens": NEW, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with steer(tiny.model, make_probe(), coefficient=LENGTH, positions=positions) as change:
        output = tiny.model.generate(torch.tensor([row]), use_past_kv_cache=use_past_kv_cache, **options)
    assert output[0, len(row) :].tolist() == plain_loop(tiny, row, positions)
    prompt = len(row) - (row[0] == tiny.model.tokenizer.bos_token_id)
    assert change[HOOK].n_positions == {"all": prompt + NEW - 1, "prompt": prompt, "generated": NEW - 1}[positions]


def test_ablation_makes_the_logit_the_intercept(tiny: Tiny) -> None:
    tokens, mask = padded([tiny.encode(text) for text in PROMPTS], tiny.model.tokenizer.pad_token_id, "left")
    probe = make_probe()
    with ablate(tiny.model, probe, include_bos=True), attach_probes(tiny.model, probe) as monitor, torch.no_grad():
        tiny.model(tokens, attention_mask=mask)
    for scores in monitor.token_scores(probe.name):
        assert_same(scores, probe.intercept.tolist() * len(scores), "logits")


def test_the_middle_of_a_block_is_in_the_stream_of_a_hooked_transformer(hooked: Tiny) -> None:
    tokens = torch.tensor([hooked.encode(PROMPTS[1])])
    probe, seen = make_probe(), {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[len(seen)] = x.detach().clone()

    middle = "blocks.1.hook_resid_mid"
    with torch.no_grad(), hooked.model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", keep)]):
        hooked.model(tokens)
        with steer(hooked.model, probe.direction[0], coefficient=LENGTH, hook_points=middle, include_bos=True):
            hooked.model(tokens)
    along = (seen[1] - seen[0]) @ (probe.direction[0] / probe.direction[0].norm())
    assert along.mean() > 0.5 * LENGTH
