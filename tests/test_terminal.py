"""Tokens in the terminal: every character once, coloured or marked by its score, and nothing but text."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from embedded import embedded_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lmprobe_tl.colours import score_colour
from lmprobe_tl.live_records import TokenEvent
from lmprobe_tl.terminal import CLOSE_MARK, OPEN_MARK, TokenPrinter
from lmprobe_tl.token_text import TokenText
from lmprobe_tl.weights import ProbeWeights

WEIGHTS = ProbeWeights.from_direction([1.0, 1.0], name="p", hook_points="blocks.0.hook_resid_post")
ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is a special token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class Pieces:
    """A tokenizer of the given pieces of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[token] for token in ids)


class Words:
    """A tokenizer as SentencePiece makes them: tokens begin with a space, and decoding drops the first one."""

    vocabulary = ("<s>", " one", " two", "s", ".", "\n")

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.vocabulary[token] for token in ids if token > 0).removeprefix(" ")


def console(*, colour: bool, width: int = 80, **settings: Any) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        width=width,
        highlight=False,
        _environ={},
        **settings,
    )


def event(token: int, logit: float = -1.0, *, generated: bool = True, row: int = 0, at: int = 0) -> TokenEvent:
    return TokenEvent(row, at, token, generated, {"p": logit, "other": 99.0}, {"p": None, "other": None}, ())


def shown(
    tokens: list[int],
    logits: list[float] | None = None,
    *,
    tokenizer: Any = None,
    to: Console | None = None,
    generated: bool = True,
    weights: ProbeWeights = WEIGHTS,
) -> str:
    """What stands on the console after these tokens and `finish`."""
    to = to or console(colour=False)
    printer = TokenPrinter(to, weights, tokenizer or Bytes())
    for token, logit in zip(tokens, logits or [-1.0] * len(tokens), strict=True):
        printer(event(token, logit, generated=generated))
    printer.finish()
    file: Any = to.file
    return file.getvalue()


def painted(output: str) -> list[tuple[str, str]]:
    """(text, codes) of each run of characters."""
    runs, codes, at = [], "", 0
    for found in [*ESCAPE.finditer(output), None]:
        end = found.start() if found else len(output)
        if output[at:end]:
            runs.append((output[at:end], codes))
        if found:
            codes, at = found.group(1).removeprefix("0"), found.end()
    return runs


def background(logit: float, threshold: float = 0.0) -> str:
    red, green, blue = (int(score_colour(logit, threshold)[at : at + 2], 16) for at in (1, 3, 5))
    return f"48;2;{red};{green};{blue}"


# --- colours -------------------------------------------------------------------------------------------------------------


def test_each_token_has_the_colour_of_its_own_score() -> None:
    runs = painted(shown(list(b"abc"), [-3.0, 0.0, 3.0], to=console(colour=True)))
    assert [text for text, _ in runs] == ["a", "b", "c", "\n"]
    assert [background(logit) in codes for (_, codes), logit in zip(runs, [-3.0, 0.0, 3.0], strict=False)] == [True] * 3
    assert runs[-1][1] == ""
    assert OPEN_MARK not in "".join(text for text, _ in runs)


def test_colours_are_relative_to_the_threshold_of_the_probe() -> None:
    for weights, threshold in [(WEIGHTS.with_threshold(2.0, "logit"), 2.0), (WEIGHTS.with_threshold(0.9), 2.1972246)]:
        runs = painted(shown(list(b"a"), [threshold + 3], to=console(colour=True), weights=weights))
        assert background(3.0) in runs[0][1]


def test_the_prompt_is_dim_and_what_is_generated_is_not() -> None:
    for generated in (False, True):
        (_, codes), *_ = painted(shown(list(b"a"), to=console(colour=True), generated=generated))
        assert ("2" in codes.split(";")[:1]) is not generated


def test_a_line_end_never_carries_a_background() -> None:
    words = ["a\n", "\n  b", "  \n", "\t", "c\n\nd", "\n"]
    output = shown(list(range(len(words))), tokenizer=Pieces(*words), to=console(colour=True))
    for text, codes in painted(output):
        assert not (codes and "\n" in text), (text, codes)
        assert not (codes and not text.strip()), "blanks are painted"
    assert ESCAPE.sub("", output) == "".join(words).replace("\t", " " * 8) + "\n"
    assert {text.strip() for text, codes in painted(output) if codes} == {"a", "b", "c", "d"}


def test_colours_run_from_blue_over_near_white_to_orange_and_saturate() -> None:
    def channels(logit: float) -> tuple[int, ...]:
        code = score_colour(logit, 1.0)
        assert re.fullmatch("#[0-9a-f]{6}", code)
        return tuple(int(code[at : at + 2], 16) for at in (1, 3, 5))

    assert min(channels(1.0)) > 230
    red, _, blue = channels(-20.0)
    assert blue > red + 80
    red, _, blue = channels(20.0)
    assert red > blue + 80
    assert channels(1e9) == channels(1000.0) == channels(float("inf"))
    reds = [channels(logit)[0] for logit in (-5.0, -3.0, -1.0, 0.0, 1.0)]
    assert reds == sorted(reds)
    assert len(set(reds)) == 5
    blues = [channels(logit)[2] for logit in (1.0, 2.0, 4.0, 7.0)]
    assert blues == sorted(blues, reverse=True)
    assert len(set(blues)) == 4


