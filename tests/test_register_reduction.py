"""Reductions of one's own: used everywhere by name, and refused where their two forms are not the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_reference import BOS, encode, make_probe
from torch import Tensor

from lmprobe_tl import Probe, ReductionParameter, attach_probes, load_probe, register_reduction, score_prompts
from lmprobe_tl.errors import IncompatibleProbeError, InputError, PoolingMismatchWarning
from lmprobe_tl.live.reduction import live_reduction
from lmprobe_tl.pooling import get_pooling_fn, parse_pooling_strategy, pool_all, reduce_scores, resolve_pooling
from lmprobe_tl.reductions import REDUCTIONS, _unregister, make_online, reduce_batch

State = tuple[Tensor, ...]
PROMPTS = ["the cats read", "dogs read a line", "music and light", "rain and sun and rain", "the model writes", "cats"]
LABELS = [1, 0, 1, 0, 0, 1]


# Three that are not built in: max - min of logits, an average of logits that forgets, and a power mean of probabilities.


def spread_batch(z: Tensor, counted: Tensor) -> Tensor:
    highest = torch.where(counted, z, -torch.inf).amax(dim=1)
    return highest - torch.where(counted, z, torch.inf).amin(dim=1)


def spread_start(zero: Tensor) -> State:
    return zero - torch.inf, zero + torch.inf


def spread_step(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    highest = torch.maximum(state[0], torch.where(counted, z, -torch.inf).cummax(dim=1).values)
    lowest = torch.minimum(state[1], torch.where(counted, z, torch.inf).cummin(dim=1).values)
    return highest - lowest, (highest[:, -1:], lowest[:, -1:])


def forgetting_step(state: State, z: Tensor, counted: Tensor, seen: Tensor, keep: float) -> tuple[Tensor, State]:
    total, weight = state
    running = []
    for at in range(z.shape[1]):
        here = counted[:, at : at + 1]
        total = torch.where(here, keep * total + z[:, at : at + 1], total)
        weight = torch.where(here, keep * weight + 1, weight)
        running.append(total / weight)
    return torch.cat(running, dim=1), (total, weight)


def forgetting_batch(z: Tensor, counted: Tensor, keep: float) -> Tensor:
    age = counted.sum(dim=1, keepdim=True) - counted.cumsum(dim=1)
    weight = torch.where(counted, torch.full_like(z, keep) ** age, 0.0)
    return (weight * z).sum(dim=1) / weight.sum(dim=1)


def power_batch(z: Tensor, counted: Tensor, power: float) -> Tensor:
    return ((z**power).sum(dim=1) / counted.sum(dim=1)) ** (1 / power)


def power_step(state: State, z: Tensor, counted: Tensor, seen: Tensor, power: float) -> tuple[Tensor, State]:
    sums = state[0] + (z**power).cumsum(dim=1)
    return (sums / seen) ** (1 / power), (sums[:, -1:],)


KEEP = ReductionParameter("keep", "a number from 0 to 1", lambda x: 0 <= x <= 1, (0, 0.5, 1))
POWER = ReductionParameter("power", "a number of 1 or more", lambda x: x >= 1, (1, 2, 2.5))


@pytest.fixture
def own() -> Iterator[None]:
    """The three, registered for the length of a test."""
    register_reduction("spread", batch=spread_batch, start=spread_start, step=spread_step)
    register_reduction(
        "forgetting", batch=forgetting_batch, start=lambda zero, keep: (zero, zero), step=forgetting_step, parameter=KEEP
    )
    register_reduction(
        "power_mean",
        batch=power_batch,
        start=lambda zero, power: (zero,),
        step=power_step,
        parameter=POWER,
        on="probability",
    )
    yield
    for name in ("spread", "forgetting", "power_mean"):
        _unregister(name)


OWN = {"score:spread": ("spread", None), "score:forgetting(0.5)": ("forgetting", 0.5), "power_mean(3)": ("power_mean", 3)}


@pytest.mark.usefixtures("own")
def test_names_are_strategies_like_those_built_in() -> None:
    for strategy, (name, parameter) in OWN.items():
        parsed = parse_pooling_strategy(strategy)
        assert (parsed.base_strategy, parsed.is_score_pooling, parsed.parameter) == (name, True, parameter)
        assert get_pooling_fn(strategy) is pool_all
        assert resolve_pooling("mean", None, strategy) == ("mean", strategy)
        with pytest.raises(InputError, match="no scores exist before training"):
            resolve_pooling(strategy, None, None)
    with pytest.raises(InputError, match=r"Closest: 'score:spread'.*All strategies: .*score:power_mean\(power\)"):
        parse_pooling_strategy("score:spred")
    for strategy, text in {
        "score:spread(2)": "takes no parameter",
        "score:power_mean": "power=None, expected a number of 1 or more",
        "score:power_mean(0.5)": "power=0.5, expected",
        "activation:spread": "Unknown",
    }.items():
        with pytest.raises(InputError, match=text):
            parse_pooling_strategy(strategy)


@pytest.mark.usefixtures("own")
def test_scores_are_reduced_as_logits_or_as_probabilities() -> None:
    z, mask = torch.tensor([[1.0, torch.nan, -3.0, 4.0]]), torch.tensor([[1, 0, 1, 1]])
    assert reduce_scores(z, "score:spread", mask).item() == 7.0
    assert reduce_scores(z, "score:forgetting(0.5)", mask).item() == pytest.approx((0.25 - 1.5 + 4) / 1.75)
    positive = torch.tensor([[0.1, 0.9, 0.5]])
    two = torch.stack([1 - positive, positive], dim=-1)
    mean = ((0.1**2 + 0.9**2 + 0.5**2) / 3) ** 0.5
    assert reduce_scores(two, "power_mean(2)").tolist() == [pytest.approx([1 - mean, mean])]
    three = torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.1, 0.3]]])
    each = torch.tensor([[((a**2 + b**2) / 2) ** 0.5 for a, b in ((0.2, 0.6), (0.3, 0.1), (0.5, 0.3))]])
    torch.testing.assert_close(reduce_scores(three, "power_mean(2)"), each / each.sum())
    with pytest.raises(InputError, match=r"'score:spread' takes logits \[batch pos\]"):
        reduce_scores(two, "score:spread")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("name", "parameter"), OWN.values())
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 9), max_size=4))
def test_a_registered_twin_runs_as_its_batch_form(name: str, parameter: float | None, seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    counted = torch.rand(3, 9, generator=generator) < 0.6
    counted[:, 4] = True
    scores = torch.rand(3, 9, 2, generator=generator).masked_fill(~counted[..., None], torch.nan)
    online = make_online(name, parameter, 3, 2)
    parts = zip([0, *sorted(cuts)], [*sorted(cuts), 9], strict=True)
    running = torch.cat([online.update(scores[:, a:b], counted[:, a:b]) for a, b in parts], dim=1)
    for end in range(5, 10):
        expected = reduce_batch(scores[:, :end], name, parameter, counted[:, :end])
        torch.testing.assert_close(running[:, end - 1], expected, rtol=1e-5, atol=1e-5)


# --- what is refused ---

GOOD: dict[str, Any] = {"batch": spread_batch, "start": spread_start, "step": spread_step}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max", "'max' is built in"),
        ("ema_max", "'ema_max' is built in"),
        ("spread", "'spread' is registered already"),
        *(
            (name, "means something else in a pooling strategy")
            for name in ("all", "eos", "score", "activation", "sequence")
        ),
        *((name, "expected letters, digits and '_' alone") for name in ("", "2nd", "a-b", "score:a", "a(b)", "größe", None)),
    ],
)
@pytest.mark.usefixtures("own")
def test_names_that_cannot_be(name: Any, text: str) -> None:
    before = dict(REDUCTIONS)
    with pytest.raises(InputError, match=text):
        register_reduction(name, **GOOD)
    assert before == REDUCTIONS


def one_of(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    """Knows no chunks: its running score is that of the first position."""
    running, state = spread_step(state, z, counted, seen)
    return running[:, :1].expand_as(running), state


def counts_all(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    return spread_step(state, z, torch.ones_like(counted), seen)


def feels_mates(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    running, state = spread_step(state, z, counted, seen)
    return running + 1e-3 * z.abs().amax(dim=0, keepdim=True), state


def feels_probes(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    running, state = spread_step(state, z, counted, seen)
    return running + 1e-3 * running.nan_to_num().mean(dim=2, keepdim=True), state


def forgets(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    running, _ = spread_step(state, z, counted, seen)
    return running, state


def wrong_alone(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    running, state = spread_step(state, z, counted, seen)
    return (running + (seen > 1) if z.shape[1] == 1 else running), state


def spoils(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
    result = spread_step(state, z, counted, seen)
    counted.logical_not_()
    return result


def off_by(difference: float) -> Callable[..., Any]:
    def step(state: State, z: Tensor, counted: Tensor, seen: Tensor) -> tuple[Tensor, State]:
        running, state = spread_step(state, z, counted, seen)
        return running + difference, state

    return step


def returns(what: Any) -> Callable[..., Any]:
    return lambda state, z, counted, seen: what(*spread_step(state, z, counted, seen))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step": one_of}, r"'mine': its two forms disagree\. After the scores \[.*chunks cut at \[0, 24\]"),
        ({"step": counts_all}, "disagree"),
        ({"step": feels_mates}, "disagree"),
        ({"step": feels_probes}, "disagree"),
        ({"step": forgets}, r"disagree.*the batch form gives .*, the online twin .*row \d of 6, position \d+, counted"),
        ({"step": wrong_alone}, r"disagree.*chunks cut at \[0, 1, 2, 3, 4"),
        ({"step": off_by(1e-3)}, "disagree"),
        ({"start": lambda zero: (zero, zero)}, "disagree"),
        ({"step": spoils}, "writes into z, counted or seen"),
        (
            {"batch": lambda z, counted: spread_batch(z, torch.ones_like(counted))},
            "among other rows and positions that do not",
        ),
        ({"batch": lambda z, counted: spread_batch(z, counted) + 1e-3 * z.amax()}, "disagree|among other rows"),
        ({"batch": lambda z, counted: spread_batch(z, counted) / 0}, r"gives nan for the scores \[.*\]; expected a finite"),
        ({"batch": lambda z, counted: spread_batch(z, counted)[0]}, r"its batch form returned .* shape \[2\].*\[1, 2\]"),
        ({"batch": lambda z, counted: spread_batch(z, counted).long()}, "returned torch.int64"),
        ({"batch": lambda z, counted: z @ counted}, r"its batch form failed on z \[1, 1, 2\] and counted \[1, 1, 1\]"),
        ({"step": lambda state, z, counted, seen: z @ z}, "its online twin failed: RuntimeError"),
        ({"start": lambda zero: [zero, zero]}, "its start returned list as the state; expected a tuple of tensors"),
        ({"start": lambda zero: (zero, 0.0)}, "its start returned tuple as the state"),
        ({"step": returns(lambda running, state: running)}, r"its step returned Tensor; expected \(running"),
        (
            {"step": returns(lambda running, state: (running[:, -1:], state))},
            r"its step returned .*\[6, 1, 2\].*\[6, 24, 2\]",
        ),
        ({"step": returns(lambda running, state: (running, list(state)))}, "its step returned list as the state"),
        ({"on": "probability", "batch": lambda z, counted: z.sum(dim=1)}, "expected a probability, from 0 to 1"),
        ({"on": "logits"}, "on='logits'; expected 'logit' or 'probability'"),
        ({"batch": lambda z: z}, r"batch cannot be called as it will be .*function \(z, counted\) -> scores \[batch n\]"),
        ({"start": lambda: ()}, r"start cannot be called.*function \(zero\) -> a tuple of tensors"),
        ({"step": spread_batch}, r"step cannot be called.*function \(state, z, counted, seen\)"),
        ({"step": "spread"}, r"step is 'spread'; expected a function \(state"),
        ({"batch": torch.amax}, "batch cannot be called.*no signature"),
        ({"parameter": KEEP}, r"batch cannot be called.*function \(z, counted, keep\)"),
        ({"parameter": "keep"}, "parameter is 'keep'; expected a ReductionParameter"),
        ({"parameter": ReductionParameter("k", "a number", lambda x: True, ())}, "its parameter has no examples"),
        ({"parameter": ReductionParameter("k", "above 1", lambda x: x > 1, (2, 1))}, "'mine' got k=1, expected above 1"),
    ],
)
def test_pairs_that_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        register_reduction("mine", **{**GOOD, **change})
    assert "mine" not in REDUCTIONS


def test_a_wrong_example_is_named() -> None:
    def step(state: State, z: Tensor, counted: Tensor, seen: Tensor, power: float) -> tuple[Tensor, State]:
        return power_step(state, z, counted, seen, 2.0)

    with pytest.raises(InputError, match=r"Reduction 'mine\(2.5\)': its two forms disagree"):
        register_reduction(
            "mine",
            batch=power_batch,
            start=lambda zero, power: (zero,),
            step=step,
            parameter=ReductionParameter("power", "1 or more", lambda x: x >= 1, (2, 2.5)),
            on="probability",
        )


def test_pairs_that_pass_where_the_others_fail() -> None:
    """The control: a difference below the tolerance, and a random number generator left alone."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    register_reduction("mine", **{**GOOD, "step": off_by(5e-6)})
    try:
        assert torch.equal(torch.rand(1), expected)
        assert "mine" in REDUCTIONS
    finally:
        _unregister("mine")
    _unregister("max")
    assert "max" in REDUCTIONS


# --- probes ---


def fitted(tiny: Tiny, inference: str, labels: list[Any] = LABELS) -> Probe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoolingMismatchWarning)
        probe = Probe(tiny.bridge, hook_points=2, inference_pooling=inference, name="mine", random_state=0)
    return probe.fit(PROMPTS, labels)


def reduced(token_logits: Tensor, ids: list[int], strategy: str) -> float:
    """The score of a row from the logits of its tokens, BOS left out."""
    name, parameter = OWN[strategy]
    z = token_logits[int(ids[0] == BOS) :].double()
    scores = z if REDUCTIONS[name].on == "logit" else z.sigmoid()
    return reduce_batch(scores[None], name, parameter).item()


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("inference", OWN)
def test_a_probe_scores_the_same_at_rest_and_live(gpt2: Tiny, inference: str, tmp_path: Path) -> None:
    probe = fitted(gpt2, inference)
    probe.save(tmp_path / "mine.safetensors")
    unit = REDUCTIONS[OWN[inference][0]].on
    assert live_reduction(load_probe(tmp_path / "mine.safetensors")).unit == unit
    scored = score_prompts(gpt2.bridge, PROMPTS, tmp_path / "mine.safetensors")["mine"]
    rows = [encode(gpt2, prompt) for prompt in PROMPTS]
    expected = [reduced(logits, ids, inference) for logits, ids in zip(scored.token_logits, rows, strict=True)]
    assert scored.scores.tolist() == pytest.approx(expected, abs=1e-4)
    at_rest = probe.decision_function(PROMPTS) if unit == "logit" else probe.predict_proba(PROMPTS)[:, 1]
    assert at_rest.tolist() == pytest.approx(expected, abs=1e-4)

    with attach_probes(gpt2.bridge, [tmp_path / "mine.safetensors"]) as monitor:
        gpt2.bridge.generate(torch.tensor([rows[0]]), max_new_tokens=4, do_sample=False, verbose=False)
    logits, running = monitor.token_scores("mine")[0], monitor.running_scores("mine")[0]
    begin = int(rows[0][0] == BOS)
    assert len(logits) > len(rows[0])
    for end in range(begin + 1, len(logits) + 1):
        assert running[end - 1].item() == pytest.approx(reduced(logits[:end], rows[0], inference), abs=1e-4)


