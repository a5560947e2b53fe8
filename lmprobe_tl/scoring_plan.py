"""Many probes as one matrix a hook point, and each probe's inference pooling as an online reduction of its token logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import IncompatibleProbeError
from lmprobe_tl.online import wide_dtype
from lmprobe_tl.pooling import parse_pooling_strategy
from lmprobe_tl.reductions import REDUCTIONS
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True)
class LiveReduction:
    """How the running score of a probe follows from its logits: `before`, then the online reduction `name`, then `after`.

    before, after: 'none', 'sigmoid' or 'softmax'. unit: of the running score, 'probability' or 'logit'. counts_bos: whether
    a leading BOS takes part.
    """

    name: str
    parameter: float | int | None
    before: str
    after: str
    unit: str
    counts_bos: bool

    def in_unit(self, values: Tensor, unit: str) -> Tensor:
        """Values of the online reduction of a binary probe as 'probability' or 'logit', whatever it runs in."""
        if self.before == "none":
            return _sigmoid(values) if unit == "probability" else values
        return _logits(values) if unit == "logit" else values


def _sigmoid(values: Tensor) -> Tensor:
    # Through float64: in float32 the last bit differs between the entries of a tensor, and from one alone.
    return values.to(wide_dtype(values.device)).sigmoid().to(values.dtype)


def _logits(values: Tensor) -> Tensor:
    return values.to(wide_dtype(values.device)).logit().to(values.dtype)


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability) - math.log1p(-probability)


def live_reduction(weights: ProbeWeights) -> LiveReduction:
    """The online reduction that equals the probe's inference pooling, or IncompatibleProbeError where there is none.

    Pooling the activations by mean, first or last token is linear, so it is the same reduction of the logits.
    """
    strategy = weights.spec.pooling.inference
    parsed = parse_pooling_strategy(strategy)
    name = "last_token" if parsed.base_strategy == "all" else parsed.base_strategy  # 'all': every token speaks for itself
    squash = "sigmoid" if weights.is_binary else "softmax"
    picks_one = name in ("last_token", "first_token")
    linear = picks_one or (name == "mean" and not parsed.is_score_pooling)
    if parsed.is_score_pooling and REDUCTIONS[name].on == "logit":
        if not weights.is_binary:
            raise IncompatibleProbeError(
                f"probe {weights.name!r} has {weights.n_classes} classes, and inference pooling {strategy!r} works on the "
                "logit of two. Train it with another inference pooling, for instance 'score:max'."
            )
        before, after, unit = "none", "none", "logit"
    elif linear or (name in ("max", "min") and parsed.is_score_pooling and weights.is_binary):
        # max and min are monotone, so with two classes they run on logits too: there scores near 0 and 1 stay apart.
        before, after, unit = "none", squash, "probability"
    elif parsed.is_score_pooling:
        before, after, unit = squash, "none", "probability"
    else:
        raise IncompatibleProbeError(
            f"probe {weights.name!r} pools activations by {strategy!r}, which has no token-by-token form. Train it with "
            "another inference pooling, for instance 'score:max'."
        )
    counts_bos = weights.spec.pooling.include_bos or name == "first_token"
    return LiveReduction(name, parsed.parameter, before, after, unit, counts_bos)


@dataclass(frozen=True)
class HookColumns:
    """All directions that read one hook point: `weight` [d_model columns], `bias` [columns], and the output column of
    each."""

    weight: Tensor
    bias: Tensor
    columns: Tensor
    on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def partial_logits(self, activations: Tensor) -> Tensor:
        """activations [batch pos d_model] -> [batch pos columns], float32 on the activations' device, in one matrix
        product."""
        weight, bias = self._on(activations.device)
        flat = rearrange(activations.detach().float(), "batch pos d_model -> (batch pos) d_model")
        with torch.autocast(flat.device.type, enabled=False):  # it would narrow the scores to bfloat16
            logits = torch.addmm(bias, flat, weight)
        return rearrange(logits, "(batch pos) columns -> batch pos columns", batch=activations.shape[0])

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self.on_device:
            self.on_device[device] = (self.weight.to(device), self.bias.to(device))
        return self.on_device[device]


@dataclass(frozen=True)
class ReductionGroup:
    """Output columns whose running scores follow the same reduction: `columns` [n], where probe `p` has `places[p]` among
    them."""

    reduction: LiveReduction
    columns: Tensor
    n_classes: int
    places: Mapping[str, slice]

    def enter(self, logits: Tensor) -> Tensor:
        """Logits of this group's columns, [batch pos columns], as the online reduction wants them."""
        return self._squash(logits, self.reduction.before)

    def leave(self, running: Tensor) -> Tensor:
        """Running values of the online reduction as scores; with several classes they sum to 1."""
        squashed = self._squash(running, self.reduction.after)
        if self.n_classes > 2 and self.reduction.before == "softmax":
            by_probe = rearrange(squashed, "... (probe classes) -> ... probe classes", classes=self.n_classes)
            total = by_probe.sum(-1, keepdim=True)  # 0 where the minima of all classes are
            shares = torch.where(total == 0, 1 / self.n_classes, by_probe / torch.where(total == 0, 1.0, total))
            return rearrange(shares, "... probe classes -> ... (probe classes)")
        return squashed

    def _squash(self, values: Tensor, how: str) -> Tensor:
        if how == "sigmoid":
            return _sigmoid(values)
        if how == "softmax":
            by_probe = rearrange(values, "... (probe classes) -> ... probe classes", classes=self.n_classes)
            return rearrange(by_probe.softmax(-1), "... probe classes -> ... (probe classes)")
        return values


