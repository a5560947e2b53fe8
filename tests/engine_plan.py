"""Probes for tests of an engine's scores, and the logits that its hooks would give them for made-up tokens."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.probe_spec import PoolingRecord
from lmprobe_tl.weights import ProbeWeights

POOLINGS = {
    "max": "score:max",
    "mean of activations": "mean",
    "mean": "score:mean",
    "ema": "score:ema_max(0.4)",
    "rolling": "score:rolling_max(3)",
    "softmax": "score:softmax(0.7)",
    "first": "score:first_token",
    "classes": "score:mean",
}
N_COLUMNS = len(POOLINGS) + 2  # the last probe has three classes


def some_probes() -> list[ProbeWeights]:
    """Each picks its own columns of the "activations", which are therefore the logits of all probes side by side."""
    found = []
    for at, (name, inference) in enumerate(POOLINGS.items()):
        n = 3 if name == "classes" else 1
        found.append(
            ProbeWeights.from_direction(
                torch.eye(N_COLUMNS)[at : at + n],
                name=name,
                hook_points="blocks.0.hook_resid_post",
                labels=tuple(range(max(n, 2))),
                pooling=PoolingRecord(train="last_token", inference=inference),
            )
        )
    return found


@cache
def the_plan() -> ScoringPlan:
    return ScoringPlan(some_probes())


@cache
def activations(tokens: tuple[int, ...]) -> Tensor:
    """[n N_COLUMNS], of each token by all that is before it, as a causal model has it."""
    rows = []
    for stop in range(1, len(tokens) + 1):
        seed = zlib.crc32(bytes(tokens[:stop]))
        rows.append([(zlib.crc32(bytes([column]), seed) % 2001 - 1000) / 250 for column in range(N_COLUMNS)])
    return torch.tensor(rows)


def logits_of(tokens: list[int]) -> np.ndarray:
    """[n n_columns], as the engine's hooks give them: in the order of the plan."""
    (hook,) = the_plan().hooks.values()
    side_by_side = hook.partial_logits(activations(tuple(tokens)).unsqueeze(0))
    return the_plan().combine([side_by_side], torch.device("cpu"))[0].numpy()
