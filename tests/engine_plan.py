"""Probes for tests of an engine's scores, and the logits that its hooks would give them for made-up tokens."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch
from live_reference import make_head_probe
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
KINDS = ("attention", "rolling_attention", "multimax", "polynomial", "mlp")
N_LINEAR = len(POOLINGS) + 2  # the last probe has three classes


def some_probes() -> list[ProbeWeights]:
    """Each linear one picks its own columns of the "activations", whose first ones are therefore the logits of all linear
    probes side by side; one more of each other kind reads all columns."""
    found = []
    for at, (name, inference) in enumerate(POOLINGS.items()):
        n = 3 if name == "classes" else 1
        found.append(
            ProbeWeights.from_direction(
                torch.eye(N_LINEAR)[at : at + n],
                name=name,
                hook_points="blocks.0.hook_resid_post",
                labels=tuple(range(max(n, 2))),
                pooling=PoolingRecord(train="last_token", inference=inference),
            )
        )
    hook_point = "blocks.0.hook_resid_post"
    heads = [make_head_probe(kind, hook_point, seed=at, d_model=N_LINEAR) for at, kind in enumerate(KINDS)]
    of_a_mean = make_head_probe("polynomial", hook_point, name="of a mean", seed=9, inference="mean", d_model=N_LINEAR)
    return [*heads[:2], *found, *heads[2:], of_a_mean]


@cache
def the_plan() -> ScoringPlan:
    return ScoringPlan(some_probes())


@cache
def activations(tokens: tuple[int, ...]) -> Tensor:
    """[n N_LINEAR], of each token by all that is before it, as a causal model has it."""
    rows = []
    for stop in range(1, len(tokens) + 1):
        seed = zlib.crc32(bytes(tokens[:stop]))
        rows.append([(zlib.crc32(bytes([column]), seed) % 2001 - 1000) / 250 for column in range(N_LINEAR)])
    return torch.tensor(rows)


def readings_of(tokens: list[int]) -> np.ndarray:
    """[n n_readings], as the engine's hooks give them: in the order of the plan."""
    (hook,) = the_plan().hooks.values()
    side_by_side = hook.partial_readings(activations(tuple(tokens)).unsqueeze(0))
    return the_plan().combine([side_by_side], torch.device("cpu"))[0].numpy()


def logits_of(tokens: list[int]) -> np.ndarray:
    """[n n_columns], of each token alone."""
    return the_plan().token_logits(torch.from_numpy(readings_of(tokens)[None]))[0].numpy()
