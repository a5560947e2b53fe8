"""A worker's probes at work: rows of a forward pass to requests and positions, their scores, running scores and alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lmprobe_tl.errors import EngineError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm.pages import Pages
from lmprobe_tl.vllm.running import Crossing, RunningScores
from lmprobe_tl.vllm.slots import SlotCache
from lmprobe_tl.vllm.steps import CacheLayout, NewRequest, ReturningRequest, Step

WANTS_SCORES, WANTS_STOP = "probe_scores", "probe_stop"  # keys of a request's extra_args, each true or false


@dataclass
class OpenRequest:
    """A request that has a row. done: positions that its running scores have taken in; seen: positions computed so far;
    cached: positions that the prefix cache serves, until their scores are copied; end_token: what ends it at an alarm;
    wants_scores: whether its client reads them; sent, told: positions and crossings that were sent to the client."""

    request_id: str
    row: int
    has_bos: bool
    end_token: int | None
    done: int = 0
    seen: int = 0
    cached: int = 0
    wants_scores: bool = False
    sent: int = 0
    told: int = 0


@dataclass(frozen=True)
class RequestScores:
    """Of one request: logits and values of the online reductions [n n_columns], position by position from `start`, NaN where
    unknown; and its crossings so far."""

    request_id: str
    start: int
    logits: np.ndarray
    values: np.ndarray
    crossings: tuple[Crossing, ...]


@dataclass
class ScoreBook:
    """The scores of all requests of an engine, from the steps that it runs.

    Fed in order: `begin_step` with what is scheduled, `end_step` with the readings of its tokens. layout: None for an engine
    whose cache does not hold every token; scores of tokens that it serves are then unknown. keep_finished: False where
    scores are read while requests run (`unsent`), so that nothing is held of those that are over.
    """

    plan: ScoringPlan
    layout: CacheLayout | None
    bos_token_id: int | None
    keep_finished: bool = True
    n_scored: int = 0
    n_unknown: int = 0
    n_alarms: int = 0
    _requests: dict[str, OpenRequest] = field(default_factory=dict)
    _finished: dict[str, RequestScores] = field(default_factory=dict)
    _ends: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.plan.n_readings
        self._pages = Pages(n + self.plan.n_columns)  # readings, then values of the online reductions
        self._running = RunningScores(self.plan)
        self._slots = None if self.layout is None else SlotCache(self.layout.n_blocks, self.layout.block_size, n)
        self._free_rows: list[int] = []
        self._n_rows = 0

    # --- steps ---

    def begin_step(self, step: Step) -> None:
        for request_id in step.finished:
            self._finish(request_id)
        self._take_new_blocks(step)
        for new in step.new:
            request = self._requests.get(new.request_id) or self._open(new)
            self._begin_anew(request, new.blocks, new.n_cached, new.n_tokens)
        for one in step.resumed:
            if one.request_id in self._requests:
                self._begin_anew(self._requests[one.request_id], one.blocks, one.n_cached, one.n_tokens)
        if self._slots is not None and self.layout is not None:
            for request_id, blocks in step.grown:
                if request_id in self._requests:
                    self._slots.add_blocks(self._requests[request_id].row, blocks[self.layout.group])

    def _take_new_blocks(self, step: Step) -> None:
        """What a block held before it was given away is nobody's score: not even where its new owner is not kept here."""
        if self._slots is None or self.layout is None:
            return
        for source, target in step.copies:
            self._slots.copy_block(source, target)
        given = [block for _, blocks in step.grown for block in blocks[self.layout.group]]
        owners: list[NewRequest | ReturningRequest] = [*step.new, *step.resumed]
        for one in owners:
            given += one.blocks[self.layout.group][-(-one.n_cached // self.layout.block_size) :]
        if given:
            self._slots.forget(given)

    def end_step(self, step: Step, order: Sequence[str], readings: np.ndarray) -> list[OpenRequest]:
        """readings: [n_tokens n_readings] of the step's tokens, request after request as in `order`. Returns the requests
        that got scores."""
        counts = np.fromiter((step.counts[name] for name in order), dtype=np.int64, count=len(order))
        if counts.sum() != len(readings):
            raise EngineError(f"a step had {len(readings)} tokens, but its requests {counts.sum()}: whose are they?")
        starts = np.fromiter((step.starts[name] for name in order), dtype=np.int64, count=len(order))
        requests = [self._requests.get(name) for name in order]
        if None in requests:  # opened before the probes were
            kept = np.array([request is not None for request in requests], dtype=bool)
            readings = readings[np.repeat(kept, counts)]
            counts, starts = counts[kept], starts[kept]
        known: list[OpenRequest] = [request for request in requests if request is not None]
        if not known:
            return []
        rows = np.fromiter((request.row for request in known), dtype=np.int64, count=len(known))
        token_rows = np.repeat(rows, counts)
        positions = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(len(readings))
        if self._slots is not None:
            self._slots.write(token_rows, positions, readings)
        self._score(known, rows, counts, starts, readings)
        return known

    def _score(
        self,
        requests: list[OpenRequest],
        rows: np.ndarray,
        counts: np.ndarray,
        starts: np.ndarray,
        readings: np.ndarray,
    ) -> None:
        done = np.fromiter((request.done for request in requests), dtype=np.int64, count=len(requests))
        ends = np.cumsum(counts)
        is_next = (counts == 1) & (starts == done)  # decoding, as nearly all do: scored together
        together, others = np.flatnonzero(is_next), np.flatnonzero(~is_next)
        if len(together):
            self._score_next(
                [requests[at] for at in together], rows[together], starts[together], readings[ends[together] - 1]
            )
        for at in others.tolist():
            self._score_one(requests[at], int(starts[at]), readings[ends[at] - counts[at] : ends[at]])
        for request, stop in zip(requests, (starts + counts).tolist(), strict=True):
            request.done = max(request.done, stop)
            request.seen = max(request.seen, stop)
            if request.end_token is not None and self._running.crossings(request.row):
                self._ends[request.request_id] = request.end_token

    def _score_next(
        self, requests: list[OpenRequest], rows: np.ndarray, positions: np.ndarray, readings: np.ndarray
    ) -> None:
        """The next token of each of some requests: rows, positions [n], readings [n n_readings]."""
        is_bos = np.zeros((len(rows), 1), dtype=bool)
        if not positions.all():
            is_bos[:, 0] = [at == 0 and request.has_bos for at, request in zip(positions, requests, strict=True)]
        values = self._running.update(rows, readings[:, None], positions[:, None], is_bos)
        self._pages.write(rows, positions, np.concatenate([readings, values[:, 0]], axis=1))
        self._count(readings)

    def _score_one(self, request: OpenRequest, start: int, readings: np.ndarray) -> None:
        """Tokens from position `start` on, after those that the prefix cache serves; what was scored before a request was
        pushed out of the cache stays as it was."""
        if request.done < start:
            missing = np.full((start - request.done, self.plan.n_readings), np.nan, dtype=np.float32)
            if self._slots is not None and request.cached >= start:
                missing = self._slots.read(request.row, request.done, start)
            readings, start = np.concatenate([missing, readings]), request.done
        readings, start = readings[max(0, request.done - start) :], max(start, request.done)
        if not len(readings):
            return
        positions = np.arange(start, start + len(readings))
        is_bos = (positions == 0) & request.has_bos
        rows = np.array([request.row])
        values = self._running.update(rows, readings[None], positions[None], is_bos[None])[0]
        self._pages.write(np.full(len(readings), request.row), positions, np.concatenate([readings, values], axis=1))
        self._count(readings)

    def _count(self, readings: np.ndarray, sign: int = 1) -> None:
        unknown = int((~np.isfinite(readings).all(axis=1)).sum())
        self.n_unknown += sign * unknown
        self.n_scored += sign * (len(readings) - unknown)

    # --- requests ---

    def _open(self, new: NewRequest) -> OpenRequest:
        row = self._free_rows.pop() if self._free_rows else self._n_rows
        self._n_rows = max(self._n_rows, row + 1)
        self._running.begin(row)
        has_bos = self.bos_token_id is not None and list(new.prompt_token_ids[:1]) == [self.bos_token_id]
        end = new.eos_token_id if new.options.get(WANTS_STOP) else None
        request = OpenRequest(new.request_id, row, has_bos, end, wants_scores=bool(new.options.get(WANTS_SCORES)))
        self._requests[new.request_id] = request
        return request

    def _begin_anew(
        self, request: OpenRequest, blocks: Sequence[Sequence[int]], n_cached: int, n_tokens: int | None
    ) -> None:
        request.cached = n_cached
        if self._slots is not None and self.layout is not None:
            self._slots.set_blocks(request.row, blocks[self.layout.group])
        if n_tokens is not None and n_tokens < request.done:
            self._withdraw(request, n_tokens)

    def _withdraw(self, request: OpenRequest, n_tokens: int) -> None:
        """Keep the scores of the first n_tokens alone: the engine has dropped the others, and will sample them anew."""
        readings = self._pages.read(request.row, 0, request.done)[:, : self.plan.n_readings]
        self._count(readings, -1)
        self._running.withdraw(request.row)
        self._ends.pop(request.request_id, None)
        request.done = 0
        self._score_one(request, 0, readings[:n_tokens])
        request.done = request.seen = n_tokens
        request.sent = min(request.sent, n_tokens)
        request.told = min(request.told, len(self._running.crossings(request.row)))

    def _finish(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if self.keep_finished and request.wants_scores:
            self._finished[request_id] = self.scores_of(request)
        self._forget(request)

    def _forget(self, request: OpenRequest) -> None:
        self.n_alarms += bool(self._running.crossings(request.row))
        self._pages.free(request.row)
        self._free_rows.append(request.row)
        self._ends.pop(request.request_id, None)
        del self._requests[request.request_id]

    # --- answers ---

    @property
    def request_ids(self) -> list[str]:
        return [*self._requests, *self._finished]

    @property
    def n_held(self) -> tuple[int, int, int]:
        """Open requests, finished ones that nobody has fetched, pages of scores: what memory goes by."""
        return len(self._requests), len(self._finished), self._pages.n_pages_held

    @property
    def ends(self) -> dict[str, int]:
        """Requests that an alarm has ended, with the token that ends them."""
        return dict(self._ends)

    @property
    def n_crossed(self) -> list[int]:
        """By watched line: how many requests have reached it."""
        return self._running.n_crossed.tolist()

    def open_requests(self, request_ids: Sequence[str]) -> list[OpenRequest]:
        """Those of them that are open and whose clients read the scores."""
        found = (self._requests.get(name) for name in request_ids)
        return [request for request in found if request is not None and request.wants_scores]

    def unsent(self, requests: Sequence[OpenRequest]) -> tuple[np.ndarray, np.ndarray]:
        """Logits and values [n n_columns] of the positions that were not sent, one request after the other."""
        sent = np.fromiter((request.sent for request in requests), dtype=np.int64, count=len(requests))
        counts = np.fromiter((request.seen for request in requests), dtype=np.int64, count=len(requests)) - sent
        rows = np.repeat(np.array([request.row for request in requests], dtype=np.int64), counts)
        positions = np.repeat(sent - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return self._logits_and_values(self._pages.gather(rows, positions))

    def _logits_and_values(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of pages [n n_readings+n_columns], [n n_columns] each."""
        n = self.plan.n_readings
        return self.plan.token_logits(torch.from_numpy(kept[:, :n])).numpy(), kept[:, n:]

    def crossings_of(self, request: OpenRequest) -> Sequence[Crossing]:
        return self._running.crossings(request.row)

    def scores_of(self, request: OpenRequest, start: int = 0) -> RequestScores:
        found = self._logits_and_values(self._pages.read(request.row, start, request.seen))
        return RequestScores(request.request_id, start, *found, tuple(self._running.crossings(request.row)))

    def take(self, request_id: str) -> RequestScores | None:
        """The scores of a request that is over for the client; they are forgotten here."""
        finished = self._finished.pop(request_id, None)
        if finished is not None or request_id not in self._requests:
            return finished
        request = self._requests[request_id]
        scores = self.scores_of(request)
        self._forget(request)
        return scores

    def drop_finished(self) -> None:
        """Forget finished requests that nobody will fetch, such as those that a client has given up."""
        self._finished.clear()
