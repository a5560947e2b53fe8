"""First crossings: where each row's running scores first reached their thresholds, on the device until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from lmprobe_tl.live.scoring_plan import ScoringPlan

_NEVER = 2**62


class Crossings:
    """For each row and each watched threshold of a plan: the column of the first crossing, the logit there, and the running
    score."""

    def __init__(self, plan: ScoringPlan, n_rows: int, device: torch.device) -> None:
        self._n_positive = plan.watches.n_positive
        n = len(plan.watches.lines)
        self._values, self._columns = plan.watches.values.to(device), plan.watches.columns
        if self._columns is not None:
            self._columns = self._columns.to(device)
        self._crossed, self._collected = torch.zeros(2, n_rows, n, dtype=torch.bool, device=device)
        self._column = torch.full((n_rows, n), _NEVER, device=device)
        self._logit, self._score = torch.zeros(2, n_rows, n, device=device)

    def alarms(self, running: Tensor) -> Tensor:
        """[batch] bool: whether any of these values of the online reductions [batch new n_columns] reaches the threshold of
        its probe. NaN reaches nothing."""
        watched = running if self._columns is None else running[..., self._columns]
        return (watched >= self._values)[..., : self._n_positive].flatten(1).any(dim=1)

    def update(self, running: Tensor, logits: Tensor, first_column: int) -> None:
        """Take in the next columns: values of the online reductions and logits, both [batch new n_columns]."""
        if self._columns is not None:
            running, logits = running[..., self._columns], logits[..., self._columns]
        hit, at = (running >= self._values).max(dim=1)  # the first of the highest
        index = at[:, None]
        new = hit & ~self._crossed
        self._crossed = self._crossed | hit
        self._column = torch.where(new, at + first_column, self._column)
        self._logit = torch.where(new, logits.gather(1, index)[:, 0], self._logit)
        self._score = torch.where(new, running.gather(1, index)[:, 0], self._score)

    def alarm_column(self) -> Tensor:
        """[batch] int: the column of each row's first alarm, beyond all columns where there is none."""
        if not self._n_positive:
            return self._column.new_full((len(self._column),), _NEVER)
        return self._column[:, : self._n_positive].amin(dim=1)

    def collect(self) -> list[tuple[int, int, int, float, float]]:
        """What has crossed since the last call, as (row, index of the watched line, column, logit, value of the online
        reduction), in the order in which it happened. Waits for the device."""
        new = self._crossed & ~self._collected
        if not bool(new.any()):
            return []
        self._collected = self._crossed
        rows, lines = new.nonzero(as_tuple=True)
        parts = (rows, lines, self._column[rows, lines], self._logit[rows, lines], self._score[rows, lines])
        found = zip(*(part.tolist() for part in parts), strict=True)
        return sorted(found, key=lambda entry: (entry[2], entry[0], entry[1]))
