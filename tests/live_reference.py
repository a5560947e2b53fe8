"""What live scores are checked against: the same tokens through Hugging Face, a row at a time, reduced by plain loops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from conftest import D_MODEL, Tiny
from torch import Tensor

from lmprobe_tl.heads import SEQUENCE_KINDS
from lmprobe_tl.probe_spec import HeadRecord, PoolingRecord, ProbeSpec
from lmprobe_tl.weights import ProbeWeights

BOS, EOS, PAD = 0, 1, 2
PROMPTS = ["the model", "a short line and then it writes one more", "cats"]


def make_probe(
    name: str = "p",
    hook_points: str | Sequence[str] = "blocks.2.hook_resid_post",
    *,
    seed: int = 0,
    n_classes: int = 2,
    inference: str = "score:max",
    include_bos: bool = False,
    scale: float = 0.1,
    **spec_fields: Any,
) -> ProbeWeights:
    """A random probe whose logits on the tiny models are a few units wide."""
    hooks = (hook_points,) if isinstance(hook_points, str) else tuple(hook_points)
    generator = torch.Generator().manual_seed(seed)
    n_outputs = 1 if n_classes == 2 else n_classes
    direction = scale * torch.randn(n_outputs, len(hooks) * D_MODEL, generator=generator)
    intercept = torch.randn(n_outputs, generator=generator)
    return ProbeWeights.from_direction(
        direction,
        intercept,
        name=name,
        hook_points=hooks,
        labels=tuple(range(n_classes)),
        pooling=PoolingRecord(train="last_token", inference=inference, include_bos=include_bos),
        **spec_fields,
    )


# Of each kind that is not linear, the sizes of its head.
HEADS: dict[str, HeadRecord] = {
    "mlp": HeadRecord(n_hidden=5),
    "polynomial": HeadRecord(degree=3, rank=2),
    "attention": HeadRecord(n_heads=3),
    "multimax": HeadRecord(n_heads=2),
    "rolling_attention": HeadRecord(n_heads=2, window=4),
}


def make_head_probe(
    kind: Any,
    hook_points: str | Sequence[str] = "blocks.2.hook_resid_post",
    *,
    name: str | None = None,
    seed: int = 0,
    inference: str = "score:max",
    include_bos: bool = False,
    scale: float = 0.1,
    d_model: int = D_MODEL,
    **spec_fields: Any,
) -> ProbeWeights:
    """A random probe of a kind that is not linear, whose logits on the tiny models are a few units wide."""
    hooks = (hook_points,) if isinstance(hook_points, str) else tuple(hook_points)
    own = kind in SEQUENCE_KINDS
    spec = ProbeSpec(
        name=name or kind,
        hook_points=hooks,
        d_model=d_model,
        kind=kind,
        head=HEADS[kind],
        pooling=PoolingRecord(
            train="sequence" if own else "all", inference="sequence" if own else inference, include_bos=include_bos
        ),
        **spec_fields,
    )
    generator = torch.Generator().manual_seed(seed)
    direction = scale * torch.randn(spec.n_readings, len(hooks) * d_model, generator=generator)
    intercept = torch.randn(spec.n_readings, generator=generator)
    if not spec.has_readout:
        return ProbeWeights(direction, intercept, spec)
    readout = torch.randn(1, spec.n_readings, generator=generator)
    return ProbeWeights(direction, intercept, spec, readout, torch.randn(1, generator=generator))


def many_probes() -> list[ProbeWeights]:
    """One and several probes a hook point, an alias beside its canonical name, hook points out of order, three classes,
    every kind."""
    return [
        make_probe("late", "blocks.3.hook_resid_post", seed=1),
        make_probe("alias", "blocks.1.hook_resid_post", seed=2),
        make_probe("canonical", "blocks.1.hook_out", seed=2),
        make_probe("before", "blocks.1.hook_resid_pre", seed=3, inference="mean"),
        make_probe("wide", ("blocks.3.hook_resid_post", "blocks.0.hook_out", "blocks.2.hook_resid_post"), seed=4),
        make_probe("classes", "blocks.2.hook_resid_post", seed=5, n_classes=3, inference="score:mean"),
        make_probe("late too", "blocks.3.hook_resid_post", seed=6, inference="score:ema_max(0.5)"),
        make_head_probe("attention", seed=7),
        make_head_probe("attention", seed=8, name="attention too", include_bos=True),
        make_head_probe("multimax", ("blocks.2.hook_resid_post", "blocks.0.hook_out"), seed=9),
        make_head_probe("rolling_attention", "blocks.1.hook_resid_pre", seed=10),
        make_head_probe("mlp", ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post"), seed=11, inference="score:mean"),
        make_head_probe("polynomial", seed=12, inference="score:ema_max(0.5)"),
        make_head_probe("mlp", seed=13, name="mlp of a mean", inference="mean"),
    ]


def layer_below(hook_name: str) -> int:
    """The block whose output a residual hook point carries."""
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_resid_post|hook_out|hook_resid_pre|hook_in)", hook_name)
    assert found is not None, hook_name
    return int(found.group(1)) - (found.group(2) in ("hook_resid_pre", "hook_in"))


_hidden: dict[tuple[str, tuple[int, ...], int], Tensor] = {}


def features_of(tiny: Tiny, ids: Sequence[int], weights: ProbeWeights) -> Tensor:
    """[n, n_hook_points*d_model] of one row, from Hugging Face; each row and layer is computed once a session."""
    parts = []
    for hook_name in weights.hook_points:
        key = (str(tiny.folder), tuple(ids), layer_below(hook_name))
        if key not in _hidden:
            _hidden[key] = tiny.hidden(list(ids), key[2])
        parts.append(_hidden[key])
    return torch.cat(parts, dim=-1)


def expected_running(features: Tensor, weights: ProbeWeights, ids: Sequence[int]) -> Tensor:
    """[n] or [n n_classes]: the probe's inference pooling of each prefix, from the activations [n d], by plain loops."""
    strategy = weights.spec.pooling.inference
    sees_bos = weights.spec.pooling.include_bos or strategy.endswith("first_token")
    rows = []
    for end in range(1, len(ids) + 1):
        counted = [at for at in range(end) if sees_bos or at > 0 or ids[0] != BOS]
        nothing = torch.full((1 if weights.is_binary else weights.n_classes,), math.nan)
        rows.append(_pooled(features[counted], weights, strategy) if counted else nothing)
    running = torch.stack(rows)
    return running[:, 0] if weights.is_binary else running


