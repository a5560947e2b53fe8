"""What is in a probe, in words, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmprobe_tl.probe_spec import (
    CONTROL_CHARACTERS,
    MetricRecord,
    ProbabilityRecord,
    ProbeSpec,
    ThresholdRecord,
    TrainingRecord,
)
from lmprobe_tl.weight_tensors import tensor_shapes
from lmprobe_tl.weights import ProbeWeights


def probe_summary(weights: ProbeWeights) -> dict[str, str]:
    """What a reader wants to know about a probe, row by row, safe to print."""
    spec = weights.spec
    rows = {
        "name": spec.name,
        "description": spec.description or "none",
        "labels": _labels_text(spec),
        "kind": _kind_text(spec),
        "hook points": ", ".join(spec.hook_points),
        "d_model": str(spec.d_model),
        "model": _facts(spec.model.to_dict() | {"layers": spec.n_layers}),
        "tokenizer": _facts(spec.tokenizer.to_dict()),
        "residual basis": f"{spec.residual_basis} (normalization: {spec.normalization})",
        "pooling": _facts(spec.pooling.to_dict()),
        "threshold": _threshold_text(spec.threshold, spec.n_classes == 2),
        "guarantee": (spec.threshold and spec.threshold.guarantee) or "not recorded",
        "probability calibration": _probability_text(spec.probability_calibration),
        "training": _training_text(spec.training),
        **{f"metric {name}": _metric_text(metric) for name, metric in spec.metrics.items()},
        "versions": ", ".join(f"{library} {version}" for library, version in spec.versions.items()) or "not recorded",
        "licence": spec.licence or "not stated",
        "size": f"{sum(math.prod(shape) for shape in tensor_shapes(spec).values())} float32 numbers",
    }
    return {_printable(key): _printable(text) for key, text in rows.items()}


def _printable(text: str) -> str:
    """Control characters spelled out, so that a file cannot send commands to the reader's terminal."""
    return CONTROL_CHARACTERS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def _facts(values: Mapping[str, Any]) -> str:
    known = [f"{key.replace('_', ' ')} {value}" for key, value in values.items() if value is not None]
    return ", ".join(known) or "not recorded"


def _kind_text(spec: ProbeSpec) -> str:
    sizes = [f"{key.replace('_', ' ')} {size}" for key, size in spec.head.to_dict().items() if size is not None]
    return spec.kind.replace("_", " ") + (f" ({', '.join(sizes)})" if sizes else "")


def _labels_text(spec: ProbeSpec) -> str:
    if spec.n_classes == 2:
        return f"{spec.labels[1]!r} (positive), {spec.labels[0]!r} (negative)"
    return ", ".join(repr(label) for label in spec.labels)


def _threshold_text(threshold: ThresholdRecord | None, binary: bool) -> str:
    if threshold is None:
        return "probability >= 0.5 (default)" if binary else "none"
    origin = {key: getattr(threshold, key) for key in ("method", "fpr", "delta", "n", "rank", "statistic")}
    return f"{threshold.unit} >= {threshold.value:g} ({_facts(origin)})"


def _probability_text(curve: ProbabilityRecord | None) -> str:
    if curve is None:
        return "none"
    return (
        f"sigmoid({curve.slope:g} z {curve.intercept:+g}), z the logit of the {curve.statistic} "
        f"({curve.n_negative} negative and {curve.n_positive} positive sequences, "
        f"log loss {curve.log_loss_before:.3g} before and {curve.log_loss_after:.3g} after)"
    )


def _training_text(training: TrainingRecord | None) -> str:
    return "not recorded" if training is None else _facts(training.to_dict())


def _metric_text(metric: MetricRecord) -> str:
    if metric.confidence is None:
        return f"{metric.value:.4g} (n {metric.n})"
    return f"{metric.value:.4g} [{metric.low:.4g}, {metric.high:.4g}] ({metric.confidence:.4g} confidence, n {metric.n})"
