"""Two tiny models, the same on every machine and under every version of every library: weights and words come from here.

`layernorm` is built as GPT-2 is: LayerNorm, absolute positions, one special token for everything. `rmsnorm` is built as
Llama is: RMSNorm, rotary positions, grouped heads, and a token each for begin, end and pad.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = ("layernorm", "rmsnorm")
D_MODEL, N_LAYERS, CONTEXT = 32, 4, 64
TEXT = """the model reads every word of a short line and then it writes one more about cats dogs rain sun music light so we
look at what it said when nobody asked for any of this today or ever before in all long years"""
SPECIAL = {
    "layernorm": {"bos_token": "<end>", "eos_token": "<end>"},
    "rmsnorm": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}


def save_tiny(name: str, folder: Path) -> Path:
    """A Hugging Face folder with the model and its tokenizer."""
    tokenizer = build_tokenizer(name)
    model = build_model(name, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # As on the hub; HookedTransformer reads it.
    (folder / "config.json").write_text(json.dumps(config | ({"n_ctx": CONTEXT} if name == "layernorm" else {})))
    return folder


def build_tokenizer(name: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(SPECIAL[name].values()))
    vocabulary = {word: index for index, word in enumerate([*special, "<unknown>", *dict.fromkeys(TEXT.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL[name])


def build_model(name: str, vocab_size: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "layernorm":
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        shape = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, **ids))
    else:
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        shape = {"hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape, **more, **ids))
    fill(model, seed=NAMES.index(name))
    return model.eval()


def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights from numpy's RandomState, whose streams are frozen: norms near 1, and blocks that outweigh the embeddings, so
    that a generated token is seldom the one before it."""
    generator = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(generator.standard_normal(tuple(parameter.shape))).to(parameter.dtype)
            is_norm, is_embedding = "norm" in name or "ln_" in name, "wte" in name or "embed" in name
            centre = float(is_norm and name.endswith("weight"))
            parameter.copy_(centre + (0.1 if is_embedding else 0.3) * values)
