"""What probes cost inside vLLM: decode steps of engines with and without them, taken in turns in one process.

Run it by `make bench-vllm`. All engines serve the same random GPT-2 small (124 M parameters) and decode the same requests.
In each round every engine makes one step, in an order drawn anew, compared with the plain engine's step of that round.
The interval is a 95 % bootstrap over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from benchmarks.common import RESULTS, device_name, paired, save_for_hugging_face
from lmprobe_tl import ProbeWeights

LAYERS, WIDTH = 12, 768
WARM_UP = 8  # steps


@dataclass(frozen=True)
class Row:
    """Against the plain engine: `ms` is its median step; ratio as in `common.Paired`; more_ms: median difference of a pair.
    target: of the ratio, at most."""

    engine: str
    batch: int
    ms: float
    more_ms: float
    ratio: float
    low: float
    high: float
    quartiles: tuple[float, float]
    n_pairs: int
    target: float | None


def probes_at(hook_names: Sequence[str]) -> list[ProbeWeights]:
    torch.manual_seed(0)
    return [
        ProbeWeights.from_direction(torch.randn(WIDTH) / WIDTH, name=f"probe {at}", hook_points=name).with_inference_pooling(
            "score:ema_max(0.1)"
        )
        for at, name in enumerate(hook_names)
    ]


def engines(folder: Path, batch: int) -> dict[str, Any]:
    """`vllm.LLM` by name; 'plain' has no probes."""
    from vllm import LLM

    from lmprobe_tl.vllm import ProbedLLM

    device = "cpu" if not torch.cuda.is_available() else "cuda"
    common: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": batch, "dtype": "float32", "seed": 0}
    common |= {"kv_cache_memory_bytes": 2**30} if device == "cpu" else {"gpu_memory_utilization": 0.15}
    middle = f"blocks.{LAYERS // 2}.hook_resid_post"
    every = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
    return {
        # How far two engines that are the same differ: from nothing to four per cent, from one run to the next.
        "plain, the first one": LLM(str(folder), **common),
        "plain": LLM(str(folder), **common),
        "1 probe": ProbedLLM(folder, probes=probes_at([middle]), **common).llm,
        "100 probes": ProbedLLM(folder, probes=probes_at([middle] * 100), **common).llm,
        "1 probe on every layer": ProbedLLM(folder, probes=probes_at(every), **common).llm,
        "activations shipped": LLM(
            str(folder), worker_cls="benchmarks.vllm_shipping.ShippingWorker", enforce_eager=True, **common
        ),
    }


def begin(llm: Any, batch: int, n_tokens: int) -> None:
    """`batch` requests, decoding."""
    from vllm import SamplingParams

    rng = random.Random(0)
    params = SamplingParams(max_tokens=n_tokens, ignore_eos=True, temperature=0)
    for at in range(batch):
        prompt = {"prompt_token_ids": [rng.randrange(2, 4000) for _ in range(rng.randint(8, 40))]}
        llm.llm_engine.add_request(str(at), prompt, params)
    for _ in range(WARM_UP):
        llm.llm_engine.step()


def timed_step(name: str, llm: Any) -> float:
    start = time.perf_counter()
    llm.llm_engine.step()
    if name == "activations shipped":
        llm.collective_rpc("take_shipped")
    return time.perf_counter() - start


def measure(folder: Path, batch: int, rounds: int) -> list[Row]:
    rng = random.Random(1)
    running = engines(folder, batch)
    for llm in running.values():
        begin(llm, batch, rounds + 2 * WARM_UP)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in running if name != "plain"}
    for _ in range(rounds):
        times = {name: timed_step(name, running[name]) for name in rng.sample(list(running), len(running))}
        for name, found in pairs.items():
            found.append((times["plain"], times[name]))
    rows = []
    targets = {"1 probe": 1.02, "100 probes": 1.03} if batch == 32 else {}
    for name, found in pairs.items():
        more = 1000 * sorted(one - plain for plain, one in found)[len(found) // 2]
        rows.append(Row(name, batch, more_ms=more, target=targets.get(name), **vars(paired(found))))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| engine | batch | plain step, ms | ratio [95 %] | more, ms | target | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target, ratio = row.target or "", f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]"
        lines.append(
            f"| {row.engine} | {row.batch} | {row.ms:.1f} | {ratio} | {row.more_ms:.2f} | {target} | {row.n_pairs} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--batch", type=int, default=32, help="requests that decode at once")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=None, help="by default vllm-DEVICE-BATCH.json in the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(save_for_hugging_face("gpt2-small", Path(temporary) / "gpt2-small"), options.batch, options.rounds)
    import vllm

    print(markdown(rows))
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    out = options.out or RESULTS / f"vllm-{kind}-{options.batch}.json"
    result = {
        "device": device_name("cpu" if kind == "cpu" else "cuda"),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }
    out.write_text(json.dumps(result | {"rows": list(map(asdict, rows))}, indent=1) + "\n")
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
