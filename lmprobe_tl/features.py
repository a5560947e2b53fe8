"""Features that a classifier is fitted on: whether there is anything to learn from them, and some of them to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.artefact import pooling_name
from lmprobe_tl.errors import InputError
from lmprobe_tl.pooling import PoolingStrategy

_SAMPLE = 2048


def evenly_spread(n_examples: int) -> NDArray[np.int64]:
    """Indices of at most 2048 examples, from the first to the last: enough to prove a linear rule on."""
    return np.linspace(0, n_examples - 1, min(n_examples, _SAMPLE)).astype(np.int64)


def are_constant(features: NDArray[Any]) -> bool:
    """Whether all rows of features [n n_features] are the same, up to the rounding of float32."""
    return not features.std(axis=0).max() > 1e-6 * np.abs(features).max()


def constant_error(pooling: str | PoolingStrategy) -> InputError:
    return InputError(
        f"with pooling {pooling_name(pooling)!r} the activations of all prompts are the same, so nothing can be learnt "
        "from them ('first_token' sees nothing but BOS where the model prepends one). Use another pooling."
    )
