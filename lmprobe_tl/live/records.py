"""What live scoring tells: frozen records of crossings and of scored tokens, and the cascade that a user asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lmprobe_tl.errors import InputError
from lmprobe_tl.probe_spec import ThresholdRecord, ThresholdUnit

Verdict: TypeAlias = Literal["positive", "deferred", "confirmed", "cleared"]


@dataclass(frozen=True)
class Alarm:
    """The first position of a row at which a probe's running score reached a threshold.

    position: index of the token in the row, pads not counted. logit: of that token alone. score: the running score, and
    threshold: both in the threshold's `unit`, 'probability' or 'logit'. run: index of the generation in `monitor.runs`.
    verdict: 'positive' at the probe's threshold; in a cascade also 'deferred' at its low threshold, which its judge turns
    into 'confirmed' or 'cleared'.
    """

    probe: str
    row: int
    position: int
    token_id: int
    logit: float
    score: float
    threshold: float
    unit: str
    verdict: Verdict = "positive"
    run: int = 0

    @property
    def is_positive(self) -> bool:
        return self.verdict in ("positive", "confirmed")

    def judged(self, positive: bool) -> Alarm:
        """The same crossing after a judge has looked at it."""
        return replace(self, verdict="confirmed" if positive else "cleared")


def first_alarms(events: Sequence[Alarm]) -> dict[int, tuple[Alarm, ...]]:
    """By row that has one: the first alarm of each probe, in the order of the events."""
    found: dict[int, dict[str, Alarm]] = {}
    for event in events:
        if event.is_positive:
            found.setdefault(event.row, {}).setdefault(event.probe, event)
    return {row: tuple(by_probe.values()) for row, by_probe in found.items()}


def verdicts_of(events: Sequence[Alarm], probe: str) -> dict[int, Verdict]:
    """By row that crossed anything: what the events say of it. An alarm is the last word."""
    verdicts: dict[int, Verdict] = {}
    for event in events:
        if event.probe == probe and verdicts.get(event.row) not in ("positive", "confirmed"):
            verdicts[event.row] = event.verdict
    return verdicts


OnCrossing = Callable[[Alarm], Any]
Judge = Callable[[Alarm, Tensor], bool]


@dataclass(frozen=True)
class Escalate:
    """A cascade of two thresholds on one probe: below `low` a row is clear, at `high` it is positive, between them deferred.

    low, high: in `unit`; high=None takes the probe's own threshold. judge: asked once a row, when its running score first
    reaches `low`, as judge(alarm, tokens) with the row's token ids so far (1-D, on the CPU): a larger probe, another model,
    a person. True confirms the alarm, with all that follows from one; False clears it, and from there on `high` alone
    counts.
    """

    low: float
    high: float | None = None
    unit: ThresholdUnit = "probability"
    judge: Judge | None = None

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if value is not None:
                try:
                    ThresholdRecord(value=value, unit=self.unit)
                except InputError as error:
                    raise InputError(f"Escalate: {name}: {error}") from error
        if self.high is not None and not self.low < self.high:
            raise InputError(f"Escalate: low is {self.low!r} and high {self.high!r}; expected low < high.")
        if self.judge is not None and not callable(self.judge):
            raise InputError(f"Escalate: judge is {self.judge!r}; expected a function of an Alarm and token ids, or None.")


@dataclass(frozen=True)
class TokenEvent:
    """One scored token.

    position: index in the row, pads not counted. generated: False for the prompt's tokens. logits, running: by name of each
    binary probe; `running` is None before the first position that counts. alarms: of the probes that first reached their
    threshold here.
    """

    row: int
    position: int
    token_id: int
    generated: bool
    logits: dict[str, float]
    running: dict[str, float | None]
    alarms: tuple[Alarm, ...]


OnToken = Callable[[TokenEvent], None]
