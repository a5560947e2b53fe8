"""Damaged and forged stores: a StoreError with the path and what to do, never another exception, never wrong values."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Tiny
from safetensors import safe_open

from lmprobe_tl import ActivationStore, extract_to_store
from lmprobe_tl.errors import StoreError
from lmprobe_tl.files import canonical_json
from lmprobe_tl.store.record import METADATA_KEY, tensor_sha256, text_sha256

POST = "blocks.1.hook_resid_post"
PROMPTS = [torch.tensor(row) for row in ([5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16])]
SETTINGS: dict[str, Any] = {
    "hook_points": [1, 2],
    "pooling": ["mean", "all"],
    "dtype": "float16",
    "keep_tokens": True,
    "prompts_per_shard": 2,
    "progress": False,
}
SHARD, INDEX, MANIFEST = "shard-00001.safetensors", "index.json", "manifest.json"


def extract(tiny: Tiny, folder: Path) -> ActivationStore:
    return extract_to_store(tiny.bridge, PROMPTS, folder, **SETTINGS)


@pytest.fixture(scope="module")
def whole(all_tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "whole"
    extract(all_tiny["llama"], folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def everything(folder: Path) -> list[Any]:
    """All that can be read from a store, as lists."""
    store = ActivationStore(folder)
    store.verify()
    layers = (1, "blocks.2.hook_resid_post")
    values = [store.values(layer, pooling).tolist() for layer in layers for pooling in ("mean", "all")]
    return [*values, store.tokens(), store.lengths().tolist(), store.digests().tolist(), store.n_tokens, repr(store)[-60:]]


def outcome(folder: Path) -> Any:
    """All that can be read, or the StoreError."""
    try:
        return everything(folder)
    except StoreError as error:
        return error


def names_path_and_remedy(error: StoreError, folder: Path) -> bool:
    """Which file or folder, and one of the things that the reader can do."""
    return str(folder) in str(error) and bool(
        re.search(
            r"[Dd]elete |[Ee]xtract again|Run the same|Use the version|no activation store|cannot be read|Choose", str(error)
        )
    )


# --- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [(MANIFEST, 5), (INDEX, 11), (SHARD, 13)])
@pytest.mark.parametrize("flip", [0x01, 0x0F, 0xFF])  # 0x0F makes an I of an F: the name of another type
def test_a_flipped_byte_is_found_or_changes_nothing(folder: Path, whole: Path, name: str, step: int, flip: int) -> None:
    """In a shard, what changes nothing is in its copy of the record, which the index holds too."""
    expected, original = everything(whole), (folder / name).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little") if name == SHARD else len(original)
    places = [*range(flip % step, header, step), *range(header, len(original), 97)]
    found = 0
    for place in places:
        (folder / name).write_bytes(original[:place] + bytes([original[place] ^ flip]) + original[place + 1 :])
        read = outcome(folder)
        if isinstance(read, StoreError):
            assert names_path_and_remedy(read, folder), read
            found += 1
        else:
            assert read == expected
            assert name == SHARD and place < header
    assert found > (0 if name == SHARD else len(places) - 1)


def test_every_byte_of_a_tensor_counts(folder: Path) -> None:
    """verify() finds it, and names the tensor; the shard's other tensors can still be read."""
    path = folder / SHARD
    original = path.read_bytes()
    header = int.from_bytes(original[:8], "little")
    entries = {name: entry for name, entry in json.loads(original[8 : 8 + header]).items() if name != "__metadata__"}
    assert len(entries) == 8
    intact = ActivationStore(folder).values(1, "mean")
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        for place in (begin, end - 1):
            damaged = bytearray(original)
            damaged[8 + header + place] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(
                StoreError, match=rf"{SHARD}': tensor '{re.escape(name)}' is not what was written there\. Del"
            ):
                ActivationStore(folder).verify()
            if name != f"mean/{POST}":
                assert torch.equal(ActivationStore(folder).values(1, "mean"), intact)
    path.write_bytes(original)
    ActivationStore(folder).verify()


