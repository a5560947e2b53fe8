"""Activations on disk: safetensors shards that are memory-mapped, checksummed, and bigger than memory if need be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.store.record import (
    DIGESTS,
    DTYPES,
    INDEX,
    LENGTHS,
    TOKEN_COUNTS,
    TOKENS,
    ShardRecord,
    StoreManifest,
    read_index,
    read_manifest,
    shard_path,
    tensor_sha256,
)

StoredHookPoints = int | str | Sequence[int | str] | None


@dataclass(frozen=True)
class StoredChunk:
    """Activations of some prompts that follow each other: `values` [n_rows n_features] float32, hook points side by side;
    `prompts` [n_rows] int64, which prompt each row belongs to."""

    values: Tensor
    prompts: np.ndarray


class ActivationStore:
    """A folder of activations that `extract_to_store` wrote, opened for reading.

    Nothing is read before it is asked for; what is read is mapped from the disk, and compared with its checksum the first
    time. Values come as float32, prompts in the order in which they were given.

    manifest: what was extracted from what. Raises StoreError for a folder that is no store.

    >>> store = ActivationStore("activations")  # doctest: +SKIP
    >>> store.values(6, "mean").shape  # doctest: +SKIP
    torch.Size([100000, 768])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: StoreManifest = read_manifest(self.path)
        self._index: list[ShardRecord] | None = None
        self._verified: set[tuple[int, str]] = set()
        self._widths: dict[str, int] = {}  # of the tensors of activations

    def __repr__(self) -> str:
        missing = len(self.missing_shards)
        state = f"{missing} of {self.manifest.n_shards} shards missing" if missing else "complete"
        return (
            f"ActivationStore({str(self.path)!r}: {self.n_prompts} prompts, {len(self.hook_points)} hook points, poolings "
            f"{', '.join(self.poolings)}, {self.manifest.dtype}; {state})"
        )

    @property
    def n_prompts(self) -> int:
        return self.manifest.n_prompts

    @property
    def hook_points(self) -> tuple[str, ...]:
        return self.manifest.hook_points

    @property
    def poolings(self) -> tuple[str, ...]:
        return self.manifest.poolings

    @property
    def missing_shards(self) -> list[int]:
        """Shards that are yet to be written; none of them, and the store can be read."""
        if (self.path / INDEX).is_file():
            return []
        return [shard for shard in range(self.manifest.n_shards) if not shard_path(self.path, shard).is_file()]

    @property
    def n_tokens(self) -> int:
        """How many tokens count in all prompts together."""
        return sum(record.n_tokens for record in self.records)

    @property
    def records(self) -> list[ShardRecord]:
        """What the index says of each shard. StoreError where the store is not complete."""
        if self._index is None:
            if not (self.path / INDEX).is_file():
                missing = self.missing_shards
                detail = f"{len(missing)} of {self.manifest.n_shards} shards are missing" if missing else "it has no index"
                raise StoreError(
                    f"{str(self.path)!r} is not complete: {detail}. Run the same extraction again, which goes on where it "
                    "stopped, or merge_stores where its parts were written apart."
                )
            self._index = read_index(self.path, self.manifest)
        return self._index

    # --- reading ---

    def chunks(
        self, hook_points: StoredHookPoints = None, pooling: str | None = None, *, max_rows: int | None = None
    ) -> Iterator[StoredChunk]:
        """All rows in order, a shard (or `max_rows` rows) at a time; with pooling 'all' a row is a token.

        hook_points: layers or names, None for all of the store; pooling: may be left out where the store has one.
        """
        names, pooling = self.hook_names(hook_points), self.check_pooling(pooling)
        if max_rows is not None and (not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 1):
            raise InputError(f"max_rows is {max_rows!r}; expected None (a shard at a time) or an integer of at least 1.")
        for shard in range(len(self.records)):
            yield from self.shard_chunks(shard, names, pooling, max_rows=max_rows)

    def shard_chunks(
        self, shard: int, hook_points: Sequence[str], pooling: str, *, max_rows: int | None = None
    ) -> Iterator[StoredChunk]:
        """As `chunks`, of one shard."""
        prompts = np.array(self.manifest.prompts_of(shard), dtype=np.int64)
        if pooling == "all":
            prompts = np.repeat(prompts, self._tensor(shard, LENGTHS).numpy())
        tensors = [self._tensor(shard, f"{pooling}/{name}") for name in hook_points]
        step = max_rows or max(1, len(prompts))
        for start in range(0, len(prompts), step):
            values = torch.cat([tensor[start : start + step].float() for tensor in tensors], dim=1)
            yield StoredChunk(values, prompts[start : start + step])

    def values(self, hook_points: StoredHookPoints = None, pooling: str | None = None) -> Tensor:
        """All rows at once, in memory: [n_prompts n_features], or [n_tokens n_features] with pooling 'all'."""
        names, pooling = self.hook_names(hook_points), self.check_pooling(pooling)
        n_rows = int(self.lengths().sum()) if pooling == "all" else self.n_prompts
        result, done = torch.empty(0), 0
        for chunk in self.chunks(names, pooling):
            if not done:
                result = torch.empty(n_rows, chunk.values.shape[1])
            result[done : done + len(chunk.values)] = chunk.values
            done += len(chunk.values)
        return result

    def lengths(self) -> np.ndarray:
        """How many tokens of each prompt count, [n_prompts] int64; with pooling 'all', so many rows it has."""
        return self._gathered(LENGTHS).astype(np.int64)

    def digests(self) -> np.ndarray:
        """A digest of each prompt's token ids, [n_prompts 16] uint8, as `row_digest` makes it."""
        return self._gathered(DIGESTS)

    def tokens(self) -> list[list[int]]:
        """Token ids of each prompt, BOS included. InputError where they were not kept."""
        if not self.manifest.keeps_tokens:
            raise InputError("this store does not hold the token ids; extract with keep_tokens=True to have them.")
        rows: list[list[int]] = []
        for shard in range(len(self.records)):
            ends = self._tensor(shard, TOKEN_COUNTS).numpy().cumsum()
            rows += [row.tolist() for row in np.split(self._tensor(shard, TOKENS).numpy(), ends[:-1])]
        return rows

    def _gathered(self, name: str) -> np.ndarray:
        return np.concatenate([self._tensor(shard, name).numpy() for shard in range(len(self.records))])

    def verify(self) -> None:
        """Compare every tensor with its checksum; StoreError names the first that differs."""
        self._verified.clear()
        for shard, record in enumerate(self.records):
            for name in record.sha256:
                self._tensor(shard, name)

    def _tensor(self, shard: int, name: str) -> Tensor:
        path = shard_path(self.path, shard)
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{str(path)!r} cannot be read: {error}. {_AGAIN}") from error
        if (shard, name) not in self._verified:
            record = self.records[shard]
            if tensor_sha256(tensor) != record.sha256[name] or not self._fits(tensor, record, name):
                raise StoreError(f"{str(path)!r}: tensor {name!r} is not what was written there. {_AGAIN}")
            self._verified.add((shard, name))
        return tensor

    def _fits(self, tensor: Tensor, record: ShardRecord, name: str) -> bool:
        """Whether type and shape, which the checksum does not see, are those of the store."""
        found, n_prompts = (tensor.dtype, *tensor.shape), record.n_prompts
        if name == LENGTHS:
            whole = found == (torch.int32, n_prompts)
            return whole and int(tensor.min()) >= 1 and int(tensor.sum()) == record.n_tokens
        if name in (TOKENS, TOKEN_COUNTS):
            return found == (torch.int32, tensor.numel() if name == TOKENS else n_prompts)
        if name == DIGESTS:
            return found == (torch.uint8, n_prompts, 16)
        rows = record.n_tokens if name.startswith("all/") else n_prompts
        width = self._widths.setdefault(name, tensor.shape[-1]) if tensor.ndim else 0
        return found == (DTYPES[self.manifest.dtype], rows, width)

    # --- names ---

    def hook_names(self, hook_points: StoredHookPoints = None) -> list[str]:
        """Full names of the wanted hook points; InputError for one that the store does not have."""
        wanted = self.hook_points if hook_points is None else hook_points
        wanted = wanted.tolist() if hasattr(wanted, "tolist") else wanted  # numpy and torch
        names = [self._full_name(one) for one in (wanted if isinstance(wanted, (list, tuple, range)) else [wanted])]
        unknown = [name for name in names if name not in self.hook_points]
        if unknown or not names:
            which = repr(unknown[0]) if unknown else "in an empty list"
            raise InputError(f"this store has no hook point {which}; it has {', '.join(self.hook_points)}.")
        return names

    def _full_name(self, hook_point: Any) -> str:
        hook_point = hook_point.item() if hasattr(hook_point, "item") else hook_point
        if isinstance(hook_point, str):
            return hook_point
        if not isinstance(hook_point, int) or isinstance(hook_point, bool):
            raise InputError(f"{hook_point!r} is no hook point; expected a layer (int), a hook name, or a list of these.")
        layers = self.manifest.n_layers
        return f"blocks.{hook_point % layers if -layers <= hook_point < layers else hook_point}.hook_resid_post"

    def check_complete(self) -> None:
        """StoreError where shards are missing, or the index is not that of this store."""
        _ = self.records

    def check_pooling(self, pooling: str | None) -> str:
        """The pooling, or the store's only one; InputError for one that it does not have."""
        if pooling is None and len(self.poolings) == 1:
            return self.poolings[0]
        if pooling not in self.poolings:
            raise InputError(f"pooling is {pooling!r}; this store has {', '.join(self.poolings)}.")
        return pooling


_AGAIN = "Delete this file and index.json, and run the same extraction again: it computes what is missing."
