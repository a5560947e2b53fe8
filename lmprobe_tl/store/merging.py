"""Parts of one extraction, written to several folders, put together."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.files import TEMPORARY_SUFFIX
from lmprobe_tl.store.record import MANIFEST, ShardRecord, read_manifest, read_shard_record, shard_path
from lmprobe_tl.store.shards import remove_leftovers, replaced_meanwhile, write_index
from lmprobe_tl.store.writing import claim


def merge_stores(path: str | Path, parts: Sequence[str | Path]) -> ActivationStore:
    """Put together, in the folder `path`, what processes with `shard=(i, n)` wrote to folders of their own.

    path: a new or empty folder, or one of the parts. The parts stay as they are; files are linked where that is possible,
    else copied. StoreError where they are parts of different extractions, or where shards are missing from all of them.
    """
    folders = [Path(part) for part in ([parts] if isinstance(parts, (str, Path)) else parts)]
    if not folders:
        raise InputError("parts is empty; expected the folders to merge.")
    target = Path(path)
    if (target / MANIFEST).exists() and not any(target.samefile(folder) for folder in folders if folder.exists()):
        folders.append(target)  # what it holds is a part, too
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        differences = manifest.differences(manifests[0])
        if differences:
            raise StoreError(f"{str(folder)!r} is of another extraction than {str(folders[0])!r}: {'; '.join(differences)}.")
    manifest = manifests[0]
    found: dict[int, Path] = {}
    records: dict[int, ShardRecord] = {}
    for folder in folders:
        for shard in range(manifest.n_shards):
            candidate = shard_path(folder, shard)
            if candidate.exists():
                record = read_shard_record(folder, shard, manifest)
                if records.setdefault(shard, record) != record:
                    raise StoreError(f"{str(found[shard])!r} and {str(candidate)!r} differ; delete the wrong one of them.")
                found.setdefault(shard, candidate)
    lists = {record.prompts_sha256: found[shard] for shard, record in records.items()}
    if len(lists) > 1:
        one, other = list(lists.values())[:2]
        raise StoreError(
            f"{str(one)!r} and {str(other)!r} come from different lists of prompts; give every process the same list, in "
            "the same order."
        )
    missing = [shard for shard in range(manifest.n_shards) if shard not in found]
    if missing:
        raise StoreError(
            f"{len(missing)} of {manifest.n_shards} shards are in none of the folders, the first of them shard {missing[0]} "
            f"(prompts {manifest.prompts_of(missing[0])[0]} on). Run what writes them again."
        )
    claim(target, manifest, read_manifest(target) if (target / MANIFEST).exists() else None)
    for shard, source in found.items():
        _link_or_copy(source, shard_path(target, shard))
    write_index(target, manifest)
    remove_leftovers(target)
    return ActivationStore(target)


def _link_or_copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    temporary = target.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another disk
            shutil.copyfile(source, temporary)
        with replaced_meanwhile(target):
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()
