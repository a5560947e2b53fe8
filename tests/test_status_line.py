"""The status line: score, threshold and alarm whatever the width, and a bar that reaches its middle at the threshold."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.segment import Segment

from lmprobe_tl.colours import share_colour
from lmprobe_tl.terminal.status_line import LiveStatus, status_line, summary_line
from lmprobe_tl.terminal.token_style import TokenStyle

PLAIN = TokenStyle(Console(file=io.StringIO(), _environ={}))
COLOURED = TokenStyle(Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", _environ={}))
STATUS = LiveStatus(threshold=0.87346, running=0.4123, highest=0.52, share=-0.4, n_tokens=42, per_second=118.4)
ALARMED = replace(STATUS, running=0.9, highest=0.95, share=0.3, alarm_at="token 17")


def text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def bar(share: float, columns: int = 60) -> str:
    found = re.search(r"\[(.*)\]", text(status_line(replace(STATUS, share=share, per_second=None), PLAIN, columns)))
    assert found
    return found[1]


def test_a_wide_line_says_everything() -> None:
    assert text(status_line(STATUS, PLAIN, 100)) == (
        "score 0.412  [==========.....|...............]  threshold 0.8735  42 tokens  118 tokens/s"
    )
    assert text(status_line(ALARMED, PLAIN, 120)) == (
        "score 0.900  [===============|====...........]  threshold 0.8735  ALARM at token 17  42 tokens  118 tokens/s"
    )


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (20, "ALARM  0.900/0.8735"),
        (34, "ALARM  0.900/0.8735  42 tokens"),
        (44, "ALARM at token 17  0.900/0.8735  42 tokens"),
        (60, "0.900  [======|=.....]  0.8735  ALARM at token 17  42 tokens"),
    ],
)
def test_a_narrow_line_says_the_alarm_and_the_numbers(columns: int, line: str) -> None:
    assert text(status_line(ALARMED, PLAIN, columns)) == line


@given(st.integers(1, 140), st.sampled_from([STATUS, ALARMED, LiveStatus(0.5), replace(ALARMED, alarm_at="prompt token 9")]))
def test_no_line_is_longer_than_the_window(columns: int, status: LiveStatus) -> None:
    line = text(status_line(status, COLOURED, columns))
    assert len(line) <= columns
    assert line.isascii()
    if columns >= 20:
        assert "0.8735" in line or status.threshold == 0.5
        assert ("ALARM" in line) == (status.alarm_at is not None)


def test_the_bar_grows_with_the_score_and_reaches_its_middle_at_the_threshold() -> None:
    bars = [bar(share) for share in (-1.0, -0.7, -0.3, -1e-9, 0.0, 1e-9, 0.4, 0.8, 1.0)]
    filled = [one.count("=") for one in bars]
    assert filled == sorted(filled)
    middle = len(bars[0]) // 2
    assert {one.index("|") for one in bars} == {middle}
    for one, above in zip(bars, [False] * 6 + [True] * 3, strict=True):
        assert ("=" in one[middle:]) == above
        assert re.fullmatch(r"=*\.*\|\.*" if not above else r"=*\|=*\.*", one)
    assert bars[3] == bars[4] == "=" * middle + "|" + "." * middle
    assert filled[-1] == 2 * middle


def test_without_a_score_the_bar_is_empty() -> None:
    line = text(status_line(LiveStatus(0.5), PLAIN, 80))
    assert line.startswith("score -  [")
    assert "=" not in line
    assert line.endswith("threshold 0.5  0 tokens")


def test_one_token_is_not_tokens() -> None:
    assert text(status_line(replace(STATUS, n_tokens=1, per_second=None), PLAIN, 100)).endswith("  1 token")


def test_colours_are_those_of_the_scale_and_the_alarm_is_underlined() -> None:
    assert all(segment.style is None for segment in status_line(ALARMED, PLAIN, 100))
    segments = status_line(ALARMED, COLOURED, 100)
    painted = {segment.text: segment.style for segment in segments if segment.style}
    assert painted["ALARM at token 17"].underline
    fills = [segment.style for segment in segments if segment.text in "=|" and segment.style]
    assert fills[0].bgcolor.name == share_colour(-1.0)
    # The mark is reached, and what lies below it is on the blue side.
    marks = [segment.style for segment in segments if segment.text == "|"]
    assert marks[0].bgcolor.name == share_colour(0.0)
    (unreached,) = [segment.style for segment in status_line(STATUS, COLOURED, 100) if segment.text == "|"]
    assert unreached is None


def test_the_summary_says_how_it_ended_and_whether_there_was_an_alarm() -> None:
    assert text(summary_line(STATUS, PLAIN, "eos")) == (
        "ended by: eos; no alarm (score at most 0.520, threshold 0.87346); 42 tokens at 118/s"
    )
    assert text(summary_line(ALARMED, PLAIN, "probe 'p'")) == (
        "ended by: probe 'p'; ALARM at token 17; score 0.900; 42 tokens at 118/s"
    )
    assert text(summary_line(LiveStatus(0.5), PLAIN, "eos")) == "ended by: eos; no alarm; 0 tokens"
