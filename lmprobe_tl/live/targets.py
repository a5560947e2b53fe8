"""Directions as users give them to steer and ablate, and the edits that they ask for, by hook point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lmprobe_tl.compatibility import check_compatible
from lmprobe_tl.errors import IncompatibleProbeError, InputError
from lmprobe_tl.given_probes import as_probes, as_weights
from lmprobe_tl.hook_points import check_carries_stream, width
from lmprobe_tl.live.edit import Edit, Reading, addition, projection
from lmprobe_tl.probe_spec import Label
from lmprobe_tl.weights import ProbeWeights

Unit: TypeAlias = Literal["norm", "logit"]

# What a plain tensor is called where a probe has its name.
TENSOR_NAME = "direction"


@dataclass(frozen=True)
class Target:
    """One probe or tensor and where it goes: a reading a hook point.

    probes: for each hook point the probe as one that reads it there, none for a tensor. is_split: a probe on several hook
    points, each of which reads a part of it.
    """

    readings: Sequence[Reading]
    probes: Sequence[ProbeWeights] = ()
    is_split: bool = False


def targets_of(model: Any, given: Any, hook_points: Sequence[str] | None, *, strict: bool = False) -> list[Target]:
    """The targets of a tensor [d_model] or [n d_model], or of one or several probes; hook_points in place of their own.

    InputError: a tensor without hook points or of another width, a direction that is 0, other hook points for a probe that
    reads several. IncompatibleProbeError: a probe that is not linear, or does not fit the model.
    """
    if isinstance(given, Tensor):
        targets = [_tensor_target(model, given, hook_points)]
    else:
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        probes = as_probes([_linear(as_weights(one)) for one in listed])
        check_compatible(model, probes, strict=strict)
        targets = [_probe_target(probe, hook_points) for probe in probes]
    for target in targets:
        for reading in target.readings:
            check_carries_stream(model, reading.hook_point)
            if not reading.weight.any():
                raise InputError(f"{reading.name!r} is 0 at {reading.hook_point!r}, which is no direction.")
    return targets


def _linear(weights: ProbeWeights) -> ProbeWeights:
    if weights.spec.kind != "linear":
        raise IncompatibleProbeError(
            f"probe {weights.name!r} is of kind {weights.spec.kind!r}, which has no one direction; expected a linear probe."
        )
    return weights


def _tensor_target(model: Any, direction: Tensor, hook_points: Sequence[str] | None) -> Target:
    if hook_points is None:
        raise InputError("a tensor does not say where it goes; give hook_points=..., a layer or a hook name.")
    rows = torch.atleast_2d(direction.detach()).to("cpu", torch.float32)
    if rows.ndim != 2 or rows.shape[1] != width(model):
        raise InputError(
            f"the direction has shape {list(direction.shape)}; expected [{width(model)}] (d_model) or rows of it."
        )
    lengths = rows.norm(dim=-1, keepdim=True)
    if not lengths.isfinite().all() or not lengths.all():
        raise InputError("a direction is 0 or not finite; expected rows of finite numbers, not all of them 0.")
    unit, bias = rows / lengths, torch.zeros(len(rows))
    return Target([Reading(TENSOR_NAME, name, unit, bias) for name in hook_points])


def _probe_target(probe: ProbeWeights, hook_points: Sequence[str] | None) -> Target:
    if len(probe.hook_points) > 1:
        if hook_points is not None:
            raise InputError(
                f"probe {probe.name!r} reads {len(probe.hook_points)} hook points, each in its own direction, so it has "
                "none for others; leave out hook_points, or give a tensor such as weights.direction_at(...)[0]."
            )
        without = torch.zeros_like(probe.intercept)
        readings = [Reading(probe.name, name, probe.direction_at(name), without) for name in probe.hook_points]
        return Target(readings, [probe], is_split=True)
    names = probe.hook_points if hook_points is None else hook_points
    moved = [replace(probe, spec=replace(probe.spec, hook_points=(name,))) for name in names]
    return Target([Reading(one.name, one.hook_points[0], one.direction, one.intercept) for one in moved], moved)


def additions(target: Target, coefficient: float, unit: Unit, label: Label | None) -> dict[str, Edit]:
    """Edits that add a direction: by the length `coefficient`, or by as much as moves the logit of `label` by it."""
    sign, row = _label_row(target, label)
    if unit == "logit" and not target.probes:
        raise InputError(
            "a plain tensor has no logit; leave unit at 'norm', or make it a probe: ProbeWeights.from_direction."
        )
    rows = [sign * reading.weight[row].double() for reading in target.readings]
    edits = {}
    for reading, direction in zip(target.readings, rows, strict=True):
        length = float((torch.cat(rows) if target.is_split else direction).norm())
        if length == 0:
            raise InputError(f"{reading.name!r} is 0 for label {label!r} at {reading.hook_point!r}, which is no direction.")
        step = coefficient / (length if unit == "norm" else length**2)
        edits[reading.hook_point] = addition(reading, step * direction)
    return edits


def _label_row(target: Target, label: Label | None) -> tuple[int, int]:
    """Sign and row of the direction towards a label."""
    n_rows = len(target.readings[0].weight)
    if not target.probes:
        if label is not None or n_rows > 1:
            got = f"{n_rows} directions" if n_rows > 1 else f"label={label!r}"
            raise InputError(f"a tensor to steer by is one direction without labels, not {got}; the coefficient has a sign.")
        return 1, 0
    probe = target.probes[0]
    if label is None and probe.is_binary:
        return 1, 0
    if label is None or label not in probe.labels:
        raise InputError(f"label is {label!r}; expected one that probe {probe.name!r} has: {list(probe.labels)}.")
    index = probe.labels.index(label)
    return (2 * index - 1, 0) if probe.is_binary else (1, index)


def projections(model: Any, targets: Sequence[Target], to: float | None) -> dict[str, Edit]:
    """Edits that project directions out, all of a hook point together; `to` is where they are then set."""
    if to is not None:
        for target in targets:
            probe = target.probes[0] if target.probes else None
            if target.is_split or (probe is not None and not probe.is_binary):
                raise InputError(
                    f"to={to:g} sets the one logit of a probe with two classes at one hook point, and probe "
                    f"{target.readings[0].name!r} has another; leave it out to project the directions out."
                )
    points, together = model.hook_dict, dict[int, list[Reading]]()
    for reading in (reading for target in targets for reading in target.readings):
        together.setdefault(id(points[reading.hook_point]), []).append(reading)  # a hook point may have two names
    return {readings[0].hook_point: projection(readings, to) for readings in together.values()}
