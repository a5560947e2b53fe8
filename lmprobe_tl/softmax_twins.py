"""Online twins that weigh tokens by a softmax over time, of all tokens so far or of the last few; see online.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl import twins
from lmprobe_tl.online import Items


def start_softmax(zero: Tensor, temperature: float = 1.0) -> Items:
    return torch.full_like(zero, _least_mass(zero)), zero


def step_softmax(state: Items, z: Tensor, counted: Tensor, seen: Tensor, temperature: float) -> tuple[Tensor, Items]:
    return step_attention(state, z / temperature, z, counted)


def step_attention(state: Items, query: Tensor, values: Tensor, counted: Tensor) -> tuple[Tensor, Items]:
    """The mean of all values so far under weights softmax(query), after each position; state as of `start_softmax`."""
    items = torch.where(counted, query, _least_mass(query)), values
    mass, mean = _softmax_join(state, items) if values.shape[1] == 1 else twins.scan(_softmax_join, state, items)
    return mean, (twins.last(mass), twins.last(mean))


def _softmax_join(left: Items, right: Items) -> Items:
    """Two stretches of tokens as one, each as (log of the sum of e^query, mean of the values under these weights)."""
    mass = torch.logaddexp(left[0], right[0])
    return mass, torch.lerp(left[1], right[1], (right[0] - mass).exp())


def _least_mass(like: Tensor) -> float:
    """log 0, nearly: with -inf the weight of nothing beside nothing would be NaN."""
    return torch.finfo(like.dtype).min / 2


def windowed_softmax(query: Tensor, values: Tensor, window: int) -> Tensor:
    """Mean of the values of each `window` positions in a row, under weights softmax(query) of these alone.

    query, values: [batch pos n] -> [batch pos-window+1 n], for pos >= window. As in `window_sums`, a window is the end of
    one block of `window` positions and the beginning of the next.
    """
    batch, pos, n = values.shape
    n_blocks = math.ceil(pos / window)
    filled = (
        torch.cat([part, part.new_full((batch, n_blocks * window - pos, n), fill)], dim=1)
        for part, fill in ((query, _least_mass(query)), (values, 0.0))
    )
    mass, mean = (rearrange(part, "batch (block pos) n -> pos batch block n", pos=window) for part in filled)
    up_to = list(accumulate(zip(mass, mean, strict=True), _softmax_join))
    nothing = (torch.full_like(mass[0], _least_mass(mass)), torch.zeros_like(mean[0]))
    # from a position to the end of its block; nothing for the first, whose window is a block
    after = list(accumulate(zip(mass[1:].flip(0), mean[1:].flip(0), strict=True), _softmax_join))[::-1]
    from_on = [nothing, *after]

    def in_a_row(parts: list[Items]) -> Items:
        return tuple(torch.stack(part, dim=2).flatten(1, 2) for part in zip(*parts, strict=True))

    left = tuple(part[:, : pos - window + 1] for part in in_a_row(from_on))
    right = tuple(part[:, window - 1 : pos] for part in in_a_row(up_to))
    return _softmax_join(left, right)[1]


def start_rolling_softmax(zero: Tensor, window: int, running: Tensor) -> Items:
    """Queries and values of the last tokens as rings, the k-th in slot k mod window, and a spare slot for what does not
    count; then the running score, of the shape of `running`."""
    values = zero.new_zeros(len(zero), window + 1, zero.shape[2])
    return torch.full_like(values, _least_mass(values)), values, running


def step_rolling_softmax(
    state: Items,
    query: Tensor,
    values: Tensor,
    counted: Tensor,
    seen: Tensor,
    window: int,
    summed: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Items]:
    """The highest value of `summed` over all full windows, of a window's mean under weights softmax(query); until one is
    full, the value of what is there."""
    if values.shape[1] > 1:
        return _roll_softmax_chunk(state, query, values, counted, seen, window, summed)
    *rings, running = state
    if rings[0].is_inference() and not torch.is_inference_mode_enabled():
        rings = [ring.clone() for ring in rings]  # made in inference mode they may not be written to outside of it
    slot = torch.where(counted, seen % window, window)
    for ring, new in zip(rings, (query, values), strict=True):
        ring.scatter_(1, slot.expand_as(new), new)
    weights = rings[0][:, :window].softmax(dim=1)  # a slot that was never filled weighs nothing
    value = summed((weights * rings[1][:, :window]).sum(dim=1, keepdim=True))
    running = torch.where(counted, torch.where(seen > window, torch.maximum(running, value), value), running)
    return running, (*rings, running)


def _roll_softmax_chunk(
    state: Items,
    query: Tensor,
    values: Tensor,
    counted: Tensor,
    seen: Tensor,
    window: int,
    summed: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Items]:
    *rings, running = state
    before, total = twins.before_chunk(counted, seen), seen[:, -1:]
    oldest_first = (before + torch.arange(1, window + 1, device=values.device)[:, None]) % window
    recent = [
        torch.cat([twins.take(ring, oldest_first), twins.compact(new, counted)], dim=1)
        for ring, new in zip(rings, (query, values), strict=True)
    ]
    count = before + torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
    # the k-th window ends at the k-th counted token of this chunk
    means = summed(windowed_softmax(recent[0][:, 1:], recent[1][:, 1:], window))
    full = count >= window
    best, _ = twins.step_max((torch.where(before >= window, running, -torch.inf),), means, full, seen)
    by_count = torch.cat([running, torch.where(full, best, means)], dim=1)
    after = twins.take(by_count, seen - before)  # 0 counted so far in this chunk = the state, put before it
    slots = torch.arange(window + 1, device=values.device)[:, None]
    newest = total - (total - slots) % window  # which counted token stands in a slot now
    kept = newest - before + window - 1
    return after, (*(twins.take(part, kept) for part in recent), after[:, -1:])
