"""Columns that arrive a few at a time, kept on their device."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # columns


class History:
    """A tensor [batch n ...] that grows along n, in blocks that are never copied.

    A list with one small tensor a step would take a kilobyte for each, and one growing tensor would be copied in every step.
    """

    def __init__(self) -> None:
        self.n_columns = 0
        self._blocks: list[Tensor] = []
        self._used: list[int] = []

    def append(self, piece: Tensor) -> None:
        """Keep a copy of the next columns [batch new ...]."""
        new = piece.shape[1]
        if not self._blocks or self._used[-1] + new > self._blocks[-1].shape[1]:
            shape = (piece.shape[0], max(new, _BLOCK), *piece.shape[2:])
            with torch.inference_mode(False):  # a block made inside inference mode could not be written to outside
                self._blocks.append(torch.empty(shape, dtype=piece.dtype, device=piece.device))
            self._used.append(0)
        used = self._used[-1]
        self._blocks[-1][:, used : used + new] = piece
        self._used[-1] = used + new
        self.n_columns += new

    def read(self, start: int = 0) -> Tensor:
        """The columns from `start` on, [batch n ...], on their device."""
        parts: list[Tensor] = []
        end = self.n_columns
        for block, used in zip(reversed(self._blocks), reversed(self._used), strict=True):
            if end <= start and parts:
                break
            parts.append(block[:, max(0, start - (end - used)) : used])
            end -= used
        return torch.cat(parts[::-1], dim=1)

    @property
    def n_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)
