"""The embedded model: an ordinary Hugging Face folder that has learnt its language."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model
from lmprobe_tl.demo.main_job import training_record
from lmprobe_tl.demo.task import PROBE_EVAL_MODULES, stdlib_source
from lmprobe_tl.demo.train_model import validation_loss

TEXT = 'def area(width, height):\n    """Return the area."""\n    return width * height  # in square metres\n'


@pytest.fixture(scope="module")
def hugging_face() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).eval(), AutoTokenizer.from_pretrained(MODEL_FOLDER)


def test_transformer_lens_and_transformers_load_the_same_folder(hugging_face: tuple[Any, Any]) -> None:
    model, tokenizer = hugging_face
    bridge = load_demo_model()
    tokens = bridge.to_tokens(TEXT)
    assert tokens.tolist() == [tokenizer(TEXT)["input_ids"]]
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == TEXT


def test_weights_are_small_and_safe() -> None:
    assert sorted(path.suffix for path in MODEL_FOLDER.iterdir() if path.suffix != ".json") == [".safetensors"]
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert 2e6 <= training_record()["parameters"] <= 4e6


def test_the_model_has_learnt_more_than_a_trigram(hugging_face: tuple[Any, Any]) -> None:
    """On text that it was not trained on: the recorded losses, and the loss measured here on some of these modules."""
    losses = training_record()["validation_loss_nats_per_token"]
    assert losses["model"] < losses["trigram"] < losses["bigram"] < losses["unigram"]
    model, tokenizer = hugging_face
    text = "".join(source for name in PROBE_EVAL_MODULES[:6] if (source := stdlib_source(name)))
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:20_000])
    measured = validation_loss(model, ids, tokenizer.bos_token_id)
    assert measured < losses["trigram"] - 0.3
    shuffled = np.random.default_rng(0).permutation(ids)  # the control: without order there is nothing to predict from
    assert validation_loss(model, shuffled, tokenizer.bos_token_id) > measured + 2


def test_quotes_and_comment_signs_are_tokens_of_their_own(hugging_face: tuple[Any, Any]) -> None:
    _, tokenizer = hugging_face
    encoded = tokenizer('f("a")  # "b" it\'s\n"""c"""\n', add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in encoded]
    for piece in pieces:
        assert not any(sign in piece for sign in "\"'#") or piece in ('"', "'", "#", '"""', "'''"), pieces