def _pooled(features: Tensor, weights: ProbeWeights, strategy: str) -> Tensor:
    if weights.spec.reduces_tokens:
        readings = (features @ weights.direction.T + weights.intercept).double()
        return torch.tensor([_reduced_by_head(readings.tolist(), weights)]).sigmoid()
    stage, _, rest = strategy.rpartition(":")
    name, _, argument = rest.rstrip(")").partition("(")
    if name == "all":
        features, name = features[-1:], "last_token"
    if stage != "score" and name in ("mean", "last_token", "first_token"):
        one = {"mean": features.mean(dim=0), "last_token": features[-1], "first_token": features[0]}[name]
        return torch.atleast_1d(weights.probabilities(one))  # of the pooled activations, whatever the kind
    logits = weights.logits(features).double()
    if argument:
        return torch.tensor([_streaming(logits.tolist(), name, float(argument))])
    scores = weights.probabilities(features).double()
    picked = {
        "mean": scores.mean(dim=0),
        "max": scores.max(dim=0).values,
        "min": scores.min(dim=0).values,
        "last_token": scores[-1],
        "first_token": scores[0],
    }[name]
    return torch.atleast_1d(picked if weights.is_binary else picked / picked.sum()).float()


def _streaming(z: list[float], name: str, parameter: float) -> float:
    if name == "ema_max":
        average, best = z[0], z[0]
        for value in z[1:]:
            average = parameter * value + (1 - parameter) * average
            best = max(best, average)
        return best
    if name == "rolling_max":
        window = int(parameter)
        if len(z) < window:
            return sum(z) / len(z)
        return max(sum(z[at : at + window]) / window for at in range(len(z) - window + 1))
    weights = [math.exp((value - max(z)) / parameter) for value in z]
    return sum(weight * value for weight, value in zip(weights, z, strict=True)) / sum(weights)


def assert_same(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to 1e-4 of the largest value; NaN where and only where NaN is expected."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: NaN at other places"
    if found.numel():
        off = (found - expected).nan_to_num().abs().max().item()
        assert off <= 1e-4 * max(expected.nan_to_num().abs().max().item(), 1e-3), f"{what}: off by {off}"


def assert_row(
    tiny: Tiny, ids: Sequence[int], probes: Sequence[ProbeWeights], logits: dict[str, Tensor], running: dict[str, Tensor]
) -> None:
    """Live logits and running scores of one row are those of a full recompute of its tokens."""
    assert set(logits) == set(running) == {probe.name for probe in probes}
    for probe in probes:
        features = features_of(tiny, ids, probe)
        assert_same(logits[probe.name], probe.logits(features), f"logits of {probe.name}")
        assert_same(running[probe.name], expected_running(features, probe, ids), f"running score of {probe.name}")


def assert_monitor(tiny: Tiny, monitor: Any, rows: Sequence[Sequence[int]], probes: Sequence[ProbeWeights]) -> None:
    """A monitor holds exactly these rows of tokens, with the scores of a full recompute."""
    assert [tokens.tolist() for tokens in monitor.tokens()] == [list(row) for row in rows]
    for index, row in enumerate(rows):
        logits = {probe.name: monitor.token_scores(probe.name)[index] for probe in probes}
        running = {probe.name: monitor.running_scores(probe.name)[index] for probe in probes}
        assert_row(tiny, row, probes, logits, running)


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def encode(tiny: Tiny, text: str, bos: bool | None = None) -> list[int]:
    """Token ids of a text, with BOS as the model's config says."""
    bos = bool(tiny.bridge.cfg.default_prepend_bos) if bos is None else bos
    return [BOS] * bos + tiny.tokenizer(text, add_special_tokens=False)["input_ids"]


def _reduced_by_head(readings: list[list[float]], weights: ProbeWeights) -> float:
    n, window = weights.spec.head.n_heads, weights.spec.head.window
    assert n is not None
    if weights.spec.kind == "multimax":
        return sum(max(column) for column in zip(*readings, strict=True))
    if window is not None and len(readings) > window:
        starts = range(len(readings) - window + 1)
        return max(_attention(readings[at : at + window], n) for at in starts)
    return _attention(readings, n)


def _attention(readings: list[list[float]], n_heads: int) -> float:
    total = 0.0
    for head in range(n_heads):
        weights = [math.exp(token[head]) for token in readings]
        values = [token[n_heads + head] for token in readings]
        total += sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    return total
