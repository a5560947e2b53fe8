"""The frozen probe: scores equal a plain numpy computation; copies stay apart; the basis laws hold."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import make_head_probe

from lmprobe_tl.calibration import Calibration
from lmprobe_tl.errors import EmptyMaskError, IncompatibleProbeError, InputError
from lmprobe_tl.probe_spec import HeadRecord, MetricRecord, PoolingRecord, ProbabilityRecord, ProbeSpec, ThresholdRecord
from lmprobe_tl.weights import ProbeWeights

HOOKS = ("blocks.3.hook_resid_post", "blocks.1.hook_resid_post")
WIDTH = 6
law = settings(deadline=None, max_examples=40)


def make_probe(n_classes: int = 2, n_hooks: int = 1, seed: int = 0, **spec_fields: Any) -> ProbeWeights:
    generator = torch.Generator().manual_seed(seed)
    n_outputs = 1 if n_classes == 2 else n_classes
    direction = torch.randn(n_outputs, n_hooks * WIDTH, generator=generator)
    intercept = torch.randn(n_outputs, generator=generator)
    labels = tuple(range(n_classes))
    return ProbeWeights.from_direction(
        direction, intercept, name="deceit", hook_points=HOOKS[:n_hooks], labels=labels, **spec_fields
    )


def activations_for(probe: ProbeWeights, leading: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.randn(*leading, probe.direction.shape[1], generator=torch.Generator().manual_seed(seed))


def numpy_logits(probe: ProbeWeights, activations: torch.Tensor) -> np.ndarray:
    scores = activations.double().numpy() @ probe.direction.double().numpy().T + probe.intercept.double().numpy()
    return scores[..., 0] if probe.n_classes == 2 else scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,), (1, 1)])
@pytest.mark.parametrize("n_classes, n_hooks", [(2, 1), (2, 2), (4, 2)])
def test_scores_equal_numpy(dtype: torch.dtype, leading: tuple[int, ...], n_classes: int, n_hooks: int) -> None:
    probe = make_probe(n_classes, n_hooks)
    activations = activations_for(probe, leading).to(dtype)
    expected = numpy_logits(probe, activations)
    logits, probabilities = probe.logits(activations), probe.probabilities(activations)
    assert logits.shape == probabilities.shape == leading + (() if n_classes == 2 else (n_classes,))
    assert logits.dtype == probabilities.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(probe(activations).numpy(), logits.numpy())
    odds = np.exp(expected)
    reference = odds / (1 + odds) if n_classes == 2 else odds / odds.sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities.numpy(), reference, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_narrow_the_scores() -> None:
    probe, width = make_probe(), WIDTH
    activations = activations_for(probe, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = torch.nn.functional.linear(activations, probe.direction)  # the control: autocast is really on
        logits = probe.logits(activations)
    assert narrow.dtype == torch.bfloat16 and activations.shape == (50, width)
    np.testing.assert_allclose(logits.numpy(), numpy_logits(probe, activations), rtol=1e-5, atol=1e-5)


def test_weights_follow_the_activations_to_their_device_once() -> None:
    probe = make_probe()
    on_meta = torch.empty(2, WIDTH, device="meta")
    assert probe.logits(on_meta).device.type == "meta"
    moved = probe._weights_on(on_meta.device)
    assert probe._weights_on(on_meta.device) is moved
    assert probe.direction.device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_made_or_moved_in_inference_mode_still_take_part_in_a_backward_pass(device: str) -> None:
    with torch.inference_mode():
        probe = make_probe()
        probe.logits(torch.zeros(1, WIDTH, device=device))
    activations = torch.zeros(3, WIDTH, device=device, requires_grad=True)
    probe.logits(activations).sum().backward()
    assert activations.grad is not None
    if device == "cpu":
        torch.testing.assert_close(activations.grad, probe.direction.expand(3, -1))


@pytest.mark.parametrize("shape", [(2, WIDTH + 1), (2, WIDTH), (), (WIDTH * 2, 1)])
def test_a_wrong_width_says_what_is_expected(shape: tuple[int, ...]) -> None:
    with pytest.raises(IncompatibleProbeError) as caught:
        make_probe(n_hooks=2).logits(torch.zeros(shape))
    text = str(caught.value)
    assert f"{list(shape)}" in text and "[..., 12]" in text
    assert f"2 x d_model 6, concatenated in this order: {HOOKS[0]}, {HOOKS[1]}" in text


@pytest.mark.parametrize("wrong", [torch.zeros(2, WIDTH, dtype=torch.long), np.zeros((2, WIDTH)), [0.0] * WIDTH])
def test_activations_must_be_a_float_tensor(wrong: Any) -> None:
    with pytest.raises(InputError, match="expected a tensor of a float dtype"):
        make_probe().logits(wrong)


def test_later_changes_of_the_callers_tensors_do_nothing() -> None:
    direction = torch.ones(1, WIDTH, requires_grad=True)
    intercept = torch.zeros(1)
    probe = ProbeWeights.from_direction(direction, intercept, name="p", hook_points=HOOKS[0])
    with torch.no_grad():
        direction.add_(5.0)
        intercept.add_(5.0)
    assert probe.direction.tolist() == [[1.0] * WIDTH] and probe.intercept.tolist() == [0.0]
    assert not probe.direction.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe.direction = direction  # type: ignore[misc]


def test_weights_are_contiguous_float32_copies_of_their_own() -> None:
    base = torch.randn(2 * WIDTH, 3, dtype=torch.float64)
    probe = ProbeWeights.from_direction(base.T[:, ::2], np.zeros(3), name="p", hook_points=HOOKS[0], labels=("a", "b", "c"))
    assert probe.direction.dtype == probe.intercept.dtype == torch.float32
    assert probe.direction.is_contiguous()
    assert probe.direction.untyped_storage().nbytes() == 4 * 3 * WIDTH
    torch.testing.assert_close(probe.direction, base.T[:, ::2].float())


@pytest.mark.parametrize(
    "direction, intercept, message",
    [
        (torch.zeros(2, WIDTH), torch.zeros(1), r"direction has shape \[2, 6\]; expected \[1, 6\]"),
        (torch.zeros(1, WIDTH - 1), torch.zeros(1), r"direction has shape \[1, 5\]; expected \[1, 6\]"),
        (torch.zeros(WIDTH), torch.zeros(1), r"direction has shape \[6\]; expected \[1, 6\]"),
        (torch.zeros(1, WIDTH), torch.zeros(2), r"intercept has shape \[2\]; expected \[1\]"),
        (torch.tensor([[0, 0, float("nan"), 0, 0, 0]]), torch.zeros(1), r"direction is nan at \[0, 2\]"),
        (torch.zeros(1, WIDTH), torch.tensor([float("-inf")]), r"intercept is -inf at \[0\]"),
        (torch.full((1, WIDTH), 1e300, dtype=torch.float64), torch.zeros(1), r"direction is inf at \[0, 0\].*in float32"),
        (torch.zeros(1, WIDTH, dtype=torch.complex64), torch.zeros(1), "expected a tensor of real numbers"),
        ([[0.0] * WIDTH], torch.zeros(1), "expected a tensor of real numbers"),
    ],
)
def test_the_constructor_refuses_bad_tensors(direction: Any, intercept: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProbeWeights(direction, intercept, ProbeSpec(name="p", hook_points=HOOKS[:1], d_model=WIDTH))


def test_from_direction_takes_lists_and_works_out_the_width() -> None:
    probe = ProbeWeights.from_direction([1.0, 2.0, 3.0, 4.0], 0.1, name="p", hook_points=HOOKS, labels=["no", "yes"])
    assert (probe.d_model, probe.labels, probe.n_classes, probe.is_binary) == (2, ("no", "yes"), 2, True)
    assert (probe.name, probe.hook_points, probe.threshold) == ("p", HOOKS, None)
    assert probe.direction_at(HOOKS[1]).tolist() == [[3.0, 4.0]]
    with pytest.raises(InputError, match=r"does not read 'blocks.9.hook_resid_post'; it reads blocks.3"):
        probe.direction_at("blocks.9.hook_resid_post")
    with pytest.raises(InputError, match="5 columns; expected a multiple of its 2 hook points"):
        ProbeWeights.from_direction([1.0] * 5, name="p", hook_points=HOOKS)
    with pytest.raises(TypeError, match="licens"):
        ProbeWeights.from_direction([1.0] * 4, name="p", hook_points=HOOKS, licens="MIT")


def test_from_direction_ignores_a_narrow_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        probe = ProbeWeights.from_direction([0.1] * WIDTH, 0.3, name="p", hook_points=HOOKS[0])
    finally:
        torch.set_default_dtype(before)
    assert probe.direction[0, 0].item() == np.float32(0.1) and probe.intercept.item() == np.float32(0.3)


def test_a_number_as_intercept_serves_every_class() -> None:
    probe = ProbeWeights.from_direction(torch.zeros(3, 4), 0.5, name="p", hook_points=HOOKS[0], labels=(0, 1, 2))
    assert probe.intercept.tolist() == [0.5, 0.5, 0.5] and not probe.is_binary


def test_copies_change_one_thing_only() -> None:
    probe = make_probe(description="kept")
    changed = probe.with_threshold(2.5, unit="logit", method="pac", fpr=0.01, delta=0.05, n=500)
    changed = changed.renamed("other").with_metrics({"auroc": MetricRecord(value=0.9, n=10)})
    assert changed.threshold == ThresholdRecord(value=2.5, unit="logit", method="pac", fpr=0.01, delta=0.05, n=500)
    assert (changed.name, changed.spec.description, changed.spec.metrics["auroc"].value) == ("other", "kept", 0.9)
    assert torch.equal(changed.direction, probe.direction) and torch.equal(changed.intercept, probe.intercept)
    assert (probe.name, probe.threshold, dict(probe.spec.metrics)) == ("deceit", None, {})
    assert dict(changed.with_metrics({}).spec.metrics) == {}


def test_a_calibration_brings_its_threshold_recall_and_curve_and_takes_the_old_ones_away() -> None:
    one = MetricRecord(value=0.9, n=10)
    probe = make_probe(description="kept").with_metrics({"auroc": one, "live_lead_median": one})
    curve = ProbabilityRecord(
        slope=2.0, intercept=-1.0, n_negative=9, n_positive=3, statistic="s",
        log_loss_before=1, log_loss_after=0.5, brier_before=0.2, brier_after=0.1,
    )  # fmt: skip
    threshold = ThresholdRecord(value=2.5, unit="logit", method="pac", fpr=0.01, delta=0.05, n=500, rank=499)
    full = probe.with_calibration(Calibration(threshold, one, curve))
    assert (full.threshold, full.spec.probability_calibration, full.spec.description) == (threshold, curve, "kept")
    assert dict(full.spec.metrics) == {"auroc": one, "recall_at_fpr": one}
    assert torch.equal(full.direction, probe.direction) and probe.threshold is None
    other = full.with_calibration(Calibration(threshold))
    assert other.spec.probability_calibration is None and dict(other.spec.metrics) == {"auroc": one}
    manual = full.with_threshold(0.5)
    assert manual.spec.probability_calibration == curve and dict(manual.spec.metrics) == {"auroc": one}
    assert pickle.loads(pickle.dumps(full)).spec == full.spec
    # a float32 probability that was rounded to 0 or 1 counts as it did in the fit
    flat = probe.with_calibration(Calibration(threshold, one, dataclasses.replace(curve, slope=0.01, intercept=0.0)))
    ends = 1 / (1 + 2 ** (150 * 0.01)), 1 / (1 + (2**25 - 1) ** -0.01)
    assert flat.calibrated_probabilities([-math.inf, math.inf]).tolist() == pytest.approx(ends)
    assert full.calibrated_probabilities(torch.tensor([0.5, 3.0])).tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-5))])


def test_repr_says_what_matters_and_prints_no_numbers_of_the_direction() -> None:
    assert repr(make_probe().with_threshold(0.75)) == (
        "ProbeWeights('deceit', hook_points=('blocks.3.hook_resid_post',), labels=(0, 1), threshold=probability >= 0.75)"
    )
    assert repr(make_probe()).endswith("threshold=none)")


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda probe: pickle.loads(pickle.dumps(probe))])
def test_probes_survive_copying_and_the_way_to_another_process(twin_of: Any) -> None:
    probe = make_probe().with_metrics({"auroc": MetricRecord(value=0.9, n=10)})
    probe.logits(torch.zeros(1, WIDTH, device="meta"))
    twin = twin_of(probe)
    assert twin.spec == probe.spec and torch.equal(twin.direction, probe.direction) and twin._moved == {}


# Residual basis


@law
@given(seed=st.integers(0, 10**6), n_classes=st.sampled_from([2, 3]), n_hooks=st.sampled_from([1, 2]))
def test_a_centred_probe_scores_the_raw_stream_as_it_scored_the_centred_one(seed: int, n_classes: int, n_hooks: int) -> None:
    centred = make_probe(n_classes, n_hooks, seed, residual_basis="centered")
    anywhere = centred.to_raw_basis()
    raw = activations_for(centred, (5,), seed) + 3.0
    blocks = raw.unflatten(-1, (n_hooks, WIDTH))
    without_mean = (blocks - blocks.mean(-1, keepdim=True)).flatten(-2)
    assert anywhere.spec.residual_basis == "any"
    torch.testing.assert_close(anywhere.logits(raw), centred.logits(without_mean), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(anywhere.logits(raw), anywhere.logits(without_mean), rtol=1e-4, atol=1e-4)
    # the control: without the move, the mean of the stream would change the score
    assert not torch.allclose(centred.logits(raw), centred.logits(without_mean), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("basis", ["raw", "any"])
def test_a_probe_that_fits_the_raw_stream_is_left_alone(basis: str) -> None:
    probe = ProbeWeights.from_direction([1.0, -1.0], name="p", hook_points=HOOKS[0], residual_basis=basis)
    assert probe.to_raw_basis() is probe


@pytest.mark.parametrize("value", [0.1, 1e-30, 3e38])
def test_a_constant_direction_sees_nothing_of_a_centred_stream(value: float) -> None:
    probe = ProbeWeights.from_direction([value] * 768, name="p", hook_points=HOOKS[0], residual_basis="centered")
    assert not probe.to_raw_basis().direction.any()


def test_any_is_refused_where_one_block_does_not_sum_to_zero() -> None:
    sums_to_zero_overall = [1.0, 0.0, -1.0, 0.0]  # but not block by block
    with pytest.raises(InputError, match=r"blocks.3.hook_resid_post sums to 1 \(absolute values: 1\); expected 0"):
        ProbeWeights.from_direction(sums_to_zero_overall, name="p", hook_points=HOOKS, residual_basis="any")
    ProbeWeights.from_direction([1.0, -1.0, 2.0, -2.0], name="p", hook_points=HOOKS, residual_basis="any")


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_tolerance_is_relative_to_the_size_of_the_block(scale: float) -> None:
    def probe_that_misses_by(part: float) -> ProbeWeights:
        direction = [0.5 * scale, -0.5 * scale * (1 - 2 * part)]
        return ProbeWeights.from_direction(direction, name="p", hook_points=HOOKS[0], residual_basis="any")

    probe_that_misses_by(0.9e-4)
    with pytest.raises(InputError, match="says residual_basis 'any'"):
        probe_that_misses_by(1.1e-4)


def test_another_inference_pooling_takes_threshold_and_metrics_away() -> None:
    probe = ProbeWeights.from_direction(torch.ones(4), name="one", hook_points="blocks.0.hook_resid_post")
    probe = probe.with_threshold(0.9).with_metrics({"auroc": MetricRecord(value=0.8, n=10)})
    other = probe.with_inference_pooling("score:max")
    assert other.spec.pooling.inference == "score:max"
    assert other.spec.pooling.train == probe.spec.pooling.train
    assert other.threshold is None and not other.spec.metrics
    assert probe.threshold is not None
    with pytest.raises(InputError, match=r"score:maxx"):
        probe.with_inference_pooling("score:maxx")


@pytest.mark.parametrize("kind", ["attention", "multimax", "rolling_attention"])
def test_a_sequence_is_reduced_by_its_own_head_whatever_stands_at_pads(kind: str) -> None:
    weights = make_head_probe(kind, d_model=8)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 8, generator=generator) for length in (3, 7, 1)]
    padded, mask = torch.full((3, 9, 8), torch.nan), torch.zeros(3, 9)
    for at, row in enumerate(rows):
        padded[at, 9 - len(row) :], mask[at, 9 - len(row) :] = row, 1
    found = weights.sequence_logits(padded, mask)
    alone = torch.cat([weights.sequence_logits(row[None]) for row in rows])
    torch.testing.assert_close(found, alone)
    torch.testing.assert_close(found[2], weights.logits(rows[2])[0])
    with pytest.raises(EmptyMaskError, match="row"):
        weights.sequence_logits(padded, mask * 0)


def test_other_kinds_have_no_logit_of_a_sequence() -> None:
    with pytest.raises(InputError, match="kind 'mlp', which scores token by token"):
        make_head_probe("mlp", d_model=8).sequence_logits(torch.zeros(1, 2, 8))


def test_the_readout_belongs_to_its_kinds() -> None:
    spec = make_head_probe("mlp", d_model=8).spec
    direction, intercept = torch.zeros(5, 8), torch.zeros(5)
    with pytest.raises(InputError, match="readout is None; expected a tensor"):
        ProbeWeights(direction, intercept, spec)
    with pytest.raises(InputError, match=r"readout has shape \[1, 4\]; expected \[1, 5\]"):
        ProbeWeights(direction, intercept, spec, torch.zeros(1, 4), torch.zeros(1))
    with pytest.raises(InputError, match="readout is given; expected None, since its kind is 'linear'"):
        ProbeWeights(torch.zeros(1, 8), torch.zeros(1), replace(spec, kind="linear", head=HeadRecord()), torch.zeros(1, 1))


@pytest.mark.parametrize("kind", ["mlp", "polynomial", "attention"])
def test_kinds_move_between_bases_and_copies(kind: str) -> None:
    centred = make_head_probe(kind, d_model=8, residual_basis="centered")
    raw, x = centred.to_raw_basis(), torch.randn(4, 8)
    torch.testing.assert_close(raw.logits(x), centred.logits(x - x.mean(dim=-1, keepdim=True)), rtol=1e-4, atol=1e-5)
    copied = pickle.loads(pickle.dumps(raw))
    assert torch.equal(copied.logits(x), raw.logits(x))


def test_a_kind_that_reduces_its_tokens_has_no_other_pooling() -> None:
    with pytest.raises(InputError, match="reduces its tokens itself"):
        make_head_probe("attention").with_inference_pooling("score:max")
    assert make_head_probe("mlp").with_inference_pooling("score:mean").spec.pooling.inference == "score:mean"


def test_autocast_does_not_narrow_a_readout() -> None:
    for kind in ("mlp", "polynomial"):
        weights, x = make_head_probe(kind, d_model=8), torch.randn(6, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = weights.logits(x)
        assert torch.equal(found, weights.logits(x))


@pytest.mark.parametrize("shape", [(6, 8), (8,), (1, 2, 6, 8)])
def test_a_sequence_has_the_axes_batch_and_pos(shape: tuple[int, ...]) -> None:
    """Six tokens without a batch axis would look like six rows of the six readings."""
    with pytest.raises(InputError, match=r"expected \[batch pos 8\]"):
        make_head_probe("attention", d_model=8).sequence_logits(torch.zeros(shape))


def test_a_sequence_is_reduced_without_float64_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS."""
    monkeypatch.setattr("lmprobe_tl.weights.wide_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: pytest.fail("float64 was asked for"))
    weights, x = make_head_probe("attention", d_model=8), torch.randn(2, 3, 8)
    assert weights.sequence_logits(x).isfinite().all()


def test_from_direction_makes_a_sequence_probe() -> None:
    own = PoolingRecord(train="sequence", inference="sequence")
    probe = ProbeWeights.from_direction(
        torch.ones(3, 8), 0.5, name="p", hook_points=HOOKS[0], kind="multimax", head=HeadRecord(n_heads=3), pooling=own
    )
    assert probe.intercept.tolist() == [0.5] * 3


@pytest.mark.parametrize("window", [2**18 // 4 + 1, 2**62, 2**63 - 1])
def test_a_window_that_no_memory_holds_is_refused(window: int) -> None:
    spec = make_head_probe("rolling_attention", d_model=8).spec
    with pytest.raises(InputError, match=r"head\.window is .*; expected at most 65536 tokens, since 4 readings of each"):
        replace(spec, head=HeadRecord(n_heads=2, window=window))
    assert replace(spec, head=HeadRecord(n_heads=2, window=2**18 // 4)).head.window == 65536
