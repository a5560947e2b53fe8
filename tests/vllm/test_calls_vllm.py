"""The calls of `ProbedLLM` are those of `vllm.LLM`, and what it makes of a worker's answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import start
from reference import Reference, assert_outputs, make_probe, many_probes
from tiny_models import BOS, EOS

from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.weights import ProbeWeights


@pytest.fixture(scope="module")
def probes(llama: Reference) -> list[ProbeWeights]:
    return many_probes(llama)


@pytest.fixture(scope="module")
def engine(llama: Reference, probes: list[ProbeWeights]) -> Iterator[Any]:
    with start(llama, probes, enforce_eager=True) as engine:
        yield engine


def test_one_text_and_default_sampling(llama: Reference, probes: list[ProbeWeights], engine: Any) -> None:
    (output,) = engine.generate("def f(a):", use_tqdm=False)
    assert output.prompt_token_ids == llama.encode("def f(a):", bos=True)
    assert_outputs(llama, [output], probes)


def test_sampling_of_each_prompt_is_kept_as_it_was(llama: Reference, probes: list[ProbeWeights], engine: Any) -> None:
    from vllm import SamplingParams

    given = [
        SamplingParams(max_tokens=4),
        SamplingParams(max_tokens=3, n=2, extra_args={"mine": 1}),
        SamplingParams(max_tokens=1),
    ]
    outputs = engine.generate(["x = 1", "while True:", "import"], given, use_tqdm=False)
    assert [len(output.outputs) for output in outputs] == [1, 2, 1]
    assert_outputs(llama, outputs, probes)
    assert [one.extra_args for one in given] == [None, {"mine": 1}, None]


def test_a_chat(llama: Reference, probes: list[ProbeWeights], engine: Any) -> None:
    from vllm import SamplingParams

    template = "{% for message in messages %}# {{ message['content'] }}\n{% endfor %}"
    talks = [[{"role": "user", "content": text}] for text in ("add two numbers", "open a file")]
    outputs = engine.chat(talks, SamplingParams(max_tokens=5), chat_template=template, use_tqdm=False)
    assert [len(output.prompt_token_ids) > 3 for output in outputs] == [True, True]
    assert_outputs(llama, outputs, probes)


def test_probes_from_files(llama: Reference, probes: list[ProbeWeights], engine: Any, tmp_path: Any) -> None:
    from vllm import SamplingParams

    files = [probe.save(tmp_path / f"{probe.name}.safetensors") for probe in probes]
    engine.replace_probes(files)
    assert_outputs(llama, engine.generate(["class A:"], SamplingParams(max_tokens=4), use_tqdm=False), probes)


# --- a worker's answer, without an engine ---


def answer(plan: ScoringPlan, logits: list[float], *, start: int = 0, crossing: int | None = None) -> Any:
    from lmprobe_tl.vllm.wire import Scores

    column = np.array(logits, dtype=np.float32)[:, None]
    crossings = [] if crossing is None else [(0, crossing, logits[crossing - start], logits[crossing - start])]
    return Scores(start, len(logits), column.tobytes(), np.fmax.accumulate(column).tobytes(), crossings)


@pytest.fixture
def plan(llama: Reference) -> ScoringPlan:
    probe = make_probe(llama, "p", "blocks.2.hook_resid_post", seed=1)
    return ScoringPlan([probe.with_threshold(1.0, "logit")])


def result(plan: ScoringPlan, scores: Any, tokens: list[int], **options: Any) -> Any:
    from lmprobe_tl.vllm.results import probe_result

    return probe_result(plan, scores, tokens, **({"row": 3, "n_prompt": 2, "stops": False, "end": EOS} | options))


def test_scores_past_the_last_token_are_left_out(plan: ScoringPlan) -> None:
    # An engine that schedules ahead may have run a step more than the request has tokens for.
    found = result(plan, answer(plan, [0.1, 0.2, 0.3, 5.0], crossing=3), [BOS, 7, 8, 9])
    torch.testing.assert_close(found.probe_scores["p"], torch.tensor([0.1, 0.2, 0.3]))
    assert found.alarms == () and found.n_unknown == 0


def test_positions_without_a_score_are_nan_and_counted(plan: ScoringPlan) -> None:
    found = result(plan, answer(plan, [2.0, math.nan], start=1, crossing=1), [BOS, 7, 8, 9, 10])
    torch.testing.assert_close(found.probe_scores["p"], torch.tensor([math.nan, 2.0, math.nan, math.nan]), equal_nan=True)
    assert found.n_unknown == 3
    (alarm,) = found.alarms
    assert (alarm.probe, alarm.row, alarm.position, alarm.token_id, alarm.logit) == ("p", 3, 1, 7, 2.0)
    nothing = result(plan, None, [BOS, 7, 8])
    assert nothing.n_unknown == 2 and nothing.alarms == () and nothing.probe_scores["p"].isnan().all()


@pytest.mark.parametrize(
    "tokens, stops, crossing, stopped_by",
    [
        ([BOS, 7, 8, EOS], True, 2, "p"),
        ([BOS, 7, 8, EOS], True, None, None),
        ([BOS, 7, 8, EOS], False, 2, None),
        ([BOS, 7, 8, 9], True, 2, None),
    ],
)
def test_what_ended_a_request(
    plan: ScoringPlan, tokens: list[int], stops: bool, crossing: int | None, stopped_by: str | None
) -> None:
    found = result(plan, answer(plan, [0.0, 0.5, 2.0], crossing=crossing), tokens, stops=stops)
    assert found.stopped_by == stopped_by


def test_stretches_that_follow_each_other(plan: ScoringPlan) -> None:
    from lmprobe_tl.vllm.results import joined

    parts = [answer(plan, [1.0, 2.0]), answer(plan, [3.0], start=2), answer(plan, [4.0, 5.0], start=3, crossing=4)]
    whole = joined(parts)
    assert (whole.start, whole.n, whole.crossings) == (0, 5, [(0, 4, 5.0, 5.0)])
    assert whole.arrays()[0][:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_names_of_requests() -> None:
    from lmprobe_tl.vllm._compat import client_names

    assert list(client_names("12-0123abcd")) == [("12", 0, False)]
    assert list(client_names("3_12-0123abcd")) == [("3_12", 0, False), ("12", 3, True)]
    assert list(client_names("cmpl-a_b-0-0123abcd")) == [("cmpl-a_b-0", 0, False)]
    assert list(client_names("12-0123abcg")) == list(client_names("12")) == []
