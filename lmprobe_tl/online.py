"""Online twins of the reductions: running scores while tokens arrive, in O(1) or O(window) state a row.

A twin is two functions. Its start makes the state of a row that has seen nothing, a tuple of tensors. Its step takes a state
and a chunk of at least one position, and returns the running score after each position, [batch pos n], with the next state.

    zero     [batch 1 n]     zeros on the right device, float64; n = probes, or whatever else is scored side by side
    z        [batch pos n]   scores, 0 where not counted
    counted  [batch pos 1]   bool
    seen     [batch pos 1]   how many positions of the row have counted so far, this one and earlier chunks included

What a step returns where nothing has counted yet is never looked at; an uncounted position repeats the value before it. A
step writes into nothing that it is given, its state aside. One position is the case that must be quick: while a model
generates, it is every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.precision import wide_dtype

Items = tuple[Tensor, ...]

# Scores that are worked on at once: a long prompt is cut into blocks, which bounds the memory and is quicker, too.
BLOCK_SCORES = 2**18


class OnlineReduction:
    """The running score of every row and probe; all state stays on the device, and nothing waits for it.

    start, step: a twin as the top of this file describes it; arguments: the reduction's parameter, if it has one.
    dtype: of `zero`, and the least width of `z`; the default is `wide_dtype`. n_scores: how many running scores a step makes
    of the n_probes that it is given, where that is another number.
    """

    def __init__(
        self,
        start: Callable[..., Items],
        step: Callable[..., tuple[Tensor, Items]],
        arguments: tuple[float, ...],
        n_rows: int,
        n_probes: int,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        n_scores: int | None = None,
    ) -> None:
        device = torch.device(device)
        self._n_rows, self._n_probes, self._n_scores = n_rows, n_probes, n_probes if n_scores is None else n_scores
        with torch.inference_mode(False):  # made in inference mode, the state could not be written to outside of it
            self._dtype, self._start = dtype or wide_dtype(device), start
            # with axes, so that scores next to it are widened to its dtype
            self._nothing = torch.zeros(1, 1, 1, dtype=self._dtype, device=device)
            self._nan = torch.full((), torch.nan, dtype=torch.float32, device=device)
            self._seen = torch.zeros(n_rows, 1, 1, dtype=torch.int64, device=device)
            self._step, self._arguments = step, arguments
            self._state = self._fresh(n_rows)
        # A step that turns a window round costs as much as the window is long, so a block is no shorter.
        state_length = self.state_bytes // self._nothing.element_size()
        self._block = max(BLOCK_SCORES // max(1, n_rows * n_probes), state_length, 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of memory that the state takes for one row and probe; a row has 8 more, which all its probes share."""
        taken = sum(part.untyped_storage().nbytes() for part in self._state)
        return math.ceil(taken / max(1, self._n_rows * self._n_probes))

    def update(self, scores: Tensor, counted: Tensor) -> Tensor:
        """Take the next positions, any number of them, and return the running score after each.

        scores: [batch new n_probes]; counted: [batch new] bool, False = as if the position were not there.
        Returns [batch new n_scores] float32: what the batch form gives for the row so far. An uncounted position repeats the
        value before it; NaN where nothing has counted yet.
        Raises InputError for a wrong shape or dtype.
        """
        self._check(scores, counted, self._n_rows)
        if scores.requires_grad:
            scores = scores.detach()  # a graph kept in the state would grow with every token
        return self._update(scores, counted.unsqueeze(2))

    def update_rows(self, rows: Tensor, scores: Tensor, counted: Tensor) -> Tensor:
        """`update` of some rows, all different, while the others wait: rows [batch] int64, the rest as there."""
        self._check(scores, counted, len(rows))
        every = self._seen, self._state
        self._seen, self._state = self._seen[rows], tuple(part[rows] for part in self._state)
        try:
            running = self._update(scores.detach(), counted.unsqueeze(2))
            seen, state = self._seen, self._state
        finally:
            self._seen, self._state = every
        self._seen[rows] = seen
        for part, new in zip(self._state, state, strict=True):
            part[rows] = new
        return running

    def reset_rows(self, rows: Tensor) -> None:
        """Let these rows [batch] int64 begin anew, as if they had seen nothing."""
        self._seen[rows] = 0
        for part, fresh in zip(self._state, self._fresh(len(rows)), strict=True):
            part[rows] = fresh

    def grow(self, n_rows: int) -> None:
        """Have `n_rows` rows in all; those that are there keep their state."""
        more = n_rows - self._n_rows
        with torch.inference_mode(False):  # as at first: rows are written into outside of it, too
            self._seen = torch.cat([self._seen, self._seen.new_zeros(more, 1, 1)])
            self._state = tuple(torch.cat(parts) for parts in zip(self._state, self._fresh(more), strict=True))
        self._n_rows = n_rows

    def _update(self, scores: Tensor, counts: Tensor) -> Tensor:
        new = scores.shape[1]
        if new == 1:
            return self._advance(scores, counts, self._seen + counts)
        running = torch.empty(len(scores), new, self._n_scores, dtype=torch.float32, device=scores.device)
        for begin in range(0, new, self._block):
            block = slice(begin, begin + self._block)
            running[:, block] = self._advance(
                scores[:, block], counts[:, block], self._seen + counts[:, block].cumsum(dim=1)
            )
            # copies, since a view of the last position would keep the memory of the whole block
            self._seen, self._state = self._seen.clone(), tuple(part.clone() for part in self._state)
        return running

    def _fresh(self, n_rows: int) -> Items:
        """The state of rows that have seen nothing."""
        zero = torch.zeros(n_rows, 1, self._n_probes, dtype=self._dtype, device=self._nothing.device)
        # copies, since a start may hand out one tensor twice, and rows are written into one by one
        return tuple(part.clone() for part in self._start(zero, *self._arguments))

    def _advance(self, scores: Tensor, counts: Tensor, seen: Tensor) -> Tensor:
        z = torch.where(counts, scores, self._nothing)
        running, self._state = self._step(self._state, z, counts, seen, *self._arguments)
        self._seen = seen if seen.shape[1] == 1 else seen[:, -1:]
        # .float() even where it changes nothing costs a tenth of a step
        narrow = running if running.dtype == torch.float32 else running.float()
        return torch.where(seen > 0, narrow, self._nan)

    def _check(self, scores: Tensor, counted: Tensor, rows: int) -> None:
        probes, shape = self._n_probes, scores.shape
        if len(shape) != 3 or shape[0] != rows or shape[2] != probes or not scores.is_floating_point():
            raise InputError(
                f"scores must be floats [batch new n_probes] with batch={rows} and n_probes={probes}, "
                f"got {scores.dtype} with shape {list(shape)}."
            )
        if counted.dtype != torch.bool or counted.shape != shape[:2]:
            raise InputError(
                f"counted must be bool [batch new] = {list(shape[:2])}, "
                f"got {counted.dtype} with shape {list(counted.shape)}."
            )
