"""Mean and standard deviation of each feature over tokens, to be folded into weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.blocks import standard_deviation
from lmprobe_tl.estimators.token_sequences import TokenSequences

BLOCK_ELEMENTS = 2**18  # 2 MiB of float64 at a time, which a processor's cache holds


@dataclass(frozen=True, eq=False)
class TokenScaling:
    """Standardised features are (x - mean) * inverse: mean, inverse [d] float64; inverse is 0 for a constant feature.

    Tokens are never standardised themselves: readings of them are, with weight * inverse and -(weight * inverse) @ mean.
    """

    mean: Tensor
    inverse: Tensor

    def readings(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """weight @ standardised features: tokens [n d] float32, weight [n_readings d] -> [n n_readings]."""
        scaled = weight * self.inverse.to(weight)
        return torch.nn.functional.linear(tokens, scaled, -(scaled @ self.mean.to(weight)))

    def folded(self, weight: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same readings as direction [n_readings d] and intercept [n_readings] of unscaled features."""
        direction = weight.detach().cpu().double() * self.inverse
        return direction.numpy(), -(direction @ self.mean).numpy()


def token_scaling(sequences: TokenSequences, weight: NDArray[np.float64], *, standardize: bool) -> TokenScaling:
    """The scaling by all tokens, each with the weight of its sequence [n_sequences]; standardize=False changes nothing.

    One pass in blocks and in float64, which joins the moments as in Chan, Golub and LeVeque (1979).
    Raises InputError for values that are not finite, in any sequence, naming it.
    """
    values = sequences.tensor
    n_tokens, d = values.shape
    weight_of_token = torch.from_numpy(np.repeat(weight, sequences.lengths))
    mean, scatter, largest = torch.zeros(3, d, dtype=torch.float64)
    total, count = 0.0, 0
    for start in range(0, n_tokens, size := max(1, BLOCK_ELEMENTS // d)):
        block = values[start : start + size].cpu()
        check_finite(block, start, sequences)
        kept = weight_of_token[start : start + size]
        of_block = kept.sum().item()
        if not standardize or not of_block:
            continue
        block = block.to(torch.float64, copy=True)
        step = kept @ block / of_block - mean
        after = total + of_block
        scatter += kept @ block.sub_(mean + step).square_() + step.square() * (total * of_block / after)
        mean += step * (of_block / after)
        largest = torch.maximum(largest, mean.abs())
        total, count = after, count + int((kept > 0).sum())
    if not standardize:
        return TokenScaling(mean, torch.ones_like(mean))
    deviation = torch.from_numpy(standard_deviation((scatter / total).numpy(), largest.numpy(), count))
    return TokenScaling(mean, torch.where(deviation > 0, 1 / deviation, 0.0))


def check_finite(numbers: Tensor, start: int, sequences: TokenSequences) -> None:
    """InputError naming the sequence of the first token, [n_tokens n] from token `start` on, that is not finite."""
    if not all(bound.isfinite() for bound in numbers.aminmax()):  # a NaN is both of them
        finite = numbers.isfinite()
        token = start + int((~finite).any(dim=1).nonzero()[0])
        sequence = int(np.searchsorted(sequences.offsets, token, side="right")) - 1
        place = token - int(sequences.offsets[sequence])
        raise InputError(
            f"X holds NaN or infinite values, first at token {place} of sequence {sequence}; they must be finite."
        )
