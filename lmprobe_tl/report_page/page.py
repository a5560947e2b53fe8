"""The whole page: the verdict first, then what it rests on, then what the probe sees in single texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmprobe_tl.errors import InputError
from lmprobe_tl.files import write_atomically
from lmprobe_tl.given_probes import as_weights
from lmprobe_tl.live.watches import threshold_logit
from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.probe_summary import probe_summary
from lmprobe_tl.report_page.examples import examples
from lmprobe_tl.report_page.markup import Html, folded, tag
from lmprobe_tl.report_page.pictures import pictures
from lmprobe_tl.report_page.style import style_sheet
from lmprobe_tl.report_page.tables import controls_table, facts_table, groups_table, metrics_table, shift_table
from lmprobe_tl.report_table import interval_line
from lmprobe_tl.weights import ProbeWeights

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SIGNS = {"beats its controls": ("good", "✓"), "undecided": ("unsure", "?")}


def save_report(report: ProbeReport, path: str | Path, *, probe: Any = None, max_examples: int = 48) -> Path:
    """Write an evaluation as one HTML page and return its path; an older file is replaced, whole or not at all.

    The page loads nothing, runs no script, and is the same for the same report. probe: the `ProbeWeights`, fitted `Probe` or
    probe file that was evaluated, to tell what is in it. max_examples: texts shown, the most confident errors first; they
    are there if the report was made with keep_tokens=True. Without matplotlib the page says which pictures are missing.
    Raises InputError for a probe of another name and for max_examples below 0.

    >>> save_report(evaluate_probe(probe, prompts, labels, keep_tokens=True), "probe.html")  # doctest: +SKIP
    """
    if max_examples < 0:
        raise InputError(f"max_examples is {max_examples}; expected 0 or more.")
    weights = None if probe is None else as_weights(probe)
    if weights is not None and weights.name != report.probe:
        raise InputError(f"the report is of the probe {report.probe!r}, but the probe given is {weights.name!r}.")
    path = Path(path)
    write_atomically(path, _page(report, weights, max_examples).encode())
    return path


def _page(report: ProbeReport, weights: ProbeWeights | None, max_examples: int) -> str:
    threshold = None
    if weights is not None and weights.is_binary and weights.spec.threshold is not None:
        threshold = threshold_logit(weights)
    sections = [
        tag("header", [tag("h1", f"Evaluation of the probe {report.probe!r}"), tag("p", _about(report), class_="quiet")]),
        _section("Verdict", [_verdict(report)]),
        _section("Metrics", [tag("p", interval_line(report.confidence, report.n_bootstrap)), metrics_table(report)]),
    ]
    if report.controls or report.left_out:
        sections.append(_section("Controls", [controls_table(report)]))
    if report.groups:
        sections.append(_section("Groups", [groups_table(report)]))
    if report.shift is not None:
        sections.append(_section("Other prompts", [shift_table(report.shift)]))
    sections.append(_section("Pictures", [pictures(report, threshold)]))
    if max_examples:
        sections.append(_section("Examples", [examples(report, max_examples)]))
    if weights is not None:
        summary = facts_table("What is in the probe", probe_summary(weights).items())
        sections.append(_section("The probe", [folded("Contents of the probe file", summary, is_open=True)]))
    sections.append(_section("How it was judged", [facts_table("Settings", _settings(report))]))
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="referrer" content="no-referrer">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"Evaluation of the probe {report.probe!r}"),
        tag("style", Html(style_sheet())),
    ]
    return f"<!DOCTYPE html>\n{tag('html', [tag('head', head), tag('body', tag('main', sections))], lang='en')}\n"


def _section(title: str, content: list[Html]) -> Html:
    return tag("section", [tag("h2", title), *content])


def _about(report: ProbeReport) -> str:
    counts = ", ".join(f"{label!r}: {n:,}" for label, n in zip(report.classes, report.class_counts, strict=True))
    tokens = "" if report.level == "prompt" else f", {report.n_examples:,} tokens"
    model = "" if report.model is None else f" of {report.model}"
    return (
        f"{', '.join(report.hook_points)}{model}; pooling {report.pooling}; {report.n_prompts:,} prompts{tokens} ({counts})"
    )


def _verdict(report: ProbeReport) -> Html:
    kind, sign = _SIGNS.get(report.conclusion, ("bad", "✗"))
    notes = [tag("p", f"Note: {note}", class_="quiet") for note in report.notes]
    conclusion = tag("strong", f"{sign} {report.conclusion[:1].upper()}{report.conclusion[1:]}")
    return tag("div", [conclusion, tag("p", report.verdict), *notes], class_=f"verdict {kind}")


def _settings(report: ProbeReport) -> list[tuple[str, str]]:
    known = "not known" if report.n_trained_on is None else f"{report.n_trained_on:,} of {report.n_prompts:,}"
    return [
        ("judged", f"{report.n_prompts:,} prompts, {report.n_examples:,} {report.level}s"),
        ("training prompts for controls", "none given" if report.n_train is None else f"{report.n_train:,}"),
        ("judged prompts that were trained on", known),
        ("resamples of prompts", f"{report.n_bootstrap:,}"),
        ("draws of random controls", f"{report.n_draws:,}"),
        ("confidence of intervals", f"{report.confidence * 100:g} %"),
        ("random state", str(report.random_state)),
    ]
