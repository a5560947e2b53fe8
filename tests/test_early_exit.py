"""Polynomial probes cut short."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from live_reference import make_head_probe

from lmprobe_tl.early_exit import early_exit_logits, truncate
from lmprobe_tl.errors import IncompatibleProbeError, InputError

X = torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(0))
PROBE = make_head_probe("polynomial", d_model=8, scale=0.3)


def by_hand(x: torch.Tensor, degree: int) -> float:
    orders = [1, 2, 2, 3, 3]
    total = PROBE.readout_intercept.item()
    for row, order in enumerate(orders):
        if order <= degree:
            reading = float(x.double() @ PROBE.direction[row].double()) + PROBE.intercept[row].item()
            total += PROBE.readout[0, row].item() * reading**order
    return total


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_truncation_has_the_terms_up_to_its_degree(degree: int) -> None:
    cut = truncate(PROBE.with_threshold(0.7), degree)
    assert cut.threshold is None and cut.spec.kind == ("linear" if degree == 1 else "polynomial")
    for x in X[0]:
        assert cut.logits(x).item() == pytest.approx(by_hand(x, degree), abs=1e-4)


def test_each_activation_leaves_at_the_first_order_that_is_sure() -> None:
    found = early_exit_logits(PROBE, X, margin=1.5)
    assert found.logits.shape == found.degrees.shape == (5, 40)
    assert set(found.degrees.unique().tolist()) == {1, 2, 3}
    for x, logit, degree in zip(
        X.flatten(0, 1), found.logits.flatten().tolist(), found.degrees.flatten().tolist(), strict=True
    ):
        assert logit == pytest.approx(by_hand(x, degree), abs=1e-4)
        assert all(abs(by_hand(x, lower)) < 1.5 for lower in range(1, degree))
        assert abs(logit) >= 1.5 or degree == 3


def test_an_infinite_margin_evaluates_all_orders() -> None:
    found = early_exit_logits(PROBE, X, margin=float("inf"))
    torch.testing.assert_close(found.logits, PROBE.logits(X), rtol=1e-4, atol=1e-5)
    assert (found.degrees == 3).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: truncate(PROBE, 4), InputError, "degree is 4; expected a whole number from 1 to 3"),
        (lambda: truncate(make_head_probe("mlp"), 1), InputError, "kind 'mlp'; expected 'polynomial'"),
        (lambda: early_exit_logits(PROBE, X, margin=0), InputError, "margin is 0; expected"),
        (lambda: early_exit_logits(PROBE, X[..., :5], margin=1), IncompatibleProbeError, "expected \\[..., 8\\]"),
    ],
)
def test_wrong_use_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_autocast_does_not_narrow_the_later_orders() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = early_exit_logits(PROBE, X, margin=float("inf")).logits
    torch.testing.assert_close(found, PROBE.logits(X), rtol=1e-5, atol=1e-5)


def test_orders_are_added_up_without_float64_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS."""
    monkeypatch.setattr("lmprobe_tl.early_exit.wide_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: pytest.fail("float64 was asked for"))
    assert early_exit_logits(PROBE, X, margin=float("inf")).logits.isfinite().all()


def test_early_exits_saturate_as_the_whole_probe_does() -> None:
    x = 1e15 * X[:1]
    assert torch.equal(early_exit_logits(PROBE, x, margin=float("inf")).logits, PROBE.logits(x))


def test_a_margin_may_be_any_number_and_no_truth_value() -> None:
    found = early_exit_logits(PROBE, X, margin=np.float32(1.5))
    assert torch.equal(found.degrees, early_exit_logits(PROBE, X, margin=1.5).degrees)
    with pytest.raises(InputError, match="margin is True"):
        early_exit_logits(PROBE, X, margin=True)


def test_activations_have_to_be_a_tensor() -> None:
    with pytest.raises(InputError, match="activations are list"):
        early_exit_logits(PROBE, X.tolist(), margin=1.5)  # type: ignore[arg-type]
