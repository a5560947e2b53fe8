"""Whatever the scheduler does with a request, its scores are those of its tokens alone; and nothing stays behind."""

from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import start
from reference import Reference, assert_outputs, limit_between, make_probe, many_probes, tokens_of

SHARED = "def shared_prefix(first, second, third):\n    total = first + second * third\n" * 3


def given(rows: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": row} for row in rows]


def state_of(engine: Any) -> Any:
    from lmprobe_tl.vllm import wire

    (answer,) = engine.llm.collective_rpc("lmprobe_state")
    return wire.decode(answer, wire.State)


def counter(engine: Any, name: str) -> float:
    """One of vLLM's own counters, of all engines so far."""
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == f"vllm:{name}")


def sampling(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, **({"temperature": 1.0, "ignore_eos": True} | options))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_preempted_and_evicted_requests_in_chunks(references: dict[str, Reference], name: str) -> None:
    # Sixteen requests that grow to some 150 tokens, in a cache of 640: the scheduler has to push some out, and to
    # compute them anew, or to find what is left of them in the prefix cache. Chunks of 24 tokens cut all prompts.
    reference = references[name]
    probes = many_probes(reference)
    rows = [reference.encode(SHARED + f"    return {at}" * (at % 4), bos=bool(at % 2)) for at in range(16)]
    options = {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 24, "disable_log_stats": False}
    with start(reference, probes, **options) as engine:
        before = counter(engine, "num_preemptions"), counter(engine, "prefix_cache_hits")
        for _ in range(2):
            outputs = engine.generate(given(rows), sampling(70), use_tqdm=False)
            assert [len(output.outputs[0].token_ids) for output in outputs] == [70] * 16
            assert_outputs(reference, outputs, probes)
        assert counter(engine, "num_preemptions") > before[0]
        assert counter(engine, "prefix_cache_hits") > before[1]
        state = state_of(engine)
        assert (state.n_open, state.n_finished, state.n_pages, state.n_unknown) == (0, 0, 0, 0)


def test_a_shared_prefix_is_scored_once_and_read_by_all(llama: Reference) -> None:
    probes = many_probes(llama)
    rows = [llama.encode(SHARED + f"    return {at}", bos=True) for at in range(8)]
    with start(llama, probes) as engine:
        for round_ in range(2):
            outputs = engine.generate(given(rows), sampling(6), use_tqdm=False)
            assert_outputs(llama, outputs, probes)
            assert sum(output.num_cached_tokens for output in outputs) >= (0, 8 * 32)[round_]


def test_compiled_by_inductor(llama: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "0")
    probes = many_probes(llama)
    rows = [llama.encode(SHARED[: 30 * at], bos=True) for at in range(1, 7)]
    with start(llama, probes) as engine:
        assert engine.llm.llm_engine.vllm_config.compilation_config.backend == "inductor"
        assert_outputs(llama, engine.generate(given(rows), sampling(8), use_tqdm=False), probes)


def test_alone_and_among_31_others(demo: Reference) -> None:
    # The same alarms and the same ends, whatever else is in the batch.
    probe = make_probe(demo, "p", "blocks.3.hook_resid_post", seed=11, inference="score:ema_max(0.3)")
    rows = [demo.encode(f"def function_{at}(a, b):\n    return a" + " + b" * at, bos=True) for at in range(32)]
    with start(demo, [probe], max_num_seqs=32) as engine:
        greedy = sampling(24, temperature=0, ignore_eos=False)
        peaks = torch.stack([out.running["p"][-1] for out in engine.generate(given(rows), greedy, use_tqdm=False)])
        limit = limit_between(peaks, lambda x: 10 <= int((peaks >= x).sum()) <= 25)
        engine.replace_probes([probe.with_threshold(limit, "logit")])
        for stop in (False, True):
            together = engine.generate(given(rows), greedy, use_tqdm=False, stop=stop)
            for row, other in list(zip(rows, together, strict=True))[::3]:
                (one,) = engine.generate(given([row]), greedy, use_tqdm=False, stop=stop)
                assert one.outputs[0].token_ids == other.outputs[0].token_ids
                assert [alarm.position for alarm in one.alarms] == [alarm.position for alarm in other.alarms]
                assert one.stopped_by == other.stopped_by
            n_alarmed = sum(bool(output.alarms) for output in together)
            assert 10 <= n_alarmed <= 25
            assert sum(output.stopped_by == "p" for output in together) == (n_alarmed if stop else 0)


