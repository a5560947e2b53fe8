"""Tiny models under TransformerLens 3.9: as HookedTransformer, with processed weights and without, and as TransformerBridge.

A lane of its own (`make test-tl3`), since one environment holds one version of TransformerLens.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors as small as here threads only wait for each other

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

KINDS = ("hooked", "hooked_raw", "bridge")
# RMSNorm knows no centring: one HookedTransformer, with its norms folded, is enough.
MODELS = [(name, kind) for name in tiny_models.NAMES for kind in KINDS if (name, kind) != ("rmsnorm", "hooked_raw")]


def pytest_configure(config: pytest.Config) -> None:
    if not version("transformer-lens").startswith("3."):
        raise pytest.UsageError(
            f"these tests need TransformerLens 3, here is {version('transformer-lens')}: `make test-tl3`."
        )


@dataclass(frozen=True)
class Tiny:
    """One model under TransformerLens, and a second copy under Hugging Face."""

    name: str
    kind: str
    folder: Path
    model: Any = field(repr=False)
    reference: Any = field(repr=False)

    @property
    def is_hooked(self) -> bool:
        """Whether it is a HookedTransformer."""
        return self.kind != "bridge"

    @property
    def is_centred(self) -> bool:
        """Whether its residual stream is x - mean(x): the default of HookedTransformer.from_pretrained with LayerNorm."""
        return (self.name, self.kind) == ("layernorm", "hooked")

    @property
    def bos(self) -> int:
        return self.model.tokenizer.bos_token_id

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        return [self.bos] * bos + self.model.tokenizer(text, add_special_tokens=False)["input_ids"]

    def hidden(self, ids: list[int], layer: int) -> torch.Tensor:
        """Residual stream after block `layer`, [pos d_model], as Hugging Face computes it for one unpadded row."""
        blocks = self.reference.transformer.h if self.name == "layernorm" else self.reference.model.layers
        seen: list[torch.Tensor] = []
        handle = blocks[layer].register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        try:
            with torch.no_grad():
                self.reference(torch.tensor([ids]))
        finally:
            handle.remove()
        return seen[0][0]

    def left_over_hooks(self) -> list[str]:
        """Where a hook of anyone's is still registered."""
        found = [name for name, point in self.model.hook_dict.items() if point.fwd_hooks]
        if self.kind == "bridge":  # it has hooks of its own on Hugging Face's inner modules
            return found + ["the whole model"] * bool(self.model.original_model._forward_pre_hooks)
        modules = self.model.named_modules()
        return found + [name for name, module in modules if module._forward_pre_hooks or module._forward_hooks]


def load_hooked(folder: Path, *, processed: bool, kind: Any = None) -> Any:
    """What `HookedTransformer.from_pretrained(name)` does, or from_pretrained_no_processing; those refuse a local folder."""
    import transformer_lens.loading_from_pretrained as loading
    from transformer_lens import HookedTransformer
    from transformers import AutoTokenizer

    cfg = loading.get_pretrained_model_config(str(folder), fold_ln=processed, device="cpu")
    weights = loading.get_pretrained_state_dict(str(folder), cfg)
    model = (kind or HookedTransformer)(cfg, AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        weights,
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return model


def load_bridge(folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.save_tiny(name, root / f"tiny-{name}") for name in tiny_models.NAMES}


@pytest.fixture(scope="session")
def all_tiny(folders: dict[str, Path]) -> dict[tuple[str, str], Tiny]:
    from transformers import AutoModelForCausalLM

    references = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
    found = {}
    for name, kind in MODELS:
        folder = folders[name]
        model = load_bridge(folder) if kind == "bridge" else load_hooked(folder, processed=kind == "hooked")
        found[name, kind] = Tiny(name, kind, folder, model, references[name])
    return found


@pytest.fixture(params=MODELS, ids="-".join)
def tiny(request: pytest.FixtureRequest, all_tiny: dict[tuple[str, str], Tiny]) -> Tiny:
    """Each model in turn."""
    return all_tiny[request.param]


@pytest.fixture(params=[pair for pair in MODELS if pair[1] != "bridge"], ids="-".join)
def hooked(request: pytest.FixtureRequest, all_tiny: dict[tuple[str, str], Tiny]) -> Tiny:
    """Each HookedTransformer in turn."""
    return all_tiny[request.param]


@pytest.fixture(autouse=True)
def no_hook_survives(request: pytest.FixtureRequest) -> Any:
    """Whatever a test did, no hook is left on a shared model."""
    yield
    if "all_tiny" in request.fixturenames:
        for one in request.getfixturevalue("all_tiny").values():
            assert not one.left_over_hooks(), f"hooks left behind on {one.name}-{one.kind}: {one.left_over_hooks()}"
