"""The middleware around an application that answers by script: what vLLM gets, and what the client gets."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl import ProbeWeights
from lmprobe_tl.errors import EngineError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm import _compat, wire
from lmprobe_tl.vllm import inbox as inbox_module
from lmprobe_tl.vllm.connection import ProbeConnection
from lmprobe_tl.vllm.inbox import ScoreInbox
from lmprobe_tl.vllm.server import ProbeMiddleware
from lmprobe_tl.vllm.server.metrics import ProbeMetrics

PATH = "/v1/completions"
END = 2
JSON = (b"content-type", b"application/json")
PLAN = ScoringPlan([ProbeWeights.from_direction(torch.ones(4), 0.0, name="p", hook_points="blocks.0.hook_resid_post")])


class Engine:
    async def collective_rpc(self, method: str) -> list[bytes]:
        assert method == "lmprobe_state"
        return [wire.encode(wire.State(0, 0, 0, 0, 0, 0, [1.0]))]


class Served:
    """An application behind the middleware. script: called with the body that vLLM would get and this object; it yields
    messages, between which it may have scores arrive."""

    def __init__(self, script: Callable[[Any, Served], Any], *, can_stop: bool = True) -> None:
        self.script, self.can_stop = script, can_stop
        self.bodies: list[bytes] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.sent: list[dict[str, Any]] = []
        self.n_read = 0

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        self.headers.append(dict(scope["headers"]))
        for message in self.script(body, self):
            await send(message)

    def arrive(
        self, logits: Sequence[float], *, start: int = 0, name: str = "", finished: bool = False, of: str = "0-"
    ) -> None:
        """Scores of the prompt numbered in `of`, as from a worker, and its crossings of 0. name: of the completion."""
        numbers = np.array(logits, dtype=np.float32)
        request_id = f"{name}cmpl-{self.headers[-1][b'x-request-id'].decode()}-{of}0123abcd"
        crossings = [(0, 0, start + at, float(one), float(one)) for at, one in enumerate(logits) if one >= 0][:1]
        packet = wire.Packet(
            [(request_id, start, len(numbers))],
            numbers.tobytes(),
            numbers.tobytes(),
            crossings,
            [request_id] if finished else [],
            0,
            0,
            [0],
        )
        self.inbox._take(packet)

    def post(self, body: Any, *, path: str = PATH, headers: Any = (JSON,), method: str = "POST") -> Any:
        """(status, headers, body) of the answer."""
        asyncio.run(self._post(body if isinstance(body, bytes) else json.dumps(body).encode(), path, headers, method))
        start, *parts = self.sent
        assert not parts[-1].get("more_body")
        assert len(dict(start["headers"])) == len(start["headers"]), "a header stands there twice"
        return start["status"], dict(start["headers"]), b"".join(part["body"] for part in parts)

    async def _post(self, body: bytes, path: str, headers: Any, method: str) -> None:
        middleware = ProbeMiddleware(self.app)
        self.inbox = ScoreInbox(PLAN.n_columns)
        middleware._connection = ProbeConnection(Engine(), PLAN, self.inbox, self.can_stop, END)
        half = len(body) // 2
        messages = [
            {"type": "http.request", "body": body[:half], "more_body": True},
            {"type": "http.request", "body": body[half:]},
        ]

        async def receive() -> Any:
            self.n_read += 1
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        try:
            await middleware(scope, receive, send)
            assert len(self.inbox) == 0, "a request that is over is still expected"
        finally:
            await self.inbox.close()


def reply(answer: Any, *, status: int = 200, kind: bytes = b"application/json") -> list[dict[str, Any]]:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"x-other", b"1")]
    half = len(body) // 2
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body[:half], "more_body": True},
        {"type": "http.response.body", "body": body[half:]},
    ]


def choice(**fields: Any) -> dict[str, Any]:
    return {"index": 0, "text": "é", "finish_reason": "length", "prompt_token_ids": [5, 6], "token_ids": [7, 8]} | fields


def scored(body: bytes) -> list[dict[str, Any]]:
    return json.loads(body)["choices"]


def test_vllm_gets_its_own_fields_and_the_client_its_scores() -> None:
    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, 0.5, math.nan])
        return reply({"id": "x", "choices": [choice()]})

    served = Served(script)
    status, headers, body = served.post({"prompt": "a", "probe_scores": True, "probe_stop": False, "vllm_xargs": {"k": 3}})
    assert json.loads(served.bodies[0]) == {
        "prompt": "a",
        "return_token_ids": True,
        "vllm_xargs": {"k": 3, "probe_scores": 1, "probe_stop": 0},
    }
    assert served.headers[0][b"content-length"] == str(len(served.bodies[0])).encode()
    assert (status, headers[b"content-length"], headers[b"x-other"]) == (200, str(len(body)).encode(), b"1")
    alarm = {"probe": "p", "position": 1, "token_id": 6, "score": pytest.approx(0.62245935), "threshold": 0.5}
    assert scored(body) == [
        choice(prompt_token_ids=None, token_ids=None)
        | {
            "probe_scores": {"p": [-1.0, 0.5, None]},
            "probe_running": {"p": None},
            "probe_alarms": [alarm | {"unit": "probability"}],
            "probe_stopped_by": None,
            "probe_unknown": 1,
        }
    ]


def test_token_ids_are_told_to_who_asks() -> None:
    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, -1.0, -1.0])
        return reply({"choices": [choice()]})

    _, _, body = Served(script).post({"prompt": "a", "return_token_ids": True})
    assert scored(body)[0]["token_ids"] == [7, 8]


def test_ids_of_clients_stay_readable_and_become_unique() -> None:
    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, -1.0, -1.0])
        return reply({"choices": [choice()]})

    seen = []
    for _ in range(2):
        served = Served(script)
        served.post({"prompt": "a"}, headers=[JSON, (b"x-request-id", b"mine")])
        seen.append(served.headers[0][b"x-request-id"])
    assert all(one.startswith(b"mine") for one in seen) and seen[0] != seen[1]


def test_several_prompts_with_several_completions() -> None:
    def script(body: bytes, served: Served) -> Any:
        for prompt in range(2):
            for index in range(2):
                served.arrive([-1.0, -1.0, -10.0 - 2 * prompt - index], name=f"{index}_", of=f"{prompt}-")
        return reply({"choices": [choice(index=index) for index in range(4)]})

    _, _, body = Served(script).post({"prompt": [[5, 6], [5, 6]], "n": 2})
    assert [one["probe_scores"]["p"][2] for one in scored(body)] == [-10.0, -11.0, -12.0, -13.0]


@pytest.mark.parametrize("n", ["2", "2.0", 2.0, 2])
def test_numbers_of_completions_are_read_as_vllm_reads_them(n: Any) -> None:
    def script(body: bytes, served: Served) -> Any:
        for index in range(2):
            served.arrive([-1.0, -1.0, -10.0 - index], name=f"{index}_")
        return reply({"choices": [choice(index=index) for index in range(2)]})

    _, _, body = Served(script).post({"prompt": "a", "n": n})
    assert [one["probe_scores"]["p"][2] for one in scored(body)] == [-10.0, -11.0]


@pytest.mark.parametrize("value", ["false", 0, "off", False, None])
def test_flags_are_read_as_vllm_reads_them(value: Any) -> None:
    def script(body: bytes, served: Served) -> Any:
        assert json.loads(body)["return_token_ids"] is True, "for echo alone it is left out"
        served.arrive([-1.0, -1.0, -1.0])
        return reply({"choices": [choice()]})

    flags = dict.fromkeys(["use_beam_search", "echo", "return_token_ids", "ignore_eos", "min_tokens"], value)
    if value == "off":
        flags["min_tokens"] = "0"
    (found,) = scored(Served(script).post({"prompt": "a", "probe_stop": True} | flags)[2])
    assert found["probe_scores"]["p"] == [-1.0, -1.0, -1.0] and found["token_ids"] is None


def test_scores_of_positions_beyond_the_answer_are_left_out() -> None:
    """A stop string ends a request after the engine has gone on."""

    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, -2.0, -3.0, 4.0, 5.0])
        return reply({"choices": [choice(finish_reason="stop")]})

    found = scored(Served(script).post({"prompt": "a"})[2])[0]
    assert found["probe_scores"]["p"] == [-1.0, -2.0, -3.0] and found["probe_alarms"] == []


def test_with_echo_the_worker_tells_how_many_positions_there_are() -> None:
    def script(body: bytes, served: Served) -> Any:
        assert "return_token_ids" not in json.loads(body)
        served.arrive([-1.0, 2.0], finished=True)
        return reply({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})

    (found,) = scored(Served(script).post({"prompt": "a", "echo": True})[2])
    assert found["probe_scores"]["p"] == [-1.0, 2.0]
    assert found["probe_alarms"][0]["position"] == 1 and "token_id" not in found["probe_alarms"][0]


def test_scores_that_never_come_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module.ScoreInbox.wait, "__kwdefaults__", {"seconds": 0.01})

    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0])
        return reply({"choices": [choice()]})

    served = Served(script)
    (found,) = scored(served.post({"prompt": "a"})[2])
    assert found["probe_scores"]["p"] == [-1.0, None, None] and found["probe_unknown"] == 2
    assert served.inbox.n_late == 2


@pytest.mark.parametrize(("last", "stopped_by"), [(END, "p"), (9, None)])
def test_who_stopped_it(last: int, stopped_by: str | None) -> None:
    def script(body: bytes, served: Served) -> Any:
        assert json.loads(body)["vllm_xargs"]["probe_stop"] == 1
        served.arrive([-1.0, -1.0, 1.0])
        return reply({"choices": [choice(token_ids=[7, last], finish_reason="stop")]})

    (found,) = scored(Served(script).post({"prompt": "a", "probe_stop": True, "probe_scores": False})[2])
    assert found["probe_stopped_by"] == stopped_by
    assert "probe_scores" not in found and len(found["probe_alarms"]) == 1


@pytest.mark.parametrize(
    ("fields", "message", "can_stop"),
    [
        ({"probe_scores": "yes"}, "probe_scores is 'yes'; expected true or false.", True),
        ({"probe_stop": 1}, "probe_stop is 1; expected true or false.", True),
        ({"probe_stop": True, "ignore_eos": True}, "which ignore_eos=True makes vLLM ignore", True),
        ({"probe_stop": True, "min_tokens": 3}, "which min_tokens=3 makes vLLM ignore", True),
        ({"probe_stop": True, "ignore_eos": "true"}, "which ignore_eos='true' makes vLLM ignore", True),
        ({"probe_stop": True, "min_tokens": "3"}, "which min_tokens='3' makes vLLM ignore", True),
        ({"probe_stop": True, "response_format": {"type": "json_object"}}, "the grammar of response_format", True),
        ({"probe_stop": True, "structured_outputs": {"regex": "a+"}}, "the grammar of structured_outputs", True),
        ({"probe_stop": True, "tool_choice": "required"}, "the grammar of tool_choice", True),
        ({"probe_stop": True, "tool_choice": {"type": "function"}}, "the grammar of tool_choice", True),
        ({"probe_stop": True, "use_beam_search": True}, "do not go with it", True),
        ({"probe_stop": True}, "needs the probes on the last pipeline stage", False),
    ],
)
def test_fields_that_cannot_be_used_are_refused(fields: dict[str, Any], message: str, can_stop: bool) -> None:
    served = Served(lambda body, served: pytest.fail("vLLM was asked"), can_stop=can_stop)
    status, headers, body = served.post({"prompt": "a"} | fields)
    error = json.loads(body)["error"]
    param = "use_beam_search" if "use_beam_search" in fields else next(iter(fields))
    assert status == 400 and headers[b"content-length"] == str(len(body)).encode()
    assert message in error.pop("message")
    assert error == {"type": "BadRequestError", "param": param, "code": 400}


@pytest.mark.parametrize("fields", [{"response_format": {"type": "text"}}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
def test_a_free_answer_can_be_stopped(fields: dict[str, Any]) -> None:
    served = Served(lambda body, served: reply({"error": 1}, status=400))
    served.post({"prompt": "a", "probe_stop": True} | fields)
    assert json.loads(served.bodies[0])["vllm_xargs"]["probe_stop"] == 1


def test_a_refusal_does_not_repeat_all_that_was_sent() -> None:
    _, _, body = Served(lambda body, served: []).post({"prompt": "a", "probe_scores": "x" * 100_000})
    assert len(body) < 500


class Layer:
    """As the server's other middlewares stand around an application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, *call: Any) -> None:
        await self.app(*call)


