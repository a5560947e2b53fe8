"""The main job on the embedded model: fit, evaluate, save, reload, attach, generate, and check the live scores against the
truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lmprobe_tl.demo import MODEL_FOLDER, load_demo_model
from lmprobe_tl.demo.task import (
    INSIDE,
    PROBE_EVAL_MODULES,
    PROBE_TRAIN_MODULES,
    UNKNOWN,
    LabelledText,
    inside_after_each_char,
    labelled_pieces,
    lines_of,
    token_labels,
)
from lmprobe_tl.errors import InputError
from lmprobe_tl.evaluation import Evaluation
from lmprobe_tl.generation import GenerationResult, monitored_generate
from lmprobe_tl.live.records import TokenEvent
from lmprobe_tl.metrics import Interval, auroc, bootstrap_interval
from lmprobe_tl.probe import Probe
from lmprobe_tl.probe_file import load_probe
from lmprobe_tl.weights import ProbeWeights

PROBE_NAME = "inside_text"
LAYER = 3
PIECES_PER_MODULE = 8
SHOWN_PROMPTS = ("def load(path, default=None):\n", "class Cache:\n", "import os\nimport sys\n\n# ")
TEMPERATURE = 0.7


@dataclass(frozen=True)
class TaskData:
    """Labelled pieces of the standard library; no module is in both parts, and the model was trained on none of them."""

    train: list[LabelledText]
    test: list[LabelledText]

    @staticmethod
    def texts(pieces: Sequence[LabelledText]) -> list[str]:
        return [piece.text for piece in pieces]

    @staticmethod
    def labels(pieces: Sequence[LabelledText]) -> list[list[int]]:
        return [piece.labels for piece in pieces]


@dataclass(frozen=True)
class LiveCheck:
    """Live scores of generated tokens against Python's tokenizer: AUROC of the probe and of token identity, over rows."""

    probe: Interval
    token_identity: Interval
    n_rows: int
    n_tokens: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo found. `evaluation` and `identity_auroc` are on modules that neither model nor probe has seen."""

    evaluation: Evaluation
    identity_auroc: Interval
    live: LiveCheck
    probe_file: Path
    shown: list[GenerationResult]
    training: dict[str, Any]
    tokenizer: Any


class Display(Protocol):
    """Shows one generation: an `on_token`, and told at the end what ended the row."""

    def __call__(self, event: TokenEvent) -> None: ...

    def finish(self, ended_by: str) -> None: ...


def training_record() -> dict[str, Any]:
    """How the embedded model was trained and what it reached, as its training script recorded it."""
    return json.loads((MODEL_FOLDER / "training.json").read_text())


def load_task(tokenizer: Any) -> TaskData:
    """The probe's training and test pieces, from the standard library of the Python that runs."""
    train = _pieces(tokenizer, PROBE_TRAIN_MODULES)
    test = _pieces(tokenizer, PROBE_EVAL_MODULES)
    if not train or not test:
        raise InputError("this Python has no source of its standard library; the demo reads its text from there.")
    return TaskData(train, test)


def _pieces(tokenizer: Any, modules: Sequence[str]) -> list[LabelledText]:
    found: list[LabelledText] = []
    for module in modules:
        found += islice(labelled_pieces(tokenizer, module), PIECES_PER_MODULE)
    return found


class TokenIdentity:
    """The baseline without a model: how often a token was inside a comment or string in the training pieces."""

    def __init__(self, pieces: Sequence[LabelledText], vocab_size: int) -> None:
        ids = np.concatenate([piece.token_ids for piece in pieces])
        labels = np.concatenate([piece.labels for piece in pieces])
        # Add-one smoothing: a token that never occurred says 0.5.
        inside = np.bincount(ids, weights=labels, minlength=vocab_size) + 1
        self._rate = inside / (np.bincount(ids, minlength=vocab_size) + 2)

    def scores(self, token_ids: Sequence[int]) -> np.ndarray:
        return self._rate[np.asarray(token_ids)]


def fit_probe(model: Any, pieces: Sequence[LabelledText]) -> Probe:
    """A probe for each token of the pieces, at a middle layer of the six."""
    probe = Probe(model, LAYER, "all", random_state=0, name=PROBE_NAME)
    return probe.fit(TaskData.texts(pieces), TaskData.labels(pieces))


def identity_auroc(baseline: TokenIdentity, pieces: Sequence[LabelledText], n_bootstrap: int) -> Interval:
    groups = np.repeat(np.arange(len(pieces)), [len(piece.labels) for piece in pieces])
    scores = np.concatenate([baseline.scores(piece.token_ids) for piece in pieces])
    labels = np.concatenate([piece.labels for piece in pieces])
    return bootstrap_interval(auroc, labels, scores, groups=groups, n_bootstrap=n_bootstrap)


def live_prompts(pieces: Sequence[LabelledText], tokenizer: Any, count: int, n_tokens: int = 24) -> list[str]:
    """Openings of test pieces, spread over them, cut after whole lines near `n_tokens` tokens."""
    chosen = [pieces[index] for index in np.linspace(0, len(pieces) - 1, count).astype(int)]
    prompts = []
    for piece in chosen:
        taken = ""
        for line in lines_of(piece.text):
            taken += line
            if len(tokenizer(taken, add_special_tokens=False)["input_ids"]) >= n_tokens:
                break
        prompts.append(taken)
    return prompts


