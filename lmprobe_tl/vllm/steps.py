"""What the scores of an engine are kept by: its steps and its cache, as plain records that know nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NewRequest:
    """A request on its first step, or one that begins anew after it was pushed out of the KV cache.

    n_cached: positions that the prefix cache serves. options: what the client asked of the worker (`extra_args`). n_tokens:
    as in `ReturningRequest`.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    n_cached: int
    blocks: Sequence[Sequence[int]]
    options: Mapping[str, Any]
    eos_token_id: int | None
    n_tokens: int | None = None


@dataclass(frozen=True)
class ReturningRequest:
    """A request that comes back after it was pushed out of the KV cache, with all its blocks anew.

    n_tokens: of its prompt and those generated so far, fewer than were computed where the engine has dropped some, in place
    of which it samples others; None where this is not told.
    """

    request_id: str
    blocks: Sequence[Sequence[int]]
    n_cached: int
    n_tokens: int | None = None


@dataclass(frozen=True)
class Step:
    """What the scheduler asks of a worker. counts, starts: new tokens of each request, and the position of the first.

    grown: new blocks of requests that go on. copies: (from, to) of blocks.
    """

    n_tokens: int
    counts: Mapping[str, int]
    starts: Mapping[str, int]
    new: Sequence[NewRequest]
    resumed: Sequence[ReturningRequest]
    grown: Sequence[tuple[str, Sequence[Sequence[int]]]]
    finished: Sequence[str]
    copies: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class CacheLayout:
    """The group of layers whose blocks hold every token of a request as long as it runs."""

    group: int
    block_size: int
    n_blocks: int
