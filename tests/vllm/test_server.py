"""vLLM's OpenAI server with probes, in a process of its own, on the demo model."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served_model import PATIENCE, Reference, Server, environment, make_probes

from lmprobe_tl import ProbeWeights
from lmprobe_tl.cli import main
from lmprobe_tl.demo import MODEL_FOLDER
from lmprobe_tl.vllm import wire
from lmprobe_tl.vllm.structure import PROBES_VARIABLE, WORKER_CLASS, Structure

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CLOSE = 1e-4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def ask(**fields: Any) -> dict[str, Any]:
    """A request of some tokens, whose answer tells the ids of all."""
    return {"model": "demo", "max_tokens": 12, "temperature": 0, "return_token_ids": True} | fields


def check(reference: Reference, choice: dict[str, Any], prompt: list[int] | None = None) -> int:
    """That a whole choice has the scores of all its positions. Returns how many these are."""
    token_ids = [*(choice.get("prompt_token_ids") or prompt or ()), *choice["token_ids"]]
    for name, expected in reference.logits(token_ids).items():
        found = choice["probe_scores"][name]
        assert len(found) == len(token_ids) - 1
        assert (torch.tensor(found) - expected).abs().max() < CLOSE
    assert choice["probe_unknown"] == 0
    assert choice["probe_running"]["a"] == pytest.approx(1 / (1 + math.exp(-choice["probe_scores"]["a"][-1])), abs=1e-5)
    for alarm in choice["probe_alarms"]:
        assert alarm["token_id"] == token_ids[alarm["position"]] and alarm["score"] >= alarm["threshold"] == 0.5
    first = next((at for at, one in enumerate(choice["probe_scores"]["a"]) if one >= 0 and at > 0), None)
    assert [one["position"] for one in choice["probe_alarms"] if one["probe"] == "a"] == ([] if first is None else [first])
    return len(token_ids) - 1


def joined(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, as those of a whole answer."""
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["prompt_token_ids"] = choice.get("prompt_token_ids") or chunk.get("prompt_token_ids")
            choice["token_ids"] = choice.get("token_ids") or []
            before = whole.setdefault(choice["index"], choice)
            if before is choice:
                continue
            before["token_ids"] += choice["token_ids"]
            before["probe_alarms"] += choice["probe_alarms"]
            for name, scores in choice["probe_scores"].items():
                before["probe_scores"][name] += scores
            before |= {
                name: choice[name] for name in ("probe_running", "probe_stopped_by", "probe_unknown", "finish_reason")
            }
    return whole


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    chunks = []
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: ")))
    assert line == "" or line == "data: [DONE]"
    return chunks


def client_of(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=64))


def test_many_clients_at_once_each_get_their_own_scores(server: Server, reference: Reference) -> None:
    scored = server.metric("lmprobe_tokens_scored_total")

    async def one(client: httpx.AsyncClient, index: int) -> dict[str, Any]:
        prompt = f"def function_{index}(a, b):\n" + "    a = b\n" * (index % 7)
        body = ask(prompt=prompt, max_tokens=3 + index, temperature=1, seed=index)
        if index % 2:
            (choice,) = joined(await stream(client, COMPLETIONS, body)).values()
            return choice
        answer = await client.post(COMPLETIONS, json=body)
        return answer.json()["choices"][0]

    async def every() -> list[dict[str, Any]]:
        async with client_of(server) as client:
            return await asyncio.gather(*[one(client, index) for index in range(32)])

    n_positions = sum(check(reference, choice) for choice in asyncio.run(every()))
    assert n_positions > 500
    assert server.metric("lmprobe_tokens_scored_total") >= scored + n_positions
    assert server.metric("lmprobe_tokens_unknown_total") == 0
    assert server.metric('lmprobe_alarms_total{probe="a"}') > 0


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("streams", [False, True])
def test_several_completions(server: Server, reference: Reference, path: str, streams: bool) -> None:
    what = {"messages": [{"role": "user", "content": "import"}]} if path == CHAT else {"prompt": ["def f(x):", "class A"]}
    body = ask(n=2, temperature=1.5, seed=4, **what)

    async def run() -> tuple[list[Any], Any]:
        async with client_of(server) as client:
            if streams:
                return list(joined(await stream(client, path, body)).values()), None
            answer = (await client.post(path, json=body)).json()
            return answer["choices"], answer.get("prompt_token_ids")

    choices, prompt = asyncio.run(run())
    assert sorted(choice["index"] for choice in choices) == ([0, 1] if path == CHAT else [0, 1, 2, 3])
    prompts = [choice["prompt_token_ids"] for choice in choices if choice.get("prompt_token_ids")]
    for choice in choices:
        check(reference, choice, prompt or prompts[0])
    assert choices[0]["token_ids"] != choices[1]["token_ids"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_rest_of_the_answer_is_vllms(server: Server, path: str) -> None:
    what = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "def f(x):"}
    body = {"model": "demo", "max_tokens": 3, "temperature": 0} | what
    with_scores, without = (server.post(path, body | {"probe_scores": wanted}).json() for wanted in (True, False))
    for choice in with_scores["choices"]:
        added = {name for name in choice if name.startswith("probe_")}
        assert added == {"probe_scores", "probe_running", "probe_alarms", "probe_stopped_by", "probe_unknown"}
        for name in added:
            del choice[name]
    for answer in (with_scores, without):
        del answer["id"], answer["created"]
    assert with_scores == without