def check_live_scores(
    model: Any, weights: ProbeWeights, prompts: list[str], baseline: TokenIdentity, *, max_new_tokens: int, n_bootstrap: int
) -> LiveCheck:
    """Generate from the prompts, and compare the live score of every generated token with what Python's tokenizer says of
    it."""
    results = monitored_generate(
        model, prompts, [weights], max_new_tokens=max_new_tokens, temperature=TEMPERATURE, score_last_token=True
    )
    scores, identity, labels, groups = [], [], [], []
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        truth, at = generated_labels(model.tokenizer, prompt, result)
        scores.append(result.scores[weights.name].numpy()[at])
        identity.append(baseline.scores(result.tokens.numpy()[at]))
        labels.append(truth)
        groups.append(np.full(len(truth), row))
    truth, group = np.concatenate(labels), np.concatenate(groups)

    def interval(values: list[np.ndarray]) -> Interval:
        return bootstrap_interval(auroc, truth, np.concatenate(values), groups=group, n_bootstrap=n_bootstrap)

    return LiveCheck(interval(scores), interval(identity), n_rows=len(np.unique(group)), n_tokens=len(truth))


def generated_labels(tokenizer: Any, prompt: str, result: GenerationResult) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the generated tokens as far as the text tokenizes, and their positions in the row.

    Empty where the model's own tokens are not what its text encodes to: then no label belongs to a token.
    """
    text = prompt + tokenizer.decode(result.tokens[result.prompt_length :], skip_special_tokens=True)
    ids, labels = token_labels(tokenizer, text, inside_after_each_char(text))
    # Special tokens are not in the text, wherever they stand in the row.
    own = [(at, token) for at, token in enumerate(result.tokens.tolist()) if token not in tokenizer.all_special_ids]
    agreed = takewhile(lambda pair: pair[0][1] == pair[1][0], zip(own, zip(ids, labels, strict=True), strict=False))
    judged = [(at, label) for (at, _), (_, label) in agreed if at >= result.prompt_length and label != UNKNOWN]
    return np.array([label == INSIDE for _, label in judged], dtype=int), np.array([at for at, _ in judged], dtype=int)


def run_demo(
    out: Path,
    *,
    say: Callable[[str], None],
    show_generation: Callable[[ProbeWeights, Any], AbstractContextManager[Display]],
    seed: int = 0,
    n_bootstrap: int = 300,
    live_rows: int = 64,
    max_new_tokens: int = 96,
) -> DemoResult:
    """The whole job. `say` tells what happens; `show_generation(weights, tokenizer)` makes what shows a row."""
    model = load_demo_model()
    data = load_task(model.tokenizer)
    n_tokens = sum(len(piece.labels) for piece in data.train)
    say(
        f"1. fit      a probe at layer {LAYER} on {n_tokens:,} tokens: is the text after this "
        "token inside a comment or string?"
    )
    probe = fit_probe(model, data.train)

    say(f"2. evaluate on {len(data.test)} pieces of modules that neither the model nor the probe has seen")
    evaluation = probe.evaluate(TaskData.texts(data.test), TaskData.labels(data.test), n_bootstrap=n_bootstrap)
    baseline = TokenIdentity(data.train, model.cfg.d_vocab)
    identity = identity_auroc(baseline, data.test, n_bootstrap)
    say(f"   AUROC of the probe         {interval_text(evaluation.auroc)}")
    say(f"   AUROC of the token alone   {interval_text(identity)}   (no model)")

    path = probe.save(out / f"{PROBE_NAME}.safetensors", evaluation=evaluation)
    weights = load_probe(path)
    say(f"3. save     {path} ({path.stat().st_size:,} bytes), reload, attach, and generate with live scores:")

    torch.manual_seed(seed)
    shown = []
    for prompt in SHOWN_PROMPTS:
        with show_generation(weights, model.tokenizer) as display:
            shown += monitored_generate(
                model,
                [prompt],
                [weights],
                max_new_tokens=max_new_tokens,
                temperature=TEMPERATURE,
                on_token=display,
                score_last_token=True,
            )
            display.finish(shown[-1].stopped_by)

    say("")
    say(f"4. check    the live scores of {live_rows} more generations against Python's own tokenizer")
    prompts = live_prompts(data.test, model.tokenizer, live_rows)
    live = check_live_scores(model, weights, prompts, baseline, max_new_tokens=max_new_tokens, n_bootstrap=n_bootstrap)
    say(f"   AUROC of the live scores   {interval_text(live.probe)}   ({live.n_tokens:,} generated tokens)")
    say(f"   AUROC of the token alone   {interval_text(live.token_identity)}   (no model)")
    return DemoResult(evaluation, identity, live, path, shown, training_record(), model.tokenizer)


def interval_text(interval: Interval) -> str:
    """Value and interval, as '0.991 [0.987, 0.994]'."""
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
