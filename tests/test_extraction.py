"""Extraction against Hugging Face's own activations of each row alone, for every architecture, pooling and batch."""

from __future__ import annotations

import dataclasses
import gc
import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, D_MODEL, N_LAYERS, Tiny, blocks_of
from einops import rearrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl import ExtractedActivations, extract_activations, extraction, forward_batches
from lmprobe_tl.batch_pooling import BatchPooler, activation_strategy
from lmprobe_tl.errors import EmptyMaskError, InputError, LmprobeError, PromptTooLongError, UnknownHookPointError
from lmprobe_tl.extraction import extract_rows
from lmprobe_tl.forward_batches import centred, run_batches
from lmprobe_tl.hook_points import load_model
from lmprobe_tl.tokens import bos_id

BOS, EOS, PAD = 0, 1, 2
POSTS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS))
POST = POSTS[2]
# Unequal lengths, one token, BOS or none, pad and EOS ids as real tokens at either end, the full context. Each has an EOS.
ROWS = [
    [BOS, 5, 77, EOS, 140, 9, 30],
    [EOS],
    [PAD, 41, EOS, PAD, PAD],
    [BOS, 8, EOS],
    [BOS, *range(60, 80), EOS],
    [12, EOS, EOS, 200, BOS, EOS, 33, 34, 35],
    [BOS, *range(100, 100 + CONTEXT - 2), EOS],
    [7, EOS, 7, 7],
    [BOS, BOS, EOS, 3],
    [300, 301, 302, 303, EOS],
    [BOS, 17, 18, EOS, EOS],
]
TEXTS = ["the model reads", "a", "every word of a short line and then", "cats dogs rain", "sun", "music and light cats"]
REFERENCE: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "last_token": lambda hidden, row: hidden[-1],
    "first_token": lambda hidden, row: hidden[0],
    "mean": lambda hidden, row: without_leading_bos(hidden, row).mean(dim=0),
    "max": lambda hidden, row: without_leading_bos(hidden, row).max(dim=0).values,
    "min": lambda hidden, row: without_leading_bos(hidden, row).min(dim=0).values,
    "eos": lambda hidden, row: hidden[max(at for at, token in enumerate(row) if token == EOS)],
    "all": lambda hidden, row: without_leading_bos(hidden, row),
    "middle": lambda hidden, row: without_leading_bos(hidden, row)[(len(without_leading_bos(hidden, row)) - 1) // 2],
}


def middle(activations: Tensor, attention_mask: Tensor) -> Tensor:
    """A custom pooling: the middle one of the tokens that count."""
    picked = [
        values[here][(int(here.sum()) - 1) // 2] for values, here in zip(activations, attention_mask.bool(), strict=True)
    ]
    return torch.stack(picked)


POOLINGS = [*list(REFERENCE)[:-1], middle]


def without_leading_bos(hidden: Tensor, row: list[int]) -> Tensor:
    return hidden[1:] if row[0] == BOS else hidden


def name_of(pooling: Any) -> str:
    return pooling if isinstance(pooling, str) else pooling.__name__


@pytest.fixture(scope="module")
def hidden_states(all_tiny: dict[str, Tiny]) -> dict[str, list[list[Tensor]]]:
    """Model -> row -> layer -> [pos d_model]: what leaves each block for one unpadded row, by Hugging Face."""
    return {name: [[one.hidden(row, layer) for layer in range(N_LAYERS)] for row in ROWS] for name, one in all_tiny.items()}


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-4 of the largest expected entry."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def as_prompts(rows: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


@contextmanager
def counted_runs(model: Any) -> Iterator[list[int]]:
    """Batch sizes of the forward passes that begin inside the block."""
    sizes: list[int] = []
    handle = model.original_model.register_forward_pre_hook(
        lambda _, arguments, named: sizes.append(len(arguments[0] if arguments else named["input_ids"])), with_kwargs=True
    )
    try:
        yield sizes
    finally:
        handle.remove()


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS, ids=name_of)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_pooling_is_that_of_each_row_alone(
    tiny: Tiny, hidden_states: dict[str, Any], pooling: Any, batch_size: int
) -> None:
    found = extract_activations(tiny.bridge, as_prompts(ROWS), [3, 1], pooling, batch_size=batch_size, progress=False)
    assert found.hook_points == (POSTS[3], POSTS[1])
    assert found.pooling == name_of(pooling)
    assert found.tokens == ROWS
    for layer in (1, 3):
        expected = [
            REFERENCE[name_of(pooling)](hidden[layer], row)
            for hidden, row in zip(hidden_states[tiny.name], ROWS, strict=True)
        ]
        if pooling == "all":
            assert found.offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
            assert_same(found.values[POSTS[layer]], torch.cat(expected))
            for index, one in enumerate(expected):
                assert_same(found.values[POSTS[layer]][found.offsets[index] : found.offsets[index + 1]], one)
        else:
            assert found.offsets is None
            assert_same(found.values[POSTS[layer]], torch.stack(expected))


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_padding_side_order_and_batch_mates_do_not_matter(
    tiny: Tiny, hidden_states: dict[str, Any], padding_side: str, sort: bool, batch_size: int
) -> None:
    """Every token of every layer, and every pooling, whichever way the batch is made."""

    def keep(activations: Tensor, batch: Any) -> dict[str, Tensor]:
        pooled = {
            name_of(pooling): BatchPooler(tiny.bridge, pooling)(activations, batch)
            for pooling in POOLINGS
            if pooling != "all"
        }
        return {"every token": activations.clone(), **pooled}

    seen: list[int] = []
    options = {"batch_size": batch_size, "sort_by_length": sort, "padding_side": padding_side, "progress": False}
    for batch, kept in run_batches(tiny.bridge, ROWS, POSTS, keep, **options):
        seen += batch.indices
        assert len(batch.indices) <= batch_size
        for layer, name in enumerate(POSTS):
            for row, index in enumerate(batch.indices):
                expected = hidden_states[tiny.name][index][layer]
                real = batch.attention_mask[row].bool()
                assert batch.tokens[row][real].tolist() == ROWS[index]
                assert_same(kept[name]["every token"][row][real], expected)
                for pooling in kept[name].keys() - {"every token"}:
                    assert_same(kept[name][pooling][row], REFERENCE[pooling](expected, ROWS[index]))
    assert sorted(seen) == list(range(len(ROWS)))
    assert seen == sorted(seen) or sort


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=12), min_size=1, max_size=9),
    batch_size=st.integers(1, 9),
)
def test_any_rows_in_any_batches_come_back_in_input_order(llama: Tiny, rows: list[list[int]], batch_size: int) -> None:
    found = extract_rows(llama.bridge, rows, [POST], "all", batch_size=batch_size, progress=False)
    expected = [without_leading_bos(llama.hidden(row, 2), row) for row in rows]
    assert_same(found.values[POST], torch.cat(expected))
    assert found.offsets.diff().tolist() == list(map(len, expected))


