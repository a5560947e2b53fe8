"""The page of an evaluation: data stay text, nothing is loaded, every number is the record's, and errors come first."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedded import embedded_model, embedded_tokenizer
from evaluation_reports import noisy, report_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_data import with_a_word
from test_cli import Run, no_model_may_load, run, write  # noqa: F401
from test_colours import contrast
from test_report import Page

from lmprobe_tl import Probe, ProbeReport, ProbeWeights, save_report
from lmprobe_tl.errors import InputError
from lmprobe_tl.probe_evaluation import _pieces
from lmprobe_tl.report_page.examples import MOST_PIECES, chosen_examples
from lmprobe_tl.report_page.markup import joined, tag, visible
from lmprobe_tl.report_page.style import N_STEPS, step_of
from lmprobe_tl.report_table import share_text

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&lt;</style></svg>$x$]]>\u202e\x07\u200b"
MILD = '"' + re.sub("[<>\"'&;=/()\\]]", "x", HOSTILE[1:])  # begins alike: names are sorted


def whole_report(word: str = "word", *, n: int = 30, **options: Any) -> ProbeReport:
    """A report with all parts, where `word` is each name and each text."""
    labels, scores = noisy(n, spread=3.0)
    texts = [["a ", f"{word}{at}", "\n", "\t", " end"] for at in range(n)]
    settings_: dict[str, Any] = {
        "classes": (f"no {word}", f"yes {word}"),
        "controls": {"length": noisy(n, 1, 4.0)[1], "shuffled_labels": [scores, -scores], word: noisy(n, 2, 9.0)[1]},
        "left_out": {"layer_0": f"since {word}"},
        "groups": [f"{word} {at // 2 % 2}" if at < n - 2 else f"one class {word}" for at in range(n - 1)] + [f"{word} 0"],
        "texts": texts,
        "token_scores": [[0.1, float(score), -1.0, 0.5, score / 2] for score in scores],
        "n_tokens": [3 + at % 7 for at in range(n)],
        "shifted": {word: noisy(24, 3, 3.0), f"all yes {word}": (np.ones(8, dtype=int), np.arange(8.0))},
        "probe": f"probe {word}",
        "model": word,
        "hook_points": (word,),
        "pooling": word,
        "verdict": f"The probe is {word}.",
        "notes": (f"note {word}",),
    }
    return report_of(labels, scores, **{**settings_, **options})


def text_of(report: ProbeReport, folder: Path, **options: Any) -> str:
    return save_report(report, folder / "page.html", **options).read_text(encoding="utf-8")


def cells(text: str) -> list[str]:
    return [" ".join(found.split()) for found in (*Page(text).texts("td"), *Page(text).texts("th"))]


# --- data stay text --------------------------------------------------------------------------------------------------------


def structure(text: str) -> list[tuple[str, list[str], str | None]]:
    """Tags with the names of their attributes and what says how they look or act."""
    return [(tag, sorted(values), values.get("class")) for tag, values, _ in Page(text).elements]


def test_hostile_names_and_texts_make_no_tag_and_no_attribute(tmp_path: Path) -> None:
    text = text_of(whole_report(HOSTILE), tmp_path)
    assert structure(text) == structure(text_of(whole_report(MILD), tmp_path))
    page = Page(text)
    assert not {"script", "img", "b onerror", "link", "iframe", "a", "form"} & {name for name, *_ in page.elements}
    names = {name for _, values, _ in page.elements for name in values}
    assert not {name for name in names if name.startswith("on")} and not names & {"src", "srcdoc", "action", "formaction"}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", text)
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x07", "\\x07").replace("\u200b", "\\u200b")
    for where in (page.texts("h1")[0], page.texts("title")[0], page.texts("pre")[0], page.texts("p")[0]):
        assert repr(HOSTILE)[1:-1] in where or shown in where
    assert f"since {shown}" in " ".join(cells(text)) and f"The probe is {shown}." in page.texts("p")


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_shown_whole_and_makes_no_tag(text: str) -> None:
    page = Page(str(tag("div", visible(text), title=text)))
    ((_, values, shown),) = [one for one in page.elements if one[0] == "div"]
    assert {name for name, *_ in page.elements} <= {"div", "span"}
    plain = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    assert values["title"] == plain
    kept = "\n\t\u00a0\u2002\u2003\u2009\u202f\u3000\u200c\u200d"
    assert shown == "".join(char if char.isprintable() or char in kept else repr(char)[1:-1] for char in text)
    assert Page(f"<p>{joined([text])}</p>").texts("p") == [plain]


def test_line_ends_and_tabs_have_marks_and_special_tokens_are_pieces(tmp_path: Path) -> None:
    page = Page(text_of(whole_report(), tmp_path))
    assert {"nl", "tab"} <= {values.get("class") for _, values, _ in page.elements}
    assert all(re.fullmatch("a word\\d+\n\t end", text) for text in page.texts("pre"))
    tokenizer = embedded_tokenizer()
    ids = tokenizer("x = 😀", add_special_tokens=False)["input_ids"]
    row = [*ids, tokenizer.eos_token_id, ids[0]]
    scores = np.arange(len(row), dtype=np.float64)
    pieces = _pieces(tokenizer, row, scores)
    assert pieces[-2:] == [(tokenizer.eos_token, len(ids)), (tokenizer.decode(ids[:1]), len(ids) + 1.0)]
    assert "".join(text for text, _ in pieces[:-2]) == "x = 😀" and pieces[-3][1] == len(ids) - 1.0


# --- nothing is loaded -----------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file_no_network_and_no_script(tmp_path: Path) -> None:
    text = text_of(whole_report(), tmp_path)
    assert not re.search(r'(src|href|action|data|poster)\s*=\s*"(?!#)|url\((?!#)|@import|https?:|//|<script|<link', text)
    policies = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    assert str(tmp_path) not in text
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 20
    assert {one for one in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for one in one if one} <= set(ids)
    assert text.count("<svg") == 5 and text == text_of(whole_report(), tmp_path)


def test_readers_of_any_kind_are_served(tmp_path: Path) -> None:
    text = text_of(whole_report(), tmp_path)
    page = Page(text)
    assert 'name="viewport"' in text and "@media print" in text and "(prefers-color-scheme: dark)" in text
    assert '<html lang="en">' in text
    headers = [values for name, values, _ in page.elements if name == "th"]
    assert headers and all(values.get("scope") in ("col", "row") for values in headers)
    assert len(page.texts("caption")) == len(page.texts("table")) > 5
    pictures = [values for name, values, _ in page.elements if name == "svg"]
    assert all(values["role"] == "img" and len(values["aria-label"] or "") > 30 for values in pictures)
    assert "✓ beaten" in " ".join(cells(text)) or "✗ not beaten" in " ".join(cells(text))


def test_text_stands_out_in_both_themes(tmp_path: Path) -> None:
    sheet = re.findall("<style>(.*?)</style>", text_of(whole_report(), tmp_path), re.DOTALL)[0]
    light, dark = sheet.split("@media screen and (prefers-color-scheme: dark)")
    for part in (light, dark.split("@media")[0]):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))
        for name in ("ink", "quiet", "good", "bad", "unsure", "muted"):
            for behind in ("surface", "raised"):
                assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)
        steps = dict(re.findall(r"\.s(\d+) { background: (#[0-9a-f]{6}); }", part))
        assert len(steps) == N_STEPS == len(set(steps.values()))
        assert all(contrast(colours["ink"], step) >= 4.5 for step in steps.values())
    assert [step_of(at) for at in (-1e9, 0.0, 1e9)] == [0, (N_STEPS - 1) / 2, N_STEPS - 1]


# --- every number is the record's ------------------------------------------------------------------------------------------


def numbers(value: Any) -> Iterator[float]:
    """All floats of a record, but those of single examples."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner) if key not in ("examples", "scores") else ()
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float):
        yield value


