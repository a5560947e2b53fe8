"""Hook points: names, models that cannot be loaded, our own hooks, and passes that go no further than they must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, D_MODEL, N_LAYERS, Tiny, blocks_of

from lmprobe_tl.errors import InputError, MonitorError, UnknownHookPointError
from lmprobe_tl.hook_points import (
    add_hook,
    context_length,
    device_of,
    end_of_sequence_ids,
    forward_once,
    hooks_on,
    is_centred,
    layer_count,
    layer_of,
    load_model,
    model_record,
    normalization,
    resolve_hook_points,
    run_to_hook_points,
    vocabulary_size,
    width,
)

ROW = torch.tensor([[0, 5, 9, 30, 41]])
POSTS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS))


@pytest.fixture(scope="module")
def centred_models(tiny_folders: dict[str, Path]) -> dict[str, Any]:
    """Fresh copies in compatibility mode, which centres the writing weights of LayerNorm models."""
    found = {}
    for name in ("gpt2", "neox", "llama"):
        found[name] = load_model(tiny_folders[name])
        found[name].enable_compatibility_mode()
    return found


def activations_at(model: Any, hook_names: Any, tokens: torch.Tensor = ROW) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    callbacks = {name: lambda values, name=name: found.__setitem__(name, values.clone()) for name in hook_names}
    run_to_hook_points(model, tokens, torch.ones_like(tokens), callbacks)
    return found


@contextmanager
def counted_forwards(model: Any) -> Iterator[dict[str, int]]:
    """Forward passes of each block and of the LM head, counted at Hugging Face's own modules."""
    inner = model.original_model
    modules = {f"block {layer}": block for layer, block in enumerate(blocks_of(inner))}
    modules["head"] = inner.get_output_embeddings()
    counts = dict.fromkeys(modules, 0)

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0, [0]),
        (3, [3]),
        (-1, [3]),
        (-4, [0]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        ([2, 0], [2, 0]),
        ((1, -1), [1, 3]),
        (range(1, 3), [1, 2]),
        (np.arange(3), [0, 1, 2]),
        ([np.int32(1), torch.tensor(-1)], [1, 3]),
        ("all", [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_layers_are_short_for_what_leaves_the_block(gpt2: Tiny, wanted: Any, expected: list[int]) -> None:
    assert resolve_hook_points(gpt2.bridge, wanted) == tuple(POSTS[layer] for layer in expected)


def test_names_are_kept_as_given_and_in_order(tiny: Tiny) -> None:
    wanted = ["blocks.2.hook_resid_pre", "blocks.0.hook_out", 1, "hook_embed", "blocks.3.mlp.hook_out"]
    expected = ("blocks.2.hook_resid_pre", "blocks.0.hook_out", POSTS[1], "hook_embed", "blocks.3.mlp.hook_out")
    assert resolve_hook_points(tiny.bridge, wanted) == expected
    assert resolve_hook_points(tiny.bridge, np.array(["blocks.2.hook_out", "hook_embed"])) == (
        "blocks.2.hook_out",
        "hook_embed",
    )
    assert resolve_hook_points(tiny.bridge, "blocks.2.hook_out") == ("blocks.2.hook_out",)


def test_an_alias_and_its_canonical_name_carry_the_same_activations(tiny: Tiny) -> None:
    found = activations_at(tiny.bridge, ["blocks.1.hook_resid_post", "blocks.1.hook_out", "blocks.2.hook_resid_pre"])
    assert torch.equal(found["blocks.1.hook_resid_post"], found["blocks.1.hook_out"])
    assert torch.equal(found["blocks.1.hook_resid_post"], found["blocks.2.hook_resid_pre"])


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_a_layer_that_does_not_exist_is_named_with_the_range(gpt2: Tiny, layer: int) -> None:
    message = rf"^layer {layer} does not exist: this model has 4 layers \(0 to 3, or -4 to -1\)\.$"
    for wanted in (layer, [0, layer]):
        with pytest.raises(UnknownHookPointError, match=message):
            resolve_hook_points(gpt2.bridge, wanted)


@pytest.mark.parametrize(
    ("misspelt", "closest"),
    [
        ("blocks.3.hook_resid_pots", "blocks.3.hook_resid_post"),
        ("blocks.1.hook_resid_psot", "blocks.1.hook_resid_post"),
        ("blocks.2.resid_pre", "blocks.2.hook_resid_pre"),
        ("Blocks.0.hook_resid_mid", "blocks.0.hook_resid_mid"),
    ],
)
def test_a_misspelt_name_suggests_the_closest(gpt2: Tiny, misspelt: str, closest: str) -> None:
    message = f"this model (4 layers) has no hook point '{misspelt}'. Closest: '{closest}'. All names: model.hook_dict"
    for wanted in (misspelt, [0, misspelt]):
        with pytest.raises(UnknownHookPointError) as caught:
            resolve_hook_points(gpt2.bridge, wanted)
        assert str(caught.value) == message
        assert isinstance(caught.value, KeyError)


@pytest.mark.parametrize("name", ["", "??", "Blocks", "ALL"])
def test_a_name_like_no_other_suggests_nothing_wrong(gpt2: Tiny, name: str) -> None:
    with pytest.raises(UnknownHookPointError, match=r"has no hook point '[^']*'\. All names: model\.hook_dict"):
        resolve_hook_points(gpt2.bridge, name)


def test_a_parallel_model_has_no_resid_mid(all_tiny: dict[str, Tiny]) -> None:
    with pytest.raises(UnknownHookPointError, match=r"no hook point 'blocks\.1\.hook_resid_mid'\. Closest: "):
        resolve_hook_points(all_tiny["neox"].bridge, "blocks.1.hook_resid_mid")


def test_a_model_without_the_alias_says_so_before_it_runs() -> None:
    bare = SimpleNamespace(cfg=SimpleNamespace(n_layers=2), hook_dict={"blocks.0.hook_out": object()})
    for wanted in (0, "all"):
        with pytest.raises(UnknownHookPointError, match=r"no hook point 'blocks\.0\.hook_resid_post'\. Closest: "):
            resolve_hook_points(bare, wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([], r"hook_points is empty; expected a layer, a hook name, a list of these, or 'all'"),
        (np.array([]), r"hook_points is empty"),
        (None, r"hook_points is None; expected a layer"),
        (1.0, r"hook_points is 1\.0; expected"),
        (np.float32(1), r"hook_points is 1\.0; expected"),
        ({1, 2}, r"hook_points is \{1, 2\}; expected"),
        ({1: "a"}, r"hook_points is \{1: 'a'\}; expected"),
        (True, r"True is no hook point"),
        ([1, False], r"False is no hook point"),
        ([1, None], r"None is no hook point; expected a layer \(int\), a hook name, or 'all'"),
        ([1.0], r"1\.0 is no hook point"),
        ([[1]], r"\[1\] is no hook point"),
        (np.array([[1]]), r"\[1\] is no hook point"),
        ([1, 2, 1], rf"names '{POSTS[1]}' more than once"),
        ([3, -1], rf"names '{POSTS[3]}' more than once"),
        ([3, POSTS[3]], rf"names '{POSTS[3]}' more than once"),
        ([1, "blocks.1.hook_out"], rf"names '{POSTS[1]}' and 'blocks\.1\.hook_out', which are the same hook point"),
    ],
    ids=str,
)
def test_hook_points_that_cannot_be_used_are_refused(gpt2: Tiny, wanted: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_hook_points(gpt2.bridge, wanted)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.0.hook_out", 0),
        ("blocks.11.ln2.hook_in", 11),
        ("hook_embed", None),
        ("ln_final.hook_in", None),
        ("xblocks.1.y", None),
    ],
)
def test_the_layer_of_a_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


# --- the model ---------------------------------------------------------------------------------------------------------


def one_line_of(model: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_model(model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_folder_is_one_clear_line(tmp_path: Path, kind: Any) -> None:
    expected = "expected a Hugging Face folder with config.json and weights."
    missing = kind(tmp_path / "missing")
    assert one_line_of(missing) == f"there is no model folder {str(missing)!r}; {expected}"
    (tmp_path / "file").touch()
    assert one_line_of(kind(tmp_path / "file")) == f"there is no model folder {str(tmp_path / 'file')!r}; {expected}"


@pytest.mark.parametrize("missing", [Path("models/missing"), "./models/missing", "../missing", "~/models/missing"])
def test_a_missing_relative_folder_is_no_name_on_the_hub(missing: str | Path) -> None:
    assert one_line_of(missing).startswith(f"there is no model folder {str(missing)!r}; ")


def test_a_name_that_is_neither_folder_nor_model_says_both() -> None:
    message = one_line_of("models/missing")
    assert message.startswith(
        "TransformerLens cannot load the model 'models/missing' (there is no local folder of that name"
    )


@pytest.mark.parametrize(
    ("model", "kind"),
    [(None, "NoneType"), (3, "int"), (b"gpt2", "bytes"), (["gpt2"], "list"), (torch.nn.Linear(2, 2), "Linear")],
)
def test_a_model_of_the_wrong_type_is_one_clear_line(model: Any, kind: str) -> None:
    message = one_line_of(model)
    assert message.startswith(
        f"a {kind} has no hook points (no 'hook_dict'). Expected a TransformerLens TransformerBridge, "
    )


def test_a_plain_hugging_face_model_is_told_from_a_bridge(gpt2: Tiny) -> None:
    assert one_line_of(gpt2.reference).startswith("a GPT2LMHeadModel has no hook points")


def delete(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (delete("config.json"), "model_type"),
        (delete("model.safetensors"), "no file named model.safetensors"),
        (write("model.safetensors", b"abc"), "header too small"),
        (write("config.json", b"{"), "not a valid JSON file"),
        (write("config.json", b'{"model_type": "unheard_of"}'), "unheard_of"),
        (write("tokenizer.json", b"{"), ""),
        (reshape, "ignore_mismatched_sizes"),
    ],
    ids=["no-config", "no-weights", "broken-weights", "broken-config", "unknown-type", "broken-tokenizer", "wrong-shapes"],
)
def test_a_damaged_folder_is_one_clear_line(tiny_folders: dict[str, Path], tmp_path: Path, damage: Any, reason: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folders["gpt2"], folder)
    damage(folder)
    message = one_line_of(folder)
    assert message.startswith(f"TransformerLens cannot load the model {str(folder)!r}: ")
    assert reason in message.split("': ", 1)[1]


def test_a_folder_without_a_model_is_one_clear_line(tmp_path: Path) -> None:
    assert "Unrecognized model" in one_line_of(tmp_path)


def test_a_loaded_model_is_handed_back_and_a_folder_is_loaded(gpt2: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(gpt2.bridge) is gpt2.bridge
    hooked = SimpleNamespace(hook_dict={})
    assert load_model(hooked) is hooked
    monkeypatch.chdir(gpt2.folder.parent)
    for folder in (str(gpt2.folder), gpt2.folder.name, Path(gpt2.folder.name)):
        loaded = load_model(folder)
        assert torch.equal(activations_at(loaded, [POSTS[3]])[POSTS[3]], activations_at(gpt2.bridge, [POSTS[3]])[POSTS[3]])


def test_facts_of_a_model(tiny: Tiny) -> None:
    model = tiny.bridge
    assert (layer_count(model), width(model), context_length(model), vocabulary_size(model)) == (
        N_LAYERS,
        D_MODEL,
        CONTEXT,
        329,
    )
    assert normalization(model) == ("layernorm" if tiny.name in ("gpt2", "neox") else "rmsnorm")
    assert device_of(model) == torch.device("cpu")
    assert end_of_sequence_ids(model) == (1,)


def test_facts_that_the_config_does_not_hold_are_unknown() -> None:
    model = SimpleNamespace(cfg=SimpleNamespace(n_ctx=None, d_vocab=-1, normalization_type=None), tokenizer=None)
    assert (context_length(model), vocabulary_size(model), normalization(model)) == (None, None, "unknown")
    assert end_of_sequence_ids(model) == ()
    model.cfg.eos_token_id = [1, 7]
    assert end_of_sequence_ids(model) == (1, 7)
    model.cfg.eos_token_id, model.tokenizer = None, SimpleNamespace(eos_token_id=5)
    assert end_of_sequence_ids(model) == (5,)


def test_the_record_of_a_model_is_stable_and_holds_no_path(
    all_tiny: dict[str, Tiny], centred_models: dict[str, Any]
) -> None:
    records = {name: model_record(one.bridge) for name, one in all_tiny.items()}
    for name, record in records.items():
        assert record.id == f"tiny-{name}"
        assert record.config_fingerprint == model_record(all_tiny[name].bridge).config_fingerprint
        assert len(record.config_fingerprint) == 16
    assert len({record.config_fingerprint for record in records.values()}) == len(records)
    for name, again in centred_models.items():
        assert model_record(again) == records[name]  # another load, and processed weights


def test_the_record_of_a_model_changes_with_its_shape_alone() -> None:
    def fingerprint(**changes: Any) -> str | None:
        cfg = {"d_model": 8, "n_layers": 2, "d_vocab": 50, "device": "cpu", "dtype": torch.float32, "model_name": "a/b"}
        return model_record(SimpleNamespace(cfg=SimpleNamespace(**(cfg | changes)))).config_fingerprint

    assert fingerprint() == fingerprint(device="cuda", dtype=torch.bfloat16, model_name="c")
    for change in ({"d_model": 9}, {"n_layers": 3}, {"d_vocab": 51}, {"normalization_type": "RMS"}):
        assert fingerprint(**change) != fingerprint()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/model", "org/model"), ("/home/me/secret/model", "model"), ("./up/model", "model"), (None, "unnamed")],
)
def test_the_record_of_a_model_names_it_without_its_folder(name: str | None, expected: str) -> None:
    assert model_record(SimpleNamespace(cfg=SimpleNamespace(model_name=name))).id == expected


# --- hooks of our own --------------------------------------------------------------------------------------------------


def test_a_hook_sees_the_activations_until_it_is_removed(tiny: Tiny) -> None:
    seen: list[torch.Tensor] = []
    handle = add_hook(tiny.bridge, POSTS[1], seen.append)
    others = add_hook(tiny.bridge, POSTS[1], lambda _: None)
    forward_once(tiny.bridge, ROW, torch.ones_like(ROW))
    handle.remove()
    handle.remove()
    assert len(tiny.bridge.hook_dict[POSTS[1]].fwd_hooks) == 1  # the other hook stays
    others.remove()
    forward_once(tiny.bridge, ROW, torch.ones_like(ROW))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], tiny.hidden(ROW[0].tolist(), 1), rtol=1e-4, atol=1e-4)


