"""Scores as they come from a running engine, kept by request for as long as somebody waits for them."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq
import zmq.asyncio

from lmprobe_tl.errors import EngineError, InputError
from lmprobe_tl.vllm import _compat, wire

_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)
SECONDS_TO_WAIT = 2.0  # for scores of a request that is over; they are usually there before its last token
_FIRST_POSITIONS = 64


class ReceivedScores:
    """Of one completion, position by position from 0 on. n: positions so far; is_finished: whether no more will come.

    crossings: as in `wire.Scores`.
    """

    def __init__(self, n_columns: int) -> None:
        self.n, self.is_finished = 0, False
        self.crossings: list[tuple[int, int, float, float]] = []
        self._numbers = np.full((2, _FIRST_POSITIONS, n_columns), np.nan, dtype=np.float32)

    @property
    def logits(self) -> np.ndarray:
        return self._numbers[0, : self.n]

    @property
    def values(self) -> np.ndarray:
        """Of the online reductions."""
        return self._numbers[1, : self.n]

    def add(self, start: int, logits: np.ndarray, values: np.ndarray) -> None:
        """[new n_columns] each, from position `start` on. Positions that are skipped stay NaN."""
        stop = start + len(logits)
        while stop > self._numbers.shape[1]:
            self._numbers = np.concatenate([self._numbers, np.full_like(self._numbers, np.nan)], axis=1)
        self._numbers[0, start:stop], self._numbers[1, start:stop] = logits, values
        self.n = max(self.n, stop)

    def as_wire(self) -> wire.Scores:
        return wire.Scores(0, self.n, self.logits.tobytes(), self.values.tobytes(), self.crossings)


@dataclass
class _Expected:
    """A request by the client's name. changed: set whenever something of it has come; gave_up: whether a wait was in vain,
    so that its other completions wait no longer."""

    n: int
    gave_up: bool = False
    completions: dict[int, ReceivedScores] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class ScoreInbox:
    """Receives what a worker publishes, on a socket in a private folder, and keeps it of requests that are expected.

    Memory is bounded by these: everything else is dropped as it comes. on_packet: called with each packet. n_late: positions
    that had not come when their request was over and the waiting was, too. To be opened on a running event loop.

    EngineError where no socket can be opened.
    """

    def __init__(self, n_columns: int, on_packet: Callable[[wire.Packet], None] | None = None) -> None:
        self.n_late = 0
        self._n_columns, self._on_packet = n_columns, on_packet
        self._expected: dict[str, _Expected] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="lmprobe-")  # 0700
        self.address = f"ipc://{Path(self._folder.name) / 'scores'}"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._folder.cleanup()
            raise EngineError(
                f"no socket can be opened at {self.address!r}: {error}. If the path is too long, set TMPDIR to a short one."
            ) from error
        self._task = asyncio.create_task(self._receive())

    def __len__(self) -> int:
        """How many requests are expected."""
        return len(self._expected)

    def expect(self, name: str, n: int) -> None:
        """Keep the scores of the request that the client calls `name`, of n completions, from its first step on.

        InputError where a request of this name is running, or one that the engine could not tell from its completions.
        """
        if name in self._expected:
            raise InputError(f"request_id is {name!r}, and a request of this name is running; use another.")
        child = _CHILD.fullmatch(name)  # as the engine calls completion 1 of "a" if it has several
        of_other = child is not None and child[2] in self._expected and int(child[1]) < self._expected[child[2]].n > 1
        if of_other or (n > 1 and any(f"{index}_{name}" in self._expected for index in range(n))):
            raise InputError(
                f"request_id is {name!r}, and beside a request that is running, vLLM's names of completions would "
                "be the same; use another."
            )
        self._expected[name] = _Expected(n)

    def forget(self, name: str) -> None:
        self._expected.pop(name, None)

    def received(self, name: str) -> Mapping[int, ReceivedScores]:
        """What has come so far of each completion, by its index. EngineError where nothing can be received any more."""
        self._check_receiving()
        return self._expected[name].completions

    async def wait(self, name: str, index: int, n_positions: int | None, *, seconds: float = SECONDS_TO_WAIT) -> None:
        """Until all positions of a completion have come, or, with None, all that will; but no longer than `seconds`."""
        self._check_receiving()
        request = self._expected[name]
        if _is_complete(request.completions.get(index), n_positions):
            return

        async def complete() -> None:
            while not _is_complete(request.completions.get(index), n_positions):
                request.changed.clear()
                await request.changed.wait()

        try:
            await asyncio.wait_for(complete(), 0 if request.gave_up else seconds)
        except TimeoutError:
            request.gave_up = True
            found = request.completions.get(index)
            self.n_late += max(1, (n_positions or 0) - (0 if found is None else found.n))

    def _check_receiving(self) -> None:
        if self._task.done() and not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise EngineError(f"scores are no longer received, since a packet could not be read: {error!r}") from error

    async def _receive(self) -> None:
        while True:
            packet = wire.decode(await self._socket.recv(), wire.Packet)
            self._take(packet)
            if self._on_packet is not None:
                self._on_packet(packet)

    def _take(self, packet: wire.Packet) -> None:
        logits, values = packet.arrays()
        begin = 0
        places = [self._place(request_id) for request_id, _, _ in packet.requests]
        for place, (_, start, count) in zip(places, packet.requests, strict=True):
            if place is not None and count:
                place.add(start, logits[begin : begin + count], values[begin : begin + count])
            begin += count
        for index, *crossing in packet.crossings:
            if (place := places[index]) is not None:
                place.crossings.append(tuple(crossing))  # type: ignore[arg-type]
        for request_id in packet.finished:
            if (place := self._place(request_id)) is not None:
                place.is_finished = True

    def _place(self, request_id: str) -> ReceivedScores | None:
        for name, index, of_several in _compat.client_names(request_id):
            request = self._expected.get(name)
            if request is not None and of_several == (request.n > 1):
                request.changed.set()
                if index not in request.completions:
                    request.completions[index] = ReceivedScores(self._n_columns)
                return request.completions[index]
        return None

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()
        self._folder.cleanup()


def _is_complete(found: ReceivedScores | None, n_positions: int | None) -> bool:
    if found is None:
        return False
    return found.is_finished or (n_positions is not None and found.n >= n_positions)