def test_every_number_of_the_tables_is_the_records_and_the_other_way_round(tmp_path: Path) -> None:
    report = whole_report()
    shown = re.findall(r"[+-]?\d+\.\d{3}", " ".join(cells(text_of(report, tmp_path))))
    record = {name: part for name, part in report.to_dict().items() if name != "examples"}
    known = set(numbers(record))
    known.add(1 / report.n_bootstrap)  # which stands for a share of 0
    known |= {float(one) for one in re.findall(r"reaches (\d\.\d{3}) by chance", json.dumps(record))}
    expected = {f"{value:.3f}" for value in known} | {f"{value:+.3f}" for value in known}
    assert len(shown) > 150 and set(shown) <= expected
    measures = [report.metrics, *(one.metrics for one in (*report.controls.values(), *report.groups.values()))]
    measures += [one.metrics for one in report.shift.shifted.values()]
    for one in (measure for metrics in measures for measure in metrics.values() if measure.value is not None):
        assert {f"{value:.3f}" for value in (one.value, one.low, one.high) if value is not None} <= set(shown)
    for differences in (one.differences for one in report.controls.values()):
        for one in differences.values():
            assert {f"{one.value:+.3f}", f"{one.low:+.3f}", f"{one.high:+.3f}"} <= set(shown)


