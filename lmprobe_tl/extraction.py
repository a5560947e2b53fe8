"""Prompts to activations of the wanted hook points, pooled batch by batch while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.errors import InputError
from lmprobe_tl.hook_points import (
    HookPoints,
    device_of,
    end_of_sequence_ids,
    load_model,
    resolve_hook_points,
    run_to_hook_points,
)
from lmprobe_tl.pooling import PoolingStrategy, get_pooling_fn, parse_pooling_strategy, pool_eos
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
    without_bos,
)

# These pick one of all real tokens; all others leave BOS out unless it is included.
_SEES_BOS = ("last_token", "first_token")


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


@dataclass(frozen=True)
class Batch:
    """One batch on its way through the model: `indices` of its prompts, `tokens`, `attention_mask` (real tokens, int64) and
    `counted` (real tokens without BOS, bool), all [batch pos] on the model's device."""

    indices: list[int]
    tokens: Tensor
    attention_mask: Tensor
    counted: Tensor


Reduce = Callable[[Tensor, Batch], Tensor]


def extract_activations(
    model: Any,
    prompts: Sequence[Prompt],
    hook_points: HookPoints = "all",
    pooling: str | PoolingStrategy = "last_token",
    *,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
    include_bos: bool = False,
    max_length: int | None = None,
    truncation: Truncation = None,
    progress: bool | None = None,
) -> ExtractedActivations:
    """Pooled activations of the prompts at all wanted hook points, in one pass that stops after the last of them.

    hook_points: see `resolve_hook_points`. pooling: 'last_token', 'first_token', 'mean', 'max', 'min', 'eos', 'all', or a
    callable `(activations, attention_mask) -> [batch d_model]`. Unless `include_bos`, BOS counts for 'last_token' and
    'first_token' only, and a prompt needs another token. Prompts are batched by length; unpooled activations of one batch
    at most are in memory, in float32.
    progress: None shows a bar on a terminal, True always, False never.

    Raises InputError for prompts or names that cannot be used, EmptyMaskError and PromptTooLongError naming the prompts.

    >>> acts = extract_activations(model, ["One.", "Two."], hook_points=[3, 6], pooling="mean")  # doctest: +SKIP
    >>> acts.values["blocks.6.hook_resid_post"].shape  # doctest: +SKIP
    torch.Size([2, 768])
    """
    model = load_model(model)
    names = resolve_hook_points(model, hook_points)
    rows = tokenize_prompts(model, prompts, prepend_bos=prepend_bos, max_length=max_length, truncation=truncation)
    return extract_rows(model, rows, names, pooling, batch_size=batch_size, include_bos=include_bos, progress=progress)


def extract_rows(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    pooling: str | PoolingStrategy,
    *,
    batch_size: int = 8,
    include_bos: bool = False,
    centre: bool = False,
    progress: bool | None = None,
) -> ExtractedActivations:
    """`extract_activations` for rows of token ids and full hook names. centre: subtract each token's mean over d_model
    first."""
    strategy = activation_strategy(pooling)
    named = None if callable(pooling) else strategy  # a callable may be called 'all', too
    sees_bos = include_bos or named in _SEES_BOS
    lengths = counted_lengths(rows, bos_id(model), include_bos)
    check_rows_count(lengths)
    if named == "eos":
        _check_rows_have_eos(model, rows)
    keep = _keep_tokens(sees_bos) if named == "all" else _pool_rows(model, pooling, sees_bos)
    found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(rows) for name in hook_names}
    for batch, kept in run_batches(model, rows, hook_names, keep, batch_size=batch_size, centre=centre, progress=progress):
        for name, reduced in kept.items():
            parts = reduced.split([lengths[index] for index in batch.indices]) if named == "all" else reduced.split(1)
            for index, part in zip(batch.indices, parts, strict=True):
                found[name][index] = part
    offsets = torch.tensor([0, *lengths]).cumsum(0) if named == "all" else None
    # Popped one by one, so that the pieces of one hook point at most are held twice.
    values = {name: torch.cat(found.pop(name)) for name in list(found)}
    return ExtractedActivations(values, strategy, rows, offsets)


def activation_strategy(pooling: str | PoolingStrategy) -> str:
    """Name of an activation-level pooling; InputError for one that pools scores, which extraction does not have."""
    if callable(pooling):
        return getattr(pooling, "__name__", type(pooling).__name__)
    parsed = parse_pooling_strategy(pooling)
    bare_extreme = parsed.base_strategy in ("max", "min") and ":" not in pooling
    if parsed.is_score_pooling and not bare_extreme:
        raise InputError(
            f"pooling {pooling!r} reduces scores, and extraction has none; expected an activation-level strategy."
        )
    return parsed.base_strategy


