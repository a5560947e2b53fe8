"""What the engine's scores are checked against: the same tokens through Hugging Face, reduced by plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tiny_models import BOS
from torch import Tensor

from lmprobe_tl.probe_spec import HeadRecord, PoolingRecord, ProbeSpec
from lmprobe_tl.weights import ProbeWeights


@dataclass
class Reference:
    """One model under Hugging Face."""

    name: str
    folder: Path
    _seen: dict[tuple[int, ...], list[Tensor]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @property
    def d_model(self) -> int:
        return self.model.config.hidden_size

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    def encode(self, text: str, *, bos: bool) -> list[int]:
        return [BOS] * bos + self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def streams(self, ids: Sequence[int]) -> list[Tensor]:
        """The input of block 0, then the output of each block, [pos d_model] of one row. By hooks, since the last of
        `hidden_states` is normed."""
        key = tuple(ids)
        if key not in self._seen:
            blocks = self.model.transformer.h if self.name == "gpt2" else self.model.model.layers
            found: list[Tensor] = []
            handles = [
                blocks[0].register_forward_pre_hook(lambda _, args, kwargs: _keep(found, args, kwargs), with_kwargs=True)
            ]
            handles += [block.register_forward_hook(lambda _, __, out: found.append(_first(out)[0])) for block in blocks]
            try:
                with torch.no_grad():
                    self.model(torch.tensor([key]), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            self._seen[key] = found
        return self._seen[key]

    def logits(self, ids: Sequence[int], probe: ProbeWeights) -> Tensor:
        """[pos] or [pos n_classes], of each token alone."""
        readings, n_heads = self.readings(ids, probe), probe.spec.head.n_heads
        if n_heads is not None:  # values stand last
            return readings[:, -n_heads:].sum(dim=1).float()
        if probe.readout is not None and probe.readout_intercept is not None:
            orders = [1, 2, 2, 3, 3] if probe.spec.kind == "polynomial" else None
            terms = readings.clamp(min=0) if orders is None else readings ** torch.tensor(orders)
            readings = terms @ probe.readout.double().T + probe.readout_intercept.double()
        return readings[:, 0].float() if probe.is_binary else readings.float()

    def readings(self, ids: Sequence[int], probe: ProbeWeights) -> Tensor:
        """[pos n_readings]: intercept and products, hook point after hook point, in float64."""
        streams = self.streams(ids)
        total = probe.intercept.double().expand(len(ids), -1)
        for at, hook_name in enumerate(probe.hook_points):
            _, block, point = hook_name.split(".")
            stream = streams[int(block) + (point == "hook_resid_post")].double()
            total = total + stream @ probe.direction[:, at * probe.d_model : (at + 1) * probe.d_model].double().T
        return total

    def running(self, ids: Sequence[int], probe: ProbeWeights) -> Tensor:
        """The probe's inference pooling of each prefix of the row; a leading BOS does not count."""
        logits, first = self.logits(ids, probe).double(), int(ids[0] == BOS)
        if probe.spec.reduces_tokens:
            own = self.readings(ids, probe)[first:].tolist()
            found = [_sigmoid(_of_head(own[:stop], probe)) for stop in range(1, len(own) + 1)]
            return torch.tensor([math.nan] * first + found)
        if not probe.is_binary:
            assert probe.spec.pooling.inference == "score:mean"
            nothing = [[math.nan] * probe.n_classes] * first
            columns = [_means(column) for column in logits[first:].softmax(-1).T.tolist()]
            return torch.tensor([*nothing, *map(list, zip(*columns, strict=True))])
        return torch.tensor([math.nan] * first + pooled(logits[first:].tolist(), probe.spec.pooling.inference))

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The next n tokens, or those up to the end-of-sequence token."""
        options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": 2}
        row = torch.tensor([list(ids)])
        return self.model.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(ids) :].tolist()


def _keep(found: list[Tensor], args: Any, kwargs: Any) -> None:
    found.append((args[0] if args else kwargs["hidden_states"])[0])


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def pooled(z: list[float], strategy: str) -> list[float]:
    """An inference pooling of logits up to each of them."""
    stage, _, rest = strategy.rpartition(":")
    name, _, argument = rest.rstrip(")").partition("(")
    if stage != "score":  # of activations: the logit of a mean is the mean of the logits
        assert name == "mean"
        return [_sigmoid(mean) for mean in _means(z)]
    if name == "mean":
        return _means([_sigmoid(value) for value in z])
    if name == "max":
        return [_sigmoid(best) for best in _maxima(z)]
    parameter = float(argument)
    if name == "ema_max":
        averages = z[:1]
        for value in z[1:]:
            averages.append(parameter * value + (1 - parameter) * averages[-1])
        return _maxima(averages)
    if name == "rolling_max":
        window = int(parameter)
        whole = [sum(z[stop - window : stop]) / window for stop in range(window, len(z) + 1)]
        return _means(z[: window - 1]) + _maxima(whole)
    assert name == "softmax", name
    found, total, weight = [], 0.0, 0.0
    for value in z:
        share = math.exp((value - max(z)) / parameter)
        total, weight = total + share * value, weight + share
        found.append(total / weight)
    return found


def _of_head(readings: list[list[float]], probe: ProbeWeights) -> float:
    n_heads, window = probe.spec.head.n_heads or 0, probe.spec.head.window
    if probe.spec.kind == "multimax":
        return sum(max(column) for column in zip(*readings, strict=True))
    if window is not None and len(readings) > window:
        return max(_attention(readings[at : at + window], n_heads) for at in range(len(readings) - window + 1))
    return _attention(readings, n_heads)


def _attention(readings: list[list[float]], n_heads: int) -> float:
    total = 0.0
    for head in range(n_heads):
        highest = max(token[head] for token in readings)
        weights = [math.exp(token[head] - highest) for token in readings]
        total += sum(w * token[n_heads + head] for w, token in zip(weights, readings, strict=True)) / sum(weights)
    return total


def _means(values: list[float]) -> list[float]:
    total, found = 0.0, []
    for n, value in enumerate(values, start=1):
        total += value
        found.append(total / n)
    return found


def _maxima(values: list[float]) -> list[float]:
    best, found = -math.inf, []
    for value in values:
        best = max(best, value)
        found.append(best)
    return found


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def make_probe(
    reference: Reference,
    name: str,
    hook_points: str | Sequence[str],
    *,
    seed: int,
    inference: str = "score:max",
    n_classes: int = 2,
) -> ProbeWeights:
    """A random probe whose logits are a few units wide, whatever the size of the residual stream there."""
    hooks = (hook_points,) if isinstance(hook_points, str) else tuple(hook_points)
    generator = torch.Generator().manual_seed(seed)
    n_outputs = 1 if n_classes == 2 else n_classes
    direction = torch.randn(n_outputs, len(hooks) * reference.d_model, generator=generator)
    probe = ProbeWeights.from_direction(
        direction,
        name=name,
        hook_points=hooks,
        labels=tuple(range(n_classes)),
        pooling=PoolingRecord(train="last_token", inference=inference),
        residual_basis="raw",
    )
    sizes = reference.logits(list(range(3, 40)), probe)
    return ProbeWeights(direction / sizes.std(), -sizes.mean() / sizes.std() + torch.zeros(n_outputs), probe.spec)


def make_head_probe(
    reference: Reference, kind: Any, hook_points: tuple[str, ...], *, seed: int, inference: str = "sequence", **sizes: int
) -> ProbeWeights:
    """A random probe of a kind that is not linear, with readings that are about a unit wide."""
    spec = ProbeSpec(
        name=kind,
        hook_points=hook_points,
        d_model=reference.d_model,
        kind=kind,
        head=HeadRecord(**sizes),
        pooling=PoolingRecord(train="sequence" if inference == "sequence" else "all", inference=inference),
    )
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(spec.n_readings, len(hook_points) * reference.d_model, generator=generator)
    readout: tuple[Tensor, ...] = ()
    if spec.has_readout:
        readout = torch.randn(1, spec.n_readings, generator=generator) / 4, torch.randn(1, generator=generator)
    raw = ProbeWeights(direction, torch.zeros(spec.n_readings), spec, *readout)
    found = reference.readings(list(range(3, 40)), raw).float()
    width = found.std(dim=0)
    return ProbeWeights(direction / width[:, None], -found.mean(dim=0) / width, spec, *readout)


def many_probes(reference: Reference) -> list[ProbeWeights]:
    """Of the first, a middle and the last block, of several hook points out of order, of several classes, with each kind of
    running score, and of each kind."""
    middle, last = f"blocks.{reference.n_layers // 2}.hook_resid_post", f"blocks.{reference.n_layers - 1}.hook_resid_post"
    first = "blocks.0.hook_resid_pre"
    return [
        make_probe(reference, "first", first, seed=1),
        make_probe(reference, "middle", middle, seed=2, inference="mean"),
        make_probe(reference, "last", last, seed=3, inference="score:ema_max(0.3)"),
        make_probe(reference, "wide", (last, first, "blocks.1.hook_resid_pre"), seed=4, inference="score:rolling_max(5)"),
        make_probe(reference, "classes", middle, seed=5, inference="score:mean", n_classes=3),
        make_probe(reference, "soft", middle, seed=6, inference="score:softmax(0.5)"),
        make_probe(reference, "share", last, seed=7, inference="score:mean"),
        make_head_probe(reference, "attention", (middle,), seed=8, n_heads=3),
        make_head_probe(reference, "multimax", (last, first), seed=9, n_heads=2),
        make_head_probe(reference, "rolling_attention", (last,), seed=10, n_heads=2, window=4),
        make_head_probe(reference, "mlp", (middle, last), seed=11, inference="score:mean", n_hidden=6),
        make_head_probe(reference, "polynomial", (middle,), seed=12, inference="score:max", degree=3, rank=2),
    ]


def tokens_of(output: Any, completion: Any) -> list[int]:
    """Prompt and generated tokens."""
    return [*output.prompt_token_ids, *completion.token_ids]


def assert_outputs(reference: Reference, outputs: Sequence[Any], probes: Sequence[ProbeWeights]) -> None:
    """Every completion of every request has the scores of a full recompute of its tokens."""
    for output in outputs:
        for completion in output.outputs:
            ids = tokens_of(output, completion)[:-1]  # the last token never enters the model
            what = f"request {output.request_id}.{completion.index}"
            assert set(completion.probe_scores) == set(completion.running) == {probe.name for probe in probes}
            for probe in probes:
                assert_same(completion.probe_scores[probe.name], reference.logits(ids, probe), f"{what} {probe.name}")
                assert_same(completion.running[probe.name], reference.running(ids, probe), f"{what} running {probe.name}")
            assert completion.n_unknown == 0


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """As many values, equal to 1e-4 of the largest; NaN where and only where NaN is expected."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: NaN at other places"
    off, size = (found - expected).nan_to_num().abs().max().item(), expected.nan_to_num().abs().max().item()
    assert off <= 1e-4 * max(size, 1.0), f"{what}: off by {off}"


def limit_between(scores: Tensor, is_good: Callable[[float], bool]) -> float:
    """A threshold that no score is near: in the middle of the widest gap between them of those that are good."""
    ordered = scores[scores.isfinite()].unique()
    middles, gaps = (ordered[1:] + ordered[:-1]) / 2, ordered.diff()
    for at in gaps.argsort(descending=True).tolist():
        if is_good(float(middles[at])):
            assert gaps[at] > 1e-3, "no threshold is far from all scores"
            return float(middles[at])
    raise AssertionError("no threshold is good")
