"""Tokens in the terminal: every character once, coloured and marked by its score, nothing but text, and how it went."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from embedded import embedded_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_terminal import Screen

from lmprobe_tl.colours import score_colour
from lmprobe_tl.live.records import Alarm, TokenEvent
from lmprobe_tl.terminal.printer import TokenPrinter
from lmprobe_tl.token_text import TokenText
from lmprobe_tl.weights import ProbeWeights

WEIGHTS = ProbeWeights.from_direction([1.0, 1.0], name="p", hook_points="blocks.0.hook_resid_post")
ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is a special token."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        if not skip_special_tokens and 256 in ids:
            return "<s>"
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
    """A console that is no terminal; with colours, since they are forced."""
    return Console(
        file=io.StringIO(),
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        width=width,
        highlight=False,
        _environ={},
        **settings,
    )


def alarm(position: int, score: float = 0.75, *, probe: str = "p", token: int = 97) -> Alarm:
    return Alarm(probe, 0, position, token, 1.0, score, 0.5, "probability")


def event(
    token: int,
    logit: float = -1.0,
    *,
    generated: bool = True,
    row: int = 0,
    at: int = 0,
    running: float | None = None,
    alarms: tuple[Alarm, ...] = (),
) -> TokenEvent:
    return TokenEvent(row, at, token, generated, {"p": logit, "other": 99.0}, {"p": running, "other": 0.99}, alarms)


def output_of(to: Console) -> str:
    file: Any = to.file
    return file.getvalue()


def shown(
    tokens: list[int],
    logits: list[float] | None = None,
    *,
    tokenizer: Any = None,
    to: Console | None = None,
    generated: bool = True,
    weights: ProbeWeights = WEIGHTS,
) -> str:
    """What stands on the console after these tokens and `finish`, up to the line that says how it went."""
    to = to or console(colour=False)
    printer = TokenPrinter(to, weights, tokenizer or Bytes())
    for token, logit in zip(tokens, logits or [-1.0] * len(tokens), strict=True):
        printer(event(token, logit, generated=generated))
    printer.finish("eos")
    text, summary = output_of(to).split("ended by: ")
    assert ESCAPE.sub("", summary).startswith("eos; no alarm")
    return text


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
    assert [text for text, _ in runs] == ["a", "⟦b", "c", "⟧", "\n"]
    assert [background(logit) in codes for (_, codes), logit in zip(runs, [-3.0, 0.0, 3.0, 3.0], strict=False)] == [True] * 4
    assert runs[-1][1] == ""


def test_flagged_text_is_underlined_and_nothing_else_is() -> None:
    runs = painted(shown(list(b"abcd"), [-3.0, 1.0, 3.0, -0.1], to=console(colour=True)))
    assert {text: "4" in codes.split(";")[:2] for text, codes in runs} == {
        "a": False,
        "⟦b": True,
        "c": True,
        "⟧": True,
        "d": False,
        "\n": False,
    }


@pytest.mark.parametrize(
    ("system", "black", "grounds"),
    [("256", "38;5;16", ["48;5;110", "48;5;255", "48;5;215"]), ("standard", "30", ["46", "47", "43"])],
)
def test_a_terminal_of_few_colours_has_clear_steps(system: str, black: str, grounds: list[str]) -> None:
    to = Console(file=io.StringIO(), force_terminal=True, color_system=system, _environ={})
    runs = painted(shown(list(b"abc"), [-9.0, -0.01, 9.0], to=to))
    expected = [f"{black};{grounds[0]}", f"{black};{grounds[1]}", f"4;{black};{grounds[2]}"]
    assert [codes for _, codes in runs][:3] == expected


def test_colours_are_relative_to_the_threshold_of_the_probe() -> None:
    for weights, threshold in [(WEIGHTS.with_threshold(2.0, "logit"), 2.0), (WEIGHTS.with_threshold(0.9), 2.1972246)]:
        runs = painted(shown(list(b"a"), [threshold + 3], to=console(colour=True), weights=weights))
        assert background(3.0) in runs[0][1]


def test_the_prompt_is_in_italics_and_what_is_generated_is_not() -> None:
    for generated in (False, True):
        (_, codes), *_ = painted(shown(list(b"a"), to=console(colour=True), generated=generated))
        assert ("3" in codes.split(";")[:1]) is not generated


def test_a_line_end_never_carries_a_background() -> None:
    words = ["a\n", "\n  b", "  \n", "\t", "c\n\nd", "\n"]
    output = shown(list(range(len(words))), tokenizer=Pieces(*words), to=console(colour=True))
    for text, codes in painted(output):
        assert not (codes and "\n" in text), (text, codes)
    assert ESCAPE.sub("", output) == "".join(words) + "\n"
    assert [text for text, codes in painted(output) if codes] == ["a", "  b", "  ", "\t", "c", "d"]


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
@pytest.mark.parametrize("colour", [False, True])
def test_flagged_tokens_stand_between_marks_with_and_without_colours(
    logits: list[float], expected: str, colour: bool
) -> None:
    assert ESCAPE.sub("", shown(list(b"abcd"), logits, to=console(colour=colour))) == expected + "\n"


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


def test_finishing_twice_finishes_once() -> None:
    to = console(colour=False)
    printer = TokenPrinter(to, WEIGHTS, Bytes())
    printer(event(97, 1.0))
    printer.finish("eos")
    printer.finish("max_new_tokens")
    assert output_of(to) == "⟦a⟧\nended by: eos; no alarm; 1 token\n"


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


def test_characters_that_turn_others_around_are_spelled_out_but_joiners_are_not() -> None:
    assert shown(list("a\u202eb\u2066c\u2028d".encode())) == "a\\u202eb\\u2066c\\u2028d\n"
    kept = "\U0001f469\u200d\U0001f4bb e\u0301 \u05d0\u200f"
    assert shown(list(kept.encode())) == kept + "\n"


def test_only_the_chosen_row_and_probe_are_shown() -> None:
    to = console(colour=False)
    printer = TokenPrinter(to, WEIGHTS, Bytes(), row=1)
    for row, char in ((0, "a"), (1, "b"), (0, "c"), (1, "d")):
        printer(event(ord(char), row=row, running=0.1 + 0.8 * (row == 0), alarms=(alarm(0, probe="other"),)))
    printer.finish("eos")
    assert output_of(to) == "bd\nended by: eos; no alarm (score at most 0.100, threshold 0.5); 2 tokens\n"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*b"ab", *"é😀".encode(), 0xFF, 256]), max_size=12))
@example([*"😀".encode()[:1], 256, *"😀".encode()[1:]])
@example([*"😀".encode()[:2], 256, 256, 256, *"😀".encode()[2:]])
def test_token_text_adds_up_to_the_decoded_text(ids: list[int]) -> None:
    text = TokenText(Bytes())
    added = [one for token in ids if (one := text.add(token, float(token)))]
    if last := text.rest():
        added.append(last)
    whole = Bytes().decode(ids, skip_special_tokens=True)
    assert "".join(part for part, _ in added).replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert text.rest() is None


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    text = TokenText(Bytes())
    added = [text.add(token, float(at)) for at, token in enumerate([0xFF] * 50)]
    assert [one is None for one in added] == [True] * 3 + [False] * 47
    assert added[3:5] == [("\ufffd", 0.0), ("\ufffd", 1.0)]
    assert [text.add(byte, 99.0) for byte in "😀".encode()] == [
        ("\ufffd", 47.0),
        ("\ufffd", 48.0),
        ("\ufffd", 49.0),
        ("😀", 99.0),
    ]


# --- how it went ---------------------------------------------------------------------------------------------------------


def went(
    events: list[TokenEvent], *, weights: ProbeWeights = WEIGHTS, ended_by: str = "eos", to: Console | None = None
) -> str:
    """What stands below the text at the end."""
    to = to or console(colour=False)
    with TokenPrinter(to, weights, Bytes()) as printer:
        for one in events:
            printer(one)
        printer.finish(ended_by)
    return output_of(to).split("\n", 1)[1]


def test_the_end_says_what_ended_it_and_how_near_the_score_came() -> None:
    scores = [None, 0.2, 0.4, 0.3]
    events = [event(97, generated=at > 1, running=score) for at, score in enumerate(scores)]
    assert went(events) == "ended by: eos; no alarm (score at most 0.400, threshold 0.5); 2 tokens\n"
    assert went(events, ended_by="p").startswith("ended by: probe 'p'; ")
    assert went(events[:1]) == "ended by: eos; no alarm; 0 tokens\n"


@pytest.mark.parametrize(
    ("position", "short", "long"),
    [
        (1, "prompt token 2", "token 2 of the prompt"),
        (2, "token 1", "generated token 1"),
        (3, "token 2", "generated token 2"),
    ],
)
def test_an_alarm_says_where_it_was_raised(position: int, short: str, long: str) -> None:
    events = [
        event(
            97 + at, generated=at > 1, running=0.1 * at, alarms=(alarm(position, token=97 + at),) if at == position else ()
        )
        for at in range(5)
    ]
    assert went(events) == (
        f"alarm: the running score of probe 'p' (pooling last_token) reached 0.750 (threshold 0.5) at {long}, "
        f"{chr(97 + position)!r}\nended by: eos; ALARM at {short}; score 0.400; 3 tokens\n"
    )


def test_what_a_token_of_the_alarm_says_is_no_command() -> None:
    bell = event(7, alarms=(alarm(0, token=7),), running=0.8)
    assert "generated token 1, '\\x07'\n" in went([bell])


@pytest.mark.parametrize(
    ("pooling", "running", "threshold", "unit", "shown_score"),
    [
        ("last_token", 0.9, 0.5, "probability", "0.900"),
        ("last_token", 0.9, 1.0, "logit", "2.197"),
        ("score:ema_max(0.5)", 2.197225, 0.5, "probability", "0.900"),
        ("score:ema_max(0.5)", 2.197225, 1.0, "logit", "2.197"),
        ("last_token", 1.0, 9.0, "logit", "inf"),
        ("last_token", 0.0, 9.0, "logit", "-inf"),
        ("score:ema_max(0.5)", -800.0, 0.5, "probability", "0.000"),
    ],
)
def test_score_and_threshold_are_in_the_same_unit(
    pooling: str, running: float, threshold: float, unit: Any, shown_score: str
) -> None:
    spec = replace(WEIGHTS.spec, pooling=replace(WEIGHTS.spec.pooling, inference=pooling))
    weights = replace(WEIGHTS, spec=spec).with_threshold(threshold, unit)
    ended = went([event(97, running=running)], weights=weights)
    assert ended == f"ended by: eos; no alarm (score at most {shown_score}, threshold {threshold:g}); 1 token\n"


def test_what_goes_into_a_file_is_the_same_each_time() -> None:
    assert "/s" not in went([event(97, running=0.1), event(98, running=0.1)])
    assert re.search(r"2 tokens at \d+/s", went([event(97), event(98)], to=Screen(100).console()))


@pytest.mark.parametrize(("error", "reason"), [(KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "an error")])
@pytest.mark.parametrize("live", [False, True])
def test_an_exception_ends_the_display_and_keeps_the_text(error: type[BaseException], reason: str, live: bool) -> None:
    to = Screen(100).console() if live else console(colour=False)
    before = threading.active_count()

    def generate() -> None:
        with TokenPrinter(to, WEIGHTS, Bytes()) as printer:
            for token in b"a\nb\xf0\x9f":
                printer(event(token, 1.0, running=0.3, alarms=(alarm(0),) if token == 97 else ()))
            raise error

    with pytest.raises(error):
        generate()
    file: Any = to.file
    lines = file.terminal.lines if live else file.getvalue().splitlines()
    assert lines[:2] == ["⟦a", "b\ufffd⟧"]
    assert lines[2].startswith("alarm: the running score")
    assert re.fullmatch(rf"ended by: {reason}; ALARM at token 1; score 0.300; 5 tokens( at \d+/s)?", lines[3])
    assert len(lines) == 4
    assert threading.active_count() == before


def test_an_exception_is_the_one_to_see_even_if_the_display_can_no_longer_say_it() -> None:
    file = Screen()

    def generate() -> None:
        with TokenPrinter(file.console(), WEIGHTS, Bytes()) as printer:
            printer(event(97))
            with patch.object(file, "write", side_effect=OSError("gone")):
                printer.finish("eos")

    def fail() -> None:
        with (
            patch.object(file, "write", side_effect=OSError("gone")),
            TokenPrinter(file.console(), WEIGHTS, Bytes()) as printer,
        ):
            printer(event(97))
            raise ZeroDivisionError

    with pytest.raises(OSError, match="gone"):
        generate()
    with pytest.raises(ZeroDivisionError):
        fail()


def test_an_exception_before_the_first_token_shows_nothing() -> None:
    for to in (Screen().console(), console(colour=False)):
        with pytest.raises(ZeroDivisionError), TokenPrinter(to, WEIGHTS, Bytes()):
            raise ZeroDivisionError
        assert output_of(to) == ""


# --- on a terminal -------------------------------------------------------------------------------------------------------


def wait_for(file: Screen, text: str, seconds: float = 20) -> list[str]:
    """The rows of the screen once the text is on one of them."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rows = [row.text for row in file.terminal.screen]
        if text in "\n".join(rows):
            return rows
        time.sleep(0.005)
    raise AssertionError(f"{text!r} never came: {rows}")


