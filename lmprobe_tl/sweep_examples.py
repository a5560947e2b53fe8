"""The prompts or tokens that a sweep learns from: labels, groups that are never parted, and what the baseline sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lmprobe_tl.errors import InputError
from lmprobe_tl.features import evenly_spread
from lmprobe_tl.hook_points import resolve_hook_points
from lmprobe_tl.labels import are_token_labels, check_classes, check_labels, check_token_labels
from lmprobe_tl.learnt import Learnt
from lmprobe_tl.probe import Probe
from lmprobe_tl.splits import Indices
from lmprobe_tl.token_bag import as_documents
from lmprobe_tl.tokens import bos_id, check_rows_count, counted_lengths, row_digest

Array = NDArray[Any]


@dataclass(frozen=True)
class SweepExamples:
    """Prompts or tokens to learn from. labels, groups, prompts: [n_examples]; documents: [n_examples] lists of token ids,
    for the baseline; digests: of each prompt's token ids."""

    labels: Array
    groups: Array
    prompts: NDArray[np.int64]
    documents: Array
    digests: list[bytes]
    level: str

    def teach(self, probe: Probe, model: Any, fitted: Any, values: Array, selection: Indices) -> None:
        """Make `probe` one that was fitted on the selection."""
        chosen = np.unique(self.prompts[selection])
        owners = np.searchsorted(chosen, self.prompts[selection]) if self.level == "token" else None
        sample = values[selection[evenly_spread(len(selection))]]
        digests = [self.digests[index] for index in chosen]
        names = resolve_hook_points(model, probe.hook_points)
        probe._learn(Learnt(model, names, fitted, self.labels[selection], owners, digests, sample))


def sweep_examples(
    model: Any, rows: list[list[int]], labels: Any, groups: Sequence[Any] | None, *, per_token: bool, include_bos: bool
) -> SweepExamples:
    """Examples of the prompts `rows`, token ids each. InputError for labels or groups that do not fit them, EmptyMaskError
    for prompts without a token that counts."""
    bos = bos_id(model)
    lengths = counted_lengths(rows, bos, include_bos)
    check_rows_count(lengths)
    digests = [row_digest(row) for row in rows]
    by_prompt = joined_groups(digests, groups)
    texts = [row[1:] if row[:1] == [bos] and not include_bos else row for row in rows]
    if not per_token:
        checked = check_labels(labels, len(rows))
        check_classes(checked)
        return SweepExamples(checked, by_prompt, np.arange(len(rows)), as_documents(texts), digests, "prompt")
    owners = np.repeat(np.arange(len(rows)), lengths)
    if are_token_labels(labels):
        checked = np.concatenate(check_token_labels(labels, lengths))
    else:
        checked = check_labels(labels, len(rows))[owners]
    check_classes(checked)
    return SweepExamples(
        checked, by_prompt[owners], owners, as_documents([[token] for row in texts for token in row]), digests, "token"
    )


def joined_groups(digests: list[bytes], groups: Sequence[Any] | None) -> NDArray[np.int64]:
    """A group a prompt [n_prompts]: as given, where groups that share an equal prompt are one."""
    if groups is None:
        return np.unique(np.array([digest.hex() for digest in digests]), return_inverse=True)[1]
    if len(groups) != len(digests):
        raise InputError(f"{len(digests)} prompts but {len(groups)} groups; expected one a prompt.")
    members = np.unique(np.array([str(group) for group in groups]), return_inverse=True)[1]
    texts = np.unique(np.array([digest.hex() for digest in digests]), return_inverse=True)[1] + members.max() + 1
    size = int(texts.max()) + 1
    links = coo_array((np.ones(len(members)), (members, texts)), shape=(size, size))
    return connected_components(links, directed=False)[1][members]
