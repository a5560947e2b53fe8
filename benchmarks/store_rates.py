"""How fast an activation store is written, beyond the forward pass, and read."""

from __future__ import annotations

import random
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import paired, seconds
from benchmarks.forwards import Workload
from lmprobe_tl import ActivationStore, extract_activations, extract_to_store
from lmprobe_tl.weights_fingerprint import weights_sha256


@dataclass(frozen=True)
class StoreRates:
    """A store of every token on every layer. ratio: extract_to_store / extract_activations. MB/s: of writing beyond that, of
    reading with checksums (the first time) and without (again); files are in the system's cache. weights_seconds: of the
    hash of the model's weights, once a store."""

    model: str
    megabytes: float
    ratio: float
    low: float
    high: float
    write_mb_s: float | None
    first_read_mb_s: float
    next_read_mb_s: float
    weights_seconds: float


def store_rates(name: str, work: Workload, folder: Path, rounds: int, rng: random.Random) -> StoreRates:
    def in_memory() -> None:
        extract_activations(work.model, work.texts, "all", "all", progress=False)

    def stored() -> None:
        extract_to_store(work.model, work.texts, folder, "all", "all", progress=False)

    def read(store: ActivationStore) -> int:
        return sum(chunk.values.nbytes for chunk in store.chunks(pooling="all"))

    pairs, first, again, n_bytes = [], [], [], 0
    for _ in range(rounds):
        times = {}
        for which in rng.sample(["memory", "store"], 2):
            shutil.rmtree(folder, ignore_errors=True)
            times[which] = seconds(in_memory if which == "memory" else stored)
            if which == "store":
                store = ActivationStore(folder)
                first.append(seconds(lambda store=store: read(store)))
                again.append(seconds(lambda store=store: read(store)))
                n_bytes = read(store)
        pairs.append((times["memory"], times["store"]))
    hashing = seconds(lambda: weights_sha256(work.model))
    beyond, megabytes, ratio = statistics.median(b - a for a, b in pairs) - hashing, n_bytes / 1e6, paired(pairs)
    return StoreRates(
        name,
        megabytes,
        ratio.ratio,
        ratio.low,
        ratio.high,
        megabytes / beyond if beyond > 0 else None,
        megabytes / statistics.median(first),
        megabytes / statistics.median(again),
        hashing,
    )
