"""Steering and ablation: the change that was asked for, what is reported of it, and what is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import D_MODEL, Tiny, blocks_of, load_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import BOS, PROMPTS, assert_same, encode, left_padded, make_probe
from steering_reference import (
    EVERYWHERE,
    GREEDY,
    HOOK,
    assert_logits,
    batch_of,
    by_hand,
    logits_of,
    raised_by,
    scores_in,
    vector_of,
    without,
)

from lmprobe_tl import ablate, steer
from lmprobe_tl.errors import (
    IncompatibleProbeError,
    InputError,
    ModelMismatchWarning,
    MonitorError,
    NothingChangedWarning,
    ProbeNeverFiredError,
    UnknownHookPointError,
)
from lmprobe_tl.hook_points import model_record
from lmprobe_tl.live.edit import Reading, projection
from lmprobe_tl.weights import ProbeWeights

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
