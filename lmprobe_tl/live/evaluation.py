"""How good live alarms are: recall, false alarms, how early they come, and how many tokens a stop would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.calibration import clopper_pearson
from lmprobe_tl.errors import InputError
from lmprobe_tl.given_probes import as_probes, recorded_prepend_bos
from lmprobe_tl.hook_points import load_model
from lmprobe_tl.labels import check_labels
from lmprobe_tl.live.sequences import LiveSequence, continued_texts, rows_to_continue, whole_texts
from lmprobe_tl.live.watches import threshold_of
from lmprobe_tl.metrics import Interval, auroc, bootstrap_interval
from lmprobe_tl.probe_spec import LIVE_METRIC_PREFIX, MetricRecord
from lmprobe_tl.scoring import live_unit, prompt_rows
from lmprobe_tl.tokens import Prompt, Truncation, check_prompts
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles (linearly interpolated) of `n` values."""

    low: float
    median: float
    high: float
    n: int


@dataclass(frozen=True)
class TokenShare:
    """Tokens that a stop at the crossing would have left out, of all generated tokens of the same sequences."""

    saved: int
    generated: int

    @property
    def share(self) -> float:
        return self.saved / self.generated if self.generated else 0.0


@dataclass(frozen=True)
class LiveEvaluation:
    """A probe's live alarms on labelled sequences, at its own threshold.

    recall: the share of positive sequences with an alarm anywhere; false_positive_rate: of negative ones; both with
    Clopper-Pearson intervals. auroc: of the running maxima, whatever the threshold, with a bootstrap interval.
    lead: of detected positives, in tokens, see `LiveSequence.lead`; None where none was detected. tokens_saved: on all
    positives, the missed ones included. tokens_cut: the same on all negatives, where a stop would be a mistake.
    sequences and positives, whether each is positive: one a prompt, in the order of the prompts.
    """

    probe: str
    threshold: float
    unit: str
    max_new_tokens: int
    n_positive: int
    n_negative: int
    recall: Interval
    false_positive_rate: Interval
    auroc: Interval
    lead: Quartiles | None
    tokens_saved: TokenShare
    tokens_cut: TokenShare
    sequences: tuple[LiveSequence, ...]
    positives: tuple[bool, ...]

    @property
    def leads(self) -> tuple[int, ...]:
        """Detection lead of each detected positive, in the order of the prompts."""
        pairs = zip(self.sequences, self.positives, strict=True)
        return tuple(one.lead for one, positive in pairs if positive and one.lead is not None)

    @property
    def crossings(self) -> tuple[int | None, ...]:
        """Position of the first crossing in each sequence, in the order of the prompts; None without one."""
        return tuple(one.crossing for one in self.sequences)

    def records(self) -> dict[str, MetricRecord]:
        """The metrics as a probe file keeps them, for `weights.with_metrics({**weights.spec.metrics, **records})`."""
        found = {name: _record(getattr(self, name)) for name in ("recall", "false_positive_rate", "auroc")}
        found["tokens_saved"] = MetricRecord(value=self.tokens_saved.share, n=self.n_positive)
        found["tokens_cut"] = MetricRecord(value=self.tokens_cut.share, n=self.n_negative)
        if self.lead is not None:
            found["lead_median"] = MetricRecord(value=self.lead.median, n=self.lead.n)
        return {LIVE_METRIC_PREFIX + name: record for name, record in found.items()}


