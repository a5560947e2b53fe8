"""Activations from a vLLM engine are those of TransformerLens, in memory and in stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SharedEngine

from lmprobe_tl import ActivationStore, extract_activations, extract_to_store, merge_stores
from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model
from lmprobe_tl.errors import EmptyMaskError, EngineError, InputError, PromptTooLongError, StoreError, UnknownHookPointError
from lmprobe_tl.hook_points import load_model
from lmprobe_tl.vllm import ActivationEngine
from lmprobe_tl.vllm.activations import ROW, ActivationBook, OpenPrompt
from lmprobe_tl.vllm.steps import NewRequest, Step
from lmprobe_tl.vllm.wire import Collect

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "seed": 0,
}
POOLINGS = ["last_token", "first_token", "mean", "max", "min", "all"]
TEMPLATE = "{% for message in messages %}{{ bos_token }}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
CONTEXT = 512
CLOSE = 2e-4  # of activations of up to a few dozen; measured is 3e-5


def prompts_of(lengths: list[int], *, end: int | None = None) -> list[torch.Tensor]:
    """Rows of BOS and random tokens, the last of them `end`."""
    made = torch.Generator().manual_seed(0)
    rows = [torch.cat([torch.tensor([0]), torch.randint(3, 2048, (n - 1,), generator=made)]) for n in lengths]
    if end is not None:
        for row in rows:
            row[-1] = end
    return rows


# Shorter than a step, longer than several steps of 64 tokens, as long as the context; two are equal.
RAGGED = prompts_of([2, 5, 64, 65, 17, 200, 3, CONTEXT, 31, 2])
RAGGED.append(RAGGED[3].clone())


@pytest.fixture(scope="module")
def model() -> Any:
    return load_demo_model()


def start_shared() -> ActivationEngine:
    points = ["blocks.0.hook_resid_pre", 0, 1, 2, 3, 4, -1]
    return ActivationEngine(MODEL_FOLDER, points, enforce_eager=True, **SMALL)


def assert_same(found: Any, expected: Any) -> None:
    assert found.hook_points == expected.hook_points
    assert found.tokens == expected.tokens
    assert found.pooling == expected.pooling
    if expected.offsets is not None:
        assert torch.equal(found.offsets, expected.offsets)
    for name, values in expected.values.items():
        assert found.values[name].dtype == torch.float32
        torch.testing.assert_close(found.values[name], values, rtol=1e-5, atol=CLOSE)


# --- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_bos", [False, True])
def test_every_pooling_at_every_hook_point_equals_transformer_lens(
    engine: ActivationEngine, model: Any, include_bos: bool
) -> None:
    names = list(engine.hook_points)
    assert len(names) == 7
    found = extract_activations(engine, RAGGED, names, POOLINGS, include_bos=include_bos)
    expected = extract_activations(model, RAGGED, names, POOLINGS, include_bos=include_bos)
    assert list(found) == POOLINGS
    for pooling in POOLINGS:
        assert_same(found[pooling], expected[pooling])
    # the control: BOS is far from the others, so an engine that counts it by mistake is seen
    other = extract_activations(model, RAGGED, names, "mean", include_bos=not include_bos)
    assert (other.values[names[1]] - found["mean"].values[names[1]]).abs().max() > 100 * CLOSE


def test_eos_pooling_finds_the_first_end(engine: ActivationEngine, model: Any) -> None:
    prompts = prompts_of([5, 70, 9], end=1)
    prompts[1][20] = 1
    assert_same(extract_activations(engine, prompts, 3, "eos"), extract_activations(model, prompts, 3, "eos"))
    with pytest.raises(InputError, match=r"pooling 'eos', but no token of prompt 0 is EOS"):
        extract_activations(engine, RAGGED, 3, "eos")


def test_a_pooling_of_your_own_sees_what_it_sees_elsewhere(engine: ActivationEngine, model: Any) -> None:
    def spread(activations: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        counted = attention_mask.bool()[..., None]
        highest = activations.masked_fill(~counted, -torch.inf).amax(dim=1)
        return highest - activations.masked_fill(~counted, torch.inf).amin(dim=1)

    poolings: list[Any] = ["mean", spread, "last_token"]
    found, expected = (extract_activations(one, RAGGED, [1, 4], poolings) for one in (engine, model))
    assert list(found) == list(expected) == ["mean", "spread", "last_token"]
    for name in found:
        assert_same(found[name], expected[name])


def test_text_chats_and_arrays_become_the_same_tokens(engine: ActivationEngine, model: Any) -> None:
    text = "def area(width, height):\n    return width * height\n"
    prompts: list[Any] = ["import os", text * 3, "<|bos|>import sys", RAGGED[1], RAGGED[4].numpy()]
    assert_same(extract_activations(engine, prompts, 2, "mean"), extract_activations(model, prompts, 2, "mean"))
    plain = [extract_activations(one, prompts, 2, "mean", prepend_bos=False) for one in (engine, model)]
    assert_same(*plain)
    assert plain[0].tokens[0][0] != 0

    chat = [[{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of things."}]]
    for one in (engine, model):
        with pytest.raises(InputError, match="has no chat template"):
            extract_activations(one, chat, 2, "mean")


def test_a_chat_goes_through_the_template_of_the_model(alone: None, tmp_path: Path) -> None:
    folder = tmp_path / "with-template"
    folder.mkdir()
    for file in MODEL_FOLDER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    chats: list[Any] = [[{"role": "user", "content": "What is a list?"}], "def f(): return 1"]
    with ActivationEngine(folder, 2, enforce_eager=True, **SMALL) as started:
        found = extract_activations(started, chats, pooling="mean")
    expected = extract_activations(load_model(folder), chats, 2, "mean")
    assert_same(found, expected)
    assert found.tokens[0][:1] == [0] and found.tokens[0][1] != 0


def test_long_prompts_are_cut_or_refused_alike(engine: ActivationEngine, model: Any) -> None:
    prompts = [*prompts_of([CONTEXT + 40, 5])]
    for side in ("left", "right"):
        found, expected = (extract_activations(one, prompts, 5, "last_token", truncation=side) for one in (engine, model))
        assert_same(found, expected)
        assert len(found.tokens[0]) == CONTEXT
    for one in (engine, model):
        with pytest.raises(
            PromptTooLongError, match=r"longer than the 512 tokens allowed: prompt 0 \(552 tokens\)"
        ) as caught:
            extract_activations(one, prompts, 5)
        assert caught.value.rows == [0]
        with pytest.raises(PromptTooLongError, match="longer than the 9 tokens"):
            extract_activations(one, RAGGED, 5, max_length=9)


def test_an_engine_may_be_shorter_than_its_model(alone: None) -> None:
    with ActivationEngine(MODEL_FOLDER, 0, max_model_len=40, enforce_eager=True, **SMALL) as started:
        assert extract_activations(started, prompts_of([40])).values["blocks.0.hook_resid_post"].shape == (1, 192)
        with pytest.raises(PromptTooLongError, match="longer than the 40 tokens allowed"):
            extract_activations(started, prompts_of([41]))


def test_a_compiled_graph_holds_the_hooks(alone: None, model: Any) -> None:
    with ActivationEngine(MODEL_FOLDER, [1, 5], **SMALL) as compiled:
        assert not compiled.llm.llm_engine.vllm_config.model_config.enforce_eager
        for _ in range(2):
            found = extract_activations(compiled, RAGGED, pooling=["mean", "all"])
            expected = extract_activations(model, RAGGED, [1, 5], ["mean", "all"])
            for name in found:
                assert_same(found[name], expected[name])


def test_groups_change_nothing(engine: ActivationEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = extract_activations(engine, RAGGED, [0, 3], ["max", "all"])
    calls: list[int] = []
    collect = engine._collect

    def counted(rows: list[list[int]], message: Any) -> Any:
        calls.append(len(rows))
        return collect(rows, message)

    monkeypatch.setattr(engine, "_collect", counted)
    monkeypatch.setattr("lmprobe_tl.vllm.engine._GROUP_BYTES", 2 * 80 * 192 * 4)
    found = extract_activations(engine, RAGGED, [0, 3], ["max", "all"])
    assert len(calls) > 3 and sum(calls) == len(RAGGED) - 1  # equal prompts are computed once
    for name in found:
        assert_same(found[name], expected[name])


def test_a_model_is_named_and_its_engine_stopped(alone: None, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[ActivationEngine] = []
    close = ActivationEngine.close
    monkeypatch.setattr(ActivationEngine, "close", lambda self: (closed.append(self), close(self)))
    found = extract_activations(MODEL_FOLDER, RAGGED[:4], 2, "mean", engine="vllm", max_tokens_per_batch=48, batch_size=3)
    assert_same(found, extract_activations(model, RAGGED[:4], 2, "mean"))
    assert len(closed) == 1 and closed[0].llm is None


def test_prompts_that_are_pushed_out_of_the_cache_begin_anew(
    alone: None, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of([300, 290, 310, 280, 305, 40])
    again: list[int] = []
    add = ActivationBook._add_chunk

    def watched(self: ActivationBook, prompt: OpenPrompt, start: int, rows: Any) -> None:
        again.append(start < prompt.n_held)
        add(self, prompt, start, rows)

    monkeypatch.setattr(ActivationBook, "_add_chunk", watched)
    # Four prompts advance side by side, and their 1,100 tokens do not fit in 20 blocks of 32.
    crowded = {"num_gpu_blocks_override": 20, "long_prefill_token_threshold": 16}
    with ActivationEngine(MODEL_FOLDER, 3, enforce_eager=True, **(SMALL | crowded)) as started:
        found = extract_activations(started, prompts, pooling="all")
    assert_same(found, extract_activations(model, prompts, 3, "all"))
    assert any(again)


def step_of(starts: dict[str, int], counts: dict[str, int], new: dict[str, list[int]] | None = None) -> Step:
    requests = [NewRequest(name, row, 0, [[]], {ROW: at}, None) for at, (name, row) in enumerate((new or {}).items())]
    return Step(sum(counts.values()), counts, starts, requests, [], [], [], [])


def test_the_book_puts_chunks_together_and_drops_what_is_computed_again() -> None:
    def rows_of(*ids: int) -> dict[str, torch.Tensor]:
        return {"hook": torch.tensor([[float(one), 1.0] for one in (*ids, -99)])}  # behind them what an earlier step left

    book = ActivationBook(Collect(["hook"], [("all", False), ("mean", True)], 0, [1]), 64, torch.device("cpu"))
    new = {"a": [0, 5, 6, 7], "b": [8, 9]}
    book.end_step(step_of({"a": 0, "b": 0}, {"a": 3, "b": 1}, new), ["b", "a"], rows_of(8, 100, 15, 16))
    book.end_step(step_of({"a": 0}, {"a": 2}), ["a"], rows_of(0, 5))  # pushed out, and again from the beginning
    with pytest.raises(EngineError, match="the engine never computed 2 of 2 prompts, the first of them 0"):
        book.taken(2)
    book.end_step(step_of({"a": 2, "b": 1, "c": 0}, {"a": 2, "b": 1, "c": 1}), ["c", "a", "b"], rows_of(50, 6, 7, 9))
    every, means = (torch.frombuffer(bytearray(part), dtype=torch.float32).view(-1, 2) for part in book.taken(2)["hook"])
    assert every[:, 0].tolist() == [5, 6, 7, 8, 9]
    assert means[:, 0].tolist() == [4.5, 8.5]

    late = ActivationBook(Collect(["hook"], [("mean", True)], 0, [1]), 64, torch.device("cpu"))
    with pytest.raises(EngineError, match="tokens 0 to 1 of prompt 0 were not computed by this engine"):
        late.end_step(step_of({"a": 2}, {"a": 2}, {"a": [0, 5, 6, 7]}), ["a"], rows_of(6, 7))


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(engine: ActivationEngine, model: Any) -> None:
    with pytest.raises(EmptyMaskError, match="no token counts in prompt 1"):
        extract_activations(engine, ["x", torch.tensor([0])], 2, "mean")
    with pytest.raises(UnknownHookPointError, match="layer 6 does not exist"):
        extract_activations(engine, RAGGED, 6)
    with pytest.raises(InputError, match=r"'blocks.3.hook_resid_pre' is not one of those that this engine was started with"):
        extract_activations(engine, RAGGED, "blocks.3.hook_resid_pre")
    with pytest.raises(InputError, match=r"reduces scores, and extraction has none"):
        extract_activations(engine, RAGGED, 2, "score:mean")
    with pytest.raises(InputError, match=r"batch_size belong to an engine that is yet to be started"):
        extract_activations(engine, RAGGED, 2, batch_size=4)
    with pytest.raises(InputError, match=r"engine is 'transformer_lens', but the model is a vLLM engine"):
        extract_activations(engine, RAGGED, 2, engine="transformer_lens")
    with pytest.raises(InputError, match=r"engine is 'vllm', but the model is a TransformerBridge"):
        extract_activations(model, RAGGED, 2, engine="vllm")
    with pytest.raises(InputError, match=r"engine is 'sglang'; expected 'transformer_lens' or 'vllm'"):
        extract_activations(model, RAGGED, 2, engine="sglang")  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"'blocks.2.hook_mlp_out' cannot be read in vLLM"):
        extract_activations(MODEL_FOLDER, RAGGED, "blocks.2.hook_mlp_out", engine="vllm")
    with pytest.raises(EngineError, match=r"enable_prefix_caching is True; an engine for activations needs False"):
        ActivationEngine(MODEL_FOLDER, enable_prefix_caching=True)
    with pytest.raises(InputError, match=r"7 is no hook point of a model with 6 layers"):
        ActivationEngine(MODEL_FOLDER, [7])
    with pytest.raises(InputError, match=r"expected distinct layers or hook names"):
        ActivationEngine(MODEL_FOLDER, [1, 1])


def test_a_prompt_with_activations_that_are_not_finite_is_named(
    engine: ActivationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = ActivationEngine._tensor

    def damaged(self: ActivationEngine, payload: bytes) -> torch.Tensor:
        values = tensor(self, payload)
        values[-1, 7] = torch.nan
        return values

    monkeypatch.setattr(ActivationEngine, "_tensor", damaged)
    with pytest.raises(
        InputError, match=r"prompt 3 has an activation at 'blocks.1.hook_resid_post' that is NaN or infinite"
    ):
        extract_activations(engine, RAGGED[:4], 1, "all")


def test_a_graph_without_the_hook_is_found(engine: ActivationEngine) -> None:
    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    hooks = worker._lmprobe._hooks
    name = "blocks.3.hook_resid_post"
    fires, hooks.by_name[name].fires = hooks.fires, None
    hooks.fires = hooks.fires.clone()  # what the graph counts in is no longer what is looked at
    try:
        with pytest.raises(EngineError, match="ran without the hooks that keep activations"):
            extract_activations(engine, RAGGED[:2], 3)
    finally:
        hooks.fires = fires
    extract_activations(engine, RAGGED[:2], 3)


# --- stores ------------------------------------------------------------------------------------------------------------

STORED: dict[str, Any] = {"hook_points": [1, 4], "pooling": ["mean", "all"], "keep_tokens": True, "prompts_per_shard": 4}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_store_equals_that_of_transformer_lens(engine: ActivationEngine, model: Any, tmp_path: Path) -> None:
    found = extract_to_store(engine, RAGGED, tmp_path / "vllm", **STORED)
    expected = extract_to_store(model, RAGGED, tmp_path / "lens", **STORED)
    found.verify()
    assert found.tokens() == expected.tokens()
    assert (found.digests() == expected.digests()).all() and (found.lengths() == expected.lengths()).all()
    for layer in (1, 4):
        for pooling in ("mean", "all"):
            torch.testing.assert_close(found.values(layer, pooling), expected.values(layer, pooling), rtol=1e-5, atol=CLOSE)
    differing = {line.split(":")[0] for line in found.manifest.differences(expected.manifest)}
    assert differing == {"engine", "max_tokens_per_batch", "batch_size", "weights_sha256"}
    assert (found.manifest.engine, expected.manifest.engine) == ("vllm", "transformer_lens")
    assert found.manifest.model_dtype == "float32" and "vllm" in found.manifest.versions
    assert (found.manifest.max_tokens_per_batch, found.manifest.batch_size) == (64, 4)


def test_a_store_does_not_go_on_with_another_engine(engine: ActivationEngine, model: Any, tmp_path: Path) -> None:
    lens, vllm = tmp_path / "lens", tmp_path / "vllm"
    extract_to_store(model, RAGGED, lens, shard=(0, 2), **STORED)
    extract_to_store(engine, RAGGED, vllm, shard=(1, 2), **STORED)
    before = contents(lens), contents(vllm)
    with pytest.raises(StoreError, match=r"begun with engine 'transformer_lens', and cannot go on with 'vllm'"):
        extract_to_store(MODEL_FOLDER, RAGGED, lens, engine="vllm", **STORED)
    with pytest.raises(StoreError, match=r"begun with engine 'vllm', and cannot go on with 'transformer_lens'"):
        extract_to_store(model, RAGGED, vllm, **STORED)
    with pytest.raises(StoreError, match=r'is of another extraction than .*: engine: "vllm", not "transformer_lens"'):
        merge_stores(tmp_path / "merged", [lens, vllm])
    assert (contents(lens), contents(vllm)) == before
    assert "engine" not in json.loads(before[0]["manifest.json"])["manifest"]  # as stores were before there were two


def test_a_number_that_float16_cannot_hold_is_an_error(
    engine: ActivationEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = ActivationEngine._tensor
    monkeypatch.setattr(ActivationEngine, "_tensor", lambda self, payload: 1e6 * tensor(self, payload))
    with pytest.raises(InputError, match=r"prompt \d+ has an activation of .*, more than float16 can hold"):
        extract_to_store(engine, RAGGED[:4], tmp_path / "store", 1, dtype="float16")


def test_a_killed_run_goes_on_where_it_stopped(engine: ActivationEngine, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, __file__, str(killed)], capture_output=True, text=True, check=False, env=os.environ, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = ActivationStore(killed)
    assert left.missing_shards == [1, 2]
    shard = (killed / "shard-00000.safetensors").read_bytes()
    found = extract_to_store(engine, RAGGED, killed, **STORED)
    expected = extract_to_store(engine, RAGGED, whole, **STORED)
    assert (killed / "shard-00000.safetensors").read_bytes() == shard
    assert found.missing_shards == [] and not [name for name in contents(killed) if ".tmp" in name]
    for layer in (1, 4):
        torch.testing.assert_close(found.values(layer, "all"), expected.values(layer, "all"), rtol=1e-5, atol=CLOSE)
    assert found.manifest.differences(expected.manifest) == []


def test_other_weights_are_another_store(shared: SharedEngine, tmp_path: Path) -> None:
    folder = tmp_path / MODEL_FOLDER.name
    folder.mkdir()
    for file in MODEL_FOLDER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    payload = bytearray((folder / "model.safetensors").read_bytes())
    payload[-1000] ^= 1
    (folder / "model.safetensors").write_bytes(payload)
    extract_to_store(shared.get(), RAGGED, tmp_path / "store", shard=(0, 2), **STORED)
    shared.stop()
    with (
        ActivationEngine(folder, [1, 4], enforce_eager=True, **SMALL) as other,
        pytest.raises(StoreError, match="holds another extraction; wanted is weights_sha256"),
    ):
        extract_to_store(other, RAGGED, tmp_path / "store", **STORED)


def killed_amid_the_second_shard(folder: Path) -> None:
    """In a process of its own: SIGKILL as the second group of prompts goes through the engine."""
    collect, calls = ActivationEngine._collect, []

    def killing(self: ActivationEngine, rows: list[list[int]], message: Any) -> Any:
        calls.append(rows)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return collect(self, rows, message)

    ActivationEngine._collect = killing  # type: ignore[method-assign]
    with ActivationEngine(MODEL_FOLDER, [1, 4], enforce_eager=True, **SMALL) as started:
        extract_to_store(started, RAGGED, folder, **STORED)


if __name__ == "__main__":
    killed_amid_the_second_shard(Path(sys.argv[1]))
