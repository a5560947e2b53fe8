"""Forward passes of a model as they come: on which tokens, from which column on, under which attention mask."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmprobe_tl.errors import IncompatibleProbeError, MonitorError


@dataclass(frozen=True)
class ForwardCall:
    """What a model was called with: `tokens` [batch new], of which the first stands at column `start` of the whole sequence,
    `attention_mask` [batch columns], None where every token is real, and `cache`, the object that holds keys and values."""

    tokens: Tensor
    start: int
    attention_mask: Tensor | None
    cache: Any = None


class ForwardWatch:
    """Calls `before(call)` before each forward pass of the model, also inside `generate`, and `after(output)` at its end."""

    def __init__(self, model: Any, before: Callable[[ForwardCall], None], after: Callable[[Any], None]) -> None:
        first_block = _first_block(model)
        if first_block is not None:
            self._handles = _watch_blocks(model, first_block, before, after)
            return
        module = getattr(model, "original_model", model)
        names = list(inspect.signature(module.forward).parameters)

        def before_forward(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            before(_forward_call(arguments, dict(zip(names[1:], arguments[1:], strict=False)) | named))

        def after_forward(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
            after(output)

        self._handles = [
            module.register_forward_pre_hook(before_forward, with_kwargs=True),
            module.register_forward_hook(after_forward),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def logits_of(output: Any) -> Tensor | None:
    """The logits [batch pos vocabulary] in what a model returned, the very tensor; None where there are none."""
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) and output else output)
    return logits if isinstance(logits, Tensor) and logits.ndim == 3 else None


def cache_of(output: Any) -> Any:
    """The object with keys and values in what a model returned, or None."""
    return getattr(output, "past_key_values", None)


def cache_mark(cache: Any, length: int, back: int = 1) -> Tensor | None:
    """The key [batch d_head] that the last layer of a cache of `length` columns keeps for the column `back` from its end.

    It depends on all tokens up to there, so that it tells whether the rows of a cache are still where they were. None where
    the cache is laid out in another way (a fixed size, a sliding window, quantised).
    """
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[-1], "keys", None) if layers else None
    if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.shape[2] != length or back > length:
        return None
    return keys[:, 0, length - back]


# Functions of Transformers in which generation reorders rows or takes tokens back, where no hook sees it.
_SEARCHES = {
    "_beam_search": "beam search (num_beams > 1)",
    "_group_beam_search": "group beam search",
    "_constrained_beam_search": "constrained beam search",
    "_assisted_decoding": "speculative decoding (assistant_model or prompt_lookup_num_tokens)",
    "_contrastive_search": "contrastive search",
    "get_unconditional_logits": "classifier-free guidance (guidance_scale)",
}


def search_in_progress() -> str | None:
    """What kind of search called the model, where Transformers' `generate` does more than to append one token a row."""
    return next((_SEARCHES[name] for name in _transformers_callers() if name in _SEARCHES), None)


def prefill_in_progress() -> bool:
    """Whether Transformers' `generate` is processing a prompt, of which the last chunk may be a single token."""
    return any(name in ("_prefill", "_prefill_chunking") for name in _transformers_callers())


