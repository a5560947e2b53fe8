"""Extraction under TransformerLens 3.9: the activations are Hugging Face's, whatever the padding and however processed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from reference import PROMPTS, assert_same, expected_logits, expected_running, hidden_at, make_probe
from tiny_models import CONTEXT, D_MODEL, N_LAYERS, NAMES

from lmprobe_tl import Probe, extract_activations, score_prompts
from lmprobe_tl.errors import IncompatibleProbeError, UnknownHookPointError
from lmprobe_tl.extraction import run_batches
from lmprobe_tl.hook_points import (
    context_length,
    end_of_sequence_ids,
    is_centred,
    layer_count,
    load_model,
    model_record,
    normalization,
    run_to_hook_points,
    width,
)

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.3.hook_resid_post")


def expected_at(tiny: Tiny, ids: list[int], hook_name: str) -> torch.Tensor:
    """As Hugging Face computes it; less its mean where the model carries the centred stream."""
    if hook_name == "blocks.0.hook_resid_pre":
        inner = tiny.reference.transformer if tiny.name == "layernorm" else tiny.reference.model
        values = (
            inner.wte.weight[ids] + inner.wpe.weight[: len(ids)]
            if tiny.name == "layernorm"
            else inner.embed_tokens.weight[ids]
        )
    else:
        values = hidden_at(tiny, ids, hook_name)
    return (values - values.mean(dim=-1, keepdim=True) if tiny.is_centred else values).detach()


@pytest.fixture(params=["left", "right"])
def tokenizer_side(request: pytest.FixtureRequest, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tokenizer's own padding side, from which HookedTransformer guesses masks: it must not matter."""
    monkeypatch.setattr(tiny.model.tokenizer, "padding_side", request.param)
    return request.param


@pytest.mark.parametrize("side", ["left", "right"])
def test_activations_are_those_of_hugging_face_for_both_padding_sides(tiny: Tiny, tokenizer_side: str, side: str) -> None:
    rows = [tiny.encode(text) for text in PROMPTS]

    def keep(activations: torch.Tensor, batch: Any) -> list[torch.Tensor]:
        return [one[mask.bool()].clone() for one, mask in zip(activations, batch.attention_mask, strict=True)]

    ((batch, kept),) = run_batches(tiny.model, rows, HOOKS, keep, padding_side=side, progress=False)  # type: ignore[arg-type]
    assert (batch.attention_mask[:, 0] if side == "left" else batch.attention_mask[:, -1]).tolist() == [1, 0, 0]
    for hook_name in HOOKS:
        for index, found in zip(batch.indices, kept[hook_name], strict=True):
            torch.testing.assert_close(found, expected_at(tiny, rows[index], hook_name), rtol=1e-4, atol=1e-4)


def test_extracted_and_pooled_activations_are_those_of_hugging_face(tiny: Tiny, tokenizer_side: str) -> None:
    every = extract_activations(tiny.model, PROMPTS, hook_points=[1, -1], pooling="all", include_bos=True)
    assert every.tokens == [tiny.encode(text) for text in PROMPTS]
    mean = extract_activations(tiny.model, PROMPTS, hook_points=[1, -1], pooling="mean", batch_size=2)
    for hook_name in HOOKS[1:]:
        rows = [expected_at(tiny, ids, hook_name) for ids in every.tokens]
        torch.testing.assert_close(every.values[hook_name], torch.cat(rows), rtol=1e-4, atol=1e-4)
        means = torch.stack([row[1:].mean(dim=0) for row in rows])  # BOS does not count
        torch.testing.assert_close(mean.values[hook_name], means, rtol=1e-4, atol=1e-4)


def test_the_basis_is_told_from_the_activations(tiny: Tiny) -> None:
    every = extract_activations(tiny.model, PROMPTS, hook_points="all", pooling="all")
    assert {is_centred(values) for values in every.values.values()} == {tiny.is_centred}


def test_what_the_package_reads_off_a_model(tiny: Tiny) -> None:
    model = tiny.model
    assert load_model(model) is model
    assert (layer_count(model), width(model), context_length(model)) == (N_LAYERS, D_MODEL, CONTEXT)
    assert normalization(model) == tiny.name
    assert end_of_sequence_ids(model) == (model.tokenizer.eos_token_id,)


