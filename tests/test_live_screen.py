"""Growing text with a status line below it, as a terminal shows it: every character once, no trace of the status."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import get_character_cell_size
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from tiny_terminal import Screen, TinyTerminal

from lmprobe_tl.terminal import live_screen
from lmprobe_tl.terminal.growing_text import GrowingText
from lmprobe_tl.terminal.live_screen import LiveScreen, PlainOutput, is_live

PAINTS = [None, Style(color="#000000", bgcolor="#79b4eb"), Style(color="#000000", bgcolor="#f0a03d")]
END = [[Segment("the end")]]


class StillScreen(LiveScreen):
    """A LiveScreen that draws when it is told to."""

    def __init__(self, console: Console, status: Any) -> None:
        with patch.object(live_screen, "Thread"):
            super().__init__(console, status)
            self.add("", None)


def status(columns: int) -> list[Segment]:
    return [Segment(("STATUS " * 40)[:columns], Style(bgcolor="#ff0000"))]


def spaced(line: str, width: int) -> str:
    """With spaces for tabs, as far as the next column that is a multiple of eight."""
    column, shown = 0, ""
    for char in line:
        cells = 8 - column % 8 if char == "\t" else get_character_cell_size(char)
        for _ in range(cells if char == "\t" else 1):
            cell = 1 if char == "\t" else cells
            column = cell if column + cell > width else column + cell
        shown += " " * cells if char == "\t" else char
    return shown


def expected(text: str, width: int) -> list[str]:
    lines = [spaced(line, width) for line in text.split("\n")]
    return [line.rstrip() for line in lines]


def without_padding(lines: list[str]) -> list[str]:
    """A wide character that does not fit leaves a blank at the end of a row."""
    return [line.replace(" ", "") for line in lines]


texts = st.text(alphabet="abc def\n\té日本😀", max_size=12) | st.text(alphabet="abcdefgh", max_size=40)
frames = st.lists(st.lists(st.tuples(texts, st.sampled_from(PAINTS)), max_size=4), max_size=8)


@settings(deadline=None, max_examples=80)
@given(frames, st.integers(4, 30), st.integers(2, 8))
def test_the_screen_has_every_character_once_and_one_status_line(frames: Any, width: int, height: int) -> None:
    file = Screen(width, height)
    screen = StillScreen(file.console(), status)
    text = ""
    for pieces in frames:
        for piece in pieces:
            screen.add(*piece)
            text += piece[0]
        screen.draw()
        shown, (first, *rest) = list(file.terminal.lines), file.terminal.below_cursor()
        if text:
            assert first == status(width)[0].text.rstrip()
            assert not "".join(rest)
            assert shown.pop() == first
            assert without_padding(shown) == without_padding(expected(text, width))[: len(shown)]
            assert not "".join(expected(text, width)[len(shown) :])
    screen.close(END)
    assert without_padding(file.terminal.lines) == without_padding([*expected(text, width), "the end"])
    assert "STATUS" not in "".join(file.terminal.lines)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.text("abcdefgh\n", max_size=40), st.sampled_from(PAINTS)), max_size=8), st.integers(4, 10))
def test_nothing_is_painted_but_text(pieces: Any, width: int) -> None:
    file = Screen(width, 3)
    screen = StillScreen(file.console(), status)
    painted: list[str] = []
    for at, piece in enumerate([*pieces, ("", None)]):
        screen.add(*piece)
        if at == len(pieces):
            screen.close(END)
        elif at % 3:
            screen.draw()
        text_rows = file.terminal.rows[: len(file.terminal.rows) - len(file.terminal.below_cursor())]
        painted = [text for row in text_rows for text, style in row.cells if style]
        assert " " not in painted
    assert len(painted) == sum(len(text.replace("\n", "")) for text, paint in pieces if paint)


narrow = st.text(alphabet="abcdef\n", max_size=25)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(narrow, narrow, narrow, st.integers(20, 30)), max_size=8))
@example([("a" * 30, "", "", 20), ("b" * 10, "c", "", 20)])
@example([("a" * 25, "", "", 20), ("b" * 15, "c", "", 20)])
@example([("a" * 26, "", "", 26), ("\n", "b", "", 20)])
def test_text_survives_another_width_of_the_window(frames: Any) -> None:
    file = Screen(25, 10)
    console = file.console()
    screen = StillScreen(console, status)
    for *texts, width in frames:
        for text in texts:
            screen.add(text, None)
            screen.draw()
        file.terminal.resize(width)
        console.size = (width, 10)
        screen.draw()
    screen.close(END)
    # Where a resized row is full, some terminals end the line there.
    written = "".join(text for *texts, _ in frames for text in texts)
    assert "".join(file.terminal.lines) == written.replace("\n", "") + "the end"


@pytest.mark.parametrize("frames", [["abcdefgh\nx"], ["abcd", "efgh", "\n", "x"], ["abcdefg", "h\nx"]])
def test_a_line_that_fills_its_rows_is_followed_by_the_next(frames: list[str]) -> None:
    file = Screen(4, 3)
    screen = StillScreen(file.console(), status)
    for text in frames:
        screen.add(text, PAINTS[1])
        screen.draw()
    screen.close(END)
    assert file.terminal.lines == ["abcdefgh", "x", "the end"]


def test_tabs_reach_to_the_next_column_that_is_a_multiple_of_eight() -> None:
    file = Screen(40)
    screen = StillScreen(file.console(), status)
    for text in ("ab\tc", "\t", "日本日\td\n\te"):
        screen.add(text, None)
        screen.draw()
    screen.close(END)
    assert file.terminal.lines == ["ab      c       日本日  d", "        e", "the end"]


def test_a_status_line_that_has_become_too_long_is_one_row_all_the_same() -> None:
    file = Screen(20)
    screen = StillScreen(file.console(), lambda columns: status(3 * columns))
    for text in ("abc", "def"):
        screen.add(text, None)
        screen.draw()
        assert len([row for row in file.terminal.below_cursor() if row]) == 1
    screen.close(END)
    assert file.terminal.lines == ["abcdef", "the end"]


def test_an_emoji_of_several_is_written_as_a_whole_again() -> None:
    text = GrowingText()
    text.extend([("ab\U0001f469\u200d", None)], 40)
    written, held = text.extend([("\U0001f4bb!", None)], 40)
    assert "".join(segment.text for segment in written) == "\x1b[2D\U0001f469\u200d\U0001f4bb!"
    assert not held
    written, _ = text.extend([("?", None)], 40)
    assert "".join(segment.text for segment in written) == "?"


@pytest.mark.parametrize("text", ["e\u0301o\u0308", "\u0e19\u0e49\u0e33", "a\u0301\u0308b", "\U0001f469\u200d\U0001f4bb."])
@pytest.mark.parametrize("width", [4, 5, 6])
def test_marks_that_come_later_still_combine(text: str, width: int) -> None:
    together, apart = Screen(width), Screen(width)
    for file, pieces in ((together, ["ab" + text]), (apart, ["ab", *text])):
        screen = StillScreen(file.console(), status)
        for piece in pieces:
            screen.add(piece, None)
            screen.draw()
        screen.close(END)
    assert apart.terminal.lines == together.terminal.lines
    assert without_padding(apart.terminal.lines) == ["ab" + text, "theend"]


def test_the_cursor_rests_where_the_text_ends_and_is_never_hidden() -> None:
    file = Screen(10, 5)
    screen = StillScreen(file.console(), status)
    for text, place in [("abc", (3, 0)), ("d\n", (0, 1)), ("0123456789", (9, 1)), ("x", (1, 2)), ("\n\n\n", (0, 3))]:
        screen.add(text, None)
        screen.draw()
        assert (file.terminal.column, file.terminal.row) == place
    assert "\x1b[?25l" not in file.getvalue()


def test_a_frame_without_news_writes_nothing_but_another_width_is_news() -> None:
    file = Screen(20)
    console = file.console()
    screen = StillScreen(console, status)
    screen.add("abc", None)
    screen.draw()
    written = file.getvalue()
    screen.draw()
    assert file.getvalue() == written
    file.terminal.resize(12)
    console.size = (12, 6)
    screen.draw()
    assert file.terminal.lines == ["abc", "STATUS STATU"]


def test_each_frame_reaches_the_terminal_in_one_write() -> None:
    writes: list[str] = []
    file = Screen()
    screen = StillScreen(file.console(), status)
    with patch.object(file, "write", writes.append):
        screen.add("abc", PAINTS[1])
        screen.add("\ndef", PAINTS[2])
        screen.draw()
    assert len(writes) == 1


def test_a_window_of_one_row_has_the_text_alone() -> None:
    file = Screen(20, 1)
    screen = StillScreen(file.console(), status)
    for text in ("abc", "def\n", "ghi"):
        screen.add(text, None)
        screen.draw()
    assert "STATUS" not in file.getvalue()
    screen.close(END)
    assert file.terminal.lines == ["abcdef", "ghi", "the end"]


# --- the thread ----------------------------------------------------------------------------------------------------------


def wait_for(happened: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def test_text_appears_by_itself_and_the_thread_ends_with_the_screen() -> None:
    file = Screen()
    before = threading.active_count()
    with patch.object(live_screen, "_IDLE_S", 60):
        screen = LiveScreen(file.console(), status)
        for text in ("abc", "def"):
            screen.add(text, None)
            wait_for(lambda text=text: text in file.getvalue())
        screen.close(END)
    assert file.terminal.lines == ["abcdef", "the end"]
    assert threading.active_count() == before


def test_a_burst_is_drawn_in_few_frames() -> None:
    frames: list[int] = []

    def counted(columns: int) -> list[Segment]:
        frames.append(columns)
        return status(columns)

    file = Screen()
    with patch.object(live_screen, "_INTERVAL_S", 60):
        screen = LiveScreen(file.console(), counted)
        for at in range(3000):
            screen.add(f"{at}\n", None)
        screen.close(END)
    assert file.terminal.lines == [*map(str, range(3000)), "", "the end"]
    assert len(frames) <= 1


def test_a_screen_that_never_got_text_ends_at_once() -> None:
    file = Screen()
    LiveScreen(file.console(), status).close(END)
    assert file.terminal.lines == ["", "the end"]


def test_what_goes_wrong_in_the_thread_is_not_lost() -> None:
    def broken(columns: int) -> list[Segment]:
        raise ZeroDivisionError

    screen = LiveScreen(Screen().console(), broken)
    screen.add("abc", None)
    with pytest.raises(ZeroDivisionError):
        screen.close(END)


def test_a_terminal_that_is_gone_stops_the_program() -> None:
    file = Screen()
    screen = LiveScreen(file.console(), status)
    with patch.object(file, "write", side_effect=OSError("it hung up")), pytest.raises(OSError, match="hung up"):
        wait_for(lambda: screen.add("x", None))


# --- a terminal of the operating system ----------------------------------------------------------------------------------


@contextmanager
def pseudo_terminal(width: int, height: int) -> Iterator[tuple[Any, int]]:
    """A file that is a terminal for the operating system, and the descriptor to read what comes out of it."""
    reader, writer = pty.openpty()
    set_size(writer, width, height)
    os.set_blocking(reader, False)
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        try:
            yield file, reader
        finally:
            os.close(reader)


def set_size(descriptor: int, width: int, height: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def read_all(reader: int) -> str:
    found = b""
    while True:
        try:
            found += os.read(reader, 65536)
        except BlockingIOError:
            return found.decode()


def test_the_size_is_that_of_the_window_at_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "99")  # of the shell that started the program
    with pseudo_terminal(30, 8) as (file, reader):
        screen = StillScreen(Console(file=file, color_system=None, _environ={"TERM": "xterm", "COLUMNS": "99"}), status)
        screen.add("abc", None)
        for width in (30, 20, 40):
            set_size(file.fileno(), width, 8)
            screen.draw()
            assert status(width)[0].text in read_all(reader)
            assert status(width + 1)[0].text not in read_all(reader)
        screen.close(END)
        terminal = TinyTerminal(40, 8)
        terminal.feed(read_all(reader))
        assert terminal.lines == ["", "the end"]


@pytest.mark.parametrize(
    ("settings", "live"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_is_live_unless_it_says_that_it_cannot(settings: dict[str, str], live: bool) -> None:
    with pseudo_terminal(30, 8) as (file, _):
        assert is_live(Console(file=file, _environ={"TERM": "xterm"} | settings)) is live


@pytest.mark.parametrize("settings", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_what_is_no_terminal_is_not_live_even_with_colours(settings: dict[str, str]) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        assert not is_live(Console(file=file, _environ={"TERM": "xterm"} | settings))
    os.close(reader)
    assert not is_live(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"}))


# --- plain output --------------------------------------------------------------------------------------------------------


def test_plain_output_is_the_text_itself_at_once() -> None:
    file = io.StringIO()
    output = PlainOutput(Console(file=file, _environ={}))
    written = ""
    for text in ("a\tb", "", "\n\n  c [bold]", "\u65e5" * 100, " "):
        output.add(text, PAINTS[1])
        written += text
        assert file.getvalue() == written
    output.close([*END, [Segment("really")]])
    assert file.getvalue() == written + "\nthe end\nreally\n"


def test_plain_output_has_colours_where_they_are_asked_for_but_not_on_line_ends() -> None:
    file = io.StringIO()
    output = PlainOutput(Console(file=file, _environ={"FORCE_COLOR": "1", "COLORTERM": "truecolor"}))
    output.add("a\n\nb", PAINTS[1])
    paint = "\x1b[38;2;0;0;0;48;2;121;180;235m"
    assert file.getvalue() == f"{paint}a\x1b[0m\n\n{paint}b\x1b[0m"