def test_include_bos_lets_it_count(tiny: Tiny, hidden_states: dict[str, Any]) -> None:
    hidden = [layers[2] for layers in hidden_states[tiny.name]]
    options = {"include_bos": True, "progress": False}
    found = extract_activations(tiny.bridge, as_prompts(ROWS), 2, "mean", **options)
    assert_same(found.values[POST], torch.stack([one.mean(dim=0) for one in hidden]))
    found = extract_activations(tiny.bridge, as_prompts(ROWS), 2, "all", **options)
    assert_same(found.values[POST], torch.cat(hidden))
    assert found.offsets.diff().tolist() == list(map(len, ROWS))
    found = extract_activations(tiny.bridge, as_prompts(ROWS), 2, middle, **options)
    assert_same(found.values[POST], torch.stack([one[(len(one) - 1) // 2] for one in hidden]))


def test_text_is_seen_with_the_bos_that_the_tokens_show(tiny: Tiny) -> None:
    found = extract_activations(tiny.bridge, TEXTS, 2, "mean", progress=False)
    prepends = tiny.name in ("gpt2", "llama")
    plain = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert found.tokens == [[BOS, *ids] if prepends else ids for ids in plain]
    expected = [tiny.hidden(row, 2)[int(prepends) :].mean(dim=0) for row in found.tokens]
    assert_same(found.values[POST], torch.stack(expected))


@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "resid_post"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_residual_stream_before_amid_and_after_a_block(tiny: Tiny, point: str, layer: int) -> None:
    name = f"blocks.{layer}.hook_{point}"
    if point == "resid_mid" and tiny.name == "neox":
        with pytest.raises(UnknownHookPointError):
            extract_activations(tiny.bridge, TEXTS, name)
        return
    block = blocks_of(tiny.reference)[layer]
    middle_norm = "ln_2" if tiny.name == "gpt2" else "post_attention_layernorm"
    seen: list[Tensor] = []

    def look(_: Any, arguments: tuple[Tensor, ...], *output: Any) -> None:
        value = output[0] if output else arguments[0]
        seen.append((value[0] if isinstance(value, tuple) else value)[0])

    if point == "resid_post":
        handle = block.register_forward_hook(look)
    else:
        handle = (block if point == "resid_pre" else getattr(block, middle_norm)).register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            for row in ROWS:
                tiny.reference(torch.tensor([row]))
    finally:
        handle.remove()
    found = extract_activations(tiny.bridge, as_prompts(ROWS), name, "all", include_bos=True, progress=False)
    assert_same(found.values[name], torch.cat(seen))


def test_the_last_layer_is_not_hugging_faces_last_hidden_state(tiny: Tiny) -> None:
    """Which stands after the final norm."""
    row = ROWS[4]
    with torch.no_grad():
        states = tiny.reference(torch.tensor([row]), output_hidden_states=True).hidden_states
    found = extract_activations(tiny.bridge, as_prompts([row]), "all", "all", include_bos=True, progress=False)
    for layer in range(N_LAYERS - 1):
        assert_same(found.values[POSTS[layer]], states[layer + 1][0])
    assert_same(found.values[POSTS[3]], tiny.hidden(row, 3))
    assert (found.values[POSTS[3]] - states[-1][0]).abs().max() > 0.1


def test_several_hook_points_in_one_pass_equal_each_alone(tiny: Tiny) -> None:
    names = ["blocks.3.hook_resid_post", "hook_embed", "blocks.1.mlp.hook_out", "blocks.0.hook_resid_pre"]
    with counted_runs(tiny.bridge) as sizes:
        together = extract_activations(tiny.bridge, TEXTS, names, "mean", batch_size=4, progress=False)
    assert sizes == [4, 2]
    assert together.hook_points == tuple(names)
    assert together.concatenated().shape == (len(TEXTS), 4 * D_MODEL)
    for index, name in enumerate(names):
        alone = extract_activations(tiny.bridge, TEXTS, name, "mean", batch_size=4, progress=False).values[name]
        assert_same(together.values[name], alone)
        assert torch.equal(together.concatenated()[:, index * D_MODEL : (index + 1) * D_MODEL], together.values[name])


def test_all_hook_points_are_every_layer(gpt2: Tiny) -> None:
    found = extract_activations(gpt2.bridge, TEXTS, progress=False)
    assert found.hook_points == POSTS
    assert found.pooling == "last_token"
    assert_same(found.values[POSTS[3]], torch.stack([gpt2.hidden(row, 3)[-1] for row in found.tokens]))


def test_centre_takes_the_mean_over_d_model_off_before_pooling(gpt2: Tiny, tiny_folders: dict[str, Path]) -> None:
    """And gives what a model with centred weights carries."""
    found = extract_rows(gpt2.bridge, ROWS, POSTS, "max", centre=True, progress=False)
    processed = load_model(tiny_folders["gpt2"])
    processed.enable_compatibility_mode()
    expected = extract_rows(processed, ROWS, POSTS, "max", progress=False)
    for index, name in enumerate(POSTS):
        assert_same(found.values[name], expected.values[name])
        alone = [REFERENCE["max"](centred(gpt2.hidden(row, index)), row) for row in ROWS]
        assert_same(found.values[name], torch.stack(alone))


def test_a_bfloat16_model_is_pooled_in_float32(tiny_folders: dict[str, Path], all_tiny: dict[str, Tiny]) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(tiny_folders["llama"]), device="cpu", dtype=torch.bfloat16)
    seen: dict[int, Tensor] = {}

    def average(activations: Tensor, attention_mask: Tensor) -> Tensor:
        assert activations.dtype == torch.float32
        for row in range(len(activations)):
            seen[int(attention_mask[row].sum())] = activations[row][attention_mask[row].bool()]
        return activations[:, -1].bfloat16()

    rows = [ROWS[4], ROWS[6], ROWS[9]]
    low = extract_rows(model, rows, [POST], average, progress=False).values[POST]
    assert low.dtype == torch.float32
    found = extract_rows(model, rows, [POST], "mean", progress=False).values[POST]
    exact = torch.stack([seen[length].double().mean(dim=0).float() for length in (21, 95, 5)])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)  # a mean in bfloat16 is off by 1e-2
    full = extract_rows(all_tiny["llama"].bridge, rows, [POST], "mean", progress=False).values[POST]
    assert 1e-4 < (found - full).abs().max() / full.abs().max() < 0.05


def test_a_native_model_without_tokenizer_takes_token_arrays() -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = TransformerBridgeConfig(d_model=16, n_layers=3, n_heads=2, d_head=8, n_ctx=24, d_vocab=50, act_fn="gelu")
    model = TransformerBridge.boot_native(config)
    assert model.tokenizer is None
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [0, 5, 6, 49, 20, 30], list(range(24))]
    for pooling in ("mean", "last_token", "all"):
        arrays = [torch.tensor(row) if index % 2 else np.array(row) for index, row in enumerate(rows)]
        found = extract_activations(model, arrays, "all", pooling, batch_size=4, progress=False)
        alone = [extract_activations(model, [torch.tensor(row)], "all", pooling, progress=False) for row in rows]
        for name in found.hook_points:
            assert_same(found.values[name], torch.cat([one.values[name] for one in alone]))
            if pooling == "all":  # no BOS is known, so that token 0 counts
                assert found.values[name].shape == (sum(map(len, rows)), 16)
                cache: dict[str, Tensor] = {}
                model.hook_dict[name].add_hook(lambda values, hook, cache=cache: cache.__setitem__("last", values))
                with torch.no_grad():
                    model(torch.tensor([rows[-1]]))
                model.reset_hooks()
                assert_same(found.values[name][-24:], cache["last"][0].detach())
    with pytest.raises(InputError, match="has no tokenizer, so text cannot be its prompt"):
        extract_activations(model, ["text"])
    with pytest.raises(PromptTooLongError, match=r"prompt 0 \(25 tokens\)"):
        extract_activations(model, [torch.arange(25)])
    with pytest.raises(InputError, match="no token of prompt 0 is EOS"):
        extract_activations(model, [torch.arange(5)], pooling="eos")


# --- prompts that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS, ids=name_of)
@pytest.mark.parametrize("prepend", [True, False])
def test_an_empty_prompt_is_named_before_the_model_runs(gpt2: Tiny, pooling: Any, prepend: bool) -> None:
    """Also where BOS alone would give a vector: the same one for every empty prompt."""
    prompts = ["a <eos>", "", "cats <eos>", "", torch.tensor([BOS])]
    with (
        counted_runs(gpt2.bridge) as sizes,
        pytest.raises(EmptyMaskError, match="no token counts in prompt 1, 3, 4;") as caught,
    ):
        extract_activations(gpt2.bridge, prompts, 0, pooling, prepend_bos=prepend)
    assert caught.value.rows == [1, 3, 4]
    assert not sizes


def test_bos_alone_is_a_prompt_only_when_bos_is_included(gpt2: Tiny) -> None:
    for pooling in ("mean", "last_token", "all"):
        found = extract_activations(gpt2.bridge, ["", "cats"], 2, pooling, include_bos=True, progress=False)
        assert_same(found.values[POST][0], gpt2.hidden([BOS], 2)[0])
    with pytest.raises(EmptyMaskError, match="prompt 0") as caught:
        extract_activations(gpt2.bridge, ["", "cats"], 2, include_bos=True, prepend_bos=False)
    assert caught.value.rows == [0]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("one text", {}, InputError, "prompts is one string"),
        ([{"role": "user", "content": "a"}], {}, InputError, "single chat message"),
        ([], {}, InputError, "prompts is empty"),
        ({"a": 1}, {}, InputError, "prompts is a dict"),
        ([1, 2], {}, InputError, r"prompts\[0\] is a int"),
        (["a", None], {}, InputError, r"prompts\[1\] is a NoneType"),
        ([torch.arange(97)], {}, PromptTooLongError, r"prompt 0 \(97 tokens\)"),
        (["a", "cats " * 60], {"max_length": 9}, PromptTooLongError, r"prompt 1 \(\d+ tokens\)"),
        ([torch.tensor([3, 999])], {}, InputError, "token id 999"),
        (
            ["a"],
            {"hook_points": "blocks.2.hook_resid_pots"},
            UnknownHookPointError,
            r"Closest: 'blocks\.2\.hook_resid_post'",
        ),
        (["a"], {"hook_points": []}, InputError, "hook_points is empty"),
        (["a"], {"pooling": "score:mean"}, InputError, "'score:mean' reduces scores, and extraction has none"),
        (["a"], {"pooling": "ema_max(0.5)"}, InputError, "reduces scores"),
        (["a"], {"pooling": "meen"}, InputError, "Closest: 'mean'"),
        (["a"], {"pooling": None}, InputError, "Unknown pooling strategy None"),
        (
            ["a", "b <eos>", "c"],
            {"pooling": "eos"},
            InputError,
            r"no token of prompt 0 is EOS \(ids \[1\]\); 2 such prompts",
        ),
        (["a"], {"batch_size": 0}, InputError, "batch_size is 0"),
        (["a"], {"truncation": "both"}, InputError, "truncation is 'both'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_refused_before_the_model_runs(
    gpt2: Tiny, prompts: Any, options: dict[str, Any], error: type[LmprobeError], message: str
) -> None:
    with counted_runs(gpt2.bridge) as sizes, pytest.raises(error, match=message):
        extract_activations(gpt2.bridge, prompts, **options)
    assert not sizes


def test_truncated_prompts_are_those_of_the_tokens_that_are_left(llama: Tiny) -> None:
    ids = list(range(3, 120))
    prompts = [torch.tensor([BOS, *ids]), torch.tensor([7, 8])]
    for side, kept in (("left", [BOS, *ids[-(CONTEXT - 1) :]]), ("right", [BOS, *ids[: CONTEXT - 1]])):
        found = extract_activations(llama.bridge, prompts, 2, truncation=side, progress=False)
        assert found.tokens == [kept, [7, 8]]
        assert_same(found.values[POST][0], llama.hidden(kept, 2)[-1])


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_q"])
@pytest.mark.parametrize("pooling", ["all", "mean", middle], ids=name_of)
def test_a_hook_point_without_one_vector_a_token_is_an_error(gpt2: Tiny, name: str, pooling: Any) -> None:
    with pytest.raises(
        InputError, match=rf"hook point '{name}' carries activations of shape \(.*\); expected one vector a token"
    ):
        extract_activations(gpt2.bridge, TEXTS, [0, name], pooling, progress=False)


# --- one id for BOS, EOS and pad ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_special_id(tiny_folders: dict[str, Path]) -> Any:
    """As GPT-2: one token, id 1, is BOS, EOS and pad."""
    model = load_model(tiny_folders["gpt2"])
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(model.tokenizer, name, "<eos>")
    assert bos_id(model) == EOS == model.cfg.eos_token_id
    return model


@pytest.mark.parametrize("batch_size", [1, 8])
def test_tokens_that_equal_the_pad_id_stay_in_where_they_are_real(one_special_id: Any, gpt2: Tiny, batch_size: int) -> None:
    texts = ["cats<eos>", "the model reads every word", "dogs<eos><eos>", "<eos>rain", "sun"]
    options = {"batch_size": batch_size, "progress": False}
    found = extract_activations(one_special_id, texts, 2, "mean", **options)
    assert [row[0] for row in found.tokens] == [EOS] * 5
    assert [row.count(EOS) for row in found.tokens] == [2, 1, 3, 1, 1]
    hidden = [gpt2.hidden(row, 2) for row in found.tokens]
    assert_same(found.values[POST], torch.stack([one[1:].mean(dim=0) for one in hidden]))
    last = extract_activations(one_special_id, texts, 2, "last_token", **options)
    assert_same(last.values[POST], torch.stack([one[-1] for one in hidden]))


def test_a_leading_bos_is_no_end_of_sequence(one_special_id: Any, gpt2: Tiny) -> None:
    """It would give one and the same vector for every prompt."""
    with pytest.raises(InputError, match=r"no token of prompt 1 is EOS \(ids \[1\]\); 2 such prompts"):
        extract_activations(one_special_id, ["cats<eos>", "dogs", "rain"], 2, "eos", include_bos=True)
    for include_bos in (True, False):
        options = {"include_bos": include_bos, "progress": False}
        found = extract_activations(one_special_id, ["cats<eos> dogs", "the model<eos>"], 2, "eos", **options)
        expected = [gpt2.hidden(row, 2)[len(row) - 1 - row[::-1].index(EOS)] for row in found.tokens]
        assert_same(found.values[POST], torch.stack(expected))


# --- custom pooling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "shape"),
    [
        (lambda activations, mask: activations, r"\(6, \d+, 32\)"),
        (lambda activations, mask: activations.mean(dim=(0, 1)), r"\(32,\)"),
        (lambda activations, mask: activations[:1, 0], r"\(1, 32\)"),
        (lambda activations, mask: activations[:, 0, :8], r"\(6, 8\)"),
        (lambda activations, mask: activations[:, 0].numpy(), "ndarray"),
        (lambda activations, mask: None, "NoneType"),
    ],
)
def test_a_callable_that_gives_no_vector_a_row_is_an_error(gpt2: Tiny, pooling: Any, shape: str) -> None:
    with pytest.raises(InputError, match=rf"the pooling callable returned {shape}; expected one vector a row, \(6, 32\)"):
        extract_activations(gpt2.bridge, TEXTS, 1, pooling, progress=False)


