"""AUROC by length of the prompts: a probe that is good on short ones alone looks good on the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.bootstrap import Resamples
from lmprobe_tl.errors import InputError
from lmprobe_tl.measures import sampled_auroc
from lmprobe_tl.plots.judged import judged_examples
from lmprobe_tl.plots.look import SMALL, Theme, add_legend, label_axes, plain, plot_axes
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.report_table import band_text

_WHAT = "AUROC by length"


def plot_lengths(report: ProbeReport, ax: Any = None, *, n_bins: int = 5, theme: Theme = "light") -> Any:
    """AUROC on the prompts of each of `n_bins` quantiles of length in tokens, with intervals and the number of prompts;
    equal lengths are never parted, so there may be fewer. A bin of a single class has no AUROC, and says so.

    Returns and raises as `plot_roc`.
    """
    examples = judged_examples(report, _WHAT)
    if report.examples.n_tokens is None:
        raise InputError(f"{_WHAT} needs the number of tokens of each prompt, which this report does not hold.")
    if n_bins < 1:
        raise InputError(f"n_bins is {n_bins}; expected 1 or more.")
    ax, look = plot_axes(ax, theme, 3)
    lengths = np.array(report.examples.n_tokens, dtype=np.int64)
    names = []
    for at, chosen in enumerate(length_bins(lengths, n_bins)):
        part = examples.of_prompts(chosen)
        shortest, longest = int(lengths[chosen].min()), int(lengths[chosen].max())
        span = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        names.append(f"{span}\nn {int(chosen.sum()):,}")
        if len(np.unique(part.labels)) < 2:
            ax.text(at, 0.5, "one class", rotation=90, ha="center", va="center", fontsize=SMALL, color=look.muted)
            continue
        resamples = Resamples.drawn(
            part.labels,
            part.prompts,
            n_bootstrap=report.n_bootstrap,
            confidence=report.confidence,
            random_state=report.random_state,
        )
        sampled = sampled_auroc(part.labels, part.scores, resamples)
        if sampled.value is None or sampled.values is None:
            continue
        interval = resamples.interval(sampled.value, sampled.values)
        ax.plot([at], [interval.value], marker="o", markersize=5, color=look.series[0], clip_on=False, zorder=4)
        if interval.low is not None:
            ax.vlines([at], [interval.low], [interval.high], color=look.series[0], linewidth=1.6)
    overall = f"all prompts {band_text(report.metrics['auroc'])}"
    if report.metrics["auroc"].value is not None:
        ax.axhline(
            report.metrics["auroc"].value, color=look.series[1], linestyle="--", linewidth=1, label=plain(overall, 60)
        )
    ax.axhline(0.5, color=look.muted, linestyle=":", linewidth=1, label="chance")
    ax.set_xticks(range(len(names)), names, fontsize=SMALL)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylim(min(0.45, ax.get_ylim()[0]), 1.02)
    ax.grid(axis="y", color=look.grid, linewidth=0.6)
    label_axes(ax, look, _WHAT, "tokens in the prompt; n prompts", "AUROC")
    add_legend(ax, look)
    return ax


def length_bins(lengths: NDArray[np.int64], n_bins: int) -> list[NDArray[np.bool_]]:
    """Which prompts are in each quantile of their lengths [n_prompts], from the shortest on; none is empty."""
    tops = np.unique(np.quantile(lengths, np.arange(1, n_bins + 1) / n_bins, method="inverted_cdf"))
    index = np.searchsorted(tops, lengths)
    return [index == at for at in range(len(tops))]
