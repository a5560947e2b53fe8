"""Scores of one generation, kept on the model's device until they are read."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.crossings import Crossings
from lmprobe_tl.errors import InputError, MonitorError
from lmprobe_tl.history import History
from lmprobe_tl.hook_points import ForwardCall
from lmprobe_tl.live_records import Alarm, first_alarms, verdicts_of
from lmprobe_tl.live_rows import LiveRows, RowEnds
from lmprobe_tl.reductions import make_online
from lmprobe_tl.scoring_plan import ScoringPlan

# Columns that wait before reductions take them all at once; where somebody watches, each is taken when it comes.
_WAITING = 64


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
        self.mark: tuple[int, Tensor] | None = None  # how long that cache was, and its newest key, [batch d_head]
        self._bos, self._ends, self._keep_scores = bos_token_id, ends, keep_scores
        self._lock = threading.RLock()
        self._waiting: list[tuple[Tensor, Tensor | None, Tensor]] = []  # tokens, mask, logits of the last columns
        self._waiting_generated = False
        self._tokens, self._real, self._logits, self._running = History(), History(), History(), History()
        self._rows: LiveRows | None = None
        self._moved: Tensor | None = None  # [batch] bool

    # --- while the model runs: nothing here waits for the device ---

    def extends(self, call: ForwardCall) -> bool:
        """Whether a forward pass from column 0 on recomputes this run's tokens and adds one, as generation without a cache
        does. More than one are a new prompt, for instance the next turn of a chat. (This one does wait for the device.)"""
        if self._rows is None or call.tokens.shape != (self.n_rows, self.n_columns + 1):
            return False
        with self._lock:
            self.advance()
            if (self._rows.ended | self._rows.stopped).all():
                return False  # this generation was over: what follows is another
            return torch.equal(call.tokens[:, : self.n_columns], self._tokens.read().to(call.tokens.dtype))

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
        if self._rows is not None and call.tokens.shape[0] != self.n_rows:
            raise MonitorError(f"the batch went from {self.n_rows} to {call.tokens.shape[0]} rows within one generation.")
        return self.n_columns - call.start

    def add(self, call: ForwardCall, logits: Tensor) -> None:
        """Take in the logits [batch new n_columns] of the columns of a forward pass that were not scored before."""
        with self._lock:
            skip = self.new_columns(call)
            tokens = call.tokens[:, skip:].clone()  # a view would keep the whole batch of tokens alive
            mask = call.attention_mask
            if mask is not None:
                mask = mask[:, call.start + skip :].to(tokens.device, torch.bool, copy=True)
            n_columns = call.start + call.tokens.shape[1]
            if self._rows is None:
                self._begin(tokens)
            # A generated token comes alone. In a prompt an EOS has no meaning.
            generated = self.n_columns > 0 and tokens.shape[1] == 1
            if not generated or not self._waiting_generated or len(self._waiting) >= _WAITING:
                self.advance()
            if not generated and self.prompt_columns == self.n_columns:
                self.prompt_columns = n_columns
            self._waiting.append((tokens, mask, logits))
            self._waiting_generated = generated
            self.n_columns = n_columns

    def _begin(self, tokens: Tensor) -> None:
        n_rows, device = tokens.shape[0], tokens.device
        groups = self.plan.groups
        counts_bos = all(group.reduction.counts_bos for group in groups)
        self._rows = LiveRows(n_rows, device, self._bos, self._ends, counts_bos)
        self._crossings = Crossings(self.plan, n_rows, device)
        self._not_finite = torch.zeros(n_rows, self.plan.n_columns, dtype=torch.bool, device=device)
        self._maxima = torch.full((n_rows, self.plan.n_columns), torch.nan, device=device)
        self._online: list[Any] = [
            make_online(group.reduction.name, group.reduction.parameter, n_rows, group.n_columns, device) for group in groups
        ]

    def advance(self) -> None:
        """Bring rows, running scores and crossings up to the last column."""
        with self._lock:
            if not self._waiting or self._rows is None:
                return
            tokens, mask, logits = self._take_waiting()
            take = self._rows.generated if self._waiting_generated else self._rows.prompt
            real, counted = take(tokens, mask)
            running = self._reduce(logits, real, counted)
            self._not_finite = self._not_finite | (~logits.isfinite() & real[..., None]).any(dim=1)
            self._crossings.update(running, logits, self._tokens.n_columns)
            highest = running[:, 0] if running.shape[1] == 1 else running.nan_to_num(nan=-torch.inf).amax(dim=1)
            self._maxima = torch.fmax(self._maxima, highest)
            self._tokens.append(tokens.int())
            self._real.append(real)
            if self._keep_scores:
                self._logits.append(logits)
                self._running.append(running)

    def note_moved_rows(self, moved: Tensor) -> None:
        """[batch] bool: rows of the cache that hold other tokens than in the last pass."""
        self._moved = moved if self._moved is None else self._moved | moved

    def _take_waiting(self) -> tuple[Tensor, Tensor, Tensor]:
        waiting, self._waiting = self._waiting, []
        tokens, masks, logits = zip(*waiting, strict=True)
        filled = [
            torch.ones_like(ids, dtype=torch.bool) if mask is None else mask for ids, mask in zip(tokens, masks, strict=True)
        ]
        if len(waiting) == 1:
            return tokens[0], filled[0], logits[0]
        return torch.cat(tokens, dim=1), torch.cat(filled, dim=1), torch.cat(logits, dim=1)

    def _reduce(self, logits: Tensor, real: Tensor, counted: Tensor) -> Tensor:
        """Values of the online reductions after each of the next columns, [batch new n_columns]."""
        parts = [
            online.update(group.enter(logits[..., group.columns]), real if group.reduction.counts_bos else counted)
            for group, online in zip(self.plan.groups, self._online, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def rows_to_stop(self) -> Tensor:
        """[batch] bool: rows in which some probe's running score has reached its threshold, or a judge confirmed an
        alarm."""
        with self._lock:
            self.advance()
            confirmed = {event.row for event in self.events if event.verdict == "confirmed"}
            alarmed = self._crossings.alarmed()
            for row in confirmed:
                alarmed[row] = True
            return alarmed

    def stop_rows(self) -> Tensor:
        """The rows to stop, [batch] bool. Later columns of these do not count."""
        with self._lock:
            stopping = self.rows_to_stop()
            self._state.stop(stopping)
            return stopping

    def force_rows(self) -> Tensor:
        """The rows to stop, [batch] bool, of which the next token has to be an EOS."""
        with self._lock:
            stopping = self.rows_to_stop()
            self._state.force(stopping)
            return stopping

    def collect(self) -> list[Alarm]:
        """Crossings since the last call, as events; this waits for the device."""
        with self._lock:
            self.advance()
            found = self._crossings.collect()
            new = self._alarms_at(found) if found else []
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
            return judged

    def _alarms_at(self, found: list[tuple[int, int, int, float, float]]) -> list[Alarm]:
        first = min(entry[2] for entry in found)
        tokens = self._tokens.read(first).cpu()
        real = self._real.read().cpu()
        alarms = []
        for row, line, column, logit, value in found:
            watch = self.plan.watches.lines[line]
            score = self.plan.reductions[watch.probe].in_unit(torch.tensor(value, dtype=torch.float32), watch.unit).item()
            alarms.append(
                Alarm(
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
            )
        return alarms

    # --- when scores are read ---

    @property
    def _state(self) -> LiveRows:
        if self._rows is None:
            raise MonitorError("this run has no forward pass yet.")
        return self._rows

    @property
    def n_rows(self) -> int:
        return 0 if self._rows is None else self._rows.ended.shape[0]

    def tokens(self) -> list[Tensor]:
        """Token ids of each row's scored positions, [n] int64 on the CPU."""
        return [ids.long() for ids in self._by_row(self._tokens)]

    def token_scores(self, name: str) -> list[Tensor]:
        """Logits of a probe, a row each: [n] for a binary probe, [n n_classes] else; float32 on the CPU."""
        self._check_kept()
        return self._squeezed(name, self._by_row(self._logits, name))

    def running_scores(self, name: str, unit: str | None = None) -> list[Tensor]:
        """Running score after each position, NaN before the first that counts: [n] or [n n_classes].

        unit: 'probability' or 'logit' of a binary probe, whatever its pooling runs in; None is the pooling's own.
        """
        self._check_kept()
        return self._squeezed(name, [self._scores_of(name, row, unit) for row in self._by_row(self._running, name)])

    def maxima(self, name: str, unit: str | None = None) -> Tensor:
        """The highest running score of each row so far, [batch] float32 on the CPU: what a threshold is compared with.

        unit: as for `running_scores`. NaN for a row in which nothing has counted yet.
        """
        if not self.plan.probes[name].is_binary:
            raise InputError(f"probe {name!r} has {self.plan.probes[name].n_classes} classes; a maximum needs two.")
        with self._lock:
            self.advance()
            self._check()
            self._check_finite(name)
            values = self._maxima[:, self.plan.columns[name]].cpu()
        return self._scores_of(name, values, unit)[:, 0]

    def alarms(self) -> list[tuple[Alarm, ...]]:
        """First alarm of each binary probe in each row, by position; what a judge has cleared is none."""
        with self._lock:
            self.collect()
            self._check()
            self._check_finite()
            found = first_alarms(self.events)
            return [found.get(row, ()) for row in range(self.n_rows)]

    def verdicts(self, name: str) -> list[str]:
        """For each row 'negative' or 'positive'; with a cascade also 'deferred', or what its judge said: 'confirmed',
        'cleared'."""
        with self._lock:
            self.collect()
            self._check()
            self._check_finite(name)
            found = verdicts_of(self.events, name)
            return [found.get(row, "negative") for row in range(self.n_rows)]

    def prompt_lengths(self) -> list[int]:
        """How many real tokens of each row stand in the prompt's columns."""
        with self._lock:
            self.advance()
            return self._real.read()[:, : self.prompt_columns].sum(dim=1).tolist()

    def columns_from(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens and real columns [batch new], logits and values of the online reductions [batch new n_columns] from a
        column on, on the CPU."""
        self._check_kept()
        with self._lock:
            self.advance()
            self._check()
            self._check_finite()
            parts = [history.read(start).cpu() for history in (self._tokens, self._real, self._logits, self._running)]
        return parts[0], parts[1], parts[2], parts[3]

    def _scores_of(self, name: str, values: Tensor, unit: str | None) -> Tensor:
        """Values of the online reduction [n n_outputs] as scores."""
        if unit is None:
            return self.plan.group_of(name).leave(values)
        if unit not in ("probability", "logit") or not self.plan.probes[name].is_binary:
            raise InputError(
                f"unit is {unit!r} for probe {name!r} of {self.plan.probes[name].n_classes} classes; expected None, or "
                "'probability' or 'logit' for a probe of two."
            )
        return self.plan.reductions[name].in_unit(values, unit)

    def _squeezed(self, name: str, rows: list[Tensor]) -> list[Tensor]:
        return [values[:, 0] if self.plan.probes[name].is_binary else values for values in rows]

    def _by_row(self, history: History, name: str | None = None) -> list[Tensor]:
        """What a history holds of each row's real columns [n], or of a probe's scores in it [n n_outputs], on the CPU."""
        with self._lock:
            self.advance()
            self._check()
            values, real = history.read(), self._real.read().cpu()
            if name is not None:
                self._check_finite(name)
                values = values[..., self.plan.columns[name]]
            values = values.cpu()
        return [values[row][real[row]] for row in range(self.n_rows)]

    def check(self) -> None:
        """Raise MonitorError where anything that this run says would be wrong; this waits for the device."""
        with self._lock:
            if self._rows is not None:
                self.advance()
                self._check()
                self._check_finite()

    def _check(self) -> None:
        self._state.check()
        moved = [] if self._moved is None else self._moved.nonzero().flatten().tolist()
        if moved:
            raise MonitorError(
                f"rows {moved} of the KV cache were replaced by others between two steps, as beam search does, so scores of "
                "one text went on with another. Generate without reordering the cache while probes are attached, or score "
                "the finished text with score_prompts."
            )

    def _check_finite(self, probe: str | None = None) -> None:
        """Raise MonitorError where a logit of this probe, or of any, is NaN or infinite."""
        if not self._not_finite.any():
            return
        for name in (probe,) if probe is not None else self.plan.columns:
            columns = self.plan.columns[name]
            rows = self._not_finite[:, columns].any(dim=1).nonzero().flatten().tolist()
            if not rows:
                continue
            where = f"row {rows[0]}"
            if self._keep_scores:
                finite = self._logits.read()[rows[0], :, columns].isfinite().all(dim=-1)[self._real.read()[rows[0]]]
                where = f"position {int(finite.int().argmin())} of row {rows[0]}"
            raise MonitorError(
                f"the logit of probe {name!r} is not finite at {where}: the activations there hold NaN or inf (an overflow "
                "in float16, for instance)."
            )

    def _check_kept(self) -> None:
        if not self._keep_scores:
            raise MonitorError("scores of single tokens were not kept: the probes were attached with keep_scores=False.")
