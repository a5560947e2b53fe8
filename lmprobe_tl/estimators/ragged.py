"""Reductions over the tokens of each sequence where all tokens stand one after another, unpadded; with gradients.

They are what heads.py and reductions.py compute on padded rows, for training and for whole data sets: `readings` are a few
numbers a token, and a padded copy of them may be many times as large where lengths differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl import twins
from lmprobe_tl.softmax_twins import windowed_softmax


@dataclass(frozen=True, eq=False)
class Segments:
    """Which of the tokens in a row belong together: lengths [n_segments] int64, each at least 1."""

    lengths: Tensor

    @cached_property
    def starts(self) -> Tensor:
        """The place of the first token of each segment."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def of_token(self) -> Tensor:
        """The segment of each token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    @cached_property
    def place(self) -> Tensor:
        """The place of each token in its segment, from 0."""
        return torch.arange(len(self.of_token), device=self.lengths.device) - self.starts[self.of_token]


def attention(query: Tensor, values: Tensor, segments: Segments) -> Tensor:
    """Mean of the values of each segment under weights softmax(query): [n_tokens n] twice -> [n_segments n]."""
    weight = (query - maximum(query.detach(), segments)[segments.of_token]).exp()
    both = _reduced(torch.cat([weight * values, weight], dim=1), segments, "sum")
    total, mass = both.chunk(2, dim=1)
    return total / mass


def maximum(values: Tensor, segments: Segments) -> Tensor:
    """[n_tokens n] -> [n_segments n]; where several tokens are highest they share the gradient."""
    return _reduced(values, segments, "max")


def mean(values: Tensor, segments: Segments) -> Tensor:
    """[n_tokens n] -> [n_segments n]."""
    return _reduced(values, segments, "mean")


def window_means(values: Tensor, segments: Segments, window: int) -> tuple[Tensor, Segments]:
    """The mean of each full window of each segment, or of a segment that is shorter than the window.

    values: [n_tokens n]. Returns [n_windows n], and the windows of each segment as segments of their own.
    """
    sums = values.new_zeros(0, values.shape[1])
    if len(values) >= window:
        sums = twins.window_sums(values[None], window)[0]
    return _by_window(sums / window, mean(values, segments), segments, window)


def rolling_attention(query: Tensor, values: Tensor, segments: Segments, window: int) -> Tensor:
    """The highest sum over heads of the attention of a full window, or of a segment that is shorter than the window.

    query, values: [n_tokens n_heads]. Returns [n_segments]. Only the highest window has a gradient, so that it is found
    without any.
    """
    with torch.no_grad():
        means = values.new_zeros(0, values.shape[1])
        if len(values) >= window:
            means = windowed_softmax(query[None], values[None], window)[0]
        heights, windows = _by_window(means, attention(query, values, segments), segments, window)
        first = segments.starts + _highest(heights.sum(dim=1), windows)
    steps = torch.arange(window, device=values.device)
    inside = rearrange(steps < segments.lengths[:, None], "segment step -> segment step 1")
    at = torch.where(inside[..., 0], first[:, None] + steps, first[:, None])
    weight = torch.where(inside, query[at], -torch.inf).softmax(dim=1)
    return (weight * values[at]).sum(dim=(1, 2))


def _by_window(of_windows: Tensor, of_segments: Tensor, segments: Segments, window: int) -> tuple[Tensor, Segments]:
    """Picks from the values of all windows of the row those that lie in one segment, and for short segments their own."""
    windows = Segments((segments.lengths - window + 1).clamp(min=1))
    is_full = (segments.lengths >= window)[windows.of_token]
    first = segments.starts[windows.of_token] + windows.place
    index = torch.where(is_full, first, len(of_windows) + windows.of_token)
    return torch.cat([of_windows, of_segments])[index], windows


def _highest(values: Tensor, segments: Segments) -> Tensor:
    """The place in its segment of the first of the highest values: [n_tokens] -> [n_segments]."""
    top = _reduced(values, segments, "max")[segments.of_token]
    place = torch.where(values == top, segments.place.double(), torch.inf)
    return _reduced(place, segments, "min").long()


def _reduced(values: Tensor, segments: Segments, how: str) -> Tensor:
    return torch.segment_reduce(values, how, lengths=segments.lengths, axis=0, unsafe=True)
