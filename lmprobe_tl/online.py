"""Online twins of the reductions: running scores while tokens arrive, in O(1) or O(window) state a row.

A twin is two pure functions. Its start makes the state of a row that has seen nothing. Its step takes a state and a chunk of
at least one position, and returns the running score after each position with the next state.

    zero     [batch 1 n]     zeros on the right device; n = probes, or whatever else is scored side by side
    z        [batch pos n]   scores, 0 where not counted
    counted  [batch pos 1]   bool
    seen     [batch pos 1]   how many positions of the row have counted so far, earlier chunks included
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import InputError

Items = tuple[Tensor, ...]


class OnlineReduction:
    """The running score of every row and probe; all state stays on the device, and nothing waits for it.

    start, step: a twin as the top of this file describes it; arguments: the reduction's parameter, if it has one.
    """

    def __init__(
        self,
        start: Callable[..., Items],
        step: Callable[..., tuple[Tensor, Items]],
        arguments: tuple[float, ...],
        n_rows: int,
        n_probes: int,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        self._zero = torch.zeros(n_rows, 1, n_probes, dtype=wide_dtype(device), device=device)
        self._seen = torch.zeros(n_rows, 1, 1, dtype=torch.int64, device=device)
        self._state = start(self._zero, *arguments)
        self._step, self._arguments = step, arguments

    @torch.no_grad()  # a graph kept in the state would grow with every token
    def update(self, scores: Tensor, counted: Tensor) -> Tensor:
        """Take the next positions, any number of them, and return the running score after each.

        scores: [batch new n_probes]; counted: [batch new] bool, False = as if the position were not there.
        Returns [batch new n_probes] float32: what the batch form gives for the row so far. An uncounted position repeats the
        value before it; NaN where nothing has counted yet.
        Raises InputError for a wrong shape or dtype.
        """
        self._check(scores, counted)
        if scores.shape[1] == 0:
            return scores.to(torch.float32)
        counts = rearrange(counted, "batch new -> batch new 1")
        z = torch.where(counts, scores.to(self._zero.dtype), 0.0)
        seen = self._seen + counts.cumsum(dim=1)
        running, self._state = self._step(self._state, z, counts, seen, *self._arguments)
        self._seen = seen[:, -1:]
        return torch.where(seen > 0, running, torch.nan).to(torch.float32)

    def _check(self, scores: Tensor, counted: Tensor) -> None:
        rows, _, probes = self._zero.shape
        if scores.ndim != 3 or (scores.shape[0], scores.shape[2]) != (rows, probes) or not scores.is_floating_point():
            raise InputError(
                f"scores must be floats [batch new n_probes] with batch={rows} and n_probes={probes}, "
                f"got {scores.dtype} with shape {list(scores.shape)}."
            )
        if counted.dtype != torch.bool or counted.shape != scores.shape[:2]:
            raise InputError(
                f"counted must be bool [batch new] = {list(scores.shape[:2])}, "
                f"got {counted.dtype} with shape {list(counted.shape)}."
            )


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, in which reductions are computed, or float32 on MPS, which has no float64.

    A float32 sum grown token by token is wrong in the fourth digit after 100,000 tokens, and a float32 moving average
    settles beside its level, by up to 6e-8 / alpha of it. Scores are few: the width costs nothing.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def scan(join: Callable[[Items, Items], Items], start: Items, items: Items) -> Items:
    """Each prefix of `items` along pos (at least one), joined after `start`: log2(pos) steps (Hillis and Steele 1986).

    A loop over positions would launch thousands of tiny kernels for one long prompt. `join` must be associative.
    """
    head = join(start, tuple(x[:, :1] for x in items))
    items = tuple(torch.cat([h, x[:, 1:]], dim=1) for h, x in zip(head, items, strict=True))
    offset = 1
    while offset < items[0].shape[1]:
        joined = join(tuple(x[:, :-offset] for x in items), tuple(x[:, offset:] for x in items))
        items = tuple(torch.cat([x[:, :offset], j], dim=1) for x, j in zip(items, joined, strict=True))
        offset *= 2
    return items


def ema_items(z: Tensor, counted: Tensor, alpha: float) -> Items:
    """A stretch of tokens as (first logit, decay, rest, anything counted): it turns an average e into decay e + rest."""
    decay = torch.where(counted, torch.full_like(z, 1 - alpha), 1.0)
    return z, decay, alpha * z, counted.expand_as(z)


def ema_join(left: Items, right: Items) -> Items:
    first = torch.where(left[3], left[0], right[0])
    return first, left[1] * right[1], right[1] * left[2] + right[2], left[3] | right[3]


def ema_read(items: Items) -> Tensor:
    first, decay, rest, _ = items
    return decay * first + rest  # to start from e_{-1} = z_0 is to start from e_0 = z_0


def compact(z: Tensor, counted: Tensor) -> Tensor:
    """The counted scores of each row moved to its left end, in order, zeros after them. [rows pos n] -> [rows pos n]."""
    pos = z.shape[1]
    slot = torch.where(counted, counted.cumsum(dim=1) - 1, pos)  # the others share a spare slot at the end
    return z.new_zeros(len(z), pos + 1, z.shape[2]).scatter(1, slot.expand_as(z), z)[:, :pos]


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [batch pos n] at the positions of index [batch new 1]."""
    return values.gather(1, index.expand(-1, -1, values.shape[2]))


