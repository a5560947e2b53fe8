"""Answers on their way from vLLM's server to the client: JSON and streams of events are edited, all else is passed on."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from lmprobe_tl.vllm.server.choices import ScoredAnswer

Send = Callable[[Any], Awaitable[None]]
_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")


class ResponseEditor:
    """Stands for `send` of an ASGI application."""

    def __init__(self, answer: ScoredAnswer, send: Send) -> None:
        self._answer, self._send = answer, send
        self._start: dict[str, Any] = {}
        self._kind = ""
        self._body = b""

    async def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self._kind == "application/json":
            await self._whole(message)
        elif message["type"] == "http.response.body" and self._kind == "text/event-stream":
            await self._part(message)
        else:
            await self._send(message)

    async def _begin(self, message: dict[str, Any]) -> None:
        headers = dict(message.get("headers") or ())
        kind = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
        if message["status"] == 200 and kind in ("application/json", "text/event-stream"):
            self._kind = kind
            others = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
            message = message | {"headers": others}
        if self._kind == "application/json":
            self._start = message
        else:
            await self._send(message)

    async def _whole(self, message: dict[str, Any]) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        edited = await self._edited(self._body)
        headers = [*self._start["headers"], (b"content-length", str(len(edited)).encode())]
        await self._send(self._start | {"headers": headers})
        await self._send({"type": "http.response.body", "body": edited})

    async def _part(self, message: dict[str, Any]) -> None:
        """Events may be cut anywhere: what is no whole event waits for the rest."""
        self._body += message.get("body", b"")
        ready = b"".join([await self._edited_event(event) for event in self._whole_events()])
        more = bool(message.get("more_body"))
        if not more:
            ready, self._body = ready + self._body, b""
        if ready or not more:
            await self._send({"type": "http.response.body", "body": ready, "more_body": more})

    def _whole_events(self) -> Iterator[bytes]:
        while (end := _END_OF_EVENT.search(self._body)) is not None:
            event, self._body = self._body[: end.end()], self._body[end.end() :]
            yield event

    async def _edited_event(self, event: bytes) -> bytes:
        found = re.fullmatch(rb"data: ?(\{[^\r\n]*\})(\s+)", event)
        return event if found is None else b"data: " + await self._edited(found[1]) + found[2]

    async def _edited(self, body: bytes) -> bytes:
        answer = json.loads(body)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            return body
        scored = await self._answer.add_scores(answer)
        return json.dumps(scored, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
