"""Tiny models of four architectures, built and saved offline, each loaded twice: by TransformerLens and by Hugging Face."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors as small as here threads only wait for each other

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing of the code
hypothesis.settings.load_profile("any machine")

WORDS = "the model reads every word of a short line and then it writes one more about cats dogs rain sun music and light"
D_MODEL, N_LAYERS, CONTEXT = 32, 4, 96
ARCHITECTURES = ("gpt2", "llama", "qwen3", "neox")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """One architecture: `bridge` for the library, `reference` a second copy for Hugging Face, both from `folder`."""

    name: str
    folder: Path
    bridge: Any
    reference: Any

    @property
    def tokenizer(self) -> Any:
        return self.bridge.tokenizer

    def hidden(self, ids: list[int], layer: int) -> torch.Tensor:
        """Residual stream after block `layer`, [pos d_model], as Hugging Face computes it for one unpadded row."""
        seen: list[torch.Tensor] = []
        block = blocks_of(self.reference)[layer]
        handle = block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        try:
            with torch.no_grad():
                self.reference(torch.tensor([ids]))
        finally:
            handle.remove()
        return seen[0][0]


def blocks_of(model: Any) -> Any:
    for path in ("transformer.h", "model.layers", "gpt_neox.layers"):
        found = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise AssertionError(f"no blocks in {type(model).__name__}")


def build_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(name: str, vocab_size: int) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    shared = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    wide = {
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    }
    if name == "gpt2":
        config = GPT2Config(n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=CONTEXT, **shared)
        return GPT2LMHeadModel(config)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **wide, **shared))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=8, **wide, **shared))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**wide, **shared))


def load_tiny(name: str, folder: Path) -> Tiny:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Tiny(name, folder, bridge, reference)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny-models")
    tokenizer = build_tokenizer()
    folders = {}
    for seed, name in enumerate(ARCHITECTURES):
        torch.manual_seed(seed)
        folders[name] = root / f"tiny-{name}"
        build_model(name, len(tokenizer)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def all_tiny(tiny_folders: dict[str, Path]) -> dict[str, Tiny]:
    return {name: load_tiny(name, folder) for name, folder in tiny_folders.items()}


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, all_tiny: dict[str, Tiny]) -> Tiny:
    """Each architecture in turn."""
    return all_tiny[request.param]


@pytest.fixture
def gpt2(all_tiny: dict[str, Tiny]) -> Tiny:
    return all_tiny["gpt2"]


@pytest.fixture
def llama(all_tiny: dict[str, Tiny]) -> Tiny:
    return all_tiny["llama"]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and a tokenizer of whole words."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS.split(), *"abcdefgh"])]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=24, initializer_range=0.3, **shape)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_hook_survives(request: pytest.FixtureRequest) -> Any:
    """Whatever a test did, no hook of ours is left on a shared model."""
    yield
    if "all_tiny" not in request.fixturenames:
        return
    for one in request.getfixturevalue("all_tiny").values():
        left = [name for name, point in one.bridge.hook_dict.items() if point.fwd_hooks]
        assert not left, f"hooks left behind on {one.name}: {left}"
        assert not one.bridge.original_model._forward_pre_hooks