@pytest.mark.parametrize("key", [None, b"Bearer wrong", b"Bearer right"])
@pytest.mark.parametrize("fields", [{}, {"probe_stop": "no flag"}])
def test_who_has_no_key_is_refused_unread(key: bytes | None, fields: dict[str, Any]) -> None:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, -1.0, -1.0])
        return reply({"choices": [choice()]})

    served = Served(script)
    served.app = Layer(AuthenticationMiddleware(served.app, ["right"]))  # type: ignore[assignment,arg-type]
    headers = [JSON] if key is None else [JSON, (b"authorization", key)]
    status, _, body = served.post({"prompt": "a"} | fields, headers=headers)
    if key == b"Bearer right":
        assert status == 400 if fields else scored(body)[0]["probe_scores"]["p"] == [-1.0, -1.0, -1.0]
    else:
        assert (status, json.loads(body)) == (401, {"error": "Unauthorized"})
        assert served.n_read == 0


def test_the_check_of_keys_is_found_behind_vllms_own_layers() -> None:
    from fastapi import FastAPI
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    def allows(keys: list[str], authorization: bytes) -> bool:
        app = FastAPI()
        everything = ["*"]
        arguments = SimpleNamespace(
            allowed_origins=everything,
            allow_credentials=False,
            allowed_methods=everything,
            allowed_headers=everything,
            api_key=keys,
            enable_request_id_headers=True,
            middleware=["lmprobe_tl.vllm.server.ProbeMiddleware"],
        )
        init_entrypoints_middleware(arguments, app, ("generate",))  # type: ignore[arg-type]
        layer = app.build_middleware_stack()
        while not isinstance(layer, ProbeMiddleware):
            layer = layer.app  # type: ignore[attr-defined]
        return _compat.is_authorised(layer._app, {"headers": [(b"authorization", authorization)]})

    assert [allows(["right"], b"Bearer " + key) for key in (b"wrong", b"right")] == [False, True]
    assert allows([], b"Bearer wrong"), "where no key is asked for, all may come in"


