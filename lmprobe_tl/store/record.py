"""What an activation store says of itself: the manifest that all of its shards share, and the record in each shard.

manifest.json                  what was extracted from what, written first; see StoreManifest
shard-00000.safetensors ...    prompts k*i to k*(i+1), tensors '<pooling>/<hook name>', and a ShardRecord as metadata
index.json                     the ShardRecords of all shards, written last: a store with an index is complete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lmprobe_tl.checked_record import Record, require
from lmprobe_tl.errors import LmprobeError, StoreError
from lmprobe_tl.files import canonical_json
from lmprobe_tl.probe_spec import ModelRecord, Normalization, TokenizerRecord

MANIFEST, INDEX = "manifest.json", "index.json"
FORMAT = "lmprobe_tl.activation_store"
FORMAT_VERSION = 1
LENGTHS, DIGESTS, TOKENS, TOKEN_COUNTS = "lengths", "digests", "tokens", "token_counts"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class StoreManifest(Record):
    """All that decides what stands in a store. Activations are the model's own, not centred.

    prompts_per_shard: shard i holds the prompts from i * prompts_per_shard on. weights_sha256: of the model's parameters and
    buffers. bos_id, eos_ids: what the mask rules and pooling 'eos' went by. max_tokens_per_batch, batch_size: on which the
    last digits depend. keeps_tokens: whether token ids, and so the text, can be read from the store. versions: of the
    software that began the store, the one thing here that may differ when it is continued.
    """

    n_prompts: int
    prompts_per_shard: int
    hook_points: tuple[str, ...]
    poolings: tuple[str, ...]
    dtype: StoreDtype
    include_bos: bool
    keeps_tokens: bool
    max_length: int | None
    truncation: Literal["left", "right"] | None
    max_tokens_per_batch: int
    batch_size: int | None
    model: ModelRecord
    model_dtype: str
    weights_sha256: str
    d_model: int
    n_layers: int
    normalization: Normalization
    tokenizer: TokenizerRecord
    bos_id: int | None
    eos_ids: tuple[int, ...]
    versions: Mapping[str, str]

    def _validate(self) -> None:
        for name in ("n_prompts", "prompts_per_shard", "max_tokens_per_batch", "d_model", "n_layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("hook_points", "poolings"):
            names = getattr(self, name)
            require(bool(names) and len(set(names)) == len(names), name, names, "distinct names, at least one")

    @property
    def n_shards(self) -> int:
        return -(-self.n_prompts // self.prompts_per_shard)

    def prompts_of(self, shard: int) -> range:
        start = shard * self.prompts_per_shard
        return range(start, min(start + self.prompts_per_shard, self.n_prompts))

    def differences(self, other: StoreManifest) -> list[str]:
        """What differs from another manifest, apart from software versions: 'dtype: float16, not float32'."""
        mine, others = self.to_dict(), other.to_dict()
        return [
            f"{name}: {_shown(mine[name])}, not {_shown(others[name])}"
            for name in mine
            if name != "versions" and mine[name] != others[name]
        ]

    def to_json(self) -> str:
        return canonical_json({"format": FORMAT, "format_version": FORMAT_VERSION, "manifest": self.to_dict()})


@dataclass(frozen=True)
class ShardRecord(Record):
    """One shard: its prompts, how many of their tokens count, and checksums.

    tokens_sha256: of the digests of all of its rows of token ids. sha256: by tensor name, of the tensor's bytes.
    """

    start: int
    stop: int
    n_tokens: int
    tokens_sha256: str
    sha256: Mapping[str, str]


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def read_manifest(folder: Path) -> StoreManifest:
    """StoreError where there is none, or none that can be read."""
    document = read_json(folder / MANIFEST)
    if document.get("format") != FORMAT:
        raise StoreError(f"{str(folder / MANIFEST)!r} is no manifest of an activation store; expected format {FORMAT!r}.")
    if document.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{str(folder)!r} has format version {document.get('format_version')!r}; this lmprobe_tl reads "
            f"{FORMAT_VERSION}. Use the version that wrote it, or extract again."
        )
    return parsed(StoreManifest, document.get("manifest"), folder / MANIFEST)


def read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{str(path.parent)!r} is no activation store: it has no {path.name}.") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{str(path)!r} is damaged ({error}). Extract again into another folder.") from error
    return document if isinstance(document, dict) else {}


def parsed(record: type[Any], data: Any, path: Path) -> Any:
    try:
        return record.from_dict(data)
    except LmprobeError as error:
        raise StoreError(f"{str(path)!r} is damaged: {error} Extract again into another folder.") from error


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- checksums ---------------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def tensor_names(manifest: StoreManifest) -> Iterator[str]:
    """Names of a shard's tensors of activations."""
    for pooling in manifest.poolings:
        for hook_name in manifest.hook_points:
            yield f"{pooling}/{hook_name}"
