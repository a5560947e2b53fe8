"""Token sequences of unequal lengths, one after another in a single array, without padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmprobe_tl.errors import InputError

Values: TypeAlias = NDArray[Any] | Tensor


@dataclass(frozen=True, eq=False)
class TokenSequences:
    """values: [n_tokens d], any float dtype, an array or a tensor; offsets: [n_sequences+1], from 0 to n_tokens.

    Sequence i has the tokens from offsets[i] to offsets[i+1], at least one. Nothing is copied.
    Raises InputError for other shapes or dtypes, and for a sequence without tokens, naming it.

    >>> sequences = TokenSequences(np.ones((5, 2)), [0, 2, 5])
    >>> len(sequences), sequences[1].shape
    (2, (3, 2))
    """

    values: Values
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            object.__setattr__(self, "values", np.asarray(self.values))
        object.__setattr__(self, "offsets", _whole_numbers(self.offsets))
        values, offsets = self.values, self.offsets
        is_float = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
        if values.ndim != 2 or not is_float:
            raise InputError(f"values must be floats [n_tokens d], got {values.dtype} of shape {tuple(values.shape)}.")
        if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(values):
            raise InputError(
                f"offsets must be [n_sequences+1], one or more, from 0 to the number of tokens ({len(values)}); got "
                f"shape {offsets.shape}"
                + (f" from {offsets[0]} to {offsets[-1]}." if offsets.ndim == 1 and len(offsets) else ".")
            )
        empty = np.flatnonzero(self.lengths < 1)
        if len(empty):
            raise InputError(
                f"Sequence {empty[0]} has {self.lengths[empty[0]]} tokens; each needs at least one. Leave it out."
            )

    @classmethod
    def of(cls, arrays: Sequence[Any]) -> TokenSequences:
        """Arrays or tensors [n_tokens_i d], joined in one copy, in float32."""
        if not len(arrays):
            raise InputError("No sequence was given; expected arrays [n_tokens d], at least one.")
        width = _shape(arrays[0], 0)[1]
        lengths = [_shape(array, number)[0] for number, array in enumerate(arrays)]
        values = torch.empty(sum(lengths), width, dtype=torch.float32)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for number, array in enumerate(arrays):
            if array.shape[1] != width:
                raise InputError(
                    f"Sequence {number} has {array.shape[1]} features a token, the first {width}; expected the same."
                )
            values[offsets[number] : offsets[number + 1]] = as_tensor(array)
        return cls(values, offsets)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return np.diff(self.offsets)

    @property
    def tensor(self) -> Tensor:
        """The values as a tensor that shares their memory."""
        return as_tensor(self.values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Values:
        """The tokens of one sequence, [n_tokens_i d]."""
        index = range(len(self))[index]
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Values]:
        return (self[index] for index in range(len(self)))


def as_tensor(values: Values) -> Tensor:
    """A tensor of the same memory, without gradients; it is only read, so that a read-only array needs no warning."""
    if isinstance(values, Tensor):
        return values.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(values))


def _shape(array: Any, number: int) -> tuple[int, int]:
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) != 2 or not shape[0]:
        raise InputError(
            f"Sequence {number} is {type(array).__name__} of shape {shape}; expected an array [n_tokens d] with tokens."
        )
    return shape


def _whole_numbers(offsets: Any) -> NDArray[np.int64]:
    array = np.asarray(offsets.cpu() if isinstance(offsets, Tensor) else offsets)
    if array.dtype.kind not in "iu":
        raise InputError(f"offsets must be whole numbers, got {array.dtype}.")
    return array.astype(np.int64)
