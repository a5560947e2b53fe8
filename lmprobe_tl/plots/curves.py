"""ROC and precision-recall curves of an evaluation, with its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmprobe_tl.measures import Measure
from lmprobe_tl.metrics import Array, Ranking, RocCounts
from lmprobe_tl.plots.judged import control_scores, judged_examples, resamples_of
from lmprobe_tl.plots.look import LINE_STYLES, Look, Theme, add_legend, label_axes, percent_ticks, plain, plot_axes, quoted
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.report_table import band_text, rate_of
from lmprobe_tl.scored import Scored

_N_STEPS = 80  # places at which the band is drawn
_LEAST = 1e-6
_N_COLOURS = 3  # of controls; a second round has other line styles


def plot_roc(report: ProbeReport, ax: Any = None, *, theme: Theme = "light") -> Any:
    """True positive rate by false positive rate, which is on a logarithmic axis: what a monitor costs is decided on its
    left.

    The line has a step at each threshold and shows what `tpr_at_fpr` gives, where ties are flagged together. Band: interval
    of the true positive rate at each false positive rate; points: TPR at the report's FPRs; thin lines: controls with a
    single draw; shaded: below one negative. Returns matplotlib's Axes. InputError for other than two classes, and where
    matplotlib is not installed.
    """
    examples = judged_examples(report, "a ROC curve")
    controls = _controls(report, examples)
    ax, look = plot_axes(ax, theme, len(controls) + 6)
    one_negative = 1 / int((examples.labels == 0).sum())
    lowest = max(_LEAST, 10.0 ** math.floor(math.log10(one_negative / 2)))
    rates = np.geomspace(lowest, 1.0, _N_STEPS)
    _draw_curves(ax, report, "auroc", [(None, examples.scores), *controls], examples, look)
    _draw_points(ax, report, look)
    ax.plot(rates, rates, color=look.muted, linestyle=":", linewidth=1, label="chance")
    _draw_band(ax, report, examples, rates, look)
    ax.axvspan(lowest, one_negative, color=look.grid, alpha=0.5, linewidth=0, zorder=0, label="below one false positive")
    ax.set_xscale("log")
    ax.set_xlim(lowest, 1.0)
    ax.set_ylim(0.0, 1.02)
    percent_ticks(ax.xaxis, [10.0**power for power in range(round(math.log10(lowest)), 1)])
    percent_ticks(ax.yaxis)
    ax.grid(color=look.grid, linewidth=0.6)
    label_axes(ax, look, "ROC, with AUROC", f"false positives, % of {_negatives(report)} (log)", "true positives, %")
    add_legend(ax, look)
    return ax


def plot_precision_recall(report: ProbeReport, ax: Any = None, *, theme: Theme = "light") -> Any:
    """Precision by recall as a step at each threshold; thin lines: controls; dotted: the share of positives, which guessing
    reaches. Returns and raises as `plot_roc`."""
    examples = judged_examples(report, "a precision-recall curve")
    controls = _controls(report, examples)
    ax, look = plot_axes(ax, theme, len(controls) + 2)
    share = float((examples.labels == 1).mean())
    _draw_curves(ax, report, "auprc", [(None, examples.scores), *controls], examples, look)
    ax.axhline(share, color=look.muted, linestyle=":", linewidth=1, label=f"share of positives {share:.3f}")
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(0.0, 1.02)
    percent_ticks(ax.xaxis)
    percent_ticks(ax.yaxis)
    ax.grid(color=look.grid, linewidth=0.6)
    label_axes(ax, look, "Precision and recall, with AUPRC", "recall: positives found, %", "precision: of those flagged, %")
    add_legend(ax, look)
    return ax


def _draw_curves(
    ax: Any, report: ProbeReport, metric: str, scorings: list[tuple[str | None, Array]], examples: Scored, look: Look
) -> None:
    """A line for the probe (None) and for each control, with the metric in the legend."""
    curve = {"auroc": _roc, "auprc": _precision_recall}[metric]
    for at, (name, scores) in enumerate(scorings):
        metrics = report.metrics if name is None else report.controls[name].metrics
        style: dict[str, Any] = {"color": look.series[0], "linewidth": 1.8, "zorder": 4}
        if name is not None:
            colour, line = look.series[2 + at % _N_COLOURS], LINE_STYLES[1 + (at + at // _N_COLOURS) % _N_COLOURS]
            style = {"color": colour, "linestyle": line, "linewidth": 1}
        words = "probe" if name is None else plain(name.replace("_", " ").strip(), 24)
        counts = Ranking(examples.labels == 1, scores).curve(np.ones(len(scores)))
        ax.plot(*curve(counts), drawstyle="steps-post", label=f"{words} {_band(metrics, metric)}", **style)


def _roc(counts: RocCounts) -> tuple[Array, Array]:
    """False and true positive rates, [n_thresholds + 1] each, from nothing flagged to all."""
    rates = [part / part[-1] for part in (counts.false_positives, counts.true_positives)]
    return rates[0], rates[1]


def _precision_recall(counts: RocCounts) -> tuple[Array, Array]:
    """Recall and precision, [n_thresholds + 1] each, from all flagged to nothing, whose precision is set to 1."""
    hits, flagged = counts.true_positives, counts.true_positives + counts.false_positives
    precision = np.divide(hits, flagged, out=np.ones_like(hits), where=flagged > 0)
    return (hits / hits[-1])[::-1], precision[::-1]


def _draw_band(ax: Any, report: ProbeReport, examples: Scored, rates: Array, look: Look) -> None:
    resamples = resamples_of(report, examples)
    if not resamples.enough:
        return
    ranking = Ranking(examples.labels == 1, examples.scores)

    def heights(weight: Array) -> Array:
        counts = ranking.curve(weight)
        found = np.empty((len(weight), len(rates)))
        for row, (wrong, right) in enumerate(zip(counts.false_positives, counts.true_positives, strict=True)):
            found[row] = right[np.searchsorted(wrong, rates * wrong[-1] * (1 + 1e-12), side="right") - 1] / right[-1]
        return found

    values = resamples.measured(heights, ranking.order)
    ends = [(1 - report.confidence) / 2, (1 + report.confidence) / 2]
    low, high = np.nanquantile(values, ends, axis=0)
    label = f"{100 * report.confidence:g} % interval of the probe"
    ax.fill_between(rates, low, high, color=look.series[0], alpha=0.16, linewidth=0, label=label)


def _draw_points(ax: Any, report: ProbeReport, look: Look) -> None:
    """TPR at each FPR of the report, with its interval."""
    for name, one in report.metrics.items():
        rate = rate_of(name)
        if not name.startswith("tpr_at_fpr_") or one.value is None or rate <= 0:
            continue
        label = f"TPR {band_text(one)} at {100 * rate:g} %"
        point: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none", "markeredgecolor": look.surface}
        ax.plot([rate], [one.value], color=look.series[1], label=label, zorder=6, clip_on=False, **point)
        if one.low is not None:
            ax.vlines([rate], [one.low], [one.high], color=look.series[1], linewidth=1.4, zorder=5)


def _controls(report: ProbeReport, examples: Scored) -> list[tuple[str | None, Array]]:
    found: list[tuple[str, Array | None]] = [
        (name, control_scores(one, len(examples.labels))) for name, one in report.controls.items()
    ]
    return [(name, scores) for name, scores in found if scores is not None]


def _band(metrics: Mapping[str, Measure], name: str) -> str:
    return band_text(metrics[name]) if name in metrics else ""


def _negatives(report: ProbeReport) -> str:
    return f"{report.class_counts[0]:,} {report.level}s {quoted(report.classes[0], 14)}"
