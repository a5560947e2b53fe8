"""Evaluations as text of at most 80 columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from lmprobe_tl.measures import Difference, Measure
from lmprobe_tl.probe_report import ControlReport, GroupReport, ProbeReport, ShiftReport

WIDTH = 80
_NAME = 20
_WORDS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "brier": "Brier score",
}


def report_table(report: ProbeReport) -> str:
    """Metrics, controls, groups, shift, verdict and notes."""
    pooling = f"pooling {report.pooling}"
    counts = ", ".join(f"{label}: {n:,}" for label, n in zip(report.classes, report.class_counts, strict=True))
    examples = "" if report.level == "prompt" else f", {report.n_examples:,} tokens"
    about = [
        *_wrapped(f"probe {report.probe!r} at {', '.join(report.hook_points)}, {pooling}"),
        *_wrapped(f"{report.n_prompts:,} prompts{examples} ({counts})"),
        *_wrapped(interval_line(report.confidence, report.n_bootstrap)),
    ]
    blocks = [about, metric_lines(report.metrics)]
    if report.controls or report.left_out:
        blocks.append(_control_lines(report.controls, report.left_out, report.n_bootstrap))
    if report.groups:
        blocks.append(_group_lines(report.groups, report.worst_group, report.worst_by))
    if report.shift is not None:
        blocks.append(_shift_lines(report.shift))
    n_ran = len(report.controls)
    share = f" ({n_ran} of {n_ran + len(report.left_out)} ran)" if n_ran and report.left_out else ""
    blocks.append([f"verdict: {report.conclusion}{share}", *_wrapped(report.verdict, "  ")])
    if report.notes:
        blocks.append([line for note in report.notes for line in _wrapped(f"note: {note}", later="  ")])
    return "\n\n".join("\n".join(block) for block in blocks)


def shift_table(shift: ShiftReport) -> str:
    """A line for each set of prompts."""
    about = _wrapped(f"probe {shift.probe!r}") + _wrapped(interval_line(shift.confidence, shift.n_bootstrap))
    return "\n".join([*about, "", *_shift_lines(shift)])


def metric_lines(metrics: Mapping[str, Measure]) -> list[str]:
    """A line for each metric, in the order in which they are best read."""
    lines = [f"  {'metric':<{_NAME}}  value  interval"]
    for name in ordered_metrics(metrics):
        one = metrics[name]
        value = "    -" if one.value is None else f"{one.value:.3f}"
        start = f"  {metric_words(name):<{_NAME}}  {value}  {interval_text(one.low, one.high):<14}"
        lines += _wrapped(f"{start}  {one.note}".rstrip(), later=" " * 31)
    return lines


def ordered_metrics(names: Iterable[str]) -> list[str]:
    """Names of metrics in the order in which they are best read."""
    return sorted(names, key=lambda name: (list(_WORDS).index(name) if name in _WORDS else 2.5, -rate_of(name)))


def metric_words(name: str) -> str:
    """What a reader calls a metric."""
    return f"TPR at FPR {rate_of(name) * 100:g} %" if name.startswith("tpr_at_fpr_") else _WORDS[name]


def _control_lines(controls: Mapping[str, ControlReport], left_out: Mapping[str, str], n_bootstrap: int) -> list[str]:
    lines = [f"  {'control':<{_NAME}}  AUROC  {'interval':<14}  {'probe - control':<23}  P(<=0)"]
    for name, one in controls.items():
        auroc, difference = one.metrics["auroc"], one.differences.get("auroc")
        value = "    -" if auroc.value is None else f"{auroc.value:.3f}"
        lines.append(
            f"  {name:<{_NAME}}  {value}  {interval_text(auroc.low, auroc.high):<14}  {signed_text(difference):<23}  "
            f"{share_text(difference, n_bootstrap)}".rstrip()
        )
        if one.draws:
            lines.append(f"    mean of {len(one.draws)} draws, from {min(one.draws):.3f} to {max(one.draws):.3f}")
        lines += _wrapped(one.note, "    ") if one.note else []
    return lines + [line for name, why in left_out.items() for line in _wrapped(f"  not run: {name}: {why}", later="    ")]


def _group_lines(groups: Mapping[str, GroupReport], worst: str | None, worst_by: str | None) -> list[str]:
    lines = [f"  {'group':<{_NAME}}  prompts  {'AUROC':<20}  accuracy"]
    for name, one in groups.items():
        bands = [band_text(one.metrics[metric]) for metric in ("auroc", "accuracy")]
        lines.append(f"  {_fitted(name, _NAME)}  {one.n_prompts:>7,}  {bands[0]:<20}  {bands[1]}".rstrip())
        note = one.metrics["auroc"].note
        lines += _wrapped(note, "    ") if one.metrics["auroc"].value is None else []
    if worst is not None and worst_by is not None:
        lines += _wrapped(f"  worst by {metric_words(worst_by)}: {worst}", later="    ")
    return lines


def _shift_lines(shift: ShiftReport) -> list[str]:
    lines = [f"  {'prompts from':<{_NAME}}  prompts  {'AUROC':<20}  drop"]
    for name, one in [("held out", shift.held_out), *shift.shifted.items()]:
        drop = signed_text(one.drops.get("auroc")) if one is not shift.held_out else ""
        auroc = band_text(one.metrics["auroc"])
        lines.append(f"  {_fitted(name, _NAME)}  {one.n_prompts:>7,}  {auroc:<20}  {drop}".rstrip())
        lines += _wrapped(one.metrics["auroc"].note, "    ") if one.metrics["auroc"].value is None else []
    return lines


def interval_line(confidence: float, n_bootstrap: int) -> str:
    """What the intervals are."""
    return f"intervals: {confidence * 100:g} %, from {n_bootstrap:,} resamples of prompts"


def rate_of(name: str) -> float:
    """The FPR in the name of a 'tpr_at_fpr_...'; 0 for other metrics."""
    return float(name.removeprefix("tpr_at_fpr_")) if name.startswith("tpr_at_fpr_") else 0.0


def interval_text(low: float | None, high: float | None) -> str:
    """'[low, high]', or nothing where there is none."""
    return "" if low is None else f"[{low:.3f}, {high:.3f}]"


def band_text(one: Measure) -> str:
    """'value [low, high]' as far as they are known, else '-'."""
    return "-" if one.value is None else f"{one.value:.3f} {interval_text(one.low, one.high)}".rstrip()


def signed_text(one: Difference | None) -> str:
    """'+value [+low, +high]' as far as they are known, else '-'."""
    if one is None:
        return "-"
    return f"{one.value:+.3f}" if one.low is None else f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def share_text(one: Difference | None, n_bootstrap: int) -> str:
    """The share of resamples at 0 or below, or nothing where it is not known."""
    if one is None or one.share_at_most_zero is None:
        return ""
    least = max(1 / n_bootstrap, 0.001)  # so many resamples show no smaller one but 0
    return f"<{least:.3f}" if one.share_at_most_zero < least else f"{one.share_at_most_zero:.3f}"


def _wrapped(text: str, indent: str = "", *, later: str | None = None) -> list[str]:
    """Lines of at most 80 columns, where wide characters take two; spaces inside a line stay as they are."""
    lines, line, is_fresh = [], indent, True
    for gap, word in re.findall("( *)([^ ]+)", printable(text)):
        if not is_fresh and columns(line + gap + word) > WIDTH:
            lines.append(line)
            line, gap = indent if later is None else later, ""
        line += gap
        for char in word:  # a word may be longer than a line
            if columns(line + char) > WIDTH:
                lines.append(line)
                line = indent if later is None else later
            line += char
        is_fresh = False
    return [*lines, line]


def _fitted(name: str, width: int) -> str:
    """The name in exactly so many columns, cut short with three dots."""
    name = printable(name)
    if columns(name) > width:
        while columns(name) > width - 3:
            name = name[:-1]
        name += "..."
    return name + " " * (width - columns(name))


def printable(text: str) -> str:
    """Text with what no reader can see, such as control characters and marks of direction, spelt out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def columns(text: Sequence[str]) -> int:
    """How many columns of a terminal the text takes; wide characters take two."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)
