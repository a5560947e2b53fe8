"""Whether the embedded model uses the direction of a probe: what taking it out costs, and what adding it does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from embedded import embedded_model, embedded_tokenizer
from live_reference import BOS, left_padded

from lmprobe_tl import Probe, ablate, steer
from lmprobe_tl.demo.task import PROBE_EVAL_MODULES, PROBE_TRAIN_MODULES, labelled_pieces
from lmprobe_tl.weights import ProbeWeights


def pieces_of(modules: Sequence[str]) -> list[Any]:
    return [next(labelled_pieces(embedded_tokenizer(), module, max_tokens=128)) for module in modules]


def next_token_loss(model: Any, rows: Sequence[Sequence[int]]) -> float:
    tokens, mask = left_padded(rows)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
    counted = mask[:, :-1].bool()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted]))


@cache
def inside_probe(classifier: str) -> ProbeWeights:
    pieces = pieces_of(PROBE_TRAIN_MODULES[:8])
    probe = Probe(embedded_model(), 3, "all", classifier=classifier, random_state=0, name="inside")
    return probe.fit([piece.text for piece in pieces], [piece.labels for piece in pieces]).weights_


def test_taking_out_a_direction_that_the_model_uses_costs_more_than_as_large_a_change_elsewhere() -> None:
    model = embedded_model()
    rows = [[BOS, *piece.token_ids] for piece in pieces_of(PROBE_EVAL_MODULES[:6])]
    hook_point = "blocks.3.hook_resid_post"
    plain = next_token_loss(model, rows)
    with ablate(model, inside_probe("mass_mean")) as change:
        cost = next_token_loss(model, rows) - plain
    elsewhere = []
    for seed in range(3):
        direction = torch.randn(192, generator=torch.Generator().manual_seed(seed))
        with steer(model, direction, coefficient=change[hook_point].mean_norm, hook_points=hook_point) as control:
            elsewhere.append(next_token_loss(model, rows) - plain)
        assert control[hook_point].mean_norm == pytest.approx(change[hook_point].mean_norm, rel=1e-3)
        with ablate(model, direction, hook_points=hook_point):  # what lies along it by chance is less
            elsewhere.append(next_token_loss(model, rows) - plain)
    assert cost > 1.5 * max(elsewhere) > 0


def test_steering_by_a_probe_decides_what_the_model_writes() -> None:
    model = embedded_model()
    prompt = torch.tensor([[BOS, *embedded_tokenizer()("def load(path):\n", add_special_tokens=False)["input_ids"]]])
    written = {}
    for coefficient in (-8.0, 8.0):
        with steer(model, inside_probe("mass_mean"), coefficient=coefficient, unit="logit"):
            output = model.generate(prompt, max_new_tokens=12, do_sample=False, verbose=False, return_type="tokens")
        written[coefficient] = embedded_tokenizer().decode(output[0, prompt.shape[1] :])
    assert written[8.0].lstrip().startswith(("#", '"""'))
    assert not set(written[-8.0]) & set("#\"'")
