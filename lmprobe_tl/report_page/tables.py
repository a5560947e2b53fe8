"""The tables of the page: metrics, controls, groups and shift, with the numbers of the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lmprobe_tl.measures import Difference, Measure
from lmprobe_tl.probe_report import ControlReport, ProbeReport, ShiftReport
from lmprobe_tl.report_page.markup import Html, folded, joined, table, tag
from lmprobe_tl.report_table import (
    interval_text,
    metric_words,
    ordered_metrics,
    share_text,
    signed_text,
)


def metrics_table(report: ProbeReport) -> Html:
    """A row for each metric."""
    rows = []
    for name in ordered_metrics(report.metrics):
        one = report.metrics[name]
        rows.append(
            (
                _named(metric_words(name), one.note),
                _value(one),
                tag("span", interval_text(one.low, one.high) or "-", class_="range"),
            )
        )
    return table("The probe", ["metric", "value", "interval"], rows)


def controls_table(report: ProbeReport) -> Html:
    """What the controls reach, and how far the probe is above them on the same resamples."""
    rows: list[Sequence[str]] = [
        (_named(control_words(name), _about(one)), _cell(one.metrics["auroc"]), _compared(one, report.n_bootstrap))
        for name, one in report.controls.items()
    ]
    rows += [(_named(control_words(name), f"not run: {why}"), "-", "-") for name, why in report.left_out.items()]
    parts = [table("Controls, by AUROC", ["control", "AUROC", "probe - control"], rows)]
    if report.controls:
        several = {control_words(name): one.metrics for name, one in report.controls.items()}
        parts.append(folded("All metrics of the controls", all_metrics("Controls", "control", several)))
        apart = {control_words(name): one.differences for name, one in report.controls.items()}
        parts.append(
            folded(
                "All differences: probe - control", _all_differences("Probe - control", "control", apart, report.n_bootstrap)
            )
        )
    return joined(parts)


def groups_table(report: ProbeReport) -> Html:
    """The probe on the prompts of each group."""
    rows = [
        (
            _with_note(name, one.n_prompts, one.metrics["auroc"]),
            *(_cell(one.metrics[at]) for at in ("auroc", "accuracy")),
        )
        for name, one in report.groups.items()
    ]
    parts = [table("The probe by group", ["group", "AUROC", "accuracy"], rows)]
    if report.worst_group is not None and report.worst_by is not None:
        parts.append(tag("p", f"Worst by {metric_words(report.worst_by)}: {report.worst_group}"))
    every = {name: one.metrics for name, one in report.groups.items()}
    return joined([*parts, folded("All metrics by group", all_metrics("Groups", "group", every))])


def shift_table(shift: ShiftReport) -> Html:
    """The probe on other prompts than those it was trained on, and how far it drops there."""
    sets = [("held out", shift.held_out), *shift.shifted.items()]
    rows = [
        (
            _with_note(name, one.n_prompts, one.metrics["auroc"]),
            _cell(one.metrics["auroc"]),
            _difference(one.drops.get("auroc"), shift.n_bootstrap) if at else "",
        )
        for at, (name, one) in enumerate(sets)
    ]
    parts = [table("The probe on other prompts", ["prompts from", "AUROC", "drop"], rows)]
    columns = [f"{name} ({one.n_examples:,} {shift.level}s)" for name, one in sets]
    every = dict(zip(columns, (one.metrics for _, one in sets), strict=True))
    parts.append(folded("All metrics on other prompts", all_metrics("Other prompts", "prompts from", every)))
    drops = {name: one.drops for name, one in shift.shifted.items()}
    return joined(
        [*parts, folded("All drops: held out - other", _all_differences("Drops", "prompts from", drops, shift.n_bootstrap))]
    )


def all_metrics(caption: str, first: str, entries: Mapping[str, Mapping[str, Measure]]) -> Html:
    """A row for each entry and a column for each metric."""
    names = ordered_metrics({name for metrics in entries.values() for name in metrics})
    rows = [[entry, *(_cell(metrics.get(name)) for name in names)] for entry, metrics in entries.items()]
    return table(caption, [first, *map(metric_words, names)], rows)


def facts_table(caption: str, facts: Iterable[tuple[str, str]]) -> Html:
    """Two columns of names and values."""
    return tag("div", table(caption, [], facts), class_="facts")


def control_words(name: str) -> str:
    return name.replace("_", " ")


def _all_differences(caption: str, first: str, entries: Mapping[str, Mapping[str, Difference]], n_bootstrap: int) -> Html:
    names = ordered_metrics({name for differences in entries.values() for name in differences})
    rows = [
        [entry, *(_difference(differences.get(name), n_bootstrap) for name in names)]
        for entry, differences in entries.items()
    ]
    return table(caption, [first, *map(metric_words, names)], rows)


def _value(one: Measure | None) -> str:
    return "-" if one is None or one.value is None else f"{one.value:.3f}"


def _cell(one: Measure | None) -> Html:
    value = _value(one)
    return _with_range(value, "" if one is None or one.value is None else interval_text(one.low, one.high))


def _difference(one: Difference | None, n_bootstrap: int) -> Html:
    """With the share of resamples where it is 0 or below, in words that need no colour."""
    value, _, interval = signed_text(one).partition(" ")
    share = share_text(one, n_bootstrap)
    return joined(
        [_with_range(value, interval), *([Html("<br>"), tag("span", f"P(≤0) {share}", class_="quiet")] if share else [])]
    )


def _with_range(value: str, interval: str) -> Html:
    return joined([value, " ", tag("span", interval, class_="range")] if interval else [value])


def _compared(one: ControlReport, n_bootstrap: int) -> Html:
    """The difference, and in words whether the control is beaten."""
    difference = one.differences.get("auroc")
    if difference is None or difference.low is None:
        words = tag("span", "? not known", class_="unsure")
    else:
        words = tag("span", "✓ beaten", class_="good") if one.is_beaten else tag("span", "✗ not beaten", class_="bad")
    return joined([_difference(difference, n_bootstrap), Html("<br>"), words])


def _named(name: str, note: str) -> Html:
    return joined([name, *([tag("div", note, class_="note")] if note else [])])


def _with_note(name: str, n_prompts: int, one: Measure) -> Html:
    return _named(
        name, "; ".join([f"{n_prompts:,} prompt{'s' if n_prompts != 1 else ''}", *([one.note] if one.value is None else [])])
    )


def _about(one: ControlReport) -> str:
    draws = f"mean of {len(one.draws)} draws, from {min(one.draws):.3f} to {max(one.draws):.3f}" if one.draws else ""
    return "; ".join(filter(None, [draws, one.note]))
