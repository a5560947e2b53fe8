"""What an engine's dtype does to scores: the same texts of the embedded model's task by engines of vLLM in several dtypes.

Run it by `python -m benchmarks.vllm_precision` in the environment that `make test-vllm` makes. Each dtype is compared with
float32, and with itself run otherwise: few requests at once, whose prompts are cut in chunks; and compiled.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

from benchmarks.common import RESULTS, device_name
from benchmarks.texts import ragged_texts
from lmprobe_tl import ProbeWeights
from lmprobe_tl.calibration import calibrate_threshold
from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model

NAME = "scored"
DTYPES = ("float32", "float16", "bfloat16")
PLAIN: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 32, "max_num_batched_tokens": 2048}
OTHERWISE: dict[str, dict[str, Any]] = {
    "few at once": {"enforce_eager": True, "max_num_seqs": 3, "max_num_batched_tokens": 64},
    "compiled": PLAIN | {"enforce_eager": False},
}
FPR = 0.05


@dataclass(frozen=True)
class Scored:
    """logits: of all tokens, in order of texts; maxima: the running maximum of each text, as a logit."""

    logits: np.ndarray
    maxima: np.ndarray


@dataclass(frozen=True)
class Moved:
    """How far numbers move: median, 99th percentile and maximum of the differences."""

    median: float
    p99: float
    most: float

    @staticmethod
    def between(one: np.ndarray, other: np.ndarray) -> Moved:
        apart = np.abs(one - other)
        return Moved(float(np.median(apart)), float(np.quantile(apart, 0.99)), float(apart.max()))


@dataclass(frozen=True)
class Row:
    """alarms_changed: of n_texts, those that have an alarm in one of the two alone, at a threshold that `against` reaches in
    one text of twenty."""

    engine: str
    against: str
    token_logit: Moved
    token_probability: Moved
    maximum_logit: Moved
    maximum_probability: Moved
    alarms_changed: int
    n_texts: int
    n_tokens: int


def task_probe(model: Any) -> ProbeWeights:
    """Of the demo's task, with the maximum as its live score."""
    from lmprobe_tl.demo.main_job import fit_probe, load_task

    fitted = fit_probe(model, load_task(model.tokenizer).train).to_weights()
    return fitted.renamed(NAME).with_inference_pooling("score:max")


def scored(probe: ProbeWeights, rows: Sequence[Sequence[int]], dtype: str, options: dict[str, Any]) -> Scored:
    from vllm import SamplingParams

    from lmprobe_tl.vllm import ProbedLLM

    settings: dict[str, Any] = {"max_model_len": 256, "block_size": 32, "kv_cache_memory_bytes": 2**26, "seed": 0}
    settings |= {"enable_prefix_caching": False} | options
    with ProbedLLM(MODEL_FOLDER, probes=probe, dtype=dtype, **settings) as engine:
        prompts = [{"prompt_token_ids": list(row)} for row in rows]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
        logits = np.concatenate([output.probe_scores[NAME].numpy() for output in outputs])
        maxima = engine.sequence_maxima(rows, NAME, "logit", progress=False).numpy()
    return Scored(logits.astype(np.float64), maxima.astype(np.float64))


def compared(engine: str, against: str, found: Scored, reference: Scored) -> Row:
    limit = calibrate_threshold(reference.maxima, FPR, method="empirical").value
    changed = (found.maxima >= limit) != (reference.maxima >= limit)
    return Row(
        engine,
        against,
        Moved.between(found.logits, reference.logits),
        Moved.between(_probability(found.logits), _probability(reference.logits)),
        Moved.between(found.maxima, reference.maxima),
        Moved.between(_probability(found.maxima), _probability(reference.maxima)),
        int(changed.sum()),
        len(found.maxima),
        len(found.logits),
    )


def _probability(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def measure(n_texts: int, dtypes: Sequence[str]) -> list[Row]:
    model = load_demo_model()
    probe = task_probe(model)
    texts = ragged_texts(model.tokenizer, n_texts, longest=200)
    rows = [[model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    plain = {dtype: scored(probe, rows, dtype, PLAIN) for dtype in dtypes}
    found = [compared(dtype, "float32", plain[dtype], plain["float32"]) for dtype in dtypes if dtype != "float32"]
    for how, options in OTHERWISE.items():
        for dtype in dtypes:
            found.append(compared(f"{dtype}, {how}", dtype, scored(probe, rows, dtype, options), plain[dtype]))
    return found


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| engine | against | token logit | token probability | maximum, logit | maximum, probability | alarms changed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = (row.token_logit, row.token_probability, row.maximum_logit, row.maximum_probability)
        told = " | ".join(f"{one.median:.1e} / {one.p99:.1e} / {one.most:.1e}" for one in parts)
        lines.append(f"| {row.engine} | {row.against} | {told} | {row.alarms_changed} of {row.n_texts} |")
    return "\n".join([*lines, "", "differences: median / 99th percentile / maximum"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-precision-cpu.json")
    options = parser.parse_args(arguments)
    rows = measure(options.texts, list(dict.fromkeys(["float32", *options.dtypes])))
    import torch
    import vllm

    print(markdown(rows))
    result = {"device": device_name("cpu"), "torch": torch.__version__, "vllm": vllm.__version__}
    options.out.write_text(json.dumps(result | {"rows": list(map(asdict, rows))}, indent=1) + "\n")
    print(f"kept in {options.out}")


if __name__ == "__main__":
    main()
