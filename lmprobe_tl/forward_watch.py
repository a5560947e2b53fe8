"""Forward passes of a model as they come: on which tokens, from which column on, under which attention mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmprobe_tl.errors import IncompatibleProbeError, MonitorError


@dataclass(frozen=True)
class ForwardCall:
    """What a model was called with: `tokens` [batch new], of which the first stands at column `start` of the whole sequence,
    and `attention_mask` [batch columns], None where every token is real."""

    tokens: Tensor
    start: int
    attention_mask: Tensor | None


def watch_forward(model: Any, callback: Callable[[ForwardCall], None]) -> Any:
    """Call `callback` before every forward pass of the model, also inside `generate`; returns a handle with `remove()`."""
    first_block = _first_block(model)
    if first_block is not None:
        return _BlockWatch(model.embed, first_block, callback)
    module = getattr(model, "original_model", model)

    def before_forward(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        callback(_forward_call(arguments, named))

    return module.register_forward_pre_hook(before_forward, with_kwargs=True)


def _forward_call(arguments: tuple[Any, ...], named: dict[str, Any]) -> ForwardCall:
    tokens = arguments[0] if arguments else named.get("input_ids", named.get("input"))
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        got = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise MonitorError(f"live scoring needs token ids [batch pos] as the model's input; it got {got}.")
    cache = named.get("past_key_values")
    start = int(cache.get_seq_length()) if cache is not None else 0
    mask = named.get("attention_mask")
    _check_mask(mask, tokens, start)
    return ForwardCall(tokens, start, mask)


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
    """Raise IncompatibleProbeError where a hook point fires before `watch_forward` can tell of the forward pass."""
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


class _BlockWatch:
    """Forward passes as they are seen inside: the token ids that get embedded, then what the first block is handed.

    `HookedTransformer.generate` embeds the prompt once and every sampled token after it; its blocks run on the newest
    embedding or, without a cache, on all of them. The token sampled last is embedded and goes no further.
    """

    def __init__(self, embed: nn.Module, first_block: nn.Module, callback: Callable[[ForwardCall], None]) -> None:
        self._callback = callback
        self._embedded: list[Tensor] = []  # each [batch new], those that may be part of the next forward pass
        self._is_new = False  # something was embedded since the last forward pass
        self._handles = (
            embed.register_forward_pre_hook(self._on_embed, with_kwargs=True),
            first_block.register_forward_pre_hook(self._before_blocks, with_kwargs=True),
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_embed(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = arguments[0] if arguments else named["tokens"]
        if tokens.ndim == 2:
            self._embedded.append(tokens)
            self._is_new = True

    def _before_blocks(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        residual = arguments[0] if arguments else named["resid_pre"]
        tokens = self._tokens_of(*residual.shape[:2])
        entry, mask = named.get("past_kv_cache_entry"), named.get("attention_mask")
        start = int(entry.past_keys.shape[1]) if entry is not None else 0
        _check_mask(mask, tokens, start)
        self._callback(ForwardCall(tokens, start, mask))

    def _tokens_of(self, batch: int, pos: int) -> Tensor:
        """[batch pos]: of the ids embedded, the latest `pos`, which must begin where one call began."""
        found: list[Tensor] = []
        while self._is_new and self._embedded and sum(piece.shape[1] for piece in found) < pos:
            found.insert(0, self._embedded.pop())
        if {piece.shape[0] for piece in found} != {batch} or sum(piece.shape[1] for piece in found) != pos:
            raise MonitorError(
                f"live scoring needs token ids [batch pos] as the model's input; its blocks ran on embeddings of shape "
                f"{(batch, pos)} = [batch pos] that are not those of tokens embedded just before (start_at_layer, or "
                "embeddings as the prompt)."
            )
        self._embedded, self._is_new = [torch.cat(found, dim=1)], False
        return self._embedded[0]
