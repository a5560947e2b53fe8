"""Scores of one generation, kept on the model's device until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import MonitorError
from lmprobe_tl.hook_points import ForwardCall, end_of_sequence_ids
from lmprobe_tl.reductions import make_online
from lmprobe_tl.scoring_plan import ScoringPlan, threshold_of
from lmprobe_tl.tokens import without_bos


@dataclass(frozen=True)
class Alarm:
    """The first position of a row at which a probe's running score reached its threshold.

    position: index of the token in the row, pads not counted. logit: of that token alone. score: the running score, and
    threshold: both in the threshold's `unit`, 'probability' or 'logit'.
    """

    probe: str
    row: int
    position: int
    token_id: int
    logit: float
    score: float
    threshold: float
    unit: str


@dataclass(frozen=True)
class RowEnds:
    """Token ids that end a generated row, and those that generation feeds to a row that has ended."""

    end_ids: tuple[int, ...]
    filler_ids: tuple[int, ...]


def row_ends(model: Any, eos_token_id: int | Sequence[int] | None = None) -> RowEnds:
    """What ends a generated row: the given ids, else the model's; generation then feeds one of these, a pad or EOS."""
    if eos_token_id is None:
        end_ids = end_of_sequence_ids(model)
    else:
        end_ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    tokenizer = getattr(model, "tokenizer", None)
    of_tokenizer = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return RowEnds(end_ids, (*end_ids, *(found for found in of_tokenizer if found is not None)))


