"""The demo model served in a process of its own, its probes, and what Hugging Face says of the same tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from lmprobe_tl import ProbeWeights
from lmprobe_tl.demo import MODEL_FOLDER

D_MODEL = 192
COMMAND = [sys.executable, "-c", "from lmprobe_tl.cli import main; main()"]
PATIENCE = 600  # seconds for a server on a busy machine
CHAT_TEMPLATE = "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
ENGINE = {
    "max_model_len": 256,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "max_num_seqs": 16,
    "dtype": "float32",
    "enforce_eager": True,
}


def make_probes() -> list[ProbeWeights]:
    generator = torch.Generator().manual_seed(0)

    def direction(width: int) -> torch.Tensor:
        return torch.randn(width, generator=generator) / width**0.5

    return [
        ProbeWeights.from_direction(direction(D_MODEL), 0.1, name="a", hook_points="blocks.2.hook_resid_post"),
        ProbeWeights.from_direction(
            direction(2 * D_MODEL), -0.2, name="b", hook_points=["blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"]
        ).with_inference_pooling("score:ema_max(0.3)"),
    ]


class Reference:
    """Logits of `make_probes` by Hugging Face, from its hidden states."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
        self._probes = make_probes()

    def logits(self, token_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Of all tokens but the last, by probe."""
        with torch.no_grad():
            states = self._model(torch.tensor([token_ids[:-1]]), output_hidden_states=True).hidden_states
        a, b = self._probes
        return {"a": a.logits(states[3][0]), "b": b.logits(torch.cat([states[0][0], states[4][0]], dim=-1))}


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return inherited | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **more,
    }


class Server:
    """`lmprobe-tl serve` of the demo model on a free port."""

    def __init__(self, folder: Path) -> None:
        template = folder / "chat.jinja"
        template.write_text(CHAT_TEMPLATE)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = [
            "--served-model-name",
            "demo",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--chat-template",
            str(template),
        ]
        for name, value in ENGINE.items():
            options += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        probes = []
        for weights in make_probes():
            weights.save(folder / f"{weights.name}.safetensors")
            probes += ["--probe", str(folder / f"{weights.name}.safetensors")]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "serve", "--model", str(MODEL_FOLDER), *probes, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(VLLM_SERVER_DEV_MODE="1"),  # for collective_rpc over HTTP
            )
        self._await()

    def _await(self) -> None:
        begin = time.monotonic()
        while time.monotonic() - begin < PATIENCE:
            if self._process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        self.close()
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=PATIENCE, **given, **options)

    def metric(self, start: str) -> float:
        """The sum of the lines of /metrics that start so."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(start)]
        assert found, f"no metric {start}"
        return sum(found)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
