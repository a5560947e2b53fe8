"""The online twins that are built in, each a start and a step as the top of online.py describes them.

A step has a path of its own for one position: while a model generates, it is every step, and has to be quick.
Bytes of state for one row and probe: last_token, first_token, max and min 4, mean 8, ema_max and softmax 16, rolling_max
8 (window + 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.online import Items


def scan(join: Callable[[Items, Items], Items], start: Items, items: Items) -> Items:
    """Each prefix of `items` along pos (at least one), joined after `start`. `join` must be associative.

    Blocks of sqrt(pos) positions are scanned side by side, then their totals: 2 sqrt(pos) joins in a row, where a loop over
    positions would launch thousands of tiny kernels for one long prompt.
    """
    pos = items[0].shape[1]
    size = math.isqrt(pos - 1) + 1
    n_blocks = math.ceil(pos / size)
    # what fills the last block comes after everything, and is cut off again
    filled = (torch.cat([x, x[:, -1:].expand(-1, n_blocks * size - pos, -1)], dim=1) for x in items)
    blocks = [rearrange(x, "batch (block pos) n -> batch block pos n", pos=size) for x in filled]
    within = accumulate((tuple(x[:, :, at] for x in blocks) for at in range(size)), join)
    inner = tuple(torch.stack(prefixes, dim=2) for prefixes in zip(*within, strict=True))
    before = accumulate((tuple(x[:, at : at + 1, -1] for x in inner) for at in range(n_blocks - 1)), join, initial=start)
    heads = tuple(rearrange(torch.cat(x, dim=1), "batch block n -> batch block 1 n") for x in zip(*before, strict=True))
    return tuple(rearrange(x, "batch block pos n -> batch (block pos) n")[:, :pos] for x in join(heads, inner))


def ema(start: Tensor, z: Tensor, counted: Tensor, alpha: float) -> Tensor:
    """Moving averages e_t = alpha z_t + (1 - alpha) e_{t-1} over what counts, from e_{-1} = `start` [batch 1 n]."""
    decay = torch.where(counted, 1 - alpha, torch.ones((), dtype=z.dtype, device=z.device))
    return scan(_ema_join, (torch.zeros_like(decay[:, :1]), start), (decay, alpha * z))[1]


def _ema_join(left: Items, right: Items) -> Items:
    """Two stretches of tokens as one, each as (decay, rest): it turns an average e into decay e + rest."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def window_sums(z: Tensor, window: int) -> Tensor:
    """Sum of each `window` positions in a row. [batch pos n] -> [batch pos-window+1 n], for pos >= window.

    A window is the end of one block of `window` positions and the beginning of the next (van Herk 1992): O(pos) work, and,
    unlike a difference of two long sums, no large value that has left the window is felt.
    """
    batch, pos, n = z.shape
    if window == 1:
        return z
    n_blocks = math.ceil(pos / window)
    filled = torch.cat([z, z.new_zeros(batch, n_blocks * window - pos, n)], dim=1)
    blocks = rearrange(filled, "batch (block pos) n -> batch block pos n", pos=window)
    up_to = blocks.cumsum(dim=2).flatten(1, 2)
    # from a position to the end of its block; 0 for the first, whose window is a block
    after = blocks[:, :, 1:].flip(2).cumsum(dim=2).flip(2)
    from_on = torch.cat([torch.zeros_like(blocks[:, :, :1]), after], dim=2).flatten(1, 2)
    return from_on[:, : pos - window + 1] + up_to[:, window - 1 : pos]


def compact(z: Tensor, counted: Tensor) -> Tensor:
    """The counted scores of each row moved to its left end, in order, zeros after them. [rows pos n] -> [rows pos n]."""
    pos = z.shape[1]
    slot = torch.where(counted, counted.cumsum(dim=1) - 1, pos)  # the others share a spare slot at the end
    return z.new_zeros(len(z), pos + 1, z.shape[2]).scatter(1, slot.expand_as(z), z)[:, :pos]


def take(values: Tensor, index: Tensor) -> Tensor:
    """values [batch pos n] at the positions of index [batch new 1], as [batch new n]."""
    batch, pos, n = values.shape
    rows = torch.arange(batch, device=values.device)[:, None] * pos + index[..., 0]
    return values.reshape(batch * pos, n).index_select(0, rows.flatten()).view(batch, -1, n)


