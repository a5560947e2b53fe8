"""What fitting costs, for every kind of classifier by name, and for logistic regression beside plain scikit-learn.

Run it by `make bench-fitting`; a run that was ended goes on where it stopped. Classifiers of token sequences learn from
2,000 sequences of 256 tokens x 512, the others from 10,000 vectors x 1,024, and the comparison is on 10,000 x 4,096. Each
fit has a process of its own, where torch and BLAS have as many threads as it says. Seconds are of wall clock, and of all
processors together (user and system), which a busy machine stretches less. Peak memory is what the process grew by beyond
the data.

'ccs' is to find what tells the two texts of a pair apart in either direction, of which there is nothing here: its AUROC says
no more than that it ran.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.common import RESULTS, device_name, paired  # first, since it sets the environment
from lmprobe_tl.estimators import CLASSIFIERS, SEQUENCE_CLASSIFIERS, TokenSequences, make_classifier
from lmprobe_tl.estimators.fitting import fit_classifier
from lmprobe_tl.estimators.layer_stack import with_n_blocks
from lmprobe_tl.metrics import auroc

LAYERS_OF_A_STACK = 4
LOGISTIC = "logistic regression beside scikit-learn"


@dataclass(frozen=True)
class Sizes:
    sequences: int = 2000
    tokens: int = 256
    d: int = 512
    examples: int = 10_000
    features: int = 1024
    logistic_features: int = 4096
    rounds: int = 15


@dataclass(frozen=True)
class FitRow:
    """One fit; auroc on others, as many but at most 500. epochs: where there are any. megabytes: of the data."""

    classifier: str
    threads: int
    seconds: float
    cpu_seconds: float
    epochs: int | None
    best_epoch: int | None
    auroc: float
    megabytes: float
    peak_growth_megabytes: float


@dataclass(frozen=True)
class LogisticRow:
    """Pairs of fits by plain scikit-learn and by ours with the same settings; ratios of processor seconds."""

    n_examples: int
    n_features: int
    threads: int
    sklearn_seconds: float
    sklearn_cpu_seconds: float
    ratio: float
    low: float
    high: float


def planted(n: int, n_tokens: int, d: int, seed: int) -> tuple[TokenSequences, NDArray[np.int64]]:
    """White noise with an origin and unequal units; in each positive, ten tokens in a row are shifted by 3 deviations.

    The direction is one of all features, as in a residual stream. AdamW, which moves all weights alike, learns one feature
    among many slower.
    """
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(99).standard_normal(d, dtype=np.float32)
    direction *= 3 / np.linalg.norm(direction)
    values = rng.standard_normal((n * n_tokens, d), dtype=np.float32)
    labels = np.arange(n) % 2
    for index in np.flatnonzero(labels):
        at = index * n_tokens + rng.integers(n_tokens - 9)
        values[at : at + 10] += direction
    values *= np.linspace(0.5, 3, d, dtype=np.float32)
    values += 1
    return TokenSequences(values, np.arange(n + 1) * n_tokens), labels


def planted_vectors(n: int, d: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """White noise; positives are shifted by 2 deviations along a direction of all features."""
    direction = np.random.default_rng(99).standard_normal(d, dtype=np.float32)
    labels = np.arange(n) % 2
    values = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    values += labels[:, None].astype(np.float32) * direction * np.float32(2 / np.linalg.norm(direction))
    return values, labels


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def planted_examples(name: str, sizes: Sizes, seed: int, most: int | None = None) -> tuple[Any, NDArray[np.int64]]:
    if name in SEQUENCE_CLASSIFIERS:
        return planted(min(sizes.sequences, most or sizes.sequences), sizes.tokens, sizes.d, seed)
    return planted_vectors(min(sizes.examples, most or sizes.examples), sizes.features, seed)


def fit_row(name: str, threads: int, sizes: Sizes) -> FitRow:
    train, labels = planted_examples(name, sizes, seed=0)
    classifier = with_n_blocks(make_classifier(name, 0), LAYERS_OF_A_STACK)
    if hasattr(classifier, "device"):
        classifier.set_params(device="cpu")
    before, start, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
    fit_classifier(classifier, train, labels)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    growth = peak_megabytes() - before
    fresh, fresh_labels = planted_examples(name, sizes, seed=1, most=500)
    found = float(auroc(fresh_labels, classifier.decision_function(fresh)))
    megabytes = (train.values if isinstance(train, TokenSequences) else train).nbytes / 1e6
    epochs, best = getattr(classifier, "n_epochs_", None), getattr(classifier, "best_epoch_", None)
    return FitRow(name, threads, took, cpu, epochs, best, found, megabytes, growth)


def logistic_row(threads: int, sizes: Sizes) -> LogisticRow:
    rng, (n, d) = np.random.default_rng(0), (sizes.examples, sizes.logistic_features)
    labels = np.arange(n) % 2
    features = rng.standard_normal((n, d), dtype=np.float32) + 0.05 * labels[:, None].astype(np.float32)

    def ours() -> None:
        fit_classifier(make_classifier("logistic_regression", 0), features, labels)

    def plain() -> None:
        make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000, random_state=0)).fit(features, labels)

    pairs, wall, order = [], [], random.Random(0)
    ours(), plain()  # the first ones also load code
    for _ in range(sizes.rounds):
        times = {}
        for which in order.sample([ours, plain], 2):
            start, cpu = time.perf_counter(), time.process_time()
            which()
            times[which] = time.process_time() - cpu
            if which is plain:
                wall.append(time.perf_counter() - start)
        pairs.append((times[plain], times[ours]))
    ratio = paired(pairs)
    return LogisticRow(n, d, threads, float(np.median(wall)), ratio.ms / 1000, ratio.ratio, ratio.low, ratio.high)


def measure(name: str, threads: int, sizes: Sizes) -> dict[str, Any]:
    """In this process, which must have been started with so many threads."""
    torch.set_num_threads(threads)
    return asdict(logistic_row(threads, sizes) if name == LOGISTIC else fit_row(name, threads, sizes))


def measured_elsewhere(name: str, threads: int, sizes: Sizes) -> dict[str, Any]:
    """In a process of its own, since OpenMP and BLAS read their number of threads once."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    arguments = [name, str(threads), json.dumps(asdict(sizes))]
    code = (
        "import json, sys; from benchmarks import bench_fitting as b; name, threads, sizes = sys.argv[1:]; "
        "print(json.dumps(b.measure(name, int(threads), b.Sizes(**json.loads(sizes)))))"
    )
    environment = os.environ | dict.fromkeys(names, str(threads))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def line_of(name: str, row: dict[str, Any]) -> str:
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    if name == LOGISTIC:
        return (
            f"{name}, {row['n_examples']} x {row['n_features']}, {threads}: {row['sklearn_cpu_seconds']:.1f} s of "
            f"processors there, ours {row['ratio']:.3f} times that ({row['low']:.3f} to {row['high']:.3f})"
        )
    epochs = "" if row["epochs"] is None else f"{row['epochs']} epochs, "
    return (
        f"{name:20} {threads:9} {row['seconds']:6.1f} s, {row['cpu_seconds']:6.1f} s of processors, {epochs}"
        f"AUROC {row['auroc']:.3f}, {row['megabytes']:.0f} MB of data, peak + {row['peak_growth_megabytes']:.0f} MB"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    names = [LOGISTIC, *sorted(CLASSIFIERS)]
    parser.add_argument("--classifiers", nargs="*", default=names, choices=names)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "fitting-cpu.json")
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})
    settings = {"sizes": asdict(sizes), "torch": torch.__version__}

    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "rows": {}}
    result["device"] = device_name("cpu").rpartition(",")[0]
    for name in options.classifiers:
        for threads in options.threads:
            rows = result["rows"].setdefault(name, {})
            if str(threads) not in rows:
                rows[str(threads)] = measured_elsewhere(name, threads, sizes) | {"load_average": os.getloadavg()[0]}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(line_of(name, rows[str(threads)]), flush=True)


if __name__ == "__main__":
    main()
