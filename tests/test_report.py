"""The report: well-formed, self-contained, with every number and every character of the generated text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from embedded import embedded_tokenizer

from lmprobe_tl.colours import score_colour
from lmprobe_tl.demo.main_job import DemoResult, LiveCheck
from lmprobe_tl.evaluation import Evaluation
from lmprobe_tl.generation import GenerationResult
from lmprobe_tl.metrics import Interval
from lmprobe_tl.report import write_report
from lmprobe_tl.weights import ProbeWeights

VOID = {"meta", "br", "hr", "img", "link", "input"}
PROMPT = "# <b>&amp;\n"
WRITTEN = "x = '</pre><script>alert(1)</script>' \"é 😀\" & y"


class Page(HTMLParser):
    """Elements as (tag, attributes, text inside); complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[tag for tag, *_ in self.open]}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self.open.append((tag, dict(attributes), []))

    def handle_endtag(self, tag: str) -> None:
        opened, attributes, text = self.open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        self.elements.append((tag, attributes, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def texts(self, tag: str) -> list[str]:
        return [text for found, _, text in self.elements if found == tag]


def interval(value: float, low: float | None = None, high: float | None = None) -> Interval:
    return Interval(value, low, high, 0.95, 7)


def demo_result(folder: Path, generations: list[GenerationResult], **weights_settings: Any) -> DemoResult:
    weights = ProbeWeights.from_direction(
        torch.ones(4), name="p", hook_points="blocks.3.hook_resid_post", description="<i>mine</i>", **weights_settings
    ).with_threshold(2.0, "logit")
    evaluation = Evaluation(interval(0.9876, 0.9811, 0.9922), interval(0.8765), None, 0.01, "token", "all", 12, 3456, 300, 0)
    return DemoResult(
        evaluation=evaluation,
        identity_auroc=interval(0.7654, 0.7, 0.8),
        live=LiveCheck(interval(0.9543, 0.9, 0.99), interval(0.6432, 0.6, 0.7), n_rows=5, n_tokens=1234),
        probe_file=weights.save(folder / "p.safetensors"),
        shown=generations,
        training={
            "parameters": 3_050_000,
            "validation_loss_nats_per_token": {"model": 2.111, "trigram": 3.222, "bigram": 3.5, "unigram": 5.333},
        },
        tokenizer=embedded_tokenizer(),
    )


def generation(text: str, prompt: str, logits: list[float] | None = None) -> GenerationResult:
    tokenizer = embedded_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    length = len(ids)
    ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    scores = torch.tensor(logits or [float(at % 5) for at in range(len(ids))])
    return GenerationResult(text, torch.tensor(ids), length, {"p": scores}, {"p": scores}, (), "max_new_tokens", {})


@pytest.fixture
def page(tmp_path: Path) -> Page:
    result = demo_result(tmp_path, [generation(WRITTEN, PROMPT), generation("z\n", "y = ")])
    path = write_report(result, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_holds_the_whole_text_escaped(page: Page) -> None:
    assert page.texts("pre") == [PROMPT + WRITTEN, "y = z\n"]
    assert not page.texts("script")
    assert not page.texts("b")
    assert not page.texts("i")
    assert page.texts("title") == ["lmprobe-tl demo"]


def test_the_page_needs_no_other_file_and_no_network(tmp_path: Path) -> None:
    text = write_report(demo_result(tmp_path, [generation(WRITTEN, PROMPT)]), tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", text)
    assert str(tmp_path) not in text


def test_every_metric_stands_in_the_table_with_its_interval(page: Page) -> None:
    rows = dict(zip(page.texts("th"), page.texts("td"), strict=True))
    assert rows["AUROC of the probe, unseen modules"] == "0.988 [0.981, 0.992]"
    assert rows["AUROC of the token alone (no model)"] == "0.765 [0.700, 0.800]"
    assert rows["Accuracy of the probe"] == "0.876"
    assert rows["AUROC of the live scores, generated text"] == "0.954 [0.900, 0.990]"
    assert rows["AUROC of the token alone on that text"] == "0.643 [0.600, 0.700]"
    assert rows["Tokens judged"] == "3,456 in 12 pieces; 1,234 generated"
    assert rows["Loss of the language model (nats a token)"] == "model 2.11, trigram 3.22, unigram 5.33"
    assert rows["description"] == "<i>mine</i>"
    assert rows["hook points"] == "blocks.3.hook_resid_post"


def spans_of(result: GenerationResult, folder: Path) -> list[tuple[str, set[str], str, str]]:
    page = Page(write_report(demo_result(folder, [result]), folder / "r.html").read_text())
    return [
        (text, set((values.get("class") or "").split()), values["style"] or "", values["title"] or "")
        for tag, values, text in page.elements
        if tag == "span" and "title" in values
    ]


def test_each_token_shows_its_own_score_and_whether_it_is_prompt_or_flagged(tmp_path: Path) -> None:
    tokenizer = embedded_tokenizer()
    result = generation("x = (1, 2)\n", "# a note\n")
    tokens = [tokenizer.decode([token]) for token in result.tokens.tolist()[1:]]
    spans = spans_of(result, tmp_path)
    assert [text for text, *_ in spans] == tokens
    for at, (_, kinds, style, title) in enumerate(spans, start=1):
        logit = result.scores["p"][at].item()
        assert title == f"logit {logit:.2f}"
        assert style == f"background:{score_colour(logit, 2.0)}"
        assert ("prompt" in kinds) == (at < result.prompt_length)
        assert ("flag" in kinds) == (logit >= 2.0)


def test_a_character_split_over_tokens_is_one_span_and_a_cut_one_is_kept(tmp_path: Path) -> None:
    result = generation("😀a", "x")
    n_bytes = len(result.tokens) - result.prompt_length - 1
    assert n_bytes > 1
    result.scores["p"][:] = 0
    result.scores["p"][result.prompt_length + 1] = 5.0
    assert [(text, title) for text, _, _, title in spans_of(result, tmp_path)][1:] == [
        ("😀", "logit 5.00"),
        ("a", "logit 0.00"),
    ]
    cut = GenerationResult("", result.tokens[: result.prompt_length + 1], 2, result.scores, {}, (), "eos", {})
    assert [text for text, *_ in spans_of(cut, tmp_path)] == ["x", "\ufffd"]


def test_a_last_token_without_a_score_is_left_out(tmp_path: Path) -> None:
    result = generation("x = 1\n", "# a\n")
    result.scores["p"] = result.scores["p"][:-1]
    assert "".join(text for text, *_ in spans_of(result, tmp_path)) == "# a\nx = 1"


def test_the_scale_shows_the_colours_around_the_threshold(page: Page) -> None:
    scale = [(text, values["style"]) for tag, values, text in page.elements if tag == "span" and "title" not in values]
    assert [text for text, _ in scale] == ["well below", "below", "threshold", "above", "well above"]
    assert scale[2][1] == f"background:{score_colour(0.0)}"
    assert len({style for _, style in scale}) == 5


def test_an_older_report_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old " * 10_000)
    write_report(demo_result(tmp_path, []), path)
    assert "old old" not in path.read_text()
    Page(path.read_text())
