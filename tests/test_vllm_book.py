"""Scores by request and position, whatever an engine's scheduler does: against a recompute of each request alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from engine_plan import activations, logits_of, readings_of, the_plan
from fake_scheduler import FakeRequest, FakeScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import BOS, assert_same, expected_running

from lmprobe_tl.vllm.runtime import WANTS_SCORES, WANTS_STOP, RequestScores, ScoreBook
from lmprobe_tl.vllm.steps import CacheLayout


@dataclass
class Run:
    """A book that is fed by a scheduler, and what it has said of each request."""

    book: ScoreBook
    scheduler: FakeScheduler
    requests: list[FakeRequest]
    aborts: dict[int, str] = field(default_factory=dict)  # after so many steps
    computed: dict[str, int] = field(default_factory=dict)

    def play(self) -> None:
        for number, (step, batch) in enumerate(self.scheduler.steps()):
            self.book.begin_step(step)
            if batch:
                rows = [
                    readings_of(one.tokens)[step.starts[one.request_id] :][: step.counts[one.request_id]] for one in batch
                ]
                names = [one.request_id for one in batch]
                told = self.book.end_step(step, names, np.concatenate(rows))
                assert [one.request_id for one in told] == names
            for one in batch:
                stop = step.starts[one.request_id] + step.counts[one.request_id]
                self.computed[one.request_id] = max(stop, self.computed.get(one.request_id, 0))
            assert self.book.ends == self.expected_ends(), f"after step {number}"
            if number in self.aborts:
                self.scheduler.abort(self.aborts[number])

    def expected_ends(self) -> dict[str, int]:
        """Open requests that end at an alarm and have had one, by the book's own values."""
        ends = {}
        for one in self.book._requests.values():
            request = next(found for found in self.requests if found.request_id == one.request_id)
            values = self.book.scores_of(one).values[:, the_plan().watches.columns]
            if request.options.get(WANTS_STOP) and (values >= the_plan().watches.values.numpy()).any():
                ends[one.request_id] = 1
        return ends


def check_scores(scores: RequestScores, request: FakeRequest, n: int, known: list[bool]) -> None:
    """Logits where they are known, and the running scores and crossings of these alone; of n positions."""
    tokens, plan = request.tokens[:n], the_plan()
    at = [position for position in range(n) if known[position]]
    logits = logits_of(request.tokens)[:n].copy()
    logits[~np.array(known[:n], dtype=bool)] = np.nan
    assert scores.start == 0
    np.testing.assert_allclose(scores.logits, logits, rtol=1e-6)
    features = activations(tuple(request.tokens))[at]
    for weights in plan.probes.values():
        columns = plan.columns[weights.name]
        running = plan.group_of(weights.name).leave(torch.from_numpy(scores.values[:, columns]))
        # A BOS counts for the reference where it is the first of its row: where position 0 is unknown, none does.
        expected = torch.full((n, running.shape[1]), torch.nan)
        if at:
            found = expected_running(features, weights, [tokens[position] for position in at])
            for position in range(at[0], n):  # what is unknown repeats the value before it
                expected[position] = found.reshape(len(at), -1)[sum(one <= position for one in at) - 1]
        assert_same(running, expected, f"{request.request_id} {weights.name}")
    reached = scores.values[:, plan.watches.columns] >= plan.watches.values.numpy()
    crossed = {line: int(reached[:, line].argmax()) for line in range(reached.shape[1]) if reached[:, line].any()}
    assert {one.line: one.position for one in scores.crossings} == crossed
    for one in scores.crossings:
        column = plan.watches.lines[one.line].column
        assert one.logit == pytest.approx(scores.logits[one.position, column], rel=1e-6)
        assert one.value == scores.values[one.position, column]