@pytest.mark.parametrize("name", ["all", "eos", "last_token", "first_token"])
def test_a_callable_is_called_whatever_its_own_name(gpt2: Tiny, name: str) -> None:
    def pooling(activations: Tensor, attention_mask: Tensor) -> Tensor:
        return middle(activations, attention_mask)

    pooling.__name__ = name
    found = extract_activations(gpt2.bridge, TEXTS, 2, pooling, progress=False)
    expected = extract_activations(gpt2.bridge, TEXTS, 2, middle, progress=False)
    assert torch.equal(found.values[POST], expected.values[POST])
    assert found.offsets is None


def test_a_callable_that_writes_in_place_spoils_nothing(tiny: Tiny) -> None:
    """Neither the model's stream and so the later layers, nor the masks of the next hook point."""

    def vandal(activations: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = middle(activations, attention_mask)
        activations.zero_()
        attention_mask.zero_()
        return pooled

    spoilt = extract_activations(tiny.bridge, TEXTS, [0, 1, 3], vandal, progress=False)
    clean = extract_activations(tiny.bridge, TEXTS, [0, 1, 3], middle, progress=False)
    for name in clean.hook_points:
        assert torch.equal(spoilt.values[name], clean.values[name])


def test_a_callable_object_is_reported_by_its_type(gpt2: Tiny) -> None:
    class Middle:
        def __call__(self, activations: Tensor, attention_mask: Tensor) -> Tensor:
            return middle(activations, attention_mask)

    assert extract_activations(gpt2.bridge, TEXTS, 2, Middle(), progress=False).pooling == "Middle"


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ("max", "max"),
        ("activation:max", "max"),
        ("activation:mean", "mean"),
        ("min", "min"),
        ("all", "all"),
        (middle, "middle"),
    ],
)
def test_bare_extremes_pool_activations_here(pooling: Any, name: str) -> None:
    assert activation_strategy(pooling) == name


