"""Columns of a live run on their way: logits to running scores to crossings, on the device, and nothing waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmprobe_tl.live.crossings import Crossings
from lmprobe_tl.live.history import History
from lmprobe_tl.live.rows import LiveRows, RowEnds
from lmprobe_tl.live.scoring_plan import ScoringPlan

# Generated columns that wait for the next round of work; fewer where somebody asks.
_WAITING = 64


@dataclass(frozen=True)
class _Columns:
    """tokens: [batch new]; mask: [batch new] bool, None where all are tokens; readings: [batch new
    n_readings]."""

    tokens: Tensor
    mask: Tensor | None
    readings: Tensor

    @property
    def filled_mask(self) -> Tensor:
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask


@dataclass(frozen=True)
class _Reduced:
    """The same with real columns [batch new] bool, logits and values of the online reductions [batch new n_columns]."""

    columns: _Columns
    real: Tensor
    logits: Tensor
    running: Tensor


class LiveColumns:
    """All columns of a batch so far. Each goes through two stages: it is reduced once a stop depends on it, and settled,
    with many others, once it is read or enough are waiting; so that a step costs next to nothing.

    maxima: [batch n_columns], the highest value of each online reduction. Of what went wrong, [batch] bool: not_finite
    ([batch n_columns]) for logits; defied where a token came in the place of a forced EOS.
    """

    def __init__(
        self,
        plan: ScoringPlan,
        n_rows: int,
        device: torch.device,
        bos_token_id: int | None,
        ends: RowEnds,
        *,
        keep_scores: bool,
    ) -> None:
        groups = plan.groups
        counts_bos = all(group.reduction.counts_bos for group in groups)
        self.rows = LiveRows(n_rows, device, None if counts_bos else bos_token_id, ends)
        self.crossings = Crossings(plan, n_rows, device)
        self.maxima = torch.full((n_rows, plan.n_columns), torch.nan, device=device)
        self.not_finite = torch.zeros(n_rows, plan.n_columns, dtype=torch.bool, device=device)
        self.defied = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self.tokens, self.real, self.logits, self.running = History(), History(), History(), History()
        self._plan, self._keep_scores = plan, keep_scores
        self._online = [group.make_online(n_rows, device) for group in groups]
        self._alarmed = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self._confirmed_at: Tensor | None = None  # [batch] int, the column at which a judge confirmed an alarm
        self._forcing = False
        self._generated = False  # whether the waiting columns are
        self._waiting: list[_Columns] = []
        self._reduced: list[_Reduced] = []

    @property
    def n_rows(self) -> int:
        return len(self._alarmed)

    def add(self, tokens: Tensor, mask: Tensor | None, readings: Tensor, *, generated: bool) -> None:
        """Take in the next columns: of a prompt, or one of generated tokens. Shapes as in `_Columns`."""
        if not generated or not self._generated or len(self._waiting) + len(self._reduced) >= _WAITING:
            self.advance()
        self._generated = generated
        self._waiting.append(_Columns(tokens, mask, readings))
        if not generated:
            self.advance()

    def alarmed(self) -> Tensor:
        """[batch] bool: rows in which some probe's running score has reached its threshold, or a judge confirmed an
        alarm."""
        self._reduce()
        return self._alarmed

    def force(self) -> Tensor:
        """The alarmed rows, in which the next token has to be an EOS: another one will be noticed."""
        self._forcing = True
        return self.alarmed()

    def confirm(self, row: int, column: int) -> None:
        """A judge's word for an alarm in this row, which `column` deferred."""
        here = torch.arange(self.n_rows, device=self._alarmed.device) == row
        self._alarmed = self._alarmed | here
        before = self.crossings.alarm_column() if self._confirmed_at is None else self._confirmed_at
        self._confirmed_at = torch.where(here, before.clamp(max=column), before)

    def advance(self) -> None:
        """Reduce and settle all columns so far."""
        self._reduce()
        reduced, self._reduced = self._reduced, []
        if not reduced:
            return
        tokens = _joined([part.columns.tokens for part in reduced])
        mask = _joined([part.columns.filled_mask for part in reduced])
        logits = _joined([part.logits for part in reduced])
        real, running = _joined([part.real for part in reduced]), _joined([part.running for part in reduced])
        first = self.tokens.n_columns
        self.rows.settle(tokens, mask, real, generated=self._generated)
        self.crossings.update(running, logits, first)
        self.maxima = torch.fmax(self.maxima, running.nan_to_num(nan=-torch.inf).amax(dim=1))
        self.not_finite = self.not_finite | (~logits.isfinite() & real[..., None]).any(dim=1)
        if self._generated and self._forcing:
            self._note_defied(real, first)
        self.tokens.append(tokens.int())
        self.real.append(real)
        if self._keep_scores:
            self.logits.append(logits)
            self.running.append(running)

    def _note_defied(self, real: Tensor, first: int) -> None:
        alarm = self.crossings.alarm_column()
        if self._confirmed_at is not None:
            alarm = torch.minimum(alarm, self._confirmed_at)
        column = torch.arange(first, first + real.shape[1], device=real.device)
        self.defied = self.defied | (real & (column > alarm[:, None])).any(dim=1)

    def _reduce(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        columns = waiting[0]
        if len(waiting) > 1:
            tokens = _joined([part.tokens for part in waiting])
            mask = _joined([part.filled_mask for part in waiting])
            columns = _Columns(tokens, mask, _joined([part.readings for part in waiting]))
        if self._generated:
            real, counted = self.rows.generated(columns.tokens, columns.mask)
        else:
            real, counted = self.rows.prompt(columns.tokens, columns.filled_mask)
        logits = self._plan.token_logits(columns.readings)
        running = self._plan.advance(
            self._online,
            columns.readings,
            logits,
            lambda online, group, z: online.update(z, real if group.reduction.counts_bos else counted),
        )
        self._alarmed = self._alarmed | self.crossings.alarms(running)
        self._reduced.append(_Reduced(columns, real, logits, running))


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
