"""Score prompts with probe files: no estimator, no scikit-learn, the same code as live scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.attach import attach_probes
from lmprobe_tl.errors import InputError
from lmprobe_tl.given_probes import as_probes, as_weights, recorded_prepend_bos
from lmprobe_tl.hook_points import device_of, load_model, run_to_hook_points
from lmprobe_tl.live.reduction import live_reduction
from lmprobe_tl.live.watches import threshold_of
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.probe_spec import ThresholdUnit
from lmprobe_tl.tokens import (
    Prompt,
    Truncation,
    batches_by_length,
    bos_id,
    check_rows_count,
    counted_lengths,
    pad_id,
    pad_rows,
    token_budget,
    tokenize_prompts,
)
from lmprobe_tl.weights import ProbeWeights


@dataclass(frozen=True)
class PromptScores:
    """Scores of one probe, in the order of the prompts.

    scores: the probe's inference pooling of each prompt, [n_prompts] (binary: probability of the positive class, or logit
    for the streaming reductions on logits) or [n_prompts n_classes].
    In float32, in which all probabilities beyond a logit of 17 are 1: rank very confident ones by their logits.
    token_logits: one tensor a prompt, [n] or [n n_classes], an entry for each token, BOS included.
    flagged: whether each score reaches the probe's threshold, [n_prompts] bool, compared in the threshold's own unit, where
    live runs compare; None with several classes. (Live, an alarm stays raised where a later score falls again.)
    """

    scores: Tensor
    token_logits: list[Tensor]
    flagged: Tensor | None = None


def score_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    probes: Any,
    *,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
    strict: bool = False,
) -> dict[str, PromptScores]:
    """Scores by probe name; the model runs to the last hook point of the probes and no further.

    probes: as in `attach_probes`. prepend_bos: None does as the probe files say. max_tokens_per_batch, batch_size: as in
    `extract_activations`.

    >>> score_prompts(model, ["One.", "Two."], "deceit.safetensors")["deceit"].scores  # doctest: +SKIP
    tensor([0.02, 0.97])
    """
    model, loaded = load_model(model), as_probes(probes)
    rows = prompt_rows(model, prompts, loaded, prepend_bos=prepend_bos, max_length=max_length, truncation=truncation)
    scores: dict[str, list[Any]] = {weights.name: [None] * len(rows) for weights in loaded}
    logits: dict[str, list[Any]] = {weights.name: [None] * len(rows) for weights in loaded}
    flagged = {weights.name: torch.zeros(len(rows), dtype=torch.bool) for weights in loaded if weights.is_binary}

    def read(indices: list[int], monitor: Monitor) -> None:
        for weights in loaded:
            running = monitor.running_scores(weights.name)
            for index, one_running, one_logits in zip(indices, running, monitor.token_scores(weights.name), strict=True):
                scores[weights.name][index], logits[weights.name][index] = one_running[-1], one_logits
            if weights.is_binary:
                value, unit = threshold_of(weights)
                last = torch.stack([row[-1] for row in monitor.running_scores(weights.name, unit)])
                flagged[weights.name][indices] = last >= torch.tensor(value, dtype=last.dtype)

    score_batches(
        model,
        rows,
        loaded,
        read,
        max_tokens_per_batch=max_tokens_per_batch,
        batch_size=batch_size,
        progress=progress,
        strict=strict,
    )
    return {name: PromptScores(torch.stack(scores[name]), logits[name], flagged.get(name)) for name in scores}


def sequence_maxima(
    model: Any,
    prompts: Sequence[Prompt],
    probe: Any,
    *,
    unit: ThresholdUnit | None = None,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
    strict: bool = False,
) -> Tensor:
    """The running maximum of a probe's live score over each whole prompt, [n_prompts] float32 on the CPU.

    A live run over the prompt raises an alarm exactly where this reaches the threshold. unit: 'logit', 'probability', or
    None for `live_unit(weights)`, in which thresholds are calibrated. The rest as in `score_prompts`.

    Raises InputError for a probe with more than two classes.
    """
    model, (weights,) = load_model(model), as_probes(as_weights(probe))
    unit = live_unit(weights) if unit is None else unit
    rows = prompt_rows(model, prompts, [weights], prepend_bos=prepend_bos, max_length=max_length, truncation=truncation)
    maxima = torch.empty(len(rows))

    def read(indices: list[int], monitor: Monitor) -> None:
        maxima[indices] = monitor.runs[-1].maxima(weights.name, unit)

    score_batches(
        model,
        rows,
        [weights],
        read,
        max_tokens_per_batch=max_tokens_per_batch,
        batch_size=batch_size,
        progress=progress,
        strict=strict,
    )
    return maxima


def live_unit(weights: ProbeWeights) -> ThresholdUnit:
    """The unit that a binary probe's live score is computed in, where nothing is rounded away: 'logit', or 'probability' for
    means of probabilities."""
    if not weights.is_binary:
        raise InputError(
            f"probe {weights.name!r} has {weights.n_classes} classes; a threshold needs a probe with two (one score)."
        )
    return live_reduction(weights).own_unit


def prompt_rows(
    model: Any,
    prompts: Sequence[Prompt],
    probes: Sequence[ProbeWeights],
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
) -> list[list[int]]:
    """Token ids of each prompt as the probes want them; EmptyMaskError naming prompts in which no token counts."""
    prepend = recorded_prepend_bos(probes) if prepend_bos is None else prepend_bos
    rows = tokenize_prompts(model, prompts, prepend_bos=prepend, max_length=max_length, truncation=truncation)
    sees_bos = all(live_reduction(weights).counts_bos for weights in probes)
    check_rows_count(counted_lengths(rows, bos_id(model), sees_bos))
    return rows


def score_batches(
    model: Any,
    rows: Sequence[Sequence[int]],
    probes: Sequence[ProbeWeights],
    read: Callable[[list[int], Monitor], None],
    *,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    strict: bool = False,
) -> None:
    """Run the model over all rows, longest first, to the last hook point of the probes and no further.

    read: called after each batch with the indices of its rows and the Monitor whose last run has their scores.
    """
    hidden = None if progress is None else not progress
    hook_names = list(dict.fromkeys(name for weights in probes for name in weights.hook_points))
    with (
        attach_probes(model, list(probes), strict=strict) as monitor,
        tqdm(total=len(rows), desc="scores", unit="prompt", disable=hidden, leave=False) as bar,
    ):
        budget = token_budget(model, max_tokens_per_batch)
        for indices in batches_by_length([len(row) for row in rows], batch_size, max_tokens=budget):
            tokens, mask = pad_rows([rows[index] for index in indices], pad_token_id=pad_id(model), device=device_of(model))
            monitor.begin_run()
            run_to_hook_points(model, tokens, mask, dict.fromkeys(hook_names, _pass_by))
            read(indices, monitor)
            del monitor.runs[:-1]  # what was read need not stay in memory
            bar.update(len(indices))


def _pass_by(activations: Tensor) -> None:
    """The attached probes have read the activations already."""
