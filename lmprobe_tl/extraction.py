"""Prompts to activations of the wanted hook points, pooled batch by batch while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from lmprobe_tl.activation_source import Engine, EngineSource, LensSource, PooledBatch, activation_source
from lmprobe_tl.batch_pooling import BatchPooler, Strategy, activation_poolings
from lmprobe_tl.errors import InputError
from lmprobe_tl.forward_batches import Batch, run_batches
from lmprobe_tl.hook_points import HookPoints, end_of_sequence_ids
from lmprobe_tl.tokens import (
    Prompt,
    Truncation,
    bos_id,
    check_rows_count,
    counted_lengths,
    tokenize_prompts,
)


@dataclass(frozen=True)
class ExtractedActivations:
    """Activations of `n_prompts` prompts, float32 on the CPU, in input order.

    values: hook name -> [n_prompts d_model]; with pooling 'all' [n_tokens d_model], where the tokens of prompt i are rows
    `offsets[i]` to `offsets[i + 1]`.
    tokens: token ids of each prompt as the model saw them, BOS included.
    """

    values: Mapping[str, Tensor]
    pooling: str
    tokens: list[list[int]]
    offsets: Tensor | None = None

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(self.values)

    def concatenated(self) -> Tensor:
        """Activations of all hook points side by side, [n_prompts n_hook_points*d_model], in the order of `hook_points`."""
        return torch.cat(list(self.values.values()), dim=-1)


class _Settings(TypedDict, total=False):
    engine: Engine | None
    max_tokens_per_batch: int | None
    batch_size: int | None
    prepend_bos: bool | None
    include_bos: bool
    max_length: int | None
    truncation: Truncation
    progress: bool | None


@overload
def extract_activations(
    model: Any,
    prompts: Sequence[Prompt],
    hook_points: HookPoints = ...,
    pooling: Strategy = ...,
    **settings: Unpack[_Settings],
) -> ExtractedActivations: ...


@overload
def extract_activations(
    model: Any,
    prompts: Sequence[Prompt],
    hook_points: HookPoints = ...,
    *,
    pooling: list[Strategy] | tuple[Strategy, ...],
    **settings: Unpack[_Settings],
) -> dict[str, ExtractedActivations]: ...


def extract_activations(
    model: Any,
    prompts: Sequence[Prompt],
    hook_points: HookPoints = "all",
    pooling: Strategy | list[Strategy] | tuple[Strategy, ...] = "last_token",
    *,
    engine: Engine | None = None,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    include_bos: bool = False,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
) -> ExtractedActivations | dict[str, ExtractedActivations]:
    """Pooled activations of the prompts at all wanted hook points, in one pass that stops after the last of them.

    hook_points: see `resolve_hook_points`. pooling: 'last_token', 'first_token', 'mean', 'max', 'min', 'eos', 'all', or a
    callable `(activations, attention_mask) -> [batch d_model]`. A list of these gives a dictionary by name, from the same
    pass. Unless `include_bos`, BOS counts for 'last_token' and 'first_token' only, and a prompt needs another token.
    max_tokens_per_batch: of one pass, pads included; None is 1,024 on a CPU and 8,192 elsewhere. Prompts of similar length
    share one. batch_size: also at most so many
    prompts. Beside the results, the unpooled activations of one layer and batch are the most that is in memory; a batch that
    does not fit is halved. Equal prompts are computed once.
    progress: None shows a bar on a terminal, True always, False never.
    engine: 'vllm' computes them in a vLLM engine, in the dtype of the model's files; model is then a name, a folder, or a
    running `lmprobe_tl.vllm.ActivationEngine`, of which 'all' hook points are those that it was started with. A pooling of
    your own gets one prompt at a time there.

    Raises InputError for prompts or names that cannot be used, and naming a prompt whose activations are not finite;
    EmptyMaskError and PromptTooLongError naming the prompts.

    >>> acts = extract_activations(model, ["One.", "Two."], hook_points=[3, 6], pooling="mean")  # doctest: +SKIP
    >>> acts.values["blocks.6.hook_resid_post"].shape  # doctest: +SKIP
    torch.Size([2, 768])
    """
    with activation_source(model, hook_points, engine, max_tokens=max_tokens_per_batch, max_rows=batch_size) as source:
        poolings: list[Strategy] = list(pooling) if isinstance(pooling, (list, tuple)) else [pooling]
        activation_poolings(poolings)  # a typing error is cheaper to find before prompts are tokenised
        rows = tokenize_prompts(source.model, prompts, prepend_bos=prepend_bos, max_length=max_length, truncation=truncation)
        found = extract_poolings(
            source.model,
            rows,
            source.hook_names,
            poolings,
            source=source,
            include_bos=include_bos,
            max_tokens_per_batch=max_tokens_per_batch,
            batch_size=batch_size,
            progress=progress,
        )
    return found if isinstance(pooling, (list, tuple)) else next(iter(found.values()))


def extract_rows(
    model: Any, rows: list[list[int]], hook_names: Sequence[str], pooling: Strategy, **settings: Any
) -> ExtractedActivations:
    """`extract_poolings` with a single pooling."""
    (found,) = extract_poolings(model, rows, hook_names, [pooling], **settings).values()
    return found


def extract_poolings(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    poolings: Sequence[Strategy],
    *,
    include_bos: bool = False,
    centre: bool = False,
    first: int = 0,
    source: LensSource | EngineSource | None = None,
    **batching: Any,
) -> dict[str, ExtractedActivations]:
    """`extract_activations` for rows of token ids, full hook names and several poolings, by name.

    centre: subtract each token's mean over d_model first. first: what errors call the first row's prompt. source: what
    computes them, if it is not the model itself. batching: as in `run_batches`.
    """
    wanted = activation_poolings(poolings)
    counts = counted_lengths(rows, bos_id(model), include_bos)
    check_rows_count(counts, first=first)
    if "eos" in poolings or "activation:eos" in poolings:
        _check_rows_have_eos(model, rows, first)
    unique, occurrences = _without_repeats(rows)
    numbers = [first + index for index in unique]
    results = {
        name: _Result(
            BatchPooler(model, strategy, include_bos=include_bos, centre=centre), [counts[index] for index in unique]
        )
        for name, strategy in wanted.items()
    }

    computed = [rows[index] for index in unique]
    batches: Iterator[PooledBatch]
    if isinstance(source, EngineSource):
        asked = list(wanted.values())
        batches = source.pooled(computed, asked, include_bos=include_bos, progress=batching.get("progress"))
    else:
        poolers = [result.pooler for result in results.values()]
        batches = _pooled_batches(model, computed, hook_names, poolers, numbers=numbers, **batching)
    for indices, kept in batches:
        for hook_name, pooled in kept.items():
            for result, values in zip(results.values(), pooled, strict=True):
                result.add(hook_name, indices, values.cpu(), [numbers[index] for index in indices])
    return {name: result.finished(rows, hook_names, occurrences) for name, result in results.items()}


def _pooled_batches(
    model: Any, rows: list[list[int]], hook_names: Sequence[str], poolers: Sequence[BatchPooler], **batching: Any
) -> Iterator[PooledBatch]:
    def keep(activations: Tensor, batch: Batch) -> list[Tensor]:
        return [pooler(activations, batch) for pooler in poolers]

    for batch, kept in run_batches(model, rows, hook_names, keep, **batching):
        yield batch.indices, kept


def _without_repeats(rows: list[list[int]]) -> tuple[list[int], Tensor | None]:
    """Index of the first of each set of equal rows, and which of these each row equals; None if all rows differ."""
    first: dict[tuple[int, ...], int] = {}
    occurrences = [first.setdefault(tuple(row), len(first)) for row in rows]
    if len(first) == len(rows):
        return list(range(len(rows))), None
    which = torch.tensor(occurrences)
    indices = torch.full((len(first),), len(rows)).scatter_reduce_(0, which, torch.arange(len(rows)), "amin")
    return indices.tolist(), which


def _check_rows_have_eos(model: Any, rows: list[list[int]], first: int) -> None:
    # A leading BOS ends nothing, though GPT-2 has one id for BOS and EOS.
    ids, bos = set(end_of_sequence_ids(model)), bos_id(model)
    without = [index for index, row in enumerate(rows, first) if ids.isdisjoint(row[1:] if row[:1] == [bos] else row)]
    if without:
        raise InputError(
            f"pooling 'eos', but no token of prompt {without[0]} is EOS (ids {sorted(ids)}); {len(without)} such prompts."
        )


class _Result:
    """Where the pooled activations of all rows go, by hook name; allocated once, filled batch by batch.

    counts: tokens of each row that count.
    """

    def __init__(self, pooler: BatchPooler, counts: list[int]) -> None:
        self.pooler = pooler
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._values: dict[str, Tensor] = {}

    def add(self, hook_name: str, indices: list[int], pooled: Tensor, prompts: list[int]) -> None:
        """pooled: of the rows `indices`, which stand for `prompts`; InputError naming one with NaN or an infinity."""
        if not torch.isfinite(pooled).all():
            self._refuse(hook_name, indices, pooled, prompts)
        n_rows = self._offsets[-1] if self.pooler.keeps_tokens else len(self._offsets) - 1
        if hook_name not in self._values:
            self._values[hook_name] = torch.empty(int(n_rows), pooled.shape[1])
        self._values[hook_name][self._places(indices)] = pooled

    def _places(self, indices: list[int]) -> Tensor:
        return token_places(self._offsets, indices) if self.pooler.keeps_tokens else torch.tensor(indices)

    def _refuse(self, hook_name: str, indices: list[int], pooled: Tensor, prompts: list[int]) -> None:
        counts = np.diff(self._offsets)[indices] if self.pooler.keeps_tokens else np.ones(len(indices), dtype=np.int64)
        row = int((~torch.isfinite(pooled)).any(dim=1).nonzero()[0])
        prompt = prompts[int(np.repeat(np.arange(len(indices)), counts)[row])]
        raise InputError(
            f"prompt {prompt} has an activation at {hook_name!r} that is NaN or infinite. A model in float16 overflows on "
            "some inputs: load it in bfloat16 or float32. Otherwise its weights are damaged, or a hook or a pooling of "
            "your own made it."
        )

    def finished(self, rows: list[list[int]], hook_names: Sequence[str], occurrences: Tensor | None) -> ExtractedActivations:
        """occurrences: which of the computed rows each prompt equals, None if each is its own."""
        values, offsets = {name: self._values[name] for name in hook_names}, self._offsets
        if occurrences is not None:
            order = occurrences.tolist()
            places = token_places(offsets, order) if self.pooler.keeps_tokens else occurrences
            # One by one, so that the rows of one hook point at most are held twice.
            self._values.clear()
            for name in hook_names:
                values[name] = values[name][places]
            offsets = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])])
        kept = torch.from_numpy(offsets) if self.pooler.keeps_tokens else None
        return ExtractedActivations(values, self.pooler.name, rows, kept)


def token_places(offsets: np.ndarray, indices: Sequence[int]) -> Tensor:
    """Positions of the tokens of rows `indices`, one after the other; row i has `offsets[i]` to `offsets[i + 1]`."""
    starts, counts = offsets[:-1][list(indices)], np.diff(offsets)[list(indices)]
    before = np.cumsum(counts) - counts
    return torch.from_numpy(np.repeat(starts - before, counts) + np.arange(counts.sum()))
