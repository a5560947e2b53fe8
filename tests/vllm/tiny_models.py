"""Tiny random models of four architectures with the embedded model's tokenizer, and the embedded model itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lmprobe_tl.demo import MODEL_FOLDER

D_MODEL, N_LAYERS, CONTEXT, VOCABULARY = 128, 4, 256, 2048
BOS, EOS = 0, 1
RANDOM = ("llama", "qwen3", "gpt2", "stablelm")
NAMES = ("demo", *RANDOM)


def save_models(root: Path) -> dict[str, Path]:
    """Hugging Face folders by name."""
    return {"demo": MODEL_FOLDER} | {name: _save(name, root / f"tiny-{name}") for name in RANDOM}


def _save(name: str, folder: Path) -> Path:
    torch.manual_seed(RANDOM.index(name))
    model = _build(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key:  # freshly made they are ones and zeros, which would hide a norm left out
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_FOLDER / file, folder / file)
    return folder


def _build(name: str) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        StableLmConfig,
        StableLmForCausalLM,
    )

    shared = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.1}
    wide = {
        "hidden_size": D_MODEL,
        "intermediate_size": 256,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
    }
    if name == "gpt2":
        config = GPT2Config(n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=CONTEXT, **shared)
        return GPT2LMHeadModel(config)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**wide, **shared))
    if name == "stablelm":  # whose blocks, in vLLM, return the whole stream and beside it what is left of it
        del wide["head_dim"]
        return StableLmForCausalLM(StableLmConfig(**wide, **shared))
    return Qwen3ForCausalLM(Qwen3Config(**wide, **shared))
