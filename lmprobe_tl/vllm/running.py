"""Running scores and first crossings of many requests at once, each at its own position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmprobe_tl.live.scoring_plan import ReductionGroup, ScoringPlan
from lmprobe_tl.online import OnlineReduction

_FIRST_ROWS = 16


@dataclass(frozen=True)
class Crossing:
    """The first position of a request at which a watched threshold was reached. line: its index in `plan.watches.lines`;
    logit: of that token; value: of the online reduction there."""

    line: int
    position: int
    logit: float
    value: float


class RunningScores:
    """The online reductions of a plan for rows that come and go. Works on the CPU, since scores are few."""

    def __init__(self, plan: ScoringPlan) -> None:
        self._plan = plan
        self._n_rows = _FIRST_ROWS
        self._online = [group.make_online(_FIRST_ROWS) for group in plan.groups]
        # What a token is known by for all probes; None for all readings. A readout may fail for its own probe alone.
        of_all = torch.ones(plan.n_readings, dtype=torch.bool)
        for group in plan.groups:
            of_all[group.readings] = group.readout is None
        self._shared = None if of_all.all() else of_all.nonzero()[:, 0]
        watches = plan.watches
        columns = range(plan.n_columns) if watches.columns is None else watches.columns.tolist()
        self._lines = np.array(list(columns), dtype=np.int64)[: watches.n_positive]
        self._limits = watches.values.numpy()[: watches.n_positive]
        self._crossed = np.zeros((_FIRST_ROWS, watches.n_positive), dtype=bool)
        self._crossings: dict[int, list[Crossing]] = {}
        self.n_crossed = np.zeros(watches.n_positive, dtype=np.int64)  # by line: rows that have reached it

    def begin(self, row: int) -> None:
        """A new request takes this row."""
        while row >= self._n_rows:
            more = np.zeros((self._n_rows, self._crossed.shape[1]), dtype=bool)
            self._crossed = np.concatenate([self._crossed, more])
            self._n_rows *= 2
            for online in self._online:
                online.grow(self._n_rows)
        for online in self._online:
            online.reset_rows(torch.tensor([row]))
        self._crossed[row] = False
        self._crossings.pop(row, None)

    def withdraw(self, row: int) -> None:
        """The request of this row begins anew, as if nothing had been told of it."""
        self.n_crossed -= self._crossed[row]
        self.begin(row)

    def crossings(self, row: int) -> list[Crossing]:
        return self._crossings.get(row, [])

    def update(self, rows: np.ndarray, readings: np.ndarray, positions: np.ndarray, is_bos: np.ndarray) -> np.ndarray:
        """Take in the next positions of some rows, all different. Returns the values of the online reductions after each,
        [batch new n_columns].

        rows: [batch]; readings: [batch new n_readings], NaN where unknown, which does not count; positions, is_bos: [batch
        new].
        """
        read, which = torch.from_numpy(readings), torch.from_numpy(rows)
        finite = read.isfinite()
        known = finite.all(dim=-1) if self._shared is None else finite[..., self._shared].all(dim=-1)
        past_bos = known & ~torch.from_numpy(is_bos)
        scores = self._plan.token_logits(read)

        def update(online: OnlineReduction, group: ReductionGroup, z: Tensor) -> Tensor:
            counted = known if group.reduction.counts_bos else past_bos
            if group.readout is not None:  # steep powers may overflow, of readings that are finite
                counted = counted & finite[..., group.readings].all(dim=-1)
            return online.update_rows(which, z, counted)

        values = self._plan.advance(self._online, read, scores, update).numpy()
        self._note_crossings(rows, scores.numpy(), values, positions)
        return values

    def _note_crossings(self, rows: np.ndarray, logits: np.ndarray, values: np.ndarray, positions: np.ndarray) -> None:
        reached = values[..., self._lines] >= self._limits  # [batch new lines]; NaN reaches nothing
        new = reached.any(axis=1) & ~self._crossed[rows]
        if not new.any():
            return
        for at, line in zip(*np.nonzero(new), strict=True):
            place, row, column = int(reached[at, :, line].argmax()), int(rows[at]), self._lines[line]
            found = float(logits[at, place, column]), float(values[at, place, column])
            self._crossings.setdefault(row, []).append(Crossing(int(line), int(positions[at, place]), *found))
            self._crossed[row, line] = True
            self.n_crossed[line] += 1
