"""`stop=True` ends a request in the step of its alarm, at the token that greedy decoding under Hugging Face says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import start
from reference import Reference, assert_outputs, assert_same, limit_between, make_probe

from lmprobe_tl.errors import EngineError, InputError

MOST = 20


@pytest.mark.parametrize("mode", ["eager", "chunked"])
def test_a_request_ends_in_the_step_of_its_alarm(demo: Reference, mode: str) -> None:
    from vllm import SamplingParams

    probe = make_probe(demo, "p", "blocks.3.hook_resid_post", seed=11, inference="score:ema_max(0.3)")
    rows = [demo.encode(f"def function_{at}(a, b):\n    return a" + " + b" * at, bos=True) for at in range(24)]
    texts = [demo.greedy(row, MOST) for row in rows]
    running = [demo.running([*row, *text], probe) for row, text in zip(rows, texts, strict=True)]
    # Such that some rows have their alarm in the prompt, some later, and some never.
    ends = [(float(values[len(row) - 1]), float(values[-2])) for row, values in zip(rows, running, strict=True)]
    limit = limit_between(
        torch.cat(running),
        lambda x: (
            sum(a >= x for a, _ in ends) > 2 and sum(a < x <= b for a, b in ends) > 4 and sum(b < x for _, b in ends) > 2
        ),
    )
    expected = []
    for row, text, values in zip(rows, texts, running, strict=True):
        # The last token is sampled, and never scored.
        reached = (values[: len(row) + len(text) - 1] >= limit).nonzero().flatten().tolist()
        if not reached:
            expected.append((text, None, False))
            continue
        # Position p enters the model, and p + 1 is sampled from it: that one gives way to the end of the sequence.
        kept = max(0, reached[0] + 1 - len(row))
        expected.append(([*text[:kept], demo.tokenizer.eos_token_id], reached[0], True))
    options: dict[str, Any] = {"enforce_eager": True} if mode == "eager" else {"max_num_batched_tokens": 12}
    with start(demo, [probe.with_threshold(limit, "logit")], **options) as engine:
        prompts = [{"prompt_token_ids": row} for row in rows]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=MOST, temperature=0), use_tqdm=False, stop=True)
        for output, (text, position, stopped) in zip(outputs, expected, strict=True):
            (completion,) = output.outputs
            assert list(completion.token_ids) == text
            assert [alarm.position for alarm in output.alarms] == ([] if position is None else [position])
            assert output.stopped_by == ("p" if stopped else None)
            assert completion.finish_reason == ("stop" if text[-1] == demo.tokenizer.eos_token_id else "length")
            assert len(output.probe_scores["p"]) == len(output.prompt_token_ids) + len(text) - 1
        # The token that ends it stands first among the log probabilities, as a sampled one does.
        sampling = SamplingParams(max_tokens=MOST, temperature=0, logprobs=3)
        for output, (text, _, stopped) in zip(
            engine.generate(prompts, sampling, use_tqdm=False, stop=True), expected, strict=True
        ):
            (completion,) = output.outputs
            assert [next(iter(step)) for step in completion.logprobs] == list(completion.token_ids) == text
            for at, step in enumerate(completion.logprobs):
                likely, found = sorted(one.logprob for one in step.values())[-3:], step[text[at]].logprob
                if stopped and at == len(text) - 1:
                    assert found == -math.inf if len(step) > 3 else found in likely
                else:
                    assert found == likely[-1]  # greedy
        # The next call of the same engine does not stop.
        outputs = engine.generate(prompts, SamplingParams(max_tokens=MOST, temperature=0), use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == texts
        assert all(output.stopped_by is None for output in outputs)
    in_prompt = sum(stopped and position < len(row) for row, (_, position, stopped) in zip(rows, expected, strict=True))
    assert 0 < in_prompt < sum(stopped for _, _, stopped in expected) < len(rows)


def test_of_several_completions_each_ends_at_its_own_alarm(demo: Reference) -> None:
    from vllm import SamplingParams

    probe = make_probe(demo, "p", "blocks.5.hook_resid_post", seed=12)
    prompts = [{"prompt_token_ids": demo.encode(f"class Class{at}:\n    def", bos=True)} for at in range(6)]
    sampling = SamplingParams(max_tokens=MOST, n=4)
    with start(demo, [probe]) as engine:
        free = [one for output in engine.generate(prompts, sampling, use_tqdm=False) for one in output.outputs]
        peaks = torch.stack([one.probe_scores["p"][1:].max() for one in free])
        limit = limit_between(peaks, lambda x: 8 <= int((peaks >= x).sum()) <= 16)
        engine.replace_probes([probe.with_threshold(limit, "logit")])
        outputs = engine.generate(prompts, sampling, use_tqdm=False, stop=True)
    counts = set()
    for output in outputs:
        prompt = list(output.prompt_token_ids)
        for completion in output.outputs:
            logits = demo.logits([*prompt, *completion.token_ids][:-1], probe)[1:]
            reached = (logits >= limit).nonzero().flatten().tolist()
            assert (completion.stopped_by == "p") == bool(reached)
            if reached:
                assert completion.alarms[0].position == reached[0] + 1
                assert len(completion.token_ids) == max(1, reached[0] + 3 - len(prompt))
                assert completion.token_ids[-1] == demo.tokenizer.eos_token_id
            counts.add((bool(reached), len(completion.token_ids)))
    assert len(counts) > 3 and {stopped for stopped, _ in counts} == {True, False}


def test_an_alarm_or_a_stop_string_whichever_is_first(demo: Reference) -> None:
    from vllm import SamplingParams

    probe = make_probe(demo, "p", "blocks.3.hook_resid_post", seed=11, inference="score:ema_max(0.3)")
    rows = [demo.encode(f"def function_{at}(a, b):\n    return a" + " + b" * at, bos=True) for at in range(24)]
    texts = [demo.greedy(row, MOST) for row in rows]
    eos, stop = demo.tokenizer.eos_token_id, "):"
    strings = []  # index of the token that completes the string
    for text in texts:
        decoded = [demo.tokenizer.decode(text[: n + 1], skip_special_tokens=True) for n in range(len(text))]
        strings.append(next((n for n, one in enumerate(decoded) if stop in one), MOST))
    running = [demo.running([*row, *text], probe) for row, text in zip(rows, texts, strict=True)]

    def alarm_at(row: list[int], values: torch.Tensor, limit: float) -> int:
        """Index of the generated token that gives way to the end."""
        reached = (values[:-1] >= limit).nonzero().flatten().tolist()
        return max(0, reached[0] + 1 - len(row)) if reached else MOST

    def is_good(limit: float) -> bool:
        alarms = [alarm_at(row, values, limit) for row, values in zip(rows, running, strict=True)]
        pairs = list(zip(alarms, strings, strict=True))
        return (
            sum(a <= b < MOST for a, b in pairs) > 1
            and sum(b < a for a, b in pairs) > 1
            and sum(a < MOST for a in alarms) > 4
        )

    limit = limit_between(torch.cat(running), is_good)
    with start(demo, [probe.with_threshold(limit, "logit")], enforce_eager=True) as engine:
        sampling = SamplingParams(max_tokens=MOST, temperature=0, stop=[stop], prompt_logprobs=1)
        prompts = [{"prompt_token_ids": row} for row in rows]
        outputs = engine.generate(prompts, sampling, use_tqdm=False, stop=True)
    for output, row, text, values, at_string in zip(outputs, rows, texts, running, strings, strict=True):
        (completion,) = output.outputs
        at_alarm = alarm_at(row, values, limit)
        expected = [*text[:at_alarm], eos] if at_alarm <= min(at_string, len(text) - 1) else text[: at_string + 1]
        assert list(completion.token_ids) == expected
        assert output.stopped_by == ("p" if at_alarm <= min(at_string, len(text) - 1) else None)
        assert (completion.stop_reason == stop) == (at_string < min(at_alarm, len(text)))
        ids = [*row, *expected][:-1]
        assert_same(output.probe_scores["p"], demo.logits(ids, probe), "scores")
        assert all(alarm.position < len(ids) for alarm in output.alarms)


def test_options_that_do_not_go_with_a_stop_are_refused(llama: Reference) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from lmprobe_tl.vllm.offline import marked_sampling

    for name, value in (
        ("ignore_eos", True),
        ("min_tokens", 2),
        ("structured_outputs", StructuredOutputsParams(regex="a+")),
    ):
        params = SamplingParams(max_tokens=4, **{name: value})
        with pytest.raises(InputError, match=f"stop=True ends a request at once .* but {name}="):
            marked_sampling(params, True, True)
        assert marked_sampling(params, False, True).extra_args == {"probe_scores": True, "probe_stop": False}
    assert marked_sampling(SamplingParams(prompt_logprobs=1), True, True).extra_args["probe_stop"] is True


def test_an_interrupted_call_leaves_nothing_to_the_next(llama: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    probe = make_probe(llama, "p", "blocks.2.hook_resid_post", seed=1)
    rows = [{"prompt_token_ids": llama.encode(f"def f_{at}(", bos=True)} for at in range(12)]
    endless = SamplingParams(max_tokens=6, ignore_eos=True)
    with start(llama, [probe], enforce_eager=True) as engine:
        with pytest.raises(InputError, match="but ignore_eos=True has vLLM go on"):
            engine.generate(rows, endless, stop=True, use_tqdm=False)
        inner = engine.llm.llm_engine
        steps, step = iter(range(3)), inner.step

        def interrupted() -> Any:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(inner, "step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(rows, endless, use_tqdm=False)
        outputs = engine.generate(rows[:2], endless, use_tqdm=False)
        assert [list(output.prompt_token_ids) for output in outputs] == [row["prompt_token_ids"] for row in rows[:2]]
        assert_outputs(llama, outputs, [probe])
        # a request that somebody else has running
        inner.add_request("7", rows[0], endless)
        with pytest.raises(EngineError, match="probes cannot be replaced while requests run"):
            engine.replace_probes([probe])
        while inner.has_unfinished_requests():
            inner.step()
        engine.replace_probes([probe])
        assert_outputs(llama, engine.generate(rows[:2], endless, use_tqdm=False), [probe])
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.generate(rows, endless)
