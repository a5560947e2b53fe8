"""Groups that are never parted, and splits that keep them whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl.errors import InputError
from lmprobe_tl.splits import held_out, selection_splits
from lmprobe_tl.sweep_examples import joined_groups
from lmprobe_tl.tokens import row_digest


def union_find(texts: list[int], groups: list[int] | None) -> list[int]:
    """The root of each prompt, where prompts of one text or of one group have one root."""
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for keys in (texts, groups or []):
        for i, one in enumerate(keys):
            for j, other in enumerate(keys[:i]):
                if one == other:
                    parent[root(i)] = root(j)
    return [root(index) for index in range(len(texts))]


PROMPTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=20)


@given(PROMPTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_groups_are_joined_through_equal_prompts_as_a_plain_union_find_joins_them(
    pairs: list[tuple[int, int]], with_groups: bool
) -> None:
    texts, groups = [text for text, _ in pairs], [group for _, group in pairs] if with_groups else None
    found = joined_groups([row_digest([text]) for text in texts], groups)
    expected = union_find(texts, groups)
    assert [[a == b for a in found] for b in found] == [[a == b for a in expected] for b in expected]


def test_a_chain_of_groups_and_equal_prompts_is_one_group() -> None:
    texts, groups = [0, 1, 1, 2, 2, 3, 9], ["a", "a", "b", "b", "c", "c", "d"]
    found = joined_groups([row_digest([text]) for text in texts], groups)
    assert len(set(found[:6].tolist())) == 1
    assert found[6] != found[0]
    assert len(set(joined_groups([row_digest([text]) for text in texts], None).tolist())) == 5


def test_groups_are_one_a_prompt() -> None:
    with pytest.raises(InputError, match="2 prompts but 3 groups"):
        joined_groups([row_digest([1]), row_digest([2])], ["a", "b", "c"])


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=36, max_size=60),
    st.sampled_from([0.5, 0.3, 0.25]),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_no_group_is_in_two_parts_and_every_part_has_about_the_same_share_of_each_class(
    drawn: list[tuple[int, int]], share: float, seed: int
) -> None:
    drawn = [*drawn, *((label, 1) for label in (0, 1, 2) for _ in range(8))]
    labels = np.array([label for label, size in drawn for _ in range(size)])
    groups = np.array([group for group, (_, size) in enumerate(drawn) for _ in range(size)])
    n_folds = round(1 / share)
    selection, test = held_out(labels, groups, share, seed)
    assert sorted([*selection, *test]) == list(range(len(labels)))
    assert not set(groups[selection]) & set(groups[test])
    for label in range(3):
        # a group of four is the most that a part can be off by, and with it what other classes weigh
        assert abs((labels[test] == label).sum() - (labels == label).sum() / n_folds) <= 6
    splits = selection_splits(labels, groups, n_folds, seed)
    assert sorted(np.concatenate([validate for _, validate in splits])) == list(range(len(labels)))
    for train, validate in splits:
        assert sorted([*train, *validate]) == list(range(len(labels)))
        assert not set(groups[train]) & set(groups[validate])
        assert set(labels[train]) == set(labels[validate]) == {0, 1, 2}


def test_a_share_validates_on_one_part_and_a_seed_decides_which() -> None:
    labels, groups = np.tile([0, 1], 20), np.arange(40)
    ((train, validate),) = selection_splits(labels, groups, 0.25, 0)
    assert (len(train), len(validate)) == (30, 10)
    again = selection_splits(labels, groups, 0.25, 0)[0][1]
    assert again.tolist() == validate.tolist() != selection_splits(labels, groups, 0.25, 1)[0][1].tolist()


@pytest.mark.filterwarnings("error")
def test_too_few_groups_of_a_class_are_an_error_that_names_it() -> None:
    labels = np.array(["many"] * 20 + ["few"] * 6)
    groups = np.array([*range(20), 20, 20, 21, 21, 22, 22])
    with pytest.raises(
        InputError, match=r"class 'few' is in too few groups of prompts .* one of 4 parts\. Give more prompts"
    ):
        held_out(labels, groups, 0.25, 0)
    with pytest.raises(InputError, match=r"class 1 is in too few .* one of 5 parts\. .* or fewer folds \(a greater share\)"):
        selection_splits(np.array([0] * 20 + [1] * 2), np.arange(22), 5, 0)
    with pytest.raises(InputError, match=r"4 groups of prompts cannot be split into 5 parts .* Give more prompts"):
        selection_splits(np.array([0, 1] * 2), np.arange(4), 5, 0)


@pytest.mark.parametrize("share", [0, 0.6, -0.1, float("nan"), True, "a", None])
def test_a_share_that_cannot_be_held_out(share: object) -> None:
    with pytest.raises(InputError, match="above 0 and at most 0.5"):
        held_out(np.array([0, 1] * 10), np.arange(20), share, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("validation", [1, 0, True, "5", None])
def test_a_validation_that_is_neither_folds_nor_a_share(validation: object) -> None:
    with pytest.raises(InputError, match="a number of folds from 2 on, or a share"):
        selection_splits(np.array([0, 1] * 10), np.arange(20), validation, 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at most 0.5"):
        selection_splits(np.array([0, 1] * 10), np.arange(20), 0.7, 0)
