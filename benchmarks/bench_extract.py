"""What extraction costs: against the bare forward pass on the same batches, against what one writes by hand, and against
lmprobe, taken in turns; and what it holds in memory.

Run it by `make bench-extract`. Each ratio is the median over neighbouring pairs, one of each side, in an order drawn anew
for each pair, on texts drawn anew for each round; a pair sees the same load of the machine, so that ratios are steady where
times are not. The interval is a 95 % bootstrap over pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import MODELS, RESULTS, device_name, paired, save_for_hugging_face, seconds
from benchmarks.extraction_memory import Memory, measured
from benchmarks.forwards import Workload
from benchmarks.lmprobe_client import LmprobeProcess
from benchmarks.store_rates import store_rates
from benchmarks.texts import ragged_texts
from lmprobe_tl import extract_activations
from lmprobe_tl.tokens import TOKENS_ON_CPU

PROMPTS = {"demo": 96, "gpt2-small": 16}  # texts a round
SHORT = 32  # tokens of the longest short text
MEMORY_TOKENS = 16  # of the longest text whose memory is measured, so that 100,000 take minutes
LMPROBE_WAYS = ("UnifiedCache, cold", "UnifiedCache, cached", "Probe's cache, cold", "without its cache")
RARELY = 4  # comparisons that need no exact number are made in every so many rounds


@dataclass(frozen=True)
class Comparison:
    """Two things to time; `measured` and `reference` return their seconds. target: of the ratio, at most."""

    what: str
    against: str
    measured: Callable[[], float]
    reference: Callable[[], float]
    target: float | None = None
    often: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table. ms: medians of both sides; ratio: `what` / `against`, see `common.Paired`; extra_ms_a_prompt:
    median of the difference of a pair, by prompt."""

    model: str
    what: str
    against: str
    target: float | None
    measured_ms: float
    extra_ms_a_prompt: float
    ms: float
    ratio: float
    low: float
    high: float
    quartiles: tuple[float, float]
    n_pairs: int


def row_of(model: str, comparison: Comparison, n_prompts: int, pairs: Sequence[tuple[float, float]]) -> Row:
    measured_ms = 1000 * statistics.median(one for _, one in pairs)
    extra = 1000 * statistics.median(one - reference for reference, one in pairs) / n_prompts
    return Row(model, comparison.what, comparison.against, comparison.target, measured_ms, extra, **vars(paired(pairs)))


def comparisons(work: Workload, short: Workload) -> Iterator[Comparison]:
    """Against forward passes, on ragged texts and on short ones."""
    last = work.model.cfg.n_layers - 1
    middle, every = last // 2, range(last + 1)

    def ours(layers: Any, pooling: str, prompts: Sequence[Any] = work.texts) -> Callable[[], float]:
        return lambda: seconds(lambda: extract_activations(work.model, prompts, layers, pooling, progress=False))

    def bare(layer: int) -> Callable[[], float]:
        return lambda: seconds(lambda: work.bare(layer))

    for pooling in ("mean", "last_token"):
        yield Comparison(f"middle layer, {pooling}", "bare forward", ours(middle, pooling), bare(middle), 1.05, often=True)
        yield Comparison(f"all layers, {pooling}", "bare forward", ours("all", pooling), bare(last), 1.08, often=True)
    tokens = ours(middle, "mean", work.token_tensors)
    yield Comparison("middle layer, mean, of token ids", "bare forward", tokens, bare(middle), 1.05, often=True)
    yield Comparison(
        f"middle layer, mean, texts of at most {SHORT} tokens",
        "bare forward",
        ours(middle, "mean", short.texts),
        lambda: seconds(lambda: short.bare(middle)),
        often=True,
    )
    yield Comparison(
        "bare forward", "without TransformerLens", bare(middle), lambda: seconds(lambda: work.plain_bare(middle))
    )
    for label, layers, wanted in (("middle layer, mean", middle, [middle]), ("all layers, mean", "all", list(every))):
        by_hand: dict[str, Callable[[], Any]] = {
            "Hugging Face, output_hidden_states": lambda wanted=wanted: work.hidden_states(wanted),
            "run_with_cache": lambda wanted=wanted: work.run_with_cache(wanted, filtered=False),
            "run_with_cache, names_filter": lambda wanted=wanted: work.run_with_cache(wanted, filtered=True),
        }
        for against, function in by_hand.items():
            yield Comparison(label, against, ours(layers, "mean"), lambda function=function: seconds(function), 1.0)
    yield Comparison("all layers, mean", "last layer, mean", ours("all", "mean"), ours(last, "mean"))


def against_lmprobe(work: Workload, process: LmprobeProcess, name: str) -> Iterator[Comparison]:
    """`include_bos`, as lmprobe has it. Never slower on the small model, 2.2 times as fast on the large one when cold."""
    middle = (work.model.cfg.n_layers - 1) // 2

    def ours() -> float:
        return seconds(lambda: extract_activations(work.model, work.texts, middle, "mean", include_bos=True, progress=False))

    for how in LMPROBE_WAYS:
        target = None if how == "UnifiedCache, cached" else 1.0 if name == "demo" or how == "without its cache" else 1 / 2.2
        yield Comparison(
            "middle layer, mean", f"lmprobe, {how}", ours, lambda how=how: process.run(how, work.texts)[0], target
        )


