"""Which positions are steered or ablated: of prompts and generated text, with a cache or without, whatever the padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Tiny
from live_reference import BOS, EOS, PAD, PROMPTS, assert_same, encode, make_probe
from steering_reference import (
    GREEDY,
    HOOK,
    NEW,
    Edit,
    batch_of,
    by_hand,
    logits_of,
    vector_of,
)
from torch import Tensor

from lmprobe_tl import ablate, steer
from lmprobe_tl.hook_points import ForwardCall
from lmprobe_tl.live.chosen_positions import ChosenPositions


def plain_loop(tiny: Tiny, row: Sequence[int], positions: str, edit: Edit, steps: int = NEW) -> list[int]:
    """Greedy tokens of one unpadded row without a cache, by Hugging Face with a hook by hand."""
    ids, prompt = list(row), len(row)
    for _ in range(steps):
        column = torch.arange(len(ids))[None]
        chosen = {"all": column >= 0, "prompt": column < prompt, "generated": column >= prompt}[positions]
        chosen = chosen & ((column > 0) | (ids[0] != BOS))
        logits = by_hand(tiny, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), edit, chosen)
        ids.append(int(logits[0, -1].argmax()))
    return ids[prompt:]


WAYS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "generate": lambda model, tokens, mask: model.generate(tokens, attention_mask=mask, verbose=False, **GREEDY),
    "no cache": lambda model, tokens, mask: model.generate(
        tokens, attention_mask=mask, use_past_kv_cache=False, verbose=False, **GREEDY
    ),
    "hf": lambda model, tokens, mask: model.hf_generate(tokens, attention_mask=mask, **GREEDY),
    "hf odd chunks": lambda model, tokens, mask: model.hf_generate(
        tokens, attention_mask=mask, prefill_chunk_size=3, **GREEDY
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_generation_is_that_of_a_plain_loop(llama: Tiny, gpt2: Tiny, positions: str, way: str) -> None:
    for tiny in (llama, gpt2):
        rows, tokens, mask = batch_of(tiny)
        with steer(tiny.bridge, make_probe(), coefficient=15.0, positions=positions) as change:  # type: ignore[arg-type]
            output = WAYS[way](tiny.bridge, tokens, mask)
        found = output[:, tokens.shape[1] :].tolist()
        expected = [plain_loop(tiny, row, positions, push) for row in rows]
        for ids, wanted in zip(found, expected, strict=True):
            end = wanted.index(EOS) + 1 if EOS in wanted else NEW
            assert ids[:end] == wanted[:end]
        prompt = sum(len(row) - 1 for row in rows)
        seen = sum((ids.index(EOS) if EOS in ids[:-1] else NEW - 1) for ids in found)  # the last is never seen
        assert change[HOOK].n_positions == {"all": prompt + seen, "prompt": prompt, "generated": seen}[positions]
        assert change[HOOK].mean_norm == pytest.approx(15.0, rel=1e-4)


def push(x: Tensor) -> Tensor:
    return x + vector_of(make_probe(), 15.0)


def test_the_loops_of_different_positions_differ(llama: Tiny, gpt2: Tiny) -> None:
    for tiny in (llama, gpt2):
        made = {
            tuple(tuple(plain_loop(tiny, row, positions, edit)) for row in batch_of(tiny)[0])
            for positions, edit in (("all", push), ("prompt", push), ("generated", push), ("all", lambda x: x))
        }
        assert len(made) == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_do_not_matter(tiny: Tiny, side: str) -> None:
    rows, tokens, mask = batch_of(tiny)
    if side == "right":
        tokens = torch.tensor([row + [PAD] * (tokens.shape[1] - len(row)) for row in rows])
        mask = mask.flip(1)
    probe = make_probe()
    for block in (lambda: steer(tiny.bridge, probe, coefficient=9.0), lambda: ablate(tiny.bridge, probe)):
        with block() as together:
            found = logits_of(tiny, tokens, mask)
        apart = []
        for index, row in enumerate(rows):
            with block() as change:
                alone = logits_of(tiny, torch.tensor([row]))
            assert_same(found[index][mask[index].bool()], alone[0])
            apart.append(change[HOOK])
        n = sum(one.n_positions for one in apart)
        assert together[HOOK].n_positions == n
        for name in ("mean_norm", "residual_norm"):
            mean = sum(one.n_positions * getattr(one, name) for one in apart) / n
            assert getattr(together[HOOK], name) == pytest.approx(mean, rel=1e-3)


def test_a_cache_of_before_the_block_is_gone_on_with(llama: Tiny) -> None:
    """A prompt is processed once, unchanged, and what follows is steered: all of it, also as `generated`."""
    row, probe = encode(llama, PROMPTS[1], bos=True), make_probe()
    column = torch.arange(len(row) + 1)[None]
    expected = by_hand(
        llama, torch.tensor([[*row, 7]]), torch.ones_like(column), lambda x: x + vector_of(probe, 9.0), column == len(row)
    )
    for positions in ("all", "generated"):
        with torch.no_grad():
            _, kept = llama.bridge(torch.tensor([row]), return_type="logits_and_cache", use_cache=True)
            with steer(llama.bridge, probe, coefficient=9.0, positions=positions) as change:  # type: ignore[arg-type]
                found = llama.bridge(torch.tensor([[7]]), past_key_values=kept)
        assert_same(found[0, -1], expected[0, -1])
        assert change[HOOK].n_positions == 1


def test_a_later_token_with_the_id_of_bos_is_changed(llama: Tiny) -> None:
    with steer(llama.bridge, make_probe(), coefficient=1.0) as change:
        logits_of(llama, torch.tensor([[BOS, 5, BOS, 6]]))
    assert change[HOOK].n_positions == 3


class Fake:
    """As much of a model as positions are chosen by."""

    cfg = SimpleNamespace(eos_token_id=EOS)
    tokenizer = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


class Cache:
    """Stands for an object with keys and values."""


def chosen_in(positions: ChosenPositions, tokens: Sequence[Sequence[int]], start: int, mask: Any, kept: Any) -> Any:
    """Chosen and counted positions of a pass on `tokens`, as lists."""
    found = positions.of(ForwardCall(torch.tensor(tokens), start, None if mask is None else torch.tensor(mask), kept))
    return found.chosen.int().tolist(), found.counted.int().tolist()


def test_columns_after_a_rows_end_are_changed_and_not_counted() -> None:
    """Whether a row ends at EOS is not for us to say: where it goes on, it is changed and counted again."""
    positions, kept = ChosenPositions(Fake(), "all", include_bos=False), Cache()
    assert chosen_in(positions, [[EOS, 5], [6, 7]], 0, None, kept) == ([[1, 1]] * 2, [[1, 1]] * 2)  # no end in a prompt
    assert chosen_in(positions, [[EOS], [8]], 2, None, kept) == ([[1], [1]], [[0], [1]])
    assert chosen_in(positions, [[PAD], [8]], 3, None, kept) == ([[1], [1]], [[0], [1]])
    assert chosen_in(positions, [[9], [8]], 4, None, kept) == ([[1], [1]], [[1], [1]])
    assert chosen_in(positions, [[PAD], [8]], 5, None, kept) == ([[1], [1]], [[1], [1]])
    whole = [[5, 6], [7, 8]]
    chosen_in(positions, whole, 0, None, None)
    for column, counted in ((EOS, 0), (PAD, 0), (9, 1)):  # without a cache
        whole = [[*row, new] for row, new in zip(whole, (column, 7), strict=True)]
        width = len(whole[0])
        expected = [[0] * (width - 1) + [counted], [0] * (width - 1) + [1]]
        assert chosen_in(positions, whole, 0, None, None) == ([[1] * width] * 2, expected)


def test_bos_is_left_alone_in_whatever_chunk_it_comes() -> None:
    kept, mask = Cache(), [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    positions = ChosenPositions(Fake(), "prompt", include_bos=False)
    assert chosen_in(positions, [[PAD, PAD], [BOS, 5]], 0, [row[:2] for row in mask], kept)[0] == [[0, 0], [0, 1]]
    assert chosen_in(positions, [[BOS, 5], [BOS, 6]], 2, [row[:4] for row in mask], kept)[0] == [[0, 1], [1, 1]]
    assert chosen_in(positions, [[BOS], [6]], 4, mask, kept)[0] == [[0], [0]]  # generated
    positions = ChosenPositions(Fake(), "generated", include_bos=False)
    assert chosen_in(positions, [[BOS, 5]], 0, None, None)[0] == [[0, 0]]
    assert chosen_in(positions, [[BOS, 5, BOS]], 0, None, None)[0] == [[0, 0, 1]]


def test_each_cache_keeps_its_rows_ends() -> None:
    positions, first, second = ChosenPositions(Fake(), "all", include_bos=False), Cache(), Cache()
    chosen_in(positions, [[5, 6]], 0, None, first)
    chosen_in(positions, [[5, 6]], 0, None, None)
    positions.bind_cache(second)  # some models make it in the first pass
    assert chosen_in(positions, [[EOS]], 2, None, first)[1] == [[0]]
    assert chosen_in(positions, [[PAD]], 2, None, second)[1] == [[1]]
    assert chosen_in(positions, [[PAD]], 3, None, first)[1] == [[0]]


def test_generators_that_take_turns_keep_their_own_ends(llama: Tiny) -> None:
    """The report counts each generation's positions, however they are interleaved."""
    rows = batch_of(llama)[0]
    counts = []
    for interleaved in (False, True):
        with ablate(llama.bridge, make_probe()) as change:
            streams = [
                llama.bridge.generate_stream(torch.tensor([row]), max_tokens_per_yield=1, verbose=False, **GREEDY)
                for row in rows[:2]
            ]
            order = [0, 1] * (NEW + 1) if interleaved else [0] * (NEW + 1) + [1] * (NEW + 1)
            for index in order:
                next(streams[index], None)
        counts.append(change[HOOK].n_positions)
    assert counts[0] == counts[1] > 0