# --- marks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([-1, -1, -1, -1], "abcd"),
        ([-1, 1, 1, -1], "a⟦bc⟧d"),
        ([-1, 1, -1, -1], "a⟦b⟧cd"),
        ([1, -1, 1, -1], "⟦a⟧b⟦c⟧d"),
        ([-1, -1, -1, 1], "abc⟦d⟧"),
        ([1, 1, 1, 1], "⟦abcd⟧"),
        ([-1, 0, -1, -1], "a⟦b⟧cd"),
    ],
)
def test_flagged_tokens_stand_between_marks_where_there_are_no_colours(logits: list[float], expected: str) -> None:
    assert shown(list(b"abcd"), logits) == expected + "\n"


def test_the_threshold_of_the_probe_decides_what_is_marked() -> None:
    assert shown(list(b"ab"), [1.9, 2.0], weights=WEIGHTS.with_threshold(2.0, "logit")) == "a⟦b⟧\n"
    assert shown(list(b"ab"), [2.1, 2.3], weights=WEIGHTS.with_threshold(0.9)) == "a⟦b⟧\n"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colours_gets_marks(environment: dict[str, str]) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm-256color"} | environment)
    assert shown(list(b"ab"), [-1, 1], to=terminal) == "a⟦b⟧\n"


def test_what_is_no_terminal_gets_marks_and_no_escape_sequences() -> None:
    assert shown(list(b"ab"), [-1, 1], to=Console(file=io.StringIO(), _environ={})) == "a⟦b⟧\n"


def test_a_special_token_neither_prints_nor_marks_anything() -> None:
    assert shown([256, *b"ab"], [9.0, -1.0, -1.0]) == "ab\n"
    assert shown([*b"ab", 256], [1.0, 1.0, -9.0]) == "⟦ab⟧\n"
    assert painted(shown([256, *b"a"], to=console(colour=True)))[0][0] == "a"


def test_finishing_twice_closes_a_mark_once() -> None:
    to = console(colour=False)
    printer = TokenPrinter(to, WEIGHTS, Bytes())
    printer(event(97, 1.0))
    printer.finish()
    printer.finish()
    file: Any = to.file
    assert file.getvalue().count(CLOSE_MARK) == 1


# --- text ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ab é😀日\n", max_size=30), st.booleans())
def test_characters_split_over_tokens_appear_once_and_whole(text: str, colour: bool) -> None:
    output = shown(list(text.encode()), to=console(colour=colour))
    assert ESCAPE.sub("", output) == text + "\n"


@pytest.mark.parametrize("colour", [False, True])
def test_the_embedded_tokenizer_prints_the_text_it_encoded(colour: bool) -> None:
    text = 'def f(x):\n    """Café 😀 日本."""\n\n    return x\n'
    tokenizer = embedded_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ESCAPE.sub("", shown(ids, tokenizer=tokenizer, to=console(colour=colour))) == text + "\n"


def test_spaces_between_words_survive_a_tokenizer_that_drops_the_first_one() -> None:
    ids = [0, 1, 2, 3, 0, 1, 4, 5, 2]
    assert shown(ids, tokenizer=Words()) == "one twos one.\n two\n"
    assert Words().decode(ids) == "one twos one.\n two"


def test_a_character_has_the_highest_score_of_its_tokens() -> None:
    grinning = list("😀".encode())
    assert shown([97, *grinning, 98], [-1, -1, 5, -1, -1, -1]) == "a⟦😀⟧b\n"
    runs = painted(shown(grinning, [-1, 5, -1, -1], to=console(colour=True)))
    assert background(5.0) in runs[0][1]


def test_a_character_that_is_never_completed_is_not_lost() -> None:
    assert shown([97, *"😀".encode()[:2]], [-1, -1, 5]) == "a⟦\ufffd⟧\n"
    assert shown([97, 0xFF, 98]) == "a\ufffdb\n"
    assert shown(list("a\ufffd".encode())) == "a\ufffd\n"


@pytest.mark.parametrize("colour", [False, True])
def test_long_text_is_never_broken_into_lines(colour: bool) -> None:
    text = "a word, another one and averyveryverylongone " * 5
    assert ESCAPE.sub("", shown(list(text.encode()), to=console(colour=colour, width=12))) == text + "\n"


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("text", ["[bold]a[/bold] [b", ":smile: :+1:", "https://a.b 123 'x' True"])
def test_a_token_that_looks_like_markup_stays_text(text: str, colour: bool) -> None:
    runs = painted(shown([0], tokenizer=Pieces(text), to=console(colour=colour)))
    assert "".join(part for part, _ in runs) == text + "\n"
    assert len({codes for part, codes in runs if part.strip()}) == 1


@pytest.mark.parametrize("colour", [False, True])
def test_no_control_sequence_of_the_model_reaches_the_terminal(colour: bool) -> None:
    output = ESCAPE.sub("", shown(list("a\x1b[2Jb\rc\x07d\x9be\x00".encode()), to=console(colour=colour)))
    assert output == "a\\x1b[2Jb\\rc\\x07d\\x9be\\x00\n"


def test_only_the_chosen_row_and_probe_are_shown() -> None:
    to = console(colour=False)
    printer = TokenPrinter(to, WEIGHTS, Bytes(), row=1)
    for row, char in ((0, "a"), (1, "b"), (0, "c"), (1, "d")):
        printer(event(ord(char), row=row))
    printer.finish()
    file: Any = to.file
    assert file.getvalue() == "bd\n"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*b"ab", *"é😀".encode(), 0xFF, 256]), max_size=12))
def test_token_text_adds_up_to_the_decoded_text(ids: list[int]) -> None:
    text = TokenText(Bytes())
    added = [one for token in ids if (one := text.add(token, float(token)))]
    if last := text.rest():
        added.append(last)
    whole = Bytes().decode(ids, skip_special_tokens=True)
    assert "".join(part for part, _ in added).replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert text.rest() is None
