"""Polynomial probes cut short: at a lower degree for everything, or for each activation where it is sure already.

A polynomial probe is trained order by order, so each truncation is a probe of its own (Oldfield et al. 2025,
arXiv:2509.26238). Clear cases leave a cascade after a low order; only ambiguous ones pay for the higher ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.heads import polynomial_orders
from lmprobe_tl.precision import saturated, wide_dtype, without_autocast
from lmprobe_tl.probe_spec import HeadRecord
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """logits: [...] float32; degrees: [...] int64, the order up to which each was evaluated."""

    logits: Tensor
    degrees: Tensor


def truncate(weights: ProbeWeights, degree: int) -> ProbeWeights:
    """The polynomial probe up to this degree; of degree 1 it is linear.

    Without threshold, probability calibration and metrics, which were those of the full probe. InputError for another kind,
    or a degree that it does not have.
    """
    full = _degree(weights)
    if type(degree) is not int or not 1 <= degree <= full:
        raise InputError(f"degree is {degree!r}; expected a whole number from 1 to {full}, the degree of {weights.name!r}.")
    assert weights.readout is not None and weights.readout_intercept is not None
    spec = replace(weights.spec, threshold=None, probability_calibration=None, metrics={})
    if degree == 1:
        factor = weights.readout[:, :1]
        direction, intercept = factor * weights.direction[:1], factor[0] * weights.intercept[:1] + weights.readout_intercept
        return ProbeWeights(direction, intercept, replace(spec, kind="linear", head=HeadRecord()))
    kept = polynomial_orders(full, weights.spec.head.rank or 1) <= degree
    return ProbeWeights(
        weights.direction[kept],
        weights.intercept[kept],
        replace(spec, head=replace(weights.spec.head, degree=degree)),
        weights.readout[:, kept],
        weights.readout_intercept,
    )


def early_exit_logits(weights: ProbeWeights, activations: Tensor, margin: float) -> EarlyExit:
    """Token logits of a polynomial probe, each evaluated no further than to the first order whose logit is `margin` or more
    away from 0.

    activations: as in `ProbeWeights.logits`. margin: in logits, above 0; infinity evaluates everything.
    InputError for another kind of probe or a margin that is not a positive number.
    """
    full = _degree(weights)
    if not isinstance(margin, Real) or isinstance(margin, bool) or not margin > 0:
        raise InputError(f"margin is {margin!r}; expected a number of logits above 0, such as 2.0.")
    weights.check_activations(activations)
    flat = activations.reshape(-1, activations.shape[-1])
    logits = torch.empty(len(flat), dtype=wide_dtype(flat.device), device=flat.device)
    degrees = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    unsure = torch.arange(len(flat), device=flat.device)
    for degree in range(1, full + 1):
        found = _up_to(weights, flat[unsure], degree, logits[unsure])
        logits[unsure], degrees[unsure] = found, degree
        unsure = unsure[found.abs() < margin]
        if not len(unsure):
            break
    found = saturated(logits, torch.float32)
    return EarlyExit(found.reshape(activations.shape[:-1]), degrees.reshape(activations.shape[:-1]))


def _up_to(weights: ProbeWeights, activations: Tensor, degree: int, lower: Tensor) -> Tensor:
    """Logits [n] up to a degree, from those [n] of the degree below: only the terms of this one are computed."""
    dtype, device = lower.dtype, activations.device
    if degree == 1:
        return truncate(weights, 1).logits(activations).to(dtype)
    assert weights.readout is not None
    own = polynomial_orders(_degree(weights), weights.spec.head.rank or 1) == degree
    direction, intercept = weights.direction[own].to(device), weights.intercept[own].to(device)
    readout = weights.readout[0, own].to(device).to(dtype)
    with without_autocast(device):
        readings = torch.nn.functional.linear(activations.float(), direction, intercept)
        return lower + readings.to(dtype) ** degree @ readout


def _degree(weights: ProbeWeights) -> int:
    if weights.spec.kind != "polynomial" or weights.spec.head.degree is None:
        raise InputError(f"probe {weights.name!r} is of kind {weights.spec.kind!r}; expected 'polynomial'.")
    return weights.spec.head.degree
