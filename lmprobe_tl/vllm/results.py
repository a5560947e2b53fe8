"""Scores as they come from a worker, as what the user reads: by probe, in the units of its live scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmprobe_tl.live.records import Alarm
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm.wire import Scores


@dataclass(frozen=True)
class ProbeResult:
    """What the probes say of one completion: of its prompt and of all generated tokens but the last, which never enters the
    model, so of `len(prompt) + len(generated) - 1` positions.

    probe_scores: by probe the logit of each position, float32 [n] ([n n_classes] with several classes), NaN where it is not
    known. running: the running score after each, as a Monitor gives it. alarms: the first crossing of each probe, by
    position. n_unknown: positions without a score, which took no part in the running scores. stopped_by: the probe whose
    alarm ended the generation, None where none did.
    """

    probe_scores: Mapping[str, Tensor]
    running: Mapping[str, Tensor]
    alarms: tuple[Alarm, ...]
    n_unknown: int
    stopped_by: str | None = None


def probe_result(
    plan: ScoringPlan,
    scores: Scores | None,
    token_ids: Sequence[int],
    *,
    row: int,
    n_prompt: int,
    stops: bool,
    end: int | None,
    so_far: bool = False,
) -> ProbeResult:
    """scores: None where the worker knows nothing of the completion. token_ids: of prompt and generated tokens. row: what
    alarms call the completion. stops: whether it was to end at an alarm, by the token `end`. so_far: leave off
    positions whose scores are still to come."""
    n_positions = max(len(token_ids) - 1, n_prompt)
    if so_far:
        n_positions = 0 if scores is None else min(n_positions, scores.start + scores.n)
    logits = torch.full((n_positions, plan.n_columns), torch.nan)
    values = logits.clone()
    if scores is not None:
        found = [torch.from_numpy(part[: n_positions - scores.start].copy()) for part in scores.arrays()]
        stop = scores.start + len(found[0])
        logits[scores.start : stop], values[scores.start : stop] = found
    alarms = () if scores is None else _alarms(plan, scores, token_ids[:n_positions], row)
    ended = stops and alarms and token_ids[-1:] == [end]
    return ProbeResult(
        by_probe(plan, logits),
        running_by_probe(plan, values),
        alarms,
        int((~logits.isfinite().all(dim=1)).sum()),
        alarms[0].probe if ended else None,
    )


def _alarms(plan: ScoringPlan, scores: Scores, token_ids: Sequence[int], row: int) -> tuple[Alarm, ...]:
    crossings = sorted(scores.crossings, key=lambda one: (one[1], one[0]))
    return tuple(alarm_of(plan, one, int(token_ids[one[1]]), row) for one in crossings if one[1] < len(token_ids))


def alarm_of(plan: ScoringPlan, crossing: tuple[int, int, float, float], token_id: int, row: int) -> Alarm:
    """crossing: (line, position, logit, value), as a worker tells it."""
    line, position, logit, value = crossing
    watch = plan.watches.lines[line]
    score = float(plan.reductions[watch.probe].in_unit(torch.tensor(value), watch.unit))
    return Alarm(watch.probe, row, position, token_id, logit, score, watch.value, watch.unit)


def by_probe(plan: ScoringPlan, logits: Tensor) -> dict[str, Tensor]:
    """Logits [n n_columns] as those of each probe, [n], or [n n_classes] with several classes."""
    return {name: _squeezed(plan, name, logits[:, columns]) for name, columns in plan.columns.items()}


def running_by_probe(plan: ScoringPlan, values: Tensor) -> dict[str, Tensor]:
    """Values of the online reductions [n n_columns] as running scores of each probe, shapes as in `by_probe`."""
    return {name: _running(plan, name, values[:, columns]) for name, columns in plan.columns.items()}


def set_result(target: Any, source: ProbeResult | Any) -> None:
    """Give vLLM's output the attributes of a ProbeResult."""
    for name in ProbeResult.__dataclass_fields__:
        setattr(target, name, getattr(source, name))


def _running(plan: ScoringPlan, name: str, values: Tensor) -> Tensor:
    return _squeezed(plan, name, plan.group_of(name).leave(values))


def _squeezed(plan: ScoringPlan, name: str, values: Tensor) -> Tensor:
    return values[:, 0] if plan.probes[name].is_binary else values


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of stretches that follow each other, as one."""
    logits, values = (np.concatenate(sides) for sides in zip(*(part.arrays() for part in parts), strict=True))
    return Scores(parts[0].start, len(logits), logits.tobytes(), values.tobytes(), parts[-1].crossings)
