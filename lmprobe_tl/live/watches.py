"""Thresholds that live scores are compared with, as numbers of the very kind that the online reductions yield."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.live.records import Escalate, Verdict
from lmprobe_tl.live.reduction import LiveReduction
from lmprobe_tl.probe_spec import ThresholdUnit
from lmprobe_tl.weights import ProbeWeights


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


def watches_of(
    probes: Mapping[str, ProbeWeights],
    columns: Mapping[str, int],
    reductions: Mapping[str, LiveReduction],
    cascades: Mapping[str, Escalate],
    n_columns: int,
) -> Watches:
    """The thresholds of binary probes, by name: their own, or the two of a cascade.

    columns: the output column of each, of n_columns in all; reductions: what each runs in.
    """
    high, low = [], []
    for name in sorted(columns, key=lambda one: columns[one]):
        probe, cascade = probes[name], cascades.get(name)
        if not probe.is_binary:
            continue
        value, unit = threshold_of(probe)
        if cascade is not None:
            low.append(Watch(name, columns[name], cascade.low, cascade.unit, "deferred"))
            if cascade.high is not None:
                value, unit = cascade.high, cascade.unit
            elif not _lowest_reaching(reductions[name], cascade.low, cascade.unit) < _lowest_reaching(
                reductions[name], value, unit
            ):
                raise InputError(
                    f"Escalate: low is {cascade.low!r} ({cascade.unit}), and the threshold of probe {name!r} is {value!r} "
                    f"({unit}); expected low below it. Give another low, or high."
                )
        high.append(Watch(name, columns[name], value, unit, "positive"))
    lines = (*high, *low)
    values = torch.tensor(
        [_lowest_reaching(reductions[line.probe], line.value, line.unit) for line in lines], dtype=torch.float32
    )
    watched = [line.column for line in lines]
    each_in_order = watched == list(range(n_columns))
    return Watches(lines, len(high), values, None if each_in_order else torch.tensor(watched, dtype=torch.int64))


@lru_cache(maxsize=4096)
def _lowest_reaching(reduction: LiveReduction, threshold: float, unit: str) -> float:
    """The smallest float32 that, as a value of the online reduction, reaches the threshold; NaN where none does.

    A threshold may be in another unit than the reduction runs in, and one that was read off a score must be reached by that
    very score: so it is looked for among the numbers themselves, and a step is one comparison.
    """
    limit = torch.tensor(threshold, dtype=torch.float32)
    if unit == reduction.own_unit:
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


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability) - math.log1p(-probability)


def threshold_of(weights: ProbeWeights) -> tuple[float, ThresholdUnit]:
    """Threshold and unit of a binary probe: its own, else a probability of 0.5, where its classifier changes its mind."""
    own: Any = weights.threshold
    return (own.value, own.unit) if own is not None else (0.5, "probability")


def threshold_logit(weights: ProbeWeights) -> float:
    """The threshold of a binary probe as a logit."""
    value, unit = threshold_of(weights)
    return value if unit == "logit" else _logit(value)