# --- what it costs, and what it leaves behind --------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "all", middle, lambda activations, mask: activations[:, 0]], ids=name_of)
def test_unpooled_activations_of_past_batches_are_gone(llama: Tiny, pooling: Any) -> None:
    """With the cycle collector off: nothing waits for it."""
    alive: list[set[int]] = []

    def look(activations: Tensor, hook: Any) -> None:
        shape = activations.shape
        alive.append({one.data_ptr() for one in gc.get_objects() if type(one) is Tensor and one.shape == shape})

    llama.bridge.hook_dict[POSTS[2]].add_hook(look)
    gc.collect()
    gc.disable()
    try:
        extract_rows(
            llama.bridge,
            [[first, 6, 7, 8, 9, 10, 11] for first in range(5, 13)],
            [POSTS[0], POST],
            pooling,
            batch_size=2,
            progress=False,
        )
    finally:
        gc.enable()
        llama.bridge.reset_hooks()
    assert len(alive) == 4
    assert alive[0]
    assert len(alive[1]) == len(alive[2]) == len(alive[3])


@pytest.mark.parametrize("pooling", [*POOLINGS, lambda activations, mask: activations[:, 0]], ids=name_of)
def test_what_is_kept_of_a_batch_holds_no_unpooled_activations(
    gpt2: Tiny, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice would keep the whole tensor that it was cut from."""
    run, batches = extraction.run_batches, 0

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal batches
        for batch, kept in run(*arguments, **options):
            batches += 1
            for (values,) in kept.values():
                assert values.untyped_storage().nbytes() == values.numel() * 4
            yield batch, kept

    monkeypatch.setattr(extraction, "run_batches", watched)
    extract_rows(gpt2.bridge, ROWS, POSTS, pooling, batch_size=4, progress=False)
    assert batches == 4


def test_results_are_float32_on_the_cpu_without_gradients(tiny: Tiny) -> None:
    assert any(parameter.requires_grad for parameter in tiny.bridge.parameters())
    seen: list[bool] = []

    def pooling(activations: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled() or activations.requires_grad)
        return activations[:, 0]

    for one in ("mean", "all", pooling):
        found = extract_activations(tiny.bridge, TEXTS, [0, 3], one, progress=False)
        for values in found.values.values():
            assert (values.dtype, values.device.type, values.requires_grad) == (torch.float32, "cpu", False)
            assert values.is_contiguous()
    assert seen == [False, False]
    assert torch.is_grad_enabled()


def test_the_result_is_a_frozen_record(gpt2: Tiny) -> None:
    found = extract_activations(gpt2.bridge, TEXTS, 0, progress=False)
    assert isinstance(found, ExtractedActivations)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.pooling = "mean"


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that extraction might leave changed."""
    logits = model(torch.tensor([ROWS[4]])).detach()  # first: the first pass of all wires hooks of TransformerLens' own
    inner, tokenizer = model.original_model, model.tokenizer
    modules = dict(inner.named_modules())
    return {
        "weights": {name: value.clone() for name, value in inner.state_dict().items()},
        "gradients": [parameter.grad for parameter in inner.parameters()],
        "trainable": [parameter.requires_grad for parameter in inner.parameters()],
        "training": [module.training for module in modules.values()],
        "forwards": {name: module.__dict__.get("forward") for name, module in modules.items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules.values()],
        "hook points": {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "config": str(model.cfg),
        "inner config": str(inner.config),
        "tokenizer": (
            len(tokenizer),
            tokenizer.padding_side,
            tokenizer.truncation_side,
            str(tokenizer._tokenizer.truncation),
        ),
        "logits": logits,
    }


def assert_unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for key in before:
        if key in ("weights", "logits"):
            torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
        else:
            assert after[key] == before[key], key


def test_the_model_is_as_it_was_after_success_and_after_errors(tiny: Tiny) -> None:
    def fails_at_the_second_batch(activations: Tensor, attention_mask: Tensor) -> Tensor:
        if len(activations) == 2:
            raise ZeroDivisionError("in the pooling callable")
        return activations[:, 0]

    model = load_model(tiny.folder)  # fresh: what other tests left changed would be no change
    before = state_of(model)
    extract_activations(model, TEXTS, "all", "mean", progress=False)
    assert_unchanged(before, state_of(model))
    with pytest.raises(ZeroDivisionError, match="in the pooling callable"):
        extract_activations(model, TEXTS, [0, 3], fails_at_the_second_batch, batch_size=4, progress=False)
    assert_unchanged(before, state_of(model))
    with pytest.raises(InputError, match="the pooling callable returned"):
        extract_activations(model, TEXTS, [0, 3], lambda activations, mask: activations, progress=False)
    assert_unchanged(before, state_of(model))


def test_hooks_of_the_user_stay_and_are_seen(gpt2: Tiny) -> None:
    """An intervention of the user's is part of the model that is probed."""
    point = gpt2.bridge.hook_dict[POSTS[1]]
    clean = extract_activations(gpt2.bridge, TEXTS, [1, 2], "mean", progress=False)
    point.add_hook(lambda values, hook: values + 1)
    try:
        shifted = extract_activations(gpt2.bridge, TEXTS, [1, 2], "mean", progress=False)
        assert len(point.fwd_hooks) == 1
    finally:
        gpt2.bridge.reset_hooks()
    assert_same(shifted.values[POSTS[1]], clean.values[POSTS[1]] + 1)
    assert (shifted.values[POST] - clean.values[POST]).abs().max() > 0.5


def test_batches_left_unread_leave_no_hook(gpt2: Tiny) -> None:
    batches = run_batches(gpt2.bridge, ROWS, POSTS, lambda values, batch: values[:, 0], batch_size=2, progress=False)
    next(batches)
    assert not any(point.fwd_hooks for point in gpt2.bridge.hook_dict.values())
    batches.close()


# --- progress ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "on_terminal", "shown"),
    [(True, False, True), (True, True, True), (False, True, False), (None, True, True), (None, False, False)],
)
def test_the_progress_bar_counts_prompts_where_it_is_wanted(
    gpt2: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    progress: bool | None,
    on_terminal: bool,
    shown: bool,
) -> None:
    stream = Terminal() if on_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    extract_activations(gpt2.bridge, TEXTS, 0, progress=progress, batch_size=4)
    assert ("activations" in stream.getvalue() and "/6" in stream.getvalue()) is shown
    assert bool(stream.getvalue()) is shown
    assert capsys.readouterr().out == ""


def test_the_progress_bar_arrives_at_the_number_of_prompts(gpt2: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(forward_batches, "tqdm", Bar)
    extract_activations(gpt2.bridge, TEXTS, 0, progress=True, batch_size=4)
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6)]


