"""Peak memory of one extraction in a process of its own: `measured(...)` starts it, `python -m` is what it runs.

The peak is the largest resident set while extracting, less the resident set just before, when the model is loaded and a few
prompts have been extracted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Memory:
    """MiB above the loaded model while extracting, `results_mib` of it for the values handed back (0 for a store)."""

    what: str
    n_prompts: int
    layers: str
    peak_mib: float
    results_mib: float
    seconds: float


def measured(what: str, n_prompts: int, layers: str, texts: Sequence[str]) -> Memory:
    """what: 'extract_to_store' or 'extract_activations'; layers: 'last' or 'all'; texts: repeated, each time numbered."""
    request = json.dumps({"what": what, "n_prompts": n_prompts, "layers": layers, "texts": list(texts)})
    command = [sys.executable, "-m", "benchmarks.extraction_memory"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed:\n{done.stderr}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def status_mib(key: str) -> float:
    """VmRSS (resident now) or VmHWM (its largest since `forget_peak`)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def main() -> None:
    import time

    from benchmarks.texts import NumberedTexts
    from lmprobe_tl import extract_activations, extract_to_store
    from lmprobe_tl.demo import load_demo_model

    request: dict[str, Any] = json.load(sys.stdin)
    what, n_prompts, layers, texts = (request[key] for key in ("what", "n_prompts", "layers", "texts"))
    model, hook_points = load_demo_model(), -1 if layers == "last" else "all"
    extract_activations(model, texts[:8], hook_points, "mean", progress=False)
    prompts = NumberedTexts(texts, n_prompts)
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()
        before, start, results = status_mib("VmRSS"), time.perf_counter(), 0.0
        if what == "extract_to_store":
            extract_to_store(model, prompts, Path(folder) / "store", hook_points, "mean", progress=False)
        else:
            kept = extract_activations(model, prompts, hook_points, "mean", progress=False)
            results = sum(values.nbytes for values in kept.values.values()) / 2**20
        took, peak = time.perf_counter() - start, status_mib("VmHWM") - before
    print(json.dumps(vars(Memory(what, n_prompts, layers, peak, results, took))))


if __name__ == "__main__":
    main()