def difference_from_lmprobe(work: Workload, process: LmprobeProcess) -> float:
    """Largest difference of the first text's activations, by their largest value: that both computed the same."""
    middle = (work.model.cfg.n_layers - 1) // 2
    found = extract_activations(work.model, work.texts[:1], middle, "mean", include_bos=True, progress=False)
    (values,) = found.values.values()
    theirs = torch.tensor(process.run(LMPROBE_WAYS[0], work.texts[:1])[1])
    return float((values[0] - theirs).abs().max() / values[0].abs().max())


@contextmanager
def lmprobe_process(skip: bool, *arguments: Any) -> Iterator[LmprobeProcess | None]:
    process = None if skip else LmprobeProcess(*arguments)
    try:
        yield process
    finally:
        if process is not None:
            process.close()


def measure_model(name: str, n_prompts: int, rounds: int, skip_lmprobe: bool, say: Callable[[str], None]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_hugging_face(name, Path(temporary) / "model")
        model, plain = MODELS[name](), AutoModelForCausalLM.from_pretrained(folder).eval()

        def workload(seed: int, longest: int | None = None) -> Workload:
            limits = {} if longest is None else {"longest": longest}
            return Workload(model, plain, ragged_texts(model.tokenizer, n_prompts, seed=seed, **limits))

        say(f"{name}: warming up")
        work = workload(0)
        pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        latest: dict[tuple[str, str], Comparison] = {}
        cache, middle = Path(temporary) / "lmprobe", (model.cfg.n_layers - 1) // 2
        for one in comparisons(work, workload(0, SHORT)):  # each once, so that nothing is first in a pair that counts
            one.measured(), one.reference()
        with lmprobe_process(skip_lmprobe, folder, middle, "mean", work.texts, cache) as process:
            facts = None if process is None else process.facts | {"difference": difference_from_lmprobe(work, process)}
            for at in range(rounds):
                work = workload(at + 1)
                listed = list(comparisons(work, workload(at + 1, SHORT)))
                if process is not None:
                    listed += against_lmprobe(work, process, name)
                for one in rng.sample(listed, len(listed)):
                    if one.often or at % RARELY == 0:
                        for _ in range(2 if one.often else 1):
                            times = {side: getattr(one, side)() for side in rng.sample(["measured", "reference"], 2)}
                            pairs[one.what, one.against].append((times["reference"], times["measured"]))
                        latest[one.what, one.against] = one
                say(f"{name}: round {at + 1} of {rounds}, {sum(map(len, pairs.values()))} pairs")
        rows = [row_of(name, latest[key], n_prompts, found) for key, found in pairs.items()]
        rates = store_rates(name, work, Path(temporary) / "store", max(1, rounds // 2), rng)
        return {"rows": rows, "store": rates, "lmprobe": facts, "n_prompts": n_prompts, "padding": work.padding}


def memory_rows(sizes: Sequence[int], tokenizer: Any, say: Callable[[str], None]) -> list[Memory]:
    """On the embedded model, whose own size does not hide what is measured."""
    texts, rows = ragged_texts(tokenizer, 1000, longest=MEMORY_TOKENS), []
    for what, layers, n_prompts in [
        *(("extract_to_store", layers, size) for size in sizes for layers in ("last", "all")),
        *(("extract_activations", layers, sizes[len(sizes) // 2]) for layers in ("last", "all")),
    ]:
        rows.append(measured(what, n_prompts, layers, texts))
        say(f"memory: {rows[-1]}")
    return rows


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| model | timed | against | against, ms | ratio [95 %] | target | times as fast | extra, ms a prompt | pairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.model} | {row.what} | {row.against} | {row.ms:.1f} | {row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}] "
        f"| {'' if row.target is None else f'{row.target:.3g}'} | {1 / row.ratio:.2f} | {row.extra_ms_a_prompt:.3f} "
        f"| {row.n_pairs} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=8, help="each on other texts")
    parser.add_argument("--prompts", type=int, default=None, help=f"texts a round; by default {PROMPTS}")
    parser.add_argument("--skip-lmprobe", action="store_true", help="needs a package index the first time")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory-prompts", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--out", type=Path, default=RESULTS / "extract-cpu.json")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.0f} s] {text}", flush=True)

    result: dict[str, Any] = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "max_tokens_per_batch": TOKENS_ON_CPU,
        "rows": [],
        "store": [],
        "lmprobe": {},
        "workload": {},
        "memory": [],
    }

    def keep() -> None:
        """What is measured so far: a run that is ended early leaves it."""
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    for name in options.models:
        found = measure_model(name, options.prompts or PROMPTS[name], options.rounds, options.skip_lmprobe, say)
        print(markdown(found["rows"]), flush=True)
        print(found["store"], found["lmprobe"], flush=True)
        result["rows"] += map(asdict, found["rows"])
        result["store"].append(asdict(found["store"]))
        result["lmprobe"][name] = found["lmprobe"]
        result["workload"][name] = {"prompts": found["n_prompts"], "padding": found["padding"]}
        keep()
    if not options.skip_memory:
        memory = memory_rows(options.memory_prompts, MODELS["demo"]().tokenizer, say)
        peaks = np.array([row.peak_mib for row in memory if row.what == "extract_to_store"])
        result["memory"] = list(map(asdict, memory))
        result["store_peak_spread"] = float((peaks.max() - peaks.min()) / peaks.min())
        print(f"peaks of extract_to_store differ by {result['store_peak_spread']:.1%}")
        keep()
    say(f"kept in {options.out}")


if __name__ == "__main__":
    main()