@pytest.mark.parametrize("type_name", ["I16", "U16", "BF16"])
def test_a_type_of_the_same_width_is_not_taken_for_the_stored_one(folder: Path, type_name: str) -> None:
    """The bytes, and so the checksum, are the same."""
    path = folder / SHARD
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kinds = {"I16": torch.int16, "U16": torch.uint16, "BF16": torch.bfloat16}
    tensors[f"mean/{POST}"] = tensors[f"mean/{POST}"].view(kinds[type_name])
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(StoreError, match="is not what was written there"):
        ActivationStore(folder).values(1, "mean")


@pytest.mark.parametrize("name", [MANIFEST, INDEX, SHARD])
def test_a_file_cut_off_anywhere_is_found(folder: Path, name: str) -> None:
    original = (folder / name).read_bytes()
    for length in [0, 1, 7, 8, 9, *range(20, len(original), len(original) // 25), len(original) - 1]:
        (folder / name).write_bytes(original[:length])
        with pytest.raises(StoreError) as caught:
            everything(folder)
        assert names_path_and_remedy(caught.value, folder), caught.value


@pytest.mark.parametrize("name", [MANIFEST, INDEX, SHARD])
@pytest.mark.parametrize("how", ["missing", "a folder", "noise", "longer"])
def test_a_file_replaced_by_something_else_is_found(folder: Path, name: str, how: str) -> None:
    path = folder / name
    original = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(os.urandom(2000) if how == "noise" else original + b"{}")
    with pytest.raises(StoreError) as caught:
        everything(folder)
    assert names_path_and_remedy(caught.value, folder), caught.value


def test_a_path_without_store_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, message in ((tmp_path / "nowhere", "it has no manifest.json"), (tmp_path, "it has no manifest.json")):
        with pytest.raises(StoreError, match=rf"{re.escape(str(path))}' is no activation store: {message}"):
            ActivationStore(path)
    with pytest.raises(StoreError, match="file/manifest.json' cannot be read: .*Not a directory"):
        ActivationStore(tmp_path / "file")


# --- repair ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_what_the_error_says_repairs_the_store(llama: Tiny, folder: Path, whole: Path, kept: int) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:kept])
    (folder / INDEX).unlink()
    with pytest.raises(
        StoreError, match=rf"{SHARD}' is damaged .*Delete it and index\.json, and run the same extraction ag"
    ):
        extract(llama, folder)
    (folder / SHARD).unlink()
    extract(llama, folder)
    assert everything(folder) == everything(whole)


def test_a_shard_in_the_place_of_another_is_found(llama: Tiny, folder: Path) -> None:
    shutil.copy(folder / "shard-00000.safetensors", folder / SHARD)
    with pytest.raises(StoreError, match=rf"{SHARD}': tensor .* is not what was written there"):
        ActivationStore(folder).verify()
    (folder / INDEX).unlink()
    with pytest.raises(
        StoreError, match=rf"{SHARD}' is not shard 1 of this store: it holds prompts 0 to 1, not 2 to 3\. Del"
    ):
        extract(llama, folder)


# --- hostile JSON ------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
WRONG: list[Any] = [None, True, 5, 1.5, "text", "\ud800", [], [1], {}, {"a": 1}, -1, 2**62, 2**200]
WRONG += [float("nan"), float("inf")]


def refused(folder: Path) -> None:
    with pytest.raises(StoreError) as caught:
        everything(folder)
    assert names_path_and_remedy(caught.value, folder), caught.value
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", [MANIFEST, INDEX])
@pytest.mark.parametrize(
    "text",
    ["", "null", "5", "[]", "{}", '"a"', DEEP, '{"a":' * 100_000, "NaN", '{"format":NaN}', "9" * 5000, "\ufeff{}", "\x00"],
    ids=lambda text: repr(text[:16]),
)
def test_json_that_means_harm_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    refused(folder)


def test_every_entry_of_the_manifest_is_checked(folder: Path) -> None:
    """Whatever stands there. An index is written anew for each: its checksum of the manifest finds them all."""
    document = json.loads((folder / MANIFEST).read_text())
    index = json.loads((folder / INDEX).read_text())["index"]
    free = {"include_bos", "max_length", "max_tokens_per_batch", "batch_size", "model", "model_dtype", "weights_sha256"}
    free |= {"d_model", "n_layers", "tokenizer", "bos_id", "eos_ids", "versions", "truncation", "normalization"}
    for key, right in document["manifest"].items():
        for wrong in WRONG:
            if canonical_json([right]) == json.dumps([wrong], separators=(",", ":")):
                continue
            text = json.dumps({**document, "manifest": {**document["manifest"], key: wrong}})
            (folder / MANIFEST).write_text(text)
            forge_index(folder, {**index, "manifest_sha256": text_sha256(text)})
            read = outcome(folder)
            if isinstance(read, StoreError):
                assert names_path_and_remedy(read, folder), (key, wrong, read)
            else:  # an entry that reading does not depend on, with a value that it may have
                assert key in free, (key, wrong)
        left = {name: value for name, value in document["manifest"].items() if name != key}
        (folder / MANIFEST).write_text(json.dumps({**document, "manifest": left}))
        refused(folder)


@pytest.mark.parametrize("n_prompts", [10**9, 2**62])
def test_a_manifest_of_endless_shards_is_refused_at_once(folder: Path, n_prompts: int) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    document["manifest"].update(n_prompts=n_prompts, prompts_per_shard=1)
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(StoreError, match="prompts_per_shard is 1; expected at least"):
        ActivationStore(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5])
def test_another_format_version_is_refused(llama: Tiny, folder: Path, version: Any) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "format_version": version}))
    for read in (ActivationStore, lambda path: extract(llama, path)):
        with pytest.raises(
            StoreError, match=rf"format version {re.escape(repr(version))}; this lmprobe_tl reads 1\. Use the"
        ):
            read(folder)


