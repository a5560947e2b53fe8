"""How a model's own `generate` is asked: what it takes, and what to do where it takes no attention mask."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import MonitorError
from lmprobe_tl.forward_watch import ForwardCall, ForwardWatch


def ignores(model: Any, argument: str) -> bool:
    """Whether the model's `generate` names its arguments and has none of this name: given one, it may pass over it."""
    generate = getattr(model, "generate", None)
    named = inspect.signature(generate).parameters if callable(generate) else {}
    return "max_new_tokens" in named and argument not in named


def generate_without_mask(
    model: Any,
    tokens: Tensor,
    attention_mask: Tensor,
    settings: Mapping[str, Any],
    *,
    end_ids: Sequence[int],
) -> Tensor:
    """`model.generate` where it makes the mask of its prompts itself, from the pad token's id, as HookedTransformer does.

    tokens, attention_mask: [batch pos], padded on the left. settings: further arguments. end_ids: tokens that end a row.
    Returns [batch pos+new]. MonitorError, before the blocks run, where the model's mask of the prompts is another one.
    """
    first_tokens = tokens[torch.arange(len(tokens)), attention_mask.argmax(dim=1)].tolist()
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    watch = ForwardWatch(model, _MaskCheck(tokens, attention_mask), lambda output: None)
    try:
        return model.generate(
            tokens,
            padding_side="left",
            # Says of these tokens whether a BOS that has the pad's id stands before each row.
            prepend_bos=set(first_tokens) == {bos},
            eos_token_id=list(end_ids) or None,
            **settings,
        )
    finally:
        watch.remove()


class _MaskCheck:
    """Compares the first mask that the blocks are handed with the one that the prompts have."""

    def __init__(self, tokens: Tensor, attention_mask: Tensor) -> None:
        self._tokens, self._mask, self._seen = tokens, attention_mask.bool(), False

    def __call__(self, call: ForwardCall) -> None:
        if self._seen:
            return
        self._seen = True
        given = call.attention_mask
        made = torch.ones_like(self._mask) if given is None else given.to(self._mask.device).bool()
        if torch.equal(made, self._mask):
            return
        row, column = (made != self._mask).nonzero()[0].tolist()
        was, taken = ("a token", "a pad") if self._mask[row, column] else ("a pad", "a token")
        raise MonitorError(
            f"this model's generate takes no attention mask and makes one from the pad token's id; it took {was} of prompt "
            f"{row} (id {int(self._tokens[row, column])}) for {taken}. Generate from one prompt at a time or from prompts "
            "of equal length, all with a BOS or all without, and give the tokenizer a pad token that no prompt begins with "
            "(model.tokenizer.pad_token_id)."
        )