@st.composite
def runs(draw: Any, *, with_slots: bool) -> Run:
    """Requests of which many begin alike, in a cache that is now wide and now narrow."""
    random = Random(draw(st.integers(0, 10**6)))
    size, n_blocks = draw(st.sampled_from([2, 4])), draw(st.integers(12, 40))
    shared = [draw(st.sampled_from([BOS, 9])), *(random.randrange(1, 6) for _ in range(12))]
    requests = []
    for at in range(draw(st.integers(1, 7))):
        prefix = shared[: draw(st.sampled_from([0, 1, 4, 8, 13]))]
        own = [random.randrange(2, 9) for _ in range(draw(st.integers(1, 8)))]
        generated = [random.randrange(2, 9) for _ in range(draw(st.integers(1, 9)))]
        options = {WANTS_SCORES: draw(st.integers(0, 3)) > 0, WANTS_STOP: draw(st.booleans())}
        requests.append(FakeRequest(f"r{at}", prefix + own + generated, len(prefix + own), options))
    # the longest needs as many blocks as there are, or fewer
    n_blocks = max(n_blocks // size, -(-max(len(one.tokens) for one in requests) // size))
    layout = CacheLayout(group=1, block_size=size, n_blocks=n_blocks)
    scheduler = FakeScheduler(
        random,
        layout,
        budget=draw(st.integers(1, 20)),
        most_running=draw(st.integers(1, 5)),
        has_prefix_cache=draw(st.integers(0, 4)) > 0,
        comes_back_new=draw(st.booleans()),
        waiting=list(requests),
    )
    aborts = draw(st.dictionaries(st.integers(0, 12), st.sampled_from([one.request_id for one in requests]), max_size=2))
    book = ScoreBook(the_plan(), layout if with_slots else None, BOS)
    return Run(book, scheduler, requests, aborts)


def check_run(run: Run) -> tuple[int, int]:
    """How many scores are known in the end, and how many are not."""
    run.play()
    n_known, n_unknown = 0, 0
    opened = [one for one in run.requests if one.request_id in run.computed]
    kept = {one.request_id for one in opened if one.options[WANTS_SCORES]}
    assert run.book.n_held == (0, len(kept), 0)
    assert set(run.book.request_ids) == kept
    for request in opened:
        n = run.computed[request.request_id]
        known = [True] * n if run.book.layout is not None else request.scored
        n_known, n_unknown = n_known + sum(known[:n]), n_unknown + n - sum(known[:n])
        scores = run.book.take(request.request_id)
        assert (scores is not None) == (request.request_id in kept)
        if scores is not None:
            check_scores(scores, request, n, known)
        assert run.book.take(request.request_id) is None
    assert run.book.n_held == (0, 0, 0)
    assert (run.book.n_scored, run.book.n_unknown) == (n_known, n_unknown)
    return n_known, n_unknown


@settings(max_examples=40, deadline=None)
@given(runs(with_slots=True))
def test_scores_do_not_depend_on_the_schedule(run: Run) -> None:
    _, n_unknown = check_run(run)
    assert n_unknown == 0


@settings(max_examples=20, deadline=None)
@given(runs(with_slots=False))
def test_what_the_cache_serves_is_unknown_without_slots(run: Run) -> None:
    check_run(run)


def a_busy_run(*, with_slots: bool, comes_back_new: bool = False) -> Run:
    random = Random(3)
    shared = [BOS] + [random.randrange(2, 9) for _ in range(11)]
    options = {WANTS_SCORES: True}
    requests = [FakeRequest(f"r{at}", [*shared, at, at] + [3, 5, 4] * 4, 14, options) for at in range(6)]
    layout = CacheLayout(group=1, block_size=4, n_blocks=12)
    scheduler = FakeScheduler(random, layout, 9, 4, waiting=list(requests), comes_back_new=comes_back_new)
    return Run(ScoreBook(the_plan(), layout if with_slots else None, BOS), scheduler, requests)


@pytest.mark.parametrize("comes_back_new", [False, True])
def test_a_busy_run_preempts_and_shares(comes_back_new: bool) -> None:
    # What the law above is about does happen: this schedule has it.
    run = a_busy_run(with_slots=True, comes_back_new=comes_back_new)
    n_known, _ = check_run(run)
    assert run.scheduler.n_preempted > 0 and run.scheduler.n_cached > 8
    assert n_known == 6 * 25


def test_unknown_scores_are_counted() -> None:
    _, n_unknown = check_run(a_busy_run(with_slots=False))
    assert n_unknown >= 8


def test_many_requests_at_once_and_rows_used_again() -> None:
    # More than the sixteen rows that a book begins with.
    options = {WANTS_SCORES: True}
    requests = [FakeRequest(f"r{at}", [BOS, at % 7 + 2, 5, at // 7 + 2, 6, 3], 2, options) for at in range(60)]
    layout = CacheLayout(group=1, block_size=4, n_blocks=120)
    scheduler = FakeScheduler(Random(1), layout, 400, 40, waiting=list(requests))
    run = Run(ScoreBook(the_plan(), layout, BOS), scheduler, requests)
    check_run(run)
    assert run.book._n_rows <= 60
