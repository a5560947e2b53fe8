"""Tells `on_token` of each newly scored token."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lmprobe_tl.live.records import OnToken, TokenEvent
from lmprobe_tl.live.run import LiveRun


class EventReporter:
    """Calls `on_token` for each position that it has not told of yet: rows in order, positions ascending."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._first: LiveRun | None = None
        self._run: LiveRun | None = None
        self._prompt_lengths: list[int] = []
        self._column = 0  # of the run, up to which it has been read
        self._seen: list[int] = []  # positions of each row in these columns
        self._told: list[int] = []  # positions of each row that were told, in an earlier run on the same rows, too

    def report(self, run: LiveRun) -> None:
        if run is not self._run:
            # A run begun by hand repeats the tokens of the one before: only what is new in it is told.
            self._first = self._first or run
            self._told = self._told or [0] * run.n_rows
            self._run, self._column, self._seen = run, 0, [0] * run.n_rows
        if run is self._first and run.prompt_columns > self._column:
            self._prompt_lengths = run.prompt_lengths()
        for event in self._events(run):
            self._told[event.row] = event.position + 1
            self._on_token(event)

    def _events(self, run: LiveRun) -> Iterator[TokenEvent]:
        plan = run.plan
        names = [name for name, probe in plan.probes.items() if probe.is_binary]
        tokens, real, logits, values = run.columns_from(self._column)
        columns = {name: plan.columns[name].start for name in names}
        running = {name: plan.group_of(name).leave(values[..., plan.columns[name]])[..., 0].tolist() for name in names}
        alarms = [alarm for alarm in run.events if alarm.is_positive]
        self._column += tokens.shape[1]
        for row in range(len(tokens)):
            for at in real[row].nonzero().flatten().tolist():
                position = self._seen[row]
                self._seen[row] += 1
                if position < self._told[row]:
                    continue
                yield TokenEvent(
                    row=row,
                    position=position,
                    token_id=int(tokens[row, at]),
                    generated=position >= self._prompt_lengths[row],
                    logits={name: float(logits[row, at, columns[name]]) for name in names},
                    running={name: _none_if_nan(running[name][row][at]) for name in names},
                    alarms=tuple(alarm for alarm in alarms if (alarm.row, alarm.position) == (row, position)),
                )


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
