"""Examples parted into sets that share no group, with about the same share of each class in each."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from lmprobe_tl.errors import InputError

Indices = NDArray[np.int64]


def held_out(labels: NDArray[Any], groups: NDArray[Any], share: float, random_state: int | None) -> tuple[Indices, Indices]:
    """Indices of the examples to learn from and of those to hold out; no group is in both.

    labels, groups: [n_examples]. share: above 0 and at most 0.5. One of round(1 / share) folds is held out, so that 0.5
    means a half, 0.3 a third and 0.25 a fourth of each class, about, since groups stay whole.
    InputError where a class is in too few groups.
    """
    check_share(share)
    return _folds(labels, groups, round(1 / share), random_state)[0]


def selection_splits(
    labels: NDArray[Any], groups: NDArray[Any], validation: int | float, random_state: int | None
) -> list[tuple[Indices, Indices]]:
    """Splits into training and validation: as many folds as `validation` says, or one as of `held_out` for a share."""
    check_validation(validation)
    if isinstance(validation, int):
        return _folds(labels, groups, validation, random_state)
    return [held_out(labels, groups, validation, random_state)]


def check_validation(validation: int | float) -> None:
    """InputError for what is neither a number of folds nor a share."""
    if isinstance(validation, float):
        check_share(validation)
    elif isinstance(validation, bool) or not isinstance(validation, int) or validation < 2:
        raise InputError(f"validation is {validation!r}; expected a number of folds from 2 on, or a share such as 0.25.")


def check_share(share: float) -> None:
    """InputError for a share that cannot be held out."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 0.5:
        raise InputError(f"the share to hold out is {share!r}; expected a number above 0 and at most 0.5, such as 0.25.")


def _folds(
    labels: NDArray[Any], groups: NDArray[Any], n_folds: int, random_state: int | None
) -> list[tuple[Indices, Indices]]:
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=random_state)
    everything = np.arange(len(labels))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of small classes, which are an error below
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