def _transformers_callers() -> Iterator[str]:
    """Names of the functions of Transformers that are at work, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("transformers"):
            yield frame.f_code.co_name
        frame = frame.f_back


def _forward_call(arguments: tuple[Any, ...], named: dict[str, Any]) -> ForwardCall:
    tokens = arguments[0] if arguments else named.get("input_ids", named.get("input"))
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise MonitorError(f"live scoring needs token ids [batch pos] as the model's input; it got {got}.")
    cache = named.get("past_key_values")
    start = int(cache.get_seq_length()) if cache is not None else 0
    mask = named.get("attention_mask")
    _check_mask(mask, tokens, start)
    return ForwardCall(tokens, start, mask, cache)


def _check_mask(mask: Any, tokens: Tensor, start: int) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (tokens.shape[0], start + tokens.shape[1])):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise MonitorError(
            "live scoring needs an attention mask [batch pos] that covers the "
            f"{start + tokens.shape[1]} columns so far; the "
            f"model was called with one of shape {shape}."
        )


# --- models whose `generate` goes around their own __call__, as HookedTransformer's does ---------------------------------

# What such a model computes before its first block, where a forward pass is first seen.
_BEFORE_THE_BLOCKS = ("hook_tokens", "hook_embed", "hook_pos_embed")


def check_is_watched(model: Any, hook_name: str) -> None:
    """Raise IncompatibleProbeError where a hook point fires before `ForwardWatch` can tell of the forward pass."""
    if hook_name in _BEFORE_THE_BLOCKS and _first_block(model) is not None:
        raise IncompatibleProbeError(
            f"live scoring sees a {type(model).__name__} from its first block on, and {hook_name!r} fires before; train the "
            "probe on 'blocks.0.hook_resid_pre', which carries the embeddings with their positions, or use a "
            "TransformerBridge."
        )


def _first_block(model: Any) -> Any:
    """The first block of a model whose blocks are handed attention mask and cache; None for every other model."""
    embed, blocks = getattr(model, "embed", None), getattr(model, "blocks", None)
    if hasattr(model, "original_model") or not isinstance(embed, nn.Module) or not isinstance(blocks, nn.ModuleList):
        return None
    told = inspect.signature(blocks[0].forward).parameters if len(blocks) else {}
    return blocks[0] if "past_kv_cache_entry" in told and "attention_mask" in told else None


def _watch_blocks(
    model: Any, first_block: nn.Module, before: Callable[[ForwardCall], None], after: Callable[[Any], None]
) -> list[Any]:
    watch = _BlockWatch(before)

    def after_head(_: Any, arguments: tuple[Any, ...], logits: Tensor) -> None:
        if (getattr(model.cfg, "output_logits_soft_cap", None) or 0.0) > 0.0:
            _after_soft_capped(logits, after)
        else:
            after(logits)

    return [
        model.embed.register_forward_pre_hook(watch.on_embed, with_kwargs=True),
        first_block.register_forward_pre_hook(watch.before_blocks, with_kwargs=True),
        model.unembed.register_forward_hook(after_head),
    ]


def _after_soft_capped(logits: Tensor, after: Callable[[Any], None]) -> None:
    """The model will cap these logits: one that was raised to tell the next token would be no higher than others, so these
    go down."""
    newest = logits[:, -1]
    seen = newest.clone()
    after(logits)
    raised = newest > seen
    newest.masked_fill_(raised.any(dim=-1, keepdim=True) & ~raised, -torch.inf)


class _BlockWatch:
    """Forward passes as they are seen inside: the token ids that get embedded, then what the first block is handed.

    `HookedTransformer.generate` embeds the prompt once and every sampled token after it; its blocks run on the newest
    embedding or, without a cache, on all of them. The token sampled last is embedded and goes no further.
    """

    def __init__(self, callback: Callable[[ForwardCall], None]) -> None:
        self._callback = callback
        self._thread = _Embedded()

    def on_embed(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = arguments[0] if arguments else named["tokens"]
        if tokens.ndim == 2:
            self._thread.tokens.append(tokens)
            self._thread.are_new = True

    def before_blocks(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        residual = arguments[0] if arguments else named["resid_pre"]
        tokens = self._tokens_of(*residual.shape[:2])
        entry, mask = named.get("past_kv_cache_entry"), named.get("attention_mask")
        start = int(entry.past_keys.shape[1]) if entry is not None else 0
        _check_mask(mask, tokens, start)
        self._callback(ForwardCall(tokens, start, mask, entry))

    def _tokens_of(self, batch: int, pos: int) -> Tensor:
        """[batch pos]: of the ids embedded, the latest `pos`, which must begin where one call began."""
        embedded, found = self._thread, list[Tensor]()
        while embedded.are_new and embedded.tokens and sum(piece.shape[1] for piece in found) < pos:
            found.insert(0, embedded.tokens.pop())
        if {piece.shape[0] for piece in found} != {batch} or sum(piece.shape[1] for piece in found) != pos:
            raise MonitorError(
                f"live scoring needs token ids [batch pos] as the model's input; its blocks ran on embeddings of shape "
                f"{(batch, pos)} = [batch pos] that are not those of tokens embedded just before (start_at_layer, or "
                "embeddings as the prompt)."
            )
        embedded.tokens, embedded.are_new = [torch.cat(found, dim=1)], False
        return embedded.tokens[0]


class _Embedded(threading.local):
    """What a thread has embedded: pieces [batch new] that may be part of its next forward pass; whether one came since the
    last."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.are_new = False
