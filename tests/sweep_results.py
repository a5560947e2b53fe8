"""Results of sweeps that no sweep has made, for tests of what is said and drawn of them."""

from __future__ import annotations

from typing import Any

from lmprobe_tl.evaluation import Evaluation
from lmprobe_tl.metrics import Interval
from lmprobe_tl.sweep_result import SweepResult, SweepRow


def interval(value: float, width: float | None = 0.05) -> Interval:
    low, high = (None, None) if width is None else (value - width, min(value + width, 1.0))
    return Interval(value, low, high, 0.95, 40)


def result_of(
    values: dict[tuple[str, int | None, str, str], float],
    *,
    baseline: float = 0.7,
    test: float = 0.9,
    baseline_test: float = 0.7,
    width: float | None = 0.05,
) -> SweepResult:
    """values: of (hook point, layer, pooling, classifier) to validation AUROC."""
    rows = tuple(SweepRow(*key, interval(value, width)) for key, value in values.items())
    accuracy: Any = interval(0.8, width)
    evaluation = Evaluation(interval(test, width), accuracy, None, 0.01, "prompt", "mean", 16, 16, 200, 0)
    return SweepResult(
        rows=rows,
        best_=max(rows, key=lambda row: row.validation.value),
        test=evaluation,
        baseline=interval(baseline, width),
        baseline_test=interval(baseline_test, width),
        level="prompt",
        validation=5,
        n_selection=48,
        n_test=16,
        random_state=0,
        probe_=None,
    )


def by_layer(
    layers: list[int],
    poolings: tuple[str, ...] = ("mean",),
    classifiers: tuple[str, ...] = ("logistic_regression",),
    **settings: Any,
) -> SweepResult:
    """AUROC that rises to the middle layers, a little other for each pooling and classifier."""
    values = {}
    for layer in layers:
        for at, pooling in enumerate(poolings):
            for other, classifier in enumerate(classifiers):
                peak = 1 - abs(layer - layers[len(layers) // 2]) / (len(layers) + 1)
                key = (f"blocks.{layer}.hook_resid_post", layer, pooling, classifier)
                values[key] = 0.6 + 0.35 * peak - 0.06 * at - 0.03 * other
    return result_of(values, **settings)