@pytest.mark.parametrize(
    "body", [b'{"prompt": ', b"[1]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"prompt": 1' + b"1" * 5000 + b"}"]
)
def test_what_is_no_request_is_vllms_to_refuse(body: bytes) -> None:
    served = Served(lambda body, served: reply({"error": 1}, status=400))
    status, _, answer = served.post(body)
    assert (served.bodies, status, answer) == ([body], 400, b'{"error": 1}')


@pytest.mark.parametrize(
    "options", [{"path": "/v1/embeddings"}, {"method": "PUT"}, {"headers": [(b"content-type", b"text/plain")]}]
)
def test_other_requests_pass_byte_for_byte(options: dict[str, Any]) -> None:
    served = Served(lambda body, served: reply(b'{"choices":  [{"index": 0}]}'))
    _, headers, answer = served.post(b'{"probe_scores":  1}', **options)
    assert served.bodies == [b'{"probe_scores":  1}'] and answer == b'{"choices":  [{"index": 0}]}'
    assert headers[b"content-length"] == b"28"


@pytest.mark.parametrize(
    "messages",
    [
        reply(b'{"choices":  [{"index": 0}]}', status=500),
        reply(b'{"object":  "error"}'),
        reply(b'data: {"choices":  []}', kind=b"text/plain"),
        reply(b'data: {"error":  {}}\n\n: note\r\n\r\ndata: [DONE]\n\ndata: {"cut', kind=b"text/event-stream"),
    ],
)
def test_answers_without_choices_pass_byte_for_byte(messages: list[dict[str, Any]]) -> None:
    _, _, body = Served(lambda body, served: messages).post({"prompt": "a"})
    assert body == b"".join(message.get("body", b"") for message in messages)


