"""Examples with every token coloured by its score: the most confident errors first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmprobe_tl.probe_report import ProbeReport
from lmprobe_tl.report_page.markup import Html, folded, joined, separated, tag, visible
from lmprobe_tl.report_page.style import step_of

MOST_PIECES = 240  # of a text that are shown
_LONGEST_PIECE = 100  # characters


@dataclass(frozen=True)
class Example:
    """A prompt or a token. place: of a token, in its prompt. label, said: index of its class, and of that which the probe
    says."""

    prompt: int
    place: int
    label: int
    said: int
    score: float
    probability: float

    @property
    def confidence(self) -> tuple[float, float]:
        """Greater the surer the probe is; scores part what is 1 as a probability."""
        return abs(self.probability - 0.5), abs(self.score)


def examples(report: ProbeReport, most: int) -> Html:
    """At most `most` prompts."""
    if len(report.classes) != 2:
        return tag("p", f"Scores of tokens are kept for two classes; this probe has {len(report.classes)}.", class_="quiet")
    if report.examples.texts is None or report.examples.token_scores is None:
        how = "The report holds no texts. Evaluate with keep_tokens=True, or with lmprobe-tl eval --report, to see examples."
        return tag("p", how, class_="quiet")
    negative, positive = (repr(label) for label in report.classes)
    outlined = "the highest" if report.level == "prompt" else "the one that is judged"
    legend = (
        f"Each token is coloured by its own logit: blue speaks for {negative}, orange for {positive}. Underlined: above 0; "
        f"outlined: {outlined}. Hover over a token for its logit. ↵ and → are line ends and tabs."
    )
    parts = [tag("p", legend), tag("p", _scale(), class_="scale")]
    for heading, chosen, n_all in _kinds(report, most):
        count = f"{len(chosen)} of {n_all:,}" if len(chosen) < n_all else f"{n_all:,}"
        inner = [_shown(report, one) for one in chosen] or [tag("p", "none", class_="quiet")]
        parts.append(folded(f"{heading}: {count}", inner, is_open="right" not in heading))
    return joined(parts)


def chosen_examples(report: ProbeReport) -> Iterator[tuple[int, int, list[Example]]]:
    """The label, what is said, and the examples of each kind, the surest first: false positives, false negatives, then those
    that are right."""
    found = list(_all(report))
    for label, said in ((0, 1), (1, 0), (1, 1), (0, 0)):
        kind = [one for one in found if (one.label, one.said) == (label, said)]
        yield label, said, sorted(kind, key=lambda one: one.confidence, reverse=True)


def _all(report: ProbeReport) -> Iterator[Example]:
    records = report.examples
    columns = (records.prompts, records.labels, records.scores[0], records.probabilities[0])
    so_far: Counter[int] = Counter()
    for prompt, label, score, probability in zip(*columns, strict=True):
        yield Example(prompt, so_far[prompt], label, int(probability > 0.5), score, probability)
        so_far[prompt] += 1


def _kinds(report: ProbeReport, most: int) -> Iterator[tuple[str, list[Example], int]]:
    """Heading, the examples to show, each prompt once, and how many there are in all."""
    kinds = list(chosen_examples(report))
    # Errors are what one learns from: a third each, and a sixth each for what is right.
    room, seen = [most // 3, most // 3, most // 6, most // 6], set[int]()
    for (label, said, found), n_most in zip(kinds, room, strict=True):
        kept: list[Example] = []
        for one in found:
            if len(kept) < n_most and one.prompt not in seen:
                seen.add(one.prompt)
                kept.append(one)
        name = {(0, 1): "False positives", (1, 0): "False negatives", (1, 1): "Positives that are right"}
        heading = name.get((label, said), "Negatives that are right")
        of = "" if report.level == "prompt" else " (tokens; the prompt of each)"
        yield f"{heading}{of}", kept, len(found)


def _shown(report: ProbeReport, one: Example) -> Html:
    records = report.examples
    assert records.texts is not None and records.token_scores is not None
    pieces, scores = records.texts[one.prompt], records.token_scores[one.prompt]
    # In <bdi>, or a name in Arabic would turn round the numbers after it.
    label, said = (tag("bdi", repr(report.classes[at])) for at in (one.label, one.said))
    facts: list[str] = [f"probability {one.probability:.3f}", f"score {one.score:+.2f}", f"prompt {one.prompt}"]
    if records.n_tokens is not None:
        facts.append(f"{records.n_tokens[one.prompt]:,} tokens")
    if records.groups is not None:
        facts.append(joined(["group ", tag("bdi", records.groups[one.prompt])]))
    unit = "" if report.level == "prompt" else "a token; "
    head = tag("p", [tag("b", [unit, "label ", label, ", the probe says ", said]), "; ", *separated(facts)])
    if not pieces:
        return tag("div", [head, tag("p", "no text", class_="quiet")], class_="example")
    # Pieces are tokens, unless a character is made of several.
    is_token = report.level == "token" and len(pieces) == records.prompts.count(one.prompt)
    top = one.place if is_token else max(range(len(scores)), key=scores.__getitem__)
    words = "the token: " if is_token else "highest: "
    outlined = tag("p", [words, tag("span", _named(pieces[top]), class_="piece"), f" {scores[top]:+.2f}"], class_="quiet")
    return tag("div", [head, _text(pieces, scores, top), outlined], class_="example")


def _text(pieces: Sequence[str], scores: Sequence[float], top: int) -> Html:
    """The text around the outlined token, as much as fits."""
    start = max(0, min(top - MOST_PIECES // 2, len(pieces) - MOST_PIECES))
    end = min(len(pieces), start + MOST_PIECES)
    spans = [_token(pieces[at], scores[at], is_top=at == top) for at in range(start, end)]
    before = [tag("i", f"… {start:,} tokens before … ", class_="quiet")] if start else []
    after = [tag("i", f" … {len(pieces) - end:,} tokens after …", class_="quiet")] if end < len(pieces) else []
    return tag("pre", [*before, *spans, *after], dir="auto")


def _token(piece: str, score: float, *, is_top: bool) -> Html:
    kinds = [f"s{step_of(score)}", *["hi"] * (score > 0), *["top"] * is_top]
    return tag("span", _piece(piece), class_=" ".join(kinds), title=f"{score:+.2f}")


def _piece(piece: str) -> Html:
    return visible(piece if len(piece) <= _LONGEST_PIECE else piece[: _LONGEST_PIECE - 1] + "…")


def _named(piece: str) -> Html:
    """A piece in a sentence, on a single line."""
    return tag("q", _piece(piece.replace("\n", "↵").replace("\t", "→")))


def _scale() -> Html:
    marks = [(-9, "-9"), (-3, "-3"), (-1, "-1"), (0, "0"), (1, "+1"), (3, "+3"), (9, "+9")]
    return joined([tag("span", text, class_=f"s{step_of(at)}") for at, text in marks])
