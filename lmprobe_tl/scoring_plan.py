"""Many probes as one matrix a hook point, and each probe's inference pooling as an online reduction of its token logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import IncompatibleProbeError
from lmprobe_tl.live_records import Escalate, Verdict
from lmprobe_tl.online import wide_dtype
from lmprobe_tl.pooling import parse_pooling_strategy
from lmprobe_tl.probe_spec import ThresholdUnit
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
        batch, pos, d_model = activations.shape
        # reshape, not rearrange, and autocast left only where it is on: this runs at every hook point in every step
        flat = activations.detach().float().reshape(batch * pos, d_model)
        if torch.is_autocast_enabled(flat.device.type):  # it would narrow the scores to bfloat16
            with torch.autocast(flat.device.type, enabled=False):
                logits = torch.addmm(bias, flat, weight)
        else:
            logits = torch.addmm(bias, flat, weight)
        return logits.view(batch, pos, -1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self.on_device:
            self.on_device[device] = (self.weight.to(device), self.bias.to(device))
        return self.on_device[device]


@dataclass(frozen=True)
class ReductionGroup:
    """Output columns side by side whose running scores follow the same reduction: probe `p` has `places[p]` among them."""

    reduction: LiveReduction
    columns: slice
    n_classes: int
    places: Mapping[str, slice]

    @property
    def n_columns(self) -> int:
        return self.columns.stop - self.columns.start

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
class Watch:
    """A threshold on the running score of a probe: `value` in `unit`. verdict: 'positive', or 'deferred' for the low one of
    a cascade."""

    probe: str
    column: int
    value: float
    unit: ThresholdUnit
    verdict: Verdict


@dataclass(frozen=True)
class Watches:
    """All watched thresholds: `n_positive` that raise an alarm, then those that defer.

    values: [n] float32, the smallest value of each column's online reduction that reaches the threshold. columns: [n], the
    output column of each; None where these are all columns in order.
    """

    lines: tuple[Watch, ...]
    n_positive: int
    values: Tensor
    columns: Tensor | None


class ScoringPlan:
    """What a Monitor computes for its probes: a matrix a hook point, and a column range a probe.

    cascades: by name of a binary probe, two thresholds in place of its one.
    """

    def __init__(self, probes: Sequence[ProbeWeights], cascades: Mapping[str, Escalate] | None = None) -> None:
        self.probes = {weights.name: weights for weights in probes}
        self.reductions = {weights.name: live_reduction(weights) for weights in probes}
        self.groups = self._groups()
        self.columns = {
            name: slice(group.columns.start + place.start, group.columns.start + place.stop)
            for group in self.groups
            for name, place in group.places.items()
        }
        self.n_columns = self.groups[-1].columns.stop
        hook_names = dict.fromkeys(name for weights in probes for name in weights.hook_points)
        self.hooks = {name: self._hook_columns(name) for name in hook_names}
        self.watches = self._watches(cascades or {})
        # Output column of each column of the matrices, side by side. Each once and in order is the usual case, in which
        # there is nothing to do; each once, in which they are but moved, is the next.
        order = torch.cat([hook.columns for hook in self.hooks.values()])
        self._order = order
        self._straight = torch.equal(order, torch.arange(self.n_columns))
        each_once = torch.equal(order.sort().values, torch.arange(self.n_columns))
        self._moved_from = order.argsort() if each_once else None

    def _groups(self) -> list[ReductionGroup]:
        members: dict[tuple[LiveReduction, int], list[str]] = {}
        for name, reduction in self.reductions.items():
            members.setdefault((reduction, len(self.probes[name].labels)), []).append(name)
        groups: list[ReductionGroup] = []
        start = 0
        for (reduction, n_classes), names in members.items():
            width = 1 if n_classes == 2 else n_classes
            places = {name: slice(at * width, (at + 1) * width) for at, name in enumerate(names)}
            stop = start + width * len(names)
            groups.append(ReductionGroup(reduction, slice(start, stop), n_classes, places))
            start = stop
        return groups

    def _hook_columns(self, hook_name: str) -> HookColumns:
        weights, biases, columns = [], [], []
        for name in sorted(self.columns, key=lambda one: self.columns[one].start):
            probe = self.probes[name]
            if hook_name not in probe.hook_points:
                continue
            weights.append(probe.direction_at(hook_name))
            first = probe.hook_points[0] == hook_name  # the intercept counts once
            biases.append(probe.intercept if first else torch.zeros_like(probe.intercept))
            columns.append(torch.arange(self.n_columns)[self.columns[name]])
        weight = rearrange(torch.cat(weights), "columns d_model -> d_model columns").contiguous()
        return HookColumns(weight, torch.cat(biases), torch.cat(columns))

    def group_of(self, name: str) -> ReductionGroup:
        """The reduction group that a probe belongs to."""
        return next(group for group in self.groups if name in group.places)

    def _watches(self, cascades: Mapping[str, Escalate]) -> Watches:
        high, low = [], []
        for name in sorted(self.columns, key=lambda one: self.columns[one].start):
            probe, cascade = self.probes[name], cascades.get(name)
            if not probe.is_binary:
                continue
            column, (value, unit) = self.columns[name].start, threshold_of(probe)
            if cascade is not None:
                low.append(Watch(name, column, cascade.low, cascade.unit, "deferred"))
                if cascade.high is not None:
                    value, unit = cascade.high, cascade.unit
            high.append(Watch(name, column, value, unit, "positive"))
        lines = (*high, *low)
        lowest = [_lowest_reaching(self.reductions[line.probe], line.value, line.unit) for line in lines]
        values = torch.tensor(lowest, dtype=torch.float32)
        columns = torch.tensor([line.column for line in lines], dtype=torch.int64)
        all_in_order = columns.tolist() == list(range(self.n_columns))
        return Watches(lines, len(high), values, None if all_in_order else columns)

    def combine(self, partials: Sequence[Tensor], device: torch.device) -> Tensor:
        """Partial logits of all hook points, each [batch pos columns], in the order of `hooks` -> logits [batch pos
        n_columns]."""
        if len(partials) == 1 and self._straight:
            return partials[0].to(device)
        side_by_side = torch.cat([partial.to(device) for partial in partials], dim=-1)
        if self._straight:
            return side_by_side
        if self._moved_from is not None:
            return side_by_side.index_select(-1, self._moved_from.to(device))
        empty = side_by_side.new_zeros(*side_by_side.shape[:-1], self.n_columns)
        return empty.index_add(-1, self._order.to(device), side_by_side)


@lru_cache(maxsize=4096)
def _lowest_reaching(reduction: LiveReduction, threshold: float, unit: str) -> float:
    """The smallest float32 that, as a value of the online reduction, reaches the threshold; NaN where none does.

    A threshold may be in another unit than the reduction runs in, and one that was read off a score must be reached by that
    very score: so it is looked for among the numbers themselves, and a step is one comparison.
    """
    limit = torch.tensor(threshold, dtype=torch.float32)
    if unit == ("logit" if reduction.before == "none" else "probability"):
        return limit.item()
    lowest, highest = (0, _AS_INTEGER_1) if reduction.before != "none" else (-_AS_INTEGER_INF, _AS_INTEGER_INF)
    if not bool(reduction.in_unit(_float_at(highest), unit) >= limit):
        return math.nan
    while lowest < highest:  # float32 numbers by rank, of which there are fewer than 2**32
        middle = (lowest + highest) // 2
        if bool(reduction.in_unit(_float_at(middle), unit) >= limit):
            highest = middle
        else:
            lowest = middle + 1
    return _float_at(lowest).item()


_AS_INTEGER_1, _AS_INTEGER_INF = 0x3F800000, 0x7F800000


def _float_at(rank: int) -> Tensor:
    """The float32 number of this rank; numbers of the same sign are ordered as the integers that their bits spell."""
    value = torch.tensor(abs(rank), dtype=torch.int32).view(torch.float32)
    return value if rank >= 0 else -value


def threshold_of(weights: ProbeWeights) -> tuple[float, ThresholdUnit]:
    """Threshold and unit of a binary probe: its own, else a probability of 0.5, where its classifier changes its mind."""
    own: Any = weights.threshold
    return (own.value, own.unit) if own is not None else (0.5, "probability")


def threshold_logit(weights: ProbeWeights) -> float:
    """The threshold of a binary probe as a logit."""
    value, unit = threshold_of(weights)
    return value if unit == "logit" else _logit(value)
