"""What a probe is, apart from its numbers: frozen records that its file keeps as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lmprobe_tl.checked_record import Record, require
from lmprobe_tl.heads import SEQUENCE_KINDS, HeadKind
from lmprobe_tl.reductions import MAX_WINDOW

Label: TypeAlias = bool | int | str
ThresholdUnit: TypeAlias = Literal["probability", "logit"]
ResidualBasis: TypeAlias = Literal["raw", "centered", "any"]
Normalization: TypeAlias = Literal["layernorm", "rmsnorm", "unknown"]

MAX_NAME_LENGTH = 200
MAX_READINGS = 2**14
# What stands for a pooling where a probe reduces its tokens itself.
OWN_POOLING = "sequence"
# Stand-ins for the infinite logits of the float32 probabilities 0 and 1: those of 2^-150 and 1 - 2^-25, where rounding to
# them begins.
LOWEST_LOGIT = -150 * math.log(2)
HIGHEST_LOGIT = math.log(2**25 - 1)
# Metrics of one threshold, which another makes wrong.
RECALL_METRIC = "recall_at_fpr"
LIVE_METRIC_PREFIX = "live_"
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Record):
    """The model that the probe was trained on; None = not recorded."""

    id: str | None = None
    revision: str | None = None
    config_fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord(Record):
    """How text became tokens in training; None = not recorded."""

    fingerprint: str | None = None
    prepend_bos: bool = True
    chat_template_fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class PoolingRecord(Record):
    """Names of the pooling strategies; whether they exist is checked where they are used, not here."""

    train: str = "last_token"
    inference: str = "last_token"
    include_bos: bool = False

    def _validate(self) -> None:
        require(self.train != "", "train", self.train, "the name of a pooling strategy")
        require(self.inference != "", "inference", self.inference, "the name of a pooling strategy")


@dataclass(frozen=True, kw_only=True)
class HeadRecord(Record):
    """The sizes of a head, see `lmprobe_tl.heads`; None for those that its kind does not have.

    n_hidden: units of an mlp. degree, rank: of a polynomial, which has `rank` terms of each order from 2 on. n_heads: of
    attention, multimax and rolling_attention; window: of the last, in tokens that count.
    """

    n_hidden: int | None = None
    degree: int | None = None
    rank: int | None = None
    n_heads: int | None = None
    window: int | None = None

    def _validate(self) -> None:
        for name, size in self.to_dict().items():
            require(size is None or size >= 1, name, size, "at least 1")


_SIZES: Mapping[HeadKind, tuple[str, ...]] = {
    "linear": (),
    "mlp": ("n_hidden",),
    "polynomial": ("degree", "rank"),
    "attention": ("n_heads",),
    "multimax": ("n_heads",),
    "rolling_attention": ("n_heads", "window"),
}


@dataclass(frozen=True, kw_only=True)
class ThresholdRecord(Record):
    """Flag when `score >= value`, both in `unit`. `fpr`, `delta` and `n` negatives say what `method` promised.

    rank: the threshold stands just above the rank-th smallest of the negatives' values of `statistic`. guarantee: what that
    promises for new text, in words.
    """

    value: float
    unit: ThresholdUnit = "probability"
    method: str = "manual"
    fpr: float | None = None
    delta: float | None = None
    n: int | None = None
    rank: int | None = None
    statistic: str | None = None
    guarantee: str | None = None

    def _validate(self) -> None:
        if self.unit == "probability":
            require(0 <= self.value <= 1, "value", self.value, "a probability from 0 to 1 (for a logit say unit='logit')")
        for name in ("fpr", "delta"):
            share = getattr(self, name)
            require(share is None or 0 <= share <= 1, name, share, "a number from 0 to 1")
        require(self.n is None or self.n >= 1, "n", self.n, "at least 1")
        in_range = self.rank is None or (self.n is not None and 1 <= self.rank <= self.n)
        require(in_range, "rank", self.rank, f"None, or a number from 1 to n, {self.n}")


@dataclass(frozen=True, kw_only=True)
class ProbabilityRecord(Record):
    """Calibrated probability of a sequence: `sigmoid(slope * z + intercept)`, z the `statistic` of the sequence as a logit.

    Fitted on `n_negative` and `n_positive` sequences, and true at their ratio. log_loss and brier: on these very sequences,
    of sigmoid(z) before and of the calibrated probability after.
    """

    slope: float
    intercept: float
    n_negative: int
    n_positive: int
    statistic: str
    log_loss_before: float
    log_loss_after: float
    brier_before: float
    brier_after: float

    def _validate(self) -> None:
        # a falling or flat curve would turn the ranking of the scores around, or lose it
        require(self.slope > 0, "slope", self.slope, "a number above 0")
        for name in ("n_negative", "n_positive"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("log_loss_before", "log_loss_after", "brier_before", "brier_after"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(Record):
    """What the probe learnt from. `class_counts` follows the labels' order; `n_examples` counts tokens if each was one."""

    data_sha256: str
    n_prompts: int
    n_examples: int
    class_counts: tuple[int, ...]
    classifier: str
    random_state: int | None = None

    def _validate(self) -> None:
        require(bool(_SHA256.fullmatch(self.data_sha256)), "data_sha256", self.data_sha256, "64 lower-case hex digits")
        require(self.n_prompts >= 1, "n_prompts", self.n_prompts, "at least 1")
        require(self.n_examples >= 1, "n_examples", self.n_examples, "at least 1")
        require(min(self.class_counts, default=0) >= 0, "class_counts", self.class_counts, "counts of 0 or more")


