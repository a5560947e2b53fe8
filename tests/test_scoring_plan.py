"""Many probes as one matrix a hook point: the same logits as each probe alone, and thresholds that mean what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import D_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from live_reference import HEADS, make_head_probe, make_probe
from torch import Tensor

from lmprobe_tl.errors import IncompatibleProbeError, InputError
from lmprobe_tl.live.reduction import live_reduction
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.live.watches import threshold_logit, threshold_of
from lmprobe_tl.pooling import reduce_scores

HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(4))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(HOOKS), min_size=1, max_size=4, unique=True), st.sampled_from([2, 2, 3, 5, *HEADS])
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_plan_gives_each_probe_its_own_logits(wanted: list[Any], dtype: torch.dtype) -> None:
    probes = [
        make_probe(f"p{at}", hooks, seed=at, n_classes=kind)
        if isinstance(kind, int)
        else make_head_probe(kind, hooks, name=f"p{at}", seed=at)
        for at, (hooks, kind) in enumerate(wanted)
    ]
    plan = ScoringPlan(probes)
    generator = torch.Generator().manual_seed(7)
    activations = {name: torch.randn(2, 3, D_MODEL, generator=generator).to(dtype) for name in HOOKS}
    partials = [columns.partial_readings(activations[name]) for name, columns in plan.hooks.items()]
    logits = plan.token_logits(plan.combine(partials, torch.device("cpu")))
    assert logits.shape == (2, 3, plan.n_columns)
    assert logits.dtype == torch.float32
    for probe in probes:
        expected = probe.logits(torch.cat([activations[name] for name in probe.hook_points], dim=-1))
        found = logits[..., plan.columns[probe.name]]
        torch.testing.assert_close(found[..., 0] if probe.is_binary else found, expected, rtol=1e-5, atol=1e-5)


def running_of(plan: ScoringPlan, name: str, logits: Tensor) -> Tensor:
    """Values of a probe's online reduction and its running scores, from logits [pos columns]."""
    group = plan.group_of(name)
    own = logits[None, :, group.columns]
    return group.make_online(1).update(group.enter(own, own), torch.ones(1, len(logits), dtype=torch.bool))[0]


@pytest.mark.parametrize("inference", ["score:max", "score:min", "score:mean", "score:last_token", "score:first_token"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_reductions_end_where_the_batch_form_does(inference: str, n_classes: int) -> None:
    probes = [make_probe(name, seed=at, n_classes=n_classes, inference=inference) for at, name in enumerate("abc")]
    plan = ScoringPlan([*probes, make_probe("other", inference="mean")])
    logits = torch.randn(9, plan.n_columns, generator=torch.Generator().manual_seed(1))
    for probe in probes:
        group = plan.group_of(probe.name)
        assert set(group.places) == {"a", "b", "c"}
        found = group.leave(running_of(plan, probe.name, logits))[-1, group.places[probe.name]]
        own = logits[:, plan.columns[probe.name]]
        scores = torch.cat([-own, own], dim=-1).sigmoid() if n_classes == 2 else own.softmax(dim=-1)
        expected = reduce_scores(scores[None], inference)[0]
        torch.testing.assert_close(found, expected[1:] if n_classes == 2 else expected, rtol=1e-5, atol=1e-6)


def test_extreme_probabilities_stay_apart_where_the_reduction_allows_it() -> None:
    plan = ScoringPlan([make_probe("max"), make_probe("min", inference="score:min")])
    logits = torch.tensor([[40.0], [41.0], [39.0]]).expand(3, 2)
    for name, expected in (("max", 41.0), ("min", 39.0)):
        running = running_of(plan, name, logits)
        assert running[-1, plan.group_of(name).places[name]].item() == expected


@pytest.mark.parametrize("inference", ["score:max", "score:mean", "mean", "score:ema_max(0.5)"])
@pytest.mark.parametrize("unit", ["probability", "logit"])
def test_a_threshold_is_reached_from_itself_upwards(inference: str, unit: str) -> None:
    score = 0.7 if unit == "probability" else 0.8
    plan = ScoringPlan([make_probe(inference=inference).with_threshold(score, unit=unit), make_probe("c", n_classes=3)])
    reduction = plan.reductions["p"]
    steps = torch.linspace(-0.2, 0.2, 41)
    values = (score + steps).clamp(max=1.0) if unit == "probability" else score + steps
    values[20] = score
    runs_on_logits = inference != "score:mean"
    as_run = values
    if runs_on_logits and unit == "probability":
        as_run = torch.logit(values.double()).float()
    elif not runs_on_logits and unit == "logit":
        as_run = values.double().sigmoid().float()
    assert [line.probe for line in plan.watches.lines] == ["p"]  # three classes have no threshold
    assert plan.watches.columns.tolist() == [plan.columns["p"].start]
    found = as_run[:, None] >= plan.watches.values
    others = [at for at in range(41) if at != 20]
    assert found[others, 0].tolist() == [at > 20 for at in others]
    torch.testing.assert_close(reduction.in_unit(as_run, unit), values, rtol=1e-5, atol=1e-6)
    shown = float(reduction.in_unit(as_run[20:21], unit))
    exact = ScoringPlan([make_probe(inference=inference).with_threshold(shown, unit=unit)])
    assert (as_run[20] >= exact.watches.values).all()
    below = torch.nextafter(as_run[20], torch.tensor(-math.inf))
    assert (below >= exact.watches.values).tolist() == [float(reduction.in_unit(below, unit)) >= shown]


def test_the_last_bit_of_a_score_does_not_depend_on_its_neighbours() -> None:
    reduction = live_reduction(make_probe())
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    together = reduction.in_unit(values, "probability")
    alone = torch.cat([reduction.in_unit(one, "probability") for one in values[:2000].split(1)])
    assert torch.equal(alone, together[:2000])


def test_a_probe_without_a_threshold_flags_at_one_half() -> None:
    assert threshold_of(make_probe()) == (0.5, "probability")
    assert threshold_logit(make_probe()) == 0.0
    assert threshold_of(make_probe().with_threshold(2.0, unit="logit")) == (2.0, "logit")
    assert threshold_logit(make_probe().with_threshold(2.0, unit="logit")) == 2.0
    assert threshold_logit(make_probe().with_threshold(0.9)) == pytest.approx(math.log(9))
    extremes = [threshold_logit(make_probe().with_threshold(probability)) for probability in (0.0, 1.0)]
    assert extremes == [-math.inf, math.inf]


def test_only_the_first_token_and_included_bos_count_bos() -> None:
    counting = {
        name: live_reduction(make_probe(inference=name)).counts_bos for name in ("mean", "last_token", "first_token")
    }
    assert counting == {"mean": False, "last_token": False, "first_token": True}
    assert live_reduction(make_probe(include_bos=True)).counts_bos


@pytest.mark.parametrize("pooling", ["activation:max", "activation:min", "eos", "activation:eos"])
def test_what_has_no_token_by_token_form_is_refused(pooling: str) -> None:
    with pytest.raises(IncompatibleProbeError, match="no token-by-token form"):
        ScoringPlan([make_probe(inference=pooling)])


def test_unknown_poolings_and_several_classes_on_logits_are_refused() -> None:
    with pytest.raises(InputError, match="Unknown pooling strategy 'score:median'"):
        live_reduction(make_probe(inference="score:median"))
    for pooling in ("score:ema_max(0.5)", "score:rolling_max(3)", "score:softmax(2)"):
        with pytest.raises(IncompatibleProbeError, match="3 classes"):
            live_reduction(make_probe(n_classes=3, inference=pooling))
