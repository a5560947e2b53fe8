"""Memory of a worker over many requests of the embedded model: its resident set, and what it holds of requests.

Run it by `python -m benchmarks.vllm_memory` in the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-memory-cpu.json")
    options = parser.parse_args(arguments)
    from vllm import SamplingParams

    from lmprobe_tl.vllm import ProbedLLM
    from lmprobe_tl.vllm.wire import State, decode

    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    weights = ProbeWeights.from_direction(direction, name="any", hook_points="blocks.3.hook_resid_post")
    rng, rows = random.Random(0), list[dict[str, Any]]()
    settings: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 2**26}
    with ProbedLLM(MODEL_FOLDER, probes=weights, block_size=32, **settings) as engine:
        for done in range(0, options.requests, AT_ONCE):
            prompts = [
                {"prompt_token_ids": [0, *(rng.randrange(2, 2000) for _ in range(rng.randint(4, 60)))]}
                for _ in range(AT_ONCE)
            ]
            outputs = engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
            if any(output.n_unknown for output in outputs):
                raise RuntimeError("a token has no score")
            state = decode(engine.llm.collective_rpc("lmprobe_state")[0], State)
            held = {"open": state.n_open, "finished": state.n_finished, "pages": state.n_pages}
            rows.append({"requests": done + AT_ONCE, "resident_mib": status_mib("VmRSS"), **held})
            print(rows[-1], flush=True)
    result = {"device": device_name("cpu"), "tokens_scored": state.n_scored, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {options.out}")


if __name__ == "__main__":
    main()
