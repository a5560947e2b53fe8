"""`AsyncLLM` with probes: outputs that carry the scores of their tokens while they are generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from lmprobe_tl.errors import EngineError
from lmprobe_tl.given_probes import as_probes
from lmprobe_tl.vllm.connection import ProbeConnection, connect
from lmprobe_tl.vllm.offline import marked_sampling
from lmprobe_tl.vllm.probes import engine_kwargs
from lmprobe_tl.vllm.results import probe_result, set_result


class ProbedAsyncLLM:
    """An asynchronous engine that scores every token with the probes while it generates, in the compiled graph.

    model, engine_args: as for `vllm.AsyncEngineArgs`; the engine stays at hand as `.engine`. probes: files, weights or
    fitted probes. capacity: columns to reserve at each hook point.

    Raises EngineError for a setting under which scores would be wrong, IncompatibleProbeError for probes of another model.

        async with ProbedAsyncLLM("meta-llama/Llama-3.1-8B", probes=["deceit.safetensors"]) as engine:
            async for output in engine.generate("Tell me", SamplingParams(max_tokens=200), "request-1", stop=True):
                print(output.outputs[0].text, output.running["deceit"][-1:], output.alarms)
    """

    def __init__(self, model: Any, *, probes: Any, capacity: int | None = None, **engine_args: Any) -> None:
        self._weights = as_probes(probes)
        arguments = engine_kwargs(self._weights, capacity=capacity, **engine_args)
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        self.engine: Any = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(model), **arguments))
        self._connection: ProbeConnection | None = None
        self._connecting = asyncio.Lock()

    async def start(self) -> ProbeConnection:
        """Load the probes, as `async with` and the first request do. Closes the engine where they do not fit it."""
        async with self._connecting:
            if self.engine is None:
                raise EngineError("the engine is closed; start another one.")
            if self._connection is None:
                try:
                    self._connection = await connect(self.engine, self._weights)
                except BaseException:
                    await self.close()
                    raise
            return self._connection

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, stop: bool = False, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """`AsyncLLM.generate`, whose outputs also have what the probes say: see `ProbeResult` for the attributes.

        They tell of the positions that have been scored so far, which may trail the tokens; those of a completion that is
        finished are all there. Of several completions (`n`), each of `output.outputs` has them, and the output those of its
        first. stop: end the request at its first alarm, as in `ProbedLLM.generate`.

        InputError where a request of this id is running, or cannot be stopped as asked.
        """
        connection = await self.start()
        marked = marked_sampling(sampling_params, stop, connection.can_stop)
        connection.inbox.expect(request_id, marked.n)
        answer = _Answer(connection, request_id, stop, is_delta=marked.output_kind.name == "DELTA")
        outputs = self.engine.generate(prompt, marked, request_id, **options)
        try:
            async for output in outputs:
                await answer.attach(output)
                yield output
        finally:
            await outputs.aclose()  # a consumer that stops listening ends the request
            connection.inbox.forget(request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` then ends with what there is."""
        await self.engine.abort(request_id)

    async def close(self) -> None:
        """Shut the engine down and free its memory."""
        connection, self._connection = self._connection, None
        engine, self.engine = self.engine, None
        if connection is not None:
            await connection.close()
        if engine is not None:
            engine.shutdown()

    async def __aenter__(self) -> ProbedAsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Answer:
    """The outputs of one request, which may tell of new tokens alone."""

    def __init__(self, connection: ProbeConnection, request_id: str, stop: bool, *, is_delta: bool) -> None:
        self._connection, self._request_id, self._stop, self._is_delta = connection, request_id, stop, is_delta
        self._prompt: list[int] = []
        self._generated: dict[int, list[int]] = {}

    async def attach(self, output: Any) -> None:
        connection, inbox = self._connection, self._connection.inbox
        self._prompt = list(output.prompt_token_ids or self._prompt)
        for completion in output.outputs:
            tokens = [*self._prompt, *self._all_tokens(completion)]
            ends = completion.finish_reason not in (None, "abort")
            if ends:
                await inbox.wait(self._request_id, completion.index, len(tokens) - 1)
                await connection.check_agreement()
            found = inbox.received(self._request_id).get(completion.index)
            result = probe_result(
                connection.plan,
                None if found is None else found.as_wire(),
                tokens,
                row=0,
                n_prompt=len(self._prompt),
                stops=self._stop,
                end=connection.end_token,
                so_far=not ends,
            )
            set_result(completion, result)
        if output.outputs:
            set_result(output, min(output.outputs, key=lambda one: one.index))

    def _all_tokens(self, completion: Any) -> list[int]:
        """Of a completion that is told token by token, those before, too."""
        if not self._is_delta:
            return list(completion.token_ids)
        tokens = self._generated.setdefault(completion.index, [])
        tokens.extend(completion.token_ids)
        return tokens
