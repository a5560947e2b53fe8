"""Tensors of a probe: own float32 copies that are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.checked_record import shown
from lmprobe_tl.errors import InputError


def as_tensor(values: Any) -> Tensor:
    # float32 said aloud: the default dtype may be a narrower one
    return values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float32)


def own_copy(values: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """A float32 copy on the CPU that shares nothing with the caller's tensor and its graph."""
    if not isinstance(values, Tensor) or values.is_complex():
        raise InputError(f"{what} is {shown(values)}; expected a tensor of real numbers.")
    if values.shape != shape:
        raise InputError(f"{what} has shape {list(values.shape)}; expected {list(shape)}.")
    with torch.inference_mode(False):
        copy = values.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    if not copy.isfinite().all():
        first = (~copy.isfinite()).nonzero()[0].tolist()
        raise InputError(f"{what} is {copy[tuple(first)].item()} at {first}; expected numbers that are finite in float32.")
    return copy
