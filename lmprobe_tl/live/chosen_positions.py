"""Which positions of a forward pass are to be changed: tokens of the prompt or generated ones, never pads."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError, MonitorError
from lmprobe_tl.forward_watch import prefill_in_progress
from lmprobe_tl.hook_points import ForwardCall, search_in_progress
from lmprobe_tl.live.rows import check_padding, is_one_of, row_ends
from lmprobe_tl.tokens import bos_id, without_bos

Positions: TypeAlias = Literal["all", "prompt", "generated"]


@dataclass(frozen=True)
class PassPositions:
    """Of one forward pass, each [batch new] bool. chosen: to be changed. counted: of these, the ones that a report counts,
    each position of a generation once and none after a row's end."""

    chosen: Tensor
    counted: Tensor


@dataclass
class _Generation:
    """What is known of a batch that grows to the right. tokens: its columns, where no cache holds them."""

    n_columns: int
    prompt_columns: int
    over: Tensor  # [batch 1] bool: the row has ended
    tokens: Tensor | None = None
    cache: weakref.ref[Any] | None = None
    is_cached: bool = False


class ChosenPositions:
    """Tells tokens of the prompt from generated ones, by the same rules as a Monitor.

    A forward pass without a cache is a prompt, unless it repeats the tokens of the last one and adds a single column: then
    that column is generated. A pass that goes on from a cache is generated where it has one column (and Transformers is not
    at work on a prompt), else a further piece of prompt.
    """

    def __init__(self, model: Any, positions: Positions, *, include_bos: bool) -> None:
        if positions not in get_args(Positions):
            raise InputError(f"positions is {positions!r}; expected 'all', 'prompt' or 'generated'.")
        self._positions = positions
        self._bos = None if include_bos else bos_id(model)
        self._pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
        self._ends = row_ends(model)
        self._current = threading.local()
        self._by_cache: dict[int, _Generation] = {}
        self._lock = threading.Lock()

    def of(self, call: ForwardCall) -> PassPositions:
        """The positions of a forward pass; MonitorError where tokens cannot be told from others."""
        generation, n_new = self._generation_of(call), call.tokens.shape[1]
        seen = generation.n_columns - call.start
        if call.start:
            first_generated = 0 if self._is_generated(generation, n_new) else n_new
        else:
            first_generated = generation.prompt_columns if seen else n_new
        columns = torch.arange(n_new, device=call.tokens.device)
        counts = self._counting(call)
        if self._positions != "all":
            counts = counts & ((columns >= first_generated) == (self._positions == "generated"))
        if first_generated == n_new:
            generation.prompt_columns = call.start + n_new
            generation.over = torch.zeros_like(generation.over)
        else:
            newest = call.tokens[:, -1:]
            # A row that went on after an EOS has not ended after all.
            generation.over = is_one_of(newest, self._ends.end_ids) | (
                generation.over & is_one_of(newest, self._ends.filler_ids)
            )
        generation.n_columns = call.start + n_new
        generation.tokens = None if call.start else call.tokens.clone()
        return PassPositions(counts, counts & (columns >= seen) & ~generation.over)

    def _is_generated(self, generation: _Generation, n_new: int) -> bool:
        at_prompt = generation.n_columns == generation.prompt_columns
        return n_new == 1 and not (at_prompt and prefill_in_progress())

    def _counting(self, call: ForwardCall) -> Tensor:
        """[batch new] bool: tokens, neither pads nor a BOS with which the row begins, unless it is included."""
        if call.attention_mask is None:
            real = torch.ones_like(call.tokens, dtype=torch.bool)
            return real if call.start else without_bos(call.tokens, real, self._bos)
        mask = call.attention_mask.to(call.tokens.device).bool()
        begun, real = mask[:, : call.start].any(dim=1, keepdim=True), mask[:, call.start :]
        return torch.where(begun, real, without_bos(call.tokens, real, self._bos))

    def _generation_of(self, call: ForwardCall) -> _Generation:
        current: _Generation | None = getattr(self._current, "generation", None)
        found = self._of_cache(call.cache) if call.start else None
        if found is None and call.start and current is not None and current.cache is None:
            found = current  # this model does not tell of its cache
        if found is None and not call.start and current is not None and _extends(current, call):
            found = current
        if found is None or len(found.over) != len(call.tokens):
            self._check_new(call)
            over = torch.zeros(len(call.tokens), 1, dtype=torch.bool, device=call.tokens.device)
            found = _Generation(call.start, call.start, over)
        if call.start:
            found.is_cached, found.n_columns = True, call.start
        self._current.generation = found
        self.bind_cache(call.cache)
        return found

    def _check_new(self, call: ForwardCall) -> None:
        search = search_in_progress()
        if search is not None:
            raise MonitorError(
                f"{search} reorders rows, takes tokens back or adds a text of its own, so generated positions cannot be "
                "told from others. Generate by sampling or greedily while a direction is steered or ablated."
            )
        check_padding(call, self._pad)

    def _of_cache(self, cache: Any) -> _Generation | None:
        found = self._by_cache.get(id(cache))
        return found if found is not None and found.cache is not None and found.cache() is cache else None

    def bind_cache(self, cache: Any) -> None:
        """Remember that this cache holds the tokens of this thread's last forward pass."""
        generation: _Generation | None = getattr(self._current, "generation", None)
        if cache is None or generation is None or (generation.cache is not None and generation.cache() is cache):
            return
        try:
            generation.cache = weakref.ref(cache)  # a strong one would keep its memory
        except TypeError:  # a tuple, for instance
            return
        with self._lock:
            alive = {key: one for key, one in self._by_cache.items() if one.cache is not None and one.cache() is not None}
            self._by_cache = alive | {id(cache): generation}


def _extends(generation: _Generation, call: ForwardCall) -> bool:
    """Whether a pass from column 0 on repeats these tokens and adds one, as generation without a cache does."""
    before = generation.tokens
    if before is None or generation.is_cached or call.cache is not None or bool(generation.over.all()):
        return False
    n_columns = before.shape[1]
    return call.tokens.shape == (len(before), n_columns + 1) and torch.equal(call.tokens[:, :n_columns], before)
