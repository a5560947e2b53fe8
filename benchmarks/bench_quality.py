"""How good probes are on real labelled texts and a real pretrained encoder: AUROC on held-out prompts, with intervals, of
the library's probes, of scikit-learn by hand on the same features, of a bag of words, and of lmprobe.

Run it by `make bench-quality`. Texts and model are downloaded once into `build/bench-quality`. A run that was ended goes on
where it stopped, and one with more recipes (see `quality_recipes.RECIPES`) computes what is missing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

from benchmarks import quality_data, quality_features
from benchmarks.common import MODELS, RESULTS, device_name, save_for_hugging_face
from benchmarks.lmprobe_client import VERSION, probe_scores
from benchmarks.quality_data import LabelledTexts, chosen_sets, split
from benchmarks.quality_features import POOLING, TOKENS, ByHand, Task, load_minilm, minilm_folder
from benchmarks.quality_recipes import BASELINE, MAIN, RECIPES, fitted_probe, layer_scores, saved_rule_scores
from benchmarks.quality_report import report, verdicts
from benchmarks.wheels import sha256, wheel
from lmprobe_tl import Probe
from lmprobe_tl.metrics import auroc, bootstrap_interval
from lmprobe_tl.tokens import tokenize_prompts

FOLDER = Path("build") / "bench-quality"
N_BOOTSTRAP = 1000
CHECKED_TEXTS = 16  # of each set
LMPROBE_SETS = ("36_sciq_tf", "87_glue_cola", "90_glue_qnli", "92_glue_sst2")


def interval(metric: Any, test: LabelledTexts, scores: np.ndarray) -> dict[str, float]:
    """Value and 95 % bootstrap interval over groups of test prompts."""
    found = bootstrap_interval(metric, test.labels, scores, groups=test.groups, n_bootstrap=N_BOOTSTRAP)
    return {key: value for key, value in asdict(found).items() if key in ("value", "low", "high")}


def gain(labels: np.ndarray, scores: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
    """AUROC of the first column of scores [n 2] less that of the second."""
    first, second = (auroc(labels, column, sample_weight=sample_weight) for column in scores.T)
    return first - second


def measure_set(task: Task, found: dict[str, Any], by_hand: ByHand, keep: Callable[[], None]) -> None:
    """Fill in what `found` lacks: the layer, the checks, and a row a recipe."""
    missing = [name for name in RECIPES if name not in found["recipes"]]
    if not missing:
        return
    if "layer" not in found:
        found["extraction_seconds"] = [task.stores, task.extraction_seconds()][1]
        found["layer_scores"] = layer_scores(task)
        found["layer"] = int(np.argmax(found["layer_scores"]))
    task.layer = found["layer"]
    if "checks" not in found:
        found["checks"] = checks(task, by_hand)
    baseline = RECIPES[BASELINE](task)
    for name in missing:
        start = time.perf_counter()
        scores = baseline if name == BASELINE else np.asarray(RECIPES[name](task), dtype=np.float64)
        row: dict[str, Any] = {"seconds": time.perf_counter() - start, "auroc": interval(auroc, task.test, scores)}
        if name != BASELINE:
            row["gain"] = interval(gain, task.test, np.column_stack([scores, baseline]))
        found["recipes"][name] = row
        keep()


def checks(task: Task, by_hand: ByHand) -> dict[str, float]:
    """Largest differences on the first test prompts: of activations from Hugging Face's, and of a probe's logits of the text
    from those of its saved rule on the store."""
    texts = task.test.texts[:CHECKED_TEXTS]
    activations = torch.from_numpy(task.features("all")[1][:CHECKED_TEXTS]).float()
    probe = fitted_probe(task, MAIN, task.layer)
    logits = saved_rule_scores(probe, task, task.layer)[:CHECKED_TEXTS]
    return {
        "from_hugging_face": float((by_hand.features(texts) - activations).abs().max()),
        "from_text": float(np.abs(probe.decision_function(texts) - logits).max()),
    }


def against_lmprobe(sets: Sequence[tuple[LabelledTexts, LabelledTexts]], folder: Path, seed: int) -> dict[str, Any]:
    """lmprobe on MiniLM, which is no decoder, and both libraries on the embedded model: the same layer, pooling and prompts,
    each with its own defaults."""
    model = MODELS["demo"]()
    with tempfile.TemporaryDirectory() as temporary:
        ask = partial(probe_scores, Path(temporary) / "cache", pooling=POOLING, seed=seed)
        train, test = sets[0]
        few = {"train": train.texts[:40], "labels": train.labels[:40].tolist(), "test": test.texts[:10]}
        answer = ask(folder=str(folder.resolve()), layer=2, **few)
        result: dict[str, Any] = {"version": VERSION, "on_minilm": {"error": answer.get("error")}}
        result["on_the_embedded_model"] = {}
        layer = (model.cfg.n_layers - 1) // 2
        name = str(save_for_hugging_face("demo", Path(temporary) / "model").resolve())
        for pair in sets:
            train, test = (fitting(texts, model) for texts in pair)
            start = time.perf_counter()
            ours = Probe(model, layer, POOLING, random_state=seed, progress=False).fit(train.texts, train.labels)
            scores, middle = ours.decision_function(test.texts), time.perf_counter()
            request = {"train": train.texts, "labels": train.labels.tolist(), "test": test.texts}
            theirs = np.array(ask(folder=name, layer=layer, **request)["scores"])
            result["on_the_embedded_model"][test.name] = {
                "ours": interval(auroc, test, scores),
                "lmprobe": interval(auroc, test, theirs),
                "difference": interval(gain, test, np.column_stack([scores, theirs])),
                "seconds": [middle - start, time.perf_counter() - middle],
            }
    return result


def fitting(texts: LabelledTexts, model: Any) -> LabelledTexts:
    """Those that fit in the model's context: each library cuts others in its own way."""
    rows = tokenize_prompts(model, texts.texts, max_length=model.cfg.n_ctx, truncation="right")
    return texts.part([index for index, row in enumerate(rows) if len(row) < model.cfg.n_ctx])


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What must be equal for rows of an earlier run to stand beside those of this one."""
    packages = (quality_data.PACKAGE, quality_features.MODEL_PACKAGE)
    return {
        "prompts": options.prompts,
        "seed": options.seed,
        "pooling": POOLING,
        **TOKENS,
        "n_bootstrap": N_BOOTSTRAP,
        "sha256": {package: sha256(wheel(package, options.folder)) for package in packages},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--prompts", type=int, default=600, help="for training and for testing, of each set, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", nargs="+", default=None, help="names of sets; by default all that the rule takes")
    parser.add_argument("--skip-lmprobe", action="store_true", help="needs a package index the first time")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of downloads and activations")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-minilm.json")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.0f} s] {text}", flush=True)

    options.folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "seconds": 0.0, "sets": {}, "lmprobe": None}
    before = result["seconds"]
    result |= {
        "device": device_name("cpu"),
        "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__},
        "recipes": list(RECIPES),
    }

    def keep() -> None:
        """What is measured so far: a run that is ended early leaves it."""
        result["seconds"] = before + time.perf_counter() - start
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    parts = [
        split(found, options.prompts, options.seed)
        for found in chosen_sets(options.folder)
        if options.sets is None or found.name in options.sets
    ]
    folder = minilm_folder(options.folder)
    model, by_hand = load_minilm(options.folder), ByHand(folder)
    stores = options.folder / f"activations-{options.prompts}-{options.seed}"
    stores.mkdir(exist_ok=True)
    for train, test in parts:
        sizes = {"n_train": len(train.texts), "n_test": len(test.texts), "n_test_groups": len(np.unique(test.groups))}
        found = result["sets"].setdefault(test.name, {**sizes, "recipes": {}})
        measure_set(Task(model, train, test, stores, options.seed), found, by_hand, keep)
        say(
            f"{test.name}: probe {found['recipes'][MAIN]['auroc']['value']:.3f}, "
            f"bag {found['recipes'][BASELINE]['auroc']['value']:.3f}"
        )
    if not options.skip_lmprobe and result["lmprobe"] is None:
        say("lmprobe")
        result["lmprobe"] = against_lmprobe([pair for pair in parts if pair[1].name in LMPROBE_SETS], folder, options.seed)
    result["verdicts"] = verdicts(result)
    keep()
    print(report(result), flush=True)
    say(f"kept in {options.out}; {result['seconds']:.0f} s of work in all runs")


if __name__ == "__main__":
    main()
