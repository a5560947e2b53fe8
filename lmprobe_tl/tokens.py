"""Prompts to batches of token ids, with attention masks made from lengths and never from token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lmprobe_tl.errors import EmptyMaskError, InputError, PromptTooLongError
from lmprobe_tl.hook_points import context_length, device_of, vocabulary_size
from lmprobe_tl.probe_spec import TokenizerRecord
from lmprobe_tl.provenance import text_fingerprint, vocabulary_fingerprint
from lmprobe_tl.special_tokens import bos_id as bos_id
from lmprobe_tl.special_tokens import frame_ids
from lmprobe_tl.special_tokens import use_bos as use_bos

Chat: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = "str | Chat | Tensor | np.ndarray"
Truncation: TypeAlias = Literal["left", "right"] | None

_NAMED_ROWS = 8
# Enough for fast tokenizers to spread over the cores; of 20,000 at once they hold 76 MB beside the ids, and are no faster.
_TEXTS_AT_ONCE = 256
# Tokens of a batch, pads included. On two cores 2048 take as long, 4096 a tenth to a quarter longer, and both more memory.
# Accelerators need more to be busy.
TOKENS_ON_CPU, TOKENS_ON_ACCELERATOR = 1024, 8192


def check_prompts(prompts: Any, *, first: int = 0) -> list[Prompt]:
    """The prompts as a list. One string, one chat, an empty list or another type is an InputError that says what was
    expected.

    first: what errors call the first of them, where they are a part of a longer list; so in all of this file.
    """
    expected = "expected a list of prompts, each a string, a chat (list of role/content dicts) or a 1-D tensor of token ids"
    if isinstance(prompts, str):
        raise InputError(
            f"prompts is one string ({prompts[:40]!r}), not a list; {expected}. Write [prompt] for a single one."
        )
    if isinstance(prompts, (Mapping, set, frozenset)) or not hasattr(prompts, "__iter__"):
        raise InputError(f"prompts is a {type(prompts).__name__}; {expected}.")
    if getattr(prompts, "ndim", 1) != 1:
        raise InputError(
            f"prompts is one array of shape {tuple(prompts.shape)}; {expected}. Its rows may hold pads, which look "
            "like any other token: give a list of rows without them."
        )
    if isinstance(prompts, (Tensor, np.ndarray)) and prompts.dtype != object and not _is_text(prompts):
        raise InputError(f"prompts is one 1-D array; {expected}. Write [tokens] for a single one.")
    listed = list(prompts)
    if not listed:
        raise InputError(f"prompts is empty; {expected}.")
    for index, prompt in enumerate(listed, first):
        if isinstance(prompt, Mapping):
            raise InputError(
                f"prompts[{index}] is a single chat message; a chat is a list of messages: write [[message, ...], ...]."
            )
        if not isinstance(prompt, str) and not _is_chat(prompt) and not _is_token_array(prompt):
            raise InputError(f"prompts[{index}] is {_shown(prompt)}; {expected}.")
    return listed


def _is_text(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "UT"


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(_is_message(message) for message in prompt)


def _is_message(message: Any) -> bool:
    # A template prints a missing role or content as nothing, and None as 'None'.
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    return message.get("content") is not None or "tool_calls" in message


def _is_token_array(prompt: Any) -> bool:
    if isinstance(prompt, Tensor):
        return prompt.ndim == 1 and not prompt.is_floating_point() and prompt.dtype != torch.bool
    return isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__}, {text if len(text) <= 60 else text[:57] + '...'}"


def tokenize_prompts(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    add_generation_prompt: bool = False,
    first: int = 0,
) -> list[list[int]]:
    """Token ids of each prompt, in input order.

    prepend_bos: None takes the model's own habit (`model.cfg.default_prepend_bos`). A chat goes through the tokenizer's
    template, which brings its own BOS; text or tokens that begin with BOS get no second one; token arrays are taken as they
    are. For an encoder BOS is [CLS], and text that gets one also ends in [SEP].
    max_length: at most the model's context, and that by default. A longer prompt is a PromptTooLongError naming the rows, or
    loses tokens on the side that `truncation` names ('left' keeps a leading BOS, both an encoder's last [SEP]).
    """
    if truncation not in (None, "left", "right"):
        raise InputError(f"truncation is {truncation!r}; expected None (an error for long prompts), 'left' or 'right'.")
    prepend = use_bos(model, prepend_bos)
    rows = _token_ids(model, check_prompts(prompts, first=first), prepend, add_generation_prompt, first)
    _check_vocabulary(model, rows, first)
    limit = length_limit(model, max_length)
    too_long = [index for index, row in enumerate(rows) if limit is not None and len(row) > limit]
    if not too_long or limit is None:
        return rows
    if truncation is None:
        lengths = ", ".join(f"prompt {first + index} ({len(rows[index])} tokens)" for index in too_long[:_NAMED_ROWS])
        more = f" and {len(too_long) - _NAMED_ROWS} more" if len(too_long) > _NAMED_ROWS else ""
        raise PromptTooLongError(
            f"longer than the {limit} tokens allowed: {lengths}{more}. Shorten them, or pass truncation='left' or 'right'.",
            [first + index for index in too_long],
        )
    frame = frame_ids(model)
    return [_truncate(row, limit, truncation, bos_id(model), frame and frame[1]) for row in rows]


def pad_id(model: Any) -> int:
    """A token id to pad with; any valid one will do, since the mask alone decides."""
    tokenizer, size = getattr(model, "tokenizer", None), vocabulary_size(model)
    for found in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        # A pad token that was added to the tokenizer alone has no embedding.
        if found is not None and (size is None or found < size):
            return int(found)
    return 0


def length_limit(model: Any, max_length: int | None) -> int | None:
    """How many tokens a prompt may have, None for any number; InputError for a `max_length` that cannot be."""
    context = context_length(model)
    if max_length is None:
        return context
    whole = isinstance(max_length, int) and not isinstance(max_length, bool)
    if not whole or max_length < 1 or (context is not None and max_length > context):
        upper = "any number" if context is None else f"{context} (the model's context)"
        raise InputError(f"max_length is {max_length!r}; expected an integer from 1 to {upper}.")
    return max_length


def _check_vocabulary(model: Any, rows: Sequence[Sequence[int]], first: int) -> None:
    size = vocabulary_size(model)
    for index, row in enumerate(rows, first):
        if row and (min(row) < 0 or (size is not None and max(row) >= size)):
            wrong = next(token for token in row if token < 0 or (size is not None and token >= size))
            upper = "" if size is None else f" to {size - 1}"
            raise InputError(
                f"prompts[{index}] holds token id {wrong}, but this model's ids go from 0{upper}; use its own tokenizer."
            )


def _token_ids(
    model: Any, prompts: Sequence[Prompt], prepend: bool, add_generation_prompt: bool, first: int
) -> list[list[int]]:
    rows: list[list[int]] = [[]] * len(prompts)
    texts: dict[int, str] = {}
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, (Tensor, np.ndarray)):
            rows[index] = prompt.tolist()
        else:
            texts[index] = prompt if isinstance(prompt, str) else _chat_text(model, prompt, add_generation_prompt)
    if not texts:
        return rows
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("this model has no tokenizer, so text cannot be its prompt; pass 1-D tensors of token ids.")
    encoded = _encoded(tokenizer, list(texts.values()))
    bos, frame = bos_id(model), frame_ids(model)
    for (index, text), ids in zip(texts.items(), encoded, strict=True):
        if text.strip() and not ids:
            raise InputError(
                f"prompts[{first + index}] ({text[:40]!r}) turns into no token at all: the model's "
                f"{type(tokenizer).__name__} is empty or damaged. Load the model with its own tokenizer files."
            )
        if prepend and isinstance(prompts[index], str):  # a chat's template brings its own
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
            if frame and len(ids) > 1 and ids[-1] != frame[1]:
                ids = [*ids, frame[1]]
        rows[index] = list(ids)
    return rows


def _encoded(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    # The length is checked by the caller, against the model's own context; the mask is made of lengths.
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        yield from tokenizer(texts[start : start + _TEXTS_AT_ONCE], verbose=False, **options)["input_ids"]


def _chat_text(model: Any, chat: Any, add_generation_prompt: bool) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("this model has no tokenizer, so text cannot be its prompt; pass 1-D tensors of token ids.")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("a chat was given, but this model's tokenizer has no chat template; pass strings instead.")
    return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=add_generation_prompt)


def _truncate(row: list[int], limit: int, side: str, bos: int | None, end: int | None) -> list[int]:
    """end: what stays the last token where it is one."""
    if len(row) <= limit:
        return row
    if end is not None and row[-1] == end and limit > 1:
        return [*_truncate(row[:-1], limit - 1, side, bos, None), end]
    if side == "right":
        return row[:limit]
    if bos is not None and row[0] == bos and limit > 1:
        return [bos, *row[len(row) - limit + 1 :]]
    return row[len(row) - limit :]


def pad_rows(
    rows: Sequence[Sequence[int]], *, pad_token_id: int, side: str = "right", device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids [batch pos] (int64) and attention mask [batch pos] (int64, 1 = a real token) of rows padded on one side."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    columns = rearrange(torch.arange(longest), "pos -> 1 pos")
    ends = rearrange(lengths, "batch -> batch 1")
    real = columns < ends if side == "right" else columns >= longest - ends
    tokens = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    tokens[real] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
    return tokens.to(device), real.long().to(device)


def without_bos(tokens: Tensor, attention_mask: Tensor, bos_token_id: int | None) -> Tensor:
    """The mask [batch pos] as bool, without a row's first real token where that one is BOS.

    Later tokens with the same id stay: GPT-2's BOS is also its end-of-text.
    """
    real = attention_mask.bool()
    if bos_token_id is None or real.shape[1] == 0:
        return real
    first_real = real & (real.long().cumsum(dim=1) == 1)
    return real & ~(first_real & (tokens == bos_token_id))


def counted_lengths(rows: Sequence[Sequence[int]], bos_token_id: int | None, include_bos: bool) -> list[int]:
    """How many tokens of each row count: all, less a leading BOS unless it is included."""
    return [len(row) - (not include_bos and row[:1] == [bos_token_id]) for row in map(list, rows)]


def check_rows_count(lengths: Sequence[int], *, first: int = 0) -> None:
    """Raise EmptyMaskError naming the prompts without a single token that counts."""
    empty = [index for index, length in enumerate(lengths, first) if length == 0]
    if empty:
        named = ", ".join(str(index) for index in empty[:_NAMED_ROWS]) + (" ..." if len(empty) > _NAMED_ROWS else "")
        raise EmptyMaskError(
            f"no token counts in prompt {named}; every prompt needs at least one token beside BOS (an "
            "empty string has none).",
            empty,
        )


def batches_by_length(
    lengths: Sequence[int],
    batch_size: int | None = None,
    *,
    max_tokens: int = TOKENS_ON_CPU,
    sort: bool = True,
) -> Iterator[list[int]]:
    """Indices of the rows in batches, longest first, so that rows of a batch need little padding and the largest comes
    first.

    max_tokens: pads included, of one batch; a longer row is a batch of its own. batch_size: also at most so many rows. A
    sorted batch also ends before pads are more than a sixteenth of max_tokens: the lengths of few prompts differ much.
    """
    check_batching(batch_size, max_tokens)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index]) if sort else list(range(len(lengths)))
    batch: list[int] = []
    longest = real = 0
    for index in order:
        grown = max(longest, lengths[index])
        padded = grown * (len(batch) + 1)
        wasteful = sort and padded - real - lengths[index] > max_tokens // 16
        if batch and (padded > max_tokens or len(batch) == batch_size or wasteful):
            yield batch
            batch, grown, real = [], lengths[index], 0
        batch.append(index)
        longest, real = grown, real + lengths[index]
    if batch:
        yield batch


def token_budget(model: Any, max_tokens_per_batch: int | None) -> int:
    """The bound as given, or what suits the model's device."""
    if max_tokens_per_batch is not None:
        return max_tokens_per_batch
    return TOKENS_ON_CPU if device_of(model).type == "cpu" else TOKENS_ON_ACCELERATOR


def check_batching(batch_size: Any, max_tokens_per_batch: Any) -> None:
    """Raise InputError for bounds of a batch that cannot be."""
    check_count("max_tokens_per_batch", max_tokens_per_batch)
    if batch_size is not None:
        check_count("batch_size", batch_size)


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; expected an integer of at least 1.")


def row_digest(row: Sequence[int]) -> bytes:
    """16 bytes (BLAKE2b) that tell one row of token ids from another."""
    return hashlib.blake2b(np.asarray(row, dtype=np.int64).tobytes(), digest_size=16).digest()


def tokenizer_record(model: Any, prepend_bos: bool | None) -> TokenizerRecord:
    """What a probe file keeps of the tokenizer: a fingerprint of its vocabulary, whether BOS is prepended, the chat
    template's."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return TokenizerRecord(fingerprint=None, prepend_bos=False, chat_template_fingerprint=None)
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerRecord(
        fingerprint=vocabulary_fingerprint(tokenizer),
        prepend_bos=use_bos(model, prepend_bos),
        chat_template_fingerprint=text_fingerprint(json.dumps(template, sort_keys=True)) if template else None,
    )
