"""Rows of token ids through a model, batch by batch, with what is wanted of their activations taken inside the pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from einops import reduce
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.errors import InputError
from lmprobe_tl.hook_points import device_of, run_to_hook_points
from lmprobe_tl.tokens import batches_by_length, bos_id, pad_id, pad_rows, token_budget, without_bos


@dataclass(frozen=True)
class Batch:
    """One batch on its way through the model: `indices` of its prompts, `tokens`, `attention_mask` (real tokens, int64) and
    `counted` (real tokens without BOS, bool), all [batch pos] on the device where tokens go in."""

    indices: list[int]
    tokens: Tensor
    attention_mask: Tensor
    counted: Tensor

    def mask(self, sees_bos: bool, device: torch.device | None = None) -> Tensor:
        """[batch pos] bool: real tokens, without BOS unless `sees_bos`; on `device`, since layers may be on several."""
        return (self.attention_mask.bool() if sees_bos else self.counted).to(device)


Kept = TypeVar("Kept")
Keep = Callable[[Tensor, Batch], Kept]


def run_batches(
    model: Any,
    rows: Sequence[Sequence[int]],
    hook_names: Sequence[str],
    keep: Keep[Kept],
    *,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    sort_by_length: bool = True,
    padding_side: str = "right",
    progress: bool | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[Batch, dict[str, Kept]]]:
    """Run the rows through the model; yield each batch with what `keep` made of its activations, by hook name.

    keep: (activations [batch pos d_model] in the model's dtype, on the layer's device; batch) -> what to hold on to; it runs
    inside the forward pass and must not write to the activations.
    A batch that does not fit in the device's memory is halved, and so are later ones of its size.
    numbers: what errors call the rows' prompts; None: by the rows' own places.
    """
    lengths = [len(row) for row in rows]
    budget = token_budget(model, max_tokens_per_batch)
    waiting = deque(batches_by_length(lengths, batch_size, max_tokens=budget, sort=sort_by_length))
    fits = float("inf")  # tokens of a batch, as far as is known
    device, bos, pad = device_of(model), bos_id(model), pad_id(model)
    hidden = None if progress is None else not progress
    with tqdm(total=len(rows), desc="activations", unit="prompt", disable=hidden, leave=False) as bar:
        while waiting:
            indices = waiting.popleft()
            size = len(indices) * max(lengths[index] for index in indices)
            kept = None
            if size < fits or len(indices) == 1:
                tokens, mask = pad_rows(
                    [rows[index] for index in indices], pad_token_id=pad, side=padding_side, device=device
                )
                batch = Batch(indices, tokens, mask, without_bos(tokens, mask, bos))
                kept = _kept_if_it_fits(model, batch, hook_names, keep)
            if kept is None:
                fits = min(fits, size)
                if len(indices) == 1:
                    _refuse_alone(indices[0] if numbers is None else numbers[indices[0]], size)
                waiting.extendleft(_halves(indices))
                continue
            yield batch, kept
            bar.update(len(indices))


def _refuse_alone(prompt: int, length: int) -> NoReturn:
    raise InputError(
        f"prompt {prompt} ({length} tokens) does not fit in the device's memory, even alone. Shorten it (max_length=..., "
        "truncation=...), take fewer hook points, or a device with more memory."
    )


def _halves(indices: list[int]) -> list[list[int]]:
    """The second half first, as a deque takes them from the left."""
    middle = len(indices) // 2
    return [indices[middle:], indices[:middle]]


def _kept_if_it_fits(model: Any, batch: Batch, hook_names: Sequence[str], keep: Keep[Kept]) -> dict[str, Kept] | None:
    kept: dict[str, Kept] = {}
    try:
        run_to_hook_points(
            model,
            batch.tokens,
            batch.attention_mask,
            {name: partial(_keep_one, kept, name, keep, batch) for name in hook_names},
        )
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        kept.clear()
    if kept:
        return kept
    # Only here, where the error and the tensors that its traceback holds are gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Of CUDA, of MPS, or of the CPU, whose allocator has no error class of its own."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error).lower() for word in words)


def _keep_one(kept: dict[str, Kept], name: str, keep: Keep[Kept], batch: Batch, activations: Tensor) -> None:
    if activations.ndim != 3 or activations.shape[:2] != batch.tokens.shape:
        raise InputError(
            f"hook point {name!r} carries activations of shape {tuple(activations.shape)}; expected one vector a token, "
            f"[batch pos d_model] with [batch pos] = {tuple(batch.tokens.shape)}."
        )
    kept[name] = keep(activations.detach(), batch)


def token_activations(activations: Tensor, batch: Batch, sees_bos: bool, *, centre: bool = False) -> Tensor:
    """Activations [n_tokens d_model] of the tokens that count, row after row, in float32."""
    chosen = activations[batch.mask(sees_bos, activations.device)].float()
    return centred(chosen) if centre else chosen


def centred(activations: Tensor) -> Tensor:
    """Activations [... d_model] less their mean over d_model."""
    return activations - reduce(activations, "... d_model -> ... 1", "mean")
