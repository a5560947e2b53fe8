"""Checked masks: which positions of a padded batch count."""

from __future__ import annotations

import torch
from torch import Tensor

from lmprobe_tl.errors import EmptyMaskError, InputError
from lmprobe_tl.types import AttentionMask


def real_tokens(attention_mask: AttentionMask | None, values: Tensor) -> Tensor:
    """The mask of `values` as booleans: True where a token counts.

    attention_mask: [batch pos], bool, int or float with 0 and 1 alone, on any device; None = every position counts.
    values: [batch pos ...]. Returns [batch pos] bool on the device of `values`.
    Raises InputError for a wrong shape or another value, EmptyMaskError naming the rows where nothing counts.
    """
    if attention_mask is None:
        real = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
    else:
        real = _as_bool(attention_mask, values.shape[:2]).to(values.device)
    _refuse_empty_rows(real)
    return real


def _as_bool(attention_mask: AttentionMask, shape: torch.Size) -> Tensor:
    if not isinstance(attention_mask, Tensor):
        raise InputError(f"attention_mask must be a tensor [batch pos] or None, got {type(attention_mask).__name__}.")
    if attention_mask.shape != shape:
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected [batch pos] = {list(shape)}. "
            "Give the mask of these same tokens, one entry a token."
        )
    if attention_mask.dtype == torch.bool:
        return attention_mask
    bad = (attention_mask != 0) & (attention_mask != 1)  # NaN differs from both
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise InputError(
            f"attention_mask holds {attention_mask[row, position].item()} at row {row}, position {position}; "
            "expected 1 (a real token) or 0 (a pad) everywhere."
        )
    return attention_mask != 0


def _refuse_empty_rows(real: Tensor) -> None:
    rows = (~real.any(dim=1)).nonzero().flatten().tolist()
    if rows:
        raise EmptyMaskError(
            f"No token counts in row(s) {rows}: attention_mask is 0 at all {real.shape[1]} positions. "
            "Drop these rows or correct their mask.",
            rows,
        )
