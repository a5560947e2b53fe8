"""Stores that were killed, written by several processes, or merged: always the bytes of one uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_kills
import torch
from conftest import Tiny
from store_kills import PROMPTS, SETTINGS, contents

from lmprobe_tl import ActivationStore, extract_to_store, merge_stores
from lmprobe_tl.errors import InputError, StoreError
from lmprobe_tl.files import TEMPORARY_SUFFIX

N_SHARDS = 3


def extract(tiny: Tiny, path: Path, **settings: Any) -> ActivationStore:
    return extract_to_store(tiny.bridge, PROMPTS, path, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def whole(all_tiny: dict[str, Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    extract(all_tiny["llama"], folder)
    found = contents(folder)
    assert sorted(found) == ["index.json", "manifest.json", *(f"shard-0000{i}.safetensors" for i in range(N_SHARDS))]
    return found


# --- killed ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, store_kills.__file__, str(tiny_folders["llama"]), str(tmp_path_factory.mktemp("kills"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_killed_at_any_step_ends_as_if_it_had_not_been(report: dict[str, Any]) -> None:
    found = report["every step"]
    assert found["ends"] == {"killed": sum(found["steps"].values())}
    assert found["differing"] == []
    # The kills landed before, amid and after the writing of every kind of file, and in every state of the folder.
    for kind, count in (("manifest", 1), ("shard", N_SHARDS), ("index", 1)):
        for when in ("before write", "amid write", "before fsync", "after fsync", "before replace", "after replace"):
            assert found["steps"][f"{when} of {kind}"] == count
    assert found["steps"]["before link of manifest"] == found["steps"]["after link of manifest"] == 1
    assert found["steps"]["at forward pass"] > N_SHARDS  # several batches a shard: kills inside of one, too
    assert set(found["states"]) == {"no manifest", "all shards missing", "some shards missing", "no index", "complete"}
    assert found["with leftovers"] > 10


def test_a_run_killed_again_and_again_arrives(report: dict[str, Any]) -> None:
    assert all(one["same"] for one in report["again and again"])
    assert sum(one["kills"] for one in report["again and again"]) >= 4


def test_a_run_killed_from_outside_at_any_moment_goes_on(report: dict[str, Any]) -> None:
    found = report["any moment"]
    assert found["same"]
    assert found["kills"] == sum(found["states"].values()) == store_kills.ASYNCHRONOUS_KILLS
    assert len(found["states"]) > 1


@pytest.mark.parametrize(
    ("race", "ends"),
    [
        ("two writers", ["finished", "finished"]),
        ("two writers, one killed", ["killed", "finished"]),
        ("three workers", ["finished"] * 3),
    ],
)
def test_processes_at_once_in_one_folder_write_what_one_does(report: dict[str, Any], race: str, ends: list[str]) -> None:
    for one in report[race]:
        assert one["same"]
        # the one to be killed may have been quicker
        assert one["ends"] in (ends, ["finished"] * len(ends))


def test_memory_does_not_grow_with_the_number_of_prompts(report: dict[str, Any]) -> None:
    used = report["memory"]
    assert used["store of 8,000"] - used["store of 2,000"] < 4
    assert used["in memory, of 8,000"] - used["in memory, of 2,000"] > 15  # the control: the measurement sees what is held


# --- in turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(12))
def test_another_writer_may_finish_the_store_between_any_two_steps(
    llama: Tiny, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """It also removes what it takes for leftovers, the half-written files of this one among them."""
    calls = itertools.count()

    def interrupted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == step:
                extract(llama, tmp_path / "store")
            return function(*arguments, **named)

        return call

    for name in ("mkdir", "fsync", "replace", "link"):
        monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
    extract(llama, tmp_path / "store")
    assert next(calls) > step
    assert contents(tmp_path / "store") == whole


def test_leftovers_are_gone_once_the_store_is_complete(llama: Tiny, tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    extract(llama, folder, shard=(1, 3))
    leftover = folder / f".0123456789abcdef{TEMPORARY_SUFFIX}"
    leftover.write_bytes(b"half")
    extract(llama, folder, shard=(0, 3))
    assert leftover.exists()  # another process may be writing it
    extract(llama, folder)
    assert contents(folder) == whole
    leftover.write_bytes(b"half")  # of a process that was killed after the index was there
    extract(llama, folder)
    assert contents(folder) == whole


def test_a_complete_store_is_not_computed_again(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(llama, tmp_path / "store")
    passes: list[int] = []
    handle = llama.bridge.original_model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        extract(llama, tmp_path / "store")
        assert not passes
        (tmp_path / "store" / "shard-00001.safetensors").unlink()
        extract(llama, tmp_path / "store")
        assert passes
    finally:
        handle.remove()


# --- workers and parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [1, 2, 3, 5])
def test_workers_in_any_order_write_what_one_run_does(
    llama: Tiny, tmp_path: Path, whole: dict[str, bytes], n_workers: int
) -> None:
    order = list(range(n_workers))
    random.Random(n_workers).shuffle(order)
    for done, worker in enumerate(order):
        store = extract(llama, tmp_path / "one", shard=(worker, n_workers))
        written = {shard for shard in range(N_SHARDS) if shard % n_workers in order[: done + 1]}
        assert store.missing_shards == [shard for shard in range(N_SHARDS) if shard not in written]
        extract(llama, tmp_path / f"part-{worker}", shard=(worker, n_workers))
    assert contents(tmp_path / "one") == whole
    merged = merge_stores(tmp_path / "merged", [tmp_path / f"part-{worker}" for worker in order])
    assert contents(tmp_path / "merged") == whole
    merged.verify()


def test_an_incomplete_store_says_what_to_do(llama: Tiny, tmp_path: Path) -> None:
    store = extract(llama, tmp_path / "store", shard=(1, 3))
    assert "2 of 3 shards missing" in repr(store)
    with pytest.raises(
        StoreError, match=r"store' is not complete: 2 of 3 shards are missing\. Run the same extraction again"
    ):
        store.values(pooling="mean")
    with pytest.raises(StoreError, match="is not complete"):
        store.verify()


@pytest.fixture
def parts(llama: Tiny, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"part-{worker}" for worker in range(N_SHARDS)]
    for worker, folder in enumerate(folders):
        extract(llama, folder, shard=(worker, N_SHARDS))
    return folders


def test_merging_into_a_part_and_again(parts: list[Path], whole: dict[str, bytes]) -> None:
    for _ in range(2):
        merge_stores(parts[1], parts)
        assert contents(parts[1]) == whole
    assert len(contents(parts[0])) == 2  # as it was


def test_what_the_target_holds_is_a_part_too(parts: list[Path], whole: dict[str, bytes]) -> None:
    merge_stores(parts[1], [parts[0], parts[2]])
    assert contents(parts[1]) == whole


def test_parts_are_copied_where_they_cannot_be_linked(
    parts: list[Path], tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    merge_stores(tmp_path / "merged", parts)
    assert contents(tmp_path / "merged") == whole


def test_missing_parts_are_named(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"1 of 3 shards are in none of the folders, the first .* shard 1 \(prompts 5 on"):
        merge_stores(tmp_path / "merged", [parts[0], parts[2]])
    with pytest.raises(StoreError, match=r"nowhere' is no activation store: it has no manifest\.json"):
        merge_stores(tmp_path / "merged", [parts[0], tmp_path / "nowhere"])
    with pytest.raises(InputError, match="parts is empty"):
        merge_stores(tmp_path / "merged", [])
    assert not (tmp_path / "merged").exists()


def test_parts_of_another_extraction_are_named(llama: Tiny, parts: list[Path], tmp_path: Path) -> None:
    extract(llama, tmp_path / "other", dtype="float16", shard=(1, 3))
    with pytest.raises(StoreError, match=r'other\' is of another .* than .*part-0\': dtype: "float16", not "float32"'):
        merge_stores(tmp_path / "merged", [parts[0], tmp_path / "other", parts[2]])
    assert not (tmp_path / "merged").exists()


def test_parts_that_differ_are_named(llama: Tiny, parts: list[Path], tmp_path: Path) -> None:
    prompts = [*PROMPTS[:6], torch.tensor([9, 9, 9]), *PROMPTS[7:]]
    extract_to_store(llama.bridge, prompts, tmp_path / "other", **SETTINGS, shard=(1, 3))
    with pytest.raises(StoreError, match=r"part-1/shard-00001\S+ and \S+other/shard-00001\S+ differ; delete the wrong one"):
        merge_stores(tmp_path / "merged", [*parts, tmp_path / "other"])
    with pytest.raises(StoreError, match=r"other/shard-00001\S+ and \S+part-1/shard-00001\S+ differ"):
        merge_stores(parts[1], [parts[0], tmp_path / "other", parts[2]])


@pytest.mark.parametrize("change", [lambda texts: texts[::-1], lambda texts: [*texts[:-1], "something else"]])
def test_parts_of_different_lists_of_prompts_are_told_apart(
    llama: Tiny, parts: list[Path], tmp_path: Path, change: Callable[[list[Any]], list[Any]]
) -> None:
    """Their own prompts may be the same: it is the list that a process saw."""
    extract_to_store(llama.bridge, change(PROMPTS), tmp_path / "other", **SETTINGS, shard=(1, 3))
    with pytest.raises(StoreError, match=r"come from different lists of prompts; give every process the same list"):
        merge_stores(tmp_path / "merged", [parts[0], tmp_path / "other", parts[2]])
    assert not (tmp_path / "merged").exists()


def test_a_part_under_a_wrong_number_is_named_and_nothing_is_written(parts: list[Path], tmp_path: Path) -> None:
    (parts[0] / "shard-00000.safetensors").rename(parts[0] / "shard-00001.safetensors")
    with pytest.raises(StoreError, match=r"part-0/shard-00001\S+ is not shard 1 .*: it holds prompts 0 to 4, not 5"):
        merge_stores(tmp_path / "merged", [parts[0], parts[2]])
    assert not (tmp_path / "merged").exists()
