"""lmprobe at work in a process of its own: JSON requests line by line on stdin, an answer to each on stdout.

It imports nothing of this package. The first request is {"folder", "layer", "pooling", "texts"}: it loads the model and
finds the batch size that is fastest on half of these texts. Each later one is {"how", "texts"}, where `how` is a key of
`WAYS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import lmprobe
import torch
from lmprobe import UnifiedCache
from lmprobe.cache import CachedExtractor, clear_cache
from lmprobe.extraction import ActivationExtractor
from lmprobe.pooling import get_pooling_fn

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # 8 is its default; without sorting by length, small ones may win


class Work:
    def __init__(self, folder: str, layer: int, pooling: str) -> None:
        self._options: dict[str, Any] = {"layers": layer, "device": "cpu", "batch_size": 8}
        self._unified = UnifiedCache(folder, compute_perplexity=False, pooling=pooling, **self._options)
        self._extractor = ActivationExtractor(folder, dtype=torch.float32, **self._options)
        self._pool, self._layer = get_pooling_fn(pooling), layer

    def set_batch_size(self, size: int) -> None:
        self._unified.batch_size = self._extractor.batch_size = size

    def unified(self, texts: list[str]) -> torch.Tensor:
        return self._unified.get_activations(texts)[0]

    def probe(self, texts: list[str]) -> torch.Tensor:
        """What `Probe.fit` does with its prompts."""
        return self._pool(*CachedExtractor(self._extractor).extract(texts))

    def uncached(self, texts: list[str]) -> torch.Tensor:
        """Its forward pass and its pooling, without its cache."""
        size = self._extractor.batch_size
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        return torch.cat([self._pool(*self._extractor.extract_batch(part, [self._layer])) for part in parts])


WAYS = {
    "UnifiedCache, cold": (Work.unified, True),
    "UnifiedCache, cached": (Work.unified, False),
    "Probe's cache, cold": (Work.probe, True),
    "without its cache": (Work.uncached, True),
}


def timed(work: Work, how: str, texts: list[str]) -> tuple[float, torch.Tensor]:
    function, is_cold = WAYS[how]
    clear_cache()
    if not is_cold:
        function(work, texts)
    start = time.perf_counter()
    found = function(work, texts)
    return time.perf_counter() - start, found


def fastest_batch_size(work: Work, texts: list[str]) -> int:
    sizes = [size for size in BATCH_SIZES if size <= len(texts)]
    best: dict[int, float] = {}
    for _ in range(2):
        for size in sizes:
            work.set_batch_size(size)
            best[size] = min(best.get(size, float("inf")), timed(work, "UnifiedCache, cold", texts)[0])
    return min(best, key=best.__getitem__)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what lmprobe prints is no answer

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    first = json.loads(sys.stdin.readline())
    work = Work(first["folder"], first["layer"], first["pooling"])
    work.uncached(first["texts"][:2])
    size = fastest_batch_size(work, first["texts"][::2])
    work.set_batch_size(size)
    answer(batch_size=size, version=lmprobe.__version__, torch=torch.__version__)
    for line in sys.stdin:
        request = json.loads(line)
        seconds, found = timed(work, request["how"], request["texts"])
        answer(seconds=seconds, first_row=found[0].tolist())


if __name__ == "__main__":
    main()
