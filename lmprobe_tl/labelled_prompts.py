"""Prompts with labels, and a group each where there are any, checked before there is a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.errors import InputError
from lmprobe_tl.labels import are_token_labels, check_labels
from lmprobe_tl.tokens import Prompt, check_prompts


@dataclass(frozen=True, eq=False)
class LabelledPrompts:
    """Prompts with their labels, and one group a prompt where there are any."""

    prompts: list[Prompt]
    labels: Any
    groups: NDArray[Any] | None = None


def labelled_prompts(prompts: Sequence[Prompt], labels: Any, groups: Sequence[Any] | None = None) -> LabelledPrompts:
    """Checked, as far as that is possible without a model."""
    listed = check_prompts(prompts)
    if not are_token_labels(labels):
        labels = check_labels(labels, len(listed))
    elif len(labels) != len(listed):
        raise InputError(f"{len(listed)} prompts but {len(labels)} sequences of token labels.")
    if groups is not None and len(groups) != len(listed):
        raise InputError(f"{len(listed)} prompts but {len(groups)} groups; expected one a prompt.")
    return LabelledPrompts(listed, labels, None if groups is None else np.array([str(group) for group in groups]))


def training_prompts(train: Any) -> LabelledPrompts:
    if not isinstance(train, (tuple, list)) or len(train) not in (2, 3):
        raise InputError(
            f"train is a {type(train).__name__} of another form; expected (prompts, labels) or (prompts, labels, groups)."
        )
    return labelled_prompts(*train)


def check_known(
    labels: Any,
    classes: Sequence[Any],
    what: str,
    *,
    needs: Literal["one class", "two classes", "all classes"] = "two classes",
) -> None:
    """InputError for a label that the probe does not know, and for too few classes."""
    parts = [np.asarray(part) for part in labels] if are_token_labels(labels) else [labels]
    found = np.unique(np.concatenate([part for part in parts if part.size])).tolist()
    unknown = [label for label in found if label not in classes]
    if unknown:
        raise InputError(f"{what}: {unknown[0]!r} is no label of the probe; expected those of {list(classes)}.")
    if len(found) < 2 and needs != "one class":
        raise InputError(f"{what}: all are {found[0]!r}; an evaluation needs examples of at least two classes.")
    missing = [label for label in classes if label not in found]
    if missing and needs == "all classes":
        raise InputError(f"{what}: none is {missing[0]!r}, which the probe knows; expected all of {list(classes)}.")
