"""Whether the batch form and the online twin of a reduction agree, tried on random streams before anyone relies on them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.online import OnlineReduction
from lmprobe_tl.precision import wide_dtype

TOLERANCE = 1e-5  # of the score, or of 1 where that is larger
N_STREAMS = 4
_WIDE = wide_dtype(torch.device("cpu"))


@dataclass(frozen=True)
class Stream:
    """Random scores [batch pos n], with junk wherever counted [batch pos] is False."""

    scores: Tensor
    counted: Tensor

    def kept(self, row: int, end: int) -> Tensor:
        """The scores of a row that count, of its first `end` positions, as a batch of its own: [1 n_counted n]."""
        return self.scores[row : row + 1, :end][:, self.counted[row, :end]].to(_WIDE)

    def shown(self, row: int, end: int, probe: int) -> str:
        return ", ".join(f"{score:.6g}" for score in self.kept(row, end)[0, :, probe].tolist())


def check_signatures(
    name: str, batch: Callable[..., Any], start: Callable[..., Any], step: Callable[..., Any], parameter: str | None
) -> None:
    """Raise InputError unless the three functions of a reduction take what they will be given, `parameter` last."""
    own = () if parameter is None else (parameter,)
    wanted = {
        "batch": (batch, ("z", "counted", *own), "scores [batch n]"),
        "start": (start, ("zero", *own), "a tuple of tensors"),
        "step": (step, ("state", "z", "counted", "seen", *own), "(running [batch pos n], state)"),
    }
    for which, (function, arguments, result) in wanted.items():
        expected = f"expected a function ({', '.join(arguments)}) -> {result}"
        if not callable(function):
            raise InputError(f"Reduction {name!r}: {which} is {function!r}; {expected}.")
        try:
            inspect.signature(function).bind(*arguments)
        except (TypeError, ValueError) as error:  # ValueError: a builtin that has no signature to read
            raise InputError(f"Reduction {name!r}: {which} cannot be called as it will be ({error}); {expected}.") from error


def check_pair(
    what: str,
    batch: Callable[..., Any],
    start: Callable[..., Any],
    step: Callable[..., Any],
    arguments: tuple[float, ...],
    on: str,
) -> None:
    """Raise InputError, naming `what` and the place, where a batch form and an online twin differ on random streams.

    The measure is the batch form on the scores that count alone, a row at a time: neither form may feel chunks, gaps,
    padding or other rows. on: 'logit' or 'probability'; probabilities have to stay probabilities.
    """
    form = _Form(what, batch, arguments)
    for seed in range(N_STREAMS):
        generator = torch.Generator().manual_seed(seed)
        stream = _stream(generator, seed, on)
        expected = _prefix_scores(form, stream, on)
        _check_padded(form, stream, expected)
        cuts = _cuts(generator, seed, stream.counted.shape[1])
        _check_twin(what, stream, expected, cuts, start, step, arguments)


def _stream(generator: torch.Generator, seed: int, on: str) -> Stream:
    batch, pos, n = 6, 24, 2
    counted = torch.rand(batch, pos, generator=generator) < 0.7
    counted[0] = True
    counted[1, : pos // 2] = False  # starts late
    counted[2, pos // 2 :] = False  # ends early
    counted[3] = False  # never starts
    counted[4] = torch.arange(pos) == 5  # one token
    scores = torch.randn(batch, pos, n, generator=generator) * (1.0, 30.0)[seed % 2]
    scores = scores.sigmoid() if on == "probability" else scores + (0.0, -50.0, 50.0)[seed % 3]
    junk = (torch.nan, torch.inf, -torch.inf, 1e30)[seed % 4]
    return Stream(scores.masked_fill(~counted.unsqueeze(2), junk), counted)


def _cuts(generator: torch.Generator, seed: int, pos: int) -> list[int]:
    """Where a stream is cut into chunks: nowhere, everywhere, or at random."""
    if seed < 2:
        return [0, pos] if seed == 0 else list(range(pos + 1))
    inner = torch.randperm(pos - 1, generator=generator)[: 2 * seed] + 1
    return [0, *sorted(inner.tolist()), pos]


@dataclass(frozen=True)
class _Form:
    """The batch form, whose result is looked at each time."""

    what: str
    batch: Callable[..., Any]
    arguments: tuple[float, ...]

    def __call__(self, z: Tensor, counted: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                reduced = self.batch(z, counted, *self.arguments)
        except Exception as error:
            raise InputError(
                f"{self.what}: its batch form failed on z {list(z.shape)} and counted {list(counted.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        _check_shape(f"{self.what}: its batch form", reduced, (z.shape[0], z.shape[2]), "[batch n]")
        return reduced


def _check_shape(who: str, value: object, shape: tuple[int, ...], axes: str) -> None:
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        found = f"{value.dtype} with shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{who} returned {found}; expected floats {axes} = {list(shape)}.")


def _prefix_scores(form: _Form, stream: Stream, on: str) -> Tensor:
    """[batch pos n]: the batch form of each prefix of each row alone; NaN where nothing has counted yet."""
    expected = torch.full(stream.scores.shape, torch.nan, dtype=_WIDE)
    for row, counted in enumerate(stream.counted.tolist()):
        for at, counts in enumerate(counted):
            if counts:
                kept = stream.kept(row, at + 1)
                expected[row, at:] = form(kept, torch.ones_like(kept[..., :1], dtype=torch.bool))
                _check_values(form.what, expected[row, at], stream, row, at, on)
    return expected


def _check_values(what: str, values: Tensor, stream: Stream, row: int, at: int, on: str) -> None:
    for probe, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            wanted = "a finite number"
        elif on == "probability" and not -TOLERANCE <= value <= 1 + TOLERANCE:
            wanted = "a probability, from 0 to 1, since it is registered with on='probability'"
        else:
            continue
        scores = stream.shown(row, at + 1, probe)
        raise InputError(f"{what}: its batch form gives {value:.6g} for the scores [{scores}]; expected {wanted}.")


def _check_padded(form: _Form, stream: Stream, expected: Tensor) -> None:
    """The batch form of all rows together, zeros where nothing counts, is that of each row alone."""
    begun = stream.counted.any(dim=1)
    counted = rearrange(stream.counted[begun], "batch pos -> batch pos 1")
    together = form(torch.where(counted, stream.scores[begun].to(_WIDE), 0.0), counted)
    alone = expected[begun, -1]
    for index, probe in _apart(together, alone)[:1]:
        row = int(begun.nonzero()[index])
        raise InputError(
            f"{form.what}: its batch form gives {together[index, probe].item():.6g} for a row among other rows and "
            f"positions that do not count, {alone[index, probe].item():.6g} for its scores alone "
            f"[{stream.shown(row, stream.counted.shape[1], probe)}]. Only what counts may matter: z is 0 elsewhere."
        )


def _check_twin(
    what: str,
    stream: Stream,
    expected: Tensor,
    cuts: list[int],
    start: Callable[..., Any],
    step: Callable[..., Any],
    arguments: tuple[float, ...],
) -> None:
    batch, _, n = stream.scores.shape
    try:
        twin = OnlineReduction(_checked_start(what, start), _checked_step(what, step), arguments, batch, n, "cpu")
        running = torch.cat([twin.update(stream.scores[:, a:b], stream.counted[:, a:b]) for a, b in pairwise(cuts)], dim=1)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: its online twin failed: {type(error).__name__}: {error}") from error
    # the earliest position first
    for at, row, probe in _apart(running.to(_WIDE).transpose(0, 1), expected.transpose(0, 1))[:1]:
        raise InputError(
            f"{what}: its two forms disagree. After the scores [{stream.shown(row, at + 1, probe)}] "
            f"the batch form gives {expected[row, at, probe].item():.6g}, the online twin "
            f"{running[row, at, probe].item():.6g} (row {row} of {batch}, position {at}, "
            f"{'counted' if stream.counted[row, at] else 'not counted'}; chunks cut at {cuts})."
        )


def _checked_start(what: str, start: Callable[..., Any]) -> Callable[..., Any]:
    def checked(zero: Tensor, *arguments: float) -> Any:
        return _check_state(f"{what}: its start", start(zero, *arguments))

    return checked


def _checked_step(what: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, refused where it returns other things than it should, or writes into what it was given."""

    def checked(state: Any, z: Tensor, counted: Tensor, seen: Tensor, *arguments: float) -> Any:
        given = (z, counted, seen)
        before = [part.clone() for part in given]
        result = step(state, *given, *arguments)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputError(f"{what}: its step returned {type(result).__name__}; expected (running [batch pos n], state).")
        _check_shape(f"{what}: its step", result[0], tuple(z.shape), "[batch pos n]")
        if not all(torch.equal(a, b) for a, b in zip(given, before, strict=True)):
            raise InputError(f"{what}: its step writes into z, counted or seen, which others read after it.")
        _check_state(f"{what}: its step", result[1])
        return result

    return checked


def _check_state(who: str, state: Any) -> Any:
    if not isinstance(state, tuple) or not all(isinstance(part, Tensor) for part in state):
        raise InputError(f"{who} returned {type(state).__name__} as the state; expected a tuple of tensors.")
    return state


def _apart(found: Tensor, expected: Tensor) -> list[list[int]]:
    """Indices at which two tensors differ by more than the tolerance; NaN equals NaN alone."""
    near = (found - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1)
    return (~(near | (found.isnan() & expected.isnan()))).nonzero().tolist()
