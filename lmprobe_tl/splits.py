"""Examples parted into sets that share no group, with about the same share of each class in each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from lmprobe_tl.errors import InputError

Indices = NDArray[np.int64]


def held_out(labels: NDArray[Any], groups: NDArray[Any], share: float, random_state: int | None) -> tuple[Indices, Indices]:
    """Indices of the examples to learn from and of those to hold out; no group is in both.

    labels, groups: [n_examples]. share: about this part of each class is held out, above 0 and at most 0.5, as one of
    round(1 / share) folds.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 0.5:
        raise InputError(f"the share to hold out is {share!r}; expected a number above 0 and at most 0.5, such as 0.25.")
    return _folds(labels, groups, round(1 / share), random_state)[0]


def selection_splits(
    labels: NDArray[Any], groups: NDArray[Any], validation: int | float, random_state: int | None
) -> list[tuple[Indices, Indices]]:
    """Splits into training and validation: as many folds as `validation` says, or one split where it is a share."""
    if isinstance(validation, int) and not isinstance(validation, bool) and validation >= 2:
        return _folds(labels, groups, validation, random_state)
    if isinstance(validation, float):
        return [held_out(labels, groups, validation, random_state)]
    raise InputError(f"validation is {validation!r}; expected a number of folds from 2 on, or a share such as 0.25.")


def _folds(
    labels: NDArray[Any], groups: NDArray[Any], n_folds: int, random_state: int | None
) -> list[tuple[Indices, Indices]]:
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=random_state)
    everything = np.arange(len(labels))
    try:
        folds = list(splitter.split(everything, labels, groups))
    except ValueError as error:
        raise InputError(
            f"{len(np.unique(groups))} groups of prompts cannot be split into {n_folds} parts ({error}). Give more prompts, "
            "or fewer folds (a greater share)."
        ) from error
    classes = np.unique(labels)
    for part in (part for fold in folds for part in fold):
        missing = np.setdiff1d(classes, labels[part])
        if len(missing):
            raise InputError(
                f"class {missing[0].item()!r} is in too few groups of prompts to be in every one of {n_folds} parts. Give "
                "more prompts of it, or fewer folds (a greater share)."
            )
    return folds
