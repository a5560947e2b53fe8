"""Weights of examples, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.errors import InputError


def validated_weight(sample_weight: Any, n_examples: int) -> NDArray[np.float64]:
    """The weights as float64 [n_examples]; ones for None."""
    if sample_weight is None:
        return np.ones(n_examples)
    weight = np.asarray(sample_weight, dtype=np.float64)
    if weight.shape != (n_examples,):
        raise InputError(f"sample_weight has shape {weight.shape}, expected one weight an example: {(n_examples,)}.")
    if not (np.isfinite(weight) & (weight >= 0)).all():
        raise InputError(f"sample_weight must be finite and not negative, got values from {weight.min()} to {weight.max()}.")
    if not weight.any():
        raise InputError("sample_weight is zero for every example: give some example a positive weight.")
    return weight