def start_zero(zero: Tensor) -> Items:
    return (zero,)


def step_last(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    place = torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
    latest = torch.where(counted, place, 0).cummax(dim=1).values  # 0 = the state, put before the chunk
    last = _take(torch.cat([state[0], z], dim=1), latest)
    return last, (last[:, -1:],)


def step_first(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    first = state[0] + torch.where(counted & (seen == 1), z, 0.0).sum(dim=1, keepdim=True)
    return first.expand_as(z), (first,)


def step_mean(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    sums = state[0] + z.cumsum(dim=1)
    return sums / seen, (sums[:, -1:],)


def start_max(zero: Tensor) -> Items:
    return (zero - torch.inf,)


def step_max(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    best = torch.maximum(state[0], torch.where(counted, z, -torch.inf).cummax(dim=1).values)
    return best, (best[:, -1:],)


def step_min(state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
    negated, state = step_max(state, -z, counted, seen)
    return -negated, state


def start_ema_max(zero: Tensor, alpha: float) -> Items:
    return zero - torch.inf, *ema_items(zero, torch.zeros_like(zero, dtype=torch.bool), alpha)


def step_ema_max(state: Items, z: Tensor, counted: Tensor, seen: Tensor, alpha: float) -> tuple[Tensor, Items]:
    items = scan(ema_join, state[1:], ema_items(z, counted, alpha))
    running, best = step_max(state[:1], ema_read(items), counted, seen)
    return running, (*best, *(x[:, -1:] for x in items))


def start_rolling_max(zero: Tensor, window: int) -> Items:
    return zero.expand(-1, window - 1, -1), zero - torch.inf, zero  # last logits, best full window, running score


def step_rolling_max(state: Items, z: Tensor, counted: Tensor, seen: Tensor, window: int) -> tuple[Tensor, Items]:
    recent = torch.cat([state[0], compact(z, counted)], dim=1)
    sums = recent.unfold(1, window, 1).sum(dim=-1)  # [batch pos n], the k-th window ends at the k-th counted logit
    before = seen[:, :1] - counted[:, :1].long()
    count = before + torch.arange(1, z.shape[1] + 1, device=z.device)[:, None]
    best, _ = step_max(state[1:2], sums / window, count >= window, seen)
    running = torch.where(count >= window, best, sums / count)
    arrived = seen - before  # counted logits of this chunk up to each position; 0 = the state, put before the chunk
    last = arrived[:, -1:]
    after = _take(torch.cat([state[2], running], dim=1), arrived)
    kept = _take(recent, last + torch.arange(window - 1, device=z.device)[:, None])
    return after, (kept, _take(torch.cat([state[1], best], dim=1), last), after[:, -1:])


def start_softmax(zero: Tensor, temperature: float) -> Items:
    return zero - torch.inf, zero, zero


def step_softmax(state: Items, z: Tensor, counted: Tensor, seen: Tensor, temperature: float) -> tuple[Tensor, Items]:
    top = torch.where(counted, z / temperature, -torch.inf)
    items = scan(_softmax_join, state, (top, counted.to(z.dtype).expand_as(z), z))
    return items[2] / items[1], tuple(x[:, -1:] for x in items)


def _softmax_join(left: Items, right: Items) -> Items:
    """Two stretches of tokens as one, each as (top = max z/t, sum of e^(z/t - top), sum of e^(z/t - top) z)."""
    top = torch.maximum(left[0], right[0])
    base = torch.where(top == -torch.inf, 0.0, top)  # -inf - -inf would be NaN where nothing has counted yet
    scale_left, scale_right = (left[0] - base).exp(), (right[0] - base).exp()
    return top, left[1] * scale_left + right[1] * scale_right, left[2] * scale_left + right[2] * scale_right
