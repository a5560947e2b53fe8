"""One live run: what a generation's rows scored, read from the device when it is asked for."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import InputError, MonitorError
from lmprobe_tl.forward_watch import ForwardCall, prefill_in_progress
from lmprobe_tl.live.columns import LiveColumns
from lmprobe_tl.live.history import History
from lmprobe_tl.live.records import Alarm, first_alarms, verdicts_of
from lmprobe_tl.live.rows import RowEnds
from lmprobe_tl.live.scoring_plan import ScoringPlan


class LiveRun:
    """One sequence of forward passes over a batch that grows to the right; every column is scored once.

    Columns count from the left edge of the batch, pads included; positions count a row's real tokens. Reading is safe from
    any thread. keep_scores=False: alarms, tokens and maxima alone are kept, in a memory that grows by a few bytes a token.
    """

    def __init__(
        self, plan: ScoringPlan, bos_token_id: int | None, ends: RowEnds, *, keep_scores: bool = True, index: int = 0
    ) -> None:
        self.plan = plan
        self.index = index
        self.n_columns = 0
        self.prompt_columns = 0  # at once or in chunks
        self.repeats: LiveRun | None = None  # whose tokens these are again: what happened there does not happen anew
        self.events: list[Alarm] = []  # crossings that were looked at, in the order in which they happened
        self.cache: weakref.ref[Any] | None = None  # keys and values that this run's tokens are in
        self.is_cached = False  # whether a pass went on from that cache
        self.mark: tuple[int, Tensor] | None = None  # how long that cache was, and its newest key, [batch d_head]
        self._bos, self._ends, self._keep_scores = bos_token_id, ends, keep_scores
        self._lock = threading.RLock()
        self._columns: LiveColumns | None = None
        self._moved: Tensor | None = None  # [batch] bool: other rows came in their place in the cache
        self._at: dict[Alarm, int] = {}  # columns of the events

    # --- while the model runs ---

    def extends(self, call: ForwardCall) -> bool:
        """Whether a forward pass from column 0 on recomputes this run's tokens and adds one, as generation without a cache
        does. More than one are a new prompt, for instance the next turn of a chat. (This waits for the device.)"""
        if self._columns is None or call.tokens.shape != (self.n_rows, self.n_columns + 1):
            return False
        with self._lock:
            self._columns.advance()
            if self._columns.rows.over().all():
                return False  # this generation was over: what follows is another
            return torch.equal(call.tokens[:, : self.n_columns], self._columns.tokens.read().to(call.tokens.dtype))

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
        if self._columns is not None and call.tokens.shape[0] != self.n_rows:
            raise MonitorError(f"the batch went from {self.n_rows} to {call.tokens.shape[0]} rows within one generation.")
        return self.n_columns - call.start

    def add(self, call: ForwardCall, readings: Tensor) -> None:
        """Take in the readings [batch new n_readings] of the columns of a forward pass that were not scored before."""
        with self._lock:
            skip = self.new_columns(call)
            tokens = call.tokens[:, skip:].clone()  # a view would keep the whole batch of tokens alive
            mask = call.attention_mask
            if mask is not None:
                mask = mask[:, call.start + skip :].to(tokens.device, torch.bool, copy=True)
            if self._columns is None:
                self._columns = LiveColumns(
                    self.plan, len(tokens), tokens.device, self._bos, self._ends, keep_scores=self._keep_scores
                )
            # A generated token comes alone; so may the last chunk of a prompt, before any is generated.
            generated = self.n_columns > 0 and tokens.shape[1] == 1
            if generated and self.prompt_columns == self.n_columns:
                generated = not prefill_in_progress()
            n_columns = call.start + call.tokens.shape[1]
            if not generated and self.prompt_columns == self.n_columns:
                self.prompt_columns = n_columns
            self._columns.add(tokens, mask, readings, generated=generated)
            self.n_columns = n_columns

    def note_moved_rows(self, moved: Tensor) -> None:
        """[batch] bool: rows of the cache that hold other tokens than in the last pass."""
        self._moved = moved if self._moved is None else self._moved | moved

    def stop_rows(self) -> Tensor:
        """The alarmed rows, [batch] bool, of which later columns shall not count."""
        with self._lock:
            stopping = self._scored.alarmed()
            self._scored.rows.stop(stopping)
            return stopping

    def force_rows(self) -> Tensor:
        """The alarmed rows, [batch] bool, of which the next token has to be an EOS."""
        with self._lock:
            return self._scored.force()

    def settle(self) -> None:
        """Bring crossings and maxima up to the last column."""
        with self._lock:
            self._scored.advance()

    def collect(self) -> list[Alarm]:
        """Crossings since the last call, as events; this waits for the device."""
        with self._lock:
            if self._columns is None:
                return []
            self._columns.advance()
            found = self._columns.crossings.collect()
            new = self._events_at(self._columns, found) if found else []
            # Where one token reached both thresholds of a cascade, the high one has the word, and nothing is deferred.
            high = {(event.row, event.probe) for event in self.events + new if event.verdict == "positive"}
            new = [event for event in new if event.verdict != "deferred" or (event.row, event.probe) not in high]
            if self.repeats is not None:
                told = {(event.row, event.probe, event.verdict == "positive") for event in self.repeats.events}
                new = [event for event in new if (event.row, event.probe, event.verdict == "positive") not in told]
            self.events += new
            return new

    def judge(self, event: Alarm, positive: bool) -> Alarm:
        """Put a judge's verdict in the place of a deferred event."""
        with self._lock:
            judged = event.judged(positive)
            self.events[self.events.index(event)] = judged
            if positive:
                self._scored.confirm(event.row, self._at[event])
            return judged

    def _events_at(self, scored: LiveColumns, found: list[tuple[int, int, int, float, float]]) -> list[Alarm]:
        first = min(entry[2] for entry in found)
        tokens, real = scored.tokens.read(first).cpu(), scored.real.read().cpu()
        events = []
        for row, line, column, logit, value in found:
            watch = self.plan.watches.lines[line]
            score = self.plan.reductions[watch.probe].in_unit(torch.tensor(value, dtype=torch.float32), watch.unit).item()
            event = Alarm(
                probe=watch.probe,
                row=row,
                position=int(real[row, :column].sum()),
                token_id=int(tokens[row, column - first]),
                logit=logit,
                score=score,
                threshold=watch.value,
                unit=watch.unit,
                verdict=watch.verdict,
                run=self.index,
            )
            self._at[event] = column
            events.append(event)
        return events

    # --- when scores are read ---

    @property
    def _scored(self) -> LiveColumns:
        if self._columns is None:
            raise MonitorError("this run has no forward pass yet.")
        return self._columns

    @property
    def n_rows(self) -> int:
        return 0 if self._columns is None else self._columns.n_rows

    @property
    def n_bytes(self) -> int:
        """Bytes of what is kept of each token, on the device."""
        scored = self._scored
        return sum(history.n_bytes for history in (scored.tokens, scored.real, scored.logits, scored.running))

    def tokens(self) -> list[Tensor]:
        """Token ids of each row's scored positions, [n] int64 on the CPU."""
        with self._lock:
            return [ids.long() for ids in self._by_row(self._ready().tokens)]

    def token_scores(self, name: str) -> list[Tensor]:
        """Logits of a probe, a row each: [n] for a binary probe, [n n_classes] else; float32 on the CPU."""
        with self._lock:
            return self._squeezed(name, self._by_row(self._ready(name, kept=True).logits, name))

    def running_scores(self, name: str, unit: str | None = None) -> list[Tensor]:
        """Running score after each position, NaN before the first that counts: [n] or [n n_classes].

        unit: 'probability' or 'logit' of a binary probe, whatever its pooling runs in; None is the pooling's own.
        """
        with self._lock:
            rows = self._by_row(self._ready(name, kept=True).running, name)
        return self._squeezed(name, [self._scores_of(name, row, unit) for row in rows])

    def maxima(self, name: str, unit: str | None = None) -> Tensor:
        """The highest running score of each row so far, [batch] float32 on the CPU: what a threshold is compared with.

        unit: as for `running_scores`. NaN for a row in which nothing has counted yet.
        """
        if not self.plan.probes[name].is_binary:
            raise InputError(f"probe {name!r} has {self.plan.probes[name].n_classes} classes; a maximum needs two.")
        with self._lock:
            values = self._ready(name).maxima[:, self.plan.columns[name]].cpu()
        return self._scores_of(name, values.masked_fill(values == -torch.inf, torch.nan), unit)[:, 0]

    def alarms(self) -> list[tuple[Alarm, ...]]:
        """First alarm of each binary probe in each row, by position; what a judge has cleared is none."""
        with self._lock:
            self.collect()
            self.check()
            found = first_alarms(self.events)
            return [found.get(row, ()) for row in range(self.n_rows)]

    def verdicts(self, name: str) -> list[str]:
        """For each row 'negative' or 'positive'; with a cascade also 'deferred', or what its judge said: 'confirmed',
        'cleared'."""
        with self._lock:
            self.collect()
            self._ready(name)
            found = verdicts_of(self.events, name)
            return [found.get(row, "negative") for row in range(self.n_rows)]

    def prompt_lengths(self) -> list[int]:
        """How many real tokens of each row stand in the prompt's columns."""
        with self._lock:
            self.settle()
            return self._scored.real.read()[:, : self.prompt_columns].sum(dim=1).tolist()

    def columns_from(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and real columns [batch new], logits and values of the online reductions [batch new n_columns] from a
        column on, on the CPU."""
        with self._lock:
            self.check()
            scored = self._ready(kept=True)
            parts = [history.read(start).cpu() for history in (scored.tokens, scored.real, scored.logits, scored.running)]
        return parts[0], parts[1], parts[2], parts[3]

    def check(self) -> None:
        """Raise MonitorError where anything that this run says would be wrong; this waits for the device."""
        with self._lock:
            if self._columns is not None:
                for name in self.plan.probes if self._ready().not_finite.any() else ():
                    self._check_finite(name)

    def _ready(self, name: str | None = None, *, kept: bool = False) -> LiveColumns:
        """The columns, settled and checked: the rows, and the scores of this probe."""
        scored = self._scored
        if kept and not self._keep_scores:
            raise MonitorError("scores of single tokens were not kept: the probes were attached with keep_scores=False.")
        scored.advance()
        scored.rows.check()
        moved = [] if self._moved is None else self._moved.nonzero().flatten().tolist()
        if moved:
            raise MonitorError(
                f"rows {moved} of the KV cache were replaced by others between two steps, as beam search does, so scores of "
                "one text went on with another. Generate without reordering the cache while probes are attached, or score "
                "the finished text with score_prompts."
            )
        defied = scored.defied.nonzero().flatten().tolist()
        if defied:
            raise MonitorError(
                f"row {defied[0]} was to end at an alarm (stop=True), but generation put another token in the place of its "
                f"end-of-sequence token {self._ends.end_ids[0]}: something forbids that token (min_new_tokens, "
                "suppress_tokens). Generate without it, or stop with monitor.stopping_criteria()."
            )
        if name is not None:
            self._check_finite(name)
        return scored

    def _check_finite(self, name: str) -> None:
        scored, columns = self._scored, self.plan.columns[name]
        rows = scored.not_finite[:, columns].any(dim=1).nonzero().flatten().tolist()
        if not rows:
            return
        where = f"row {rows[0]}"
        if self._keep_scores:
            finite = scored.logits.read()[rows[0], :, columns].isfinite().all(dim=-1)[scored.real.read()[rows[0]]]
            where = f"position {int(finite.int().argmin())} of row {rows[0]}"
        raise MonitorError(
            f"the logit of probe {name!r} is not finite at {where}: the activations there hold NaN or inf (an overflow in "
            "float16, for instance), or are so large that the probe's own numbers overflow."
        )

    def _by_row(self, history: History, name: str | None = None) -> list[Tensor]:
        """What a history holds of each row's real columns [n], or of a probe's scores in it [n n_outputs], on the CPU."""
        values, real = history.read(), self._scored.real.read().cpu()
        if name is not None:
            values = values[..., self.plan.columns[name]]
        values = values.cpu()
        return [values[row][real[row]] for row in range(self.n_rows)]

    def _scores_of(self, name: str, values: Tensor, unit: str | None) -> Tensor:
        """Values of the online reduction [n n_outputs] as scores."""
        if unit is None:
            return self.plan.group_of(name).leave(values)
        if unit not in ("probability", "logit") or not self.plan.probes[name].is_binary:
            raise InputError(f"unit is {unit!r}; expected 'logit' or 'probability' for a probe with two classes, or None.")
        return self.plan.reductions[name].in_unit(values, unit)

    def _squeezed(self, name: str, rows: list[Tensor]) -> list[Tensor]:
        return [values[:, 0] if self.plan.probes[name].is_binary else values for values in rows]
