"""Steering and ablation: the change that was asked for, where it was asked for, and nothing left behind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import D_MODEL, Tiny, blocks_of, load_tiny
from embedded import embedded_model, embedded_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import BOS, EOS, PAD, PROMPTS, assert_same, encode, left_padded, make_probe
from torch import Tensor

from lmprobe_tl import Probe, ablate, attach_probes, extract_activations, steer
from lmprobe_tl.demo.task import PROBE_EVAL_MODULES, PROBE_TRAIN_MODULES, labelled_pieces
from lmprobe_tl.errors import (
    IncompatibleProbeError,
    InputError,
    ModelMismatchWarning,
    MonitorError,
    NothingChangedWarning,
    ProbeNeverFiredError,
    UnknownHookPointError,
)
from lmprobe_tl.hook_points import ForwardCall, model_record
from lmprobe_tl.live.chosen_positions import ChosenPositions
from lmprobe_tl.live.edit import Reading, projection
from lmprobe_tl.weights import ProbeWeights

HOOK = "blocks.2.hook_resid_post"
NEW = 4
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
EVERYWHERE: dict[str, Any] = {"include_bos": True}
Edit = Callable[[Tensor], Tensor]


def vector_of(probe: ProbeWeights, length: float) -> Tensor:
    return length * probe.direction[0] / probe.direction[0].norm()


def without(direction: Tensor) -> Edit:
    """x less its part along one direction [d_model], by a plain formula."""
    unit = direction / direction.norm()
    return lambda x: x - (x @ unit)[..., None] * unit


def by_hand(tiny: Tiny, tokens: Tensor, mask: Tensor, edit: Edit, chosen: Tensor | None = None, layer: int = 2) -> Tensor:
    """Logits of Hugging Face with a hook of our own on one block; chosen: [batch pos] bool, None = everywhere."""

    def change(_: Any, __: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        changed = edit(stream) if chosen is None else torch.where(chosen[..., None], edit(stream), stream)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = blocks_of(tiny.reference)[layer].register_forward_hook(change)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            return tiny.reference(tokens, attention_mask=mask, position_ids=positions).logits
    finally:
        handle.remove()


@contextmanager
def raised_by(error: type[Exception], message: str, block: Any) -> Iterator[Any]:
    """A block of changes that ends in this error."""
    with pytest.raises(error, match=message), block as change:
        yield change


def batch_of(tiny: Tiny) -> tuple[list[list[int]], Tensor, Tensor]:
    rows = [encode(tiny, text, bos=True) for text in PROMPTS]
    return rows, *left_padded(rows)


def logits_of(tiny: Tiny, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return tiny.bridge(tokens, attention_mask=mask)


def assert_logits(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    for row, real in enumerate(mask.bool()):
        assert_same(found[row][real], expected[row][real], f"row {row}")


# --- parity with a hook by hand ---


@pytest.mark.parametrize("include_bos", [True, False])
def test_steering_is_what_a_hook_by_hand_does(tiny: Tiny, include_bos: bool) -> None:
    _, tokens, mask = batch_of(tiny)
    probe = make_probe()
    chosen = mask.bool() & ((tokens != BOS) | torch.tensor(include_bos))
    with steer(tiny.bridge, probe, coefficient=3.0, include_bos=include_bos) as change:
        found = logits_of(tiny, tokens, mask)
    expected = by_hand(tiny, tokens, mask, lambda x: x + vector_of(probe, 3.0), chosen)
    assert_logits(found, expected, mask)
    assert change[HOOK].n_positions == int(chosen.sum())
    other = by_hand(tiny, tokens, mask, lambda x: x + vector_of(probe, 3.0), mask.bool() & ((tokens != BOS) ^ chosen))
    assert (found - other)[mask.bool()].abs().max() > 1e-2  # the control


def test_ablation_is_what_a_hook_by_hand_does(tiny: Tiny) -> None:
    _, tokens, mask = batch_of(tiny)
    probe = make_probe()
    with ablate(tiny.bridge, probe, **EVERYWHERE):
        found = logits_of(tiny, tokens, mask)
    assert_logits(found, by_hand(tiny, tokens, mask, without(probe.direction[0])), mask)
    assert (found - by_hand(tiny, tokens, mask, lambda x: x))[mask.bool()].abs().max() > 1e-2


def test_a_tensor_at_other_hook_points_is_changed_there(tiny: Tiny) -> None:
    _, tokens, mask = batch_of(tiny)
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    with ablate(tiny.bridge, direction, hook_points=1, **EVERYWHERE) as change:
        found = logits_of(tiny, tokens, mask)
    assert list(change) == ["blocks.1.hook_resid_post"]
    assert_logits(found, by_hand(tiny, tokens, mask, without(direction), layer=1), mask)
    with steer(tiny.bridge, direction, coefficient=float(2 * direction.norm()), hook_points=1, **EVERYWHERE):
        found = logits_of(tiny, tokens, mask)
    assert_logits(found, by_hand(tiny, tokens, mask, lambda x: x + 2 * direction, layer=1), mask)


def test_ablating_all_that_writes_equals_weights_that_cannot_write(llama: Tiny, tiny_folders: Any) -> None:
    """Arditi et al.: the same as to take the direction out of every matrix that writes into the stream."""
    tokens, mask = left_padded([encode(llama, text, bos=True) for text in PROMPTS])
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    writers = ["hook_embed", *(f"blocks.{i}.{name}" for i in range(4) for name in ("hook_attn_out", "hook_mlp_out"))]
    with ablate(llama.bridge, direction, hook_points=writers, **EVERYWHERE):
        found = logits_of(llama, tokens, mask)
    edited = load_tiny("llama", tiny_folders["llama"])
    take_out = without(direction)
    with torch.no_grad():
        embedding = edited.reference.get_input_embeddings().weight
        embedding.copy_(take_out(embedding))
        for block in blocks_of(edited.reference):
            for matrix in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                matrix.copy_(take_out(matrix.T).T)
    expected = by_hand(edited, tokens, mask, lambda x: x)
    assert_logits(found, expected, mask)
    with ablate(llama.bridge, direction, hook_points="all", **EVERYWHERE):  # the control: blocks write it anew
        assert (logits_of(llama, tokens, mask) - expected)[mask.bool()].abs().max() > 1e-2


# --- what the probe reads then ---


def scores_in(tiny: Tiny, probes: Any, tokens: Tensor, mask: Tensor) -> dict[str, list[Tensor]]:
    with attach_probes(tiny.bridge, probes) as monitor:
        logits_of(tiny, tokens, mask)
    return {name: monitor.token_scores(name) for name in monitor.plan.probes}


def test_ablation_makes_the_logit_the_intercept_and_steering_moves_it_by_the_coefficient(tiny: Tiny) -> None:
    _, tokens, mask = batch_of(tiny)
    probe = make_probe()
    plain = scores_in(tiny, probe, tokens, mask)["p"]
    with ablate(tiny.bridge, probe) as change:
        ablated = scores_in(tiny, probe, tokens, mask)["p"]
    with steer(tiny.bridge, probe, coefficient=-2.5, unit="logit"):
        steered = scores_in(tiny, probe, tokens, mask)["p"]
    with steer(tiny.bridge, probe, coefficient=2.5, unit="logit", label=0):
        assert_same(scores_in(tiny, probe, tokens, mask)["p"][1], steered[1])
    with ablate(tiny.bridge, probe, to=0.75):
        set_to = scores_in(tiny, probe, tokens, mask)["p"]
    assert torch.cat([row[1:] for row in plain]).std() > 0.1
    for row, before in enumerate(plain):
        assert_same(ablated[row][1:], probe.intercept.expand(len(before) - 1))
        assert_same(set_to[row][1:], torch.full((len(before) - 1,), 0.75))
        assert_same(steered[row][1:], before[1:] - 2.5)
        for changed in (ablated, set_to, steered):  # BOS is left alone
            assert_same(changed[row][:1], before[:1])
    found, counted = change[HOOK], torch.cat([row[1:] for row in plain])
    assert found.before["p"] == pytest.approx(float(counted.mean()), abs=1e-4)
    assert found.after["p"] == pytest.approx(float(probe.intercept), abs=1e-4)
    assert found.n_positions == len(counted)


def test_the_shortest_change_is_made(gpt2: Tiny) -> None:
    """Any other that gives the same logit has a further part, at a right angle to the direction."""
    _, tokens, mask = batch_of(gpt2)
    probe = make_probe()
    for block in (
        steer(gpt2.bridge, probe, coefficient=2.0, unit="logit"),
        ablate(gpt2.bridge, probe, to=1.0),
        ablate(gpt2.bridge, probe),
    ):
        with block as change:
            logits_of(gpt2, tokens, mask)
        moved = abs(change[HOOK].after["p"] - change[HOOK].before["p"])  # type: ignore[operator]
        # the mean of lengths is no shorter than the length of the mean
        assert change[HOOK].mean_norm >= 0.999 * moved / float(probe.direction.norm())
        assert change[HOOK].max_norm >= change[HOOK].mean_norm > 0
    with steer(gpt2.bridge, probe, coefficient=2.0, unit="logit") as change:
        logits_of(gpt2, tokens, mask)
    assert change[HOOK].max_norm == pytest.approx(2 / float(probe.direction.norm()), rel=1e-3)


def test_several_probes_and_classes_at_one_hook_point_become_constant_together(gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    probes = [
        make_probe("p"),
        make_probe("classes", "blocks.2.hook_out", seed=1, n_classes=3),  # the same hook point by another name
        make_probe("elsewhere", "blocks.1.hook_out", seed=2),
    ]
    with ablate(gpt2.bridge, probes, **EVERYWHERE) as change:
        scores = scores_in(gpt2, probes, tokens, mask)
    assert list(change) == [HOOK, "blocks.1.hook_out"]
    for probe in probes:
        for row in scores[probe.name]:
            assert_same(row, probe.intercept.expand(len(row), -1).squeeze(1 if probe.is_binary else -1))
    assert change[HOOK].after["classes"] == pytest.approx(probes[1].intercept.tolist(), abs=1e-4)
    with ablate(gpt2.bridge, [probes[0], probes[2]], to=0.0, **EVERYWHERE):
        for row in scores_in(gpt2, probes[:1], tokens, mask)["p"]:
            assert row.abs().max() < 1e-4


def test_a_class_is_steered_by_its_own_row(gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    probe = make_probe(n_classes=3)
    plain = scores_in(gpt2, probe, tokens, mask)["p"]
    with steer(gpt2.bridge, probe, coefficient=1.5, unit="logit", label=2, **EVERYWHERE):
        steered = scores_in(gpt2, probe, tokens, mask)["p"]
    for before, after in zip(plain, steered, strict=True):
        assert_same(after[:, 2], before[:, 2] + 1.5)
        assert (after - before)[:, :2].abs().max() < 1.4


def test_a_probe_of_several_hook_points_is_steered_and_ablated_at_each(gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    hooks = ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")
    probe = make_probe(hook_points=hooks)
    with ablate(gpt2.bridge, probe, **EVERYWHERE):
        for row in scores_in(gpt2, probe, tokens, mask)["p"]:
            assert_same(row, probe.intercept.expand(len(row)))
    for unit, total in (("logit", 2.0), ("norm", 2 * float(probe.direction.norm()))):
        with steer(gpt2.bridge, probe, coefficient=2.0, unit=unit) as change:  # type: ignore[arg-type]
            logits_of(gpt2, tokens, mask)
        moved = sum(change[hook].after["p"] - change[hook].before["p"] for hook in hooks)  # type: ignore[operator, misc]
        assert moved == pytest.approx(total, rel=1e-3)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 10_000))
def test_a_projection_is_idempotent_and_leaves_what_is_orthogonal(rank: int, copies: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, 12, generator=generator) * torch.logspace(-3, 3, rank)[:, None]
    mixed = torch.randn(copies, rank, generator=generator) @ rows  # rows that depend on the others
    weight = torch.cat([rows, mixed])
    edit = projection([Reading("p", HOOK, weight, torch.zeros(len(weight)))])
    x = torch.randn(7, 12, generator=generator)
    once = edit.apply(x)
    assert len(edit.removed) == rank
    torch.testing.assert_close(edit.apply(once), once, atol=1e-4, rtol=1e-4)
    assert ((once @ weight.T) / weight.norm(dim=-1)).abs().max() < 1e-4
    torch.testing.assert_close((x - once) @ once.T, torch.zeros(7, 7), atol=1e-3, rtol=0)


# --- positions ---


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


# --- the model is left as found ---


def test_nothing_leaks_after_the_block_or_an_exception(tiny: Tiny) -> None:
    _, tokens, mask = batch_of(tiny)
    plain = logits_of(tiny, tokens, mask)
    with ablate(tiny.bridge, make_probe(), hook_points="all"):
        changed = logits_of(tiny, tokens, mask)
    assert (plain - changed)[mask.bool()].abs().max() > 1e-2
    torch.testing.assert_close(logits_of(tiny, tokens, mask), plain, rtol=0, atol=0)
    with raised_by(RuntimeError, "stop here", steer(tiny.bridge, make_probe(), coefficient=1.0)) as change:
        logits_of(tiny, tokens, mask)
        raise RuntimeError("stop here")
    assert change[HOOK].n_positions > 0
    torch.testing.assert_close(logits_of(tiny, tokens, mask), plain, rtol=0, atol=0)


def test_a_users_own_hooks_stay(gpt2: Tiny) -> None:
    seen = []
    with gpt2.bridge.hooks(fwd_hooks=[(HOOK, lambda x, hook: seen.append(1))]):
        with steer(gpt2.bridge, make_probe(), coefficient=1.0):
            logits_of(gpt2, torch.tensor([[5, 6]]))
        logits_of(gpt2, torch.tensor([[5, 6]]))
    assert len(seen) == 2


def test_probes_see_what_blocks_before_theirs_made(gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    here, later = make_probe("here"), make_probe("later", "blocks.3.hook_out", seed=1)
    plain = scores_in(gpt2, [here, later], tokens, mask)
    with steer(gpt2.bridge, here, coefficient=3.0, unit="logit"):
        inside = scores_in(gpt2, [here, later], tokens, mask)
    with attach_probes(gpt2.bridge, [here, later]) as outside, steer(gpt2.bridge, here, coefficient=3.0, unit="logit"):
        logits_of(gpt2, tokens, mask)
    for row, before in enumerate(plain["here"]):
        assert_same(inside["here"][row][1:], before[1:] + 3.0)
        assert_same(outside.token_scores("here")[row], before)
        assert_same(outside.token_scores("later")[row], inside["later"][row])
        assert (inside["later"][row] - plain["later"][row])[1:].abs().max() > 1e-2


def test_nested_blocks_act_one_after_another(gpt2: Tiny) -> None:
    tokens, mask = left_padded([encode(gpt2, PROMPTS[1], bos=True)])
    first, second = make_probe("first"), make_probe("second", seed=1)
    with steer(gpt2.bridge, first, coefficient=2.0, **EVERYWHERE), ablate(gpt2.bridge, second, **EVERYWHERE):
        found = logits_of(gpt2, tokens, mask)
    take_out = without(second.direction[0])
    assert_logits(found, by_hand(gpt2, tokens, mask, lambda x: take_out(x + vector_of(first, 2.0))), mask)


def test_extraction_inside_the_block_sees_the_change(gpt2: Tiny) -> None:
    probe = make_probe()
    with ablate(gpt2.bridge, probe):
        found = extract_activations(gpt2.bridge, PROMPTS, HOOK, pooling="last_token").values[HOOK]
    assert_same(probe.logits(found), probe.intercept.expand(len(PROMPTS)))


def test_passes_inside_a_callback_are_not_changed(gpt2: Tiny) -> None:
    """A judge asks the model as it is, in the midst of a pass that is steered."""
    tokens = torch.tensor([[BOS, 5, 6, 7]])
    plain, asked = logits_of(gpt2, tokens), []
    probe = make_probe("watch", "blocks.0.hook_out")
    with (
        steer(gpt2.bridge, make_probe(), coefficient=5.0) as change,
        attach_probes(gpt2.bridge, probe, on_token=lambda event: asked.append(logits_of(gpt2, tokens))),
    ):
        steered = logits_of(gpt2, torch.tensor([[BOS, 5, 6, 9]]))
    expected = by_hand(
        gpt2,
        torch.tensor([[BOS, 5, 6, 9]]),
        torch.ones(1, 4, dtype=torch.long),
        lambda x: x + vector_of(make_probe(), 5.0),
        torch.tensor([[False, True, True, True]]),
    )
    assert len(asked) == 4
    torch.testing.assert_close(asked[0], plain)
    assert_same(steered, expected)
    assert change[HOOK].n_positions == 3


def test_the_models_dtype_is_kept_and_the_report_is_of_what_really_changed(tiny_folders: Any) -> None:
    tiny = load_tiny("llama", tiny_folders["llama"])
    tiny.bridge.to(torch.bfloat16)
    kinds, tokens = [], torch.tensor([encode(tiny, PROMPTS[1], bos=True)])
    record = [(HOOK, lambda x, hook: kinds.append(x.dtype))]
    with steer(tiny.bridge, make_probe(), coefficient=3.0) as change, tiny.bridge.hooks(fwd_hooks=record):
        found = logits_of(tiny, tokens)
    assert kinds == [torch.bfloat16] and found.dtype == torch.bfloat16
    assert change[HOOK].mean_norm == pytest.approx(3.0, rel=0.02)
    with (
        pytest.warns(NothingChangedWarning, match="the activations were so already"),
        steer(tiny.bridge, make_probe(), coefficient=1e-12) as change,
    ):
        logits_of(tiny, tokens)
    assert change[HOOK].max_norm < 1e-9


def test_autocast_does_not_narrow_the_change(gpt2: Tiny) -> None:
    edit = projection([Reading("p", HOOK, make_probe().direction, make_probe().intercept)])
    x = 100 * torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        changed, reading = edit.apply(x), edit.read(x)
    torch.testing.assert_close(changed, edit.apply(x), rtol=0, atol=0)
    torch.testing.assert_close(reading, edit.read(x), rtol=0, atol=0)


def test_gradients_flow_through_a_change(gpt2: Tiny) -> None:
    with ablate(gpt2.bridge, make_probe()):
        logits = gpt2.bridge(torch.tensor([[5, 6, 7]]))
    (gradient,) = torch.autograd.grad(logits[0, -1, 0], blocks_of(gpt2.bridge.original_model)[0].parameters().__next__())
    assert gradient.abs().max() > 0


# --- the report ---


def test_the_report_reads_as_a_line_a_hook_point(gpt2: Tiny) -> None:
    with steer(gpt2.bridge, make_probe(), coefficient=3.0, unit="norm") as change:
        assert str(change[HOOK]) == f"{HOOK}: no position changed"
        assert math.isnan(change[HOOK].mean_norm) and math.isnan(change[HOOK].ratio)
        logits_of(gpt2, torch.tensor([[BOS, 5, 6]]))
    one = change[HOOK]
    assert one.ratio == pytest.approx(3 / one.residual_norm, rel=1e-4)
    assert repr(change).startswith(f"Change(\n    {HOOK}: 2 positions changed by 3 on average, 3 at most (")
    assert f"'p' {one.before['p']:.3f} -> {one.after['p']:.3f}" in str(one)
    with pytest.raises(AttributeError):
        one.n_positions = 3  # type: ignore[misc]
    with pytest.raises(KeyError):
        _ = change["blocks.1.hook_out"]


def test_a_change_of_nothing_warns_in_one_line(gpt2: Tiny) -> None:
    with (
        pytest.warns(NothingChangedWarning, match=r"no position counted with positions='generated'") as caught,
        steer(gpt2.bridge, make_probe(), coefficient=3.0, positions="generated"),
    ):
        logits_of(gpt2, torch.tensor([[BOS, 5, 6]]))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(gpt2.bridge, make_probe(), coefficient=0.0) as change:  # a step of a sweep: nothing is what was asked for
            logits_of(gpt2, torch.tensor([[BOS, 5, 6]]))
    assert (change[HOOK].n_positions, change[HOOK].mean_norm) == (2, 0.0)


# --- what is refused ---


def refused(block: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), block():
        raise AssertionError("the block was entered")


def test_arguments_that_cannot_be_used_are_refused_with_a_reason(gpt2: Tiny, all_tiny: Any) -> None:
    model, probe, tensor = gpt2.bridge, make_probe(), torch.ones(D_MODEL)
    wide = make_probe(hook_points=(HOOK, "blocks.1.hook_out"))
    classes = make_probe(n_classes=3)
    for arguments, message in [
        ({"coefficient": math.nan}, "coefficient is nan; expected a finite number"),
        ({"coefficient": "4"}, "coefficient is '4'"),
        ({"unit": "percent"}, "unit is 'percent'; expected 'norm' .* or 'logit'"),
        ({"positions": "last"}, "positions is 'last'; expected 'all', 'prompt' or 'generated'"),
        ({"label": 5}, r"label is 5; expected one that probe 'p' has: \[0, 1\]"),
        ({"direction": classes}, r"label is None; expected one that probe 'p' has: \[0, 1, 2\]"),
        ({"direction": [probe]}, "steer takes one direction; nest"),
        ({"direction": tensor}, "a tensor does not say where it goes; give hook_points"),
        ({"direction": tensor, "hook_points": 1, "unit": "logit"}, "a plain tensor has no logit"),
        ({"direction": tensor, "hook_points": 1, "label": 1}, "one direction without labels, not label=1"),
        ({"direction": torch.ones(2, D_MODEL), "hook_points": 1}, "not 2 directions"),
        ({"direction": torch.ones(8), "hook_points": 1}, r"shape \[8\]; expected \[32\]"),
        ({"direction": 0 * tensor, "hook_points": 1}, "0 or not finite"),
        ({"direction": wide, "hook_points": 1}, "'p' reads 2 hook points, each in its own direction"),
        ({"direction": 3}, "int is no probe"),
        ({"hook_points": "blocks.2.hook_resid_mid"}, "'blocks.2.ln2.hook_in' on this model: .* not the residual stream"),
    ]:
        whole: dict[str, Any] = {"direction": probe, "coefficient": 1.0} | arguments
        refused(lambda whole=whole: steer(model, **whole), InputError, message)  # type: ignore[misc]
    refused(
        lambda: steer(model, probe, coefficient=1.0, hook_points="blocks.2.hook_resid_pots"),
        UnknownHookPointError,
        "Closest",
    )
    refused(lambda: ablate(model, []), InputError, "the list is empty")
    refused(lambda: ablate(model, probe, to=math.inf), InputError, "to is inf")
    for several in (wide, classes):
        refused(lambda several=several: ablate(model, several, to=0.0), InputError, "to=0 sets the one logit")  # type: ignore[misc]
    twice = [probe, replace(probe, intercept=probe.intercept + 1).renamed("q")]
    refused(lambda: ablate(model, twice, to=0.0), InputError, "no activation gives 'p', 'q' a reading of 0 all at once")
    zero = ProbeWeights.from_direction(torch.zeros(D_MODEL), name="p", hook_points=HOOK)
    refused(lambda: ablate(model, zero), InputError, "'p' is 0 at 'blocks.2.hook_resid_post', which is no direction")
    refused(lambda: ablate(3, probe), InputError, "a int has no hook points")


def test_probes_that_do_not_fit_the_model_are_refused(gpt2: Tiny, llama: Tiny) -> None:
    refused(lambda: ablate(gpt2.bridge, make_probe(n_layers=12)), IncompatibleProbeError, "12 layers, but this one has 4")
    other = make_probe(model=model_record(llama.bridge))
    refused(lambda: ablate(gpt2.bridge, other, strict=True), IncompatibleProbeError, "trained on 'tiny-llama'")
    with pytest.warns(ModelMismatchWarning, match="tiny-llama"), ablate(gpt2.bridge, other):
        logits_of(gpt2, torch.tensor([[5, 6]]))
    curved = make_probe()
    object.__setattr__(curved.spec, "kind", "mlp")
    for block in (lambda: ablate(gpt2.bridge, curved), lambda: steer(gpt2.bridge, curved, coefficient=1.0)):
        refused(block, IncompatibleProbeError, "'p' is of kind 'mlp', which has no one direction; expected a linear probe")


def test_a_hook_point_that_is_not_reached_is_an_error(gpt2: Tiny) -> None:
    with raised_by(ProbeNeverFiredError, "which never fired", ablate(gpt2.bridge, make_probe())):
        pass
    tokens = torch.tensor([[5, 6]])
    with raised_by(ProbeNeverFiredError, "never fired", ablate(gpt2.bridge, make_probe())), torch.no_grad():
        gpt2.bridge(tokens, stop_at_layer=1)
    with raised_by(ProbeNeverFiredError, "did not reach", ablate(gpt2.bridge, make_probe())), torch.no_grad():
        gpt2.bridge(tokens)
        gpt2.bridge(tokens, stop_at_layer=1)
    with raised_by(MonitorError, "were removed", ablate(gpt2.bridge, make_probe())):
        gpt2.bridge.reset_hooks()
        gpt2.bridge(tokens)


def test_positions_that_cannot_be_told_apart_are_an_error(llama: Tiny, gpt2: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    with raised_by(MonitorError, "called without an attention mask", ablate(gpt2.bridge, make_probe())):
        logits_of(gpt2, tokens)
    with raised_by(MonitorError, "beam search", ablate(llama.bridge, make_probe())):
        llama.bridge.hf_generate(tokens, attention_mask=mask, num_beams=2, **GREEDY)
    per_head = ablate(gpt2.bridge, torch.ones(D_MODEL), hook_points="blocks.1.attn.hook_z")
    with raised_by(MonitorError, r"expected \(1, 2, 32\)", per_head):
        logits_of(gpt2, torch.tensor([[5, 6]]))


# --- the residual basis ---


@pytest.fixture(scope="module")
def centred(tiny_folders: Any) -> Tiny:
    tiny = load_tiny("gpt2", tiny_folders["gpt2"])
    tiny.bridge.enable_compatibility_mode(disable_warnings=True)
    return tiny


@cache
def zero_sum() -> ProbeWeights:
    direction = make_probe().direction
    direction = direction - direction.mean(dim=-1, keepdim=True)
    return ProbeWeights.from_direction(direction, 0.5, name="p", hook_points=HOOK, residual_basis="any")


def test_a_raw_probe_is_refused_on_the_centred_stream_and_another_does_the_same_on_both(gpt2: Tiny, centred: Tiny) -> None:
    _, tokens, mask = batch_of(gpt2)
    with pytest.raises(IncompatibleProbeError, match="raw residual stream"), ablate(centred.bridge, make_probe()):
        logits_of(centred, tokens, mask)
    with (
        pytest.raises(IncompatibleProbeError, match="raw residual stream"),
        ablate(centred.bridge, make_probe(), hook_points=1),
    ):
        logits_of(centred, tokens, mask)
    centred_basis = make_probe(residual_basis="centered")
    plain = logits_of(gpt2, tokens, mask).log_softmax(dim=-1)
    for probe in (zero_sum(), centred_basis):
        for act in (
            lambda model, probe=probe: steer(model, probe, coefficient=5.0),
            lambda model, probe=probe: ablate(model, probe, to=0.25),
        ):
            changes, logits = [], []
            for tiny in (gpt2, centred):
                with act(tiny.bridge) as change:  # type: ignore[misc]
                    logits.append(logits_of(tiny, tokens, mask).log_softmax(dim=-1))
                changes.append(change[HOOK])
            assert_logits(logits[0], logits[1], mask)
            assert (logits[0] - plain)[mask.bool()].abs().max() > 1e-2
            assert changes[0].mean_norm == pytest.approx(changes[1].mean_norm, rel=1e-3)
            assert changes[0].before["p"] == pytest.approx(changes[1].before["p"], abs=1e-3)


# --- the question that this is for, asked of the embedded model ---


def pieces_of(modules: Sequence[str]) -> list[Any]:
    return [next(labelled_pieces(embedded_tokenizer(), module, max_tokens=128)) for module in modules]


def next_token_loss(model: Any, rows: Sequence[Sequence[int]]) -> float:
    tokens, mask = left_padded(rows)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
    counted = mask[:, :-1].bool()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted]))


@cache
def inside_probe(classifier: str) -> ProbeWeights:
    pieces = pieces_of(PROBE_TRAIN_MODULES[:16])
    probe = Probe(embedded_model(), 3, "all", classifier=classifier, random_state=0, name="inside")
    return probe.fit([piece.text for piece in pieces], [piece.labels for piece in pieces]).weights_


def test_taking_out_a_direction_that_the_model_uses_costs_more_than_as_large_a_change_elsewhere() -> None:
    model = embedded_model()
    rows = [[BOS, *piece.token_ids] for piece in pieces_of(PROBE_EVAL_MODULES[:10])]
    hook_point = "blocks.3.hook_resid_post"
    plain = next_token_loss(model, rows)
    with ablate(model, inside_probe("mass_mean")) as change:
        cost = next_token_loss(model, rows) - plain
    elsewhere = []
    for seed in range(3):
        direction = torch.randn(192, generator=torch.Generator().manual_seed(seed))
        with steer(model, direction, coefficient=change[hook_point].mean_norm, hook_points=hook_point) as control:
            elsewhere.append(next_token_loss(model, rows) - plain)
        assert control[hook_point].mean_norm == pytest.approx(change[hook_point].mean_norm, rel=1e-3)
        with ablate(model, direction, hook_points=hook_point):  # what lies along it by chance is less
            elsewhere.append(next_token_loss(model, rows) - plain)
    assert cost > 1.5 * max(elsewhere) > 0


def test_steering_by_a_probe_decides_what_the_model_writes() -> None:
    model = embedded_model()
    prompt = torch.tensor([[BOS, *embedded_tokenizer()("def load(path):\n", add_special_tokens=False)["input_ids"]]])
    written = {}
    for coefficient in (-8.0, 8.0):
        with steer(model, inside_probe("mass_mean"), coefficient=coefficient, unit="logit"):
            output = model.generate(prompt, max_new_tokens=12, do_sample=False, verbose=False, return_type="tokens")
        written[coefficient] = embedded_tokenizer().decode(output[0, prompt.shape[1] :])
    assert written[8.0].lstrip().startswith(("#", '"""'))
    assert not set(written[-8.0]) & set("#\"'")