def test_the_status_line_follows_the_tokens_and_gives_way_to_the_summary() -> None:
    file = Screen(100, 8)
    with TokenPrinter(file.console(), WEIGHTS, Bytes()) as printer:
        printer(event(97, -3.0, generated=False))
        empty = f"score -  [{'.' * 15}|{'.' * 15}]  threshold 0.5  0 tokens"
        assert wait_for(file, "0 tokens")[:2] == ["a", empty]
        printer(event(98, -3.0, running=0.05))
        rows = wait_for(file, "1 token ")
        assert rows[0] == "ab"
        assert re.fullmatch(r"score 0\.050  \[=+\.+\|\.+\]  threshold 0\.5  1 token  \d+ tokens/s", rows[1])
        printer(event(99, 3.0, running=0.95, alarms=(alarm(2),)))
        rows = wait_for(file, "2 tokens ")
        assert rows[0] == "ab⟦c"
        raised = r"score 0\.950  \[=+\|=+\.+\]  threshold 0\.5  ALARM at token 2  2 tokens  \d+ tokens/s"
        assert re.fullmatch(raised, rows[1])
        printer.finish("max_new_tokens")
    text, alarm_line, summary = file.terminal.lines[0], "".join(file.terminal.lines[1:-1]), file.terminal.lines[-1]
    assert text == "ab⟦c⟧"
    assert alarm_line.startswith("alarm: ")
    assert re.fullmatch(r"ended by: max_new_tokens; ALARM at token 2; score 0\.950; 2 tokens at \d+/s", summary)


