"""Which run a forward pass goes on with: passes of several generations, caches and threads kept apart."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lmprobe_tl.errors import MonitorError
from lmprobe_tl.hook_points import ForwardCall, cache_mark
from lmprobe_tl.live.run import LiveRun


@dataclass
class ThreadState:
    """Forward passes of one thread: the run that they belong to, the pass on its way, and its partial logits so far."""

    run: LiveRun | None = None
    call: ForwardCall | None = None
    partials: dict[str, Tensor] = field(default_factory=dict)
    is_telling: bool = False  # a callback is at work, and what it has the model do is not scored

    def end_call(self) -> None:
        self.call, self.partials = None, {}


class _Callbacks(threading.local):
    depth = 0


_callbacks = _Callbacks()


@contextmanager
def inside_callback() -> Iterator[None]:
    """A user's callback is at work in this thread: the forward passes that it makes are no part of the one it is told of."""
    _callbacks.depth += 1
    try:
        yield
    finally:
        _callbacks.depth -= 1


def in_callback() -> bool:
    """Whether a forward pass of this thread was made by a callback of attached probes."""
    return _callbacks.depth > 0


class LivePasses:
    """Runs in the order in which they began. A run is known by the KV cache that its tokens are in; without one it is the
    last of its thread.

    new_run: makes a run, given its index.
    """

    def __init__(self, new_run: Callable[[int], LiveRun]) -> None:
        self.runs: list[LiveRun] = []
        self._new_run = new_run
        self._n_begun = 0  # more than there are runs, where some were let go
        self._threads: dict[int, ThreadState] = {}
        self._lock = threading.Lock()
        self._by_cache: dict[int, tuple[weakref.ref[Any], LiveRun]] = {}

    @property
    def thread(self) -> ThreadState:
        """The state of the thread that asks."""
        return self._threads.setdefault(threading.get_ident(), ThreadState())

    @property
    def unfinished(self) -> bool:
        """Whether some thread's last forward pass has not reached all hook points."""
        return any(state.call is not None for state in list(self._threads.values()))

    def abandon(self) -> None:
        """An exception ended what was on its way: let go of its caches, and of what was seen of a pass by halves."""
        for state in list(self._threads.values()):
            state.end_call()

    def begin_run(self) -> LiveRun:
        with self._lock:
            run = self._new_run(self._n_begun)
            self._n_begun += 1
            self.runs.append(run)
        self.thread.run = run
        return run

    def run_of(self, call: ForwardCall) -> LiveRun:
        """The run that a forward pass goes on with, or a new one; MonitorError where its first columns were never scored."""
        run = self._of_cache(call.cache) if call.start else None
        current = self.thread.run
        if run is None and call.start and current is not None and current.cache is None:
            run = current  # this model does not tell of its cache
        if run is None and call.start:
            raise MonitorError(
                f"columns 0 to {call.start - 1} were never scored: the model was called with a cache of {call.start} tokens "
                "that no pass in this block has filled. Attach the probes before the prompt is processed, and process it "
                "again for each continuation: a copy of a cache is not known."
            )
        if run is None:
            # Who has a cache begins anew at column 0, also where the tokens are those of the last generation and one more.
            with_cache = call.cache is not None or (current is not None and current.is_cached)
            extends = current is not None and (not current.n_columns or (not with_cache and current.extends(call)))
            run = current if current is not None and extends else self.begin_run()
        run.new_columns(call)  # raises where columns are left out
        run.is_cached |= call.start > 0
        self.bind_cache(run, call.cache)
        self._note_moved_rows(run, call)
        self.thread.run = run
        return run

    def _of_cache(self, cache: Any) -> LiveRun | None:
        reference, run = self._by_cache.get(id(cache), (None, None))
        return run if reference is not None and reference() is cache else None

    def bind_cache(self, run: LiveRun, cache: Any) -> None:
        """Remember that this cache holds the run's tokens."""
        if cache is None or (run.cache is not None and run.cache() is cache):
            return
        try:
            run.cache = weakref.ref(cache)  # a strong one would keep its memory
        except TypeError:  # a tuple, for instance
            return
        with self._lock:
            # Another cache that this run had is of a prompt that was interrupted.
            alive = {key: pair for key, pair in self._by_cache.items() if pair[0]() is not None and pair[1] is not run}
            self._by_cache = alive | {id(cache): (run.cache, run)}

    def _note_moved_rows(self, run: LiveRun, call: ForwardCall) -> None:
        """Let the run know if rows moved inside its cache since the last pass, as in a beam search of the user's own."""
        newest = cache_mark(call.cache, call.start) if call.start else None
        if newest is not None and run.mark is not None:
            column, key = run.mark
            before = cache_mark(call.cache, call.start, 1 + call.start - column)
            if before is not None and before.shape == key.shape:
                run.note_moved_rows(((before != key) & ~key.isnan()).any(dim=-1))  # NaN differs from itself
        run.mark = None if newest is None else (call.start, newest.clone())