def test_the_tables_say_what_stands_for_what(tmp_path: Path) -> None:
    report = whole_report()
    text = text_of(report, tmp_path)
    rows = [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in re.findall("<tr>(.*?)</tr>", text, re.DOTALL)]
    auroc, length = report.metrics["auroc"], report.controls["length"]
    assert f"AUROC {auroc.value:.3f} [{auroc.low:.3f}, {auroc.high:.3f}]" in rows
    assert "TPR at FPR 1 % needs 100 negatives, has 15 - -" in rows
    own, difference = length.metrics["auroc"], length.differences["auroc"]
    assert difference.share_at_most_zero is not None
    beaten = "✓ beaten" if length.is_beaten else "✗ not beaten"
    assert (
        f"length {own.value:.3f} [{own.low:.3f}, {own.high:.3f}] {difference.value:+.3f} [{difference.low:+.3f}, "
        f"{difference.high:+.3f}] P(≤0) {share_text(difference, report.n_bootstrap).replace('<', '&lt;')} {beaten}"
    ) in rows
    assert "layer 0 not run: since word - -" in rows
    group = report.groups["word 1"].metrics
    assert f"word 1 {report.groups['word 1'].n_prompts} prompts {group['auroc'].value:.3f}" in " | ".join(rows)
    assert "one class word" in " | ".join(rows) and "no prompt of class 'no word'" in " | ".join(rows)
    drop = report.shift.shifted["word"].drops["auroc"]
    assert any(row.startswith("word 24 prompts") and f"{drop.value:+.3f}" in row for row in rows)
    page = Page(text)
    assert page.texts("h2")[:3] == ["Verdict", "Metrics", "Controls"]
    assert report.verdict in page.texts("p") and "Note: note word" in page.texts("p")
    assert any(report.conclusion in one.lower() for one in page.texts("strong"))


def test_the_probe_given_is_summed_up_and_must_be_that_of_the_report(tmp_path: Path) -> None:
    weights = ProbeWeights.from_direction(torch.ones(4), name="mine", hook_points="blocks.3.hook_resid_post")
    weights = weights.with_threshold(1.5, "logit")
    report = report_of(*noisy(), probe="mine")
    for given_ in (weights, weights.save(tmp_path / "p.safetensors")):
        text = text_of(report, tmp_path, probe=given_)
        assert "blocks.3.hook_resid_post" in cells(text) and "threshold, 1.50" in text
    assert "threshold, 1.50" not in text_of(report, tmp_path)
    with pytest.raises(InputError, match="the report is of the probe 'deceit', but the probe given is 'mine'"):
        save_report(report_of(*noisy()), tmp_path / "no.html", probe=weights)
    with pytest.raises(InputError, match="max_examples is -1; expected 0 or more"):
        save_report(report, tmp_path / "no.html", max_examples=-1)
    assert not (tmp_path / "no.html").exists()


# --- examples --------------------------------------------------------------------------------------------------------------


def shown_examples(text: str) -> dict[str, list[tuple[str, str, float]]]:
    """Label, what the probe says and the score of each example, by heading."""
    found = {}
    for heading, part in re.findall("<summary>([^<]*: [^<]*)</summary>(.*?)</details>", text, re.DOTALL):
        heads = re.findall(
            r"<b>label <bdi>'(\w+)'</bdi>, the probe says <bdi>'(\w+)'</bdi></b>; probability [\d.]+, score ([+-][\d.]+)",
            part,
        )
        if "<pre" in part or "none" in part:
            found[heading] = [(label, said, float(score)) for label, said, score in heads]
    return found


