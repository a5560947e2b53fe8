"""Scores on their way out of the worker, step by step, to the client that asked for them."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from lmprobe_tl.errors import EngineError
from lmprobe_tl.vllm import wire
from lmprobe_tl.vllm.runtime import OpenRequest, ScoreBook

_MOST_QUEUED = 1000  # packets for a client that is slow
_SECONDS_TO_CONNECT = 5


class ScorePublisher:
    """A socket to one client. Sending never waits: what a client that is slow or gone did not get of a request is sent with
    its next positions, or lost when the request is over before.

    Raises EngineError where nothing listens at the address.
    """

    def __init__(self, address: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _MOST_QUEUED)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # no queue for a peer that is not there
        self._socket.connect(address)
        if not self._socket.poll(1000 * _SECONDS_TO_CONNECT, zmq.POLLOUT):
            self.close()
            raise EngineError(f"the worker cannot reach the client's socket {address!r}. Both must be on one machine.")

    def publish(self, book: ScoreBook, request_ids: Sequence[str], *, finished: bool = False) -> None:
        """Send what these requests have that was not sent. finished: whether that is all that they will ever have."""
        requests = book.open_requests(request_ids)
        if finished and not requests:
            return
        if self._send(_packet(book, requests, finished)):
            for request in requests:
                request.sent, request.told = request.seen, len(book.crossings_of(request))

    def _send(self, packet: wire.Packet) -> bool:
        try:
            self._socket.send(wire.encode(packet), zmq.NOBLOCK)
        except zmq.ZMQError:  # a full queue, or nobody there: no reason to stop the engine
            return False
        return True

    def close(self) -> None:
        self._socket.close()


def _packet(book: ScoreBook, requests: Sequence[OpenRequest], finished: bool) -> wire.Packet:
    logits, values = book.unsent(requests)
    crossings = [
        (index, one.line, one.position, one.logit, one.value)
        for index, request in enumerate(requests)
        for one in book.crossings_of(request)[request.told :]
    ]
    return wire.Packet(
        [(request.request_id, request.sent, request.seen - request.sent) for request in requests],
        logits.tobytes(),
        values.tobytes(),
        crossings,
        [request.request_id for request in requests] if finished else [],
        book.n_scored,
        book.n_unknown,
        book.n_crossed,
    )