@dataclass(frozen=True)
class Thresholds:
    """The threshold of each output column, [n_columns], in its own unit; NaN, which no score reaches, for several classes.

    as_probability, as_logit: [n_columns] bool, columns whose online reduction runs in the other unit.
    """

    values: Tensor
    as_probability: Tensor
    as_logit: Tensor

    def to(self, device: torch.device) -> Thresholds:
        return Thresholds(self.values.to(device), self.as_probability.to(device), self.as_logit.to(device))

    def reached(self, running: Tensor) -> Tensor:
        """Whether values of the online reductions [... n_columns] are at or above their thresholds. NaN reaches nothing."""
        # In the threshold's own unit: a threshold read off a score must be reached by that very score.
        scores = torch.where(self.as_probability, _sigmoid(running), running)
        return torch.where(self.as_logit, _logits(running), scores) >= self.values


class ScoringPlan:
    """What a Monitor computes for its probes: a matrix a hook point, and a column range a probe."""

    def __init__(self, probes: Sequence[ProbeWeights]) -> None:
        self.probes = {weights.name: weights for weights in probes}
        self.columns: dict[str, slice] = {}
        self.n_columns = 0
        for weights in probes:
            outputs = weights.direction.shape[0]
            self.columns[weights.name] = slice(self.n_columns, self.n_columns + outputs)
            self.n_columns += outputs
        hook_names = dict.fromkeys(name for weights in probes for name in weights.hook_points)
        self.hooks = {name: self._hook_columns(name) for name in hook_names}
        self.reductions = {weights.name: live_reduction(weights) for weights in probes}
        self.groups = self._groups()
        self.thresholds = self._thresholds()
        # One output column a matrix column, in order: the usual case, in which nothing needs to be added up.
        in_order = torch.cat([hook.columns for hook in self.hooks.values()])
        self._straight = torch.equal(in_order, torch.arange(self.n_columns))
        self._order = in_order

    def _hook_columns(self, hook_name: str) -> HookColumns:
        weights, biases, columns = [], [], []
        for name, probe in self.probes.items():
            if hook_name not in probe.hook_points:
                continue
            weights.append(probe.direction_at(hook_name))
            first = probe.hook_points[0] == hook_name  # the intercept counts once
            biases.append(probe.intercept if first else torch.zeros_like(probe.intercept))
            columns.append(torch.arange(self.n_columns)[self.columns[name]])
        weight = rearrange(torch.cat(weights), "columns d_model -> d_model columns").contiguous()
        return HookColumns(weight, torch.cat(biases), torch.cat(columns))

    def _groups(self) -> list[ReductionGroup]:
        members: dict[tuple[LiveReduction, int], list[str]] = {}
        for name, reduction in self.reductions.items():
            members.setdefault((reduction, len(self.probes[name].labels)), []).append(name)
        groups = []
        for (reduction, n_classes), names in members.items():
            columns = torch.cat([torch.arange(self.n_columns)[self.columns[name]] for name in names])
            per_probe = len(columns) // len(names)
            places = {name: slice(at * per_probe, (at + 1) * per_probe) for at, name in enumerate(names)}
            groups.append(ReductionGroup(reduction, columns, n_classes, places))
        return groups

    def group_of(self, name: str) -> ReductionGroup:
        """The reduction group that a probe belongs to."""
        return next(group for group in self.groups if name in group.places)

    def _thresholds(self) -> Thresholds:
        values = torch.full((self.n_columns,), math.nan)
        as_probability, as_logit = torch.zeros(2, self.n_columns, dtype=torch.bool)
        for name, probe in self.probes.items():
            if not probe.is_binary:
                continue
            at, on_logits = self.columns[name], self.reductions[name].before == "none"
            value, unit = threshold_of(probe)
            values[at] = value
            as_probability[at] = on_logits and unit == "probability"
            as_logit[at] = not on_logits and unit == "logit"
        return Thresholds(values, as_probability, as_logit)

    def combine(self, partials: Sequence[Tensor], device: torch.device) -> Tensor:
        """Partial logits of all hook points, each [batch pos columns], in the order of `hooks` -> logits [batch pos
        n_columns]."""
        if len(partials) == 1 and self._straight:
            return partials[0].to(device)
        side_by_side = torch.cat([partial.to(device) for partial in partials], dim=-1)
        if self._straight:
            return side_by_side
        empty = side_by_side.new_zeros(*side_by_side.shape[:-1], self.n_columns)
        return empty.index_add(-1, self._order.to(device), side_by_side)


def threshold_of(weights: ProbeWeights) -> tuple[float, str]:
    """Threshold and unit of a binary probe: its own, else a probability of 0.5, where its classifier changes its mind."""
    own: Any = weights.threshold
    return (own.value, own.unit) if own is not None else (0.5, "probability")


def threshold_logit(weights: ProbeWeights) -> float:
    """The threshold of a binary probe as a logit."""
    value, unit = threshold_of(weights)
    return value if unit == "logit" else _logit(value)
