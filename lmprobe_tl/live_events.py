"""What `on_token` gets: one frozen record for each newly scored token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lmprobe_tl.live_run import Alarm, LiveRun


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


class EventReporter:
    """Calls `on_token` for each position of a run that it has not told of yet: rows in order, positions ascending."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._told: dict[int, int] = {}
        self._first_run: LiveRun | None = None

    def report(self, run: LiveRun) -> None:
        self._first_run = self._first_run or run
        for event in self._events(run):
            self._told[event.row] = event.position + 1
            self._on_token(event)

    def _events(self, run: LiveRun) -> Iterator[TokenEvent]:
        names = [name for name, probe in run.plan.probes.items() if probe.is_binary]
        logits = {name: run.row_logits(name) for name in names}
        running = {name: run.row_running(name) for name in names}
        alarms = run.row_alarms()
        prompt_lengths = (self._first_run or run).row_prompt_lengths()
        for row, tokens in enumerate(run.row_tokens()):
            for at in range(self._told.get(row, 0), len(tokens)):
                yield TokenEvent(
                    row=row,
                    position=at,
                    token_id=int(tokens[at]),
                    generated=at >= prompt_lengths[row],
                    logits={name: float(logits[name][row][at]) for name in names},
                    running={name: _none_if_nan(float(running[name][row][at])) for name in names},
                    alarms=tuple(alarm for alarm in alarms[row] if alarm.position == at),
                )


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
