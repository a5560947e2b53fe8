"""Which columns of a batch are tokens of each row: neither pads nor after the row's end; and which of these count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import MonitorError
from lmprobe_tl.hook_points import ForwardCall, end_of_sequence_ids
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
    """The state of each row, on the device; nothing here waits for it but `check`, and a prompt that may hide its BOS.

    Columns come twice: in order, as soon as anybody needs scores (`prompt`, `generated`), and later, many at once, for what
    is but checked (`settle`).
    """

    def __init__(self, n_rows: int, device: torch.device, bos_token_id: int | None, ends: RowEnds) -> None:
        self._bos, self._ends = bos_token_id, ends
        # [batch 1] bool: has had a real token; ended by EOS; ended by a stop.
        self._begun, self._ended, self._stopped = torch.zeros(3, n_rows, 1, dtype=torch.bool, device=device)
        self._all_begun = bos_token_id is None
        self._any_stopped = False
        # [batch 1] bool: the last settled column was after the row's end. [batch] bool: real tokens came after it.
        self._gone, self._went_on = torch.zeros_like(self._ended), torch.zeros_like(self._ended[:, 0])

    def prompt(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of a prompt, in which an EOS has no meaning and after which a row may go on. [batch new] twice: real,
        counted."""
        self._ended = self._stopped = torch.zeros_like(self._ended)
        self._any_stopped = False
        counted = self._without_bos(tokens, mask)
        if not self._all_begun:
            self._all_begun = bool(self._begun.all())  # once a prompt, so that no step has to look for a BOS
        return mask, counted

    def generated(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns of generated tokens; a row ends before its first EOS. [batch new] twice: real, counted."""
        if self._ends.end_ids:
            is_end = is_one_of(tokens, self._ends.end_ids)
            gone = self._ended | (is_end if tokens.shape[1] == 1 else is_end.cumsum(dim=1) > 0)
            self._ended = gone[:, -1:]
        else:
            gone = self._ended.expand(tokens.shape)
        if self._any_stopped:
            gone = gone | self._stopped
        real = ~gone if mask is None else mask & ~gone
        return real, real if self._all_begun else self._without_bos(tokens, real)

    def settle(self, tokens: Tensor, mask: Tensor, real: Tensor, *, generated: bool) -> None:
        """Look for tokens of a row that came after its end, where generation feeds nothing but fillers."""
        if not generated:
            self._gone = torch.zeros_like(self._gone)
            return
        # The first column that is gone holds the EOS, or the token that was sampled together with a stop.
        gone = mask & ~real
        before = torch.cat([self._gone, gone[:, :-1]], dim=1)
        self._went_on = self._went_on | (before & ~is_one_of(tokens, self._ends.filler_ids)).any(dim=1)
        self._gone = gone[:, -1:]

    def stop(self, rows: Tensor) -> None:
        """These rows [batch] bool end here: their output has one more token, which does not count."""
        self._stopped, self._any_stopped = self._stopped | rows[:, None], True

    def over(self) -> Tensor:
        """[batch] bool: rows that have ended."""
        return (self._ended | self._stopped)[:, 0]

    def _without_bos(self, tokens: Tensor, real: Tensor) -> Tensor:
        """[batch new] bool: real, less the BOS with which a row begins; padding may put that into a later chunk."""
        counted = torch.where(self._begun, real, without_bos(tokens, real, self._bos))
        self._begun = self._begun | real.any(dim=1, keepdim=True)
        return counted

    def check(self) -> None:
        """Raise MonitorError where tokens of a row went by unscored."""
        went_on = self._went_on.nonzero().flatten().tolist()
        if went_on:
            raise MonitorError(
                f"row {went_on[0]} went on after it had ended (by a stop, or by one of the tokens "
                f"{list(self._ends.end_ids)}), and what followed was not scored. Generate again in a block of its own; "
                "where generation ends at other tokens, or at none (stop_at_eos=False), say so: "
                "attach_probes(..., eos_token_id=...), with [] for none."
            )


def is_one_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """[batch new] bool. A comparison for each id, since a list of ids would have to be copied to the device."""
    if not ids:
        return torch.zeros_like(tokens, dtype=torch.bool)
    found = tokens == ids[0]
    for token_id in ids[1:]:
        found = found | (tokens == token_id)
    return found


def check_padding(call: ForwardCall, pad_token_id: int | None) -> None:
    """Raise MonitorError for a padded prompt without a mask: its pads would be taken for tokens."""
    if call.attention_mask is not None or pad_token_id is None:
        return
    # Padding makes rows equally long, so that some rows have none of it. A BOS with the pad's id begins all rows.
    edges = call.tokens[:, [0, -1]] == pad_token_id
    padded = (edges.any(dim=0) & ~edges.all(dim=0)).any()
    if padded:
        raise MonitorError(
            f"some rows begin or end with the pad token (id {pad_token_id}), and the model was called without an attention "
            "mask, so pads cannot be told from tokens. Pass attention_mask=..., all ones where these are tokens. (For "
            "strings, model.generate and score_prompts make a mask; model(...) does not.)"
        )
