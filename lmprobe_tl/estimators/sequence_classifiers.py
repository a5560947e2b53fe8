"""Classifiers of token sequences, which learn where in a sequence to look; for two classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sklearn.base import BaseEstimator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lmprobe_tl.estimators.ragged import Segments, attention, maximum, rolling_attention, window_means
from lmprobe_tl.estimators.sequence_classifier import Design, SequenceClassifier
from lmprobe_tl.estimators.torch_classifier import check_positive, check_whole
from lmprobe_tl.probe_spec import MAX_READINGS
from lmprobe_tl.reductions import MAX_WINDOW, check_parameter


@dataclass(eq=False, repr=False, kw_only=True)
class AttentionClassifier(SequenceClassifier):
    """The logit sum_h sum_t softmax_t(q_h . x_t) (v_h . x_t) + b over n_heads heads h, as in McKenzie et al. 2025.

    One head finds one kind of token among many others; more find more kinds. See `SequenceClassifier` for X.
    """

    n_heads: int = 4

    def _own_limits(self) -> None:
        check_whole("n_heads", self.n_heads, most=MAX_READINGS // 2)

    def _design(self) -> Design:
        return Design("attention", self.n_heads)

    def _logits(self, readings: Tensor, segments: Segments) -> Tensor:
        query, values = readings.chunk(2, dim=1)
        return attention(query, values, segments).sum(dim=1)


@dataclass(eq=False, repr=False, kw_only=True)
class MultiMaxClassifier(SequenceClassifier):
    """The logit sum_h max_t (v_h . x_t) + b over n_heads heads h (Kramár et al. 2026, arXiv:2601.11516)."""

    n_heads: int = 4

    def _own_limits(self) -> None:
        check_whole("n_heads", self.n_heads, most=MAX_READINGS)

    def _design(self) -> Design:
        return Design("multimax", self.n_heads)

    def _logits(self, readings: Tensor, segments: Segments) -> Tensor:
        return maximum(readings, segments).sum(dim=1)


@dataclass(eq=False, repr=False, kw_only=True)
class RollingAttentionClassifier(SequenceClassifier):
    """The highest attention logit of any `window` tokens in a row (Kramár et al. 2026, arXiv:2601.11516).

    A sequence shorter than the window: the attention logit of what is there.
    """

    n_heads: int = 10
    window: int = 10

    def _own_limits(self) -> None:
        check_whole("n_heads", self.n_heads, most=MAX_READINGS // 2)
        check_whole("window", self.window, most=MAX_WINDOW // (2 * self.n_heads))

    def _design(self) -> Design:
        return Design("rolling_attention", self.n_heads, self.window)

    def _logits(self, readings: Tensor, segments: Segments) -> Tensor:
        query, values = readings.chunk(2, dim=1)
        return rolling_attention(query, values, segments, self.window)


@dataclass(eq=False, repr=False, kw_only=True)
class SoftmaxClassifier(SequenceClassifier):
    """A linear head z_t = w . x_t + b trained through the logit sum_t softmax_t(z / temperature) z_t.

    A low temperature learns from the highest logits of a sequence, a high one from their mean.
    """

    temperature: float = 5.0

    def _own_limits(self) -> None:
        check_parameter("softmax", self.temperature)

    def _design(self) -> Design:
        return Design(own_pooling=f"score:softmax({_plain(self.temperature)})")

    def _logits(self, readings: Tensor, segments: Segments) -> Tensor:
        return attention(readings / self.temperature, readings, segments)[:, 0]


@dataclass(eq=False, repr=False, kw_only=True)
class WindowedClassifier(SequenceClassifier):
    """A linear head trained on means of `window` logits in a row (Constitutional Classifiers++, arXiv:2601.04603).

    Each mean m_t should tell the class: the loss of a sequence is sum_t softmax_t(m / temperature) BCE(m_t, y), which looks
    at the highest means most. The logit of a sequence is its highest mean, the running score of 'score:rolling_max(window)';
    the paper then scores with a moving average instead, see `FittedHead`. A sequence shorter than the window has one mean,
    that of what is there.
    """

    window: int = 16
    temperature: float = 1.0

    def _own_limits(self) -> None:
        check_whole("window", self.window, most=MAX_WINDOW)
        check_positive("temperature", self.temperature)

    def _design(self) -> Design:
        return Design(own_pooling=f"score:rolling_max({self.window})")

    def _logits(self, readings: Tensor, segments: Segments) -> Tensor:
        return maximum(*window_means(readings, segments, self.window))[:, 0]

    def _losses(self, readings: Tensor, segments: Segments, targets: Tensor) -> Tensor:
        means, windows = window_means(readings, segments, self.window)
        losses = binary_cross_entropy_with_logits(means[:, 0], targets[windows.of_token], reduction="none")
        return attention(means / self.temperature, losses[:, None], windows)[:, 0]


SEQUENCE_CLASSIFIERS: dict[str, Callable[[int | None], BaseEstimator]] = {
    "attention": lambda random_state: AttentionClassifier(random_state=random_state),
    "multimax": lambda random_state: MultiMaxClassifier(random_state=random_state),
    "rolling_attention": lambda random_state: RollingAttentionClassifier(random_state=random_state),
    "softmax": lambda random_state: SoftmaxClassifier(random_state=random_state),
    "windowed": lambda random_state: WindowedClassifier(random_state=random_state),
}


def _plain(number: float) -> str:
    """5 for 5.0, as poolings are written."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))
