"""Prompts to an activation store: shard by shard, in any number of processes, and again from where it stopped."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.batch_pooling import Strategy, activation_poolings
from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.extraction import extract_poolings
from lmprobe_tl.files import TEMPORARY_SUFFIX, canonical_json, write_atomically
from lmprobe_tl.hook_points import (
    HookPoints,
    end_of_sequence_ids,
    layer_count,
    load_model,
    model_record,
    normalization,
    resolve_hook_points,
    width,
)
from lmprobe_tl.provenance import package_versions
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
    read_manifest,
    read_shard_record,
    shard_path,
    tensor_sha256,
)
from lmprobe_tl.tokens import (
    MAX_TOKENS_PER_BATCH,
    Prompt,
    Truncation,
    bos_id,
    check_batching,
    check_prompts,
    counted_lengths,
    length_limit,
    row_digest,
    tokenize_prompts,
    tokenizer_record,
)
from lmprobe_tl.weights_fingerprint import weights_sha256

SHARD_BYTES = 32 * 2**20  # of a default shard: held in memory while it is made, lost when the process is killed
_PROMPTS_PER_SHARD = range(64, 4097)  # by default; few would waste padding, many would lose much
_SAMPLED_PROMPTS = 256


def extract_to_store(
    model: Any,
    prompts: Sequence[Prompt],
    path: str | Path,
    hook_points: HookPoints = "all",
    pooling: Strategy | Sequence[Strategy] = "last_token",
    *,
    dtype: StoreDtype = "float32",
    shard: tuple[int, int] | None = None,
    keep_tokens: bool = False,
    prompts_per_shard: int | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    include_bos: bool = False,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
) -> ActivationStore:
    """Write the activations of the prompts to the folder `path`, and return it opened for reading.

    Where the folder holds a part of the same extraction, this goes on with what is missing, and the result is what an
    uninterrupted run writes, bit for bit on the same machine. Memory stays that of a shard, whatever the number of prompts.

    prompts: a sequence, which may load its items lazily. hook_points, pooling (names only), include_bos and the batching: as
    in `extract_activations`. dtype: of the values on disk; one that float16 cannot hold is an error.
    shard: (i, n) computes every n-th shard from the i-th on, for n processes (i from 0). They may share the folder; where
    they cannot, `merge_stores` puts their folders together. keep_tokens: store the token ids, which a tokenizer turns back
    into the text; without it the store holds no text.

    Raises StoreError for a folder that holds something else, saying what differs, and InputError for what cannot be used.

    >>> store = extract_to_store(model, prompts, "activations", hook_points="all", pooling=["mean", "all"])  # doctest: +SKIP
    """
    model, folder = load_model(model), Path(path)
    names = resolve_hook_points(model, hook_points)
    poolings = _named_poolings(pooling)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected {', '.join(map(repr, DTYPES))}.")
    prompts = _checked_sequence(prompts)
    worker, n_workers = _checked_shard(shard)
    _refuse_other_hooks(model)
    # What cannot be is found before a manifest with it lies in the folder.
    check_batching(batch_size, max_tokens_per_batch)
    length_limit(model, max_length)
    tokenizing: dict[str, Any] = {"prepend_bos": prepend_bos, "max_length": max_length, "truncation": truncation}
    existing = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if prompts_per_shard is None and existing is not None:
        prompts_per_shard = existing.prompts_per_shard
    if prompts_per_shard is None:
        prompts_per_shard = _default_prompts_per_shard(
            model, prompts, len(names), poolings, dtype, n_workers, include_bos, tokenizing
        )
    manifest = StoreManifest(
        n_prompts=len(prompts),
        prompts_per_shard=prompts_per_shard,
        hook_points=names,
        poolings=poolings,
        dtype=dtype,
        include_bos=include_bos,
        keeps_tokens=keep_tokens,
        max_length=max_length,
        truncation=truncation,
        max_tokens_per_batch=max_tokens_per_batch,
        batch_size=batch_size,
        model=model_record(model),
        model_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        weights_sha256=weights_sha256(model),
        d_model=width(model),
        n_layers=layer_count(model),
        normalization=normalization(model),
        tokenizer=tokenizer_record(model, prepend_bos),
        bos_id=bos_id(model),
        eos_ids=end_of_sequence_ids(model),
        versions=package_versions(),
    )
    claim(folder, manifest, existing)
    own = range(worker, manifest.n_shards, n_workers)
    _Writer(model, prompts, folder, manifest, tokenizing).write(own, progress)
    return ActivationStore(folder)


def _checked_sequence(prompts: Any) -> Sequence[Prompt]:
    """The prompts, unread, if they come with a length and an order."""
    is_sequence = hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__") and not isinstance(prompts, (str, Mapping))
    # Arrays and pandas' Series are in memory already; a Series' numbers are labels, not places.
    if not is_sequence or hasattr(prompts, "tolist") or not len(prompts):
        prompts = check_prompts(prompts)
        if not is_sequence:
            raise InputError(f"prompts is a {type(prompts).__name__}; a store needs a sequence, with a length and an order.")
    return prompts


def _named_poolings(pooling: Strategy | Sequence[Strategy]) -> tuple[str, ...]:
    listed: list[Strategy] = [pooling] if isinstance(pooling, str) or callable(pooling) else list(pooling)
    for one in listed:
        if callable(one):
            raise InputError(
                f"pooling {getattr(one, '__name__', one)!r} is a function, and a store cannot tell one from another; use a "
                "named pooling, or 'all' and pool when reading."
            )
    return tuple(activation_poolings(listed))


def _checked_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        return 0, 1
    whole = isinstance(shard, (tuple, list)) and len(shard) == 2 and all(type(part) is int for part in shard)
    if not whole or not 0 <= shard[0] < shard[1]:
        raise InputError(
            f"shard is {shard!r}; expected (i, n) with i from 0 to n - 1, such as (0, 8) for the first of eight."
        )
    return shard[0], shard[1]


def _refuse_other_hooks(model: Any) -> None:
    """What a hook does to the activations is in no fingerprint."""
    hooked = [name for name, point in model.hook_dict.items() if getattr(point, "fwd_hooks", None)]
    if hooked:
        raise InputError(
            f"the model has hooks of others on {hooked[0]!r}, which may change activations without the store knowing; "
            "remove them (model.reset_hooks()) or use extract_activations."
        )


def _default_prompts_per_shard(
    model: Any,
    prompts: Sequence[Prompt],
    n_hook_points: int,
    poolings: Sequence[str],
    dtype: StoreDtype,
    n_workers: int,
    include_bos: bool,
    tokenizing: dict[str, Any],
) -> int:
    vectors = float(sum(pooling != "all" for pooling in poolings))
    if "all" in poolings:
        sample = [prompts[index] for index in range(min(len(prompts), _SAMPLED_PROMPTS))]
        vectors += float(np.mean(counted_lengths(tokenize_prompts(model, sample, **tokenizing), bos_id(model), include_bos)))
    per_prompt = max(vectors, 1.0) * n_hook_points * width(model) * DTYPES[dtype].itemsize
    fitting = int(np.clip(SHARD_BYTES / per_prompt, _PROMPTS_PER_SHARD[0], _PROMPTS_PER_SHARD[-1]))
    return min(fitting, -(-len(prompts) // n_workers))


def claim(folder: Path, manifest: StoreManifest, existing: StoreManifest | None) -> None:
    """Write the manifest of a new store, or make sure that the folder holds a part of this very extraction."""
    if existing is None:
        occupied = folder.exists() and (not folder.is_dir() or any(item.name[0] != "." for item in folder.iterdir()))
        if occupied and not (folder / MANIFEST).exists():  # with a manifest, another process was quicker
            raise StoreError(f"{str(folder)!r} exists and is no activation store; choose a new or an empty folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(folder / MANIFEST, manifest.to_json().encode())
        existing = read_manifest(folder)
    differences = manifest.differences(existing)
    if differences:
        raise StoreError(
            f"{str(folder)!r} holds another extraction; wanted is {'; '.join(differences)}. Choose another folder, or "
            "delete this one."
        )


def _write_new(path: Path, payload: bytes) -> None:
    """Write a file that another process may be writing too: the first one wins."""
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with replaced_meanwhile(path):
            write_atomically(temporary, payload)
            os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


class _Writer:
    """Computes shards of a store whose manifest is in place."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], folder: Path, manifest: StoreManifest, tokenizing: dict[str, Any]
    ) -> None:
        self._model, self._prompts, self._folder, self._manifest = model, prompts, folder, manifest
        self._tokenizing = tokenizing

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
        return tokenize_prompts(self._model, prompts, first=members.start, **self._tokenizing)

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
            self._model,
            rows,
            manifest.hook_points,
            [f"activation:{name}" if name != "all" else name for name in manifest.poolings],
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
