"""A scheduler as vLLM has one, small enough to read: chunks, a paged cache with shared prefixes, preemption, aborts.

Tokens are made up beforehand, so nothing is sampled: after each step of a whole request its next token becomes known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from lmprobe_tl.vllm.steps import CacheLayout, NewRequest, ReturningRequest, Step

OTHER_GROUP = [7, 7]  # blocks of a group of layers that scores do not go by


@dataclass
class FakeRequest:
    """tokens: the prompt of n_prompt and what will be generated. scored: by position, whether its score can be known."""

    request_id: str
    tokens: list[int]
    n_prompt: int
    options: dict[str, bool]
    known: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    is_new: bool = True
    scored: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = self.n_prompt


@dataclass
class FakeScheduler:
    """has_prefix_cache: whether full blocks are found again by their tokens. comes_back_new: a preempted request is handed
    out again as a new one, as vLLM's second model runner has it."""

    random: Random
    layout: CacheLayout
    budget: int
    most_running: int
    has_prefix_cache: bool = True
    comes_back_new: bool = False
    waiting: list[FakeRequest] = field(default_factory=list)
    running: list[FakeRequest] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    n_preempted: int = 0
    n_cached: int = 0

    def __post_init__(self) -> None:
        self.free = list(range(self.layout.n_blocks))
        self.users = [0] * self.layout.n_blocks
        self.holds: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
        self.found: dict[tuple[int, ...], int] = {}

    # --- blocks ---

    def _allocate(self) -> int:
        block = self.free.pop(self.random.randrange(len(self.free)))
        self._forget(block)
        self.users[block] = 1
        return block

    def _forget(self, block: int) -> None:
        tokens = self.holds.pop(block, None)
        if tokens is not None and self.found.get(tokens) == block:
            del self.found[tokens]

    def _release(self, request: FakeRequest) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.blocks = []

    def _cached_blocks(self, request: FakeRequest) -> list[int]:
        blocks: list[int] = []
        size = self.layout.block_size
        # The last token is always computed, since the next one is sampled from it.
        while self.has_prefix_cache and (len(blocks) + 1) * size < request.known:
            block = self.found.get(tuple(request.tokens[: (len(blocks) + 1) * size]))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _grow(self, request: FakeRequest, stop: int) -> list[int] | None:
        """Blocks for positions up to `stop`, found again by their tokens from now on; None where there are none."""
        size = self.layout.block_size
        needed = max(0, -(-stop // size) - len(request.blocks))
        if needed > len(self.free):
            return None
        new = [self._allocate() for _ in range(needed)]
        request.blocks += new
        for at, block in enumerate(request.blocks):
            if (at + 1) * size <= stop and block not in self.holds:
                self.holds[block] = tuple(request.tokens[: (at + 1) * size])
                self.found.setdefault(self.holds[block], block)
        return new

    # --- steps ---

    def abort(self, request_id: str) -> None:
        for queue in (self.waiting, self.running):
            for request in [one for one in queue if one.request_id == request_id]:
                queue.remove(request)
                self._release(request)
                if not request.is_new:
                    self.over.append(request_id)

    def steps(self) -> Iterator[tuple[Step, list[FakeRequest]]]:
        """Steps and their requests in batch order, until all are done; the last step has no tokens."""
        while self.waiting or self.running:
            yield self._step()
        yield Step(0, {}, {}, [], [], [], self._take_over(), []), []

    def _take_over(self) -> list[str]:
        over, self.over = self.over, []
        return over

    def _step(self) -> tuple[Step, list[FakeRequest]]:
        finished, budget = self._take_over(), self.budget
        counts: dict[str, int] = {}
        starts: dict[str, int] = {}
        new, resumed, grown = [], [], []
        taking: list[FakeRequest] = []
        for request in list(self.running):
            if request not in self.running or not budget:
                continue
            count = self._chunk(request, budget)
            more = self._grow(request, request.computed + count)
            while more is None:
                victim = next(one for one in reversed(self.running) if one not in taking)
                self._preempt(victim)
                if victim is request:
                    break
                more = self._grow(request, request.computed + count)
            if more is None:
                continue
            if more:
                grown.append((request.request_id, [OTHER_GROUP, more]))
            counts[request.request_id], starts[request.request_id] = count, request.computed
            taking.append(request)
            budget -= count
        while self.waiting and budget and len(self.running) < self.most_running:
            request = self.waiting[0]
            request.blocks = self._cached_blocks(request)
            for block in request.blocks:
                self.users[block] += 1
                if block in self.free:
                    self.free.remove(block)
            n_cached = len(request.blocks) * self.layout.block_size
            count = min(self._chunk(request, budget), request.known - n_cached)
            if self._grow(request, n_cached + count) is None:
                self._release(request)
                break
            self.waiting.pop(0)
            self.running.append(request)
            self.n_cached += n_cached
            request.computed = n_cached
            blocks = [OTHER_GROUP, list(request.blocks)]
            if request.is_new or self.comes_back_new:
                prompt = request.tokens[: request.n_prompt]
                new.append(NewRequest(request.request_id, prompt, n_cached, blocks, request.options, 1, request.known))
            else:
                resumed.append(ReturningRequest(request.request_id, blocks, n_cached, request.known))
            request.is_new = False
            counts[request.request_id], starts[request.request_id] = count, n_cached
            taking.append(request)
            budget -= count
        for request in taking:
            self._compute(request, counts[request.request_id])
        self.random.shuffle(taking)
        return Step(sum(counts.values()), counts, starts, new, resumed, grown, finished, []), taking

    def _chunk(self, request: FakeRequest, budget: int) -> int:
        return min(request.known - request.computed, budget, self.random.choice((1, 3, 8, 100)))

    def _preempt(self, request: FakeRequest) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed = 0
        self.waiting.insert(0, request)
        self.n_preempted += 1

    def _compute(self, request: FakeRequest, count: int) -> None:
        start = request.computed
        request.scored += [False] * (start - len(request.scored))  # served by the cache, and never computed for it
        request.computed += count
        request.scored += [True] * (request.computed - len(request.scored))
        if request.computed == request.known:
            request.known += 1
            if request.known >= len(request.tokens):
                self.running.remove(request)
                self._release(request)
                self.over.append(request.request_id)
