"""The frozen probe: a direction, an intercept and a spec. It scores activations and needs torch alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.checked_record import shown
from lmprobe_tl.direction_blocks import centred_direction, check_zero_sums
from lmprobe_tl.errors import IncompatibleProbeError, InputError
from lmprobe_tl.heads import Head, LinearHead, ReadoutHead, SequenceHead, polynomial_orders
from lmprobe_tl.masks import real_tokens
from lmprobe_tl.pooling import parse_pooling_strategy
from lmprobe_tl.precision import wide_dtype, without_autocast
from lmprobe_tl.probe_spec import (
    HIGHEST_LOGIT,
    LOWEST_LOGIT,
    RECALL_METRIC,
    Label,
    MetricRecord,
    ProbeSpec,
    ThresholdRecord,
    ThresholdUnit,
    without_threshold_metrics,
)
from lmprobe_tl.types import AttentionMask
from lmprobe_tl.weight_tensors import as_tensor, own_copy, tensor_shapes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lmprobe_tl.calibration import Calibration


@dataclass(frozen=True, eq=False, repr=False)
class ProbeWeights:
    """A probe: `readings = activations @ direction.T + intercept`, and its head, which makes logits of them.

    direction: [n_readings, n_hook_points*d_model] and intercept: [n_readings], both kept as float32 copies on the CPU; treat
    them as read-only. The readings of a linear probe are its logits: n_outputs = 1 for a binary probe (the logit of the
    positive class, `spec.labels[1]`), else n_classes. What other kinds make of theirs says `lmprobe_tl.heads`.

    readout: [n_outputs, n_readings] and readout_intercept: [n_outputs], of the kinds 'mlp' and 'polynomial' alone.

    `spec.residual_basis` says which residual stream the direction fits. Models with LayerNorm ignore the mean of the stream,
    so a model whose writing weights were centred carries `x - mean(x)` where the original carries `x`:

    - 'raw': fits x, as the original model computes it.
    - 'centered': fits x - mean(x).
    - 'any': each d_model block of the direction sums to zero, so both streams get the same score.

    InputError: a wrong shape, a value that is not finite, a readout that is missing or too many, or a direction that claims
    'any' and does not sum to zero.
    """

    direction: Tensor
    intercept: Tensor
    spec: ProbeSpec
    readout: Tensor | None = None
    readout_intercept: Tensor | None = None
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        shapes = tensor_shapes(self.spec)
        for what in ("direction", "intercept", "readout", "readout_intercept"):
            tensor = getattr(self, what)
            if what in shapes:
                tensor = own_copy(tensor, shapes[what], f"Probe {self.name!r}: {what}")
            elif tensor is not None:
                raise InputError(
                    f"Probe {self.name!r}: {what} is given; expected None, since its kind is {self.spec.kind!r}."
                )
            object.__setattr__(self, what, tensor)
        if self.spec.residual_basis == "any":
            check_zero_sums(self.direction, self.d_model, self.name, self.hook_points)

    @classmethod
    def from_direction(
        cls,
        direction: Tensor | ArrayLike,
        intercept: Tensor | ArrayLike = 0.0,
        *,
        name: str,
        hook_points: str | Sequence[str],
        labels: Sequence[Label] = (0, 1),
        **spec_fields: Any,
    ) -> ProbeWeights:
        """A probe from a direction of your own.

        direction: [n_hook_points*d_model], or [n_readings, n_hook_points*d_model]; intercept: one number, or [n_readings].
        spec_fields: any other field of `ProbeSpec`, such as `residual_basis` or `description`; d_model is worked out. A kind
        with a readout is made by `ProbeWeights(...)` itself.

            ProbeWeights.from_direction(positive_mean - negative_mean, name="deceit", hook_points="blocks.6.hook_resid_post")
        """
        hooks = (hook_points,) if isinstance(hook_points, str) else tuple(hook_points)
        rows = torch.atleast_2d(as_tensor(direction))
        d_model, rest = divmod(rows.shape[-1], max(len(hooks), 1))
        if rest:
            raise InputError(f"direction has {rows.shape[-1]} columns; expected a multiple of its {len(hooks)} hook points.")
        spec = ProbeSpec(name=name, hook_points=hooks, d_model=d_model, labels=tuple(labels), **spec_fields)
        offsets = as_tensor(intercept)
        return cls(rows, offsets.expand(spec.n_readings) if offsets.ndim == 0 else offsets, spec)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def hook_points(self) -> tuple[str, ...]:
        return self.spec.hook_points

    @property
    def labels(self) -> tuple[Label, ...]:
        return self.spec.labels

    @property
    def d_model(self) -> int:
        return self.spec.d_model

    @property
    def n_classes(self) -> int:
        return self.spec.n_classes

    @property
    def is_binary(self) -> bool:
        return self.spec.n_classes == 2

    @property
    def threshold(self) -> ThresholdRecord | None:
        return self.spec.threshold

    def __repr__(self) -> str:
        limit = "none" if self.threshold is None else f"{self.threshold.unit} >= {self.threshold.value:g}"
        kind = "" if self.spec.kind == "linear" else f", kind={self.spec.kind!r}"
        return f"ProbeWeights({self.name!r}{kind}, hook_points={self.hook_points}, labels={self.labels}, threshold={limit})"

    def __reduce__(self) -> tuple[Any, ...]:
        tensors = (self.direction, self.intercept, self.spec, self.readout, self.readout_intercept)
        return ProbeWeights, tensors  # without the copies on other devices

    def __call__(self, activations: Tensor) -> Tensor:
        """The same as `logits`."""
        return self.logits(activations)

    @cached_property
    def head(self) -> Head:
        """What makes logits of the readings; see `lmprobe_tl.heads`."""
        spec, sizes = self.spec, self.spec.head
        if self.readout is not None and self.readout_intercept is not None:
            polynomial = spec.kind == "polynomial"
            orders = polynomial_orders(sizes.degree or 1, sizes.rank or 1) if polynomial else None
            return ReadoutHead(spec.n_outputs, self.readout, self.readout_intercept, orders)
        return (
            SequenceHead(spec.kind, sizes.n_heads or 1, sizes.window) if spec.reduces_tokens else LinearHead(spec.n_outputs)
        )

    def readings(self, activations: Tensor) -> Tensor:
        """What the probe reads off each token, [..., n_readings] float32; activations as in `logits`."""
        self.check_activations(activations)
        direction, intercept = self._weights_on(activations.device)
        with without_autocast(activations.device):
            return torch.nn.functional.linear(activations.float(), direction, intercept)

    def logits(self, activations: Tensor) -> Tensor:
        """Scores of single tokens before the sigmoid or softmax, in float32 on the activations' device.

        activations: [..., n_hook_points*d_model], any float dtype and device; several hook points concatenated in the order
        of `hook_points`. Returns [...] for a binary probe, else [..., n_classes]. A probe that reduces its tokens itself
        gives the logit of each token alone; see `sequence_logits`. IncompatibleProbeError: another width.
        """
        logits = self.head.token_logits(self.readings(activations))
        return rearrange(logits, "... 1 -> ...") if self.is_binary else logits

    def probabilities(self, activations: Tensor) -> Tensor:
        """Probability of the positive class [...] for a binary probe, else of each class [..., n_classes]; float32."""
        logits = self.logits(activations)
        return torch.sigmoid(logits) if self.is_binary else torch.softmax(logits, dim=-1)

    def sequence_logits(self, activations: Tensor, attention_mask: AttentionMask | None = None) -> Tensor:
        """The logit of each row from all its tokens, [batch], for a probe that reduces its tokens itself.

        activations: [batch pos n_hook_points*d_model]; attention_mask: [batch pos], 1 = counts, so that a BOS that the probe
        leaves out is 0. InputError for other kinds, whose token logits a pooling reduces; EmptyMaskError for a row where
        nothing counts.
        """
        if not isinstance(self.head, SequenceHead):
            raise InputError(
                f"probe {self.name!r} is of kind {self.spec.kind!r}, which scores token by token; reduce `logits` with "
                f"pooling.reduce_scores, or score whole prompts with score_prompts."
            )
        readings = self.readings(activations)
        if readings.ndim != 3:
            width = self.direction.shape[1]
            raise InputError(
                f"Probe {self.name!r}: activations have shape {list(activations.shape)}; expected [batch pos {width}]. For "
                "one sequence give activations[None]."
            )
        counted = rearrange(real_tokens(attention_mask, readings), "batch pos -> batch pos 1")
        wide = readings.to(wide_dtype(readings.device))
        return self.head.batch(torch.where(counted, wide, 0.0), counted).float()[:, 0]

    def direction_at(self, hook_name: str) -> Tensor:
        """The block of the direction [n_readings, d_model] that reads this hook point."""
        if hook_name not in self.hook_points:
            raise InputError(f"Probe {self.name!r} does not read {hook_name!r}; it reads {', '.join(self.hook_points)}.")
        start = self.hook_points.index(hook_name) * self.d_model
        return self.direction[:, start : start + self.d_model]

    def to_raw_basis(self) -> ProbeWeights:
        """The same probe for the raw residual stream x.

        A 'centered' probe reads x - mean(x), which is what a LayerNorm model with centred writing weights carries. Since
        w.(x - mean(x)) = (w - mean(w)).x, subtracting the mean of each block moves it to raw exactly; the block then sums to
        zero, so the result is 'any' and still scores x - mean(x) the same. A 'raw' or 'any' probe is returned as it is.
        """
        if self.spec.residual_basis != "centered":
            return self
        direction = centred_direction(self.direction, self.d_model)
        return replace(self, direction=direction, spec=replace(self.spec, residual_basis="any"))

    def with_threshold(
        self,
        value: float,
        unit: ThresholdUnit = "probability",
        method: str = "manual",
        fpr: float | None = None,
        delta: float | None = None,
        n: int | None = None,
    ) -> ProbeWeights:
        """A copy that flags when `score >= value`; the other arguments record how the value was found. It has no metrics of
        the old threshold."""
        threshold = ThresholdRecord(value=value, unit=unit, method=method, fpr=fpr, delta=delta, n=n)
        metrics = without_threshold_metrics(self.spec.metrics)
        return replace(self, spec=replace(self.spec, threshold=threshold, metrics=metrics))

    def with_calibration(self, calibration: Calibration) -> ProbeWeights:
        """A copy with the threshold, recall (as metric 'recall_at_fpr') and probability curve of a calibration alone."""
        metrics = without_threshold_metrics(self.spec.metrics)
        if calibration.recall is not None:
            metrics[RECALL_METRIC] = calibration.recall
        threshold, curve = calibration.threshold, calibration.probability
        return replace(self, spec=replace(self.spec, threshold=threshold, probability_calibration=curve, metrics=metrics))

    def calibrated_probabilities(self, scores: Tensor | ArrayLike) -> Tensor:
        """Probability that a sequence is positive, from the logits of its calibrated statistic: the running maximum, as
        `sequence_maxima(..., unit='logit')` gives it. Any shape; float32.

        It holds for the ratio of positives that it was fitted on, and has no part in thresholds and alarms. InputError where
        the probe has no probability calibration.
        """
        curve = self.spec.probability_calibration
        if curve is None:
            raise InputError(
                f"probe {self.name!r} has no probability calibration; make one with calibrate(..., positive_prompts=..., "
                "probability=True)."
            )
        logits = as_tensor(scores)
        if not logits.is_floating_point() or logits.isnan().any():
            raise InputError(f"scores are {shown(logits)}; expected logits, floats that are not NaN.")
        logits = logits.nan_to_num(posinf=HIGHEST_LOGIT, neginf=LOWEST_LOGIT)
        return torch.sigmoid(logits.float() * curve.slope + curve.intercept)

    def with_inference_pooling(self, strategy: str) -> ProbeWeights:
        """A copy that pools by another strategy, such as 'score:max'. It has no threshold, probability calibration and
        metrics: all were of the old score."""
        if self.spec.reduces_tokens:
            raise InputError(
                f"probe {self.name!r} is of kind {self.spec.kind!r}, which reduces its tokens itself and pools no other way."
            )
        parse_pooling_strategy(strategy)
        pooling = replace(self.spec.pooling, inference=strategy)
        spec = replace(self.spec, pooling=pooling, threshold=None, probability_calibration=None, metrics={})
        return replace(self, spec=spec)

    def with_metrics(self, metrics: Mapping[str, MetricRecord]) -> ProbeWeights:
        """A copy that carries these metrics and no others."""
        return replace(self, spec=replace(self.spec, metrics=metrics))

    def renamed(self, name: str) -> ProbeWeights:
        """A copy under another name, which is the key of its scores."""
        return replace(self, spec=replace(self.spec, name=name))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> Path:
        """Write one .safetensors file, which `load_probe` reads back; see `probe_file.save_probe`."""
        from lmprobe_tl.probe_file import save_probe  # that file imports this one

        return save_probe(self, path, overwrite=overwrite)

    def _weights_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device == self.direction.device:
            return self.direction, self.intercept
        if device not in self._moved:
            with torch.inference_mode(False):  # a copy made inside inference mode could never take part in a backward pass
                self._moved[device] = (self.direction.to(device), self.intercept.to(device))
        return self._moved[device]

    def check_activations(self, activations: Tensor) -> None:
        """InputError for what is no tensor of floats, IncompatibleProbeError for one of another width."""
        if not isinstance(activations, Tensor) or not activations.is_floating_point():
            kind = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
            raise InputError(f"Probe {self.name!r}: activations are {kind}; expected a tensor of a float dtype.")
        width = self.direction.shape[1]
        if activations.shape[-1:] != (width,):
            what = f"d_model {self.d_model} at {self.hook_points[0]}"
            if len(self.hook_points) > 1:
                parts = ", ".join(self.hook_points)
                what = f"{len(self.hook_points)} x d_model {self.d_model}, concatenated in this order: {parts}"
            raise IncompatibleProbeError(
                f"Probe {self.name!r}: activations have shape {list(activations.shape)}; expected [..., {width}] ({what})."
            )
