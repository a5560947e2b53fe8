"""Names for shapes and the protocols that objects from outside must meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Activations: TypeAlias = Tensor  # [batch pos d_model], any float dtype
AttentionMask: TypeAlias = Tensor  # [batch pos], 1 or True = a real token
Pooled: TypeAlias = Tensor  # [batch d_model]
TokenScores: TypeAlias = Tensor  # [batch pos] or [batch pos n_classes]


@runtime_checkable
class PoolingStrategy(Protocol):
    """A custom pooling: activations [batch pos d_model] and a mask [batch pos] to one vector a row [batch d_model]."""

    def __call__(self, activations: Activations, attention_mask: AttentionMask | None) -> Pooled: ...


@runtime_checkable
class HookedModel(Protocol):
    """What a model must offer: named hook points, a configuration, a tokenizer, and a forward pass on tokens.

    A TransformerLens `TransformerBridge` meets it, and so does any model with the same hook surface.
    """

    cfg: Any
    tokenizer: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...

    def __call__(self, tokens: Tensor, *, attention_mask: Tensor | None = None) -> Any: ...