def test_the_progress_bar_goes_to_stderr(gpt2: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    extract_activations(gpt2.bridge, TEXTS, 0, progress=True)
    captured = capsys.readouterr()
    assert (captured.out, "activations: " in captured.err) == ("", True)
    extract_activations(gpt2.bridge, TEXTS, 0, progress=False)
    extract_activations(gpt2.bridge, TEXTS, 0)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_centred_takes_the_mean_over_d_model_off() -> None:
    values = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])
    assert torch.equal(centred(values), torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]]))
    flat = rearrange(values, "batch pos d_model -> (batch pos) d_model")
    assert torch.equal(centred(flat), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))


# --- several poolings in one pass --------------------------------------------------------------------------------------


def test_poolings_in_one_pass_are_those_of_each_alone(tiny: Tiny) -> None:
    with counted_runs(tiny.bridge) as sizes:
        together = extract_activations(tiny.bridge, as_prompts(ROWS), [1, 3], pooling=POOLINGS, batch_size=4, progress=False)
    assert sizes == [1, 4, 4, 2]  # the long row would pad others
    assert list(together) == [name_of(pooling) for pooling in POOLINGS]
    for pooling in POOLINGS:
        alone = extract_activations(tiny.bridge, as_prompts(ROWS), [1, 3], pooling, batch_size=4, progress=False)
        found = together[name_of(pooling)]
        assert (found.pooling, found.hook_points, found.tokens) == (alone.pooling, alone.hook_points, alone.tokens)
        assert (found.offsets is None) == (pooling != "all")
        for name in alone.hook_points:
            assert torch.equal(found.values[name], alone.values[name])


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ([], "pooling is an empty list"),
        (["mean", "max", "mean"], "pooling names 'mean' more than once"),
        (("max", "activation:max"), "pooling names 'max' more than once"),
        (["mean", "score:mean"], "reduces scores"),
    ],
)
def test_lists_of_poolings_that_cannot_be_are_refused(gpt2: Tiny, pooling: Any, message: str) -> None:
    with counted_runs(gpt2.bridge) as sizes, pytest.raises(InputError, match=message):
        extract_activations(gpt2.bridge, TEXTS, 0, pooling=pooling)
    assert not sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centring_afterwards_is_centring_before(tiny_folders: dict[str, Path], dtype: torch.dtype) -> None:
    """For every pooling, against the mean taken off each token in double precision before pooling."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(tiny_folders["gpt2"]), device="cpu", dtype=dtype)
    options: dict[str, Any] = {"include_bos": True, "progress": False}
    found = extraction.extract_poolings(model, ROWS, [POST], POOLINGS, centre=True, **options)
    raw = extract_rows(model, ROWS, [POST], "all", **options)
    tokens = raw.values[POST].double()
    tokens = (tokens - tokens.mean(dim=1, keepdim=True)).float()
    for index, row in enumerate(ROWS):
        hidden = tokens[raw.offsets[index] : raw.offsets[index + 1]]
        for pooling in POOLINGS:
            one, name = found[name_of(pooling)], name_of(pooling)
            expected = REFERENCE[name](hidden, [-1 if token == BOS else token for token in row])  # BOS counts
            values = one.values[POST]
            values = values[one.offsets[index] : one.offsets[index + 1]] if pooling == "all" else values[index]
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert raw.values[POST].mean(dim=1).abs().max() > 0.01  # the control: there is something to take off


# --- equal prompts -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=14), batch_size=st.integers(1, 5))
def test_equal_prompts_are_computed_once_and_come_back_in_every_place(
    llama: Tiny, hidden_states: dict[str, Any], pattern: list[int], batch_size: int
) -> None:
    rows = [ROWS[index] for index in pattern]
    with counted_runs(llama.bridge) as sizes:
        found = extraction.extract_poolings(
            llama.bridge, rows, [POSTS[3], POSTS[1]], POOLINGS, batch_size=batch_size, progress=False
        )
    assert sum(sizes) == len(set(pattern))
    for pooling in POOLINGS:
        one, reference = found[name_of(pooling)], REFERENCE[name_of(pooling)]
        assert one.tokens == rows
        for layer in (1, 3):
            expected = [reference(hidden_states["llama"][index][layer], ROWS[index]) for index in pattern]
            assert_same(one.values[POSTS[layer]], (torch.cat if pooling == "all" else torch.stack)(expected))
        if pooling == "all":
            assert one.offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


# --- batches that do not fit -------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 10 bytes."),
    MemoryError(),
]


@contextmanager
def fails_above(model: Any, n_tokens: int, error: BaseException, *, module: Any = None) -> Iterator[list[tuple[int, int]]]:
    """The shapes [batch pos] that are tried; those of more tokens fail."""
    tried: list[tuple[int, int]] = []

    def look(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        values = arguments[0] if arguments else next(one for one in named.values() if isinstance(one, Tensor))
        tried.append(tuple(values.shape[:2]))
        if values.shape[0] * values.shape[1] > n_tokens:
            raise error

    handle = (module or model.original_model).register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: f"{type(error).__name__} {str(error)[:12]}")
@pytest.mark.parametrize("block", [None, 2])
def test_a_batch_that_does_not_fit_is_halved(
    gpt2: Tiny, hidden_states: dict[str, Any], error: BaseException, block: int | None
) -> None:
    """At the model's door, or in the middle of a pass, where a part of the hook points has been seen."""
    module = None if block is None else blocks_of(gpt2.bridge.original_model)[block]
    with fails_above(gpt2.bridge, 100, error, module=module) as tried:
        found = extraction.extract_poolings(gpt2.bridge, ROWS, POSTS, POOLINGS, max_tokens_per_batch=2**16, progress=False)
    assert tried[0] == (len(ROWS), CONTEXT)
    assert len(tried) > 3
    for pooling in POOLINGS:
        for layer, name in enumerate(POSTS):
            hidden = [layers[layer] for layers in hidden_states["gpt2"]]
            expected = [REFERENCE[name_of(pooling)](one, row) for one, row in zip(hidden, ROWS, strict=True)]
            assert_same(found[name_of(pooling)].values[name], (torch.cat if pooling == "all" else torch.stack)(expected))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=16), limit=st.integers(9, 60), budget=st.integers(1, 120))
