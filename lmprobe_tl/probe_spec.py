"""What a probe is, apart from its numbers: frozen records that turn into JSON and back without loss.

The annotations are the schema. Every record checks its fields against them when it is made, whether by hand or from a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Self, TypeAlias, Union, get_args, get_origin, get_type_hints

from lmprobe_tl.errors import InputError, ProbeFileError

Label: TypeAlias = bool | int | str
ThresholdUnit: TypeAlias = Literal["probability", "logit"]
ResidualBasis: TypeAlias = Literal["raw", "centered", "any"]
Normalization: TypeAlias = Literal["layernorm", "rmsnorm", "unknown"]

MAX_NAME_LENGTH = 200
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # lone surrogates: JSON can spell them, no terminal or file can hold them


@dataclass(frozen=True)
class Record:
    """Base of the records: checks fields when made (InputError), converts to and from JSON-able dictionaries."""

    def __post_init__(self) -> None:
        for name, declared in _schema(type(self)).items():
            object.__setattr__(self, name, _checked(getattr(self, name), declared, name))
        self._validate()

    def _validate(self) -> None:
        """Check what a type cannot say; raises InputError."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)  # the read-only mappings inside have no pickle or copy of their own

    def to_dict(self) -> dict[str, Any]:
        """The record as dictionaries, lists, text, numbers, booleans and None."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record that `to_dict` wrote. Unknown or missing keys and wrong values are a ProbeFileError that names them."""
        try:
            return _from_mapping(cls, data)
        except InputError as error:
            raise ProbeFileError(str(error)) from error


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
        _require(self.train != "", "train", self.train, "the name of a pooling strategy")
        _require(self.inference != "", "inference", self.inference, "the name of a pooling strategy")


@dataclass(frozen=True, kw_only=True)
class ThresholdRecord(Record):
    """Flag when `score >= value`, both in `unit`. `fpr`, `delta` and `n` negatives say what `method` promised."""

    value: float
    unit: ThresholdUnit = "probability"
    method: str = "manual"
    fpr: float | None = None
    delta: float | None = None
    n: int | None = None

    def _validate(self) -> None:
        if self.unit == "probability":
            _require(0 <= self.value <= 1, "value", self.value, "a probability from 0 to 1 (for a logit say unit='logit')")
        for name in ("fpr", "delta"):
            share = getattr(self, name)
            _require(share is None or 0 <= share <= 1, name, share, "a number from 0 to 1")
        _require(self.n is None or self.n >= 1, "n", self.n, "at least 1")


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
        _require(bool(_SHA256.fullmatch(self.data_sha256)), "data_sha256", self.data_sha256, "64 lower-case hex digits")
        _require(self.n_prompts >= 1, "n_prompts", self.n_prompts, "at least 1")
        _require(self.n_examples >= 1, "n_examples", self.n_examples, "at least 1")
        _require(min(self.class_counts, default=0) >= 0, "class_counts", self.class_counts, "counts of 0 or more")


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
        _require(interval.count(None) in (0, 3), "(low, high, confidence)", interval, "all three, or None for all three")
        if self.low is not None and self.high is not None and self.confidence is not None:
            _require(self.low <= self.high, "low", self.low, f"at most high, {self.high}")
            _require(0 < self.confidence < 1, "confidence", self.confidence, "a number between 0 and 1, such as 0.95")
        _require(self.n >= 1, "n", self.n, "at least 1")


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
    kind: Literal["linear"] = "linear"
    description: str = ""
    labels: tuple[Label, ...] = (0, 1)
    model: ModelRecord = field(default_factory=ModelRecord)
    tokenizer: TokenizerRecord = field(default_factory=TokenizerRecord)
    residual_basis: ResidualBasis = "raw"
    normalization: Normalization = "unknown"
    pooling: PoolingRecord = field(default_factory=PoolingRecord)
    threshold: ThresholdRecord | None = None
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

    def _validate(self) -> None:
        good_name = 1 <= len(self.name) <= MAX_NAME_LENGTH and CONTROL_CHARACTERS.search(self.name) is None
        _require(good_name, "name", self.name, f"1 to {MAX_NAME_LENGTH} characters, none of them a control character")
        good_hooks = self.hook_points and "" not in self.hook_points and len(set(self.hook_points)) == len(self.hook_points)
        _require(bool(good_hooks), "hook_points", self.hook_points, "one or more hook names, all different")
        _require(self.d_model >= 1, "d_model", self.d_model, "at least 1")
        _require(self.n_layers is None or self.n_layers >= 1, "n_layers", self.n_layers, "at least 1")
        # 0 == False and 1 == True in Python, so such a pair could not be told apart in a prediction
        good_labels = self.n_classes >= 2 and len(set(self.labels)) == self.n_classes
        _require(good_labels, "labels", self.labels, "two or more labels, no two of them equal")
        one_score = self.threshold is None or self.n_classes == 2
        _require(one_score, "threshold", self.threshold, f"None, since {self.n_classes} classes give more than one score")
        if self.training is not None:
            counts = self.training.class_counts
            _require(len(counts) == self.n_classes, "training.class_counts", counts, f"{self.n_classes} counts, one a label")


