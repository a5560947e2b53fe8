"""What scores are checked against: the same tokens through Hugging Face, a row at a time, reduced by plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from conftest import Tiny
from tiny_models import D_MODEL
from torch import Tensor

from lmprobe_tl.probe_spec import PoolingRecord
from lmprobe_tl.weights import ProbeWeights

PROMPTS = ["the model", "a short line and then it writes one more", "cats"]


def make_probe(
    name: str = "p",
    hook_points: str | Sequence[str] = "blocks.2.hook_resid_post",
    *,
    seed: int = 0,
    inference: str = "score:max",
    zero_sum: bool = True,
    **spec_fields: Any,
) -> ProbeWeights:
    """A random probe with logits of a few units. zero_sum: its direction fits the centred residual stream, too."""
    hooks = (hook_points,) if isinstance(hook_points, str) else tuple(hook_points)
    generator = torch.Generator().manual_seed(seed)
    direction = 0.1 * torch.randn(len(hooks), D_MODEL, generator=generator)
    direction = direction - direction.mean(dim=1, keepdim=True) * zero_sum
    return ProbeWeights.from_direction(
        direction.flatten(),
        float(torch.randn(1, generator=generator)),
        name=name,
        hook_points=hooks,
        pooling=PoolingRecord(train="last_token", inference=inference),
        **spec_fields,
    )


def some_probes() -> list[ProbeWeights]:
    """Several probes at one hook point, one of several hook points out of order, and each kind of running score."""
    return [
        make_probe("late", "blocks.3.hook_resid_post", seed=1),
        make_probe("before", "blocks.1.hook_resid_pre", seed=2, inference="mean"),
        make_probe("wide", ("blocks.3.hook_resid_post", "blocks.0.hook_resid_post"), seed=3, inference="score:mean"),
        make_probe("late too", "blocks.3.hook_resid_post", seed=4, inference="score:ema_max(0.5)"),
    ]


_hidden: dict[tuple[str, tuple[int, ...], int], Tensor] = {}


def hidden_at(tiny: Tiny, ids: Sequence[int], hook_name: str) -> Tensor:
    """[n d_model] of one row at a residual hook point; each row and layer is computed once a session."""
    _, layer, point = hook_name.split(".")
    key = (tiny.name, tuple(ids), int(layer) - (point == "hook_resid_pre"))
    if key not in _hidden:
        _hidden[key] = tiny.hidden(list(ids), key[2])
    return _hidden[key]


def expected_logits(tiny: Tiny, ids: Sequence[int], probe: ProbeWeights) -> list[float]:
    """One logit a token: intercept, and entry times entry of the residual streams side by side."""
    streams = [hidden_at(tiny, ids, hook_name).tolist() for hook_name in probe.hook_points]
    direction, intercept = probe.direction[0].tolist(), float(probe.intercept[0])
    logits = []
    for at in range(len(ids)):
        features = [value for stream in streams for value in stream[at]]
        logits.append(intercept + sum(x * w for x, w in zip(features, direction, strict=True)))
    return logits


def expected_running(tiny: Tiny, ids: Sequence[int], probe: ProbeWeights) -> list[float]:
    """The probe's inference pooling of each prefix of the row; a leading BOS does not count."""
    logits, strategy = expected_logits(tiny, ids, probe), probe.spec.pooling.inference
    first = int(ids[0] == tiny.bos)
    running = []
    for end in range(1, len(ids) + 1):
        counted = logits[first:end]
        running.append(_pooled(counted, strategy) if counted else math.nan)
    return running


def _pooled(logits: list[float], strategy: str) -> float:
    if strategy == "score:max":
        return max(_sigmoid(z) for z in logits)
    if strategy == "score:mean":
        return sum(_sigmoid(z) for z in logits) / len(logits)
    if strategy == "mean":  # of activations: the logit of a mean is the mean of the logits
        return _sigmoid(sum(logits) / len(logits))
    assert strategy == "score:ema_max(0.5)", strategy
    average = best = logits[0]
    for z in logits[1:]:
        average = 0.5 * z + 0.5 * average
        best = max(best, average)
    return best


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def assert_row(
    tiny: Tiny, ids: Sequence[int], probes: Sequence[ProbeWeights], logits: dict[str, Tensor], running: dict[str, Tensor]
) -> None:
    """Scores of one row are those of a full recompute of its tokens."""
    assert set(logits) == set(running) == {probe.name for probe in probes}
    for probe in probes:
        assert_same(logits[probe.name], expected_logits(tiny, ids, probe), f"logits of {probe.name}")
        assert_same(running[probe.name], expected_running(tiny, ids, probe), f"running score of {probe.name}")


def assert_same(found: Tensor, expected: list[float], what: str) -> None:
    """As many values, equal to 1e-4 of the largest; NaN where and only where NaN is expected."""
    wanted = torch.tensor(expected)
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: NaN at other places"
    off, size = (found - wanted).nan_to_num().abs().max().item(), wanted.nan_to_num().abs().max().item()
    assert off <= 1e-4 * max(size, 1.0), f"{what}: off by {off}"


def assert_monitor(tiny: Tiny, monitor: Any, rows: Sequence[Sequence[int]], probes: Sequence[ProbeWeights]) -> None:
    """A monitor holds exactly these rows of tokens, with the scores of a full recompute."""
    assert [tokens.tolist() for tokens in monitor.tokens()] == [list(row) for row in rows]
    for index, row in enumerate(rows):
        logits = {probe.name: monitor.token_scores(probe.name)[index] for probe in probes}
        running = {probe.name: monitor.running_scores(probe.name)[index] for probe in probes}
        assert_row(tiny, row, probes, logits, running)


def padded(rows: Sequence[Sequence[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask [batch pos]."""
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    none, all_real = [[0] * len(one) for one in fill], [[1] * len(row) for row in rows]
    pairs = list(zip(fill, rows, strict=True)), list(zip(none, all_real, strict=True))
    tokens, mask = ([[*a, *b] if side == "left" else [*b, *a] for a, b in pair] for pair in pairs)
    return torch.tensor(tokens), torch.tensor(mask)
