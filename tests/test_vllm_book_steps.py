"""Steps of an engine that a scheduler seldom makes, one at a time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from engine_plan import logits_of, readings_of, the_plan
from live_reference import BOS

from lmprobe_tl.errors import EngineError
from lmprobe_tl.vllm.runtime import WANTS_SCORES, ScoreBook
from lmprobe_tl.vllm.steps import CacheLayout, NewRequest, ReturningRequest, Step


def step(counts: dict[str, int], starts: dict[str, int], **changes: Any) -> Step:
    nothing: dict[str, Any] = {"new": [], "resumed": [], "grown": [], "finished": [], "copies": []}
    return Step(sum(counts.values()), counts, starts, **(nothing | changes))


def new_request(name: str, tokens: list[int], n_cached: int, blocks: list[int]) -> NewRequest:
    return NewRequest(name, tokens, n_cached, [[], blocks], {WANTS_SCORES: True}, 1)


def test_a_copied_block_takes_its_scores_along() -> None:
    tokens = [BOS, 3, 4, 5, 6]
    book = ScoreBook(the_plan(), CacheLayout(1, 4, 8), BOS)
    first = step({"a": 5}, {"a": 0}, new=[new_request("a", tokens, 0, [2, 3])])
    book.begin_step(first)
    book.end_step(first, ["a"], readings_of(tokens))
    second = step({"b": 1}, {"b": 4}, new=[new_request("b", tokens, 4, [6, 7])], copies=[(2, 6)])
    book.begin_step(second)
    book.end_step(second, ["b"], readings_of(tokens)[4:])
    found = book.take("b")
    assert found is not None
    np.testing.assert_allclose(found.logits, logits_of(tokens), rtol=1e-6)


def test_decoding_requests_are_scored_together_beside_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    book, names = ScoreBook(the_plan(), None, BOS), [f"r{at}" for at in range(12)]
    first = step(dict.fromkeys(names, 2), dict.fromkeys(names, 0), new=[new_request(one, [BOS, 3], 0, []) for one in names])
    book.begin_step(first)
    book.end_step(first, names, np.concatenate([readings_of([BOS, 3])] * 12))
    sizes, update = [], book._running.update
    monkeypatch.setattr(book._running, "update", lambda rows, *rest: sizes.append(len(rows)) or update(rows, *rest))
    order = [*names[:5], "late", *names[5:]]
    second = step(
        dict.fromkeys(names, 1) | {"late": 3},
        dict.fromkeys(names, 2) | {"late": 0},
        new=[new_request("late", [BOS, 5, 6], 0, [])],
    )
    book.begin_step(second)
    own = [readings_of([BOS, 3, 4 + at])[2:] for at in range(12)]
    book.end_step(second, order, np.concatenate([*own[:5], readings_of([BOS, 5, 6]), *own[5:]]))
    assert sizes == [12, 1]
    for at, name in enumerate(names):
        found = book.take(name)
        assert found is not None
        np.testing.assert_allclose(found.logits, logits_of([BOS, 3, 4 + at]), rtol=1e-6)


def test_a_gap_that_the_cache_does_not_explain_is_unknown() -> None:
    # What its slots hold is of somebody else.
    tokens = [BOS, 3, 4, 5, 6]
    book = ScoreBook(the_plan(), CacheLayout(1, 4, 8), BOS)
    old = step({"old": 5}, {"old": 0}, new=[new_request("old", [9, 8, 7, 6, 5], 0, [2, 3])])
    book.begin_step(old)
    book.end_step(old, ["old"], readings_of([9, 8, 7, 6, 5]))
    late = step({"a": 2}, {"a": 3}, new=[new_request("a", tokens, 0, [2, 3])])
    book.begin_step(late)
    book.end_step(late, ["a"], readings_of(tokens)[3:])
    found = book.take("a")
    assert found is not None
    assert np.isnan(found.logits[:3]).all() and book.n_unknown == 3
    np.testing.assert_allclose(found.logits[3:], logits_of(tokens)[3:], rtol=1e-6)


@pytest.mark.parametrize("way", ["grown", "resumed"])
def test_a_block_of_a_request_that_is_not_kept_has_no_score_of_its_owner_before(way: str) -> None:
    # Another request may find it by the tokens that are in it now.
    first, tokens = [BOS, 9, 8, 7, 6], [BOS, 3, 4, 5, 6]
    book = ScoreBook(the_plan(), CacheLayout(1, 4, 8), BOS)
    one = step({"first": 5}, {"first": 0}, new=[new_request("first", first, 0, [2, 3])])
    book.begin_step(one)
    book.end_step(one, ["first"], readings_of(first))
    change: dict[str, Any] = {"grown": [("old", [[], [2]])]}
    if way == "resumed":
        change = {"resumed": [ReturningRequest("old", [[], [2, 4]], 0)]}
    two = step({"old": 5}, {"old": 0}, finished=["first"], **change)
    book.begin_step(two)
    assert book.end_step(two, ["old"], readings_of(tokens)) == []
    three = step({"a": 1}, {"a": 4}, new=[new_request("a", tokens, 4, [2, 5])])
    book.begin_step(three)
    book.end_step(three, ["a"], readings_of(tokens)[4:])
    found = book.take("a")
    assert found is not None
    assert np.isnan(found.logits[:4]).all()
    np.testing.assert_allclose(found.logits[4:], logits_of(tokens)[4:], rtol=1e-6)


@pytest.mark.parametrize("comes_back_new", [False, True])
def test_tokens_that_an_engine_drops_and_samples_anew_are_scored_anew(comes_back_new: bool) -> None:
    # As when its cache is reset while steps are on their way.
    kept, dropped, other = [BOS, 3, 4, 5], [6, 7], [8, 2, 9]
    alone, book = ScoreBook(the_plan(), None, BOS), ScoreBook(the_plan(), CacheLayout(1, 4, 8), BOS)
    tokens = kept + other
    plain = step({"a": 7}, {"a": 0}, new=[new_request("a", tokens, 0, [])])
    alone.begin_step(plain)
    alone.end_step(plain, ["a"], readings_of(tokens))
    before = readings_of(kept + dropped)
    first = step({"a": 4}, {"a": 0}, new=[new_request("a", kept[:2], 0, [2, 3])])
    book.begin_step(first)
    book.end_step(first, ["a"], before[:4])
    for at in (4, 5):
        next_one = step({"a": 1}, {"a": at})
        book.begin_step(next_one)
        book.end_step(next_one, ["a"], before[at : at + 1])
    again = {"new": [dataclasses.replace(new_request("a", kept[:2], 0, [5, 6]), n_tokens=4)]}
    back: dict[str, Any] = again if comes_back_new else {"resumed": [ReturningRequest("a", [[], [5, 6]], 0, 4)]}
    anew = step({"a": 4}, {"a": 0}, **back)
    book.begin_step(anew)
    book.end_step(anew, ["a"], readings_of(kept))
    for at in (4, 5, 6):
        next_one = step({"a": 1}, {"a": at})
        book.begin_step(next_one)
        book.end_step(next_one, ["a"], readings_of(tokens)[at : at + 1])
    assert (book.n_scored, book.n_crossed) == (alone.n_scored, alone.n_crossed)
    found, expected = book.take("a"), alone.take("a")
    assert found is not None and expected is not None
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-6)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    places = [{(one.line, one.position) for one in scores.crossings} for scores in (found, expected)]
    assert places[0] == places[1]


def test_tokens_without_an_owner_are_refused() -> None:
    book = ScoreBook(the_plan(), None, BOS)
    one = step({"a": 3}, {"a": 0}, new=[new_request("a", [3, 4, 5], 0, [])])
    book.begin_step(one)
    with pytest.raises(EngineError, match="a step had 2 tokens, but its requests 3"):
        book.end_step(one, ["a"], readings_of([3, 4]))


def test_requests_from_before_the_probes_are_passed_over() -> None:
    book = ScoreBook(the_plan(), None, BOS)
    mixed = step({"old": 1, "new": 3}, {"old": 17, "new": 0}, new=[new_request("new", [3, 4, 5], 0, [])])
    book.begin_step(mixed)
    told = book.end_step(mixed, ["old", "new"], np.concatenate([readings_of([8]), readings_of([3, 4, 5])]))
    assert [one.request_id for one in told] == ["new"]
    assert book.take("old") is None
    found = book.take("new")
    assert found is not None
    np.testing.assert_allclose(found.logits, logits_of([3, 4, 5]), rtol=1e-6)
    only_old = step({"old": 1}, {"old": 18}, resumed=[ReturningRequest("old", [[], [1]], 4)], grown=[("old", [[], [2]])])
    book.begin_step(only_old)
    assert book.end_step(only_old, ["old"], readings_of([8])) == []


def test_a_request_that_was_taken_while_it_ran_is_forgotten() -> None:
    book = ScoreBook(the_plan(), None, BOS)
    first = step({"a": 3}, {"a": 0}, new=[new_request("a", [3, 4, 5], 0, [])])
    book.begin_step(first)
    book.end_step(first, ["a"], readings_of([3, 4, 5]))
    assert book.n_held == (1, 0, 1)
    assert book.take("a") is not None
    assert book.n_held == (0, 0, 0)
    # the engine may be a step behind
    late = step({"a": 1}, {"a": 3})
    book.begin_step(late)
    assert book.end_step(late, ["a"], readings_of([3, 4, 5, 6])[3:]) == []
    book.begin_step(step({}, {}, finished=["a"]))
    assert book.n_held == (0, 0, 0)


def test_the_arithmetic_needs_neither_vllm_nor_msgspec() -> None:
    code = (
        "import sys, lmprobe_tl.vllm.runtime, lmprobe_tl.vllm.structure;"
        "print(sorted({'vllm', 'msgspec', 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
