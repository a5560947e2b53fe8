"""Heads: from the numbers that a probe reads off each token to its logit, and for some kinds off all tokens to one logit.

Every kind of probe reads some numbers off a token linearly, `readings = direction @ x + intercept`, and its head does the
rest. One token:

    linear              z = the reading
    mlp                 z = readout . relu(readings) + readout_intercept
    polynomial          z = sum_i readout_i reading_i^order_i + readout_intercept, with orders 1, 2, ..., 2, 3, ...
                        (truncated polynomial in symmetric CP form: Oldfield et al. 2025, arXiv:2509.26238)

A sequence at once, h over heads, each of which reads a value v and, but for multimax, a query q:

    attention           z = sum_h sum_t softmax_t(q_ht) v_ht
    multimax            z = sum_h max_t v_ht                                  (Kramár et al. 2026, arXiv:2601.11516)
    rolling_attention   max over full windows of the attention logit of the window's tokens alone (the same);
                        a sequence shorter than the window: the attention logit of what is there

The logit of one token is what a sequence head gives for that token alone, the sum of its values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl import softmax_twins, twins
from lmprobe_tl.online import Items
from lmprobe_tl.precision import saturated, wide_dtype, without_autocast

HeadKind: TypeAlias = Literal["linear", "mlp", "polynomial", "attention", "multimax", "rolling_attention"]
SEQUENCE_KINDS: tuple[HeadKind, ...] = ("attention", "multimax", "rolling_attention")


@dataclass(frozen=True)
class LinearHead:
    """The readings of each token are its logits. Probes of equal heads may stand side by side."""

    n_outputs: int

    @property
    def n_readings(self) -> int:
        return self.n_outputs

    def token_logits(self, readings: Tensor) -> Tensor:
        return readings


@dataclass(frozen=True, eq=False)
class ReadoutHead:
    """A head with weights of its own, equal to itself alone: readout [n_outputs n_readings], readout_intercept [n_outputs].

    orders: [n_readings] int, the power of each reading in a polynomial; None for an mlp, which takes relu.
    """

    n_outputs: int
    readout: Tensor
    readout_intercept: Tensor
    orders: Tensor | None = None
    _moved: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_readings(self) -> int:
        return self.readout.shape[1]

    def token_logits(self, readings: Tensor) -> Tensor:
        """readings [... n_readings] -> logits [... n_outputs], in the dtype of the readings and no larger than it can hold;
        NaN where a reading is not finite."""
        readout, intercept, orders = self._on(readings.device)
        wide = readings.to(readout.dtype)  # powers grow
        terms = wide.relu() if orders is None else wide.pow(orders)
        terms = torch.where(wide.isfinite(), terms, torch.nan)  # relu would make 0 of -inf
        with without_autocast(readings.device):
            return saturated(torch.nn.functional.linear(terms, readout, intercept), readings.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        if device not in self._moved:
            with torch.inference_mode(False):
                orders, dtype = None if self.orders is None else self.orders.to(device), wide_dtype(device)
                readout, intercept = self.readout.to(device).to(dtype), self.readout_intercept.to(device).to(dtype)
                self._moved[device] = readout, intercept, orders
        return self._moved[device]


@dataclass(frozen=True)
class SequenceHead:
    """A head of `n_heads` that reduces the readings of all tokens itself. Probes of equal heads may stand side by side.

    readings: [batch pos (probe part head)], the parts being queries and values, or values alone for 'multimax'.
    window: of 'rolling_attention', in tokens that count.
    """

    kind: HeadKind
    n_heads: int
    window: int | None = None

    @property
    def n_outputs(self) -> int:
        return 1

    @property
    def n_parts(self) -> int:
        return 1 if self.kind == "multimax" else 2

    @property
    def n_readings(self) -> int:
        return self.n_parts * self.n_heads

    def token_logits(self, readings: Tensor) -> Tensor:
        """readings [... n] -> [... n_probes]: the logit of each token alone, NaN where one of its queries is not finite."""
        *queries, values = self._parts(readings)
        for query in queries:
            values = torch.where(query.isfinite(), values, torch.nan)
        return self._summed(values)

    def batch(self, readings: Tensor, counted: Tensor) -> Tensor:
        """The logit of each row [batch n_probes] from all its tokens: readings [batch pos n], 0 where not counted; counted
        [batch pos 1] bool, something in every row."""
        *queries, values = self._parts(readings)
        if self.kind == "multimax":
            return self._summed(torch.where(counted, values, -torch.inf).amax(dim=1))
        (query,) = queries
        if self.window is None or self.window >= readings.shape[1]:
            return self._summed(_attended(query, values, counted))
        means = softmax_twins.windowed_softmax(twins.compact(query, counted), twins.compact(values, counted), self.window)
        n_counted = counted.sum(dim=1, keepdim=True)
        full = torch.arange(self.window, readings.shape[1] + 1, device=readings.device)[:, None] <= n_counted
        best = torch.where(full, self._summed(means), -torch.inf).amax(dim=1)
        return torch.where(n_counted[:, 0] >= self.window, best, self._summed(_attended(query, values, counted)))

    def start(self, zero: Tensor) -> Items:
        """The state of rows that have seen nothing; see online.py."""
        values = self._parts(zero)[-1]
        if self.kind == "multimax":
            return twins.start_max(values)
        if self.window is None:
            return softmax_twins.start_softmax(values)
        return softmax_twins.start_rolling_softmax(values, self.window, self._summed(values))

    def step(self, state: Items, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, Items]:
        """The running logits [batch pos n_probes] and the next state; see online.py."""
        *queries, values = self._parts(z)
        if self.kind == "multimax":
            best, state = twins.step_max(state, values, counted, seen)
            return self._summed(best), state
        if self.window is None:
            mean, state = softmax_twins.step_attention(state, queries[0], values, counted)
            return self._summed(mean), state
        return softmax_twins.step_rolling_softmax(state, queries[0], values, counted, seen, self.window, self._summed)

    def _parts(self, readings: Tensor) -> tuple[Tensor, ...]:
        """Each part as [... n_probes*n_heads]."""
        if self.n_parts == 1:
            return (readings,)
        parts = rearrange(readings, "... (probe part head) -> part ... (probe head)", part=2, head=self.n_heads)
        return tuple(parts.unbind(0))

    def _summed(self, by_head: Tensor) -> Tensor:
        return rearrange(by_head, "... (probe head) -> ... probe head", head=self.n_heads).sum(dim=-1)


Head: TypeAlias = LinearHead | ReadoutHead | SequenceHead


def polynomial_orders(degree: int, rank: int) -> Tensor:
    """The power of each reading of a polynomial: one of order 1, then `rank` of each order up to `degree`."""
    orders = [1] + [order for order in range(2, degree + 1) for _ in range(rank)]
    return torch.tensor(orders, dtype=torch.int64)


def _attended(query: Tensor, values: Tensor, counted: Tensor) -> Tensor:
    weights = torch.where(counted, query, -torch.inf).softmax(dim=1)
    return (weights * values).sum(dim=1)
