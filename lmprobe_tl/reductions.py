"""Scores of tokens to the score of a sequence: each reduction as a batch function and as an online twin.

    last_token, first_token, mean, max, min   over the positions that count
    ema_max(alpha)         e_t = alpha z_t + (1 - alpha) e_{t-1} with e_0 = z_0; the score is max_t e_t
    rolling_max(window)    max over full windows of the mean of the last `window` logits;
                           a sequence shorter than the window: the mean of what is there
    softmax(temperature)   sum_t softmax_t(z / temperature) z_t

The last three take logits z; positions that do not count are as if they were not there. The batch form of a prefix equals
what the online twin reports at its end, for any chunks, padding side, gaps and batch mates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl import online
from lmprobe_tl.errors import InputError
from lmprobe_tl.masks import real_tokens
from lmprobe_tl.types import AttentionMask, TokenScores


def reduce_batch(
    scores: TokenScores, name: str, parameter: float | None = None, attention_mask: AttentionMask | None = None
) -> Tensor:
    """The score of each row, from all its token scores at once.

    scores: [batch pos], or [batch pos n] for n independent scores a token; attention_mask: [batch pos], 1 = counts.
    Returns [batch] or [batch n], float32 (float64 stays). What stands at an uncounted position never reaches it.
    Raises InputError for an unknown name, a wrong parameter, shape or dtype; EmptyMaskError for rows where nothing counts.

    >>> reduce_batch(torch.tensor([[0.0, 4.0, 2.0]]), "rolling_max", 2)
    tensor([3.])
    """
    arguments = check_parameter(name, parameter)
    if not isinstance(scores, Tensor):
        raise InputError(f"scores must be a tensor, got {type(scores).__name__}. torch.as_tensor makes one.")
    if scores.ndim not in (2, 3) or not scores.is_floating_point():
        raise InputError(
            f"scores must be floats [batch pos] or [batch pos n], got {scores.dtype} with shape {list(scores.shape)}."
        )
    real = real_tokens(attention_mask, scores)
    counted = rearrange(real, "batch pos -> batch pos 1")
    z = scores if scores.ndim == 3 else rearrange(scores, "batch pos -> batch pos 1")
    z = torch.where(counted, z.to(online.wide_dtype(z.device)), 0.0)
    # with no row there may be no position either, and a max would have nothing to look at
    reduced = REDUCTIONS[name].batch(z, counted, *arguments) if len(z) else z.new_empty(0, z.shape[2])
    reduced = reduced.to(torch.promote_types(scores.dtype, torch.float32))
    return reduced if scores.ndim == 3 else reduced[:, 0]


# Batch forms. z: [batch pos n], 0 where not counted; counted: [batch pos 1], something in every row. Return [batch n].


def _batch_last(z: Tensor, counted: Tensor) -> Tensor:
    return _batch_first(z.flip(1), counted.flip(1))


def _batch_first(z: Tensor, counted: Tensor) -> Tensor:
    first = counted & (counted.cumsum(dim=1) == 1)
    return z[first[..., 0]]  # one True a row, so the rows come out in order


def _batch_mean(z: Tensor, counted: Tensor) -> Tensor:
    return z.sum(dim=1) / counted.sum(dim=1)


def _batch_max(z: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, z, -torch.inf).amax(dim=1)  # -inf, not 0: a 0 would win over negative scores


def _batch_min(z: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, z, torch.inf).amin(dim=1)


def _batch_ema_max(z: Tensor, counted: Tensor, alpha: float) -> Tensor:
    start = online.ema_items(torch.zeros_like(z[:, :1]), torch.zeros_like(counted[:, :1]), alpha)
    ema = online.ema_read(online.scan(online.ema_join, start, online.ema_items(z, counted, alpha)))
    return _batch_max(ema, counted)


def _batch_rolling_max(z: Tensor, counted: Tensor, window: int) -> Tensor:
    if window > z.shape[1]:
        return _batch_mean(z, counted)
    means = online.compact(z, counted).unfold(1, window, 1).mean(dim=-1)  # [batch pos-window+1 n]
    n_counted = counted.sum(dim=1, keepdim=True)
    full = torch.arange(window, z.shape[1] + 1, device=z.device)[:, None] <= n_counted
    return torch.where(n_counted[:, 0] >= window, _batch_max(means, full), _batch_mean(z, counted))


def _batch_softmax(z: Tensor, counted: Tensor, temperature: float) -> Tensor:
    weights = torch.where(counted, z / temperature, -torch.inf).softmax(dim=1)
    return (weights * z).sum(dim=1)


@dataclass(frozen=True)
class Parameter:
    """The number in the brackets of a reduction's name, as alpha in `ema_max(alpha)`."""

    name: str
    expected: str
    accepts: Callable[[float], bool]


@dataclass(frozen=True)
class Reduction:
    """A reduction in both forms; each takes the parameter, where there is one, as its last argument."""

    batch: Callable[..., Tensor]
    start: Callable[..., online.Items]
    step: Callable[..., tuple[Tensor, online.Items]]
    parameter: Parameter | None = None


_ALPHA = Parameter("alpha", "a number above 0 and at most 1", lambda x: 0 < x <= 1)
_WINDOW = Parameter("window", "a whole number of tokens, 1 or more", lambda x: isinstance(x, Integral) and x >= 1)
_TEMPERATURE = Parameter("temperature", "a finite number above 0", lambda x: 0 < x < float("inf"))

REDUCTIONS: dict[str, Reduction] = {
    "last_token": Reduction(_batch_last, online.start_zero, online.step_last),
    "first_token": Reduction(_batch_first, online.start_zero, online.step_first),
    "mean": Reduction(_batch_mean, online.start_zero, online.step_mean),
    "max": Reduction(_batch_max, online.start_max, online.step_max),
    "min": Reduction(_batch_min, online.start_max, online.step_min),
    "ema_max": Reduction(_batch_ema_max, online.start_ema_max, online.step_ema_max, _ALPHA),
    "rolling_max": Reduction(_batch_rolling_max, online.start_rolling_max, online.step_rolling_max, _WINDOW),
    "softmax": Reduction(_batch_softmax, online.start_softmax, online.step_softmax, _TEMPERATURE),
}


def check_parameter(name: str, parameter: float | None) -> tuple[float, ...]:
    """The parameter of a reduction as a tuple of none or one, or InputError naming what was expected."""
    if name not in REDUCTIONS:
        raise InputError(f"Unknown reduction {name!r}. All names: {', '.join(REDUCTIONS)}.")
    expected = REDUCTIONS[name].parameter
    if expected is None:
        if parameter is not None:
            raise InputError(f"Reduction {name!r} takes no parameter, got {parameter!r}.")
        return ()
    if not isinstance(parameter, Real) or isinstance(parameter, bool) or not expected.accepts(parameter):
        raise InputError(
            f"Reduction {name!r} got {expected.name}={parameter!r}, expected {expected.expected}. "
            f"As a strategy: 'score:{name}({expected.name})'."
        )
    return (parameter,)


def make_online(
    name: str, parameter: float | None, n_rows: int, n_probes: int, device: torch.device | str = "cpu"
) -> online.OnlineReduction:
    """A fresh online twin of the named reduction for [n_rows, n_probes] running scores.

    Raises InputError for an unknown name or a wrong parameter.
    """
    arguments = check_parameter(name, parameter)
    reduction = REDUCTIONS[name]
    return online.OnlineReduction(reduction.start, reduction.step, arguments, n_rows, n_probes, device)
