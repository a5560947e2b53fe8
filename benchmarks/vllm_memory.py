"""Memory of a worker over many requests of the embedded model: its resident set, and what it holds of requests.

Run it by `python -m benchmarks.vllm_memory` in the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from benchmarks.common import RESULTS, device_name
from benchmarks.extraction_memory import status_mib
from lmprobe_tl import ProbeWeights
from lmprobe_tl.demo import MODEL_FOLDER

D_MODEL = 192
AT_ONCE = 500  # requests a call


def grown(engine_name: str, n_requests: int) -> list[dict[str, Any]]:
    """Every `AT_ONCE` requests: resident MiB, and the requests and pages of scores that the worker holds."""
    from vllm import LLM, SamplingParams

    from lmprobe_tl.vllm import ProbedLLM
    from lmprobe_tl.vllm.wire import State, decode

    settings: dict[str, Any] = {
        "max_model_len": 256,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**26,
        "block_size": 32,
    }
    if engine_name == "plain":
        engine: Any = LLM(str(MODEL_FOLDER), **settings)
    else:
        direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
        weights = ProbeWeights.from_direction(direction, name="any", hook_points="blocks.3.hook_resid_post")
        engine = ProbedLLM(MODEL_FOLDER, probes=weights, **settings)
    rng, rows = random.Random(0), list[dict[str, Any]]()
    for done in range(AT_ONCE, n_requests + 1, AT_ONCE):
        prompts = [
            {"prompt_token_ids": [0, *(rng.randrange(2, 2000) for _ in range(rng.randint(4, 60)))]} for _ in range(AT_ONCE)
        ]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        row = {"engine": engine_name, "requests": done, "resident_mib": status_mib("VmRSS")}
        if engine_name != "plain":
            if any(output.n_unknown for output in outputs):
                raise RuntimeError("a token has no score")
            state = decode(engine.llm.collective_rpc("lmprobe_state")[0], State)
            row |= {"open": state.n_open, "finished": state.n_finished, "pages": state.n_pages, "scored": state.n_scored}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--engine", choices=["plain", "one probe"], help="by default both, each in a process of its own")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-memory-cpu.json")
    options = parser.parse_args(arguments)
    if options.engine:
        grown(options.engine, options.requests)
        return
    rows = []
    for name in ("plain", "one probe"):
        command = [sys.executable, "-m", "benchmarks.vllm_memory", "--engine", name, "--requests", str(options.requests)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]
        print(rows[-1], flush=True)
    options.out.write_text(json.dumps({"device": device_name("cpu"), "rows": rows}, indent=1) + "\n")
    print(f"kept in {options.out}")


if __name__ == "__main__":
    main()
