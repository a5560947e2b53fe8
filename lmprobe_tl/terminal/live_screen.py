"""Text that grows while a program works: on a terminal with a status line below it, elsewhere as plain output."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from threading import Event, Lock, Thread

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from lmprobe_tl.terminal.growing_text import GrowingText, Piece, control

# A terminal draws at most this often; what comes in between waits.
_INTERVAL_S = 0.08
# How soon a resized window is noticed while nothing comes.
_IDLE_S = 0.5

_ERASE_BELOW = control("\x1b[J")
# Down, which scrolls at the bottom, and up again, both in the same column: now there is a row below. Keep the place.
_KEEP_PLACE = control("\x1bD\x1b[A\x1b7")
_TO_STATUS = control("\x1b[B\r\x1b[?7l")  # without wrapping: it is one row, whatever the window is by now
_BACK = control("\x1b[?7h\x1b8")


class _Segments:
    def __init__(self, segments: Iterable[Segment]) -> None:
        self._segments = segments

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._segments


def _print(console: Console, segments: Iterable[Segment]) -> None:
    console.print(_Segments(segments), end="", soft_wrap=True)


def is_live(console: Console) -> bool:
    """Whether the console writes to a terminal in which a cursor can move. Colours may also be forced into a pipe."""
    isatty = getattr(console.file, "isatty", None)
    return bool(
        console.is_terminal
        and not console.is_dumb_terminal
        and not console.legacy_windows
        and isatty is not None
        and isatty()
    )


class PlainOutput:
    """Writes each piece at once, as text (and colours, if the console has them), and moves no cursor."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def add(self, text: str, style: Style | None) -> None:
        _print(self._console, (Segment(part, style if part.strip("\n") else None) for part in _by_line(text)))

    def close(self, lines: Sequence[Sequence[Segment]]) -> None:
        """End the text, and write these lines after it."""
        _print(self._console, _ending(lines))


class LiveScreen:
    """Text as it comes, with a status line below it that is gone in the end.

    Text is written once, so that the terminal wraps and scrolls it as any program's: its scrollback, a copy and a resized
    window have it whole. Between two frames the cursor stands, visible, where the text ends, and nothing but the status line
    stands below; so there is nothing to put back, however the process ends. A thread of its own draws, at a limited rate.

    status: makes the status line for a number of columns, in the thread that draws.
    """

    def __init__(self, console: Console, status: Callable[[int], Sequence[Segment]]) -> None:
        self._console, self._status = console, status
        self._text = GrowingText()
        self._waiting: list[Piece] = []
        self._lock = Lock()
        self._news, self._over = Event(), Event()
        self._thread: Thread | None = None
        self._drawn_size: tuple[int, int] | None = None
        self._failure: BaseException | None = None

    def add(self, text: str, style: Style | None) -> None:
        if self._failure is not None:
            raise self._failure
        with self._lock:
            self._waiting.append((text, style))
        self._news.set()
        if self._thread is None:
            self._thread = Thread(target=self._keep_drawing, name="lmprobe-tl display", daemon=True)
            self._thread.start()

    def close(self, lines: Sequence[Sequence[Segment]]) -> None:
        """End the text, and write these lines in place of the status line."""
        self._over.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure
        written, held = self._text.extend(self._taken(), self._size()[0])
        _print(self._console, [_ERASE_BELOW, *written, *held, *_ending(lines)])

    def _keep_drawing(self) -> None:
        try:
            while not self._over.is_set():
                self._news.wait(_IDLE_S)
                self._news.clear()
                self.draw()
                self._over.wait(_INTERVAL_S)
        except (Exception, SystemExit) as failure:  # rich leaves by SystemExit where nobody reads
            self._failure = failure

    def draw(self) -> None:
        """Show what has come since the last time, if anything has or if the window has another size."""
        pieces, size = self._taken(), self._size()
        if not pieces and size == self._drawn_size:
            return
        width, height = size
        written, held = self._text.extend(pieces, width)
        # In a window of one row there is no row below, and what is held back waits.
        below = [_KEEP_PLACE, *held, _TO_STATUS, *self._status(width), _BACK] if height > 1 else []
        _print(self._console, [_ERASE_BELOW, *written, *below])
        self._drawn_size = size

    def _taken(self) -> list[Piece]:
        with self._lock:
            pieces, self._waiting = self._waiting, []
        return pieces

    def _size(self) -> tuple[int, int]:
        """Columns and rows of the window, this very moment."""
        try:
            columns, rows = os.get_terminal_size(self._console.file.fileno())
        except (AttributeError, OSError, ValueError):
            columns, rows = self._console.size
        return columns or self._console.width, rows or self._console.height


def _by_line(text: str) -> list[str]:
    """Lines and line ends apart: a background on a line end would paint the rest of the line."""
    return [part for line in text.split("\n") for part in ("\n", line)][1:]


def _ending(lines: Sequence[Sequence[Segment]]) -> list[Segment]:
    return [Segment("\n"), *(segment for line in lines for segment in (*line, Segment("\n")))]
