"""Readings by slot of the KV cache, so that a token which the prefix cache serves has those that were computed with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SlotCache:
    """float32 [width] for each slot, NaN where none was computed; and the blocks of each row, as the scheduler gives them.

    Slot `block_size * block + offset` holds what belongs to the keys and values that the engine keeps there.
    """

    def __init__(self, n_blocks: int, block_size: int, width: int) -> None:
        self.block_size = block_size
        # zero pages of the system that nobody has touched take no memory; NaN would touch all of them
        self._values = np.zeros((n_blocks * block_size, width), dtype=np.float32)
        self._known = np.zeros(n_blocks * block_size, dtype=bool)
        self._blocks = np.zeros((1, 1), dtype=np.int64)
        self._n_blocks = np.zeros(1, dtype=np.int64)

    def set_blocks(self, row: int, blocks: Sequence[int]) -> None:
        self._make_room(row, len(blocks))
        self._blocks[row, : len(blocks)], self._n_blocks[row] = blocks, len(blocks)

    def add_blocks(self, row: int, blocks: Sequence[int]) -> None:
        before = int(self._n_blocks[row])
        self._make_room(row, before + len(blocks))
        self._blocks[row, before : before + len(blocks)] = blocks
        self._n_blocks[row] = before + len(blocks)

    def forget(self, blocks: Sequence[int]) -> None:
        """The engine has given these blocks away, and what they held is written over."""
        self._known.reshape(-1, self.block_size)[list(blocks)] = False

    def copy_block(self, source: int, target: int) -> None:
        """The engine has copied the keys and values of a block."""
        start, stop = (block * self.block_size for block in (source, target))
        self._values[stop : stop + self.block_size] = self._values[start : start + self.block_size]
        self._known[stop : stop + self.block_size] = self._known[start : start + self.block_size]

    def write(self, rows: np.ndarray, positions: np.ndarray, values: np.ndarray) -> None:
        """values [n width] of n tokens, row and position [n] each."""
        slots = self._slots(rows, positions)
        self._values[slots] = values
        self._known[slots] = True

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """[stop-start width], NaN where nothing is known."""
        positions = np.arange(start, stop)
        slots = self._slots(np.full(len(positions), row), positions)
        return np.where(self._known[slots][:, None], self._values[slots], np.float32(np.nan))

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._blocks[rows, positions // self.block_size] * self.block_size + positions % self.block_size

    def _make_room(self, row: int, n_blocks: int) -> None:
        rows, width = self._blocks.shape
        if row >= rows or n_blocks > width:
            table = np.zeros((max(rows, 2 * row + 1), max(width, 2 * n_blocks)), dtype=np.int64)
            table[:rows, :width] = self._blocks
            self._blocks = table
            self._n_blocks = np.concatenate([self._n_blocks, np.zeros(len(table) - rows, dtype=np.int64)])
