"""What the scores of an engine are kept by: its steps and its cache, as plain records that know nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NewRequest:
    """A request on its first step, or one that begins anew after it was pushed out of the KV cache.

    n_cached: positions that the prefix cache serves. options: what the client asked of the worker (`extra_args`).
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    n_cached: int
    blocks: Sequence[Sequence[int]]
    options: Mapping[str, Any]
    eos_token_id: int | None


@dataclass(frozen=True)
class Step:
    """What the scheduler asks of a worker. counts, starts: new tokens of each request, and the position of the first.

    resumed: blocks and cached positions of requests that come back. grown: new blocks. copies: (from, to) of blocks.
    """

    n_tokens: int
    counts: Mapping[str, int]
    starts: Mapping[str, int]
    new: Sequence[NewRequest]
    resumed: Sequence[tuple[str, Sequence[Sequence[int]], int]]
    grown: Sequence[tuple[str, Sequence[Sequence[int]]]]
    finished: Sequence[str]
    copies: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class CacheLayout:
    """The group of layers whose blocks hold every token of a request as long as it runs."""

    group: int
    block_size: int
    n_blocks: int
