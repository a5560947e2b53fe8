"""What the measurements share: models, clocks, and ratios of neighbouring pairs with their intervals."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model

RESULTS = Path(__file__).parent / "results"


def gpt2_small_weights() -> Any:
    """Hugging Face's GPT-2 small with random weights: 12 layers, d_model 768, 50,257 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50257, bos_token_id=0, eos_token_id=1)).eval()


def gpt2_small() -> Any:
    """The same for TransformerLens, with the embedded model's tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = load_demo_model().tokenizer
    return TransformerBridge.boot_transformers("gpt2", hf_model=gpt2_small_weights(), tokenizer=tokenizer, device="cpu")


def save_for_hugging_face(name: str, folder: Path) -> Path:
    """A folder with the model of that name for programs that load it themselves."""
    if name == "demo":
        return MODEL_FOLDER
    gpt2_small_weights().save_pretrained(folder)
    for file in MODEL_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


MODELS: dict[str, Callable[[], Any]] = {"demo": load_demo_model, "gpt2-small": gpt2_small}


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Paired:
    """Pairs (reference, measured) of seconds in short. ms: median of the reference; ratio: measured / reference, median, its
    95 % bootstrap interval over pairs, and the quartiles of single pairs."""

    ms: float
    ratio: float
    low: float
    high: float
    quartiles: tuple[float, float]
    n_pairs: int


def paired(pairs: Sequence[tuple[float, float]]) -> Paired:
    ratios = np.array([measured / reference for reference, measured in pairs])
    resampled = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    first, third = np.quantile(ratios, [0.25, 0.75])
    ms = 1000 * statistics.median(reference for reference, _ in pairs)
    return Paired(ms, float(np.median(ratios)), float(low), float(high), (float(first), float(third)), len(ratios))


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    found = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{(found or [platform.processor()])[0].strip()}, {torch.get_num_threads()} threads"
