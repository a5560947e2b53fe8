"""What fitting costs: classifiers of token sequences, and logistic regression beside plain scikit-learn.

    python -m benchmarks.bench_fitting

Seconds of wall clock, and of all processors together (user and system), which a busy machine stretches less. Peak memory is
what the process grew by beyond the data.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.common import RESULTS, device_name, paired  # first, since it sets the environment
from lmprobe_tl.estimators import make_classifier
from lmprobe_tl.estimators.fitting import fit_classifier
from lmprobe_tl.estimators.sequence_classifiers import SEQUENCE_CLASSIFIERS
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.metrics import auroc


@dataclass(frozen=True)
class FitRow:
    """One fit of a sequence classifier; auroc on as many sequences again, at most 500. megabytes: of the tokens."""

    classifier: str
    seconds: float
    cpu_seconds: float
    epochs: int
    best_epoch: int
    auroc: float
    megabytes: float
    peak_growth_megabytes: float


@dataclass(frozen=True)
class LogisticRow:
    """Processor seconds of our logistic regression over those of plain scikit-learn with the same settings."""

    n_examples: int
    n_features: int
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


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def sequence_row(name: str, n: int, n_tokens: int, d: int) -> FitRow:
    train, labels = planted(n, n_tokens, d, seed=0)
    classifier = SEQUENCE_CLASSIFIERS[name](0).set_params(device="cpu")
    before, start, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
    classifier.fit(train, labels)
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    growth = peak_megabytes() - before
    fresh, fresh_labels = planted(min(n, 500), n_tokens, d, seed=1)
    found = auroc(fresh_labels, classifier.decision_function(fresh))
    megabytes = train.values.nbytes / 1e6
    return FitRow(name, took, cpu, classifier.n_epochs_, classifier.best_epoch_, found, megabytes, growth)


def logistic_row(n: int, d: int, rounds: int) -> LogisticRow:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    features = rng.standard_normal((n, d), dtype=np.float32) + 0.05 * labels[:, None].astype(np.float32)

    def ours() -> None:
        fit_classifier(make_classifier("logistic_regression", 0), features, labels)

    def plain() -> None:
        make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000, random_state=0)).fit(features, labels)

    pairs, order = [], random.Random(0)
    for _ in range(rounds):
        times = {}
        for which in order.sample([ours, plain], 2):
            start = time.process_time()
            which()
            times[which] = time.process_time() - start
        pairs.append((times[plain], times[ours]))
    ratio = paired(pairs)
    return LogisticRow(n, d, ratio.ms / 1000, ratio.ratio, ratio.low, ratio.high)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classifiers", nargs="*", default=["attention"], choices=sorted(SEQUENCE_CLASSIFIERS))
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of logistic fits; 0 leaves them out")
    parser.add_argument("--out", type=Path, default=RESULTS / "fitting.json")
    options = parser.parse_args(arguments)

    fits = []
    for name in options.classifiers:
        row = sequence_row(name, options.sequences, options.tokens, options.d)
        fits.append(row)
        print(
            f"{name}, {options.sequences} sequences of {options.tokens} tokens x {options.d}: {row.seconds:.1f} s, "
            f"{row.cpu_seconds:.1f} s of processors, {row.epochs} epochs, AUROC {row.auroc:.3f}, "
            f"{row.megabytes:.0f} MB of tokens, peak + {row.peak_growth_megabytes:.0f} MB",
            flush=True,
        )
    logistic = [logistic_row(options.examples, options.features, options.rounds)] if options.rounds else []
    for line in logistic:
        print(
            f"logistic regression, {line.n_examples} x {line.n_features}: {line.sklearn_cpu_seconds:.1f} s of processors in "
            f"plain scikit-learn, ours {line.ratio:.3f} times that ({line.low:.3f} to {line.high:.3f})"
        )
    result = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "fits": [asdict(row) for row in fits],
        "logistic": [asdict(line) for line in logistic],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
