"""What steering or ablation did to the activations, by hook point."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmprobe_tl.live.edit import Edit

# Of the residual norm: below it float32 holds no change.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class HookPointChange:
    """How much was changed at one hook point; means are over the `n_positions` that were changed, NaN where there are none.

    mean_norm, max_norm: length of the change of a position. residual_norm: mean length of the activations before it.
    before, after: by name the mean logit of a probe (of each class, with several), of which a probe on several hook points
    has here the part that this one adds, without the intercept; of a plain direction the component along it.
    """

    hook_point: str
    n_positions: int
    mean_norm: float
    max_norm: float
    residual_norm: float
    before: Mapping[str, float | tuple[float, ...]]
    after: Mapping[str, float | tuple[float, ...]]

    @property
    def ratio(self) -> float:
        """`mean_norm` as a share of `residual_norm`."""
        return self.mean_norm / self.residual_norm if self.residual_norm else math.nan

    def __str__(self) -> str:
        if not self.n_positions:
            return f"{self.hook_point}: no position changed"
        moved = "; ".join(f"{name!r} {_shown(self.before[name])} -> {_shown(self.after[name])}" for name in self.before)
        count = "1 position" if self.n_positions == 1 else f"{self.n_positions} positions"
        return (
            f"{self.hook_point}: {count} changed by {self.mean_norm:.3g} on average, {self.max_norm:.3g} at most "
            f"({self.ratio:.1%} of the residual norm {self.residual_norm:.3g}); {moved}"
        )


def _shown(value: float | tuple[float, ...]) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "(" + ", ".join(f"{one:.3f}" for one in value) + ")"


class Change(Mapping[str, HookPointChange]):
    """What was changed so far, by name of the hook point. Reading it, during the block or after, waits for the device."""

    def __init__(self, edits: Mapping[str, Edit]) -> None:
        self._tallies = {hook_name: _Tally(edit) for hook_name, edit in edits.items()}

    def __getitem__(self, hook_name: str) -> HookPointChange:
        return self._tallies[hook_name].record(hook_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tallies)

    def __len__(self) -> int:
        return len(self._tallies)

    def __repr__(self) -> str:
        return "Change(\n" + "".join(f"    {one}\n" for one in self.values()) + ")"

    def add(self, hook_name: str, before: Tensor, after: Tensor, counted: Tensor) -> None:
        """Take in a forward pass: activations [batch pos d_model] before and after, counted [batch pos] bool."""
        self._tallies[hook_name].add(before, after, counted)

    @property
    def is_nothing(self) -> bool:
        """Whether no position was changed, or none by more than rounding though it should have been."""
        found = [one for one in self.values() if one.n_positions]
        if not found:
            return True
        idle = all(tally.edit.does_nothing for tally in self._tallies.values())
        return not idle and all(one.max_norm <= _ROUNDING * one.residual_norm for one in found)


class _Tally:
    """Sums over the changed positions of one hook point, on the device, so that no forward pass waits for it."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self._sums: Tensor | None = None  # [3 + 2 * n_outputs]: positions, norms of change and residual, readings twice
        self._largest: Tensor | None = None
        self._lock = threading.Lock()

    def add(self, before: Tensor, after: Tensor, counted: Tensor) -> None:
        before, after = before.detach(), after.detach()
        norms = (after.float() - before.float()).norm(dim=-1)
        parts = [torch.ones_like(norms)[..., None], norms[..., None], before.float().norm(dim=-1, keepdim=True)]
        values = torch.cat([*parts, self.edit.read(before), self.edit.read(after)], dim=-1)
        exact = torch.float32 if values.device.type == "mps" else torch.float64
        sums = torch.where(counted[..., None], values, 0).sum(dim=(0, 1), dtype=exact)  # a pad may hold NaN
        largest = torch.where(counted, norms, 0).max()
        with self._lock:  # no tensor is written to: it may be one of inference mode, and later passes outside of that
            self._sums = sums if self._sums is None else self._sums + sums
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def record(self, hook_name: str) -> HookPointChange:
        with self._lock:
            sums, largest = self._sums, self._largest
        n_outputs = sum(len(reading.bias) for reading in self.edit.readings)
        numbers = [0.0] * (3 + 2 * n_outputs) if sums is None or largest is None else sums.tolist()
        count = round(numbers[0])
        norm, residual, *readings = (number / count if count else math.nan for number in numbers[1:])
        return HookPointChange(
            hook_point=hook_name,
            n_positions=count,
            mean_norm=norm,
            max_norm=math.nan if not count or largest is None else float(largest),
            residual_norm=residual,
            before=self._by_name(readings[:n_outputs]),
            after=self._by_name(readings[n_outputs:]),
        )

    def _by_name(self, values: list[float]) -> dict[str, float | tuple[float, ...]]:
        found: dict[str, float | tuple[float, ...]] = {}
        for reading in self.edit.readings:
            own, values = values[: len(reading.bias)], values[len(reading.bias) :]
            found[reading.name] = own[0] if len(own) == 1 else tuple(own)
        return found
