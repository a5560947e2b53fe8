"""The part of a direction that reads each hook point, and whether it sees the mean of the residual stream there."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import InputError

SUM_TOLERANCE = 1e-4  # of a block's L1 norm: far above float32 rounding, far below any direction that was never centred


def centred_direction(direction: Tensor, d_model: int) -> Tensor:
    """The direction [n_readings, n_hook_points*d_model] that reads x as this one reads x - mean(x), in float64: since
    w.(x - mean(x)) = (w - mean(w)).x, the mean is taken off each block."""
    blocks = _blocks(direction, d_model)
    return rearrange(blocks - blocks.mean(dim=-1, keepdim=True), "n_readings hook d_model -> n_readings (hook d_model)")


def blocks_with_a_sum(direction: Tensor, d_model: int) -> Tensor:
    """Whether each block sums to anything but zero, [n_readings, hook] bool: it then reads the mean of the stream too."""
    blocks = _blocks(direction, d_model)
    return blocks.sum(dim=-1).abs() > SUM_TOLERANCE * blocks.abs().sum(dim=-1)


def check_zero_sums(direction: Tensor, d_model: int, name: str, hook_points: Sequence[str]) -> None:
    """InputError for a probe `name` that claims the residual basis 'any' with a block that does not sum to zero."""
    wrong = blocks_with_a_sum(direction, d_model)
    if wrong.any():
        reading, hook = wrong.nonzero()[0].tolist()
        block = _blocks(direction, d_model)[reading, hook]
        raise InputError(
            f"Probe {name!r} says residual_basis 'any', but its direction at {hook_points[hook]} sums to "
            f"{block.sum().item():g} (absolute values: {block.abs().sum().item():g}); expected 0. "
            "Subtract the mean of the block before fitting the intercept, or say residual_basis='raw'."
        )


def _blocks(direction: Tensor, d_model: int) -> Tensor:
    # float64, whose sums do not round
    return rearrange(direction.double(), "n_readings (hook d_model) -> n_readings hook d_model", d_model=d_model)
