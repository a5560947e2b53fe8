"""Forward passes of a model as they come: on which tokens, from which column on, under which attention mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lmprobe_tl.errors import MonitorError


@dataclass(frozen=True)
class ForwardCall:
    """What a model was called with: `tokens` [batch new], of which the first stands at column `start` of the whole sequence,
    and `attention_mask` [batch columns], None where every token is real."""

    tokens: Tensor
    start: int
    attention_mask: Tensor | None


def watch_forward(model: Any, callback: Callable[[ForwardCall], None]) -> Any:
    """Call `callback` before every forward pass of the model, also inside `generate`; returns a handle with `remove()`."""
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
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (tokens.shape[0], start + tokens.shape[1])):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise MonitorError(
            "live scoring needs an attention mask [batch pos] that covers the "
            f"{start + tokens.shape[1]} columns so far; the "
            f"model was called with one of shape {shape}."
        )
    return ForwardCall(tokens, start, mask)
