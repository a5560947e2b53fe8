"""What prompts that stand in contrast must be like for the classifiers that learn from pairs; the others take any."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators.ccs import CcsClassifier, check_truth
from lmprobe_tl.estimators.pairs import last_step, learns_from_pairs, pair_rows


def check_paired(classifier: Any, labels: NDArray[Any], *, per_token: bool) -> None:
    """Raise InputError where an unfitted classifier needs pairs and the prompts' labels [n_prompts] make none.

    per_token: whether each token is an example, and not each prompt.
    """
    if not learns_from_pairs(classifier):
        return
    if per_token:
        raise InputError(
            f"{_name(classifier)} learns from pairs of prompts, but with train_pooling 'all' each token is an example, and "
            "tokens have no partner. Use 'last_token' or 'mean'."
        )
    pair_rows(labels)


def check_contrast(classifier: Any, n_positive: int, n_negative: int, truth: Any) -> None:
    """Raise InputError where an unfitted classifier needs pairs and the two lists differ in length, or cannot use truth."""
    if learns_from_pairs(classifier) and n_positive != n_negative:
        raise InputError(
            f"positive has {n_positive} prompts and negative {n_negative}, but {_name(classifier)} learns from pairs, the "
            "i-th of each. Give as many of both."
        )
    if truth is None:
        return
    if not isinstance(last_step(classifier), CcsClassifier):
        raise InputError(
            f"{_name(classifier)} takes positive to be what it shall find, so that truth has no use; only 'ccs' has one. "
            "Leave truth out."
        )
    check_truth(truth, n_positive)


def _name(classifier: Any) -> str:
    return type(last_step(classifier)).__name__
