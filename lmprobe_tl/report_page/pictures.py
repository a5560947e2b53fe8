"""The pictures of the page, or why there are none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lmprobe_tl.errors import InputError
from lmprobe_tl.plots import plot_lengths, plot_precision_recall, plot_reliability, plot_roc, plot_scores
from lmprobe_tl.plots.svg import inline_svg
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.report_page.markup import Html, joined, tag
from lmprobe_tl.report_table import band_text


def pictures(report: ProbeReport, threshold: float | None) -> Html:
    """All that the report has the data for; the others are named, with the reason."""
    drawn, missing = [], []
    for name, plot, caption in _plots(report, threshold):
        try:
            svg = inline_svg(plot(report), name.replace(" ", "-").lower(), f"{name}. {caption}")
        except InputError as error:
            missing.append((name, str(error)))
            continue
        drawn.append(tag("figure", [Html(svg), tag("figcaption", caption)]))
    parts = [tag("div", drawn, class_="pictures")] if drawn else []
    for why in dict.fromkeys(why for _, why in missing):
        names = ", ".join(name for name, reason in missing if reason == why)
        parts.append(tag("p", f"Not drawn: {names}. {why}", class_="quiet"))
    return joined(parts)


def _plots(report: ProbeReport, threshold: float | None) -> list[tuple[str, Callable[[ProbeReport], Any], str]]:
    shown = {name: band_text(one) for name, one in report.metrics.items()}
    return [
        (
            "ROC curve",
            plot_roc,
            f"AUROC {shown.get('auroc', '-')}. The further left, the fewer false alarms; a monitor works at the left end.",
        ),
        ("Scores by class", partial(plot_scores, threshold=threshold), "The less they overlap, the better."),
        (
            "Precision-recall curve",
            plot_precision_recall,
            f"AUPRC {shown.get('auprc', '-')}. It depends on how many positives there are; the judged prompts may have more "
            "than real use.",
        ),
        (
            "Reliability diagram",
            plot_reliability,
            f"Calibration error {shown.get('calibration_error', '-')}. On the dotted line probabilities mean what they say.",
        ),
        ("AUROC by length", plot_lengths, "A fair probe is as good on long prompts as on short ones."),
    ]
