"""A linear change of activations at one hook point: directions projected out, a vector added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError

# Of the largest singular value of rows of length 1: far above what float32 leaves of rows that depend on each other.
_RANK_TOLERANCE = 1e-5

_Parts: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Reading:
    """What one probe, or plain direction, reads at one hook point: `activations @ weight.T + bias`.

    weight: [n_outputs d_model]; bias: [n_outputs]; both float32 on the CPU.
    """

    name: str
    hook_point: str
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Edit:
    """`x - (x @ removed.T) @ removed + added`, and what reads x before and after.

    removed: [rank d_model], orthonormal rows; added: [d_model].
    """

    removed: Tensor
    added: Tensor
    readings: Sequence[Reading]
    _on_device: dict[torch.device, _Parts] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def does_nothing(self) -> bool:
        """Whether it leaves every activation as it is, as a coefficient of 0 does."""
        return not len(self.removed) and not bool(self.added.any())

    def apply(self, activations: Tensor) -> Tensor:
        """activations [... d_model], changed in float32 and returned in their own dtype."""
        removed, added, _, _ = self._on(activations.device)
        values = activations.float()
        with torch.autocast(activations.device.type, enabled=False):  # it would narrow the products
            changed = values - (values @ removed.T) @ removed + added
        return changed.to(activations.dtype)

    def read(self, activations: Tensor) -> Tensor:
        """activations [... d_model] -> outputs of all readings side by side [... n_outputs], float32."""
        _, _, weight, bias = self._on(activations.device)
        with torch.autocast(activations.device.type, enabled=False):
            return torch.nn.functional.linear(activations.detach().float(), weight, bias)

    def _on(self, device: torch.device) -> _Parts:
        if device not in self._on_device:
            weight = torch.cat([reading.weight for reading in self.readings])
            bias = torch.cat([reading.bias for reading in self.readings])
            with torch.inference_mode(False):  # a copy made inside inference mode could take no part in a backward pass
                removed, added, weight, bias = (part.to(device) for part in (self.removed, self.added, weight, bias))
            self._on_device[device] = removed, added, weight, bias
        return self._on_device[device]


def addition(reading: Reading, vector: Tensor) -> Edit:
    """The edit that adds `vector` [d_model] to every activation."""
    return Edit(removed=vector.new_zeros(0, len(vector)).float(), added=vector.float(), readings=(reading,))


def projection(readings: Sequence[Reading], to: float | None = None) -> Edit:
    """The edit that makes all readings of one hook point constant: their biases, or `to`, whatever the activation was.

    With W all weights below each other, x goes to x - W+ W x, W+ the pseudoinverse: the nearest x for which W x = 0. With
    `to` it goes to the nearest x for which W x + bias = to; InputError where no x gives that.
    """
    weight = torch.cat([reading.weight for reading in readings]).double()
    lengths = weight.norm(dim=-1, keepdim=True)
    weight, lengths = weight[lengths[:, 0] > 0], lengths[lengths[:, 0] > 0]
    _, sizes, rows = torch.linalg.svd(weight / lengths, full_matrices=False)
    removed = rows[sizes > _RANK_TOLERANCE * sizes.max()]
    added = torch.zeros(weight.shape[1], dtype=torch.float64)
    if to is not None:
        bias = torch.cat([reading.bias for reading in readings]).double()
        wanted = (to - bias) / lengths[:, 0]
        added = torch.linalg.lstsq((weight / lengths) @ removed.T, wanted[:, None]).solution[:, 0] @ removed
        off = (weight / lengths) @ added - wanted
        if off.abs().max() > 1e-4 * max(float(wanted.abs().max()), 1e-6):
            names = ", ".join(repr(reading.name) for reading in readings)
            raise InputError(
                f"no activation gives {names} a reading of {to:g} all at once at {readings[0].hook_point!r}: their "
                "directions depend on each other. Ablate them one at a time, or leave out `to`."
            )
    return Edit(removed=removed.float(), added=added.float(), readings=tuple(readings))
