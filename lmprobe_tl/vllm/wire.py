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
        return tuple(np.frombuffer(part, dtype=np.float32).reshape(self.n, -1) for part in (self.logits, self.values))  # type: ignore[return-value]


class Taken(msgspec.Struct):
    """For each request that was asked for, the scores of its completions by index."""

    answers: list[dict[int, Scores]]


class State(msgspec.Struct):
    """Tokens scored and unknown, requests with an alarm; open requests, finished ones nobody fetched, pages held; and some
    scores of the first step."""

    n_scored: int
    n_unknown: int
    n_alarms: int
    n_open: int
    n_finished: int
    n_pages: int
    first_scores: list[float]


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


def encode(message: Any) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(payload: bytes, kind: type[Message]) -> Message:
    return msgspec.msgpack.decode(payload, type=kind)
