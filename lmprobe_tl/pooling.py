"""Pooling: activations and a mask to one vector a row, and token scores to one score a row.

    name                        at training     at inference
    last_token first_token      activations     activations; `score:` reduces scores instead
    mean                        activations     activations; `score:` reduces scores instead
    eos                         activations     activations
    all                         every token     every token, nothing is pooled
    max min                     -               scores; `activation:` pools activations instead
    ema_max(alpha)              -               scores
    rolling_max(window)         -               scores
    softmax(temperature)        -               scores
    a registered reduction      -               scores
    a callable                  activations     activations

The mask alone says which tokens are real: padding side is never assumed, and what stands at a pad never reaches a result.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeAlias

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from lmprobe_tl.errors import InputError
from lmprobe_tl.masks import real_tokens
from lmprobe_tl.reductions import REDUCTIONS, check_parameter, reduce_batch
from lmprobe_tl.types import Activations, AttentionMask, Pooled, PoolingStrategy, TokenScores

Strategy: TypeAlias = str | PoolingStrategy


def pool_last_token(activations: Activations, attention_mask: AttentionMask | None = None) -> Pooled:
    """The activation of the last real token. [batch pos d_model] -> [batch d_model].

    attention_mask: [batch pos], 1 or True = a real token, any padding side; None = all real.
    Raises InputError for a wrong shape, dtype or mask value; EmptyMaskError naming the rows with no real token.
    """
    return _take_last(activations, _real(activations, attention_mask))


def pool_first_token(activations: Activations, attention_mask: AttentionMask | None = None) -> Pooled:
    """The activation of the first real token. Arguments and errors as for `pool_last_token`."""
    real = _real(activations, attention_mask)
    return activations[real & (real.cumsum(dim=1) == 1)]


def pool_mean(activations: Activations, attention_mask: AttentionMask | None = None) -> Pooled:
    """The mean activation of the real tokens, summed in float32 (float64 in float64), in the input's dtype.

    Arguments and errors as for `pool_last_token`.

    >>> pool_mean(torch.tensor([[[1.0], [3.0], [torch.nan]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    real = _real(activations, attention_mask)
    # where, not a product with the mask: NaN * 0 is NaN
    kept = torch.where(rearrange(real, "batch pos -> batch pos 1"), activations, 0.0)
    total = kept.sum(dim=1, dtype=torch.promote_types(activations.dtype, torch.float32))
    return (total / reduce(real.long(), "batch pos -> batch 1", "sum")).to(activations.dtype)


def pool_max(activations: Activations, attention_mask: AttentionMask | None = None) -> Pooled:
    """The largest activation of the real tokens in each dimension. Arguments and errors as for `pool_last_token`."""
    return _extreme(activations, attention_mask, "max", -torch.inf)


def pool_min(activations: Activations, attention_mask: AttentionMask | None = None) -> Pooled:
    """The smallest activation of the real tokens in each dimension. Arguments and errors as for `pool_last_token`."""
    return _extreme(activations, attention_mask, "min", torch.inf)


def pool_all(activations: Activations, attention_mask: AttentionMask | None = None) -> Activations:
    """The very same activations, once the mask has been checked. Arguments and errors as for `pool_last_token`."""
    _real(activations, attention_mask)
    return activations


def pool_eos(
    activations: Activations,
    attention_mask: AttentionMask | None = None,
    *,
    tokens: Tensor,
    eos_token_id: int | Sequence[int],
) -> Pooled:
    """The activation of the last real end-of-sequence token.

    tokens: [batch pos] ids; eos_token_id: one id or several. Other arguments and errors as for `pool_last_token`;
    also InputError for tokens of another shape, ids that are no ints, and naming the rows without an end-of-sequence token.
    """
    real = _real(activations, attention_mask)
    ids = list(eos_token_id) if isinstance(eos_token_id, Sequence) else [eos_token_id]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"eos_token_id must be an int or a list of ints, got {eos_token_id!r}.")
    if not isinstance(tokens, Tensor) or tokens.shape != real.shape:
        raise InputError(f"tokens must be a tensor [batch pos] = {list(real.shape)}, got {_shape(tokens)}.")
    ends = real & torch.isin(tokens.to(real.device), torch.tensor(ids, device=real.device))
    without = (~ends.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise InputError(
            f"No real token is an end of sequence (eos_token_id={eos_token_id!r}) in row(s) {without}. "
            "Append one to these prompts, or pool by 'last_token'."
        )
    return _take_last(activations, ends)


def _real(activations: Activations, attention_mask: AttentionMask | None) -> Tensor:
    """The checked mask [batch pos] bool, on the activations' device."""
    if not isinstance(activations, Tensor) or activations.ndim != 3:
        raise InputError(f"activations must be a tensor [batch pos d_model], got {_shape(activations)}.")
    if not activations.is_floating_point():
        raise InputError(f"activations must be floats, got {activations.dtype}; convert them with .float() first.")
    return real_tokens(attention_mask, activations)


def _shape(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _take_last(activations: Activations, where: Tensor) -> Pooled:
    """The activations at the last True of each row; every row has one."""
    return activations[where & (where.flip(1).cumsum(dim=1).flip(1) == 1)]


def _extreme(activations: Activations, attention_mask: AttentionMask | None, operation: str, never: float) -> Pooled:
    real = _real(activations, attention_mask)
    if len(activations) == 0:
        return activations.new_empty(0, activations.shape[2])  # perhaps no position either, and so no maximum
    # an infinity, not 0: a padded 0 would win the max over negative activations
    kept = torch.where(rearrange(real, "batch pos -> batch pos 1"), activations, never)
    return reduce(kept, "batch pos d_model -> batch d_model", operation)


_POOLINGS: dict[str, Callable[..., Tensor]] = {
    "last_token": pool_last_token,
    "first_token": pool_first_token,
    "mean": pool_mean,
    "max": pool_max,
    "min": pool_min,
    "eos": pool_eos,
    "all": pool_all,
}
_TRAINING = ("last_token", "mean", "first_token", "eos", "all")
_NAMES: dict[str, Mapping[str, object]] = {"score": REDUCTIONS, "activation": _POOLINGS}
_WHY_NOT = {  # a known name under a prefix that it cannot have
    "score:all": "'all' keeps the score of every token, which leaves nothing to reduce, and takes no prefix",
    "activation:all": "'all' keeps the activation of every token, which pools nothing, and takes no prefix",
    "score:eos": "the score of one token is that of its activation, which 'eos' without a prefix picks",
}


@dataclass(frozen=True)
class ParsedPooling:
    """A strategy taken apart: 'score:ema_max(0.5)' is base_strategy 'ema_max', is_score_pooling True, parameter 0.5."""

    base_strategy: str
    is_score_pooling: bool
    raw: str
    parameter: float | int | None = None


def parse_pooling_strategy(strategy: str) -> ParsedPooling:
    """Take a strategy's name apart.

    A prefix `score:` or `activation:` forces the stage. Bare max, min, ema_max, rolling_max, softmax and what
    `register_reduction` added reduce scores; bare last_token, first_token, mean, eos and all are about activations.
    Raises InputError for an unknown name or prefix, listing what exists, and for a missing or wrong parameter.

    >>> parse_pooling_strategy("score:rolling_max(10)")
    ParsedPooling(base_strategy='rolling_max', is_score_pooling=True, raw='score:rolling_max(10)', parameter=10)
    """
    match = re.fullmatch(r"(?:([^:]*):)?([^:()]*)(?:\(([^()]*)\))?", strategy) if isinstance(strategy, str) else None
    if match is None:
        raise _unknown(strategy)
    prefix, name, brackets = match.groups()
    if f"{prefix}:{name}" in _WHY_NOT:
        raise InputError(f"Pooling strategy {strategy!r} does not exist: {_WHY_NOT[f'{prefix}:{name}']}.")
    stage = _natural_stage(name) if prefix is None else prefix
    if stage not in _NAMES or name not in _NAMES[stage]:
        raise _unknown(strategy, name if stage == "score" else "")
    parameter = None if brackets is None else _number(strategy, brackets)
    if stage == "score":
        check_parameter(name, parameter)
    elif parameter is not None:
        raise InputError(f"Pooling strategy {strategy!r}: {name!r} takes no parameter.")
    return ParsedPooling(name, stage == "score", strategy, parameter)


def get_pooling_fn(strategy: str) -> Callable[..., Tensor]:
    """The function on activations of a strategy; `pool_all` if it reduces scores, since each token must then be scored.

    'eos' gives `pool_eos`, which also needs `tokens` and `eos_token_id`. Raises InputError as `parse_pooling_strategy` does.
    """
    parsed = parse_pooling_strategy(strategy)
    return pool_all if parsed.is_score_pooling else _POOLINGS[parsed.base_strategy]


def resolve_pooling(
    pooling: Strategy | None = None,
    train_pooling: Strategy | None = None,
    inference_pooling: Strategy | None = None,
) -> tuple[Strategy, Strategy]:
    """(training strategy, inference strategy), each a name or a callable; the specific argument wins over `pooling`.

    Raises InputError if a side stays unspecified, names a strategy that it cannot use, or is a callable that does not take
    (activations, attention_mask).
    """
    train = _checked("train_pooling", pooling if train_pooling is None else train_pooling)
    inference = _checked("inference_pooling", pooling if inference_pooling is None else inference_pooling)
    if isinstance(train, str) and train not in _TRAINING:
        prefixed = train.startswith("activation:")
        why = "training always pools activations, and takes no prefix" if prefixed else "no scores exist before training"
        raise InputError(
            f"train_pooling cannot be {train!r}: {why}. Choose one of {', '.join(_TRAINING)} or a callable, as in "
            f"train_pooling='last_token', inference_pooling={train!r}."
        )
    return train, inference


def reduce_scores(scores: TokenScores, strategy: str, attention_mask: AttentionMask | None = None) -> Tensor:
    """One score a row, from the scores of its tokens.

    scores: [batch pos], or probabilities [batch pos n_classes]; strategy: a reduction's name, with or without 'score:'.
    With two classes, class 1 is reduced and class 0 is the rest; with more, each is reduced and the row then divided by its
    sum (all get the same if that is 0). Reductions on logits, as ema_max, take logits [batch pos] alone.
    Returns [batch] or [batch n_classes], float32 (float64 stays).
    Raises InputError for a wrong strategy, shape or mask; EmptyMaskError naming the rows with no real token.

    >>> reduce_scores(torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]), "score:max")
    tensor([[0.2000, 0.8000]])
    """
    prefixed = strategy if isinstance(strategy, str) and ":" in strategy else f"score:{strategy}"
    parsed = parse_pooling_strategy(prefixed)
    if not parsed.is_score_pooling:
        raise InputError(f"Strategy {strategy!r} pools activations; scores can be reduced by {', '.join(_reductions())}.")
    name = parsed.base_strategy
    if not isinstance(scores, Tensor) or scores.ndim != 3:
        return reduce_batch(scores, name, parsed.parameter, attention_mask)
    if REDUCTIONS[name].on == "logit":
        raise InputError(f"{strategy!r} takes logits [batch pos], got shape {list(scores.shape)}. Give one class's logits.")
    if scores.shape[2] < 2:
        raise InputError(f"scores {list(scores.shape)} have fewer than 2 classes. One score a token is [batch pos].")
    if scores.shape[2] == 2:
        positive = reduce_batch(scores[..., 1], name, parsed.parameter, attention_mask)
        return torch.stack([1 - positive, positive], dim=-1)
    reduced = reduce_batch(scores, name, parsed.parameter, attention_mask)
    total = reduced.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, 1 / scores.shape[2], reduced / torch.where(total == 0, 1.0, total))


def _natural_stage(name: str) -> str:
    return "activation" if name in _POOLINGS and name not in ("max", "min") else "score"


def _reductions() -> list[str]:
    return [name if r.parameter is None else f"{name}({r.parameter.name})" for name, r in REDUCTIONS.items()]


def _unknown(strategy: object, reduction: str = "") -> InputError:
    known = [*_POOLINGS, *(f"score:{r}" for r in _reductions()), *(f"activation:{p}" for p in _POOLINGS if p != "all")]
    close = get_close_matches(str(strategy), known, n=1)
    hint = f" Closest: {close[0]!r}." if close else ""
    if reduction.isidentifier():
        hint += f" If {reduction!r} is a reduction of your own, register it first: register_reduction({reduction!r}, ...)."
    return InputError(f"Unknown pooling strategy {strategy!r}.{hint} All strategies: {', '.join(known)}.")


def _number(strategy: str, text: str) -> float | int:
    try:
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise InputError(f"Pooling strategy {strategy!r}: {text!r} is no number.") from None


def _checked(side: str, strategy: Strategy | None) -> Strategy:
    if strategy is None:
        raise InputError(f"No strategy for {side}: give {side}, or pooling for both sides.")
    if callable(strategy):
        _check_signature(strategy)
    else:
        parse_pooling_strategy(strategy)
    return strategy


def _check_signature(strategy: PoolingStrategy) -> None:
    function = strategy.forward if isinstance(strategy, nn.Module) else strategy  # a module's __call__ hides its signature
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError) as error:  # ValueError: a builtin that has no signature to read
        raise InputError(
            f"Pooling callable {strategy!r} cannot be called as (activations [batch pos d_model], "
            f"attention_mask [batch pos] or None) -> [batch d_model]: {error}. Wrap it in such a function."
        ) from error
