"""What a probe says so far, in one line: while a model generates, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.segment import Segment

from lmprobe_tl.terminal.token_style import TokenStyle

_GAP = "  "
_SMALLEST_GAUGE, _LARGEST_GAUGE = 7, 31  # columns between the brackets; odd, so that the threshold is the middle one


@dataclass(frozen=True)
class LiveStatus:
    """Running score and threshold, both in the threshold's unit, and what else a status line says.

    share: where the running score stands on the scale of scores, from -1 over 0 (the threshold) to 1. running, highest: None
    before the first token that counts. alarm_at: where the alarm was raised, as 'token 3'. n_tokens: generated so far.
    per_second: of these, None while unknown.
    """

    threshold: float
    running: float | None = None
    highest: float | None = None
    share: float = -1.0
    alarm_at: str | None = None
    n_tokens: int = 0
    per_second: float | None = None


def status_line(status: LiveStatus, style: TokenStyle, columns: int) -> list[Segment]:
    """The status in one row of `columns`: as much as fits, the alarm and the score first."""
    score, threshold = _number(status.running), f"{status.threshold:.4g}"
    alarm = [f"ALARM at {status.alarm_at}"] if status.alarm_at else []
    tokens = _count(status.n_tokens)
    rate = [] if status.per_second is None else [f"{status.per_second:.0f} tokens/s"]
    layouts = (
        ([f"score {score}"], [f"threshold {threshold}", *alarm, tokens, *rate]),
        ([score], [threshold, *alarm, tokens, *rate]),
        ([score], [threshold, *alarm, tokens]),
    )
    for before, after in layouts:
        room = columns - len(_GAP.join([*before, "[]", *after]))
        if room >= _SMALLEST_GAUGE:
            cells = min(room - 1 + room % 2, _LARGEST_GAUGE)
            return _joined([_plain(before), _gauge(status, style, cells), *(_part(text, style) for text in after)])
    numbers = f"{score}/{threshold}"
    short = ["ALARM"] if status.alarm_at else []
    lines = ([*alarm, numbers, tokens], [*short, numbers, tokens], [*short, numbers])
    words = next((words for words in lines if len(_GAP.join(words)) <= columns), lines[-1])
    return Segment.adjust_line_length(_joined([_part(text, style) for text in words]), columns, pad=False)


def summary_line(status: LiveStatus, style: TokenStyle, ended_by: str) -> list[Segment]:
    """How a generation went, at its end."""
    at_most = "" if status.highest is None else f" (score at most {status.highest:.3f}, threshold {status.threshold:g})"
    score = f"; score {_number(status.running)}" if status.alarm_at else at_most
    alarm = f"ALARM at {status.alarm_at}" if status.alarm_at else "no alarm"
    rate = "" if status.per_second is None else f" at {status.per_second:.0f}/s"
    return [Segment(f"ended by: {ended_by}; "), *_part(alarm, style), Segment(f"{score}; {_count(status.n_tokens)}{rate}")]


def _gauge(status: LiveStatus, style: TokenStyle, cells: int) -> list[Segment]:
    """A bar up to the score, on the scale of the colours, with a mark at the threshold in its middle."""
    middle = cells // 2
    line = [Segment("[")]
    for at in range(cells):
        share = (at - middle) / middle
        reached = status.running is not None and (share <= status.share)
        line.append(Segment("|" if at == middle else "=" if reached else ".", style(share) if reached else None))
    return [*line, Segment("]")]


def _part(text: str, style: TokenStyle) -> list[Segment]:
    return [Segment(text, style(1.0, flagged=True) if text.startswith("ALARM") else None)]


def _plain(texts: Sequence[str]) -> list[Segment]:
    return [Segment(_GAP.join(texts))]


def _joined(parts: Sequence[list[Segment]]) -> list[Segment]:
    return [segment for at, part in enumerate(parts) for segment in (*([Segment(_GAP)] if at else []), *part)]


def _number(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _count(n_tokens: int) -> str:
    return f"{n_tokens} token{'s' * (n_tokens != 1)}"
