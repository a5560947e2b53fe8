"""Where text ends on a terminal that wraps it, so that it can be written once and in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.cells import get_character_cell_size
from rich.segment import ControlType, Segment
from rich.style import Style

Piece = tuple[str, Style | None]

_TAB_STOPS = 8
_JOINER = "\u200d"  # makes one emoji of those before and after it


def control(codes: str) -> Segment:
    """Control codes as rich writes them: as they are, and to a terminal only."""
    return Segment(codes, None, [(ControlType.BELL,)])


_ERASE_REST_OF_ROW = control("\x1b[K")


class GrowingText:
    """Text that the terminal itself wraps, scrolls and keeps; this follows the column in which it ends.

    A character that fills a row is held back, and written again with the next pieces: past the last column is no place for a
    cursor to erase from or to return to, since terminals differ in what they do there.
    """

    def __init__(self) -> None:
        self._width = 0
        self._column = 0
        self._wrapped = False
        self._cells: list[int] = []  # columns of each character of the unfinished line
        self._last: list[Piece] = []  # its last character, with the marks on it
        self._held = False

    def extend(self, pieces: Iterable[Piece], width: int) -> tuple[list[Segment], list[Segment]]:
        """What to write where the text ends, and what to write after it without moving that place.

        width: the columns of the terminal now. Pieces hold no control characters but line ends and tabs.
        """
        if width != self._width:
            self._wrap_again(width)
        pieces = [(text, style) for text, style in pieces if text]
        written: list[Segment] = []
        if self._held or (pieces and self._joined_by(pieces[0][0])):
            written += self._back_to_last()
            pieces = [*self._last, *pieces]
        for text, style in pieces:
            written += self._written(text, style)
        return self._without_held(written) if pieces else (written, [])

    def _at_edge(self) -> bool:
        return self._column == self._width

    def _joined_by(self, text: str) -> bool:
        """Whether text goes on with the last character: some terminals forget that one when the cursor moves."""
        if not self._last or text[0] in "\n\t":
            return False
        return get_character_cell_size(text[0]) == 0 or self._last[-1][0].endswith(_JOINER)

    def _back_to_last(self) -> Iterator[Segment]:
        """Forget the last character, and move the cursor to where it stands, unless it waits there."""
        cells = [width for text, _ in self._last for width in _cells(text)]
        del self._cells[len(self._cells) - len(cells) :]
        self._column -= sum(cells)
        if not self._held:
            yield control(f"\x1b[{sum(cells)}D")

    def _written(self, text: str, style: Style | None) -> Iterator[Segment]:
        for at, line in enumerate(text.split("\n")):
            if at:
                yield from self._line_end()
            if line:
                yield Segment(self._take(line), style)

    def _line_end(self) -> Iterator[Segment]:
        if self._wrapped and not self._at_edge():
            # A row that begins amid a background is filled with that by some terminals.
            yield _ERASE_REST_OF_ROW
        yield Segment("\n")
        self._column, self._wrapped, self._cells = 0, False, []

    def _take(self, line: str) -> str:
        """Follow a line or a part of one; returns it with spaces for tabs, which paint nothing and stop at the edge."""
        taken = ""
        for at, part in enumerate(line.split("\t")):
            spaced = " " * (_TAB_STOPS - self._column % _TAB_STOPS) + part if at else part
            self._advance(_cells(spaced))
            taken += spaced
        return taken

    def _advance(self, cells: list[int]) -> None:
        for width in cells:
            if self._column + width > self._width:
                self._column, self._wrapped = 0, True
            self._column += width
        self._cells += cells

    def _wrap_again(self, width: int) -> None:
        """Terminals wrap an unfinished line anew where the window gets another width."""
        cells, self._cells = self._cells, []
        self._width, self._column, self._wrapped = width, 0, False
        self._advance(cells)

    def _without_held(self, written: list[Segment]) -> tuple[list[Segment], list[Segment]]:
        """The last character apart, if it fills the row."""
        before, last = _split_last(written) if self._column else (written, [])
        self._last = [(segment.text, segment.style) for segment in last]
        self._held = bool(last) and self._at_edge()
        if self._held:
            return before, last
        return ([*written, _ERASE_REST_OF_ROW] if self._wrapped else written), []


def _split_last(segments: list[Segment]) -> tuple[list[Segment], list[Segment]]:
    """The last character that takes up columns, and all that combines with it, off the end of text."""
    before, last = list(segments), list[Segment]()
    while before and not before[-1].control:
        text, style, _ = before.pop()
        base = max((at for at, width in enumerate(_cells(text)) if width), default=0)
        last.insert(0, Segment(text[base:], style))
        if base:
            before.append(Segment(text[:base], style))
        if get_character_cell_size(text[base]):
            break
    return before, last


def _cells(text: str) -> list[int]:
    return [1] * len(text) if text.isascii() else [get_character_cell_size(char) for char in text]
