"""Calibrate a probe on text: run it over sequences as it runs live, and set its threshold on their running maxima."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.activation_source import Engine
from lmprobe_tl.calibration import (
    Calibration,
    calibrate_threshold,
    check_recall,
    fit_probabilities,
    recall_at_threshold,
    threshold_rank,
)
from lmprobe_tl.errors import CalibrationError, CalibrationWarning, InputError
from lmprobe_tl.given_probes import as_weights
from lmprobe_tl.live.maxima import maxima_source
from lmprobe_tl.probe_settings import rows_of
from lmprobe_tl.probe_spec import ThresholdRecord
from lmprobe_tl.scoring import live_unit
from lmprobe_tl.tokens import Prompt, Truncation, check_prompts, row_digest
from lmprobe_tl.weights import ProbeWeights

# How far a running maximum as a logit moves with what computes it, by the model's dtype: at least, and relative to its size.
# Of float32 between ways of batching. Of bfloat16 what `python -m benchmarks.vllm_precision` finds between a compiled graph
# and none, and twice its last digit; float16 rounds eight times finer.
ROUNDING = {"float64": (1e-5, 1e-5), "float32": (1e-5, 1e-5), "float16": (0.0125, 2**-10), "bfloat16": (0.1, 2**-7)}
_FLOAT32 = ROUNDING["float32"]


def calibrate_probe(
    model: Any,
    probe: Any,
    negative_prompts: Sequence[Prompt],
    fpr: float = 0.01,
    delta: float = 0.05,
    *,
    engine: Engine | None = None,
    method: str = "pac",
    positive_prompts: Sequence[Prompt] | None = None,
    min_recall: float | None = None,
    probability: bool = False,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
    strict: bool = False,
) -> ProbeWeights:
    """The probe with a threshold for live use, set on whole negative sequences.

    probe: as in `attach_probes`, one. negative_prompts: text without what the probe looks for; independent of each other
    and of the training data, and of the kind and length that the live monitor will see, since a running maximum only grows.
    method: what is promised of new text from the same source (`calibration` has the formulas):

    - 'pac': with a confidence of 1 - delta, the share of sequences with a false alarm is at most fpr.
    - 'conformal': on average over calibrations it is at most fpr; about half of them exceed it.
    - 'empirical': it is at most fpr on these prompts; of new text nothing is promised.

    positive_prompts: their recall at the threshold becomes the metric 'recall_at_fpr'. min_recall: an error where that is
    lower. probability: fit `ProbeWeights.calibrated_probabilities` too, which moves neither threshold nor alarms.
    prepend_bos: None does as the probe file says.
    engine: 'vllm' takes the scores from a vLLM engine, whose dtype and kernels decide their last digits, in bfloat16 the
    third: a threshold fits best where it was set. model is then a name, a folder, or a running `lmprobe_tl.vllm.ProbedLLM`,
    set up as it will serve, which has its own probes again afterwards. The record's `statistic` says so.

    Where the model computes in bfloat16 or float16, on either engine, the guarantee also says how far rounding moves a
    score, and how many of the sequences lie that near to the threshold.

    The threshold is in `live_unit(probe)`. Raises CalibrationError for too few sequences before the model runs, for a
    threshold that no score can reach, and for a recall below the target.

    >>> calibrate_probe(model, "deceit.safetensors", harmless).save("deceit.safetensors")  # doctest: +SKIP
    """
    weights, goal = as_weights(probe), CalibrationGoal(fpr, delta, method, min_recall, probability)
    goal.check(weights, negative_prompts, positive_prompts)
    calibration = measure_calibration(
        model,
        weights,
        goal,
        negative_prompts,
        positive_prompts,
        engine=engine,
        max_tokens_per_batch=max_tokens_per_batch,
        batch_size=batch_size,
        prepend_bos=prepend_bos,
        max_length=max_length,
        truncation=truncation,
        progress=progress,
        strict=strict,
    )
    return weights.with_calibration(calibration)


@dataclass(frozen=True)
class CalibrationGoal:
    """What a calibration is to reach, as the arguments of `calibrate_probe`."""

    fpr: float
    delta: float
    method: str
    min_recall: float | None
    probability: bool

    def check(self, weights: ProbeWeights, negatives: Sequence[Prompt], positives: Sequence[Prompt] | None) -> None:
        """Raise what can be known before a model runs."""
        live_unit(weights)
        threshold_rank(len(check_prompts(negatives)), self.fpr, self.delta, self.method)
        if not isinstance(self.probability, bool):
            raise InputError(f"probability is {self.probability!r}; expected True (fit a probability curve too) or False.")
        wanted = self.min_recall
        is_number = isinstance(wanted, (int, float, np.number)) and not isinstance(wanted, bool)
        if wanted is not None and not (is_number and 0 < wanted <= 1):
            raise InputError(f"min_recall is {wanted!r}; expected a share above 0 and at most 1, such as 0.9, or None.")
        if positives is not None:
            check_prompts(positives)
        elif wanted is not None or self.probability:
            wish = "probability=True" if wanted is None else f"min_recall={wanted!r}"
            raise InputError(f"{wish} needs positive_prompts: text with what the probe looks for.")


def measure_calibration(
    model: Any,
    weights: ProbeWeights,
    goal: CalibrationGoal,
    negative_prompts: Sequence[Prompt],
    positive_prompts: Sequence[Prompt] | None,
    *,
    engine: Engine | None = None,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    strict: bool = False,
    **tokenizing: Any,
) -> Calibration:
    """What `calibrate_probe` puts into a probe, for a goal that was checked; tokenizing: as in `tokenize_prompts`."""
    batching: dict[str, Any] = {"max_tokens_per_batch": max_tokens_per_batch, "batch_size": batch_size}
    with maxima_source(model, weights, engine, strict=strict, **batching) as source:
        negatives = source.of(negative_prompts, progress, **tokenizing)
        positives = None if positive_prompts is None else source.of(positive_prompts, progress, **tokenizing)
    unit, statistic = live_unit(weights), statistic_of(weights) + source.remark
    threshold = calibrate_threshold(negatives, goal.fpr, goal.delta, method=goal.method, unit=unit, statistic=statistic)
    margin = rounding_of(threshold, source.dtype)
    _warn_of_ties(negatives, threshold, margin)
    threshold = _with_rounding(threshold, negatives, margin, source.dtype)
    if positives is None:
        return Calibration(threshold)
    recall = recall_at_threshold(positives, threshold)
    if goal.min_recall is not None:
        check_recall(recall, goal.min_recall, negatives, positives, threshold)
    curve = fit_probabilities(negatives, positives, unit=unit, statistic=statistic) if goal.probability else None
    return Calibration(threshold, recall, curve)


def calibration_tokens(
    probe: Any, goal: CalibrationGoal, negatives: Sequence[Prompt], positives: Sequence[Prompt] | None
) -> tuple[Any, Any]:
    """The prompts as token ids that a fitted `Probe` sees, None for those that are None.

    CalibrationError for prompts that it was trained on, where the goal promises anything of new text.
    """
    tokens: list[Any] = []
    for name, prompts in (("negative_prompts", negatives), ("positive_prompts", positives)):
        rows = None if prompts is None else rows_of(probe, probe.model_, check_prompts(prompts))
        if rows is not None and goal.method != "empirical":
            check_unseen(rows, probe._trained_on, name)
        tokens.append(None if rows is None else [np.array(row, dtype=np.int64) for row in rows])
    return tokens[0], tokens[1]


def rounding_of(threshold: ThresholdRecord, dtype: str) -> float:
    """How far other batches and kernels move a score at the threshold, in its unit, where the model computes in this
    dtype."""
    least, relative = ROUNDING.get(dtype, max(ROUNDING.values()))
    if threshold.unit == "logit":
        return max(least, relative * abs(threshold.value))
    nearest = _FLOAT32[0]
    share = min(max(threshold.value, nearest), 1 - nearest)
    z = math.log(share / (1 - share))
    return max(nearest, max(least, relative * abs(z)) * share * (1 - share))


def _with_rounding(threshold: ThresholdRecord, negatives: NDArray[np.float32], margin: float, dtype: str) -> ThresholdRecord:
    """In a small dtype the guarantee says what rounding does to it: it is of scores as they were computed here."""
    if ROUNDING.get(dtype) == _FLOAT32:
        return threshold
    near = int((np.abs(negatives - threshold.value) <= margin).sum())
    remark = (
        f"That is of scores as computed here: in {dtype}, another device, another engine or other batches may move a score "
        f"by about {margin:.2g}, and {near} of the {len(negatives)} calibration sequences lie that near to the threshold."
    )
    return replace(threshold, guarantee=f"{threshold.guarantee} {remark}")


def _warn_of_ties(negatives: NDArray[np.float32], threshold: ThresholdRecord, margin: float) -> None:
    """Scores move in their last digits with batch, cache and hardware. Where many sequences share one running maximum, as
    that of a first token or of a template that all begin with, they could all cross together."""
    assert threshold.rank is not None and threshold.fpr is not None
    near = int((negatives >= threshold.value - margin).sum())
    if near > max(threshold.fpr * len(negatives), len(negatives) - threshold.rank + 1):
        warnings.warn(
            f"{near} of {len(negatives)} negative sequences have a running maximum of {threshold.value:g} or more, up to "
            f"rounding ({margin:g}), and with other batches or hardware all of these may raise alarms. Do they begin alike? "
            "Then use an inference pooling that looks beyond the beginning, or a lower fpr.",
            CalibrationWarning,
            stacklevel=4,
        )


def check_unseen(rows: Sequence[Sequence[int]], trained_on: Collection[bytes], name: str) -> None:
    """CalibrationError naming the rows of token ids that a probe was trained on, by their digests."""
    known = [index for index, row in enumerate(rows) if row_digest(row) in trained_on]
    if known:
        raise CalibrationError(
            f"{len(known)} of the {len(rows)} {name} were trained on, the first at index {known[0]}: their scores say "
            "nothing of new text. Leave them out, or take method='empirical', which promises nothing."
        )


def score_settings(weights: ProbeWeights) -> dict[str, Any]:
    """What shapes a live score, apart from direction and intercept."""
    pooling = weights.spec.pooling
    return {
        "inference_pooling": pooling.inference,
        "include_bos": pooling.include_bos,
        "prepend_bos": weights.spec.tokenizer.prepend_bos,
    }


def statistic_of(weights: ProbeWeights) -> str:
    """The number that a threshold is set on, in words."""
    spec, pooling = weights.spec, weights.spec.pooling
    what = f"the {spec.kind.replace('_', ' ')} logit" if spec.reduces_tokens else pooling.inference
    return f"running maximum of {what}" + (", BOS included" if pooling.include_bos else "")