def test_another_format_is_refused(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "format": "something else"}))
    with pytest.raises(StoreError, match="is no manifest of an activation store; expected format"):
        ActivationStore(folder)


def forge_index(folder: Path, index: Any) -> None:
    """Write an index with a right checksum, whatever is in it."""
    content = json.dumps(index, sort_keys=True, separators=(",", ":"))
    (folder / INDEX).write_text(f'{{"index":{content},"sha256":"{text_sha256(content)}"}}')


def change(index: Any, path: list[Any], value: Any) -> Any:
    """The index with another value at the path."""
    changed = json.loads(json.dumps(index))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    "path",
    [["shards"], ["shards", 1], ["manifest_sha256"]]
    + [["shards", 1, key] for key in ("start", "stop", "n_tokens", "sha256")]
    + [["shards", 1, "sha256", name] for name in ("lengths", "tokens", f"mean/{POST}", "other")],
    ids=str,
)
def test_every_entry_of_a_forged_index_is_checked(folder: Path, path: list[Any]) -> None:
    index = json.loads((folder / INDEX).read_text())["index"]
    forge_index(folder, index)
    everything(folder)  # the control: the forger's checksum is right
    for wrong in WRONG:
        forge_index(folder, change(index, path, wrong))
        refused(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda shards: shards[:-1], "is the index of another store: of 2 shards, not 3"),
        (lambda shards: [*shards, shards[0]], "of 4 shards, not 3"),
        (lambda shards: [shards[1], shards[0], shards[2]], "it holds prompts 2 to 3, not 0 to 1"),
        (lambda shards: [], "of 0 shards, not 3"),
        (lambda shards: [{**one, "sha256": {}} for one in shards], "is missing or does not belong there"),
    ],
)
def test_an_index_of_other_shards_is_refused(folder: Path, edit: Callable[[Any], Any], message: str) -> None:
    index = json.loads((folder / INDEX).read_text())["index"]
    forge_index(folder, {**index, "shards": edit(index["shards"])})
    with pytest.raises(StoreError, match=message) as caught:
        ActivationStore(folder).verify()
    assert "Delete it, and run the same extraction again" in str(caught.value)