def test_one_model_has_one_record_under_both_classes_and_any_processing(
    all_tiny: dict[tuple[str, str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_tiny["rmsnorm", "hooked"].model.cfg, "n_ctx", 2048)  # which it puts for longer ones
    records = {pair: model_record(one.model) for pair, one in all_tiny.items()}
    for name in ("layernorm", "rmsnorm"):
        (record,) = {one for (of, _), one in records.items() if of == name}
        assert record.id == f"tiny-{name}"
    assert len(set(records.values())) == 2


def test_the_pass_stops_after_the_last_wanted_layer(hooked: Tiny) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(hooked.model.blocks)
    ]
    seen: list[torch.Size] = []
    tokens = torch.tensor([[hooked.bos, 5, 6]])
    try:
        run_to_hook_points(
            hooked.model,
            tokens,
            torch.ones_like(tokens),
            {"blocks.1.hook_resid_mid": lambda values: seen.append(values.shape)},
        )
    finally:
        for handle in handles:
            handle.remove()
    assert (ran, seen) == ([0, 1], [(1, 3, D_MODEL)])
    assert hooked.model.cfg.default_prepend_bos


def test_a_misspelt_name_is_an_error_though_hooks_would_pass_over_it(hooked: Tiny) -> None:
    with pytest.raises(
        UnknownHookPointError, match=r"no hook point 'blocks\.1\.hook_resid_pots'\. Closest: 'blocks\.1\.hook_resid_post'"
    ):
        extract_activations(hooked.model, PROMPTS, hook_points="blocks.1.hook_resid_pots")
    with pytest.raises(IncompatibleProbeError, match=r"Closest: 'blocks\.1\.hook_resid_post'"):
        score_prompts(hooked.model, PROMPTS, make_probe(hook_points="blocks.1.hook_resid_pots"))


POSITIVE = ["cats sun music light", "dogs rain", "sun music", "light rain and sun", "cats and dogs", "music light"]
NEGATIVE = ["we look at what it said", "nobody asked", "any of this today", "ever before", "in all long years", "so we said"]


@pytest.mark.parametrize("name", NAMES)
def test_probes_fitted_under_either_class_are_one_probe(all_tiny: dict[tuple[str, str], Tiny], name: str) -> None:
    fitted = {}
    for (of, kind), tiny in all_tiny.items():
        if of == name:
            fitted[kind] = Probe(tiny.model, hook_points=2, pooling="mean", random_state=0).fit_contrast(POSITIVE, NEGATIVE)
    bridge = fitted["bridge"]
    probabilities = bridge.predict_proba(POSITIVE + NEGATIVE)[:, 1]
    assert np.ptp(probabilities) > 0.1
    assert bridge.weights_.spec.residual_basis == ("any" if name == "layernorm" else "raw")
    for probe in fitted.values():
        torch.testing.assert_close(probe.weights_.direction, bridge.weights_.direction, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(probe.predict_proba(POSITIVE + NEGATIVE)[:, 1], probabilities, atol=1e-4)
        assert probe.weights_.spec.residual_basis == bridge.weights_.spec.residual_basis
        assert probe.weights_.spec.model == bridge.weights_.spec.model


@pytest.mark.parametrize("inference", ["score:max", "score:mean", "mean"])
def test_prompt_scores_are_those_of_a_recompute(tiny: Tiny, tokenizer_side: str, inference: str) -> None:
    probe = make_probe(hook_points=["blocks.3.hook_resid_post", "blocks.1.hook_resid_pre"], inference=inference)
    found = score_prompts(tiny.model, PROMPTS, probe, batch_size=2, progress=False)["p"]
    rows = [tiny.encode(text) for text in PROMPTS]
    for ids, logits in zip(rows, found.token_logits, strict=True):
        assert_same(logits, expected_logits(tiny, ids, probe), "logits")
    assert_same(found.scores, [expected_running(tiny, ids, probe)[-1] for ids in rows], "scores")
