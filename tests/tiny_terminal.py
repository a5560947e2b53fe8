"""A terminal of a few dozen lines, to see what a program leaves on the screen and in the scrollback.

Where terminals differ it does what is hardest on a program. Once the last column is written the cursor stays on it, so that
erasing takes that character away and movements start there. A mark that comes after a movement combines with nothing. What
is erased, and a row that begins by scrolling, has the background of the moment. Unknown sequences are errors.
"""

from __future__ import annotations

import io
import re
from typing import Any

from rich.cells import get_character_cell_size
from rich.console import Console

Cell = tuple[str, str]  # text, '' in the right half of a wide character; and style
_CODES = re.compile(r"\x1b(?:\[(\??[0-9;]*)([A-Za-z])|([78D]))")


class Row:
    def __init__(self, width: int, background: str = "") -> None:
        self.cells: list[Cell] = [(" ", background)] * width
        self.wraps = False  # goes on in the next row

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.cells).rstrip()


class TinyTerminal:
    """`feed` it what a program writes. `column` and `row` of the cursor count from 0."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.scrollback: list[Row] = []
        self.screen = [Row(width) for _ in range(height)]
        self.column = self.row = 0
        self.style = ""
        self._full = False  # the last column is written, and the cursor still stands there
        self._wrapping = True
        self._saved = (0, 0)
        self._combines: tuple[Row, int] | None = None  # where a mark goes

    @property
    def rows(self) -> list[Row]:
        return self.scrollback + self.screen

    @property
    def lines(self) -> list[str]:
        """Scrollback and screen as text, with what the terminal wrapped in one line, up to the last that is not empty."""
        lines, line = [], ""
        for row in self.rows:
            line += "".join(text for text, _ in row.cells)
            if not row.wraps:
                lines.append(line.rstrip())
                line = ""
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def below_cursor(self) -> list[str]:
        return [row.text for row in self.screen[self.row + 1 :]]

    def feed(self, output: str) -> None:
        at = 0
        while at < len(output):
            if output[at] != "\x1b":
                self._put(output[at])
                at += 1
                continue
            found = _CODES.match(output, at)
            assert found, f"no such sequence: {output[at : at + 12]!r}"
            at = found.end()
            self._obey(found[1] or "", found[2] or "ESC" + found[3])

    def _obey(self, numbers: str, code: str) -> None:
        if code == "m":
            self.style = "" if numbers in ("", "0") else numbers
            return
        self._combines = None
        if (code, numbers) in (("J", ""), ("K", "")):
            self._erase(below=code == "J")
        elif code in ("h", "l") and numbers == "?7":
            self._wrapping = code == "h"
        elif code == "ESC7":
            self._saved = (self.column, self.row)
        else:
            self._full = False
            count = int(numbers or 1)
            if code == "A":
                self.row = max(0, self.row - count)
            elif code == "B":
                self.row = min(self.height - 1, self.row + count)
            elif code == "D":
                self.column = max(0, self.column - count)
            elif code == "ESC8":
                self.column, self.row = self._saved
            elif code == "ESCD":
                self._down()
            else:
                raise AssertionError(f"no such sequence: {numbers}{code}")

    def _background(self) -> str:
        return ";".join(re.findall(r"48;2;\d+;\d+;\d+", self.style))

    def _erase(self, *, below: bool) -> None:
        row = self.screen[self.row]
        row.cells[self.column :] = Row(self.width - self.column, self._background()).cells
        row.wraps = False
        if below:
            self.screen[self.row + 1 :] = [Row(self.width, self._background()) for _ in self.screen[self.row + 1 :]]

    def _down(self) -> None:
        if self.row < self.height - 1:
            self.row += 1
            return
        self.scrollback.append(self.screen.pop(0))
        self.screen.append(Row(self.width, self._background()))

    def _put(self, char: str) -> None:
        if char in "\r\n":
            # As the terminal driver hands it on: a line end is a return, too.
            self.column, self._full, self._combines = 0, False, None
            if char == "\n":
                self._down()
            return
        width = get_character_cell_size(char)
        assert char >= " ", f"a control character: {char!r}"
        if width == 0:
            if self._combines:
                row, at = self._combines
                row.cells[at] = (row.cells[at][0] + char, row.cells[at][1])
            return
        if self._full or self.column + width > self.width:
            if not self._wrapping:
                self.column = self.width - width
            else:
                self.screen[self.row].wraps = True
                self.column = 0
                self._down()
        row = self.screen[self.row]
        row.cells[self.column : self.column + width] = [(char, self.style), ("", self.style)][:width]
        self._combines = (row, self.column)
        self._full = self.column + width == self.width
        self.column = min(self.column + width, self.width - 1)

    def resize(self, width: int) -> None:
        """Another width, as in tmux: lines of narrow text are wrapped anew, and the cursor stays at its place in them."""
        lines: list[list[Cell]] = []
        cursor, goes_on = (0, 0), False
        for row in self.rows:
            if not goes_on:
                lines.append([])
            if row is self.screen[self.row]:
                cursor = (len(lines) - 1, len(lines[-1]) + self.column + self._full)
            lines[-1] += row.cells if row.wraps else row.cells[: len(row.text)]
            goes_on = row.wraps
        self.width, rows, at = width, list[Row](), 0
        for number, line in enumerate(lines):
            if number == cursor[0]:
                at, self.column = len(rows) + cursor[1] // width, cursor[1] % width
            for start in range(0, max(1, len(line)), width):
                rows.append(Row(width))
                rows[-1].cells[: len(line[start : start + width])] = line[start : start + width]
                rows[-1].wraps = start + width < len(line)
        rows += [Row(width) for _ in range(max(self.height, at + 1) - len(rows))]
        first = min(len(rows) - self.height, at)
        self.scrollback, self.screen = rows[:first], rows[first : first + self.height]
        self.row, self._full = at - first, False


class Screen(io.StringIO):
    """A file that is a terminal: what is written shows in `terminal`."""

    def __init__(self, width: int = 40, height: int = 6) -> None:
        super().__init__()
        self.terminal = TinyTerminal(width, height)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.terminal.feed(text)
        return super().write(text)

    def console(self, **settings: Any) -> Console:
        usual = {"file": self, "color_system": "truecolor", "highlight": False, "_environ": {"TERM": "xterm"}}
        console = Console(**(usual | settings))
        console.size = (self.terminal.width, self.terminal.height)
        return console