def test_no_size_that_failed_is_tried_again(llama: Tiny, lengths: list[int], limit: int, budget: int) -> None:
    rows = [[3 + index] * length for index, length in enumerate(lengths)]
    with fails_above(llama.bridge, limit, OUT_OF_MEMORY[0]) as tried:
        seen = [
            index
            for batch, _ in run_batches(
                llama.bridge, rows, [POSTS[0]], lambda *_: 0, max_tokens_per_batch=budget, progress=False
            )
            for index in batch.indices
        ]
    assert sorted(seen) == list(range(len(rows)))
    assert all(batch * pos <= max(budget, pos) for batch, pos in tried)
    failed = float("inf")
    for batch, pos in tried:
        assert batch * pos < failed or batch == 1
        failed = min(failed, batch * pos) if batch * pos > limit else failed


@pytest.mark.parametrize("rows", [[[5, 6], ROWS[4], [7]], [[7], [7], [5, 6], [7], ROWS[4], ROWS[4]]])
def test_a_prompt_that_does_not_fit_alone_is_named(gpt2: Tiny, rows: list[list[int]]) -> None:
    place = rows.index(ROWS[4])  # among all prompts, not among those that differ
    message = rf"prompt {place} \(22 tokens\) does not fit in the device's memory, even alone\. Shorten it"
    with fails_above(gpt2.bridge, 21, OUT_OF_MEMORY[0]), pytest.raises(InputError, match=message):
        extract_rows(gpt2.bridge, rows, [POST], "mean", progress=False)
    with (
        fails_above(gpt2.bridge, 21, OUT_OF_MEMORY[0]),
        pytest.raises(InputError, match=rf"prompt {place + 100} \(22 tokens\)"),
    ):
        extract_rows(gpt2.bridge, rows, [POST], "mean", progress=False, first=100)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyboardInterrupt()],
    ids=repr,
)
def test_other_errors_pass_through_untouched(gpt2: Tiny, error: BaseException) -> None:
    with fails_above(gpt2.bridge, 0, error) as tried, pytest.raises(type(error)) as caught:
        extract_rows(gpt2.bridge, ROWS, [POST], "mean", progress=False)
    assert caught.value is error
    assert len(tried) == 1


