"""Evaluations as text of at most 80 columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

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
        *_wrapped(_interval_line(report.confidence, report.n_bootstrap)),
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
    about = _wrapped(f"probe {shift.probe!r}") + _wrapped(_interval_line(shift.confidence, shift.n_bootstrap))
    return "\n".join([*about, "", *_shift_lines(shift)])


def metric_lines(metrics: Mapping[str, Measure]) -> list[str]:
    """A line for each metric, in the order in which they are best read."""
    order = sorted(metrics, key=lambda name: (list(_WORDS).index(name) if name in _WORDS else 2.5, -_rate(name)))
    lines = [f"  {'metric':<{_NAME}}  value  interval"]
    for name in order:
        one = metrics[name]
        value = "    -" if one.value is None else f"{one.value:.3f}"
        start = f"  {metric_words(name):<{_NAME}}  {value}  {_interval(one.low, one.high):<14}"
        lines += _wrapped(f"{start}  {one.note}".rstrip(), later=" " * 31)
    return lines


def metric_words(name: str) -> str:
    """What a reader calls a metric."""
    return f"TPR at FPR {_rate(name) * 100:g} %" if name.startswith("tpr_at_fpr_") else _WORDS[name]


def _control_lines(controls: Mapping[str, ControlReport], left_out: Mapping[str, str], n_bootstrap: int) -> list[str]:
    lines = [f"  {'control':<{_NAME}}  AUROC  {'interval':<14}  {'probe - control':<23}  P(<=0)"]
    for name, one in controls.items():
        auroc, difference = one.metrics["auroc"], one.differences.get("auroc")
        value = "    -" if auroc.value is None else f"{auroc.value:.3f}"
        lines.append(
            f"  {name:<{_NAME}}  {value}  {_interval(auroc.low, auroc.high):<14}  {_signed(difference):<23}  "
            f"{_share(difference, n_bootstrap)}".rstrip()
        )
        if one.draws:
            lines.append(f"    mean of {len(one.draws)} draws, from {min(one.draws):.3f} to {max(one.draws):.3f}")
        lines += _wrapped(one.note, "    ") if one.note else []
    return lines + [line for name, why in left_out.items() for line in _wrapped(f"  not run: {name}: {why}", later="    ")]


def _group_lines(groups: Mapping[str, GroupReport], worst: str | None, worst_by: str | None) -> list[str]:
    lines = [f"  {'group':<{_NAME}}  prompts  {'AUROC':<20}  accuracy"]
    for name, one in groups.items():
        bands = [_band(one.metrics[metric]) for metric in ("auroc", "accuracy")]
        lines.append(f"  {_fitted(name, _NAME)}  {one.n_prompts:>7,}  {bands[0]:<20}  {bands[1]}".rstrip())
        note = one.metrics["auroc"].note
        lines += _wrapped(note, "    ") if one.metrics["auroc"].value is None else []
    if worst is not None and worst_by is not None:
        lines += _wrapped(f"  worst by {metric_words(worst_by)}: {worst}", later="    ")
    return lines


def _shift_lines(shift: ShiftReport) -> list[str]:
    lines = [f"  {'prompts from':<{_NAME}}  prompts  {'AUROC':<20}  drop"]
    for name, one in [("held out", shift.held_out), *shift.shifted.items()]:
        drop = _signed(one.drops.get("auroc")) if one is not shift.held_out else ""
        auroc = _band(one.metrics["auroc"])
        lines.append(f"  {_fitted(name, _NAME)}  {one.n_prompts:>7,}  {auroc:<20}  {drop}".rstrip())
        lines += _wrapped(one.metrics["auroc"].note, "    ") if one.metrics["auroc"].value is None else []
    return lines


def _interval_line(confidence: float, n_bootstrap: int) -> str:
    return f"intervals: {confidence * 100:g} %, from {n_bootstrap:,} resamples of prompts"


def _rate(name: str) -> float:
    return float(name.removeprefix("tpr_at_fpr_")) if name.startswith("tpr_at_fpr_") else 0.0


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"[{low:.3f}, {high:.3f}]"


def _band(one: Measure) -> str:
    return "-" if one.value is None else f"{one.value:.3f} {_interval(one.low, one.high)}".rstrip()


def _signed(one: Difference | None) -> str:
    if one is None:
        return "-"
    return f"{one.value:+.3f}" if one.low is None else f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def _share(one: Difference | None, n_bootstrap: int) -> str:
    if one is None or one.share_at_most_zero is None:
        return ""
    least = max(1 / n_bootstrap, 0.001)  # so many resamples show no smaller one but 0
    return f"<{least:.3f}" if one.share_at_most_zero < least else f"{one.share_at_most_zero:.3f}"


def _wrapped(text: str, indent: str = "", *, later: str | None = None) -> list[str]:
    """Lines of at most 80 columns, where wide characters take two; spaces inside a line stay as they are."""
    lines, line, is_fresh = [], indent, True
    for gap, word in re.findall("( *)([^ ]+)", _printable(text)):
        if not is_fresh and _columns(line + gap + word) > WIDTH:
            lines.append(line)
            line, gap = indent if later is None else later, ""
        line += gap
        for char in word:  # a word may be longer than a line
            if _columns(line + char) > WIDTH:
                lines.append(line)
                line = indent if later is None else later
            line += char
        is_fresh = False
    return [*lines, line]


def _fitted(name: str, width: int) -> str:
    """The name in exactly so many columns, cut short with three dots."""
    name = _printable(name)
    if _columns(name) > width:
        while _columns(name) > width - 3:
            name = name[:-1]
        name += "..."
    return name + " " * (width - _columns(name))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _columns(text: Sequence[str]) -> int:
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)