def test_the_most_confident_errors_come_first(tmp_path: Path) -> None:
    labels, scores = noisy(200, spread=3.0)
    texts, token_scores = [["x"]] * 200, [[0.0]] * 200
    report = report_of(labels, scores, texts=texts, token_scores=token_scores)
    shown = shown_examples(text_of(report, tmp_path, max_examples=30))
    assert [heading.split(":")[0] for heading in shown] == [
        "False positives",
        "False negatives",
        "Positives that are right",
        "Negatives that are right",
    ]
    said = np.where(scores > 0, "yes", "no")
    truth = np.where(labels == 1, "yes", "no")
    for (heading, found), (label, said_) in zip(
        shown.items(), [("no", "yes"), ("yes", "no"), ("yes", "yes"), ("no", "no")], strict=True
    ):
        all_of_kind = scores[(truth == label) & (said == said_)]
        room = 10 if label != said_ else 5
        expected = sorted(all_of_kind, key=abs, reverse=True)[:room]
        assert found == [(label, said_, float(f"{score:+.2f}")) for score in expected]
        assert heading.endswith(f" of {len(all_of_kind)}" if len(all_of_kind) > room else f": {len(all_of_kind)}")
    wrong = [len(kind) for label, said_, kind in chosen_examples(report) if label != said_]
    assert 1 - sum(wrong) / 200 == pytest.approx(report.metrics["accuracy"].value)
    assert text_of(report, tmp_path, max_examples=0).count("<pre") == 0


def test_scores_part_what_is_one_as_a_probability() -> None:
    report = report_of([0, 0, 0, 1], [50.0, 90.0, 70.0, 1.0])
    (_, _, first), *_ = chosen_examples(report)
    assert [one.score for one in first] == [90.0, 70.0, 50.0]


def test_each_token_has_the_colour_of_its_score_and_the_number(tmp_path: Path) -> None:
    report = report_of(
        [0, 1], [1.0, 2.0], texts=[["ab", " c", "d"], ["e"]], token_scores=[[-2.5, 3.25, 0.0], [9.0]], n_tokens=[3, 1]
    )
    page = Page(text_of(report, tmp_path))
    tokens = [(text, values["class"], values["title"]) for _, values, text in page.elements if "title" in values]
    assert tokens == [
        ("ab", f"s{step_of(-2.5)}", "-2.50"),
        (" c", f"s{step_of(3.25)} hi top", "+3.25"),
        ("d", f"s{step_of(0.0)}", "+0.00"),
        ("e", f"s{step_of(9.0)} hi top", "+9.00"),
    ]
    assert "highest:  c +3.25" in page.texts("p")


def test_long_texts_are_cut_around_their_highest_token(tmp_path: Path) -> None:
    for at in (0, 700, 1999):
        pieces, logits = [f" t{n}" for n in range(2000)], [0.0] * 2000
        logits[at], pieces[3] = 5.0, "y" * 10_000
        page = Page(text_of(report_of([0, 1], [1.0, 2.0], texts=[pieces, ["x"]], token_scores=[logits, [0.0]]), tmp_path))
        shown = page.texts("pre")[0]
        numbers_ = [int(one) for one in re.findall(r"t(\d+)", shown)]
        assert at in numbers_ or at == 3
        n_shown = len([one for one in page.elements if "title" in one[1]]) - 1
        assert n_shown == MOST_PIECES
        before, after = re.findall(r"([\d,]+) tokens before", shown), re.findall(r"([\d,]+) tokens after", shown)
        assert sum(int(one.replace(",", "")) for one in before + after) == 2000 - MOST_PIECES
        assert bool(before) == (at > 0) and bool(after) == (at < 1999)
        assert "y" * 101 not in shown


def test_the_page_is_bounded(tmp_path: Path) -> None:
    n = 120
    labels, scores = noisy(n, spread=9.0)
    texts, token_scores = [["<&>\u202e" * 30, *["<&>"] * 299]] * n, [[0.5] * 300] * n
    path = save_report(report_of(labels, scores, texts=texts, token_scores=token_scores), tmp_path / "p.html")
    assert len(Page(path.read_text()).texts("pre")) == 48
    small = [["ab"] * 300] * n
    path = save_report(report_of(labels, scores, texts=small, token_scores=token_scores), tmp_path / "p.html")
    assert path.stat().st_size < 2_000_000