# --- activations that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS, ids=name_of)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_named_by_prompt_and_hook_point(
    tiny_folders: dict[str, Path], pooling: Any, wrong: float
) -> None:
    model = load_model(tiny_folders["llama"])
    model.original_model.model.embed_tokens.weight.data[250] = wrong
    rows = [[5, EOS], [6, EOS], [5, EOS], [8, 9, 10, EOS], [250], [7, EOS]]
    clean = extract_rows(model, [*rows[:4], rows[5]], ["hook_embed"], pooling, progress=False)
    assert torch.isfinite(clean.values["hook_embed"]).all()
    rows[4] = [250, 250]
    model.cfg.eos_token_id = [EOS, 250]
    message = r"prompt 4 has an activation at 'hook_embed' that is NaN or infinite\. A model in float16 overflows"
    with pytest.raises(InputError, match=message):
        extract_rows(model, rows, ["hook_embed", POST], pooling, progress=False)


# --- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 30, 100, 2**16])
def test_a_pass_keeps_its_budget_of_tokens(gpt2: Tiny, max_tokens: int) -> None:
    expected = extract_activations(gpt2.bridge, as_prompts(ROWS), 2, "mean", batch_size=1, progress=False)
    with fails_above(gpt2.bridge, 10**6, ValueError()) as tried:
        found = extract_activations(
            gpt2.bridge, as_prompts(ROWS), 2, "mean", max_tokens_per_batch=max_tokens, progress=False
        )
    assert_same(found.values[POST], expected.values[POST])
    assert tried[0] == (len(ROWS) if max_tokens == 2**16 else 1, CONTEXT)
    assert all(batch * pos <= max_tokens or batch == 1 for batch, pos in tried)
    assert sum(batch for batch, _ in tried) == len(ROWS)


