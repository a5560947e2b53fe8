"""Many probes as one matrix a hook point, and each probe's inference pooling as an online reduction of its token logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.heads import Head, LinearHead, ReadoutHead, SequenceHead
from lmprobe_tl.live.records import Escalate
from lmprobe_tl.live.reduction import LiveReduction, live_reduction, sigmoid
from lmprobe_tl.live.watches import watches_of
from lmprobe_tl.online import OnlineReduction
from lmprobe_tl.reductions import make_online
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True)
class HookColumns:
    """All directions that read one hook point: `weight` [d_model columns], `bias` [columns], and which reading of the plan
    each is part of."""

    weight: Tensor
    bias: Tensor
    columns: Tensor
    on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def partial_readings(self, activations: Tensor) -> Tensor:
        """activations [batch pos d_model] -> [batch pos columns], float32 on the activations' device, in one matrix
        product."""
        weight, bias = self._on(activations.device)
        batch, pos, d_model = activations.shape
        # reshape, not rearrange, and autocast left only where it is on: this runs at every hook point in every step
        flat = activations.detach().float().reshape(batch * pos, d_model)
        if torch.is_autocast_enabled(flat.device.type):  # it would narrow the scores to bfloat16
            with torch.autocast(flat.device.type, enabled=False):
                readings = torch.addmm(bias, flat, weight)
        else:
            readings = torch.addmm(bias, flat, weight)
        return readings.view(batch, pos, -1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self.on_device:
            self.on_device[device] = (self.weight.to(device), self.bias.to(device))
        return self.on_device[device]


@dataclass(frozen=True)
class ReductionGroup:
    """Output columns side by side that the same reduction and the same head make: probe `p` has `places[p]` among them.

    read: which of all numbers that are read off a token are theirs. readout: what makes logits of these at once, for heads
    that need them no longer. readings: what is kept of a token then, among the plan's readings; head: what makes logits of
    these, a linear one where they are logits.
    """

    reduction: LiveReduction
    read: slice
    readout: ReadoutHead | None
    head: Head
    readings: slice
    columns: slice
    n_classes: int
    places: Mapping[str, slice]

    @property
    def n_columns(self) -> int:
        return self.columns.stop - self.columns.start

    def token_logits(self, readings: Tensor) -> Tensor:
        """Readings of this group [batch pos readings] -> logits of single tokens [batch pos columns]."""
        return self.head.token_logits(readings)

    def make_online(self, n_rows: int, device: torch.device | str = "cpu") -> OnlineReduction:
        """A fresh online reduction of this group's columns, for what `enter` gives."""
        if isinstance(self.head, SequenceHead):
            n_readings = self.readings.stop - self.readings.start
            return OnlineReduction(self.head.start, self.head.step, (), n_rows, n_readings, device, n_scores=self.n_columns)
        assert self.reduction.name is not None
        n = self.readings.stop - self.readings.start if self.reduction.on_readings else self.n_columns
        return make_online(self.reduction.name, self.reduction.parameter, n_rows, n, device)

    def enter(self, readings: Tensor, logits: Tensor) -> Tensor:
        """What the online reduction takes: of this group, readings [batch pos readings] or logits [batch pos columns]."""
        takes_readings = isinstance(self.head, SequenceHead) or self.reduction.on_readings
        return readings if takes_readings else self._squash(logits, self.reduction.before)

    def values(self, reduced: Tensor) -> Tensor:
        """What the online reduction yields, as values of this group's columns [batch pos columns]."""
        return self.head.token_logits(reduced) if self.reduction.on_readings else reduced

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
            return sigmoid(values)
        if how == "softmax":
            by_probe = rearrange(values, "... (probe classes) -> ... probe classes", classes=self.n_classes)
            return rearrange(by_probe.softmax(-1), "... probe classes -> ... (probe classes)")
        return values


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
        self.n_readings = self.groups[-1].readings.stop
        self._n_read = self.groups[-1].read.stop
        self._has_readout = any(group.readout is not None for group in self.groups)
        self._readings_are_logits = all(isinstance(group.head, LinearHead) for group in self.groups)
        hook_names = dict.fromkeys(name for weights in probes for name in weights.hook_points)
        self.hooks = {name: self._hook_columns(name) for name in hook_names}
        starts = {name: columns.start for name, columns in self.columns.items()}
        self.watches = watches_of(self.probes, starts, self.reductions, cascades or {}, self.n_columns)
        # The number read off a token that each column of the matrices, side by side, is part of; each once and in order is
        # the usual case.
        order = torch.cat([hook.columns for hook in self.hooks.values()])
        self._straight = torch.equal(order, torch.arange(self._n_read))
        self._order = {order.device: order}

    def _groups(self) -> list[ReductionGroup]:
        members: dict[tuple[LiveReduction, Head, int], list[str]] = {}
        for name, reduction in self.reductions.items():
            probe = self.probes[name]
            members.setdefault((reduction, probe.head, probe.n_classes), []).append(name)
        groups: list[ReductionGroup] = []
        start = first_read = first_kept = 0
        for (reduction, head, n_classes), names in members.items():
            width, n = head.n_outputs, len(names)
            places = {name: slice(at * width, (at + 1) * width) for at, name in enumerate(names)}
            columns, read = slice(start, start + width * n), slice(first_read, first_read + head.n_readings * n)
            readout = head if isinstance(head, ReadoutHead) and not reduction.on_readings else None
            kept_head = head if readout is None else LinearHead(width)
            kept = slice(first_kept, first_kept + kept_head.n_readings * n)
            groups.append(ReductionGroup(reduction, read, readout, kept_head, kept, columns, n_classes, places))
            start, first_read, first_kept = columns.stop, read.stop, kept.stop
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
            columns.append(self._readings_of(name))
        weight = rearrange(torch.cat(weights), "columns d_model -> d_model columns").contiguous()
        return HookColumns(weight, torch.cat(biases), torch.cat(columns))

    def _readings_of(self, name: str) -> Tensor:
        """Which of the numbers read off a token are those of a probe, in the order of its direction's rows."""
        group, n_readings = self.group_of(name), self.probes[name].spec.n_readings
        first = group.read.start + list(group.places).index(name) * n_readings
        return torch.arange(first, first + n_readings)

    def group_of(self, name: str) -> ReductionGroup:
        """The reduction group that a probe belongs to."""
        return next(group for group in self.groups if name in group.places)

    def combine(self, partials: Sequence[Tensor], device: torch.device) -> Tensor:
        """Partial readings of all hook points, each [batch pos columns], in the order of `hooks` -> readings [batch pos
        n_readings], which are logits already where a head gives each token its own."""
        read = self._side_by_side(partials, device)
        if not self._has_readout:
            return read
        parts = [read[..., group.read] for group in self.groups]
        made = (
            part if group.readout is None else group.readout.token_logits(part)
            for group, part in zip(self.groups, parts, strict=True)
        )
        return torch.cat(list(made), dim=-1)

    def _side_by_side(self, partials: Sequence[Tensor], device: torch.device) -> Tensor:
        if len(partials) == 1 and self._straight:
            return partials[0].to(device)
        side_by_side = torch.cat([partial.to(device) for partial in partials], dim=-1)
        if self._straight:
            return side_by_side
        if device not in self._order:  # moved once: a copy in every step would wait for the device
            self._order[device] = next(iter(self._order.values())).to(device)
        empty = side_by_side.new_zeros(*side_by_side.shape[:-1], self._n_read)
        return empty.index_add(-1, self._order[device], side_by_side)

    def token_logits(self, readings: Tensor) -> Tensor:
        """Readings [batch pos n_readings] -> logits of single tokens [batch pos n_columns]."""
        if self._readings_are_logits:
            return readings
        parts = [group.token_logits(readings[..., group.readings]) for group in self.groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def advance(
        self,
        onlines: Sequence[OnlineReduction],
        readings: Tensor,
        logits: Tensor,
        update: Callable[[OnlineReduction, ReductionGroup, Tensor], Tensor],
    ) -> Tensor:
        """The values of the online reductions [batch pos n_columns] after the next positions, group by group."""
        if len(self.groups) == 1:  # as for one probe, which has nothing to cut apart: this runs in every step
            (group,), (online,) = self.groups, onlines
            return group.values(update(online, group, group.enter(readings, logits)))
        parts = [
            group.values(update(online, group, group.enter(readings[..., group.readings], logits[..., group.columns])))
            for group, online in zip(self.groups, onlines, strict=True)
        ]
        return torch.cat(parts, dim=-1)
