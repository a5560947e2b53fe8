"""Score prompts with probe files: no estimator, no scikit-learn, the same code as live scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.compatibility import as_probes, recorded_prepend_bos
from lmprobe_tl.hook_points import device_of, load_model, run_to_hook_points
from lmprobe_tl.live_reduction import live_reduction
from lmprobe_tl.monitor import attach_probes
from lmprobe_tl.tokens import (
    Prompt,
    Truncation,
    batches_by_length,
    bos_id,
    check_rows_count,
    counted_lengths,
    pad_id,
    pad_rows,
    tokenize_prompts,
)


@dataclass(frozen=True)
class PromptScores:
    """Scores of one probe, in the order of the prompts.

    scores: the probe's inference pooling of each prompt, [n_prompts] (binary: probability of the positive class, or logit
    for the streaming reductions on logits) or [n_prompts n_classes].
    In float32, in which all probabilities beyond a logit of 17 are 1: rank very confident ones by their logits.
    token_logits: one tensor a prompt, [n] or [n n_classes], an entry for each token, BOS included.
    """

    scores: Tensor
    token_logits: list[Tensor]


def score_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    probes: Any,
    *,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
    strict: bool = False,
) -> dict[str, PromptScores]:
    """Scores by probe name; the model runs to the last hook point of the probes and no further.

    probes: as in `attach_probes`. prepend_bos: None does as the probe files say.

    >>> score_prompts(model, ["One.", "Two."], "deceit.safetensors")["deceit"].scores  # doctest: +SKIP
    tensor([0.02, 0.97])
    """
    model = load_model(model)
    loaded = as_probes(probes)
    prepend = recorded_prepend_bos(loaded) if prepend_bos is None else prepend_bos
    rows = tokenize_prompts(model, prompts, prepend_bos=prepend, max_length=max_length, truncation=truncation)
    sees_bos = all(live_reduction(weights).counts_bos for weights in loaded)
    check_rows_count(counted_lengths(rows, bos_id(model), sees_bos))
    scores: dict[str, list[Any]] = {weights.name: [None] * len(rows) for weights in loaded}
    logits: dict[str, list[Any]] = {weights.name: [None] * len(rows) for weights in loaded}
    hidden = None if progress is None else not progress
    hook_names = list(dict.fromkeys(name for weights in loaded for name in weights.hook_points))
    with (
        attach_probes(model, loaded, strict=strict) as monitor,
        tqdm(total=len(rows), desc="scores", unit="prompt", disable=hidden, leave=False) as bar,
    ):
        for indices in batches_by_length([len(row) for row in rows], batch_size):
            tokens, mask = pad_rows([rows[index] for index in indices], pad_token_id=pad_id(model), device=device_of(model))
            monitor.begin_run()
            run_to_hook_points(model, tokens, mask, dict.fromkeys(hook_names, _pass_by))
            for weights in loaded:
                running = monitor.running_scores(weights.name)
                for index, one_running, one_logits in zip(indices, running, monitor.token_scores(weights.name), strict=True):
                    scores[weights.name][index], logits[weights.name][index] = one_running[-1], one_logits
            del monitor.runs[:-1]  # what was read need not stay in memory
            bar.update(len(indices))
    return {name: PromptScores(torch.stack(scores[name]), logits[name]) for name in scores}


def _pass_by(activations: Tensor) -> None:
    """The attached probes have read the activations already."""
