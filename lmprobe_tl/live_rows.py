"""Which columns of a batch are tokens of each row: neither pads nor after the row's end; and which of these count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import MonitorError
from lmprobe_tl.hook_points import end_of_sequence_ids
from lmprobe_tl.tokens import without_bos


@dataclass(frozen=True)
class RowEnds:
    """Token ids that end a generated row, and those that generation feeds to a row that has ended."""

    end_ids: tuple[int, ...]
    filler_ids: tuple[int, ...]


def row_ends(model: Any, eos_token_id: int | Sequence[int] | None = None) -> RowEnds:
    """What ends a generated row: the given ids, else the model's; generation then feeds one of these, a pad or EOS."""
    tokenizer = getattr(model, "tokenizer", None)
    own = getattr(tokenizer, "eos_token_id", None)
    if eos_token_id is None:
        end_ids = end_of_sequence_ids(model)
    else:
        end_ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    if own in end_ids:  # first, since hf_generate knows this one alone
        end_ids = (own, *(found for found in end_ids if found != own))
    fillers = (getattr(tokenizer, "pad_token_id", None), own)
    return RowEnds(end_ids, (*end_ids, *(found for found in fillers if found is not None and found not in end_ids)))


class LiveRows:
    """The state of each row, on the device; nothing here waits for it but the checks.

    counts_bos: whether every probe takes a leading BOS into account, so that the question need not be asked.
    """

    def __init__(self, n_rows: int, device: torch.device, bos_token_id: int | None, ends: RowEnds, counts_bos: bool) -> None:
        self._bos, self._ends, self._counts_bos = bos_token_id, ends, counts_bos or bos_token_id is None
        # [batch] bool: has had a real token; ended by EOS; ended by a stop, and had one more token; was fed real tokens
        # after its end; was to be ended by a forced EOS; got another token instead.
        flags = torch.zeros(7, n_rows, dtype=torch.bool, device=device)
        self._begun, self.ended, self.stopped, self._passed_stop, self._went_on, self._forced, self._defied = flags
        self._any_stopped = self._any_forced = False

    def prompt(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of a prompt, in which an EOS has no meaning and after which a row may go on. [batch new] twice: real,
        counted."""
        self.ended = torch.zeros_like(self.ended)
        self.stopped, self._passed_stop, self._any_stopped = self.ended, self.ended, False
        return mask, self._without_bos(tokens, mask)

    def generated(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of generated tokens; a row ends before its first EOS. [batch new] twice: real, counted."""
        if not self._ends.end_ids and not self._any_stopped:
            return mask, self._without_bos(tokens, mask)
        is_end = _is_one_of(tokens, self._ends.end_ids)
        before = self.ended[:, None]
        if tokens.shape[1] == 1:
            ended = before | is_end
        else:
            ended = before | (is_end.cumsum(dim=1) > 0)
            before = torch.cat([before, ended[:, :-1]], dim=1)
        over, gone = before, ended
        if self._any_stopped:
            # The token that was sampled together with a stop is still to come; after it, only fillers are.
            stopped = self.stopped[:, None]
            passed = torch.cat([self._passed_stop[:, None], stopped.expand(-1, tokens.shape[1] - 1)], dim=1)
            over, gone = (before & ~stopped) | passed, ended | stopped
            self._passed_stop = self.stopped
        if self._any_forced:
            self._defied = self._defied | (self._forced & ~before[:, 0] & ~is_end[:, 0])
        fillers = is_end | _is_one_of(tokens, self._ends.filler_ids[len(self._ends.end_ids) :])
        self._went_on = self._went_on | (over & ~fillers).any(dim=1)
        self.ended = ended[:, -1]
        real = mask & ~gone
        return real, self._without_bos(tokens, real)

    def stop(self, rows: Tensor) -> None:
        """These rows [batch] bool end here: their output has one more token, which does not count."""
        self.stopped, self._any_stopped = self.stopped | rows, True

    def force(self, rows: Tensor) -> None:
        """The next token of these rows [batch] bool is to be an EOS."""
        self._forced, self._any_forced = rows, True

    def _without_bos(self, tokens: Tensor, real: Tensor) -> Tensor:
        """[batch new] bool: real, less the BOS with which a row begins; padding may put that into a later chunk."""
        if self._counts_bos:
            return real
        begun = self._begun[:, None]
        if tokens.shape[1] == 1:
            counted = real & (begun | (tokens != self._bos))
            self._begun = (begun | real)[:, 0]
        else:
            counted = torch.where(begun, real, without_bos(tokens, real, self._bos))
            self._begun = self._begun | real.any(dim=1)
        return counted

    def check(self) -> None:
        """Raise MonitorError where tokens of a row went by unscored, or a forced EOS had no effect."""
        went_on = self._went_on.nonzero().flatten().tolist()
        if went_on:
            raise MonitorError(
                f"row {went_on[0]} went on after it had ended (by a stop, or by one of the tokens "
                f"{list(self._ends.end_ids)}), and what followed was not scored. Generate again in a block of its own; "
                "where generation ends at other tokens, or at none (stop_at_eos=False), say so: "
                "attach_probes(..., eos_token_id=...), with [] for none."
            )
        defied = self._defied.nonzero().flatten().tolist() if self._any_forced else []
        if defied:
            raise MonitorError(
                f"row {defied[0]} was to end at an alarm (stop=True), but generation put another token in the place of its "
                f"end-of-sequence token {self._ends.end_ids[0]}: something forbids that token (min_new_tokens, "
                "suppress_tokens). Generate without it, or stop with monitor.stopping_criteria()."
            )


def _is_one_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """[batch new] bool. A comparison for each id, since a list of ids would have to be copied to the device."""
    if not ids:
        return torch.zeros_like(tokens, dtype=torch.bool)
    found = tokens == ids[0]
    for token_id in ids[1:]:
        found = found | (tokens == token_id)
    return found
