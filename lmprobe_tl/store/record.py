"""What an activation store says of itself: the manifest that all of its shards share, and the record in each shard.

manifest.json                  what was extracted from what, written first; see StoreManifest
shard-00000.safetensors ...    prompts k*i to k*(i+1), tensors '<pooling>/<hook name>', and a ShardRecord as metadata
index.json                     the ShardRecords of all shards, written last: a store with an index is complete

A changed byte is found: manifest and index by the index's own checksums, tensors by those that the index lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmprobe_tl.checked_record import Record, require
from lmprobe_tl.errors import LmprobeError, StoreError
from lmprobe_tl.files import canonical_json
from lmprobe_tl.probe_spec import ModelRecord, Normalization, TokenizerRecord

MANIFEST, INDEX = "manifest.json", "index.json"
FORMAT = "lmprobe_tl.activation_store"
FORMAT_VERSION = 1
METADATA_KEY = "lmprobe_tl"  # of a ShardRecord in its file
LENGTHS, DIGESTS, TOKENS, TOKEN_COUNTS = "lengths", "digests", "tokens", "token_counts"
MAX_SHARDS = 1_000_000  # also what a hostile manifest can make a reader count to
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_ENGINE = "transformer_lens"  # of stores that do not name one

StoreDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class StoreManifest(Record):
    """All that decides what stands in a store. Activations are the model's own, not centred.

    prompts_per_shard: shard i holds the prompts from i * prompts_per_shard on. weights_sha256: of the model's parameters and
    buffers. bos_id, eos_ids: what the mask rules and pooling 'eos' went by. max_tokens_per_batch, batch_size: on which the
    last digits depend. keeps_tokens: whether token ids, and so the text, can be read from the store. versions: of the
    software that began the store, the one thing here that may differ when it is continued. engine: what ran the model; its
    kernels round in their own way. A store without that entry is TransformerLens', and stays so.
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
    engine: Literal["transformer_lens", "vllm"] = "transformer_lens"

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        if self.engine == _ENGINE:
            del found["engine"]
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return super().from_dict({"engine": _ENGINE, **data} if isinstance(data, Mapping) else data)

    def _validate(self) -> None:
        for name in ("n_prompts", "prompts_per_shard", "max_tokens_per_batch", "d_model", "n_layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("hook_points", "poolings"):
            names = getattr(self, name)
            require(bool(names) and len(set(names)) == len(names), name, names, "distinct names, at least one")
        least = -(-self.n_prompts // MAX_SHARDS)
        expected = f"at least {least}, for at most {MAX_SHARDS:,} shards"
        require(self.prompts_per_shard >= least, "prompts_per_shard", self.prompts_per_shard, expected)

    @property
    def n_shards(self) -> int:
        return -(-self.n_prompts // self.prompts_per_shard)

    def prompts_of(self, shard: int) -> range:
        start = shard * self.prompts_per_shard
        return range(start, min(start + self.prompts_per_shard, self.n_prompts))

    def differences(self, other: StoreManifest) -> list[str]:
        """What differs from another manifest, apart from software versions: 'dtype: float16, not float32'."""
        mine, others = ({"engine": one.engine} | _flat(one.to_dict()) for one in (self, other))
        return [
            f"{name}: {_difference(mine[name], others[name])}"
            for name in mine
            if not name.startswith("versions") and mine[name] != others[name]
        ]

    def tensor_names(self) -> set[str]:
        """Names of the tensors of each shard."""
        tokens = {TOKENS, TOKEN_COUNTS} if self.keeps_tokens else set()
        pooled = {f"{pooling}/{hook_name}" for pooling in self.poolings for hook_name in self.hook_points}
        return {LENGTHS, DIGESTS} | tokens | pooled

    def to_json(self) -> str:
        return canonical_json({"format": FORMAT, "format_version": FORMAT_VERSION, "manifest": self.to_dict()})


@dataclass(frozen=True)
class ShardRecord(Record):
    """One shard: its prompts, how many of their tokens count, and checksums.

    tokens_sha256: of the digests of all of its rows of token ids. prompts_sha256: of the whole list of prompts, as it was
    when this shard was written. sha256: by tensor name, of the tensor's bytes.
    """

    start: int
    stop: int
    n_tokens: int
    tokens_sha256: str
    prompts_sha256: str
    sha256: Mapping[str, str]

    @property
    def n_prompts(self) -> int:
        return self.stop - self.start

    def wrong_for(self, shard: int, manifest: StoreManifest) -> str | None:
        """Why this is not the record of the store's shard of that number, or None."""
        members = manifest.prompts_of(shard)
        if (self.start, self.stop) != (members.start, members.stop):
            return f"it holds prompts {self.start} to {self.stop - 1}, not {members.start} to {members.stop - 1}"
        unlike = sorted(manifest.tensor_names() ^ set(self.sha256))
        return f"tensor {unlike[0]!r} is missing or does not belong there" if unlike else None


@dataclass(frozen=True)
class StoreIndex(Record):
    """The records of all shards, and the manifest's checksum."""

    manifest_sha256: str
    shards: tuple[ShardRecord, ...]

    def to_json(self) -> str:
        content = self.to_dict()
        return canonical_json({"index": content, "sha256": text_sha256(canonical_json(content))})


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def read_manifest(folder: Path) -> StoreManifest:
    """StoreError where there is none, or none that can be read."""
    document = read_json(folder / MANIFEST)
    if document.get("format") != FORMAT:
        raise StoreError(
            f"{str(folder / MANIFEST)!r} is no manifest of an activation store; expected format {FORMAT!r}. Choose another "
            "folder."
        )
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
    except OSError as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{str(path)!r} is damaged ({error}). {_remedy(path)}") from error
    return document if isinstance(document, dict) else {}


def read_index(folder: Path, manifest: StoreManifest) -> list[ShardRecord]:
    """The records of all shards; StoreError where they are not of this store, or anything in index or manifest changed."""
    path = folder / INDEX
    document = read_json(path)
    index = parsed(StoreIndex, document.get("index"), path)
    if document.get("sha256") != text_sha256(canonical_json(index.to_dict())):
        raise StoreError(f"{str(path)!r} is damaged: its checksum differs. {_remedy(path)}")
    if index.manifest_sha256 != file_sha256(folder / MANIFEST):
        raise StoreError(
            f"{str(folder / MANIFEST)!r} is not what it was when the store was completed. {_remedy(folder / MANIFEST)}"
        )
    wrong = None if len(index.shards) == manifest.n_shards else f"of {len(index.shards)} shards, not {manifest.n_shards}"
    for shard, record in enumerate(index.shards):
        wrong = wrong or record.wrong_for(shard, manifest)
    if wrong:
        raise StoreError(f"{str(path)!r} is the index of another store: {wrong}. {_remedy(path)}")
    return list(index.shards)


def read_shard_record(folder: Path, shard: int, manifest: StoreManifest) -> ShardRecord:
    """What a shard's file says of itself; StoreError where it is damaged, or is not the store's shard of that number."""
    path = shard_path(folder, shard)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "")
        record = parsed(ShardRecord, json.loads(text), path)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{str(path)!r} is damaged ({error}). {_remedy(path)}") from error
    wrong = record.wrong_for(shard, manifest)
    if wrong:
        raise StoreError(f"{str(path)!r} is not shard {shard} of this store: {wrong}. {_remedy(path)}")
    return record


def parsed(record: type[Any], data: Any, path: Path) -> Any:
    try:
        return record.from_dict(data)
    except LmprobeError as error:
        raise StoreError(f"{str(path)!r} is damaged: {error} {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    """What to do about a damaged file."""
    if path.name == MANIFEST:
        return "Extract again into another folder."
    also = "" if path.name == INDEX else " and index.json"
    return f"Delete it{also}, and run the same extraction again: it computes what is missing."


# --- differences -------------------------------------------------------------------------------------------------------


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of the records inside by 'record.entry', so that a difference is short enough to be shown."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _difference(mine: Any, others: Any) -> str:
    if isinstance(mine, list) and isinstance(others, list) and set(mine) != set(others):
        added, gone = (json.dumps([one for one in a if one not in b]) for a, b in ((mine, others), (others, mine)))
        return " and ".join(f"{word} {names}" for word, names in (("with", added), ("without", gone)) if names != "[]")
    return f"{json.dumps(mine)}, not {json.dumps(others)}"


# --- checksums ---------------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
