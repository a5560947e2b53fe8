"""Scores from the worker's book to the client's inbox, over the real socket, without an engine."""

from __future__ import annotations

import asyncio
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq

from lmprobe_tl import ProbeWeights
from lmprobe_tl.errors import EngineError, InputError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm import publisher, wire
from lmprobe_tl.vllm._compat import client_names
from lmprobe_tl.vllm.inbox import ScoreInbox
from lmprobe_tl.vllm.publisher import ScorePublisher
from lmprobe_tl.vllm.runtime import ScoreBook
from lmprobe_tl.vllm.steps import NewRequest, Step

HOOK = "blocks.0.hook_resid_post"


def make_plan() -> ScoringPlan:
    return ScoringPlan(
        [
            ProbeWeights.from_direction(torch.ones(4), 0.0, name="one", hook_points=HOOK),
            ProbeWeights.from_direction(torch.ones(4), 0.0, name="mean", hook_points=HOOK).with_inference_pooling(
                "score:mean"
            ),
        ]
    )


class Worker:
    """A book that is fed by hand, and logits that are told apart by request and position."""

    def __init__(self) -> None:
        self.book = ScoreBook(make_plan(), None, None, keep_finished=False)
        self.seen: dict[str, int] = {}

    def step(self, counts: dict[str, int], *, wants: bool = True, finished: tuple[str, ...] = ()) -> list[str]:
        new = [
            NewRequest(name, [1, 2], 0, [[0]], {"probe_scores": 1} if wants else {}, None)
            for name in counts
            if name not in self.seen
        ]
        starts = {name: self.seen.get(name, 0) for name in counts}
        self.seen |= {name: starts[name] + count for name, count in counts.items()}
        step = Step(sum(counts.values()), counts, starts, new, [], [], list(finished), [])
        self.book.begin_step(step)
        logits = np.concatenate([logits_of(name, starts[name], count) for name, count in counts.items()])
        self.book.end_step(step, list(counts), logits)
        return list(counts)


def logits_of(name: str, start: int, count: int) -> np.ndarray:
    """[count 2], below every threshold."""
    numbers = -sum(map(ord, name)) / 512 - np.arange(start, start + count, dtype=np.float32) / 64
    return np.stack([numbers, 2 * numbers], axis=1)


def run(test: Callable[[ScoreInbox], Awaitable[None]]) -> None:
    async def with_inbox() -> None:
        inbox = ScoreInbox(2)
        try:
            await test(inbox)
        finally:
            await inbox.close()

    asyncio.run(with_inbox())


def test_each_step_brings_what_is_new_of_those_who_asked() -> None:
    async def test(inbox: ScoreInbox) -> None:
        worker, sender = Worker(), ScorePublisher(inbox.address)
        packets: list[wire.Packet] = []
        inbox._on_packet = packets.append
        inbox.expect("a", 1)
        inbox.expect("b", 2)
        a, b1 = "a-00000001", "1_b-0000000f"
        sender.publish(worker.book, worker.step({a: 3, b1: 2}))
        sender.publish(worker.book, worker.step({b1: 1, a: 1}))
        await inbox.wait("a", 0, 4)
        await inbox.wait("b", 1, 3)
        assert [packet.requests for packet in packets] == [[(a, 0, 3), (b1, 0, 2)], [(b1, 2, 1), (a, 3, 1)]]
        np.testing.assert_array_equal(inbox.received("a")[0].logits, logits_of(a, 0, 4))
        np.testing.assert_array_equal(inbox.received("b")[1].logits, logits_of(b1, 0, 3))
        means = np.cumsum(1 / (1 + np.exp(-logits_of(a, 0, 4)[:, 1]))) / np.arange(1, 5)
        np.testing.assert_allclose(inbox.received("a")[0].values[:, 1], means, rtol=1e-5)
        assert inbox.n_late == 0

    run(test)


