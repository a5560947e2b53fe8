"""`ProbedAsyncLLM`: scores while requests run, on the demo model. Its engine is always a process of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import torch
from served_model import ENGINE, Reference, environment, make_probes
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from lmprobe_tl import ProbeWeights
from lmprobe_tl.demo import MODEL_FOLDER
from lmprobe_tl.errors import EngineError, IncompatibleProbeError, InputError
from lmprobe_tl.vllm import ProbedAsyncLLM, wire
from lmprobe_tl.vllm.connection import states_of

CLOSE = 1e-4


class Running:
    """An engine, and the event loop that it lives on."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = ProbedAsyncLLM(MODEL_FOLDER, probes=make_probes(), **ENGINE)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    async def outputs(self, prompt: Any, request_id: str, stop: bool = False, **sampling: Any) -> list[Any]:
        params = SamplingParams(**({"max_tokens": 12, "temperature": 0} | sampling))
        return [output async for output in self.engine.generate(prompt, params, request_id, stop=stop)]

    async def idle_state(self) -> wire.State:
        """The worker's, once it has nothing to do; it learns of the last request's end in one more step."""
        for _ in range(600):
            (state,) = await states_of(self.engine.engine)
            if not state.n_open:
                break
            await asyncio.sleep(0.05)
        return state


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    before = dict(os.environ)
    os.environ.update(environment())
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    found = Running()
    yield found
    found.run(found.engine.close())
    found.loop.close()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def check(reference: Reference, prompt: list[int], completion: Any) -> None:
    token_ids = [*prompt, *completion.token_ids]
    for name, expected in reference.logits(token_ids).items():
        assert completion.probe_scores[name].shape == (len(token_ids) - 1,) == completion.running[name].shape
        assert (completion.probe_scores[name] - expected).abs().max() < CLOSE
    assert completion.n_unknown == 0
    assert completion.running["a"][0].isnan(), "BOS does not count"
    torch.testing.assert_close(completion.running["a"][1:], completion.probe_scores["a"][1:].sigmoid())


def test_scores_come_while_requests_run(running: Running, reference: Reference) -> None:
    async def every() -> list[list[Any]]:
        return await asyncio.gather(
            *[
                running.outputs(f"def function_{i}(a, b):\n" + "    a = b\n" * i, f"run-{i}", max_tokens=6 + i)
                for i in range(10)
            ]
        )

    for outputs in running.run(every()):
        lengths = [len(output.probe_scores["a"]) for output in outputs]
        n_prompt = len(outputs[0].prompt_token_ids)
        assert lengths == sorted(lengths)
        assert any(n_prompt <= length < lengths[-1] for length in lengths), "nothing came before the end"
        for output in outputs:  # what is there is what will be there
            n = len(output.probe_scores["b"])
            assert n <= n_prompt + len(output.outputs[0].token_ids) - 1
            torch.testing.assert_close(output.probe_scores["b"], outputs[-1].probe_scores["b"][:n], rtol=0, atol=0)
            assert output.alarms == outputs[-1].alarms[: len(output.alarms)]
        check(reference, outputs[-1].prompt_token_ids, outputs[-1].outputs[0])
    assert running.run(running.engine.start()).inbox.n_late == 0


def test_outputs_of_new_tokens_alone_have_the_scores_of_all(running: Running, reference: Reference) -> None:
    outputs = running.run(running.outputs("import", "delta", output_kind=RequestOutputKind.DELTA, max_tokens=8))
    generated = [token for output in outputs for token in output.outputs[0].token_ids]
    assert len(generated) == 8 and len(outputs[-1].outputs[0].token_ids) < 8
    expected = reference.logits([*outputs[0].prompt_token_ids, *generated])["a"]
    assert (outputs[-1].probe_scores["a"] - expected).abs().max() < CLOSE


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY])
def test_several_completions(running: Running, reference: Reference, kind: RequestOutputKind) -> None:
    outputs = running.run(running.outputs("class A", f"n-{kind}", n=3, temperature=1.5, seed=3, output_kind=kind))
    ended = {one.index: one for output in outputs for one in output.outputs if one.finish_reason is not None}
    assert sorted(ended) == [0, 1, 2]
    for completion in ended.values():
        check(reference, outputs[0].prompt_token_ids, completion)
    assert len({tuple(one.token_ids) for one in ended.values()}) > 1