def test_a_callback_cannot_change_the_pass_by_what_it_returns(gpt2: Tiny) -> None:
    clean = activations_at(gpt2.bridge, [POSTS[3]])[POSTS[3]]
    handle = add_hook(gpt2.bridge, POSTS[1], lambda values: torch.zeros_like(values))
    try:
        assert torch.equal(activations_at(gpt2.bridge, [POSTS[3]])[POSTS[3]], clean)
    finally:
        handle.remove()


def test_hooks_go_when_the_block_ends_in_an_error(gpt2: Tiny) -> None:
    point = gpt2.bridge.hook_dict[POSTS[0]]
    with pytest.raises(ZeroDivisionError), hooks_on(gpt2.bridge, {POSTS[0]: print, POSTS[2]: print}):
        len(point.fwd_hooks) == 1 and 1 / 0
    assert not point.fwd_hooks


def test_hooks_go_when_one_of_them_cannot_be_set(gpt2: Tiny) -> None:
    with pytest.raises(KeyError), hooks_on(gpt2.bridge, {POSTS[0]: print, "nowhere": print}):
        pass
    assert not gpt2.bridge.hook_dict[POSTS[0]].fwd_hooks


# --- forward passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_no_layer_after_the_wanted_one_runs_nor_the_head(tiny: Tiny, layer: int) -> None:
    with counted_forwards(tiny.bridge) as counts:
        activations_at(tiny.bridge, [POSTS[layer], "blocks.0.hook_resid_pre"])
    assert counts == {f"block {other}": int(other <= layer) for other in range(N_LAYERS)} | {"head": 0}


