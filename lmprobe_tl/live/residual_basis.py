"""Whether the residual stream that a hook point carries is the one that its probes were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.compatibility import needs_raw_basis
from lmprobe_tl.errors import IncompatibleProbeError
from lmprobe_tl.hook_points import ForwardCall, is_centred, normalization
from lmprobe_tl.weights import ProbeWeights


class BasisCheck:
    """Looks at the activations of each hook point until it is known to carry the raw stream.

    With RMSNorm there is one basis, and nothing to look at.
    """

    def __init__(self, model: Any, probes: Sequence[ProbeWeights]) -> None:
        self._probes = probes
        self._one_basis = normalization(model) == "rmsnorm"
        self._known_raw: set[str] = set()
        self._looked_centred: dict[str, int] = {}

    def check(self, hook_name: str, activations: Tensor, call: ForwardCall) -> None:
        """Raise IncompatibleProbeError where a probe for the raw stream reads a centred one."""
        if self._one_basis or hook_name in self._known_raw:
            return
        mask = torch.ones_like(call.tokens) if call.attention_mask is None else call.attention_mask[:, call.start :]
        real = activations[mask.to(activations.device).bool()]
        raw = [probe.name for probe in self._probes if needs_raw_basis(probe, hook_name)]
        if not raw or (len(real) and not is_centred(real)):
            self._known_raw.add(hook_name)
            return
        # A single token may have a mean of zero by chance: with a d_model of thousands it is one in a few hundred.
        seen = self._looked_centred.get(hook_name, 0) + len(call.tokens[mask.bool()].unique())
        self._looked_centred[hook_name] = seen
        if seen > 1:
            raise IncompatibleProbeError(
                f"probe {raw[0]!r} was trained on the raw residual stream, and this model carries the "
                "centred one (x - mean(x)) at "
                f"{hook_name!r}: its scores would be wrong and cannot be corrected. Load the model "
                "without weight processing "
                "(no enable_compatibility_mode, no center_writing_weights), or train the probe on this model."
            )
