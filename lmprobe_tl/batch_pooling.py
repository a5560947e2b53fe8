"""Pooling of a batch's activations inside the forward pass: which tokens count, in which dtype, centred or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.forward_batches import Batch, centred, token_activations
from lmprobe_tl.hook_points import end_of_sequence_ids
from lmprobe_tl.pooling import PoolingStrategy, get_pooling_fn, parse_pooling_strategy, pool_eos

Strategy = str | PoolingStrategy

# These pick one of all real tokens; all others leave BOS out unless it is included.
_SEES_BOS = ("last_token", "first_token")
# What picks a token is the same in any dtype, and cheaper before it is turned into float32.
_PICKS_A_TOKEN = ("last_token", "first_token", "eos")
# mean(x - c) = mean(x) - c: what is linear is centred afterwards, one vector a row instead of one a token.
_LINEAR = (*_PICKS_A_TOKEN, "mean")


def activation_poolings(poolings: Sequence[Strategy]) -> dict[str, Strategy]:
    """Activation-level poolings by name, in the order given.

    InputError for none, for a name twice, and for one that pools scores, which extraction does not have.
    """
    if not poolings:
        raise InputError("pooling is an empty list; expected at least one strategy, such as 'last_token'.")
    named = [(activation_strategy(pooling), pooling) for pooling in poolings]
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise InputError(f"pooling names {max(names, key=names.count)!r} more than once; give each of them once.")
    return dict(named)


def activation_strategy(pooling: Strategy) -> str:
    """Name of an activation-level pooling; InputError for one that pools scores, which extraction does not have."""
    if callable(pooling):
        return getattr(pooling, "__name__", type(pooling).__name__)
    parsed = parse_pooling_strategy(pooling)
    bare_extreme = parsed.base_strategy in ("max", "min") and ":" not in pooling
    if parsed.is_score_pooling and not bare_extreme:
        raise InputError(
            f"pooling {pooling!r} reduces scores, and extraction has none; expected an activation-level strategy."
        )
    return parsed.base_strategy


class BatchPooler:
    """One pooling: activations [batch pos d_model] to [batch d_model] in float32, or with 'all' to [n_tokens d_model]."""

    def __init__(self, model: Any, strategy: Strategy, *, include_bos: bool = False, centre: bool = False) -> None:
        self.name = activation_strategy(strategy)
        self._model, self._strategy, self._centre = model, strategy, centre
        self._named = None if callable(strategy) else self.name  # a callable may be called 'all', too
        self.sees_bos = include_bos or self._named in _SEES_BOS

    @property
    def keeps_tokens(self) -> bool:
        return self._named == "all"

    def __call__(self, activations: Tensor, batch: Batch) -> Tensor:
        if self.keeps_tokens:
            return token_activations(activations, batch, self.sees_bos, centre=self._centre)
        mask = batch.mask(self.sees_bos, activations.device)
        if self._named in _PICKS_A_TOKEN:
            pooled = self._function(batch)(activations, mask).float()
        else:
            # float32 before pooling: sums and differences in bfloat16 lose 1 %.
            values = activations.float()
            if self._centre and self._named not in _LINEAR:
                values = centred(values)
            if callable(self._strategy):
                # Copies for code that is not ours: what it writes in place would reach the later layers.
                values, mask = values.clone(), mask.clone()
            pooled = self._function(batch)(values, mask)
            self._check(pooled, activations)
            pooled = pooled.float()
        if self._centre and self._named in _LINEAR:
            pooled = centred(pooled)
        # A copy: a callable's slice would keep the batch's unpooled activations in memory.
        return pooled.clone() if callable(self._strategy) else pooled

    def _function(self, batch: Batch) -> PoolingStrategy:
        if callable(self._strategy):
            return self._strategy
        if self._named == "eos":
            return partial(pool_eos, tokens=batch.tokens, eos_token_id=end_of_sequence_ids(self._model))
        return get_pooling_fn(f"activation:{self._named}")

    def _check(self, pooled: Any, activations: Tensor) -> None:
        expected = (activations.shape[0], activations.shape[2])
        if not isinstance(pooled, Tensor) or pooled.shape != expected:
            shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise InputError(
                f"the pooling callable returned {shape}; expected one vector a row, {expected} = [batch d_model]."
            )