def test_what_stands_before_a_block_does_not_run_it_to_its_end(tiny: Tiny) -> None:
    inner_mlp = blocks_of(tiny.bridge.original_model)[2].mlp
    ran: list[int] = []
    handle = inner_mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        activations_at(tiny.bridge, ["blocks.2.hook_resid_pre"])
        assert not ran
        activations_at(tiny.bridge, ["blocks.2.hook_resid_post"])
        assert ran == [1]
    finally:
        handle.remove()


def test_a_full_pass_runs_everything_once(tiny: Tiny) -> None:
    with counted_forwards(tiny.bridge) as counts:
        forward_once(tiny.bridge, ROW, torch.ones_like(ROW))
    assert set(counts.values()) == {1}


def test_a_pass_has_no_gradients_and_no_dropout_and_leaves_the_mode_as_it_was(gpt2: Tiny) -> None:
    model = gpt2.bridge
    clean = activations_at(model, POSTS)
    inner = list(model.original_model.modules())
    flags = [module.training for module in inner]
    seen: list[bool] = []
    handle = add_hook(model, POSTS[0], lambda values: seen.append(values.requires_grad or torch.is_grad_enabled()))
    try:
        model.train()
        inner[3].training = False
        before = [module.training for module in inner]
        assert sum(before) > 10
        in_training = activations_at(model, POSTS)
        assert [module.training for module in inner] == before
        with pytest.raises(ZeroDivisionError):
            run_to_hook_points(model, ROW, torch.ones_like(ROW), {POSTS[1]: lambda _: 1 / 0})
        forward_once(model, ROW, torch.ones_like(ROW))
        assert [module.training for module in inner] == before
    finally:
        handle.remove()
        model.eval()
    assert [module.training for module in inner] == flags
    assert all(torch.equal(in_training[name], clean[name]) for name in POSTS)
    assert seen == [False] * 3
    assert torch.is_grad_enabled()