def _require(satisfied: bool, key: str, value: object, expected: str) -> None:
    if not satisfied:
        raise InputError(f"{key} is {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """The value's repr, cut short: it may come from a file that means harm."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _schema(record: type[Record]) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {item.name: hints[item.name] for item in fields(record)}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _from_mapping(record: Any, data: Any) -> Any:
    if not isinstance(data, Mapping):
        raise InputError(f"{record.__name__} is {shown(data)}; expected a dictionary.")
    keys = _schema(record)
    for key in data:
        if key not in keys:
            raise InputError(f"{shown(key)} (value {shown(data[key])}) is an unknown key; expected {', '.join(keys)}.")
    for key in keys:
        if key not in data:
            raise InputError(f"{key} is missing; expected the keys {', '.join(keys)}.")
    return record(**data)


def _checked(value: Any, declared: Any, where: str) -> Any:
    """The value in the declared type, lists made tuples and mappings read-only. InputError names `where` it stands."""
    origin = get_origin(declared)
    if origin is Literal:
        options = get_args(declared)
        _require(isinstance(value, str) and value in options, where, value, " or ".join(map(repr, options)))
        return value
    if origin in (Union, UnionType):
        return _checked_union(value, get_args(declared), where)
    if origin is tuple:
        _require(isinstance(value, (tuple, list)), where, value, "a list")
        return tuple(_checked(item, get_args(declared)[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return _checked_mapping(value, get_args(declared)[1], where)
    if issubclass(declared, Record):
        return value if isinstance(value, declared) else _checked_record(value, declared, where)
    return _checked_scalar(value, declared, where)


def _checked_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    if value is None and NoneType in members:
        return None
    options = [member for member in members if member is not NoneType]
    if len(options) == 1:
        return _checked(value, options[0], where)
    # the exact type: True is an int for isinstance, but label True is not label 1
    _require(type(value) in options, where, value, " or ".join(option.__name__ for option in options))
    return _checked(value, type(value), where)


def _checked_mapping(value: Any, declared: Any, where: str) -> Mapping[str, Any]:
    _require(isinstance(value, Mapping), where, value, "a dictionary")
    keys = sorted(_checked_scalar(key, str, f"a key of {where}") for key in value)
    return MappingProxyType({key: _checked(value[key], declared, f"{where}[{shown(key)}]") for key in keys})


def _checked_record(value: Any, declared: type[Record], where: str) -> Record:
    _require(isinstance(value, Mapping), where, value, f"a {declared.__name__}")
    try:
        return _from_mapping(declared, value)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error


def _checked_scalar(value: Any, declared: type, where: str) -> Any:
    if declared is bool:
        _require(isinstance(value, bool), where, value, "True or False")
        return value
    if declared is int:
        whole = isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63
        _require(whole, where, value, "a whole number of at most 64 bits")
        return int(value)
    if declared is float:
        try:
            number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        except OverflowError:  # an integer of more than 308 digits
            number = math.nan
        _require(math.isfinite(number), where, value, "a finite number")
        return number
    _require(isinstance(value, str) and _HALF_CHARACTERS.search(value) is None, where, value, "text")
    return str(value)