def test_a_long_text_at_full_speed_is_whole_in_the_scrollback() -> None:
    file = Screen(30, 6)
    text = "".join(f"line {at}: é 日本 😀\tand a tail that is wrapped\n" for at in range(60))
    with TokenPrinter(file.console(), WEIGHTS, Bytes()) as printer:
        for at, byte in enumerate(text.encode()):
            printer(event(byte, -1.0, running=0.1))
            if at % 200 == 0:
                time.sleep(0.001)
        printer.finish("eos")
    lines = [line.replace(" ", "") for line in file.terminal.lines]
    assert lines[:-2] == [line.replace(" ", "").replace("\t", "") for line in text.split("\n")][:-1]
    assert lines[-2] == ""
    assert lines[-1].startswith("endedby:eos;noalarm")


def test_without_colours_a_terminal_gets_marks_and_a_status_line_and_no_style() -> None:
    file = Screen(100)
    to = file.console(color_system="auto", _environ={"TERM": "xterm-256color", "NO_COLOR": "1"})
    with TokenPrinter(to, WEIGHTS, Bytes()) as printer:
        for token, logit in zip(b"ab", (-1.0, 1.0), strict=True):
            printer(event(token, logit, generated=False, running=0.7, alarms=(alarm(1),) if token == 98 else ()))
        rows = wait_for(file, "ALARM at prompt token 2")
        assert rows[0] == "a⟦b"
        assert rows[1].endswith("  0 tokens"), "no speed before the first token that is generated"
        printer.finish("eos")
    assert not re.search(r"\x1b\[[0-9;]*m", file.getvalue())
    assert file.terminal.lines[0] == "a⟦b⟧"