def test_a_hook_point_that_stays_silent_is_an_error(gpt2: Tiny) -> None:
    """`hook_result` exists, and fires only where the model is told to split heads."""
    silent = "blocks.1.attn.hook_result"
    assert silent in gpt2.bridge.hook_dict
    with pytest.raises(MonitorError, match=rf"hook points \['{silent}'\] did not fire in the forward pass"):
        activations_at(gpt2.bridge, [POSTS[0], silent])


def test_no_cache_of_keys_and_values_is_filled(tiny: Tiny) -> None:
    caches: list[Any] = []
    handle = blocks_of(tiny.bridge.original_model)[0].register_forward_pre_hook(
        lambda _, arguments, named: caches.extend([*arguments[1:], *named.values()]), with_kwargs=True
    )
    try:
        activations_at(tiny.bridge, [POSTS[0]])
    finally:
        handle.remove()
    assert caches
    assert not [value for value in caches if hasattr(value, "get_seq_length")]


# --- the residual basis ------------------------------------------------------------------------------------------------


def test_a_centred_model_is_told_from_a_raw_one_at_every_hook_point(tiny: Tiny, centred_models: dict[str, Any]) -> None:
    names = ["blocks.0.hook_resid_pre", *POSTS]
    raw = activations_at(tiny.bridge, names)
    assert not any(is_centred(values[0]) for values in raw.values())
    if tiny.name == "qwen3":
        return
    processed = activations_at(centred_models[tiny.name], names)
    expected = normalization(tiny.bridge) == "layernorm"
    assert [is_centred(values[0]) for values in processed.values()] == [expected] * len(names)
    assert [is_centred(values[0].bfloat16()) for values in processed.values()] == [expected] * len(names)
    for name in names:
        shift = raw[name].mean(dim=-1, keepdim=True) if expected else 0
        torch.testing.assert_close(processed[name], raw[name] - shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_token_with_a_mean_is_enough_to_be_raw(dtype: torch.dtype, scale: float) -> None:
    values = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    values = (values - values.mean(dim=-1, keepdim=True)) * scale
    assert is_centred(values.to(dtype))
    values[7] += 0.05 * scale
    assert not is_centred(values.to(dtype))
