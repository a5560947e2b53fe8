"""The ASGI class around vLLM's server: loads the probes before it serves, and adds their scores to its answers."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from lmprobe_tl.errors import EngineError
from lmprobe_tl.given_probes import as_probes
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm import _compat
from lmprobe_tl.vllm.connection import ProbeConnection, connect
from lmprobe_tl.vllm.server.choices import ScoredAnswer
from lmprobe_tl.vllm.server.metrics import ProbeMetrics
from lmprobe_tl.vllm.server.request import PREFIXES, FieldError, ProbeRequest, read_request
from lmprobe_tl.vllm.server.response import ResponseEditor, Send
from lmprobe_tl.vllm.structure import PROBES_VARIABLE

Receive = Callable[[], Awaitable[Any]]
_LONGEST_ID = 64


class ProbeMiddleware:
    """For vLLM's `--middleware`. The paths of the probe files stand in the environment, as `lmprobe-tl serve` sets it.

    Requests to /v1/completions and /v1/chat/completions may have the fields `probe_scores` (default true) and `probe_stop`
    (default false: end at the first alarm). Each choice of the answer, or of a chunk of it, then has

    - probe_scores: by probe, the logit of each position from the prompt's first on, null where unknown; in a stream of those
      that are new;
    - probe_running: by probe, the latest running score; probe_alarms: of thresholds that were reached, in a stream new ones;
    - probe_stopped_by: the probe whose alarm ended the choice; probe_unknown: how many positions have no score.

    All else, errors too, is passed on as it is.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._connection: ProbeConnection | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and _path_of(scope) in PREFIXES and _is_json(scope):
            if _compat.is_authorised(self._app, scope):
                await self._answer(scope, receive, send)
            else:  # vLLM refuses it, unread
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        startup = await receive()
        try:
            self._connection = await _connect(scope["app"].state)
        except Exception as error:
            message = f"lmprobe-tl: error: the probes cannot be loaded, so nothing is served: {error}"
            await send({"type": "lifespan.startup.failed", "message": message})
            return
        messages = [startup]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        try:
            await self._app(scope, replay, send)
        finally:
            await self._connection.close()

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        connection = self._connection
        if connection is None:
            raise EngineError("the server's lifespan events were not run, so there are no probes; start it with them.")
        body = await _read_body(receive)
        if body is None:
            return  # the client is gone
        headers = dict(scope["headers"])
        request_id = f"{headers.get(b'x-request-id', b'')[:_LONGEST_ID].decode('latin-1')}{uuid.uuid4().hex}"
        try:
            request = read_request(_path_of(scope), body, request_id, can_stop=connection.can_stop)
        except FieldError as error:
            await _refuse(send, error)
            return
        if isinstance(request, bytes):
            await self._app(_with_body(scope, request, None), _replay(request, receive), send)
            return
        await self._scored(connection, request, _with_body(scope, request.body, request_id), receive, send)

    async def _scored(
        self, connection: ProbeConnection, request: ProbeRequest, scope: dict[str, Any], receive: Receive, send: Send
    ) -> None:
        for name in request.names:
            connection.inbox.expect(name, request.n)
        try:
            await self._app(scope, _replay(request.body, receive), ResponseEditor(ScoredAnswer(connection, request), send))
        finally:
            for name in request.names:
                connection.inbox.forget(name)


async def _connect(state: Any) -> ProbeConnection:
    paths = os.environ.get(PROBES_VARIABLE)
    if not paths:
        raise EngineError(f"{PROBES_VARIABLE} is not set; start the server by lmprobe-tl serve, or set it to a JSON list.")
    probes = as_probes(json.loads(paths))
    return await connect(state.engine_client, probes, ProbeMetrics(ScoringPlan(probes)))


def _path_of(scope: dict[str, Any]) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _is_json(scope: dict[str, Any]) -> bool:
    headers = dict(scope["headers"])
    return b"json" in headers.get(b"content-type", b"").lower() and b"content-encoding" not in headers


async def _read_body(receive: Receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return messages.pop() if messages else await receive()

    return replay


def _with_body(scope: dict[str, Any], body: bytes, request_id: str | None) -> dict[str, Any]:
    replaced = {b"content-length": str(len(body)).encode()}
    if request_id is not None:
        replaced[b"x-request-id"] = request_id.encode("latin-1")
    left_out = {*replaced, b"transfer-encoding"}
    others = [(name, value) for name, value in scope["headers"] if name.lower() not in left_out]
    return scope | {"headers": [*others, *replaced.items()]}


async def _refuse(send: Send, error: FieldError) -> None:
    """In the form of OpenAI's errors."""
    found = {"message": str(error), "type": "BadRequestError", "param": error.field, "code": 400}
    body = json.dumps({"error": found}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
