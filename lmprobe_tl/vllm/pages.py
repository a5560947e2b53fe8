"""Numbers of many tokens of many requests, in pages: written by (row, position) for a whole step at once."""

from __future__ import annotations

import numpy as np

PAGE = 64  # positions
_FIRST_PAGES = 64


class Pages:
    """float32 [width] for each position of each row. Memory follows what is held, and is used again once freed.

    A position that was never written reads as NaN.
    """

    def __init__(self, width: int) -> None:
        self._pool = np.full((_FIRST_PAGES, PAGE, width), np.nan, dtype=np.float32)
        self._free = list(range(_FIRST_PAGES))
        self._table = np.full((1, 1), -1, dtype=np.int64)  # page of each row and sixty-four positions

    @property
    def n_pages_held(self) -> int:
        return len(self._pool) - len(self._free)

    def write(self, rows: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
        """values [n width] of n tokens, row and position [n] each."""
        page, place = positions // PAGE, positions % PAGE
        self._make_room(int(rows.max()), int(page.max()))
        where = self._table[rows, page]
        if (where < 0).any():
            for row, missing in set(zip(rows[where < 0].tolist(), page[where < 0].tolist(), strict=True)):
                self._table[row, missing] = self._new_page()
            where = self._table[rows, page]
        self._pool[where, place] = values

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """[stop-start width], a copy."""
        positions = np.arange(start, stop)
        found = np.full((len(positions), self._pool.shape[2]), np.nan, dtype=np.float32)
        if row < len(self._table):
            page = positions // PAGE
            known = page < self._table.shape[1]
            where = np.full(len(positions), -1, dtype=np.int64)
            where[known] = self._table[row, page[known]]
            held = where >= 0
            found[held] = self._pool[where[held], positions[held] % PAGE]
        return found

    def gather(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[n width] of n tokens that were written, row and position [n] each; a copy."""
        return self._pool[self._table[rows, positions // PAGE], positions % PAGE]

    def free(self, row: int) -> None:
        """Forget a row."""
        if row < len(self._table):
            held = self._table[row][self._table[row] >= 0].tolist()
            self._pool[held] = np.nan
            self._free += held
            self._table[row] = -1

    def _new_page(self) -> int:
        if not self._free:
            size = len(self._pool)
            self._pool = np.concatenate([self._pool, np.full_like(self._pool, np.nan)])
            self._free = list(range(size, 2 * size))
        return self._free.pop()

    def _make_room(self, row: int, page: int) -> None:
        rows, pages = self._table.shape
        if row >= rows or page >= pages:
            rows, pages = _at_least(rows, row + 1), _at_least(pages, page + 1)
            table = np.full((rows, pages), -1, dtype=np.int64)
            table[: self._table.shape[0], : self._table.shape[1]] = self._table
            self._table = table


def _at_least(size: int, wanted: int) -> int:
    """`size`, doubled until it is as much as wanted."""
    while size < wanted:
        size *= 2
    return size
