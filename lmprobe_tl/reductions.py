"""Scores of tokens to the score of a sequence: each reduction as a batch function and as an online twin.

    last_token, first_token, mean, max, min   over the positions that count
    ema_max(alpha)         e_t = alpha z_t + (1 - alpha) e_{t-1} with e_0 = z_0; the score is max_t e_t
    rolling_max(window)    max over full windows of the mean of the last `window` logits;
                           a sequence shorter than the window: the mean of what is there
    softmax(temperature)   sum_t softmax_t(z / temperature) z_t

The last three take logits z; positions that do not count are as if they were not there. The batch form of a prefix equals
what the online twin reports at its end, for any chunks, padding side, gaps and batch mates. On logits every reduction moves
with a constant, reduce(z + c) = reduce(z) + c, which is why the moving average starts at z_0: from 0 a score would depend on
the intercept, and a clear negative would rise towards 0 at its first token.

`register_reduction` adds one of your own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl import online, softmax_twins, twins
from lmprobe_tl.errors import InputError
from lmprobe_tl.masks import real_tokens
from lmprobe_tl.precision import wide_dtype
from lmprobe_tl.twin_check import check_pair, check_signatures
from lmprobe_tl.types import AttentionMask, TokenScores

Scale: TypeAlias = Literal["logit", "probability"]

# Numbers that a window keeps of each row: 2 MiB in float64, held even for a file that means harm.
MAX_WINDOW = 2**18


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
    z = torch.where(counted, z.to(wide_dtype(z.device)), 0.0)
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
    first = rearrange(_batch_first(z, counted), "batch n -> batch 1 n")
    return _batch_max(twins.ema(first, z, counted, alpha), counted)


def _batch_rolling_max(z: Tensor, counted: Tensor, window: int) -> Tensor:
    if window > z.shape[1]:
        return _batch_mean(z, counted)
    means = twins.window_sums(twins.compact(z, counted), window) / window  # [batch pos-window+1 n]
    n_counted = counted.sum(dim=1, keepdim=True)
    full = torch.arange(window, z.shape[1] + 1, device=z.device)[:, None] <= n_counted
    return torch.where(n_counted[:, 0] >= window, _batch_max(means, full), _batch_mean(z, counted))


def _batch_softmax(z: Tensor, counted: Tensor, temperature: float) -> Tensor:
    weights = torch.where(counted, z / temperature, -torch.inf).softmax(dim=1)
    return (weights * z).sum(dim=1)


@dataclass(frozen=True)
class ReductionParameter:
    """The number in the brackets of a reduction's name, as alpha in `ema_max(alpha)`.

    expected: what it has to be, in words, for errors; accepts: whether a number is that. examples: some of these numbers,
    with which the two forms of a registered reduction are compared, on streams of 24 tokens.
    """

    name: str
    expected: str
    accepts: Callable[[float], bool]
    examples: tuple[float, ...]


@dataclass(frozen=True)
class Reduction:
    """A reduction in both forms; each takes the parameter, where there is one, as its last argument.

    on: whether 'score:' gives it logits, of two classes alone, or probabilities. selects: the result is one of the scores,
    picked by place or rank, so that an increasing map such as the sigmoid may come before it or after.
    """

    batch: Callable[..., Tensor]
    start: Callable[..., online.Items]
    step: Callable[..., tuple[Tensor, online.Items]]
    parameter: ReductionParameter | None = None
    on: Scale = "probability"
    selects: bool = False


_ALPHA = ReductionParameter("alpha", "a number above 0 and at most 1", lambda x: 0 < x <= 1, (0.001, 0.5, 1))
_WINDOW = ReductionParameter(
    "window",
    f"a whole number of tokens, from 1 to {MAX_WINDOW}",
    lambda x: isinstance(x, Integral) and 1 <= x <= MAX_WINDOW,
    (1, 3, 100),
)
# at the least, logits of float32 over the temperature are far from infinite
_TEMPERATURE = ReductionParameter(
    "temperature", "a finite number, 1e-09 or more", lambda x: 1e-9 <= x < float("inf"), (0.01, 1, 5)
)


REDUCTIONS: dict[str, Reduction] = {
    "last_token": Reduction(_batch_last, twins.start_zero, twins.step_last, selects=True),
    "first_token": Reduction(_batch_first, twins.start_zero, twins.step_first, selects=True),
    "mean": Reduction(_batch_mean, twins.start_zero, twins.step_mean),
    "max": Reduction(_batch_max, twins.start_max, twins.step_max, selects=True),
    "min": Reduction(_batch_min, twins.start_min, twins.step_min, selects=True),
    "ema_max": Reduction(_batch_ema_max, twins.start_ema_max, twins.step_ema_max, _ALPHA, "logit"),
    "rolling_max": Reduction(_batch_rolling_max, twins.start_rolling_max, twins.step_rolling_max, _WINDOW, "logit"),
    "softmax": Reduction(_batch_softmax, softmax_twins.start_softmax, softmax_twins.step_softmax, _TEMPERATURE, "logit"),
}
_BUILT_IN = frozenset(REDUCTIONS)
_RESERVED = ("all", "eos", "sequence", "score", "activation")  # poolings that reduce no scores, and the prefixes


def register_reduction(
    name: str,
    *,
    batch: Callable[..., Tensor],
    start: Callable[..., online.Items],
    step: Callable[..., tuple[Tensor, online.Items]],
    parameter: ReductionParameter | None = None,
    on: Scale = "logit",
) -> None:
    """Make 'score:NAME', or 'score:NAME(x)' where there is a parameter, an inference pooling like those built in.

    batch: (z [batch pos n], counted [batch pos 1] bool) -> [batch n], where z is 0 wherever it does not count, and something
    counts in every row. All n columns are independent.
    start, step: its online twin, (zero [batch 1 n]) -> state and (state, z, counted, seen) -> (running [batch pos n],
    state), as the top of online.py describes them. A step should not read values on the host (`.item()`, `if tensor`,
    indexing by a mask), or each generated token waits for the device.
    parameter: if there is one, all three functions take x as their last argument.
    on: 'logit' gives it the logit of a probe with two classes, and takes the result as a logit; 'probability' gives it the
    probability of the positive class, or of each of several classes, and the result has to be a probability.

    Both forms are run on random streams first: InputError says where they differ by more than 1e-5. Also raises InputError
    for a name that is taken or cannot be one, and for functions of another signature.
    A probe file holds the name alone. It can always be loaded, and scores once the name is registered: register the same
    functions everywhere, for instance in a module that you import.

    >>> def batch(z, counted):  # the share of tokens with a logit above 0
    ...     return ((z > 0) & counted).double().sum(dim=1) / counted.sum(dim=1)
    >>> def step(state, z, counted, seen):
    ...     hits = state[0] + ((z > 0) & counted).cumsum(dim=1)
    ...     return hits / seen, (hits[:, -1:],)
    >>> register_reduction("share", batch=batch, start=lambda zero: (zero,), step=step)
    >>> reduce_batch(torch.tensor([[3.0, -1.0, 2.0, -4.0]]), "share")
    tensor([0.5000])
    """
    _check_name(name)
    if on not in ("logit", "probability"):
        raise InputError(f"Reduction {name!r}: on={on!r}; expected 'logit' or 'probability'.")
    _check_own_parameter(name, parameter)
    check_signatures(name, batch, start, step, None if parameter is None else parameter.name)
    for example in (None,) if parameter is None else parameter.examples:
        what = f"Reduction {name!r}" if example is None else f"Reduction '{name}({example})'"
        check_pair(what, batch, start, step, () if example is None else (example,), on)
    REDUCTIONS[name] = Reduction(batch, start, step, parameter, on)


def _unregister(name: str) -> None:
    """Forget a registered reduction; for tests, since probes in use may go by its name."""
    if name not in _BUILT_IN:
        REDUCTIONS.pop(name, None)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or not name.isascii():
        raise InputError(f"A reduction cannot be named {name!r}; expected letters, digits and '_' alone, as in 'peak_mean'.")
    if name in _RESERVED:
        raise InputError(f"A reduction cannot be named {name!r}, which means something else in a pooling strategy.")
    if name in REDUCTIONS:
        kind = "built in" if name in _BUILT_IN else "registered already, and probes may go by it"
        raise InputError(f"Reduction {name!r} is {kind}. Choose another name; all names: {', '.join(REDUCTIONS)}.")


def _check_own_parameter(name: str, parameter: ReductionParameter | None) -> None:
    if parameter is None:
        return
    if not isinstance(parameter, ReductionParameter):
        raise InputError(
            f"Reduction {name!r}: parameter is {parameter!r}; expected a ReductionParameter, as "
            "ReductionParameter('window', 'a whole number, 1 or more', lambda x: x >= 1, examples=(1, 3))."
        )
    if not parameter.examples:
        raise InputError(
            f"Reduction {name!r}: its parameter has no examples; expected numbers to compare the two forms with."
        )
    for example in parameter.examples:
        _check_number(name, parameter, example)


def check_parameter(name: str, parameter: float | None) -> tuple[float, ...]:
    """The parameter of a reduction as a tuple of none or one, or InputError naming what was expected."""
    if name not in REDUCTIONS:
        raise InputError(
            f"Unknown reduction {name!r}. All names: {', '.join(REDUCTIONS)}. One of your own is registered first, by "
            "register_reduction."
        )
    expected = REDUCTIONS[name].parameter
    if expected is None:
        if parameter is not None:
            raise InputError(f"Reduction {name!r} takes no parameter, got {parameter!r}.")
        return ()
    return (_check_number(name, expected, parameter),)


def _check_number(name: str, expected: ReductionParameter, number: float | None) -> float:
    if not isinstance(number, Real) or isinstance(number, bool) or not expected.accepts(number):
        raise InputError(
            f"Reduction {name!r} got {expected.name}={number!r}, expected {expected.expected}. "
            f"As a strategy: 'score:{name}({expected.name})'."
        )
    return number


def make_online(
    name: str, parameter: float | None, n_rows: int, n_probes: int, device: torch.device | str = "cpu"
) -> online.OnlineReduction:
    """A fresh online twin of the named reduction for [n_rows, n_probes] running scores.

    Raises InputError for an unknown name or a wrong parameter.
    """
    arguments = check_parameter(name, parameter)
    reduction = REDUCTIONS[name]
    # One of the scores, rounded, is the same one of the rounded scores.
    dtype = torch.float32 if reduction.selects else None
    return online.OnlineReduction(reduction.start, reduction.step, arguments, n_rows, n_probes, device, dtype)
