"""Reports of evaluations made from arrays, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from lmprobe_tl.bootstrap import Resamples
from lmprobe_tl.measures import differences_of, measures_of, sampled_metrics
from lmprobe_tl.probe_report import ControlReport, ExampleRecord, GroupReport, ProbeReport, ShiftPart, ShiftReport
from lmprobe_tl.scored import Scored
from lmprobe_tl.verdict import verdict

N_BOOTSTRAP = 60


def scored(
    labels: Any, scores: Any, prompts: Any = None, classes: Sequence[Any] = ("no", "yes"), level: str = "prompt"
) -> Scored:
    labels, scores = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
    probabilities = scores if scores.ndim == 2 else np.stack([expit(-scores), expit(scores)], axis=1)
    prompts = np.arange(len(labels)) if prompts is None else np.asarray(prompts)
    return Scored(labels, scores, probabilities, prompts, tuple(classes), level)


def noisy(n: int = 60, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of a probe that is often right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    return labels, 2.0 * (2 * labels - 1) + spread * rng.normal(size=n)


def report_of(
    labels: Any,
    scores: Any,
    *,
    prompts: Any = None,
    classes: Sequence[Any] = ("no", "yes"),
    level: str = "prompt",
    controls: Mapping[str, Any] | None = None,
    groups: Sequence[str] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    token_scores: Sequence[Sequence[float]] | None = None,
    n_tokens: Sequence[int] | None = None,
    shifted: Mapping[str, tuple[Any, Any]] | None = None,
    fprs: Sequence[float] = (0.01, 0.001),
    **words: Any,
) -> ProbeReport:
    """groups, texts, token_scores, n_tokens: one a prompt. controls: scores by name, of 'shuffled_labels' several."""
    examples = scored(labels, scores, prompts, classes, level)
    drawing: dict[str, Any] = {"n_bootstrap": N_BOOTSTRAP, "confidence": 0.95, "random_state": 0}
    resamples = Resamples.drawn(examples.labels, examples.prompts, **drawing)
    samples = sampled_metrics(examples, resamples, fprs)
    metrics, found, by_group = measures_of(samples, resamples), {}, {}
    for name, values in (controls or {}).items():
        draws = values if name == "shuffled_labels" else [values]
        own = sampled_metrics(scored(labels, draws[0], prompts, classes), resamples, fprs, calibration=False)
        found[name] = ControlReport(
            metrics=measures_of(own, resamples),
            differences=differences_of(samples, own, resamples),
            draws=tuple(0.4 + 0.0625 * at for at in range(len(draws))) if len(draws) > 1 else (),
            scores=() if len(draws) > 1 else (tuple(map(float, values)),),
        )
    for group in dict.fromkeys(groups or ()):
        part = examples.of_prompts(np.array([one == group for one in groups or ()]))
        drawn = Resamples.drawn(part.labels, part.prompts, **drawing)
        own_metrics = measures_of(sampled_metrics(part, drawn, fprs), drawn)
        by_group[group] = GroupReport(n_prompts=part.n_prompts, n_examples=len(part.labels), metrics=own_metrics)
    worst = next(iter(by_group), None)
    left_out = words.pop("left_out", {})
    known = {name: one for name, one in found.items() if name in ("bag_of_words", "layer_0", "length", "shuffled_labels")}
    conclusion, text = verdict(metrics["auroc"], known, {}, {}, None, 0, examples.n_prompts)
    columns = [examples.scores] if examples.scores.ndim == 1 else list(examples.scores.T)
    chances = [examples.probabilities[:, 1]] if examples.scores.ndim == 1 else list(examples.probabilities.T)
    settings: dict[str, Any] = {
        "probe": "deceit",
        "model": "a/model",
        "hook_points": ("blocks.1.hook_resid_post",),
        "pooling": "last_token",
        "conclusion": conclusion,
        "verdict": text,
        "notes": (),
    }
    report = ProbeReport(
        **{**settings, **words},
        classes=tuple(classes),
        level=level,  # type: ignore[arg-type]
        n_prompts=examples.n_prompts,
        n_examples=len(examples.labels),
        class_counts=tuple(np.bincount(examples.labels, minlength=len(classes)).tolist()),
        n_train=100,
        n_trained_on=0,
        metrics=metrics,
        controls=found,
        left_out=left_out,
        groups=by_group,
        worst_group=worst,
        worst_by=None if worst is None else "auroc",
        n_bootstrap=N_BOOTSTRAP,
        n_draws=10,
        confidence=0.95,
        random_state=0,
        examples=ExampleRecord(
            labels=tuple(examples.labels.tolist()),
            scores=tuple(tuple(column.tolist()) for column in columns),
            probabilities=tuple(tuple(column.tolist()) for column in chances),
            prompts=tuple(examples.prompts.tolist()),
            groups=None if groups is None else tuple(groups),
            n_tokens=None if n_tokens is None else tuple(n_tokens),
            texts=None if texts is None else tuple(map(tuple, texts)),
            token_scores=None if token_scores is None else tuple(map(tuple, token_scores)),
        ),
    )
    if shifted is None:
        return report
    parts = {}
    for name, (other_labels, other_scores) in shifted.items():
        other = scored(other_labels, other_scores, None, classes)
        drawn = Resamples.drawn(other.labels, other.prompts, **drawing)
        there = sampled_metrics(other, drawn, fprs)
        drops = differences_of(samples, there, resamples, drawn)
        parts[name] = ShiftPart(
            n_prompts=other.n_prompts, n_examples=len(other.labels), metrics=measures_of(there, drawn), drops=drops
        )
    own_part = ShiftPart(n_prompts=report.n_prompts, n_examples=report.n_examples, metrics=metrics, drops={})
    kept = {"level": level, "confidence": 0.95, "n_bootstrap": N_BOOTSTRAP, "random_state": 0}
    return report.with_shift(ShiftReport(probe=report.probe, held_out=own_part, shifted=parts, **kept))