# --- forged shards -----------------------------------------------------------------------------------------------------


def forge_shard(folder: Path, name: str, tensor: torch.Tensor, **changed: Any) -> None:
    """Put another tensor into a shard, with right checksums in shard and index."""
    with safe_open(folder / SHARD, framework="pt") as file:
        tensors = {one: file.get_tensor(one) for one in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()[METADATA_KEY])
    tensors[name] = tensor
    record = {**record, **changed, "sha256": {**record["sha256"], name: tensor_sha256(tensor)}}
    (folder / SHARD).write_bytes(safetensors.torch.save(tensors, {METADATA_KEY: canonical_json(record)}))
    index = json.loads((folder / INDEX).read_text())["index"]
    forge_index(folder, change(index, ["shards", 1], record))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"mean/{POST}", torch.zeros(3, 32, dtype=torch.float16)),
        (f"mean/{POST}", torch.zeros(2, 31, dtype=torch.float16)),
        (f"mean/{POST}", torch.zeros(2, 32)),
        (f"mean/{POST}", torch.zeros(2, 32, 1, dtype=torch.float16)),
        (f"mean/{POST}", torch.zeros((), dtype=torch.float16)),
        (f"mean/{POST}", torch.zeros(0, dtype=torch.float16)),
        (f"all/{POST}", torch.zeros(5, 32, dtype=torch.float16)),
        ("lengths", torch.tensor([-1, 7], dtype=torch.int32)),
        ("lengths", torch.tensor([2, 5], dtype=torch.int32)),
        ("lengths", torch.tensor([2, 4])),
        ("lengths", torch.zeros(0, dtype=torch.int32)),
        ("digests", torch.zeros(2, 15, dtype=torch.uint8)),
        ("tokens", torch.zeros((), dtype=torch.int32)),
        ("tokens", torch.zeros(6)),
        ("token_counts", torch.zeros(3, dtype=torch.int32)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_a_tensor_of_another_type_or_shape_is_refused(folder: Path, name: str, tensor: torch.Tensor) -> None:
    forge_shard(folder, name, tensor)
    with pytest.raises(StoreError, match=rf"{SHARD}': tensor '{re.escape(name)}' is not what was written there"):
        everything(folder)


def test_a_forged_shard_with_all_that_belongs_to_it_is_read(folder: Path) -> None:
    """The control: it is not the forger's file that is refused, but what is wrong in it."""
    forge_shard(folder, f"mean/{POST}", torch.ones(2, 32, dtype=torch.float16))
    everything(folder)
    assert torch.equal(ActivationStore(folder).values(1, "mean")[2:4], torch.ones(2, 32))


@pytest.mark.parametrize("n_tokens", [0, 5, 2**62, -1])
def test_a_number_of_tokens_that_is_not_that_of_the_lengths_is_refused(folder: Path, n_tokens: int) -> None:
    index = json.loads((folder / INDEX).read_text())["index"]
    forge_index(folder, change(index, ["shards", 2, "n_tokens"], n_tokens))
    for read in (lambda store: store.values(1, "all"), lambda store: store.verify()):
        with pytest.raises(StoreError, match="shard-00002.safetensors': tensor '.*' is not what was written there"):
            read(ActivationStore(folder))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", DEEP, "NaN", "9" * 5000], ids=lambda text: repr(text[:8]))
def test_a_shards_own_record_may_mean_harm(llama: Tiny, folder: Path, text: str) -> None:
    with safe_open(folder / SHARD, framework="pt") as file:
        tensors = {one: file.get_tensor(one) for one in file.keys()}  # noqa: SIM118
    (folder / SHARD).write_bytes(safetensors.torch.save(tensors, {METADATA_KEY: text}))
    (folder / INDEX).unlink()
    with pytest.raises(StoreError, match=rf"{SHARD}' is damaged"):
        extract(llama, folder)