def test_of_judged_tokens_each_prompt_comes_once_with_the_token_outlined(tmp_path: Path) -> None:
    report = report_of(
        [0, 0, 1, 1, 0, 1],
        [-1.0, 3.0, 2.0, 1.0, 4.0, 5.0],
        prompts=[0, 0, 0, 1, 1, 1],
        level="token",
        texts=[["a", "b", "c"], ["d", "e", "f"]],
        token_scores=[[-1.0, 3.0, 2.0], [1.0, 4.0, 5.0]],
        n_tokens=[3, 3],
    )
    page = Page(text_of(report, tmp_path))
    outlined = [text for _, values, text in page.elements if "top" in (values.get("class") or "").split()]
    assert outlined == ["e", "b"]
    assert "the token: e +4.00" in page.texts("p") and "False positives (tokens; the prompt of each): 2" in page.texts(
        "summary"
    )


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (report_of(*noisy()), "The report holds no texts. Evaluate with keep_tokens=True"),
        (
            report_of([0, 1, 2] * 6, np.eye(3)[[0, 1, 2] * 6], classes=("a", "b", "c")),
            "Not drawn: ROC curve. a ROC curve is of two classes; this report has 3.",
        ),
        (report_of([1, 1], [0.5, 0.25]), "Not drawn: Reliability diagram. a reliability diagram needs both classes"),
        (report_of([0, 1], [0.5, 0.25], texts=[[], ["x"]], token_scores=[[], [1.0]]), "no text"),
        (report_of(*noisy(), left_out={"length": "no reason"}), "not run: no reason"),
    ],
)
def test_what_is_missing_is_said(report: ProbeReport, says: str, tmp_path: Path) -> None:
    page = Page(text_of(report, tmp_path))
    assert says in " ".join(text for _, _, text in page.elements)


def test_without_matplotlib_the_page_says_which_pictures_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = text_of(whole_report(), tmp_path)
    names = "ROC curve, Scores by class, Precision-recall curve, Reliability diagram, AUROC by length"
    assert f"Not drawn: {names}. a plot needs matplotlib: pip install 'lmprobe-tl[plots]'." in Page(text).texts("p")
    assert "<svg" not in text and "False positives" in text


# --- files and the command -------------------------------------------------------------------------------------------------


def test_an_older_page_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_report(report_of(*noisy()), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert save_report(report_of(*noisy()), str(path)) == path
    assert path.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [path]


def test_eval_writes_the_page_and_keeps_the_texts_out_of_the_record(run: Run, tmp_path: Path) -> None:  # noqa: F811
    train, test = with_a_word(30, 0), with_a_word(24, 1)
    probe = Probe(embedded_model(), 3, name="word", random_state=0).fit(*train).save(tmp_path / "word.safetensors")
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(*test, strict=True)]
    data = write(tmp_path / "test.jsonl", "\n".join(lines))
    page, record = tmp_path / "word.html", tmp_path / "word.json"
    options = ["--prompts", data, "--controls", "length", "--resamples", 50, "--report", page]
    printed = run("eval", probe, *options, "--json", record).fine
    assert printed.endswith(f"\n{record}: the whole record\n{page}: the report\n")
    found = ProbeReport.from_json(record.read_text())
    assert found.examples.texts is None and found.examples.n_tokens is not None
    n_tokens = [len(embedded_tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in test[0]]
    assert list(found.examples.n_tokens) == n_tokens
    assert set(Page(page.read_text()).texts("pre")) <= set(test[0]) and "What is in the probe" in page.read_text()
    run("eval", probe, *options, "--json", record, "--tokens").fine  # noqa: B018
    whole = ProbeReport.from_json(record.read_text())
    assert whole.examples.texts is not None and whole.without_texts() == found
    assert save_report(whole, tmp_path / "again.html", probe=probe).read_text() == page.read_text()
    assert replace(whole, examples=found.examples) == found
    for wrong, says in (
        ("x.pdf", "--report is 'x.pdf'; expected a name ending in .html"),
        ("no/x.html", "there is no folder"),
    ):
        assert says in run("eval", probe, "--prompts", data, "--report", wrong).error