def test_who_did_not_ask_gets_nothing_and_what_nobody_expects_is_dropped() -> None:
    async def test(inbox: ScoreInbox) -> None:
        worker, sender = Worker(), ScorePublisher(inbox.address)
        packets: list[wire.Packet] = []
        inbox._on_packet = packets.append
        inbox.expect("quiet", 1)
        inbox.expect("last", 1)
        sender.publish(worker.book, worker.step({"quiet-00000001": 3}, wants=False))
        sender.publish(worker.book, worker.step({"unknown-00000001": 3}))
        sender.publish(worker.book, worker.step({"last-00000001": 1}))
        await inbox.wait("last", 0, 1)
        assert [len(packet.requests) for packet in packets] == [0, 1, 1]
        assert packets[0].n_scored == 3, "counters are of all requests"
        assert not inbox.received("quiet")
        assert set(inbox._expected) == {"quiet", "last"}

    run(test)


def test_names_that_look_like_those_of_completions_are_not_mixed_up() -> None:
    async def test(inbox: ScoreInbox) -> None:
        worker, sender = Worker(), ScorePublisher(inbox.address)
        inbox.expect("b", 1)
        inbox.expect("1_c", 1)
        sender.publish(worker.book, worker.step({"1_b-00000001": 3, "1_c-00000001": 2}))
        await inbox.wait("1_c", 0, 2)
        assert not inbox.received("b")

    run(test)


def test_the_end_of_a_request_is_told_and_nothing_of_it_is_kept() -> None:
    async def test(inbox: ScoreInbox) -> None:
        worker, sender = Worker(), ScorePublisher(inbox.address)
        inbox.expect("a", 1)
        sender.publish(worker.book, worker.step({"a-00000001": 3}))
        sender.publish(worker.book, ["a-00000001"], finished=True)
        sender.publish(worker.book, worker.step({"b-00000001": 1}, finished=("a-00000001",)))
        await inbox.wait("a", 0, None)
        assert inbox.received("a")[0].is_finished and inbox.received("a")[0].n == 3
        assert worker.book.n_held[:2] == (1, 0)
        inbox.forget("a")
        assert len(inbox) == 0

    run(test)


def test_a_slow_client_gets_all_later_and_a_gone_one_never_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_MOST_QUEUED", 1)

    async def test(inbox: ScoreInbox) -> None:
        worker, sender = Worker(), ScorePublisher(inbox.address)
        inbox.expect("a", 1)
        sent = []
        for _ in range(2000):  # faster than the queue of one is emptied; nothing is received meanwhile
            sender.publish(worker.book, worker.step({"a-00000001": 50}))
            (request,) = worker.book.open_requests(["a-00000001"])
            sent.append(request.sent == request.seen)
        assert request.seen == 100_000 and not all(sent), "the queue was never full"
        received = inbox.received("a")
        while not received or received[0].n < request.seen:
            await asyncio.sleep(0)
            sender.publish(worker.book, ["a-00000001"])
        np.testing.assert_array_equal(received[0].logits, logits_of("a-00000001", 0, 100_000))

        await inbox.close()
        begin = time.monotonic()
        for _ in range(100):
            sender.publish(worker.book, worker.step({"a-00000001": 1}))
        assert time.monotonic() - begin < 30, "each send waits for a client that is gone"
        sender.publish(worker.book, ["a-00000001"], finished=True)
        worker.step({"b-00000001": 1}, finished=("a-00000001",))
        assert worker.book.n_held[0] == 1

    run(test)


def test_crossings_are_told_once() -> None:
    async def test(inbox: ScoreInbox) -> None:
        plan = ScoringPlan([ProbeWeights.from_direction(torch.ones(4), 0.0, name="one", hook_points=HOOK)])
        book, sender = ScoreBook(plan, None, None), ScorePublisher(inbox.address)
        packets: list[wire.Packet] = []
        inbox._on_packet = packets.append
        inbox.expect("a", 1)
        for position, logit in enumerate([-1.0, 2.0, 3.0]):
            new = [NewRequest("a-00000001", [1], 0, [[0]], {"probe_scores": True}, None)] if position == 0 else []
            step = Step(1, {"a-00000001": 1}, {"a-00000001": position}, new, [], [], [], [])
            book.begin_step(step)
            book.end_step(step, ["a-00000001"], np.array([[logit]], dtype=np.float32))
            sender.publish(book, ["a-00000001"])
        await inbox.wait("a", 0, 3)
        assert inbox.received("a")[0].crossings == [(0, 1, 2.0, 2.0)]
        assert [packet.n_crossed for packet in packets] == [[0], [1], [1]]

    run(test)


