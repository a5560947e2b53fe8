"""Scores by class, and how far probabilities can be believed."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import norm

from lmprobe_tl.metrics import Array, CalibrationBins
from lmprobe_tl.plots.judged import judged_examples
from lmprobe_tl.plots.look import LINE_STYLES, Theme, add_legend, label_axes, percent_ticks, plot_axes, quoted
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.report_table import band_text

_FAR = 3.0  # scores so many times the usual spread away go to the outermost bins


def plot_scores(report: ProbeReport, ax: Any = None, *, threshold: float | None = None, theme: Theme = "light") -> Any:
    """Histogram of the scores (logits) of each class, as shares of it, with the logit above which the probe says the second
    class. threshold: another to mark, as a logit, such as that of the probe's file. Returns and raises as `plot_roc`."""
    examples = judged_examples(report, "a histogram of scores")
    ax, look = plot_axes(ax, theme, 3)
    shown, is_cut = _without_far_ones(examples.scores)
    edges = _edges(shown)
    for at, label in enumerate(report.classes):
        values = shown[examples.labels == at]
        weights = np.full(len(values), 1 / len(values))
        colour, kind = look.series[at], {"bins": edges, "weights": weights}
        ax.hist(values, histtype="stepfilled", color=colour, alpha=0.25, **kind)
        words = f"{quoted(label)}: {len(values):,} {report.level}s"
        ax.hist(values, histtype="step", edgecolor=colour, linewidth=1.6, linestyle=LINE_STYLES[at], label=words, **kind)
    if ((examples.scores > 0) == (examples.predicted == 1)).all():  # else probabilities were formed in another way
        ax.axvline(0.0, color=look.ink, linewidth=1.2, label=f"{quoted(report.classes[1])} is said to the right of 0")
    if threshold is not None and edges[0] <= threshold <= edges[-1]:
        ax.axvline(threshold, color=look.muted, linewidth=1.2, linestyle=":", label=f"the file's threshold, {threshold:.2f}")
    percent_ticks(ax.yaxis)
    ax.grid(axis="y", color=look.grid, linewidth=0.6)
    beyond = "; outermost bins: and beyond" if is_cut else ""
    label_axes(ax, look, "Scores by class", f"score (logit){beyond}", f"{report.level}s of the class, %")
    add_legend(ax, look)
    return ax


def plot_reliability(report: ProbeReport, ax: Any = None, *, theme: Theme = "light") -> Any:
    """Share of positives by mean probability, in the bins of equal mass that the calibration error has.

    Lines: Wilson's (1927) interval of the share, with the number of prompts in a bin as its size, since the tokens of one
    prompt are no independent evidence. Returns and raises as `plot_roc`.
    """
    examples = judged_examples(report, "a reliability diagram")
    ax, look = plot_axes(ax, theme, 4)
    is_positive, probabilities = examples.labels == 1, examples.probabilities[:, 1]
    bins = CalibrationBins(is_positive, probabilities)
    index = bins.index()
    parts = [bins.order[index == one] for one in np.unique(index)]
    means = np.array([probabilities[part].mean() for part in parts])
    shares = np.array([is_positive[part].mean() for part in parts])
    n_prompts = np.array([len(np.unique(examples.prompts[part])) for part in parts])
    low, high = wilson_interval(shares, n_prompts, report.confidence)
    ax.plot([0, 1], [0, 1], color=look.muted, linestyle=":", linewidth=1, label="calibrated")
    words = f"share of {quoted(report.classes[1])} with {100 * report.confidence:g} % interval"
    ax.vlines(means, low, high, color=look.series[0], linewidth=1.4)
    point: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1, "markeredgecolor": look.surface}
    ax.plot(means, shares, color=look.series[0], label=words, zorder=4, clip_on=False, **point)
    error = report.metrics.get("calibration_error")
    told = [_sizes([len(part) for part in parts], report.level)]
    for words in (*([] if error is None else [f"calibration error {band_text(error)}"]), *told):
        ax.plot([], [], linestyle="none", label=words)
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(0.0, 1.02)
    percent_ticks(ax.xaxis)
    percent_ticks(ax.yaxis)
    ax.grid(color=look.grid, linewidth=0.6)
    label_axes(ax, look, "Reliability", "mean probability that the probe gives, %", "share that is so, %")
    add_legend(ax, look)
    return ax


def wilson_interval(share: Array, n: Array, confidence: float) -> tuple[Array, Array]:
    """Score interval of a binomial share (Wilson 1927): low and high, of the shape of share and n."""
    z = norm.ppf((1 + confidence) / 2)
    middle = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(0.0, (middle - half) / (1 + z**2 / n)), np.minimum(1.0, (middle + half) / (1 + z**2 / n))


def _sizes(counts: list[int], level: str) -> str:
    smallest, largest = min(counts), max(counts)
    of = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    return f"{len(counts)} bins of {of} {level}s"


def _without_far_ones(scores: Array) -> tuple[Array, bool]:
    """Scores with the few that would make a picture of all others a single bar moved to the edge, and whether any were."""
    low, high = np.quantile(scores, [0.05, 0.95])
    room = _FAR * max(high - low, 1.0)
    near = np.clip(scores, low - room, high + room)
    return near, bool((near != scores).any())


def _edges(scores: Array) -> Array:
    """Of bins that hold all scores."""
    low, high = float(scores.min()), float(scores.max())
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, int(np.clip(2 * np.sqrt(len(scores)), 8, 40)) + 1)