class LiveRun:
    """One sequence of forward passes over a batch that grows to the right; every column is scored once.

    Columns count from the left edge of the batch, pads included; positions count a row's real tokens.
    """

    def __init__(self, plan: ScoringPlan, bos_token_id: int | None, ends: RowEnds) -> None:
        self.plan = plan
        self.n_columns = 0
        self.prompt_columns = 0  # at once or in chunks
        self._bos, self._ends = bos_token_id, ends
        self._tokens: list[Tensor] = []  # each [batch new]
        self._real: list[Tensor] = []  # each [batch new], bool: neither pad nor after the row's end
        self._counted: list[Tensor] = []  # each [batch new], bool: real and not BOS
        self._logits: list[Tensor] = []  # each [batch new n_columns]
        self._running: list[Tensor] = []  # each [batch new n_columns], in the unit that each reduction runs in

    # --- while the model runs ---

    def extends(self, call: ForwardCall) -> bool:
        """Whether a forward pass from column 0 on recomputes this run's tokens and adds one, as generation without a cache
        does. More than one are a new prompt, for instance the next turn of a chat."""
        if not self._tokens or call.tokens.shape != (self.n_rows, self.n_columns + 1):
            return False
        if (self._ended | self._stopped).all():
            return False  # this generation was over: what follows is another
        return torch.equal(call.tokens[:, : self.n_columns], torch.cat(self._tokens, dim=1))

    def new_columns(self, call: ForwardCall) -> int:
        """How many leading columns of a forward pass were scored before; MonitorError where some in between never were, or
        where the model went back."""
        if call.start > self.n_columns:
            raise MonitorError(
                f"columns {self.n_columns} to {call.start - 1} were never scored: the model was called with a cache of "
                f"{call.start} tokens. Attach the probes before the prompt is processed."
            )
        if 0 < call.start < self.n_columns:
            raise MonitorError(
                f"the model went back to column {call.start} of {self.n_columns} that were scored already, with tokens that "
                "may differ (a cache used twice, or speculative decoding). Process the prompt again for each continuation."
            )
        if self._tokens and call.tokens.shape[0] != self.n_rows:
            raise MonitorError(f"the batch went from {self.n_rows} to {call.tokens.shape[0]} rows within one generation.")
        return self.n_columns - call.start

    def add(self, call: ForwardCall, logits: Tensor) -> None:
        """Take in the logits [batch new n_columns] of the columns of a forward pass that were not scored before."""
        skip = self.new_columns(call)
        tokens = call.tokens[:, skip:].clone()
        mask = call.attention_mask
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, call.start + skip :].bool()
        n_columns = call.start + call.tokens.shape[1]
        if not self._tokens:
            self._begin(tokens)
            self.prompt_columns = n_columns
        elif tokens.shape[1] == 1:
            # A generated token: a row ends at its first EOS. In a prompt the same id has no such meaning.
            real = real & ~self._after_end(tokens)
        else:
            self._ended, self._stopped = torch.zeros(2, self.n_rows, dtype=torch.bool, device=tokens.device)
            if self.prompt_columns == self.n_columns:
                self.prompt_columns = n_columns
        self._tokens.append(tokens)
        self._real.append(real)
        self._counted.append(self._without_bos(tokens, real))
        self._logits.append(logits)
        self.n_columns = n_columns

    def _begin(self, tokens: Tensor) -> None:
        batch, device = tokens.shape[0], tokens.device
        # [batch] bool: has had a real token; ended by EOS; ended by a stop, and had one more token; was fed real tokens
        # after.
        flags = torch.zeros(5, batch, dtype=torch.bool, device=device)
        self._begun, self._ended, self._stopped, self._passed_stop, self._went_on = flags
        self._crossed = torch.zeros(batch, self.plan.n_columns, dtype=torch.bool, device=device)
        # Moved once: a copy to the device in every step would wait for it.
        self._thresholds = self.plan.thresholds.to(device)
        self._group_columns = [group.columns.to(device) for group in self.plan.groups]
        self._online: list[Any] = [
            make_online(group.reduction.name, group.reduction.parameter, batch, len(group.columns), device)
            for group in self.plan.groups
        ]

    def _without_bos(self, tokens: Tensor, real: Tensor) -> Tensor:
        """[batch new] bool: real, less the BOS with which a row begins; padding may put that into a later chunk."""
        counted = torch.where(rearrange(self._begun, "batch -> batch 1"), real, without_bos(tokens, real, self._bos))
        self._begun = self._begun | real.any(dim=1)
        return counted

    def _after_end(self, tokens: Tensor) -> Tensor:
        """[batch 1] bool, for one generated token a row: at or after the first EOS, or after the row was stopped."""
        # The token that was sampled together with a stop is still to come; after it, only fillers are.
        over = (self._ended & ~self._stopped) | self._passed_stop
        self._went_on = self._went_on | (over & ~_is_one_of(tokens[:, 0], self._ends.filler_ids))
        self._passed_stop = self._stopped
        self._ended = self._ended | _is_one_of(tokens[:, 0], self._ends.end_ids)
        return rearrange(self._ended | self._stopped, "batch -> batch 1")

    def advance(self) -> None:
        """Bring the running scores up to the last column."""
        for at in range(len(self._running), len(self._logits)):
            logits = self._logits[at]
            running = torch.empty_like(logits)
            for group, columns, online in zip(self.plan.groups, self._group_columns, self._online, strict=True):
                counted = self._real[at] if group.reduction.counts_bos else self._counted[at]
                running[..., columns] = online.update(group.enter(logits[..., columns]), counted)
            self._running.append(running)
            self._crossed = self._crossed | self._thresholds.reached(running).any(dim=1)

    def stop_rows(self) -> Tensor:
        """[batch] bool: rows in which some probe's running score has reached its threshold. Later columns of these do not
        count."""
        self.advance()
        crossed = self._crossed.any(dim=-1)
        self._stopped = self._stopped | crossed
        return crossed

    # --- when scores are read ---

    @property
    def n_rows(self) -> int:
        return self._tokens[0].shape[0] if self._tokens else 0

    def row_tokens(self) -> list[Tensor]:
        """Token ids of each row's scored positions, [n] int64 on the CPU."""
        return self._by_row(self._tokens)

    def row_logits(self, name: str) -> list[Tensor]:
        """Logits of a probe, a row each: [n] for a binary probe, [n n_classes] else; float32 on the CPU."""
        return self._squeezed(name, self._finite_logits(name))

    def _finite_logits(self, name: str) -> list[Tensor]:
        rows = [scores[..., self.plan.columns[name]] for scores in self._by_row(self._logits)]
        for row, scores in enumerate(rows):
            bad = (~torch.isfinite(scores)).any(dim=-1).nonzero()
            if len(bad):
                raise MonitorError(
                    f"the logit of probe {name!r} is not finite at position {int(bad[0, 0])} of row {row}: "
                    "the activations there "
                    "hold NaN or inf (an overflow in float16, for instance)."
                )
        return rows

    def row_running(self, name: str, unit: str | None = None) -> list[Tensor]:
        """Running score after each position, NaN before the first that counts: [n] or [n n_classes].

        unit: 'logit' or 'probability' for a binary probe, straight from its online reduction; None takes the score's own.
        """
        self._finite_logits(name)  # NaN shall have no other reason
        self.advance()
        if unit is not None:
            reduction, column = self.plan.reductions[name], self.plan.columns[name].start
            return [reduction.in_unit(running[:, column], unit) for running in self._by_row(self._running)]
        group = self.plan.group_of(name)
        rows = [group.leave(running[..., group.columns])[..., group.places[name]] for running in self._by_row(self._running)]
        return self._squeezed(name, rows)

    def row_prompt_lengths(self) -> list[int]:
        """How many real tokens of each row stand in the prompt's columns."""
        return torch.cat(self._real, dim=1)[:, : self.prompt_columns].sum(dim=1).tolist()

    def _squeezed(self, name: str, rows: list[Tensor]) -> list[Tensor]:
        return [values[:, 0] if self.plan.probes[name].is_binary else values for values in rows]

    def _by_row(self, pieces: list[Tensor]) -> list[Tensor]:
        went_on = self._went_on.nonzero().flatten().tolist()
        if went_on:
            raise MonitorError(
                f"row {went_on[0]} went on after it had ended (by a stop, or by one of the tokens "
                f"{list(self._ends.end_ids)}), "
                "and what followed was not scored. Generate again in a block of its own; where "
                "generation ends at other tokens, or at none (stop_at_eos=False), say so: "
                "attach_probes(..., eos_token_id=...), with [] for none."
            )
        values, real = torch.cat(pieces, dim=1).cpu(), torch.cat(self._real, dim=1).cpu()
        return [values[row][real[row]] for row in range(self.n_rows)]

    def row_alarms(self) -> list[tuple[Alarm, ...]]:
        """First alarm of each binary probe in each row, by position."""
        found: list[list[Alarm]] = [[] for _ in range(self.n_rows)]
        tokens = self.row_tokens()
        for name, probe in self.plan.probes.items():
            if not probe.is_binary:
                continue
            self.advance()
            logits, column = self.row_logits(name), self.plan.columns[name].start
            value, unit = threshold_of(probe)
            reached = self._by_row([self._thresholds.reached(piece)[..., column] for piece in self._running])
            running = self._by_row([self.plan.reductions[name].in_unit(piece[..., column], unit) for piece in self._running])
            for row in range(self.n_rows):
                hits = reached[row].nonzero()
                if len(hits):
                    at = int(hits[0, 0])
                    shown = float(running[row][at])
                    found[row].append(Alarm(name, row, at, int(tokens[row][at]), float(logits[row][at]), shown, value, unit))
        return [tuple(sorted(alarms, key=lambda alarm: alarm.position)) for alarms in found]


def _is_one_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """[batch] bool. A comparison for each id, since a list of ids would have to be copied to the device."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in ids:
        found = found | (tokens == token_id)
    return found
