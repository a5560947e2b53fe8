"""A probe on an encoder that reads both ways: BERT's own frame round the text, its padding mask, and its layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmprobe_tl import (
    Probe,
    ablate,
    attach_probes,
    extract_activations,
    extract_to_store,
    load_probe,
    monitored_generate,
    score_prompts,
    steer,
)
from lmprobe_tl.errors import EmptyMaskError, InputError
from lmprobe_tl.special_tokens import bos_id, end_of_sequence_ids, frame_ids
from lmprobe_tl.tokens import pad_rows, tokenize_prompts

TEXTS = ["cats and dogs", "the model reads every word of a short line", "rain", "one more about music and light", "sun sun"]
UNK, CLS, SEP = 1, 2, 3


@pytest.fixture(scope="module")
def bert(bert_folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(bert_folder), device="cpu")


@pytest.fixture(scope="module")
def reference(bert_folder: Path) -> tuple[Any, Any]:
    """Hugging Face's model and tokenizer, loaded from the same folder."""
    from transformers import AutoTokenizer, BertModel

    return BertModel.from_pretrained(bert_folder).eval(), AutoTokenizer.from_pretrained(bert_folder)


def hidden_states(reference: tuple[Any, Any], text: str) -> list[torch.Tensor]:
    """What each layer gives for a text on its own, [pos d_model], the embedding first."""
    model, tokenizer = reference
    with torch.no_grad():
        return [one[0] for one in model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states]


def test_text_stands_between_cls_and_sep_as_the_tokenizer_has_it(bert: Any, reference: tuple[Any, Any]) -> None:
    assert tokenize_prompts(bert, TEXTS) == reference[1](TEXTS)["input_ids"]
    assert tokenize_prompts(bert, TEXTS, prepend_bos=False) == reference[1](TEXTS, add_special_tokens=False)["input_ids"]


def test_the_bos_that_transformerlens_invents_for_bert_is_not_used(bert: Any) -> None:
    assert bert.tokenizer.bos_token_id == UNK  # what this is about
    assert bos_id(bert) == CLS and end_of_sequence_ids(bert) == (SEP,)
    assert all(UNK not in row for row in tokenize_prompts(bert, TEXTS))


def test_text_with_its_frame_gets_no_second_one(bert: Any) -> None:
    framed, bare = tokenize_prompts(bert, ["[CLS] cats and dogs [SEP]", "cats and dogs"])
    assert framed == bare
    (inside,) = tokenize_prompts(bert, ["cats [SEP] dogs"])
    assert inside.count(SEP) == 2 and inside[-1] == SEP


def test_truncation_keeps_the_frame_as_hugging_face_does(bert: Any, reference: tuple[Any, Any]) -> None:
    for limit in (3, 4, 6):
        right = tokenize_prompts(bert, TEXTS, max_length=limit, truncation="right")
        assert right == reference[1](TEXTS, truncation=True, max_length=limit)["input_ids"]
        left = tokenize_prompts(bert, TEXTS, max_length=limit, truncation="left")
        whole = tokenize_prompts(bert, TEXTS)
        assert left == [row if len(row) <= limit else [CLS, *row[-(limit - 1) :]] for row in whole]
    assert tokenize_prompts(bert, TEXTS[:1], max_length=1, truncation="right") == [[CLS]]


@pytest.mark.parametrize("batch_size", [1, None])
def test_each_layer_is_what_hugging_face_computes_for_the_text_alone(
    bert: Any, reference: tuple[Any, Any], batch_size: int | None
) -> None:
    found = extract_activations(bert, TEXTS, "all", "all", include_bos=True, batch_size=batch_size)
    assert found.offsets is not None
    for index, text in enumerate(TEXTS):
        states = hidden_states(reference, text)
        for layer in range(3):
            rows = found.values[f"blocks.{layer}.hook_resid_post"][found.offsets[index] : found.offsets[index + 1]]
            torch.testing.assert_close(rows, states[layer + 1], atol=1e-5, rtol=1e-4)


def test_poolings_leave_cls_out_and_count_sep(bert: Any, reference: tuple[Any, Any]) -> None:
    expected = {
        "mean": lambda states: states[1:].mean(dim=0),
        "first_token": lambda states: states[0],
        "last_token": lambda states: states[-1],
        "eos": lambda states: states[-1],
        "max": lambda states: states[1:].amax(dim=0),
    }
    found = extract_activations(bert, TEXTS, 1, pooling=list(expected))
    for name, pool in expected.items():
        by_hand = torch.stack([pool(hidden_states(reference, text)[2]) for text in TEXTS])
        torch.testing.assert_close(found[name].values["blocks.1.hook_resid_post"], by_hand, atol=1e-5, rtol=1e-4)


def test_an_empty_text_has_no_token_that_counts(bert: Any) -> None:
    with pytest.raises(EmptyMaskError, match="prompt 1"):
        extract_activations(bert, ["cats", ""], 1, "mean")