def last(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else x[:, -1:]


def start_zero(zero: Tensor) -> Items:
    return (zero,)


def step_last(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    if z.shape[1] == 1:
        last = torch.where(counted, z, state[0])
        return last, (last,)
    place = torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
    latest = torch.where(counted, place, 0).cummax(dim=1).values  # 0 = the state, put before the chunk
    last = take(torch.cat([state[0], z], dim=1), latest)
    return last, (last[:, -1:],)


def step_first(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    is_first = counted & (seen == 1)
    if z.shape[1] == 1:
        first = torch.where(is_first, z, state[0])
        return first, (first,)
    first = state[0] + torch.where(is_first, z, 0.0).sum(dim=1, keepdim=True)
    return first.expand_as(z), (first,)


def step_mean(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    sums = state[0] + (z if z.shape[1] == 1 else z.cumsum(dim=1))
    return sums / seen, (last(sums),)


def start_max(zero: Tensor) -> Items:
    return (torch.full_like(zero, -torch.inf),)


def step_max(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    if z.shape[1] == 1:
        best = torch.maximum(state[0], torch.where(counted, z, state[0]))
        return best, (best,)
    best = torch.maximum(state[0], torch.where(counted, z, -torch.inf).cummax(dim=1).values)
    return best, (best[:, -1:],)


def start_min(zero: Tensor) -> Items:
    return (torch.full_like(zero, torch.inf),)


def step_min(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    if z.shape[1] == 1:
        least = torch.minimum(state[0], torch.where(counted, z, state[0]))
        return least, (least,)
    least = torch.minimum(state[0], torch.where(counted, z, torch.inf).cummin(dim=1).values)
    return least, (least[:, -1:],)


def start_ema_max(zero: Tensor, alpha: float) -> Items:
    return zero, torch.full_like(zero, -torch.inf)  # moving average, and the best one


def step_ema_max(state: Items, z: Tensor, counted: Tensor, seen: Tensor, alpha: float) -> tuple[Tensor, Items]:
    average, is_first = state[0], counted & (seen == 1)
    if z.shape[1] == 1:
        moved = torch.where(is_first, z, torch.lerp(average, z, alpha))
        average = torch.where(counted, moved, average)
    else:
        # to start from e_{-1} = z_0 is to start from e_0 = z_0
        first = torch.where(is_first, z, 0.0).sum(dim=1, keepdim=True)
        average = ema(torch.where(before_chunk(counted, seen) > 0, average, first), z, counted, alpha)
    running, best = step_max(state[1:], average, counted, seen)
    return running, (last(average), *best)


def before_chunk(counted: Tensor, seen: Tensor) -> Tensor:
    """How many positions had counted before the chunk, [batch 1 1]."""
    return seen[:, :1] - counted[:, :1].long()


def start_rolling_max(zero: Tensor, window: int) -> Items:
    # The last logits as a ring, the k-th in slot k mod window, and a spare slot for what does not count; the running score.
    return zero.new_zeros(len(zero), window + 1, zero.shape[2]), zero


def step_rolling_max(state: Items, z: Tensor, counted: Tensor, seen: Tensor, window: int) -> tuple[Tensor, Items]:
    if z.shape[1] > 1:
        return _roll_chunk(state, z, counted, seen, window)
    ring, running = state
    if ring.is_inference() and not torch.is_inference_mode_enabled():
        ring = ring.clone()  # one that was made in inference mode may not be written to outside of it
    slot = torch.where(counted, seen % window, window)
    ring.scatter_(1, slot.expand_as(z), z)
    # the plain sum: one kept up by differences would feel a large value long after it has left
    mean = ring[:, :window].sum(dim=1, keepdim=True) / seen.clamp(max=window)
    running = torch.where(seen > window, torch.maximum(running, mean), mean)
    return running, (ring, running)


def _roll_chunk(state: Items, z: Tensor, counted: Tensor, seen: Tensor, window: int) -> tuple[Tensor, Items]:
    ring, running = state
    before, total = before_chunk(counted, seen), seen[:, -1:]
    kept = take(ring, (before + torch.arange(1, window + 1, device=z.device)[:, None]) % window)  # the oldest first
    recent = torch.cat([kept, compact(z, counted)], dim=1)
    count = before + torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
    # the k-th window ends at the k-th counted logit of this chunk
    means = window_sums(recent[:, 1:], window) / count.clamp(max=window)
    full = count >= window
    best, _ = step_max((torch.where(before >= window, running, -torch.inf),), means, full, seen)
    by_count = torch.cat([running, torch.where(full, best, means)], dim=1)
    after = take(by_count, seen - before)  # 0 counted so far in this chunk = the state, put before it
    slots = torch.arange(window + 1, device=z.device)[:, None]
    newest = total - (total - slots) % window  # which counted logit stands in a slot now
    return after, (take(recent, newest - before + window - 1), after[:, -1:])