def test_an_alarm_stops_it(running: Running) -> None:
    free = running.run(running.outputs("def f(a):", "free"))[-1]
    stopped = running.run(running.outputs("def f(a):", "stopped", stop=True))[-1]
    assert free.stopped_by is None and len(free.outputs[0].token_ids) == 12
    first = free.alarms[0]
    assert stopped.stopped_by == first.probe and stopped.alarms[0] == first
    assert len(stopped.outputs[0].token_ids) == max(1, first.position - len(free.prompt_token_ids) + 2)


def test_a_request_that_is_aborted_or_left_frees_its_state(running: Running) -> None:
    async def end_early(request_id: str, abort: bool) -> Any:
        params = SamplingParams(max_tokens=240, ignore_eos=True)
        outputs = running.engine.generate("import", params, request_id)
        seen = []
        async for output in outputs:
            seen.append(output)
            if not abort:
                break
            await running.engine.abort(request_id)
        await outputs.aclose()
        return seen[-1]

    inbox = running.run(running.engine.start()).inbox
    for abort in (True, False):
        output = running.run(end_early(f"early-{abort}", abort))
        assert len(output.outputs[0].token_ids) < 240
        assert output.outputs[0].finish_reason == ("abort" if abort else None)
        state = running.run(running.idle_state())
        assert (state.n_open, state.n_finished, state.n_pages, len(inbox)) == (0, 0, 0, 0)


def test_many_requests_leave_nothing_behind(running: Running) -> None:
    async def many() -> None:
        await asyncio.gather(*[running.outputs(f"x = {i}", f"many-{i}", max_tokens=2) for i in range(100)])

    (before,) = running.run(states_of(running.engine.engine))
    running.run(many())
    state = running.run(running.idle_state())
    assert (state.n_open, state.n_finished, state.n_pages) == (0, 0, 0)
    assert state.n_scored > before.n_scored + 100


def test_an_id_that_is_running_and_options_that_forbid_a_stop_are_refused(running: Running) -> None:
    async def twice() -> list[Any]:
        return await asyncio.gather(*[running.outputs("import", "same") for _ in range(2)], return_exceptions=True)

    first, second = running.run(twice())
    assert first[-1].n_unknown == 0, "the one that runs is left alone"
    assert isinstance(second, InputError) and "request_id is 'same', and a request of this name is running" in str(second)
    for options in ({"ignore_eos": True}, {"min_tokens": 3}):
        with pytest.raises(InputError, match=next(iter(options))):
            running.run(running.outputs("import", "stop", stop=True, **options))
    assert running.run(running.outputs("import", "same"))[-1].n_unknown == 0


def test_a_client_that_is_gone_does_not_hurt_the_engine(running: Running) -> None:
    """Last: it closes the connection's socket, and opens another."""

    async def leave_and_come_back() -> Any:
        await running.engine._connection.close()
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        outputs = [one async for one in running.engine.engine.generate("import", marked(params), "unheard")]
        assert len(outputs[-1].outputs[0].token_ids) == 40
        (state,) = await states_of(running.engine.engine)
        running.engine._connection = None
        await running.outputs("import", "again")
        return state

    state = running.run(leave_and_come_back())
    assert state.n_finished == 0
    assert running.run(running.outputs("import", "again"))[-1].n_unknown == 0


def marked(params: Any) -> Any:
    params.extra_args = {"probe_scores": True}
    return params


def test_probes_of_another_model_close_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is a stand-in: what counts is that it is shut down."""
    import vllm

    from lmprobe_tl.vllm import online_engine

    closed = []

    class Engine:
        def shutdown(self) -> None:
            closed.append(True)

    async def refuse(*_: Any) -> None:
        raise IncompatibleProbeError("another model")

    monkeypatch.setattr(vllm.AsyncLLMEngine, "from_engine_args", lambda _: Engine())
    monkeypatch.setattr(online_engine, "connect", refuse)
    probe = ProbeWeights.from_direction(torch.ones(192), 0.0, name="p", hook_points="blocks.2.hook_resid_post")
    engine = ProbedAsyncLLM(MODEL_FOLDER, probes=probe)
    with pytest.raises(IncompatibleProbeError):
        asyncio.run(engine.start())
    assert closed == [True]
    with pytest.raises(EngineError, match="the engine is closed"):
        asyncio.run(engine.start())