def test_a_dumb_terminal_gets_text_alone() -> None:
    file = Screen(100)
    assert went([event(97, 1.0, running=0.2)], to=file.console(color_system="auto", _environ={"TERM": "dumb"}))
    assert "\x1b" not in file.getvalue()
    assert file.terminal.lines[0] == "⟦a⟧"


@pytest.mark.parametrize("named", [True, False])
def test_what_the_terminal_cannot_encode_is_spelled_out_and_wrapped_as_such(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Screen(12, 6)
    if not named:  # as in the command
        monkeypatch.setattr(sys, "stdout", file)
    with patch.object(Screen, "encoding", "latin-1"):
        to = file.console() if named else file.console(file=None)
        with TokenPrinter(to, WEIGHTS, Bytes()) as printer:
            for token in "é😀 日".encode():
                printer(event(token, -1.0))
            printer.finish("eos")
    assert file.terminal.lines[0] == "é\\U0001f600 \\u65e5"
    assert "\\U" in file.getvalue()


def test_an_alarm_that_the_terminal_cannot_encode_is_spelled_out() -> None:
    file = Screen(200)
    with patch.object(Screen, "encoding", "latin-1"), TokenPrinter(file.console(), WEIGHTS, Pieces("日")) as printer:
        printer(event(0, running=0.8, alarms=(alarm(0, token=0),)))
        printer.finish("eos")
    assert file.terminal.lines[1].endswith("generated token 1, '\\u65e5'")
