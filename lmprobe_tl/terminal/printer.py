"""Tokens in the terminal as they come, coloured by their score, with what the probe says so far below."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.style import Style

from lmprobe_tl.colours import score_share
from lmprobe_tl.live.records import Alarm, TokenEvent
from lmprobe_tl.live.reduction import live_reduction
from lmprobe_tl.live.watches import threshold_logit, threshold_of
from lmprobe_tl.terminal.live_screen import LiveScreen, PlainOutput, is_live
from lmprobe_tl.terminal.status_line import LiveStatus, status_line, summary_line
from lmprobe_tl.terminal.token_style import TokenStyle
from lmprobe_tl.token_text import TokenText
from lmprobe_tl.weights import ProbeWeights

# Around flagged text.
OPEN_MARK, CLOSE_MARK = "\u27e6", "\u27e7"
# A model may write escape sequences, and characters that turn the order of others around: none of them reach the terminal.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class TokenPrinter:
    """An `on_token` that shows one row's tokens as they are scored; with several probes, by the score of the first.

    Flagged text stands between marks. Where there are colours it is underlined, too, and every token has a background from
    blue (well below the threshold) to orange (well above), which colour-blind readers tell apart; the prompt is in italics.
    On a terminal, a line below the text follows the running score. Control characters are spelled out.

    `finish` ends the display. As a context manager it ends with any exception, too.
    """

    def __init__(self, console: Console, weights: ProbeWeights, tokenizer: Any, row: int = 0) -> None:
        self._console, self._weights, self._tokenizer, self._row = console, weights, tokenizer, row
        self._threshold_logit = threshold_logit(weights)
        self._style = TokenStyle(console)
        self._live = is_live(console)
        self._output = LiveScreen(console, self._status_line) if self._live else PlainOutput(console)
        self._text = TokenText(tokenizer)
        self._mark_style: Style | None = None
        self._flagged = self._finished = False
        self._prompt_length = self._n_generated = 0
        self._running: float | None = None
        self._highest = -math.inf
        self._alarm: Alarm | None = None
        self._first_at = self._last_at = 0.0

    def __call__(self, event: TokenEvent) -> None:
        if event.row != self._row:
            return
        name = self._weights.name
        self._last_at = perf_counter()
        if not self._prompt_length + self._n_generated:
            self._first_at = self._last_at
        self._n_generated += event.generated
        self._prompt_length += not event.generated
        self._running = running = event.running[name]
        if running is not None and running > self._highest:
            self._highest = running
        for alarm in event.alarms:
            if alarm.probe == name:
                self._alarm = alarm
        self._show(self._text.add(event.token_id, event.logits[name]))

    def _show(self, added: tuple[str, float] | None) -> None:
        if added is None:
            return
        text, logit = added
        flagged = logit >= self._threshold_logit
        share = score_share(logit, self._threshold_logit)
        style = self._style(share, flagged=flagged, prompt=not self._n_generated)
        if self._flagged and not flagged:
            self._write(CLOSE_MARK, self._mark_style)
        if flagged:
            self._mark_style = style
            text = text if self._flagged else OPEN_MARK + text
        self._flagged = flagged
        self._write(text, style)

    def _write(self, text: str, style: Style | None) -> None:
        self._output.add(self._spelled_out(text), style)

    def _spelled_out(self, text: str) -> str:
        text = _COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
        encoding = getattr(self._console.file, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def finish(self, ended_by: str) -> None:
        """Show what still waits for the rest of a character, and how the generation went.

        ended_by: what ended the row, as `GenerationResult.stopped_by` says it.
        """
        if self._finished:
            return
        self._finished = True
        self._show(self._text.rest())
        if self._flagged:
            self._write(CLOSE_MARK, self._mark_style)
        self._output.close(self._closing_lines(ended_by))

    def __enter__(self) -> TokenPrinter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and self._prompt_length + self._n_generated:
            with suppress(OSError):  # nobody reads any more: the first error says so
                self.finish("interrupted" if issubclass(kind, KeyboardInterrupt) else "an error")

    def _closing_lines(self, ended_by: str) -> list[Sequence[Segment]]:
        ended_by = f"probe {ended_by!r}" if ended_by == self._weights.name else ended_by
        # Speed differs from run to run; what goes into a file or another program does not.
        summary = summary_line(self._status(with_speed=self._live), self._style, ended_by)
        if self._alarm is None:
            return [summary]
        alarm, token = self._alarm, self._tokenizer.decode([self._alarm.token_id])
        at = alarm.position - self._prompt_length
        where = f"generated token {at + 1}" if at >= 0 else f"token {alarm.position + 1} of the prompt"
        text = (
            f"alarm: the running score of probe {alarm.probe!r} (pooling {self._weights.spec.pooling.inference}) reached "
            f"{alarm.score:.3f} (threshold {alarm.threshold:g}) at {where}, {token!r}"
        )
        return [[Segment(self._spelled_out(text))], summary]

    def _status_line(self, columns: int) -> list[Segment]:
        return status_line(self._status(with_speed=True), self._style, columns)

    def _status(self, *, with_speed: bool) -> LiveStatus:
        threshold, unit = threshold_of(self._weights)
        took = self._last_at - self._first_at
        running, highest = self._running, self._highest
        return LiveStatus(
            threshold=threshold,
            running=None if running is None else self._in_unit(running, unit),
            highest=None if running is None else self._in_unit(highest, unit),
            share=0.0 if running is None else score_share(self._in_unit(running, "logit"), self._threshold_logit),
            alarm_at=None if self._alarm is None else self._place(self._alarm.position),
            n_tokens=self._n_generated,
            per_second=self._n_generated / took if with_speed and took and self._n_generated else None,
        )

    def _place(self, position: int) -> str:
        at = position - self._prompt_length
        return f"token {at + 1}" if at >= 0 else f"prompt token {position + 1}"

    def _in_unit(self, score: float, unit: str) -> float:
        """A running score as 'probability' or 'logit'."""
        if unit == live_reduction(self._weights).unit:
            return score
        if unit == "probability":
            return 1 / (1 + math.exp(-score)) if score > -700 else 0.0
        return math.log(score / (1 - score)) if 0 < score < 1 else math.copysign(math.inf, score - 0.5)
