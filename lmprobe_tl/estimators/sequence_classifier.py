"""The base of classifiers of whole token sequences: from the readings of all tokens of a sequence to its one logit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.fitted_head import FittedHead
from lmprobe_tl.estimators.ragged import Segments
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.estimators.torch_classifier import Array, TorchClassifier, readings_of
from lmprobe_tl.estimators.training import Batch, Epoch, Schedule, TrainingSet, minimise
from lmprobe_tl.heads import HeadKind, LinearHead, SequenceHead

DECISION_TOKENS = 2**16
VALUE_SPREAD = 0.1  # of a head's values at the start, in logits


@dataclass(frozen=True)
class Design:
    """The head that a sequence classifier is to learn; n_heads is None for a linear one, and own_pooling its reduction."""

    kind: HeadKind = "linear"
    n_heads: int | None = None
    window: int | None = None
    own_pooling: str = "sequence"

    @property
    def n_values(self) -> int:
        return self.n_heads or 1

    @property
    def n_queries(self) -> int:
        return self.n_values if self.kind in ("attention", "rolling_attention") else 0

    @property
    def head(self) -> LinearHead | SequenceHead:
        return LinearHead(1) if self.n_heads is None else SequenceHead(self.kind, self.n_heads, self.window)


@dataclass(eq=False, repr=False, kw_only=True)
class SequenceClassifier(TorchClassifier):
    """Base of the classifiers of token sequences; for two classes.

    X, everywhere: a list of arrays [n_tokens_i d], `TokenSequences`, or an array [n d] of n sequences of one token.
    See `TorchClassifier` for the other parameters and for what is learnt.
    """

    @property
    def own_pooling(self) -> str:
        """How tokens become the score of a sequence: 'sequence', or a reduction of the token logits of a linear head."""
        return self._design().own_pooling

    def decision_function(self, X: Any) -> Array:
        """The logit of each whole sequence [n], computed in float64 on some sequences at a time."""
        sequences = self._examples(X)
        return torch.cat([self._logits(*part) for part in self._parts(sequences)]).numpy()

    def token_logits(self, X: Any) -> list[Array]:
        """The logit of each token alone: for each sequence [n_tokens_i]."""
        sequences = self._examples(X)
        logits = [self._design().head.token_logits(readings)[:, 0] for readings, _ in self._parts(sequences)]
        return np.split(torch.cat(logits).numpy(), sequences.offsets[1:-1])

    def _design(self) -> Design:
        raise NotImplementedError

    def _logits(self, readings: Tensor, segments: Segments) -> Tensor:
        """The logit of each sequence [n] from the readings of all tokens [n_tokens n_readings]."""
        raise NotImplementedError

    def _losses(self, readings: Tensor, segments: Segments, targets: Tensor) -> Tensor:
        """The loss of each sequence [n]; targets: [n], 0 or 1."""
        return binary_cross_entropy_with_logits(self._logits(readings, segments), targets, reduction="none")

    def _parts(self, sequences: TokenSequences) -> Iterator[tuple[Tensor, Segments]]:
        """Readings of about 65,536 tokens at a time, or of one longer sequence."""
        cuts = np.flatnonzero(np.diff((sequences.offsets[1:] - 1) // DECISION_TOKENS)) + 1
        for part in np.split(np.arange(len(sequences)), cuts):
            readings = readings_of(self.head_, sequences, sequences.offsets[part[0]], sequences.offsets[part[-1] + 1])
            yield readings, Segments(torch.from_numpy(sequences.lengths[part]))

    def _train(self, data: TrainingSet, schedule: Schedule) -> tuple[FittedHead, tuple[Epoch, ...]]:
        design, d = self._design(), data.sequences.values.shape[1]
        # queries start at 0, where all tokens weigh the same; the values of heads must differ, or they would stay equal
        spread = 0.0 if design.n_heads is None else VALUE_SPREAD / math.sqrt(d)
        values = torch.randn(design.n_values, d, generator=data.generator, dtype=torch.float32) * spread
        start = torch.cat([torch.zeros(design.n_queries, d, dtype=torch.float32), values])
        weight = start.to(data.device).requires_grad_()
        bias = torch.zeros(1, dtype=torch.float32, device=data.device).requires_grad_()
        # every kind weighs values with weights that sum to 1, so that these shares add up to the bias of the logit
        share = (torch.arange(len(weight), device=data.device) >= design.n_queries) / design.n_values

        def losses(batch: Batch) -> Tensor:
            readings = data.scaling.readings(batch.tokens, weight) + share * bias
            return self._losses(readings, batch.segments, batch.targets)

        history = minimise([weight, bias], losses, data, schedule)
        direction, intercept = data.scaling.folded(weight)
        # what is added to all queries of a head changes no softmax
        intercept[: design.n_queries] = 0.0
        head = FittedHead(
            kind=design.kind,
            direction=direction,
            intercept=intercept + share.cpu().double().numpy() * bias.item(),
            n_heads=design.n_heads,
            window=design.window,
            own_pooling=design.own_pooling,
        )
        return head, history

    def _examples(self, X: Any) -> TokenSequences:
        sequences = _as_sequences(X)
        if sequences is None:
            return super()._examples(X)
        check_is_fitted(self)
        width = sequences.values.shape[1]
        if width != self.n_features_in_:
            raise InputError(
                f"X has {width} features, but {type(self).__name__} is expecting {self.n_features_in_} features."
            )
        return sequences

    def _examples_and_labels(self, X: Any, y: Any) -> tuple[TokenSequences, NDArray[Any]]:
        sequences = _as_sequences(X)
        if sequences is None:
            return super()._examples_and_labels(X, y)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if len(y) != len(sequences):
            raise InputError(f"X holds {len(sequences)} sequences and y {len(y)} labels; expected one label a sequence.")
        self.n_features_in_ = sequences.values.shape[1]
        return sequences, y

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _as_sequences(X: Any) -> TokenSequences | None:
    """None for rows of features, each of which is a sequence of one token."""
    if isinstance(X, TokenSequences):
        return X
    if getattr(X, "ndim", 0) == 3:
        raise InputError(
            f"X has shape {tuple(X.shape)}; expected a list of arrays [n_tokens_i d]. Give list(X), and of padded sequences "
            "each without its pads."
        )
    is_list = isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1)
    if not is_list or not len(X):
        return None
    first = X[0]
    is_of_tokens = np.ndim(first[0]) == 1 if isinstance(first, (list, tuple)) and first else getattr(first, "ndim", 0) == 2
    return TokenSequences.of(X) if is_of_tokens else None
