"""A process of its own with an engine in it: `engine_process.py KIND MODEL FOLDER OPTIONS`, which prints what it found.

KIND: 'scores' or 'activations'.

For settings that cannot be had in the process of the tests: workers in processes, and the second model runner.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from reference import Reference, assert_outputs, many_probes

TEXTS = [f"def function_{at}(a, b):\n    return" + " a +" * (3 * at) + " b" for at in range(6)]
SHARED = "def shared_prefix(first, second, third):\n    total = first + second * third\n" * 2


def scores(name: str, folder: str, options: str) -> None:
    from vllm import SamplingParams

    from lmprobe_tl.vllm import ProbedLLM, wire

    reference = Reference(name, Path(folder))
    probes = many_probes(reference)
    texts = TEXTS + [SHARED + text for text in TEXTS[:4]]
    prompts = [{"prompt_token_ids": reference.encode(text, bos=bool(at % 2))} for at, text in enumerate(texts)]
    sampled = SamplingParams(max_tokens=36, temperature=1.0, ignore_eos=True)
    with ProbedLLM(folder, probes=probes, **json.loads(options)) as engine:
        cached = 0
        for _ in range(2):
            outputs = engine.generate(prompts, sampled, use_tqdm=False)
            assert_outputs(reference, outputs, probes)
            cached += sum(output.num_cached_tokens for output in outputs)
        several = engine.generate(prompts[:3], SamplingParams(max_tokens=5, n=3), use_tqdm=False)
        assert_outputs(reference, several, probes)
        preempted = sum(metric.value for metric in engine.llm.get_metrics() if metric.name == "vllm:num_preemptions")

        (last,) = [probe for probe in probes if probe.name == "last"]
        limit = float(torch.cat([output.running["last"][-16:] for output in outputs]).median())
        engine.replace_probes([last.with_threshold(limit, "logit")])
        stopped = engine.generate(prompts, SamplingParams(max_tokens=16), use_tqdm=False, stop=True)
        for output in stopped:
            (completion,) = output.outputs
            for alarm in output.alarms:
                assert len(completion.token_ids) == max(1, alarm.position + 2 - len(output.prompt_token_ids))
                assert completion.token_ids[-1] == reference.tokenizer.eos_token_id and output.stopped_by == "last"
            assert output.n_unknown == 0
        states = [wire.decode(answer, wire.State) for answer in engine.llm.collective_rpc("lmprobe_state")]
        runner = engine.llm.llm_engine.vllm_config.use_v2_model_runner
    print(
        json.dumps(
            {
                "cached": cached,
                "preempted": preempted,
                "stopped": sum(output.stopped_by is not None for output in stopped),
                "held": [(state.n_open, state.n_finished, state.n_pages) for state in states],
                "second_runner": bool(runner),
            }
        )
    )


def activations(name: str, folder: str, options: str) -> None:
    from lmprobe_tl.vllm import ActivationEngine

    reference = Reference(name, Path(folder))
    points = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    rows = [reference.encode(SHARED * (at % 2) + text, bos=bool(at % 3)) for at, text in enumerate(TEXTS)]
    asked = {"include_bos": True, "bos_token_id": 0, "eos_ids": [1], "progress": False}
    found_rows = []
    with ActivationEngine(folder, points, **json.loads(options)) as engine:
        for _ in range(2):
            for indices, found in engine.pooled(rows, points[::-1], ["all", "mean"], **asked):
                streams = [reference.streams(rows[index]) for index in indices]
                for point, at in zip(points, (0, 2, 4), strict=True):
                    expected = [one[at] for one in streams]
                    every, means = found[point]
                    torch.testing.assert_close(every, torch.cat(expected), rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(means, torch.stack([one.mean(0) for one in expected]), rtol=1e-4, atol=1e-4)
                found_rows += indices
        runner = engine.llm.llm_engine.vllm_config.use_v2_model_runner
    print(json.dumps({"rows": found_rows, "second_runner": bool(runner)}))


if __name__ == "__main__":
    {"scores": scores, "activations": activations}[sys.argv[1]](*sys.argv[2:])
