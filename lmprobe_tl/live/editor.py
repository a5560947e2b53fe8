"""Edits on a model while it runs: which positions change in which forward pass, and what was changed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import MonitorError, ProbeNeverFiredError
from lmprobe_tl.forward_watch import check_is_watched
from lmprobe_tl.hook_points import ForwardCall, HookHandle, add_editing_hook, cache_of
from lmprobe_tl.live.change import Change
from lmprobe_tl.live.chosen_positions import ChosenPositions, PassPositions
from lmprobe_tl.live.edit import Edit
from lmprobe_tl.live.passes import in_callback
from lmprobe_tl.live.residual_basis import BasisCheck
from lmprobe_tl.weights import ProbeWeights

_REPLACED = (
    "Run the model inside the block (it must reach these layers: no early stop_at_layer), and begin it after anything "
    "that replaces hook points (an SAE, an adapter) or resets hooks."
)


class _Pass(threading.local):
    """The forward pass that is on its way in a thread."""

    def __init__(self) -> None:
        self.call: ForwardCall | None = None
        self.positions: PassPositions | None = None
        self.missing: set[str] = set()


class Editor:
    """Changes activations at the chosen positions of every forward pass, but of those inside a callback of probes.

    edits: by hook point. probes: whose directions these are, to check the residual basis.
    """

    def __init__(
        self, model: Any, edits: Mapping[str, Edit], positions: ChosenPositions, probes: Sequence[ProbeWeights]
    ) -> None:
        self.change = Change(edits)
        self._edits, self._positions = edits, positions
        self._basis = BasisCheck(model, probes)
        self._handles: dict[str, HookHandle] = {}
        self._pass = _Pass()
        self._never = set(edits)
        self._unfinished = False  # the last forward pass, of whatever thread

    def attach(self, model: Any) -> None:
        for hook_name in self._edits:
            check_is_watched(model, hook_name)
            self._handles[hook_name] = add_editing_hook(model, hook_name, partial(self.on_activations, hook_name))

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()

    def before_forward(self, call: ForwardCall) -> None:
        if in_callback():
            return
        lost = [name for name, handle in self._handles.items() if not handle.is_attached]
        if lost:
            raise MonitorError(
                f"the hooks that change {lost} were removed (by reset_hooks(), for instance), so what follows would stay "
                "unchanged. Begin the block after whatever removes hooks."
            )
        self._pass.call, self._pass.positions = call, self._positions.of(call)
        self._pass.missing = set(self._edits)
        self._unfinished = True

    def on_activations(self, hook_name: str, activations: Tensor) -> Tensor | None:
        if in_callback():
            return None
        call, positions, edit = self._pass.call, self._pass.positions, self._edits[hook_name]
        expected = None if call is None else (*call.tokens.shape, edit.added.shape[0])
        if call is None or positions is None or tuple(activations.shape) != expected:
            raise MonitorError(
                f"hook point {hook_name!r} fired with {tuple(activations.shape)}; expected {expected} = "
                "[batch pos d_model] of the tokens of this forward pass."
            )
        self._basis.check(hook_name, activations, call)
        device = activations.device
        chosen, counted = positions.chosen.to(device), positions.counted.to(device)
        changed = torch.where(chosen[..., None], edit.apply(activations), activations)
        self.change.add(hook_name, activations, changed, counted)
        self._never.discard(hook_name)
        self._pass.missing.discard(hook_name)
        if not self._pass.missing:
            self._unfinished = False
        return changed

    def after_forward(self, output: Any) -> None:
        if in_callback():
            return
        missing, self._pass.missing, self._pass.call = self._pass.missing, set(), None
        self._positions.bind_cache(cache_of(output))
        if missing:
            raise ProbeNeverFiredError(
                f"hook points {sorted(missing)} did not fire in a forward pass, so nothing was changed there. {_REPLACED}"
            )

    def check_fired(self) -> None:
        """Raise ProbeNeverFiredError where a hook point never fired, or was not reached by the last forward pass."""
        if self._never:
            raise ProbeNeverFiredError(
                f"nothing was changed at hook points {sorted(self._never)}, which never fired. {_REPLACED}"
            )
        if self._unfinished:
            raise ProbeNeverFiredError(f"the last forward pass did not reach {sorted(self._edits)}. {_REPLACED}")
