"""The work of `lmprobe-tl calibrate`: set a probe file's threshold on files of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmprobe_tl.errors import InputError
from lmprobe_tl.live_calibration import CalibrationGoal, calibrate_probe
from lmprobe_tl.probe_file import SUFFIX, load_probe
from lmprobe_tl.probe_spec import RECALL_METRIC
from lmprobe_tl.records import read_prompts
from lmprobe_tl.weights import ProbeWeights


def calibrate_file(
    probe: Path,
    negatives: str,
    positives: str | None,
    goal: CalibrationGoal,
    *,
    load_model: Callable[[], Any],
    out: Path | None,
    text_column: str,
    batch_size: int,
    prepend_bos: bool | None,
) -> list[str]:
    """Write the calibrated probe to `out`, by default back into its file; returns what to tell the user, line by line.

    Everything that can fail without the model does so before it is loaded.
    """
    target = probe if out is None else out
    if target.suffix != SUFFIX:
        raise InputError(f"--out is {str(target)!r}; a probe file ends in {SUFFIX}.")
    if not target.resolve().parent.is_dir():
        raise InputError(f"--out is {str(target)!r}, but there is no folder {str(target.resolve().parent)!r}.")
    if negatives == positives == "-":
        raise InputError("negatives and --positives both read standard input; give one of them as a file.")
    weights = load_probe(probe)
    texts = read_prompts(negatives, text_column)
    positive_texts = None if positives is None else read_prompts(positives, text_column)
    goal.check(weights, texts, positive_texts)
    calibrated = calibrate_probe(
        load_model(),
        weights,
        texts,
        goal.fpr,
        goal.delta,
        method=goal.method,
        positive_prompts=positive_texts,
        min_recall=goal.min_recall,
        probability=goal.probability,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
    )
    return [f"{calibrated.save(target)}: probe {calibrated.name!r}, calibrated", *_lines(calibrated)]


def _lines(weights: ProbeWeights) -> list[str]:
    threshold, curve = weights.threshold, weights.spec.probability_calibration
    assert threshold is not None
    lines = [
        f"threshold: {threshold.unit} >= {threshold.value:g} ({threshold.statistic})",
        f"method: {threshold.method} (just above rank {threshold.rank} of {threshold.n} negative sequences in rising order)",
        f"guarantee: {threshold.guarantee}",
    ]
    recall = weights.spec.metrics.get(RECALL_METRIC)
    if recall is not None:
        interval = f"[{recall.low:.3f}, {recall.high:.3f}]"
        lines.append(f"recall: {recall.value:.3f} {interval} on {recall.n} positive sequences")
    if curve is not None:
        lines.append(
            f"probability: sigmoid({curve.slope:g} z {curve.intercept:+g}) of the running maximum's logit z, "
            f"log loss {curve.log_loss_before:.3f} before and {curve.log_loss_after:.3f} after"
        )
    return lines