@dataclass(frozen=True, kw_only=True)
class MetricRecord(Record):
    """A measured value on `n` examples, with its interval [low, high] at `confidence` where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    n: int

    def _validate(self) -> None:
        interval = (self.low, self.high, self.confidence)
        require(interval.count(None) in (0, 3), "(low, high, confidence)", interval, "all three, or None for all three")
        if self.low is not None and self.high is not None and self.confidence is not None:
            require(self.low <= self.high, "low", self.low, f"at most high, {self.high}")
            require(0 < self.confidence < 1, "confidence", self.confidence, "a number between 0 and 1, such as 0.95")
        require(self.n >= 1, "n", self.n, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ProbeSpec(Record):
    """What a probe reads, how its scores are meant, and where it comes from.

    The scores of several hook points come from their activations concatenated in the order of `hook_points`. A probe with
    two labels is binary: `labels[1]` is the positive class. `n_layers` counts the model's layers, not the probe's.
    `residual_basis` says which residual stream the direction fits, see `ProbeWeights`. None = not recorded.
    """

    name: str
    hook_points: tuple[str, ...]
    d_model: int
    n_layers: int | None = None
    kind: HeadKind = "linear"
    head: HeadRecord = field(default_factory=HeadRecord)
    description: str = ""
    labels: tuple[Label, ...] = (0, 1)
    model: ModelRecord = field(default_factory=ModelRecord)
    tokenizer: TokenizerRecord = field(default_factory=TokenizerRecord)
    residual_basis: ResidualBasis = "raw"
    normalization: Normalization = "unknown"
    pooling: PoolingRecord = field(default_factory=PoolingRecord)
    threshold: ThresholdRecord | None = None
    probability_calibration: ProbabilityRecord | None = None
    training: TrainingRecord | None = None
    metrics: Mapping[str, MetricRecord] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None

    @property
    def n_classes(self) -> int:
        return len(self.labels)

    @property
    def n_outputs(self) -> int:
        """Logits per position: one for a binary probe, else one a class."""
        return 1 if self.n_classes == 2 else self.n_classes

    @property
    def reduces_tokens(self) -> bool:
        """Whether the kind of probe makes one logit of all tokens itself, so that no pooling has a part in it."""
        return self.kind in SEQUENCE_KINDS

    @property
    def has_readout(self) -> bool:
        """Whether the readings pass through weights of the head's own."""
        return self.kind in ("mlp", "polynomial")

    @property
    def n_readings(self) -> int:
        """Numbers that are read off each token, the rows of the probe's direction."""
        head = self.head
        if self.kind == "mlp":
            return head.n_hidden or 0
        if self.kind == "polynomial":
            return 1 + ((head.degree or 1) - 1) * (head.rank or 0)
        if self.reduces_tokens:
            return (head.n_heads or 0) * (1 if self.kind == "multimax" else 2)
        return self.n_outputs

    def _validate_head(self) -> None:
        sizes = _SIZES[self.kind]
        for name, size in self.head.to_dict().items():
            expected = "a whole number, 1 or more" if name in sizes else f"None, since kind {self.kind!r} has none"
            require((size is not None) == (name in sizes), f"head.{name}", size, expected)
        require(self.n_readings <= MAX_READINGS, "head", self.head, f"at most {MAX_READINGS} readings a token")
        longest = MAX_WINDOW // max(1, self.n_readings)
        kept = f"at most {longest} tokens, since {self.n_readings} readings of each are kept for every row"
        require(self.head.window is None or self.head.window <= longest, "head.window", self.head.window, kept)
        if self.kind not in ("linear", "mlp"):
            require(self.n_classes == 2, "labels", self.labels, f"two labels, since kind {self.kind!r} has one logit")
        for side in ("train", "inference"):
            pooling, own = (
                getattr(self.pooling, side),
                f"{OWN_POOLING!r}, since kind {self.kind!r} reduces its tokens itself",
            )
            expected = own if self.reduces_tokens else f"the name of a pooling, since kind {self.kind!r} needs one"
            require((pooling == OWN_POOLING) == self.reduces_tokens, f"pooling.{side}", pooling, expected)

    def _validate(self) -> None:
        good_name = 1 <= len(self.name) <= MAX_NAME_LENGTH and CONTROL_CHARACTERS.search(self.name) is None
        require(good_name, "name", self.name, f"1 to {MAX_NAME_LENGTH} characters, none of them a control character")
        good_hooks = self.hook_points and "" not in self.hook_points and len(set(self.hook_points)) == len(self.hook_points)
        require(bool(good_hooks), "hook_points", self.hook_points, "one or more hook names, all different")
        require(self.d_model >= 1, "d_model", self.d_model, "at least 1")
        require(self.n_layers is None or self.n_layers >= 1, "n_layers", self.n_layers, "at least 1")
        # 0 == False and 1 == True in Python, so such a pair could not be told apart in a prediction
        good_labels = self.n_classes >= 2 and len(set(self.labels)) == self.n_classes
        require(good_labels, "labels", self.labels, "two or more labels, no two of them equal")
        self._validate_head()
        one_score = self.threshold is None or self.n_classes == 2
        several = f"None, since {self.n_classes} classes give more than one score"
        require(one_score, "threshold", self.threshold, several)
        one_score = self.probability_calibration is None or self.n_classes == 2
        require(one_score, "probability_calibration", self.probability_calibration, several)
        if self.training is not None:
            counts = self.training.class_counts
            require(len(counts) == self.n_classes, "training.class_counts", counts, f"{self.n_classes} counts, one a label")


def without_threshold_metrics(metrics: Mapping[str, MetricRecord]) -> dict[str, MetricRecord]:
    """The metrics that stay true under another threshold."""
    return {name: one for name, one in metrics.items() if name != RECALL_METRIC and not name.startswith(LIVE_METRIC_PREFIX)}