def _check_rows_have_eos(model: Any, rows: list[list[int]]) -> None:
    # A leading BOS ends nothing, though GPT-2 has one id for BOS and EOS.
    ids, bos = set(end_of_sequence_ids(model)), bos_id(model)
    without = [index for index, row in enumerate(rows) if ids.isdisjoint(row[1:] if row[:1] == [bos] else row)]
    if without:
        raise InputError(
            f"pooling 'eos', but no token of prompt {without[0]} is EOS (ids {sorted(ids)}); {len(without)} such prompts."
        )


def _keep_tokens(sees_bos: bool) -> Reduce:
    def keep(activations: Tensor, batch: Batch) -> Tensor:
        return activations[batch.attention_mask.bool() if sees_bos else batch.counted].cpu()

    return keep


def _pool_rows(model: Any, pooling: str | PoolingStrategy, sees_bos: bool) -> Reduce:
    def pool(activations: Tensor, batch: Batch) -> Tensor:
        mask = batch.attention_mask.bool() if sees_bos else batch.counted
        if callable(pooling):
            # Copies for code that is not ours: what it writes in place would reach the later layers.
            activations, mask = activations.clone(), mask.clone()
        pooled = pooling_function(model, pooling, batch)(activations, mask)
        expected = (activations.shape[0], activations.shape[2])
        if not isinstance(pooled, Tensor) or pooled.shape != expected:
            shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise InputError(
                f"the pooling callable returned {shape}; expected one vector a row, {expected} = [batch d_model]."
            )
        # A copy: a callable's slice would keep the batch's unpooled activations in memory.
        return pooled.float().cpu().clone()

    return pool


def pooling_function(model: Any, pooling: str | PoolingStrategy, batch: Batch) -> PoolingStrategy:
    """The function of an activation-level strategy; 'eos' is given the batch's tokens."""
    if callable(pooling):
        return pooling
    strategy = parse_pooling_strategy(pooling).base_strategy
    if strategy == "eos":
        return partial(pool_eos, tokens=batch.tokens, eos_token_id=end_of_sequence_ids(model))
    return get_pooling_fn(f"activation:{strategy}")


def run_batches(
    model: Any,
    rows: list[list[int]],
    hook_names: Sequence[str],
    keep: Reduce,
    *,
    batch_size: int = 8,
    sort_by_length: bool = True,
    padding_side: str = "right",
    centre: bool = False,
    progress: bool | None = None,
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Run the rows through the model; yield each batch with what `keep` made of its activations, by hook name.

    keep: (activations [batch pos d_model] float32, batch) -> what to hold on to; it runs inside the forward pass.
    """
    batches = list(batches_by_length([len(row) for row in rows], batch_size, sort=sort_by_length))
    device, bos = device_of(model), bos_id(model)
    hidden = None if progress is None else not progress
    with tqdm(total=len(rows), desc="activations", unit="prompt", disable=hidden, leave=False) as bar:
        for indices in batches:
            tokens, mask = pad_rows(
                [rows[index] for index in indices], pad_token_id=pad_id(model), side=padding_side, device=device
            )
            batch = Batch(indices, tokens, mask, without_bos(tokens, mask, bos))
            kept: dict[str, Tensor] = {}
            callbacks = {name: partial(_keep_one, kept, name, keep, batch, centre) for name in hook_names}
            run_to_hook_points(model, tokens, mask, callbacks)
            yield batch, kept
            bar.update(len(indices))


def _keep_one(kept: dict[str, Tensor], name: str, keep: Reduce, batch: Batch, centre: bool, activations: Tensor) -> None:
    if activations.ndim != 3 or activations.shape[:2] != batch.tokens.shape:
        raise InputError(
            f"hook point {name!r} carries activations of shape {tuple(activations.shape)}; expected one vector a token, "
            f"[batch pos d_model] with [batch pos] = {tuple(batch.tokens.shape)}."
        )
    # float32 before pooling: sums and differences in bfloat16 lose 1 %.
    values = activations.detach().float()
    kept[name] = keep(centred(values) if centre else values, batch)


def centred(activations: Tensor) -> Tensor:
    """Activations [... d_model] less their mean over d_model."""
    return activations - reduce(activations, "... d_model -> ... 1", "mean")
