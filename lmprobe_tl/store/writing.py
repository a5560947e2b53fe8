"""Prompts to an activation store: shard by shard, in any number of processes, and again from where it stopped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmprobe_tl.activation_source import Engine, activation_source, chosen_engine
from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.batch_pooling import Strategy, activation_poolings
from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.files import TEMPORARY_SUFFIX, write_atomically
from lmprobe_tl.hook_points import (
    HookPoints,
    end_of_sequence_ids,
    hooked_by_others,
    layer_count,
    model_record,
    normalization,
    width,
)
from lmprobe_tl.provenance import package_versions
from lmprobe_tl.store.record import (
    DTYPES,
    MANIFEST,
    StoreDtype,
    StoreManifest,
    read_manifest,
)
from lmprobe_tl.store.shards import ShardWriter, replaced_meanwhile
from lmprobe_tl.tokens import (
    Prompt,
    Truncation,
    bos_id,
    check_prompts,
    counted_lengths,
    length_limit,
    tokenize_prompts,
    tokenizer_record,
)

# Of a default shard, which is held in memory while it is made, as tensors and as bytes, and lost when the process is killed.
SHARD_BYTES = 2 * 2**20
_MOST_PROMPTS_PER_SHARD = 1024
_FEWEST_PROMPTS_PER_SHARD = 128
_BATCHES_PER_SHARD = 4  # at least, as fewer would be padded more
_SAMPLED_PROMPTS = 256


def extract_to_store(
    model: Any,
    prompts: Sequence[Prompt],
    path: str | Path,
    hook_points: HookPoints = "all",
    pooling: Strategy | Sequence[Strategy] = "last_token",
    *,
    engine: Engine | None = None,
    dtype: StoreDtype = "float32",
    shard: tuple[int, int] | None = None,
    keep_tokens: bool = False,
    prompts_per_shard: int | None = None,
    max_tokens_per_batch: int | None = None,
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

    engine: as in `extract_activations`. A store goes on with the engine that began it.

    Raises StoreError for a folder that holds something else, saying what differs, and InputError for what cannot be used.

    >>> store = extract_to_store(model, prompts, "activations", hook_points="all", pooling=["mean", "all"])  # doctest: +SKIP
    """
    folder, poolings = Path(path), _named_poolings(pooling)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected {', '.join(map(repr, DTYPES))}.")
    prompts = _checked_sequence(prompts)
    worker, n_workers = _checked_shard(shard)
    existing = read_manifest(folder) if (folder / MANIFEST).exists() else None
    _refuse_other_engine(folder, existing, chosen_engine(model, engine))
    with activation_source(model, hook_points, engine, max_tokens=max_tokens_per_batch, max_rows=batch_size) as source:
        model = source.model
        _refuse_other_hooks(model)
        # What cannot be is found before a manifest with it lies in the folder.
        length_limit(model, max_length)
        max_tokens_per_batch, batch_size = source.batching(max_tokens_per_batch, batch_size)
        tokenizing: dict[str, Any] = {"prepend_bos": prepend_bos, "max_length": max_length, "truncation": truncation}
        if prompts_per_shard is None and existing is not None:
            prompts_per_shard = existing.prompts_per_shard
        if prompts_per_shard is None:
            n_points = len(source.hook_names)
            prompts_per_shard = _default_prompts_per_shard(
                model, prompts, n_points, poolings, dtype, n_workers, include_bos, max_tokens_per_batch, tokenizing
            )
        manifest = StoreManifest(
            n_prompts=len(prompts),
            prompts_per_shard=prompts_per_shard,
            hook_points=source.hook_names,
            poolings=poolings,
            dtype=dtype,
            include_bos=include_bos,
            keeps_tokens=keep_tokens,
            max_length=max_length,
            truncation=truncation,
            max_tokens_per_batch=max_tokens_per_batch,
            batch_size=batch_size,
            model=model_record(model),
            model_dtype=source.dtype,
            weights_sha256=source.weights_sha256(),
            d_model=width(model),
            n_layers=layer_count(model),
            normalization=normalization(model),
            tokenizer=tokenizer_record(model, prepend_bos),
            bos_id=bos_id(model),
            eos_ids=end_of_sequence_ids(model),
            versions={**package_versions(), **source.versions()},
            engine=source.engine,
        )
        claim(folder, manifest, existing)
        own = range(worker, manifest.n_shards, n_workers)
        ShardWriter(source, prompts, folder, manifest, tokenizing).write(own, progress)
    return ActivationStore(folder)


def _refuse_other_engine(folder: Path, existing: StoreManifest | None, engine: Engine) -> None:
    """Before an engine is started, which takes long."""
    if existing is not None and existing.engine != engine:
        raise StoreError(
            f"{str(folder)!r} was begun with engine {existing.engine!r}, and cannot go on with {engine!r}, whose kernels "
            f"round in another way. Pass engine={existing.engine!r}, or choose another folder."
        )


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
    hooked = hooked_by_others(model)
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
    max_tokens_per_batch: int,
    tokenizing: dict[str, Any],
) -> int:
    sample = [prompts[index] for index in range(min(len(prompts), _SAMPLED_PROMPTS))]
    rows = tokenize_prompts(model, sample, **tokenizing)
    vectors = float(sum(pooling != "all" for pooling in poolings))
    if "all" in poolings:
        vectors += float(np.mean(counted_lengths(rows, bos_id(model), include_bos)))
    per_prompt = max(vectors, 1.0) * n_hook_points * width(model) * DTYPES[dtype].itemsize
    busy = _BATCHES_PER_SHARD * max_tokens_per_batch / max(1.0, float(np.mean([len(row) for row in rows])))
    fewest = max(_FEWEST_PROMPTS_PER_SHARD, int(busy))
    fitting = int(np.clip(SHARD_BYTES / per_prompt, fewest, max(fewest, _MOST_PROMPTS_PER_SHARD)))
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