@pytest.mark.parametrize("streams", [False, True])
def test_an_alarm_stops_it(server: Server, streams: bool) -> None:
    body = ask(prompt="def f(a):", probe_stop=True)

    async def run() -> dict[str, Any]:
        async with client_of(server) as client:
            if streams:
                return joined(await stream(client, COMPLETIONS, body))[0]
            return (await client.post(COMPLETIONS, json=body)).json()["choices"][0]

    free = server.post(COMPLETIONS, ask(prompt="def f(a):")).json()["choices"][0]
    choice = asyncio.run(run())
    n_prompt = len(free["prompt_token_ids"])
    first = free["probe_alarms"][0]
    assert free["probe_stopped_by"] is None and len(free["token_ids"]) == 12
    assert choice["probe_stopped_by"] == first["probe"] and choice["finish_reason"] == "stop"
    assert len(choice["token_ids"]) == max(1, first["position"] - n_prompt + 2)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_alarm_stops_it_with_log_probabilities(server: Server, path: str) -> None:
    if path == CHAT:
        what = {"messages": [{"role": "user", "content": "def f(a):"}], "logprobs": True, "top_logprobs": 1}
    else:
        what = {"prompt": "def f(a):", "logprobs": 1}
    choice = server.post(path, ask(probe_stop=True, **what)).json()["choices"][0]
    assert choice["probe_stopped_by"] is not None and choice["finish_reason"] == "stop"
    logprobs = choice["logprobs"]
    told = [one["token"] for one in logprobs["content"]] if path == CHAT else logprobs["tokens"]
    assert len(told) == len(choice["token_ids"]) and told[-1] == "<|eos|>"


def test_malformed_requests_leave_the_server_alive(server: Server, reference: Reference) -> None:
    bad: list[tuple[Any, int]] = [
        (b'{"model": "demo", "prompt', 400),
        (b"[]", 400),
        (b"\xff", 400),
        (ask(prompt="x", probe_scores="yes"), 400),
        (ask(prompt="x", probe_stop=[]), 400),
        (ask(prompt="x", probe_stop=True, ignore_eos=True), 400),
        (ask(prompt="x", n="many"), 400),
        (ask(prompt={"a": 1}), 400),
        (ask(prompt="x", vllm_xargs=[1]), 400),
        (ask(prompt="def " * 1000), 400),
        (ask(prompt="x", model="another"), 404),
    ]
    for body, status in bad:
        answer = server.post(COMPLETIONS, body)
        assert answer.status_code == status, (body, answer.text)
        assert body == b"\xff" or answer.json()["error"]["message"]  # FastAPI refuses what is no text in a form of its own
    check(reference, server.post(COMPLETIONS, ask(prompt="def f(x):")).json()["choices"][0])


def worker_state(server: Server) -> wire.State:
    (answer,) = server.post("/collective_rpc", {"method": "lmprobe_state"}).json()["results"]
    return wire.decode(ast.literal_eval(answer), wire.State)