@pytest.mark.parametrize("max_tokens", [0, -1, 2.0, "8", True])
def test_a_budget_that_cannot_be_is_refused(gpt2: Tiny, max_tokens: Any) -> None:
    with pytest.raises(InputError, match=rf"max_tokens_per_batch is {max_tokens!r}; expected an integer of at least 1"):
        extract_activations(gpt2.bridge, TEXTS, 0, max_tokens_per_batch=max_tokens, progress=False)


def test_without_vllm_its_engine_is_an_error_that_says_so() -> None:
    calls = (
        "lmprobe_tl.extract_activations('somewhere', ['x'], engine='vllm')",
        "lmprobe_tl.extract_to_store('somewhere', ['x'], 'a-store-that-is-not-there', engine='vllm')",
        "lmprobe_tl.calibrate_probe('somewhere', probe, ['x'] * 99, 0.05, engine='vllm')",
    )
    code = (
        "import sys, numpy, lmprobe_tl; from lmprobe_tl.errors import EngineError\n"
        "probe = lmprobe_tl.ProbeWeights.from_direction(numpy.ones(4), name='p', hook_points='blocks.0.hook_resid_post')\n"
        "sys.modules['vllm'] = None\n"
    ) + "".join(f"try:\n    {call}\nexcept EngineError as error:\n    print(error)\n" for call in calls)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    errors = done.stdout.splitlines()
    assert len(errors) == len(calls), done.stderr[-800:]
    for error in errors:
        assert "vLLM cannot be imported" in error and "pip install 'lmprobe-tl[vllm]'" in error