def evaluate_live(
    model: Any,
    prompts: Sequence[Prompt],
    labels: Any,
    probes: Any,
    *,
    max_new_tokens: int = 0,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    random_state: int | None = 0,
    progress: bool | None = None,
    strict: bool = False,
) -> dict[str, LiveEvaluation]:
    """Live alarms of probes on labelled prompts, by probe name, each at its own threshold (default: a probability of 0.5).

    labels: one a prompt, the probe's own two labels, or else 1 for positive and 0 for negative; both must occur.
    max_new_tokens: 0 takes the prompts as whole texts. More: each is continued by `monitored_generate` without a stop, and
    prompt and continuation are judged by what a live monitor sees. The last sampled token and EOS, which never enter the
    model, get no score; they do count as generated tokens. Sampling follows torch's global seed; do_sample=False is greedy.
    probes and the rest: as in `score_prompts`; n_bootstrap, confidence, random_state: as in `bootstrap_interval`.

    Evaluate on other prompts than the threshold was calibrated on.

    >>> evaluate_live(model, texts, labels, "deceit.safetensors")["deceit"].recall  # doctest: +SKIP
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise InputError(
            f"max_new_tokens is {max_new_tokens!r}; expected 0 (whole texts) or a number of tokens to generate."
        )
    prompts = check_prompts(prompts)
    model, loaded = load_model(model), as_probes(probes)
    truths = {weights.name: _positives(weights, labels, len(prompts)) for weights in loaded}
    prepend = recorded_prepend_bos(loaded) if prepend_bos is None else prepend_bos
    texts: dict[str, Any] = {"prepend_bos": prepend, "max_length": max_length, "truncation": truncation}
    running: dict[str, Any] = {
        "max_tokens_per_batch": max_tokens_per_batch,
        "batch_size": batch_size,
        "progress": progress,
        "strict": strict,
    }
    if max_new_tokens:
        sampling = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        rows = rows_to_continue(model, prompts, max_new_tokens, **texts)
        seen = continued_texts(model, rows, loaded, max_new_tokens, sampling, **running)
    else:
        seen = whole_texts(model, prompt_rows(model, prompts, loaded, **texts), loaded, **running)
    bootstrap = {"n_bootstrap": n_bootstrap, "confidence": confidence, "random_state": random_state}
    return {
        weights.name: _evaluation(weights, truths[weights.name], seen[weights.name], max_new_tokens, bootstrap)
        for weights in loaded
    }


def _positives(weights: ProbeWeights, labels: Any, n_prompts: int) -> NDArray[np.bool_]:
    """Which prompts are positive, [n_prompts]."""
    live_unit(weights)  # two classes
    given = check_labels(labels, n_prompts).tolist()
    known: Sequence[Any] = weights.labels if set(given) <= set(weights.labels) else (0, 1)
    strange = [label for label in given if label not in known]
    if strange:
        raise InputError(
            f"labels holds {strange[0]!r}; expected those of probe {weights.name!r}, {list(weights.labels)}, or 0 and 1."
        )
    positive = np.array([label == known[1] for label in given])
    if positive.all() or not positive.any():
        raise InputError(f"all labels are {given[0]!r}; an evaluation needs positive and negative prompts.")
    return positive


def _evaluation(
    weights: ProbeWeights,
    positive: NDArray[np.bool_],
    seen: list[LiveSequence],
    max_new_tokens: int,
    bootstrap: dict[str, Any],
) -> LiveEvaluation:
    positives = [one for one, truth in zip(seen, positive, strict=True) if truth]
    negatives = [one for one, truth in zip(seen, positive, strict=True) if not truth]
    threshold, unit = threshold_of(weights)
    leads = [one.lead for one in positives if one.lead is not None]
    return LiveEvaluation(
        probe=weights.name,
        threshold=threshold,
        unit=unit,
        max_new_tokens=max_new_tokens,
        n_positive=len(positives),
        n_negative=len(negatives),
        recall=_share_with_alarm(positives, bootstrap["confidence"]),
        false_positive_rate=_share_with_alarm(negatives, bootstrap["confidence"]),
        auroc=bootstrap_interval(auroc, positive.astype(int), [one.maximum for one in seen], **bootstrap),
        lead=_quartiles(leads) if leads else None,
        tokens_saved=_token_share(positives),
        tokens_cut=_token_share(negatives),
        sequences=tuple(seen),
        positives=tuple(positive.tolist()),
    )


def _quartiles(values: list[int]) -> Quartiles:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Quartiles(low, median, high, len(values))


def _share_with_alarm(sequences: list[LiveSequence], confidence: float) -> Interval:
    hits = sum(one.crossing is not None for one in sequences)
    low, high = clopper_pearson(hits, len(sequences), confidence)
    return Interval(hits / len(sequences), low, high, confidence, len(sequences))


def _token_share(sequences: list[LiveSequence]) -> TokenShare:
    return TokenShare(sum(one.saved for one in sequences), sum(one.n_generated for one in sequences))


def _record(interval: Interval) -> MetricRecord:
    confidence = None if interval.low is None else interval.confidence
    return MetricRecord(value=interval.value, low=interval.low, high=interval.high, confidence=confidence, n=interval.n)
