"""What the parameters of a probe say to tokenizing, extraction and batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmprobe_tl.hook_points import normalization
from lmprobe_tl.tokens import Prompt, tokenize_prompts


def text_settings(probe: Any) -> dict[str, Any]:
    """How prompts become tokens, for `tokenize_prompts`."""
    return {name: getattr(probe, name) for name in ("prepend_bos", "max_length", "truncation")}


def batch_settings(probe: Any) -> dict[str, Any]:
    """How the model is run."""
    return {name: getattr(probe, name) for name in ("max_tokens_per_batch", "batch_size", "progress")}


def feature_settings(probe: Any, model: Any) -> dict[str, Any]:
    """How activations become features, for `extract_rows`."""
    centre = normalization(model) == "layernorm"
    return {**batch_settings(probe), "include_bos": probe.include_bos, "centre": centre}


def rows_of(probe: Any, model: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, as the probe sees them."""
    return tokenize_prompts(model, prompts, **text_settings(probe))
