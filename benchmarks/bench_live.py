"""What live scoring costs: decode steps with and without probes attached, taken in turns in one process.

Run it by `make bench-live`. Each ratio is the median over pairs of neighbouring steps, one bare and one with probes, in an
order drawn anew for each pair; a pair sees the same load of the machine, so that ratios are steady where times are not. The
interval is a 95 % bootstrap over pairs. `generate` rows time whole calls instead, with sampling, and vary more.
"""

from __future__ import annotations

import argparse
import json
import random
import tracemalloc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import MODELS, RESULTS, device_name, paired, seconds
from lmprobe_tl import ProbeWeights
from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import ModelMismatchWarning
from lmprobe_tl.hook_points import ForwardCall, ForwardWatch
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.probe_spec import PoolingRecord
from lmprobe_tl.reductions import make_online

REDUCTIONS = {
    "last_token": None, "mean": None, "max": None, "min": None, "ema_max": 0.5, "rolling_max": 10, "softmax": 5.0,
}  # fmt: skip
PROMPT_TOKENS = 32
NEVER = -1e6  # an intercept that no threshold is reached with


@dataclass(frozen=True)
class Case:
    """Probes to attach: how many, on which hook points, pooled how, with a stop or without."""

    name: str
    n_probes: int
    hooks: str  # 'middle' or 'all'
    pooling: str = "score:max"
    stop: bool = False


CASES = [
    Case("1 probe", 1, "middle"),
    Case("1,000 probes on one hook point", 1000, "middle"),
    Case("one probe on every layer", 0, "all"),
    Case("1 probe, stop", 1, "middle", stop=True),
    Case("1,000 probes on one hook point, stop", 1000, "middle", stop=True),
    Case("one probe on every layer, stop", 0, "all", stop=True),
    *(
        Case(f"1 probe, stop, score:{name}" + (f"({value:g})" if value else ""), 1, "middle",
             f"score:{name}" + (f"({value:g})" if value else ""), stop=True)
        for name, value in REDUCTIONS.items() if name != "max"
    ),
]  # fmt: skip


def probes_of(case: Case, model: Any) -> list[ProbeWeights]:
    n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
    layers = list(range(n_layers)) if case.hooks == "all" else [n_layers // 2] * case.n_probes
    generator = torch.Generator().manual_seed(0)
    return [
        ProbeWeights.from_direction(
            torch.randn(d_model, generator=generator) / d_model**0.5,
            NEVER,
            name=f"probe {at}",
            hook_points=f"blocks.{layer}.hook_resid_post",
            pooling=PoolingRecord(inference=case.pooling),
        ).with_threshold(0.0, unit="logit")
        for at, layer in enumerate(layers)
    ]


class Decoder:
    """Greedy decoding by the model's own forward pass, one step at a time, on a cache of its own."""

    def __init__(self, model: Any, batch: int) -> None:
        self._inner, self._batch = model.original_model, batch
        generator = torch.Generator().manual_seed(1)
        device = next(self._inner.parameters()).device
        self._tokens = torch.randint(5, 400, (batch, PROMPT_TOKENS), generator=generator).to(device)
        self._length, self._cache = 0, None

    @torch.no_grad()
    def step(self) -> None:
        mask = torch.ones(self._batch, self._length + self._tokens.shape[1], dtype=torch.long, device=self._tokens.device)
        output = self._inner(self._tokens, attention_mask=mask, past_key_values=self._cache, use_cache=True)
        self._length, self._cache = mask.shape[1], output.past_key_values
        self._tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        if self._tokens.is_cuda:
            torch.cuda.synchronize()


@contextmanager
def hooks_of(monitor: Monitor, model: Any) -> Iterator[None]:
    watch = ForwardWatch(model, monitor.before_forward, monitor.after_forward)
    monitor.attach(model)
    try:
        yield
    finally:
        monitor.detach()
        watch.remove()


def paired_steps(model: Any, case: Case, batch: int, steps: int, rng: random.Random) -> list[tuple[float, float]]:
    """Seconds of `steps` pairs (bare, with probes); the prompt and the first steps warm up."""
    monitor = Monitor(model, probes_of(case, model), stop=case.stop)
    bare, probed = Decoder(model, batch), Decoder(model, batch)
    pairs = []
    for at in range(steps + 4):
        times: dict[bool, float] = {}
        for with_probes in rng.sample([False, True], 2):
            if with_probes:
                with hooks_of(monitor, model):
                    times[True] = seconds(probed.step)
            else:
                times[False] = seconds(bare.step)
        if at >= 4:
            pairs.append((times[False], times[True]))
    assert monitor.runs[0].n_columns == PROMPT_TOKENS + steps + 3, "the probes did not see every step"
    return pairs


def whole_generate(model: Any, case: Case, batch: int, new: int, rng: random.Random) -> tuple[float, float]:
    """Seconds of one `model.generate` bare and one with probes attached and their scores read."""
    tokens = torch.randint(5, 400, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2))
    tokens = tokens.to(next(model.original_model.parameters()).device)
    options: dict[str, Any] = {"max_new_tokens": new, "stop_at_eos": False, "temperature": 0.8, "verbose": False}
    probes = probes_of(case, model)

    def with_probes() -> None:
        with attach_probes(model, probes, eos_token_id=[]) as monitor:
            model.generate(tokens, **options)
        monitor.token_scores(probes[0].name)

    times = {}
    for name in rng.sample(["bare", "probes"], 2):
        times[name] = seconds(with_probes if name == "probes" else lambda: model.generate(tokens, **options))
    return times["bare"], times["probes"]


