"""Shards of an activation store as they are computed, written and, once all are there, listed in the index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.activation_source import EngineSource, LensSource
from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.extraction import extract_poolings
from lmprobe_tl.files import TEMPORARY_SUFFIX, canonical_json, write_atomically
from lmprobe_tl.store.record import (
    DIGESTS,
    DTYPES,
    INDEX,
    LENGTHS,
    MANIFEST,
    METADATA_KEY,
    TOKEN_COUNTS,
    TOKENS,
    ShardRecord,
    StoreDtype,
    StoreIndex,
    StoreManifest,
    file_sha256,
    read_shard_record,
    shard_path,
    tensor_sha256,
)
from lmprobe_tl.tokens import Prompt, counted_lengths, row_digest, tokenize_prompts


@contextmanager
def replaced_meanwhile(path: Path) -> Iterator[None]:
    """Bear the loss of a temporary file whose target is there.

    Another process that completes the store meanwhile takes the temporary files of this one for leftovers, and removes them.
    """
    try:
        yield
    except FileNotFoundError:
        if not path.exists():
            raise


class ShardWriter:
    """Computes shards of a store whose manifest is in place."""

    def __init__(
        self,
        source: LensSource | EngineSource,
        prompts: Sequence[Prompt],
        folder: Path,
        manifest: StoreManifest,
        tokenizing: dict[str, Any],
    ) -> None:
        self._source, self._prompts, self._folder, self._manifest = source, prompts, folder, manifest
        self._tokenizing = tokenizing

    @cached_property
    def _prompts_sha256(self) -> str:
        """Of the whole list, so that shards of two lists are told apart where no process sees the prompts of all."""
        digest = hashlib.sha256()
        for index in range(self._manifest.n_prompts):
            prompt = self._prompts[index]
            known = prompt if isinstance(prompt, str) else canonical_json(getattr(prompt, "tolist", lambda p=prompt: p)())
            text = known.encode("utf-8", "surrogatepass")
            digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()

    def write(self, shards: range, progress: bool | None) -> None:
        """Write those of the shards that are missing, and the index once no shard of the store is."""
        n_prompts = sum(len(self._manifest.prompts_of(shard)) for shard in shards)
        hidden = None if progress is None else not progress
        with tqdm(total=n_prompts, desc="activations", unit="prompt", disable=hidden, leave=False) as bar:
            for shard, rows in self._tokenised(shards):
                if not self._is_done(shard, rows):
                    self._compute(shard, rows)
                bar.update(len(rows))
        if ActivationStore(self._folder).missing_shards:
            return
        if not (self._folder / INDEX).exists():
            others = [shard for shard in range(self._manifest.n_shards) if shard not in shards]
            for shard, rows in self._tokenised(others):
                self._is_done(shard, rows)  # raises where another process was given other prompts
            write_index(self._folder, self._manifest)
        remove_leftovers(self._folder)

    def _tokenised(self, shards: Iterable[int]) -> Iterator[tuple[int, list[list[int]]]]:
        """Token ids of each shard's prompts; those of the next are made while the model runs on the last."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for shard in shards:
                following = pool.submit(self._rows, shard)
                if ahead is not None:
                    yield ahead[0], ahead[1].result()
                ahead = shard, following
            if ahead is not None:
                yield ahead[0], ahead[1].result()

    def _rows(self, shard: int) -> list[list[int]]:
        members = self._manifest.prompts_of(shard)
        prompts = [self._prompts[index] for index in members]
        return tokenize_prompts(self._source.model, prompts, first=members.start, **self._tokenizing)

    def _is_done(self, shard: int, rows: list[list[int]]) -> bool:
        path = shard_path(self._folder, shard)
        if not path.exists():
            return False
        if read_shard_record(self._folder, shard, self._manifest).tokens_sha256 != _tokens_sha256(rows):
            members = self._manifest.prompts_of(shard)
            raise StoreError(
                f"{str(path)!r} holds other prompts: their tokens differ from those of prompts {members[0]} to "
                f"{members[-1]}. Choose another folder, or delete the shards of the prompts that changed, and index.json."
            )
        return True

    def _compute(self, shard: int, rows: list[list[int]]) -> None:
        manifest, members = self._manifest, self._manifest.prompts_of(shard)
        found = extract_poolings(
            self._source.model,
            rows,
            manifest.hook_points,
            [f"activation:{name}" if name != "all" else name for name in manifest.poolings],
            source=self._source,
            include_bos=manifest.include_bos,
            max_tokens_per_batch=manifest.max_tokens_per_batch,
            batch_size=manifest.batch_size,
            progress=False,
            first=members.start,
        )
        counts = counted_lengths(rows, manifest.bos_id, manifest.include_bos)
        digests = np.frombuffer(b"".join(map(row_digest, rows)), dtype=np.uint8).reshape(-1, 16)
        tensors = {LENGTHS: torch.tensor(counts, dtype=torch.int32), DIGESTS: torch.from_numpy(digests.copy())}
        if manifest.keeps_tokens:
            tensors[TOKENS] = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
            tensors[TOKEN_COUNTS] = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        for pooling, one in found.items():
            owners = np.repeat(members, counts) if pooling == "all" else np.array(members)
            for hook_name, values in one.values.items():
                tensors[f"{pooling}/{hook_name}"] = _as_stored(values, manifest.dtype, owners, hook_name)
        record = ShardRecord(
            start=members.start,
            stop=members.stop,
            n_tokens=sum(counts),
            tokens_sha256=_tokens_sha256(rows),
            prompts_sha256=self._prompts_sha256,
            sha256={name: tensor_sha256(tensor) for name, tensor in tensors.items()},
        )
        payload = safetensors.torch.save(tensors, {METADATA_KEY: canonical_json(record.to_dict())})
        with replaced_meanwhile(shard_path(self._folder, shard)):
            write_atomically(shard_path(self._folder, shard), payload)


def _as_stored(values: Tensor, dtype: StoreDtype, owners: np.ndarray, hook_name: str) -> Tensor:
    """owners: the prompt that each row of values [n d_model] belongs to."""
    stored = values.to(DTYPES[dtype])
    overflown = torch.isinf(stored).any(dim=1)
    if overflown.any():
        row = int(overflown.nonzero()[0])
        raise InputError(
            f"prompt {owners[row]} has an activation of {values[row].abs().max():.6g} at {hook_name!r}, more than {dtype} "
            f"can hold ({torch.finfo(stored.dtype).max:.6g}); use dtype='bfloat16' or 'float32'."
        )
    return stored


def _tokens_sha256(rows: list[list[int]]) -> str:
    return hashlib.sha256(b"".join(map(row_digest, rows))).hexdigest()


def write_index(folder: Path, manifest: StoreManifest) -> None:
    """Complete a store of which every shard is there; StoreError where one is not what its number says."""
    records = tuple(read_shard_record(folder, shard, manifest) for shard in range(manifest.n_shards))
    index = StoreIndex(file_sha256(folder / MANIFEST), records)
    with replaced_meanwhile(folder / INDEX):
        write_atomically(folder / INDEX, index.to_json().encode())


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that were killed."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)
