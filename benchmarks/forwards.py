"""Forward passes that extraction is compared with: the bare one, and what one writes without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.pooling import pool_mean
from lmprobe_tl.tokens import TOKENS_ON_CPU, batches_by_length, pad_id, pad_rows, tokenize_prompts


class _Stop(Exception):  # noqa: N818 (a signal, not an error)
    pass


def _stop(*_: Any) -> None:
    raise _Stop


@dataclass(frozen=True)
class Workload:
    """Texts for a model, with their padded batches (tokens, attention mask), each [batch pos], as extraction makes them.

    plain: the same weights in Hugging Face's own class, without TransformerLens around its modules.
    """

    model: Any
    plain: Any
    texts: Sequence[str]
    rows: list[list[int]] = field(init=False)
    batches: list[tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        rows = tokenize_prompts(self.model, self.texts)
        groups = batches_by_length([len(row) for row in rows], max_tokens=TOKENS_ON_CPU)
        pad = pad_id(self.model)
        batches = [pad_rows([rows[index] for index in group], pad_token_id=pad) for group in groups]
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "batches", batches)

    @cached_property
    def token_tensors(self) -> list[Tensor]:
        return [torch.tensor(row) for row in self.rows]

    @property
    def padding(self) -> float:
        """Padded tokens / real ones."""
        return sum(tokens.numel() for tokens, _ in self.batches) / sum(map(len, self.rows))

    # --- the references ---

    def bare(self, layer: int) -> None:
        """The model that extraction runs, its batches made, up to the output of `layer`: no pooling, nothing kept."""
        self._run_until(self.model.original_model, self.model.blocks[layer])

    def plain_bare(self, layer: int) -> None:
        """As `bare`, without TransformerLens."""
        self._run_until(self.plain, blocks_of(self.plain)[layer])

    @torch.no_grad()
    def _run_until(self, model: Any, block: Any) -> None:
        handle = block.register_forward_hook(_stop)
        try:
            for tokens, mask in self.batches:
                try:
                    model(tokens, attention_mask=mask, use_cache=False)
                except _Stop:
                    continue
                raise RuntimeError("the block did not run")
        finally:
            handle.remove()

    @torch.no_grad()
    def hidden_states(self, layers: Sequence[int]) -> list[dict[int, Tensor]]:
        """Hugging Face's full forward with `output_hidden_states=True`; the wanted layers pooled by mean afterwards."""
        pooled = []
        for tokens, mask in self.batches:
            hidden = self.plain(tokens, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
            pooled.append({layer: pool_mean(hidden[layer + 1], mask) for layer in layers})
        return pooled

    @torch.no_grad()
    def run_with_cache(self, layers: Sequence[int], *, filtered: bool) -> list[dict[int, Tensor]]:
        """TransformerLens' `run_with_cache`, of all or filtered by name; the wanted layers pooled by mean afterwards."""
        names = {layer: f"blocks.{layer}.hook_resid_post" for layer in layers}
        options = {"names_filter": list(names.values())} if filtered else {}
        pooled = []
        for tokens, mask in self.batches:
            _, cached = self.model.run_with_cache(tokens, attention_mask=mask, **options)
            pooled.append({layer: pool_mean(cached[name], mask) for layer, name in names.items()})
        return pooled


def blocks_of(model: Any) -> Any:
    """The decoder blocks of a Hugging Face GPT-2 or Llama."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers
