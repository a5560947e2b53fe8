"""Scores, running scores and alarms of four models, eager and compiled, against Hugging Face and against a Monitor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from conftest import start
from reference import Reference, assert_outputs, assert_same, many_probes, tokens_of

from lmprobe_tl.weights import ProbeWeights

TEXTS = [f"def function_{i}(a, b):\n    return" + " a +" * (3 * i) + " b" for i in range(10)]


@dataclass(frozen=True)
class Running:
    """An engine at work, and what it is checked against."""

    engine: Any
    reference: Reference
    probes: list[ProbeWeights]

    def prompts(self) -> list[dict[str, list[int]]]:
        """Of different lengths, every other one with a BOS token."""
        ids = [self.reference.encode(text, bos=bool(at % 2)) for at, text in enumerate(TEXTS)]
        return [{"prompt_token_ids": one} for one in ids]

    def generate(self, *, n: int = 1, **options: Any) -> list[Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=12, temperature=1.0, n=n)
        return self.engine.generate(self.prompts(), sampling, use_tqdm=False, **options)


MODES = [(name, mode) for name in tiny_models.NAMES for mode in ("eager", "compiled")]


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def running(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Iterator[Running]:
    name, mode = request.param
    reference = references[name]
    probes = many_probes(reference)
    with start(reference, probes, enforce_eager=mode == "eager") as engine:
        yield Running(engine, reference, probes)


def test_every_token_is_scored_as_by_a_recompute(running: Running) -> None:
    # Ten requests of different lengths for eight places, so prompts and decoding share steps. The second round finds its
    # prompts in the prefix cache.
    for round_ in range(2):
        outputs = running.generate()
        assert_outputs(running.reference, outputs, running.probes)
        assert all(output.probe_scores.keys() == output.outputs[0].probe_scores.keys() for output in outputs)
        cached = sum(output.num_cached_tokens for output in outputs)
        assert cached > 0 or not round_


def test_each_of_several_completions_has_its_own_scores(running: Running) -> None:
    outputs = running.generate(n=3)
    assert len({tuple(tokens_of(outputs[3], one)) for one in outputs[3].outputs}) == 3
    assert_outputs(running.reference, outputs, running.probes)


def test_alarms_are_the_first_crossings(running: Running) -> None:
    alarmed = 0
    for row, output in enumerate(running.generate()):
        ids = tokens_of(output, output.outputs[0])[:-1]
        expected = {}
        for probe in running.probes:
            if probe.is_binary:
                scores = running.reference.running(ids, probe)
                pools_logits = probe.spec.pooling.inference.startswith(("score:ema", "score:roll", "score:soft"))
                reached = scores >= (0.0 if pools_logits else 0.5)  # without a threshold: a probability of 0.5
                if reached.any():
                    expected[probe.name] = int(reached.int().argmax())
        assert {alarm.probe: alarm.position for alarm in output.alarms} == expected
        assert [alarm.position for alarm in output.alarms] == sorted(alarm.position for alarm in output.alarms)
        for alarm in output.alarms:
            assert (alarm.row, alarm.token_id) == (row, ids[alarm.position])
            assert alarm.logit == output.probe_scores[alarm.probe][alarm.position].item()
        alarmed += bool(expected)
    assert alarmed


def test_nothing_is_held_once_fetched(running: Running) -> None:
    from lmprobe_tl.vllm import wire

    for _ in range(2):
        running.generate()
    (answer,) = running.engine.llm.collective_rpc("lmprobe_state")
    state = wire.decode(answer, wire.State)
    assert (state.n_open, state.n_finished, state.n_pages) == (0, 0, 0)
    assert state.n_scored > 500 and state.n_unknown == 0 and state.n_alarms > 0


def test_the_engine_says_what_a_monitor_says(demo: Reference) -> None:
    from vllm import SamplingParams

    from lmprobe_tl import attach_probes, score_prompts
    from lmprobe_tl.demo import load_demo_model

    # Thresholds that some rows reach, in either unit; ones that no token is near, as both sides round.
    probes = [
        probe.with_threshold(0.9, "probability") if probe.name == "first" else probe.with_threshold(0.3, "logit")
        for probe in many_probes(demo)
        if probe.is_binary
    ]
    prompts = [{"prompt_token_ids": demo.encode(text, bos=True)} for text in TEXTS]
    with start(demo, probes) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=12, temperature=1.0), use_tqdm=False)
    rows = [tokens_of(output, output.outputs[0])[:-1] for output in outputs]
    model = load_demo_model()
    scores = score_prompts(model, [torch.tensor(ids) for ids in rows], probes)
    n_alarms = 0
    for row, (ids, output) in enumerate(zip(rows, outputs, strict=True)):
        for probe in probes:
            assert_same(output.probe_scores[probe.name], scores[probe.name].token_logits[row], f"{row} {probe.name}")
            assert_same(output.running[probe.name][-1], scores[probe.name].scores[row], f"{row} {probe.name}, in the end")
        with attach_probes(model, probes) as monitor, torch.no_grad():
            model(torch.tensor([ids]))
        for probe in probes:
            assert_same(output.running[probe.name], monitor.running_scores(probe.name)[0], f"{row} running {probe.name}")
        (alarms,) = monitor.alarms()
        assert {one.probe: one.position for one in output.alarms} == {one.probe: one.position for one in alarms}
        theirs = {one.probe: one for one in alarms}
        for alarm in output.alarms:
            twin = theirs[alarm.probe]
            assert (alarm.token_id, alarm.threshold, alarm.unit) == (twin.token_id, twin.threshold, twin.unit)
            assert alarm.score == pytest.approx(twin.score, abs=1e-4)
        n_alarms += len(alarms)
    assert 0 < n_alarms < len(rows) * len(probes)
