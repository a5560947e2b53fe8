"""Changes of activations by plain formulas and hooks by hand, for tests of steering and ablation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Tiny, blocks_of
from live_reference import PROMPTS, assert_same, encode, left_padded
from torch import Tensor

from lmprobe_tl import attach_probes
from lmprobe_tl.weights import ProbeWeights

HOOK = "blocks.2.hook_resid_post"
NEW = 4
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
EVERYWHERE: dict[str, Any] = {"include_bos": True}
Edit = Callable[[Tensor], Tensor]


def vector_of(probe: ProbeWeights, length: float) -> Tensor:
    return length * probe.direction[0] / probe.direction[0].norm()


def without(direction: Tensor) -> Edit:
    """x less its part along one direction [d_model], by a plain formula."""
    unit = direction / direction.norm()
    return lambda x: x - (x @ unit)[..., None] * unit


def by_hand(tiny: Tiny, tokens: Tensor, mask: Tensor, edit: Edit, chosen: Tensor | None = None, layer: int = 2) -> Tensor:
    """Logits of Hugging Face with a hook of our own on one block; chosen: [batch pos] bool, None = everywhere."""

    def change(_: Any, __: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        changed = edit(stream) if chosen is None else torch.where(chosen[..., None], edit(stream), stream)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = blocks_of(tiny.reference)[layer].register_forward_hook(change)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            return tiny.reference(tokens, attention_mask=mask, position_ids=positions).logits
    finally:
        handle.remove()


@contextmanager
def raised_by(error: type[Exception], message: str, block: Any) -> Iterator[Any]:
    """A block of changes that ends in this error."""
    with pytest.raises(error, match=message), block as change:
        yield change


def batch_of(tiny: Tiny) -> tuple[list[list[int]], Tensor, Tensor]:
    rows = [encode(tiny, text, bos=True) for text in PROMPTS]
    return rows, *left_padded(rows)


def logits_of(tiny: Tiny, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return tiny.bridge(tokens, attention_mask=mask)


def assert_logits(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    for row, real in enumerate(mask.bool()):
        assert_same(found[row][real], expected[row][real], f"row {row}")


def scores_in(tiny: Tiny, probes: Any, tokens: Tensor, mask: Tensor) -> dict[str, list[Tensor]]:
    with attach_probes(tiny.bridge, probes) as monitor:
        logits_of(tiny, tokens, mask)
    return {name: monitor.token_scores(name) for name in monitor.plan.probes}