@dataclass(frozen=True)
class Row:
    """One line of the table. ms: median of a bare step or call; ratio: with probes / bare, median, its 95 % interval, and
    the quartiles of single pairs."""

    model: str
    batch: int
    what: str
    case: str
    ms: float
    ratio: float
    low: float
    high: float
    quartiles: tuple[float, float]
    n_pairs: int


def row_of(model: str, batch: int, what: str, case: str, pairs: Sequence[tuple[float, float]]) -> Row:
    return Row(model, batch, what, case, **vars(paired(pairs)))


def state_sizes() -> dict[str, int]:
    """Bytes of state a row and probe, by reduction."""
    sizes = {}
    for name, parameter in REDUCTIONS.items():
        label = name if parameter is None else f"{name}({parameter:g})"
        sizes[label] = make_online(name, parameter, 1, 1).state_bytes
    return sizes


def memory_of_long_run(n_tokens: int, *, keep_scores: bool) -> dict[str, Any]:
    """Bytes that a Monitor of one probe holds after each tenth of `n_tokens` single steps; the model is left out, since its
    own cache would hide them. Counted by tracemalloc (Python) and as bytes of the tensors kept."""

    class NoModel:
        cfg = SimpleNamespace(eos_token_id=1)
        tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)

    probe = ProbeWeights.from_direction(torch.ones(64) / 8, name="p", hook_points="blocks.0.hook_resid_post")
    monitor = Monitor(NoModel(), [probe], keep_scores=keep_scores)
    activations, tokens = torch.randn(1, 1, 64), torch.full((1, 1), 7)
    held = []
    tracemalloc.start()
    for at in range(n_tokens):
        monitor.before_forward(ForwardCall(tokens, at, None))
        monitor.on_activations("blocks.0.hook_resid_post", activations)
        if (at + 1) % (n_tokens // 10) == 0:
            monitor.runs[0].settle()
            held.append(tracemalloc.get_traced_memory()[0] + monitor.runs[0].n_bytes)
    tracemalloc.stop()
    per_token = (held[-1] - held[0]) / (n_tokens - n_tokens // 10)
    return {"keep_scores": keep_scores, "n_tokens": n_tokens, "bytes": held, "bytes_per_token": per_token}


def copies_to_host(model: Any) -> dict[str, int]:
    """How often a profiled step copies from the device to the host, bare and with 1,000 probes and a stop; on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    counts = {}
    for name, case in (("bare", None), ("probes", CASES[4])):
        monitor = None if case is None else Monitor(model, probes_of(case, model), stop=True)
        decoder = Decoder(model, 32)

        def step(monitor: Monitor | None = monitor, decoder: Decoder = decoder) -> None:
            if monitor is None:
                decoder.step()
                return
            with hooks_of(monitor, model):
                decoder.step()

        for _ in range(4):
            step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(8):
                step()
        counts[name] = sum(event.count for event in profiled.key_averages() if "DtoH" in event.key)
    return counts


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| model | batch | timed | attached | bare, ms | ratio [95 %] | quartiles of pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.model} | {row.batch} | {row.what} | {row.case} | {row.ms:.2f} "
        f"| {row.ratio:.4f} [{row.low:.4f}, {row.high:.4f}] | {row.quartiles[0]:.3f} to {row.quartiles[1]:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=4, help="how often each case is visited")
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps a visit")
    parser.add_argument("--new-tokens", type=int, default=16, help="of a timed generate")
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the run whose memory is measured")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; by default benchmarks/results/live-DEVICE.json")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", ModelMismatchWarning)
    rng = random.Random(0)
    rows, copies = [], None
    for name in options.models:
        model = MODELS[name]()
        model.original_model.to(options.device)
        for batch in options.batches:
            steps: dict[str, list[tuple[float, float]]] = {case.name: [] for case in CASES}
            calls: dict[str, list[tuple[float, float]]] = {case.name: [] for case in CASES[:3]}
            for _ in range(options.rounds):
                for case in rng.sample(CASES, len(CASES)):
                    steps[case.name] += paired_steps(model, case, batch, options.steps, rng)
                    if case.name in calls:
                        calls[case.name] += [whole_generate(model, case, batch, options.new_tokens, rng) for _ in range(3)]
            measured = [row_of(name, batch, "step", case, pairs) for case, pairs in steps.items()]
            measured += [row_of(name, batch, "generate", case, pairs) for case, pairs in calls.items()]
            print(markdown(measured), flush=True)
            rows += measured
        if options.device != "cpu":
            copies = copies_to_host(model)
    result = {
        "device": device_name(options.device),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "rows": [asdict(row) for row in rows],
        "state_bytes_a_row_and_probe": state_sizes(),
        "memory": [memory_of_long_run(options.long, keep_scores=keep) for keep in (True, False)],
        "copies_to_host_in_8_steps": copies,
    }
    print("state, bytes a row and probe:", result["state_bytes_a_row_and_probe"])
    for memory in result["memory"]:
        kept, n_tokens, size = memory["keep_scores"], memory["n_tokens"], memory["bytes_per_token"]
        print(f"{n_tokens:,} tokens, keep_scores={kept}: {size:.1f} bytes a token")
    if copies is not None:
        print("copies to the host in 8 steps:", copies)
    out = options.out or RESULTS / f"live-{options.device.partition(':')[0]}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {out}")


if __name__ == "__main__":
    main()
