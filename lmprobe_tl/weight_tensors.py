"""Tensors of a probe: which there are, and own float32 copies that are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.checked_record import shown
from lmprobe_tl.errors import InputError
from lmprobe_tl.probe_spec import ProbeSpec


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


def tensor_shapes(spec: ProbeSpec) -> dict[str, tuple[int, ...]]:
    """The tensors that a probe of this spec has, with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "direction": (spec.n_readings, len(spec.hook_points) * spec.d_model),
        "intercept": (spec.n_readings,),
    }
    if spec.has_readout:
        shapes |= {"readout": (spec.n_outputs, spec.n_readings), "readout_intercept": (spec.n_outputs,)}
    return shapes
