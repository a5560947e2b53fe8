"""Engines in processes of their own: two tensor ranks, and vLLM's second model runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from reference import Reference

HERE = Path(__file__).parent
TIGHT = {"num_gpu_blocks_override": 10, "max_num_batched_tokens": 48, "disable_log_stats": False}


SECOND_RUNNER = {
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE / "forced_triton"), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def checked(reference: Reference, options: dict[str, Any], kind: str = "scores", **environment: str) -> dict[str, Any]:
    """What `engine_process.py` says of an engine with these options."""
    code = [sys.executable, str(HERE / "engine_process.py"), kind, reference.name, str(reference.folder)]
    done = subprocess.run(
        [*code, json.dumps(SMALL | options)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,  # importing vLLM in three processes, one after another, is slow on a busy machine
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_two_tensor_ranks_in_processes(llama: Reference) -> None:
    found = checked(llama, TIGHT | {"tensor_parallel_size": 2}, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert found["held"] == [[0, 0, 0], [0, 0, 0]]
    assert found["cached"] > 0 and found["preempted"] > 0 and found["stopped"] > 0


def test_the_second_model_runner(llama: Reference) -> None:
    found = checked(llama, TIGHT, **SECOND_RUNNER)
    assert found["second_runner"] is True
    assert found["held"] == [[0, 0, 0]]
    assert found["cached"] > 0 and found["preempted"] > 0 and found["stopped"] > 0


@pytest.mark.parametrize("way", ["two ranks", "second runner"])
def test_activations_of_chunks(llama: Reference, way: str) -> None:
    options, environment = TIGHT | {"max_num_batched_tokens": 24, "enforce_eager": True}, SECOND_RUNNER
    if way == "two ranks":
        options, environment = options | {"tensor_parallel_size": 2}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = checked(llama, options, "activations", **environment)
    assert found["second_runner"] is (way == "second runner")
    assert found["rows"] == [*range(6)] * 2