def test_without_scores_the_answer_passes_byte_for_byte() -> None:
    served = Served(lambda body, served: reply(b'{"choices":  [{"index": 0}]}'))
    _, _, body = served.post({"prompt": "a", "probe_scores": False})
    assert body == b'{"choices":  [{"index": 0}]}' and json.loads(served.bodies[0]) == {"prompt": "a"}
    assert b"x-request-id" not in served.headers[0]


def events(body: bytes) -> list[Any]:
    found = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert found.pop() == b"[DONE]"
    return [json.loads(line) for line in found]


def stream_script(cuts: Sequence[int]) -> Callable[[bytes, Served], Any]:
    """Three chunks, whose bytes are cut anywhere; the scores of the last two positions come with the last."""
    chunks = [
        choice(finish_reason=None, token_ids=[7]),
        choice(finish_reason=None, token_ids=[8], prompt_token_ids=None),
        choice(finish_reason="length", token_ids=[9, 10], prompt_token_ids=None),
    ]
    data = b"".join(b"data: " + json.dumps({"choices": [one]}, ensure_ascii=False).encode() + b"\n\n" for one in chunks)
    last_chunk = len(data)
    data += b"data: [DONE]\n\n"

    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, -2.0, -3.0])
        yield {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
        }
        places = sorted({0, *(cut % len(data) for cut in cuts), len(data)})
        has_arrived = False
        for begin, end in itertools.pairwise(places):
            if end >= last_chunk and not has_arrived:
                served.arrive([-4.0, 5.0], start=3)
                has_arrived = True
            yield {"type": "http.response.body", "body": data[begin:end], "more_body": True}
        yield {"type": "http.response.body", "body": b"", "more_body": False}

    return script


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2000), max_size=12))
def test_streams_tell_what_is_new_wherever_they_are_cut(cuts: list[int]) -> None:
    _, _, body = Served(stream_script(cuts)).post({"prompt": "a", "stream": True})
    choices = [event["choices"][0] for event in events(body)]
    scores = [one["probe_scores"]["p"] for one in choices]
    assert [one for part in scores for one in part] == [-1.0, -2.0, -3.0, -4.0, 5.0]
    assert scores[0] == [-1.0, -2.0]
    assert [one["position"] for choice in choices for one in choice["probe_alarms"]] == [4]
    assert choices[-1]["probe_alarms"][0]["token_id"] == 9
    assert choices[-1]["probe_running"]["p"] == pytest.approx(1 / (1 + math.exp(-5.0)))
    assert all(one["token_ids"] is None and one["text"] == "é" for one in choices)


