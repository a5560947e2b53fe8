"""First crossings: where each row's running scores first reached their thresholds, on the device until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from lmprobe_tl.scoring_plan import ScoringPlan


class Crossings:
    """For each row and each watched threshold of a plan: the column of the first crossing, the logit there, and the running
    score."""

    def __init__(self, plan: ScoringPlan, n_rows: int, device: torch.device) -> None:
        self._watches = plan.watches
        n = len(plan.watches.lines)
        self._values, self._columns = plan.watches.values.to(device), plan.watches.columns
        if self._columns is not None:
            self._columns = self._columns.to(device)
        self._crossed, self._collected = torch.zeros(2, n_rows, n, dtype=torch.bool, device=device)
        self._column = torch.zeros(n_rows, n, dtype=torch.int64, device=device)
        self._logit, self._score = torch.zeros(2, n_rows, n, device=device)

    def update(self, running: Tensor, logits: Tensor, first_column: int) -> None:
        """Take in the next columns: values of the online reductions and logits, both [batch new n_columns]."""
        if self._columns is not None:
            running, logits = running[..., self._columns], logits[..., self._columns]
        reached = running >= self._values  # NaN reaches nothing
        if running.shape[1] == 1:
            hit, running, logits = reached[:, 0], running[:, 0], logits[:, 0]
            column: Tensor | int = first_column
        else:
            hit, at = reached.max(dim=1)
            index = at[:, None]
            running, logits = running.gather(1, index)[:, 0], logits.gather(1, index)[:, 0]
            column = at + first_column
        new = hit & ~self._crossed
        self._crossed = self._crossed | hit
        self._column = torch.where(new, column, self._column)
        self._logit = torch.where(new, logits, self._logit)
        self._score = torch.where(new, running, self._score)

    def alarmed(self) -> Tensor:
        """[batch] bool: rows in which some probe has reached its own threshold."""
        return self._crossed[:, : self._watches.n_positive].any(dim=1)

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