@pytest.mark.usefixtures("own")
def test_several_classes(gpt2: Tiny) -> None:
    probe = fitted(gpt2, "score:power_mean(2)", ["a", "b", "c", "a", "b", "c"])
    probabilities = probe.predict_proba(PROMPTS)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    live = score_prompts(gpt2.bridge, PROMPTS, probe.weights_)["mine"].scores
    np.testing.assert_allclose(live.numpy(), probabilities, atol=1e-4)
    with pytest.raises(InputError, match="works on the logit of two classes; this probe has 3"):
        fitted(gpt2, "score:spread", ["a", "b", "c", "a", "b", "c"]).predict_proba(PROMPTS)
    with pytest.raises(IncompatibleProbeError, match="3 classes, and inference pooling 'score:spread'"):
        live_reduction(make_probe(n_classes=3, inference="score:spread"))


def test_a_file_loads_without_the_name_and_scores_with_it(gpt2: Tiny, tmp_path: Path) -> None:
    register_reduction("spread", **GOOD)
    try:
        probe = fitted(gpt2, "score:spread")
        expected = probe.decision_function(PROMPTS)
        probe.save(tmp_path / "mine.safetensors")
    finally:
        _unregister("spread")
    loaded = load_probe(tmp_path / "mine.safetensors")
    assert loaded.spec.pooling.inference == "score:spread"
    assert b"spread_step" not in (tmp_path / "mine.safetensors").read_bytes()
    message = r"Unknown pooling strategy 'score:spread'.*register it first: register_reduction\('spread', \.\.\.\)"
    for use in (
        lambda: score_prompts(gpt2.bridge, PROMPTS, loaded),
        lambda: attach_probes(gpt2.bridge, [loaded]).__enter__(),
        lambda: probe.decision_function(PROMPTS),
        lambda: fitted(gpt2, "score:spread"),
    ):
        with pytest.raises(InputError, match=message):
            use()
    with pytest.raises(InputError, match="Unknown reduction 'spread'.*by register_reduction"):
        make_online("spread", None, 1, 1)
    register_reduction("spread", **GOOD)
    try:
        found = score_prompts(gpt2.bridge, PROMPTS, loaded)["mine"].scores
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    finally:
        _unregister("spread")


def test_the_example_in_the_docstring_runs() -> None:
    import doctest

    from lmprobe_tl import reductions

    try:
        finder = doctest.DocTestFinder(recurse=False)
        (example,) = finder.find(reductions.register_reduction, "register_reduction", globs={**vars(reductions)})
        assert len(example.examples) == 4
        assert doctest.DocTestRunner().run(example).failed == 0
    finally:
        _unregister("share")
