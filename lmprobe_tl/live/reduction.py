"""A probe's inference pooling as an online reduction of its token logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmprobe_tl.errors import IncompatibleProbeError
from lmprobe_tl.pooling import parse_pooling_strategy
from lmprobe_tl.precision import wide_dtype
from lmprobe_tl.probe_spec import ThresholdUnit
from lmprobe_tl.reductions import REDUCTIONS
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True)
class LiveReduction:
    """How the running score of a probe follows from its logits: `before`, then the online reduction `name`, then `after`.

    name is None where the probe's head reduces its readings itself.

    before, after: 'none', 'sigmoid' or 'softmax'. unit: of the running score, 'probability' or 'logit'. counts_bos: whether
    a leading BOS takes part. on_readings: the online reduction takes the readings of tokens, and the head makes a logit of
    its result: a mean of activations is a mean of readings, but of logits only where the head is linear.
    """

    name: str | None
    parameter: float | int | None
    before: str
    after: str
    unit: str
    counts_bos: bool
    on_readings: bool = False

    @property
    def own_unit(self) -> ThresholdUnit:
        """The unit that it runs in for a binary probe, where nothing is rounded away."""
        return "logit" if self.before == "none" else "probability"

    def in_unit(self, values: Tensor, unit: str) -> Tensor:
        """Values of the online reduction of a binary probe as 'probability' or 'logit', whatever it runs in."""
        if self.before == "none":
            return sigmoid(values) if unit == "probability" else values
        return _logits(values) if unit == "logit" else values


def sigmoid(values: Tensor) -> Tensor:
    """The same for equal values, wherever they stand in the tensor."""
    # Through float64: in float32 the last bit differs between the entries of a tensor, and from one alone.
    return values.to(wide_dtype(values.device)).sigmoid().to(values.dtype)


def _logits(values: Tensor) -> Tensor:
    return values.to(wide_dtype(values.device)).logit().to(values.dtype)


def live_reduction(weights: ProbeWeights) -> LiveReduction:
    """The online reduction that equals the probe's inference pooling, or IncompatibleProbeError where there is none.

    Pooling the activations by mean, first or last token is linear, so it is the same reduction of the readings.
    """
    if weights.spec.reduces_tokens:
        return LiveReduction(None, None, "none", "sigmoid", "probability", weights.spec.pooling.include_bos)
    strategy = weights.spec.pooling.inference
    parsed = parse_pooling_strategy(strategy)
    name = "last_token" if parsed.base_strategy == "all" else parsed.base_strategy  # 'all': every token speaks for itself
    squash = "sigmoid" if weights.is_binary else "softmax"
    picks_one = name in ("last_token", "first_token")
    linear = picks_one or (name == "mean" and not parsed.is_score_pooling)
    if parsed.is_score_pooling and REDUCTIONS[name].on == "logit":
        if not weights.is_binary:
            raise IncompatibleProbeError(
                f"probe {weights.name!r} has {weights.n_classes} classes, and inference pooling {strategy!r} works on the "
                "logit of two. Train it with another inference pooling, for instance 'score:max'."
            )
        before, after, unit = "none", "none", "logit"
    elif linear or (name in ("max", "min") and parsed.is_score_pooling and weights.is_binary):
        # max and min are monotone, so with two classes they run on logits too: there scores near 0 and 1 stay apart.
        before, after, unit = "none", squash, "probability"
    elif parsed.is_score_pooling:
        before, after, unit = squash, "none", "probability"
    else:
        raise IncompatibleProbeError(
            f"probe {weights.name!r} pools activations by {strategy!r}, which has no token-by-token form. Train it with "
            "another inference pooling, for instance 'score:max'."
        )
    counts_bos = weights.spec.pooling.include_bos or name == "first_token"
    on_readings = name == "mean" and not parsed.is_score_pooling and weights.spec.has_readout
    return LiveReduction(name, parsed.parameter, before, after, unit, counts_bos, on_readings)
