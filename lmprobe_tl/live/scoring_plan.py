"""Many probes as one matrix a hook point, and each probe's inference pooling as an online reduction of its token logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.live.records import Escalate
from lmprobe_tl.live.reduction import LiveReduction, live_reduction, sigmoid
from lmprobe_tl.live.watches import watches_of
from lmprobe_tl.weights import ProbeWeights


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
        hook_names = dict.fromkeys(name for weights in probes for name in weights.hook_points)
        self.hooks = {name: self._hook_columns(name) for name in hook_names}
        starts = {name: columns.start for name, columns in self.columns.items()}
        self.watches = watches_of(self.probes, starts, self.reductions, cascades or {}, self.n_columns)
        # Output column of each column of the matrices, side by side; each once and in order is the usual case.
        order = torch.cat([hook.columns for hook in self.hooks.values()])
        self._straight = torch.equal(order, torch.arange(self.n_columns))
        self._order = {order.device: order}

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

    def combine(self, partials: Sequence[Tensor], device: torch.device) -> Tensor:
        """Partial logits of all hook points, each [batch pos columns], in the order of `hooks` -> logits [batch pos
        n_columns]."""
        if len(partials) == 1 and self._straight:
            return partials[0].to(device)
        side_by_side = torch.cat([partial.to(device) for partial in partials], dim=-1)
        if self._straight:
            return side_by_side
        if device not in self._order:  # moved once: a copy in every step would wait for the device
            self._order[device] = next(iter(self._order.values())).to(device)
        empty = side_by_side.new_zeros(*side_by_side.shape[:-1], self.n_columns)
        return empty.index_add(-1, self._order[device], side_by_side)
