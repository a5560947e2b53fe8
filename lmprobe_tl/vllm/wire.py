"""What client and worker tell each other, as MessagePack: plain numbers and bytes, never pickled objects."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np


class Load(msgspec.Struct):
    """Probe files to run from now on, by their content."""

    probes: list[bytes]
    bos_token_id: int | None


class Loaded(msgspec.Struct):
    """hook_points: those that the answering worker reports of, none from the others."""

    hook_points: list[str]
    is_last_stage: bool


class Take(msgspec.Struct):
    """Requests by the client's name of each, with its number of completions."""

    requests: list[tuple[str, int]]


class Scores(msgspec.Struct):
    """Logits, and values of the online reductions, float32 [n n_columns] each, of positions from `start` on; crossings as
    (line, position, logit, value)."""

    start: int
    n: int
    logits: bytes
    values: bytes
    crossings: list[tuple[int, int, float, float]]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(_rows(part, self.n) for part in (self.logits, self.values))  # type: ignore[return-value]


class Taken(msgspec.Struct):
    """For each request that was asked for, the scores of its completions by index."""

    answers: list[dict[int, Scores]]


class Publish(msgspec.Struct):
    """Where to send the scores of each step from now on; None for nowhere."""

    address: str | None


class Packet(msgspec.Struct):
    """What a step has added, of the requests that asked for their scores.

    requests: (internal id, first new position, count) of each; logits, values: float32 [sum of counts, n_columns], one
    request after the other. crossings: (index in `requests`, line, position, logit, value), new ones alone. finished:
    internal ids of requests that get no more scores. The counts are of all requests since the probes were loaded: positions
    scored and unknown, and by watched line the requests that crossed it.
    """

    requests: list[tuple[str, int, int]]
    logits: bytes
    values: bytes
    crossings: list[tuple[int, int, int, float, float]]
    finished: list[str]
    n_scored: int
    n_unknown: int
    n_crossed: list[int]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        n = sum(count for _, _, count in self.requests)
        return tuple(_rows(part, n) for part in (self.logits, self.values))  # type: ignore[return-value]


class State(msgspec.Struct):
    """Tokens scored and unknown, requests with an alarm; open requests, finished ones nobody fetched, pages held; and some
    readings of the first step."""

    n_scored: int
    n_unknown: int
    n_alarms: int
    n_open: int
    n_finished: int
    n_pages: int
    first_readings: list[float]


class Collect(msgspec.Struct):
    """Keep the activations of the prompts to come. poolings: names, and whether BOS counts."""

    hook_points: list[str]
    poolings: list[tuple[str, bool]]
    bos_token_id: int | None
    eos_ids: list[int]


class CollectedRequest(msgspec.Struct):
    """Hand over the activations of the group's prompts, 0 to n_rows - 1."""

    n_rows: int


class Collected(msgspec.Struct):
    """By hook name float32 activations of each pooling, prompt after prompt: [n_rows d_model], or of 'all' [n_tokens
    d_model]."""

    values: dict[str, list[bytes]]


Message = TypeVar("Message", bound=msgspec.Struct)


def _rows(numbers: bytes, n: int) -> np.ndarray:
    flat = np.frombuffer(numbers, dtype=np.float32)
    return flat.reshape(n, len(flat) // max(n, 1))


def encode(message: Any) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(payload: bytes, kind: type[Message]) -> Message:
    return msgspec.msgpack.decode(payload, type=kind)
