"""Labels of prompts or of tokens, checked and turned into one numpy array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lmprobe_tl.errors import InputError

_EXPECTED = "expected one int, bool or str a prompt, as a list, a numpy array or a torch tensor"


def check_labels(labels: Any, n_prompts: int) -> np.ndarray:
    """One label a prompt as [n_prompts] of int64, bool or str.

    InputError for another length, fractions, NaN, None, mixed types, or more than one axis.
    """
    array = _as_array(labels, "labels")
    if array.ndim != 1:
        raise InputError(f"labels has shape {array.shape}; {_EXPECTED}.")
    if len(array) != n_prompts:
        raise InputError(f"{n_prompts} prompts but {len(array)} labels; {_EXPECTED}.")
    return array


def check_classes(labels: np.ndarray) -> np.ndarray:
    """The sorted distinct labels, at least two of them; with two, the second is the positive class."""
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(f"all labels are {classes[0].item()!r}; a probe needs examples of at least two classes.")
    return classes


def are_token_labels(labels: Any) -> bool:
    """Whether labels hold one sequence a prompt (one label a token) and not one label a prompt."""
    if isinstance(labels, (Tensor, np.ndarray)):
        return labels.ndim == 2
    return isinstance(labels, Sequence) and len(labels) > 0 and all(_is_sequence(item) for item in labels)


def _is_sequence(item: Any) -> bool:
    if isinstance(item, (Tensor, np.ndarray)):
        return item.ndim == 1
    return isinstance(item, (list, tuple))


def check_token_labels(labels: Any, lengths: Sequence[int]) -> list[np.ndarray]:
    """One array a prompt with one label a token that counts; `lengths` says how many these are."""
    if len(labels) != len(lengths):
        raise InputError(f"{len(lengths)} prompts but {len(labels)} sequences of token labels.")
    arrays = [_as_array(row, f"labels[{index}]") for index, row in enumerate(labels)]
    for index, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
        if array.ndim != 1 or len(array) != length:
            raise InputError(
                f"labels[{index}] has {array.size} token labels, but prompt {index} has {length} tokens that count "
                "(BOS does not, unless include_bos=True); tokenize with the model's own tokenizer to line them up."
            )
    kinds = {array.dtype.kind for array in arrays if array.size}
    if len(kinds) > 1:
        raise InputError(f"the token labels mix types ({sorted(kinds)}); {_EXPECTED}.")
    return arrays


def _as_array(labels: Any, name: str) -> np.ndarray:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().float().numpy() if labels.is_floating_point() else labels.detach().cpu().numpy()
    if isinstance(labels, (str, bytes, Mapping, set, frozenset)) or not hasattr(labels, "__len__"):
        raise InputError(f"{name} is {labels!r}; {_EXPECTED}.")
    if not isinstance(labels, np.ndarray):
        labels = _array_of_list(list(labels), name)
    if labels.dtype.kind == "O" and labels.ndim == 1:
        labels = _array_of_list(labels.tolist(), name)
    if labels.dtype.kind in "fu":
        return _whole_numbers(labels, name)
    if labels.dtype.kind not in "biU":
        raise InputError(f"{name} has dtype {labels.dtype} and shape {labels.shape}; {_EXPECTED}.")
    return labels.astype(np.int64) if labels.dtype.kind == "i" else labels


def _array_of_list(items: list[Any], name: str) -> np.ndarray:
    items = [
        item.item() if isinstance(item, (np.generic, Tensor)) and getattr(item, "ndim", 0) == 0 else item for item in items
    ]
    kinds = {bool if isinstance(item, bool) else type(item) for item in items}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"{name} holds values of type {shown}; {_EXPECTED}, all of one type.")
    return np.array(items)


def _whole_numbers(labels: np.ndarray, name: str) -> np.ndarray:
    # NaN equals nothing, and int64 would wrap what is larger.
    wrong = labels[~((labels == np.floor(labels)) & (np.abs(labels) < np.float64(2**63)))]
    if wrong.size:
        raise InputError(f"{name} holds {wrong.flat[0]}, which is no class; {_EXPECTED}. Turn scores into classes first.")
    return labels.astype(np.int64)
