"""What an evaluation found, as frozen records that are saved as JSON and read back: all that a table or a plot needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from lmprobe_tl.checked_record import Record, require, shown
from lmprobe_tl.errors import InputError, ProbeFileError
from lmprobe_tl.files import canonical_json, write_atomically
from lmprobe_tl.measures import Difference, Measure, metric_records
from lmprobe_tl.probe_spec import Label, MetricRecord

FORMAT_VERSION = 1
Conclusion: TypeAlias = Literal["leakage", "does not beat its controls", "beats its controls", "undecided"]


@dataclass(frozen=True, kw_only=True)
class SavedRecord(Record):
    """A record with a file of its own. `format_version` says how it is written."""

    format_version: int = FORMAT_VERSION

    def _validate(self) -> None:
        require(self.format_version == FORMAT_VERSION, "format_version", self.format_version, str(FORMAT_VERSION))

    def to_json(self) -> str:
        """One JSON object, which `from_json` reads back to an equal record."""
        return canonical_json({"kind": type(self).__name__, **self.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that `to_json` wrote. InputError for anything else, which says what is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"no {cls.__name__}: the text is no JSON ({error}).") from error
        if not isinstance(data, dict) or data.get("kind") != cls.__name__:
            kind = shown(data.get("kind")) if isinstance(data, dict) else f"a {type(data).__name__}"
            raise InputError(f"no {cls.__name__}: its kind is {kind}; expected what {cls.__name__}.to_json wrote.")
        try:
            return cls.from_dict({name: value for name, value in data.items() if name != "kind"})
        except ProbeFileError as error:
            raise InputError(f"no {cls.__name__}: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the JSON to a file, whole or not at all."""
        path = Path(path)
        write_atomically(path, self.to_json().encode() + b"\n")
        return path


@dataclass(frozen=True, kw_only=True)
class ControlReport(Record):
    """A control on the judged examples. differences: the probe's metric less the control's, on the same resamples.

    draws: AUROC of each draw of a random control, whose `metrics` are mean AUROC and accuracy over the draws.
    above_chance: of 8 and more shuffles, mean AUROC less 0.5 with a 99 % interval over the draws. scores: as in
    `ExampleRecord`, where there is a single draw.
    """

    metrics: Mapping[str, Measure]
    differences: Mapping[str, Difference]
    draws: tuple[float, ...] = ()
    above_chance: Difference | None = None
    scores: tuple[tuple[float, ...], ...] = ()
    note: str = ""

    @property
    def is_beaten(self) -> bool:
        """Whether the probe's AUROC is above the control's by the whole interval of the difference."""
        return "auroc" in self.differences and self.differences["auroc"].is_above_zero


@dataclass(frozen=True, kw_only=True)
class GroupReport(Record):
    """The probe on the prompts of one group."""

    n_prompts: int
    n_examples: int
    metrics: Mapping[str, Measure]


@dataclass(frozen=True, kw_only=True)
class ShiftPart(Record):
    """The probe on one set of prompts. drops: the metric on its own held-out part less that here, with an interval."""

    n_prompts: int
    n_examples: int
    metrics: Mapping[str, Measure]
    drops: Mapping[str, Difference]


@dataclass(frozen=True, kw_only=True)
class ShiftReport(SavedRecord):
    """A probe on held-out prompts of the kind that it was trained on, and on others. shifted: by name."""

    probe: str
    held_out: ShiftPart
    shifted: Mapping[str, ShiftPart]
    level: str
    confidence: float
    n_bootstrap: int
    random_state: int | None

    def table(self) -> str:
        """Text of at most 80 columns."""
        from lmprobe_tl.report_table import shift_table

        return shift_table(self)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True, kw_only=True)
class ExampleRecord(Record):
    """What was judged, example by example, in the order of the prompts.

    labels: index of each one's class. scores: one row for two classes (of the second), else one a class, [n_outputs][n];
    probabilities: likewise. prompts: index of each one's prompt. groups, n_tokens: of each prompt, the latter how many of
    its tokens count. texts, token_scores: of each prompt its text in pieces, special tokens too, and the logit of each (two
    classes), where they were to be kept.
    """

    labels: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    prompts: tuple[int, ...]
    groups: tuple[str, ...] | None = None
    n_tokens: tuple[int, ...] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    token_scores: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeReport(SavedRecord):
    """A probe on labelled prompts: metrics, controls, groups, and in plain words what follows.

    class_counts, n_examples: of prompts, or of tokens where `level` is 'token'. left_out: why controls did not run, by name.
    n_trained_on: how many of the judged prompts are training prompts too; None where these are not known.
    worst_group: that with the lowest `worst_by`: AUROC, or accuracy where no two groups have an AUROC; None where all are
    equal.
    conclusion: what `verdict` says, in two or three words. notes: what else a reader should know.
    """

    probe: str
    model: str | None
    hook_points: tuple[str, ...]
    pooling: str
    classes: tuple[Label, ...]
    level: Literal["prompt", "token"]
    n_prompts: int
    n_examples: int
    class_counts: tuple[int, ...]
    n_train: int | None
    n_trained_on: int | None
    metrics: Mapping[str, Measure]
    controls: Mapping[str, ControlReport]
    left_out: Mapping[str, str]
    groups: Mapping[str, GroupReport]
    worst_group: str | None
    worst_by: str | None
    shift: ShiftReport | None = None
    conclusion: Conclusion
    verdict: str
    notes: tuple[str, ...]
    n_bootstrap: int
    n_draws: int
    confidence: float
    random_state: int | None
    examples: ExampleRecord

    def table(self) -> str:
        """Text of at most 80 columns: metrics, controls, groups, shift and verdict."""
        from lmprobe_tl.report_table import report_table

        return report_table(self)

    def records(self) -> dict[str, MetricRecord]:
        """The metrics as a probe file keeps them, for `weights.with_metrics({**weights.spec.metrics, **records})`."""
        return metric_records(self.metrics, self.n_examples, self.confidence, self.level)

    def with_shift(self, shift: ShiftReport) -> ProbeReport:
        """A copy that has the shift, too."""
        return replace(self, shift=shift)

    def without_texts(self) -> ProbeReport:
        """A copy that holds no prompts: what they say stays with whoever made the report."""
        return replace(self, examples=replace(self.examples, texts=None, token_scores=None))

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        auroc = self.metrics["auroc"].value
        shown = "none" if auroc is None else f"{auroc:.3f}"
        return f"ProbeReport({self.probe!r}, {self.n_prompts} prompts, auroc={shown}, {self.conclusion})"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": self.table()}
