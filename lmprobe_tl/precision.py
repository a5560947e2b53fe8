"""In how many digits numbers are computed, whatever the caller has set, and how they are rounded at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, in which reductions and readouts are computed, or float32 on MPS, which has no float64.

    A float32 sum grown token by token is wrong in the fourth digit after 100,000 tokens, and a float32 moving average
    settles beside its level, by up to 6e-8 / alpha of it. Scores are few: the width costs nothing.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    # inside torch.autocast the product would silently be computed in bfloat16
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a narrower dtype; what is too large for it becomes its largest number of that sign, and NaN stays."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)
