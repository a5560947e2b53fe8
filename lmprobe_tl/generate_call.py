"""How a model's own `generate` is asked: what it takes, and what to do where it takes neither a mask nor a stop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lmprobe_tl.errors import InputError, MonitorError
from lmprobe_tl.forward_watch import ForwardCall, watch_forward
from lmprobe_tl.hook_points import vocabulary_size


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
    stop_rows: Callable[[], Tensor] | None,
) -> Tensor:
    """`model.generate` where it makes the mask of its prompts itself, from the pad token's id, as HookedTransformer does.

    tokens, attention_mask: [batch pos], padded on the left. settings: further arguments. end_ids: tokens that end a row.
    stop_rows: [batch] bool, asked in every step after the last block; such a row gets an end token next.
    Returns [batch pos+new]. MonitorError, before the blocks run, where the model's mask of the prompts is another one.
    """
    first_tokens = tokens[torch.arange(len(tokens)), attention_mask.argmax(dim=1)].tolist()
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    with ExitStack() as stack:
        stack.callback(watch_forward(model, _MaskCheck(tokens, attention_mask)).remove)
        if stop_rows is not None:
            stack.callback(_end_stopped_rows(model, end_ids, stop_rows).remove)
        return model.generate(
            tokens,
            padding_side="left",
            # Says of these tokens whether a BOS that has the pad's id stands before each row.
            prepend_bos=set(first_tokens) == {bos},
            eos_token_id=list(end_ids) or None,
            **settings,
        )


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


def _end_stopped_rows(model: Any, end_ids: Sequence[int], stop_rows: Callable[[], Tensor]) -> Any:
    """A hook on the LM head that leaves rows which are to stop one choice for their next token: an end token."""
    size, head = vocabulary_size(model), getattr(model, "unembed", None)
    usable = [token_id for token_id in end_ids if size is None or token_id < size]
    if not usable or not isinstance(head, nn.Module):
        raise InputError(
            f"stop=True, but the generate of this {type(model).__name__} takes no stopping_criteria, and there is no end "
            "token to end a row with instead. Pass stop=False and read each result's alarms, give the model a tokenizer "
            "with an EOS token, or use a TransformerBridge."
        )

    # Logits may be soft-capped after the head, to cap * tanh(logits / cap).
    chosen = 10.0 * max(getattr(model.cfg, "output_logits_soft_cap", None) or 0.0, 0.0)

    def leave_the_end_token(_: Any, __: Any, logits: Tensor) -> Tensor:
        stopped = stop_rows().to(logits.device)
        # In place: the head has just made these, and a copy of a long prompt's logits is large.
        logits[stopped, -1] = -torch.inf
        logits[stopped, -1, usable[0]] = chosen
        return logits

    return head.register_forward_hook(leave_the_end_token)