def test_a_client_that_leaves_frees_its_state(server: Server, reference: Reference) -> None:
    n_done = server.metric("vllm:request_success_total")

    async def leave() -> None:
        async with (
            client_of(server) as client,
            client.stream(
                "POST", COMPLETIONS, json=ask(prompt="import", max_tokens=240, ignore_eos=True, stream=True)
            ) as answer,
        ):
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    return

    asyncio.run(leave())
    begin = time.monotonic()
    while (state := worker_state(server)).n_open and time.monotonic() - begin < PATIENCE:
        time.sleep(0.1)
    assert (state.n_open, state.n_finished, state.n_pages) == (0, 0, 0)
    assert server.metric("vllm:request_success_total") == n_done, "it was generated to its end"
    check(reference, server.post(COMPLETIONS, ask(prompt="import")).json()["choices"][0])


def test_the_example_runs(server: Server) -> None:
    example = Path(__file__).parents[2] / "examples" / "vllm_client.py"
    command = [sys.executable, str(example), f"{server.url}/v1", "def f(a):"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "a at position 2" in done.stdout and "stopped by a" in done.stdout


@pytest.fixture
def run_serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command in this process, for arguments with which it must not get as far as vLLM."""
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("the server was started"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` puts its own in place

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lmprobe-tl", "serve", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr().err

    return call


def probe_of(name: str, d_model: int, hook: str, folder: Path) -> str:
    path = folder / f"{name}.safetensors"
    ProbeWeights.from_direction(torch.ones(d_model), 0.0, name=name, hook_points=hook).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("d_model", "hook", "message"),
    [
        (64, "blocks.2.hook_resid_post", "is for a model with d_model 64 .* but the served model has 192 and 6"),
        (192, "blocks.6.hook_resid_post", "beyond the 6 layers of the served model"),
        (192, "blocks.2.hook_resid_mid", "cannot be read in vLLM"),
    ],
)
def test_probes_of_another_model_are_refused_at_once(
    run_serve: Callable[..., tuple[int, str]], d_model: int, hook: str, message: str, tmp_path: Path
) -> None:
    status, error = run_serve("--model", str(MODEL_FOLDER), "--probe", probe_of("p", d_model, hook, tmp_path))
    assert status == 2
    assert re.search(message, error), error


def test_bad_arguments_are_refused_at_once(run_serve: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    good = probe_of("p", 192, "blocks.2.hook_resid_post", tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no probe")
    model = ["--model", str(MODEL_FOLDER)]
    for arguments, message in [
        (["--probe", str(broken)], "broken.safetensors"),
        (["--probe", str(tmp_path / "none.safetensors")], "none.safetensors"),
        (["--probe", good, "--worker-cls", "x.Y"], "--worker-cls is given, but with probes the worker class is fixed"),
        (["--probe", good, "--api_server_count=2"], "--api-server-count is given"),
        (["--probe", good, "-asc", "2"], "--api-server-count is given"),
        (["--probe", good, "--api-server-c", "2"], "--api-server-count is given"),
        (["--probe", good, "--worker-c", "x.Y"], "--worker-cls is given"),
        (["--probe", good, "--additional-c", "[1]"], "--additional-config is '[1]'; expected a JSON object"),
        (["--probe", good, "--additional-config", "[1]"], "--additional-config is '[1]'; expected a JSON object"),
        (["--probe", good, "--additional-config.a", "1"], "--additional-config.a is given"),
    ]:
        status, error = run_serve(*model, *arguments)
        assert status == 2 and message in error, error


def test_probes_that_do_not_load_stop_the_server(tmp_path: Path) -> None:
    """The engine is started for other probes than those that the server is to load."""
    from lmprobe_tl.live.scoring_plan import ScoringPlan

    config = json.dumps(Structure.of(ScoringPlan(make_probes())).to_config())
    other = probe_of("other", 192, "blocks.4.hook_resid_post", tmp_path)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL_FOLDER), "--worker-cls"]
    command += [WORKER_CLASS, "--additional-config", config, "--middleware", "lmprobe_tl.vllm.server.ProbeMiddleware"]
    command += ["--max-model-len", "256", "--num-gpu-blocks-override", "64", "--enforce-eager", "--port", "0"]
    given = environment(**{PROBES_VARIABLE: json.dumps([other])})
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=PATIENCE, check=False)
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "nothing is served" in told and "'blocks.4.hook_resid_post', but this engine was compiled for" in told