def test_a_probe_on_an_encoder_is_saved_and_scores_the_same(bert: Any, tmp_path: Path) -> None:
    positive, negative = ["cats", "dogs and cats", "cats and dogs", "dogs"], ["rain", "sun", "rain and sun", "sun rain"]
    probe = Probe(bert, 1, "mean", random_state=0).fit_contrast(positive, negative)
    texts = [*positive, *negative, "short line about dogs"]
    logits = probe.decision_function(texts)
    assert (logits[:4] > 0).all() and (logits[4:8] < 0).all()
    scored = score_prompts(bert, texts, load_probe(probe.save(tmp_path / "probe.safetensors")))
    np.testing.assert_allclose(scored["probe"].scores, probe.predict_proba(texts)[:, 1], atol=1e-5)


def test_live_scores_of_an_encoder_are_those_of_each_text_alone(bert: Any) -> None:
    probe = Probe(bert, 1, "mean", random_state=0).fit_contrast(["cats", "dogs and cats"], ["rain", "sun and rain"]).weights_
    rows = tokenize_prompts(bert, TEXTS)
    tokens, mask = pad_rows(rows, pad_token_id=0)
    with torch.no_grad():
        with attach_probes(bert, probe) as monitor:
            bert(tokens, attention_mask=mask)
        for row, scores in zip(rows, monitor.token_scores("probe"), strict=True):
            with attach_probes(bert, probe) as alone:
                bert(torch.tensor([row]))
            torch.testing.assert_close(scores, alone.token_scores("probe")[0], atol=1e-5, rtol=1e-4)
            assert len(scores) == len(row)


def test_an_encoder_is_steered_and_ablated_between_its_frame(bert: Any) -> None:
    probe = Probe(bert, 1, "mean", random_state=0).fit_contrast(["cats", "dogs and cats"], ["rain", "sun and rain"]).weights_
    rows = tokenize_prompts(bert, TEXTS)
    tokens, mask = pad_rows(rows, pad_token_id=0)
    with torch.no_grad(), ablate(bert, probe) as change:
        together = bert(tokens, attention_mask=mask)
    assert change["blocks.1.hook_resid_post"].n_positions == sum(map(len, rows)) - len(rows)  # all but [CLS]
    assert change["blocks.1.hook_resid_post"].after["probe"] == pytest.approx(float(probe.intercept), abs=1e-4)
    with torch.no_grad(), ablate(bert, probe):
        for at, row in enumerate(rows):
            torch.testing.assert_close(together[at, : len(row)], bert(torch.tensor([row]))[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad(), steer(bert, probe, coefficient=2.0, unit="logit") as change:
        bert(tokens, attention_mask=mask)
    found = change["blocks.1.hook_resid_post"]
    assert found.after["probe"] - found.before["probe"] == pytest.approx(2.0, abs=1e-3)


def test_an_encoder_generates_nothing(bert: Any) -> None:
    probe = Probe(bert, 1, "mean", random_state=0).fit_contrast(["cats"], ["rain"])
    with pytest.raises(InputError, match="an encoder, which generates nothing. Score whole texts with score_prompts"):
        monitored_generate(bert, ["cats"], probe, max_new_tokens=2)


def test_an_encoder_is_stored_though_transformerlens_has_hooks_of_its_own_on_it(bert: Any, tmp_path: Path) -> None:
    assert any(point.fwd_hooks for point in bert.hook_dict.values())  # what this is about
    store = extract_to_store(bert, TEXTS, tmp_path / "store", "all", "mean")
    expected = extract_activations(bert, TEXTS, "all", "mean").concatenated()
    torch.testing.assert_close(store.values(), expected, atol=1e-5, rtol=1e-4)
    probe = Probe(bert, [0, 2], "mean", random_state=0).fit_store(store, [1, 0, 0, 1, 0])
    by_prompts = Probe(bert, [0, 2], "mean", random_state=0).fit(TEXTS, [1, 0, 0, 1, 0])
    np.testing.assert_allclose(probe.decision_function(TEXTS), by_prompts.decision_function(TEXTS), atol=1e-3)


def test_a_hook_of_the_user_on_an_encoder_is_refused(bert: Any, tmp_path: Path) -> None:
    bert.hook_dict["blocks.0.mlp.in.hook_in"].add_hook(lambda values, hook: values + 1)
    try:
        with pytest.raises(InputError, match=r"hooks of others on 'blocks\.0\.(hook_mlp_in|mlp\.in\.hook_in)'"):
            extract_to_store(bert, TEXTS, tmp_path / "store", 1, "mean")
    finally:
        bert.reset_hooks()


def test_a_model_that_reads_from_left_to_right_has_no_frame(bert: Any) -> None:
    tokenizer = bert.tokenizer
    for one_way in (
        SimpleNamespace(cfg=SimpleNamespace(attention_dir="causal"), tokenizer=tokenizer),
        SimpleNamespace(cfg=SimpleNamespace(), tokenizer=tokenizer, adapter=SimpleNamespace(supports_generation=True)),
        SimpleNamespace(cfg=SimpleNamespace(attention_dir="bidirectional"), tokenizer=None),
        SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=7, cls_token_id=None)),
    ):
        assert frame_ids(one_way) is None
    version_3 = SimpleNamespace(
        cfg=SimpleNamespace(attention_dir="causal"), tokenizer=tokenizer, adapter=SimpleNamespace(supports_generation=False)
    )
    assert frame_ids(version_3) == frame_ids(bert) == (CLS, SEP)