def test_an_aborted_request_leaves_nothing_open(llama: Reference) -> None:
    probes = many_probes(llama)
    rows = [llama.encode(SHARED[: 40 * at], bos=True) for at in range(1, 6)]
    with start(llama, probes) as engine:
        inner = engine.llm.llm_engine
        for at, row in enumerate(rows):
            inner.add_request(f"own-{at}", given([row])[0], sampling(60))
        for _ in range(8):
            inner.step()
        state = state_of(engine)
        assert state.n_open == 5 and state.n_pages >= 5
        inner.abort_request([f"own-{at}" for at in range(4)])
        while inner.has_unfinished_requests():
            inner.step()
        assert_outputs(llama, engine.generate(given(rows), sampling(5), use_tqdm=False), probes)
        state = state_of(engine)
        # Requests whose client did not ask for scores leave none.
        assert (state.n_open, state.n_finished, state.n_pages) == (0, 0, 0)


def test_an_output_does_not_wait_for_the_step_after_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # With asynchronous scheduling the next forward pass has begun when the tokens of the last one arrive.
    from lmprobe_tl.vllm.worker import WorkerProbes

    class OnItsWay:
        def __init__(self) -> None:
            self.is_waited_for = False

        def has_arrived(self) -> bool:
            return False

        def arrived(self) -> tuple[np.ndarray, np.ndarray]:
            self.is_waited_for = True
            return np.zeros((1, 1), dtype=np.float32), np.ones(1, dtype=np.int64)

    worker = WorkerProbes.__new__(WorkerProbes)
    fields = {"_lock": threading.Lock(), "_book": None, "_hooks": SimpleNamespace(by_name=["hook"]), "_ends": {}}
    fields |= {"_fired": np.zeros(1, dtype=np.int64), "_first_readings": None, "_n_steps": 3}
    steps = [OnItsWay() for _ in range(3)]
    fields["_waiting"] = deque((number, None, one) for number, one in enumerate(steps, start=1))
    for name, value in fields.items():
        monkeypatch.setattr(worker, name, value, raising=False)
    assert worker._ended("output", 2) == "output"
    assert [one.is_waited_for for one in steps] == [True, True, False]
    worker.state()
    assert steps[2].is_waited_for


def test_memory_is_flat(llama: Reference) -> None:
    probe = make_probe(llama, "p", "blocks.2.hook_resid_post", seed=3)
    rows = [llama.encode(f"x = {at}", bos=True) for at in range(40)]
    held = []
    with start(llama, [probe]) as engine:
        for _ in range(4):
            engine.generate(given(rows), sampling(4, n=2), use_tqdm=False)
            state = state_of(engine)
            held.append((state.n_open, state.n_finished, state.n_pages))
        assert state.n_scored == sum(4 * 2 * (len(row) + 3) for row in rows)
    assert held == [(0, 0, 0)] * 4


def test_other_probes_in_a_running_engine(demo: Reference) -> None:
    # As in an engine of their own, and nothing of the old ones: prompts that the prefix cache has are scored anew.
    hooks = ("blocks.0.hook_resid_pre", "blocks.3.hook_resid_post")
    old = [make_probe(demo, "old", hooks, seed=1)]
    new = [
        make_probe(demo, "new", hooks[1], seed=2, inference="score:ema_max(0.5)"),
        make_probe(demo, "newer", hooks[1], seed=3, inference="mean"),
        make_probe(demo, "newest", hooks[0], seed=4),
    ]
    rows = given([demo.encode(SHARED[: 50 * at], bos=True) for at in range(1, 6)])
    greedy = sampling(10, temperature=0)
    with start(demo, old, capacity=2) as engine:
        assert_outputs(demo, engine.generate(rows, greedy, use_tqdm=False), old)
        n_compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        engine.replace_probes(new)
        replaced = engine.generate(rows, greedy, use_tqdm=False)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_compiled > 0
        assert_outputs(demo, replaced, new)
        engine.replace_probes(old)
        assert_outputs(demo, engine.generate(rows, greedy, use_tqdm=False), old)
    with start(demo, new) as engine:
        fresh = engine.generate(rows, greedy, use_tqdm=False)
    for one, other in zip(replaced, fresh, strict=True):
        assert tokens_of(one, one.outputs[0]) == tokens_of(other, other.outputs[0])
        assert {alarm.probe: alarm.position for alarm in one.alarms} == {
            alarm.probe: alarm.position for alarm in other.alarms
        }
        for name in ("new", "newer", "newest"):
            torch.testing.assert_close(one.probe_scores[name], other.probe_scores[name], rtol=1e-5, atol=1e-5)