def test_a_chat_begins_with_a_chunk_that_has_no_tokens() -> None:
    """Scores are ahead of it, and then of the chunks that have tokens."""
    role = {"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}
    chunks = [
        {"choices": [role], "prompt_token_ids": [5, 6]},
        {"choices": [{"index": 0, "token_ids": [7], "finish_reason": None}]},
        {"choices": [{"index": 0, "token_ids": [8, 9, 10], "finish_reason": "length"}]},
    ]
    data = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"

    def script(body: bytes, served: Served) -> Any:
        served.arrive([-1.0, 2.0, -3.0, -4.0, -5.0], name="chat", of="")
        return reply(data, kind=b"text/event-stream")

    served = Served(script)
    _, headers, body = served.post({"messages": []}, path="/v1/chat/completions")
    assert b"content-length" not in headers
    found = [event["choices"][0] for event in events(body)]
    assert [score for one in found for score in one["probe_scores"]["p"]] == [-1.0, 2.0, -3.0, -4.0, -5.0]
    assert [len(one["probe_alarms"]) for one in found] == [1, 0, 0] and found[0]["probe_alarms"][0]["token_id"] == 6
    assert events(body)[0]["prompt_token_ids"] is None


def test_a_request_that_fails_is_forgotten() -> None:
    def script(body: bytes, served: Served) -> Any:
        assert len(served.inbox) == 1
        raise RuntimeError("the client is gone")

    served = Served(script)
    with pytest.raises(RuntimeError, match="the client is gone"):
        served.post({"prompt": "a"})
    assert len(served.inbox) == 0


def test_a_chunk_is_sent_as_soon_as_it_is_whole() -> None:
    served = Served(stream_script([]))
    served.post({"prompt": "a", "stream": True})
    assert [bool(message.get("more_body")) for message in served.sent[1:]] == [True, False]


def lifespan(middleware: ProbeMiddleware, state: Any) -> list[Any]:
    sent: list[Any] = []

    async def run() -> None:
        messages = [{"type": "lifespan.startup"}]

        async def receive() -> Any:
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await middleware({"type": "lifespan", "app": SimpleNamespace(state=state)}, receive, send)

    asyncio.run(run())
    return sent


def test_without_probes_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMPROBE_TL_PROBES", raising=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("vLLM's server was started")

    (message,) = lifespan(ProbeMiddleware(app), SimpleNamespace())
    assert message["type"] == "lifespan.startup.failed"
    assert "LMPROBE_TL_PROBES is not set" in message["message"] and "nothing is served" in message["message"]


def test_counters_follow_packets() -> None:
    from prometheus_client import REGISTRY

    def values() -> list[float | None]:
        names = [("lmprobe_tokens_scored_total", {}), ("lmprobe_tokens_unknown_total", {})]
        return [REGISTRY.get_sample_value(*name) for name in [*names, ("lmprobe_alarms_total", {"probe": "p"})]]

    metrics = ProbeMetrics(PLAN)
    before = values()
    for n_scored, n_unknown, n_crossed in [(5, 0, 0), (9, 2, 1), (9, 2, 1), (4, 0, 0)]:  # the last: probes loaded anew
        metrics(wire.Packet([], b"", b"", [], [], n_scored, n_unknown, [n_crossed]))
    assert [now - then for now, then in zip(values(), before, strict=True)] == [13, 2, 1]


def test_workers_that_did_not_answer_are_asked_again() -> None:
    answers: list[Any] = [TimeoutError("busy"), [1.0], [2.0]]

    class Slow:
        async def collective_rpc(self, method: str) -> list[bytes]:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return [wire.encode(wire.State(0, 0, 0, 0, 0, 0, answer))]

    async def ask() -> None:
        inbox = ScoreInbox(PLAN.n_columns)
        connection = ProbeConnection(Slow(), PLAN, inbox, True, END)
        try:
            with pytest.raises(TimeoutError):
                await connection.check_agreement()
            for _ in range(3):
                await connection.check_agreement()
        finally:
            await inbox.close()

    asyncio.run(ask())
    assert len(answers) == 1


def test_workers_that_disagree_are_not_asked_again() -> None:
    class Wrong:
        n_asked = 0

        async def collective_rpc(self, method: str) -> list[bytes]:
            self.n_asked += 1
            return [wire.encode(wire.State(0, 0, 0, 0, 0, 0, [score])) for score in (1.0, 2.0)]

    client = Wrong()

    async def ask() -> None:
        inbox = ScoreInbox(PLAN.n_columns)
        connection = ProbeConnection(client, PLAN, inbox, True, END)
        try:
            for _ in range(2):
                with pytest.raises(EngineError, match="workers disagree on the scores"):
                    await connection.check_agreement()
        finally:
            await inbox.close()

    asyncio.run(ask())
    assert client.n_asked == 1