def test_scores_that_do_not_come_are_counted() -> None:
    async def test(inbox: ScoreInbox) -> None:
        inbox.expect("a", 1)
        await inbox.wait("a", 0, 7, seconds=0.01)
        assert inbox.n_late == 7

    run(test)


def test_a_packet_that_cannot_be_read_is_an_error_for_all() -> None:
    async def test(inbox: ScoreInbox) -> None:
        socket = zmq.Context.instance().socket(zmq.PUSH)
        socket.connect(inbox.address)
        socket.send(b"\xc1 no MessagePack")
        inbox.expect("a", 1)
        await inbox.wait("a", 0, 1, seconds=1)
        with pytest.raises(EngineError, match="no longer received.*MessagePack"):
            inbox.received("a")
        socket.close(linger=0)

    run(test)


def test_the_socket_is_private_and_goes_with_the_inbox() -> None:
    folders: list[Path] = []

    async def test(inbox: ScoreInbox) -> None:
        folders.append(Path(inbox.address.removeprefix("ipc://")).parent)
        assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700

    run(test)
    assert not folders[0].exists()


def test_a_folder_whose_path_is_too_long_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    async def test(inbox: ScoreInbox) -> None:
        pytest.fail("opened")

    with pytest.raises(EngineError, match="set TMPDIR to a short one"):
        run(test)
    assert not list(folder.iterdir())


def test_a_name_that_is_running_is_refused() -> None:
    async def test(inbox: ScoreInbox) -> None:
        inbox.expect("a", 1)
        with pytest.raises(InputError, match="request_id is 'a', and a request of this name is running"):
            inbox.expect("a", 2)

    run(test)


def test_a_worker_that_reaches_nobody_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(publisher, "_SECONDS_TO_CONNECT", 0.1)
    with pytest.raises(EngineError, match="cannot reach the client's socket"):
        ScorePublisher(f"ipc://{tmp_path}/nobody")


@pytest.mark.parametrize(
    ("request_id", "names"),
    [
        ("a-0123abcd", [("a", 0, False)]),
        ("3_a-0123abcd", [("3_a", 0, False), ("a", 3, True)]),
        ("cmpl-x-0-0123abcd", [("cmpl-x-0", 0, False)]),
        ("a", []),
    ],
)
def test_names_of_clients(request_id: str, names: list[Any]) -> None:
    assert list(client_names(request_id)) == names


def test_names_that_would_be_mixed_up_are_refused() -> None:
    async def test(inbox: ScoreInbox) -> None:
        inbox.expect("5", 3)
        with pytest.raises(InputError, match="request_id is '2_5', and beside a request that is running"):
            inbox.expect("2_5", 1)
        inbox.expect("3_5", 1)  # there is no completion 3
        inbox.expect("1_6", 1)
        with pytest.raises(InputError, match="request_id is '6'"):
            inbox.expect("6", 2)
        inbox.expect("6", 1)
        inbox.forget("5")
        inbox.expect("2_5", 1)

    run(test)


def test_a_request_waits_in_vain_but_once() -> None:
    async def test(inbox: ScoreInbox) -> None:
        worker, sender = Worker(), ScorePublisher(inbox.address)
        inbox.expect("a", 100)
        sender.publish(worker.book, worker.step({"99_a-00000001": 3}))
        started = asyncio.get_running_loop().time()
        for index in range(100):
            await inbox.wait("a", index, 3, seconds=0.2)
        assert asyncio.get_running_loop().time() - started < 10  # 100 waits would be 20 s
        assert inbox.received("a")[99].n == 3
        assert inbox.n_late == 99 * 3, "what had come is not late"

    run(test)
