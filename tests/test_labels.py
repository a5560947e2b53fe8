"""Labels: every kind that is accepted becomes the same array, every other kind is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmprobe_tl.errors import InputError
from lmprobe_tl.labels import are_token_labels, check_classes, check_labels, check_token_labels

INTS = [0, 3, -2, 3]


@pytest.mark.parametrize(
    "given",
    [
        INTS,
        tuple(INTS),
        range(4),
        [0, 3.0, -2, 3],
        [float(label) for label in INTS],
        [np.int8(label) for label in INTS],
        [torch.tensor(label) for label in INTS],
        np.array(INTS, dtype=np.int8),
        np.array(INTS, dtype=np.float16),
        np.array(INTS, dtype=object),
        np.array([0, 3, 2, 3], dtype=np.uint8),
        torch.tensor(INTS),
        torch.tensor(INTS, dtype=torch.int16),
        torch.tensor(INTS, dtype=torch.bfloat16),
        torch.tensor(INTS, dtype=torch.float64, requires_grad=True),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_whole_numbers_of_every_kind_become_int64(given: Any) -> None:
    labels = check_labels(given, 4)
    assert labels.dtype == np.int64
    assert labels.tolist() == [int(label) for label in given]


@pytest.mark.parametrize(
    "given",
    [
        [True, False, True],
        np.array([True, False, True]),
        np.array([True, False, True], dtype=object),
        [np.bool_(True), np.bool_(False), np.bool_(True)],
        torch.tensor([True, False, True]),
    ],
)
def test_bools_of_every_kind_stay_bools(given: Any) -> None:
    labels = check_labels(given, 3)
    assert labels.dtype == np.bool_
    assert labels.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "given",
    [
        ["no", "a longer yes"],
        ("no", "a longer yes"),
        np.array(["no", "a longer yes"]),
        np.array(["no", "a longer yes"], dtype=object),
        [np.str_("no"), np.str_("a longer yes")],
    ],
)
def test_strings_of_every_kind_stay_whole_strings(given: Any) -> None:
    labels = check_labels(given, 2)
    assert labels.dtype.kind == "U"
    assert labels.tolist() == ["no", "a longer yes"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", r"labels is 'yes'; expected one int, bool or str a prompt"),
        (b"yes", r"labels is b'yes'"),
        (1, r"labels is 1"),
        (None, r"labels is None"),
        ((label for label in [0, 1]), r"labels is <generator"),
        ({"a": 0, "b": 1}, r"labels is \{'a': 0"),
        ({0, 1}, r"labels is \{0, 1\}"),
        ([0, 0.5], r"holds 0\.5, which is no class.*Turn scores into classes"),
        (np.array([0.0, 0.25]), r"holds 0\.25"),
        (torch.tensor([0.5, 0.0], dtype=torch.bfloat16), r"holds 0\.5"),
        ([0.0, float("nan")], r"holds nan"),
        ([0.0, float("-inf")], r"holds -inf"),
        ([0.0, 1e300], r"holds 1e\+300"),
        (np.array([0, 2**63], dtype=np.uint64), r"holds 9223372036854775808"),
        ([0, 2**70], r"dtype object"),
        ([0, None], r"values of type NoneType, int.*all of one type"),
        ([0, True], r"values of type bool, int"),
        ([0, "1"], r"values of type int, str"),
        ([0.0, "1"], r"values of type float, str"),
        (np.array([0, "1"], dtype=object), r"values of type int, str"),
        ([0, 1j], r"values of type complex, int"),
        ([b"a", b"b"], r"values of type bytes"),
        (np.array([b"a", b"b"]), r"dtype \|S1"),
        (np.array([0, 1], dtype="datetime64[D]"), r"dtype datetime64"),
        (np.array([0j, 1j]), r"dtype complex128"),
        ([[0], [1]], r"values of type list"),
        (np.array([[0], [1]]), r"labels has shape \(2, 1\)"),
        (np.array([[0], [1]], dtype=object), r"shape \(2, 1\)"),
        (torch.tensor([[0.0], [1.0]]), r"labels has shape \(2, 1\)"),
        (np.array(1), r"labels has shape \(\)"),
        (torch.tensor(1), r"labels has shape \(\)"),
        (np.array(None), r"shape \(\)"),
        ([0, 1, 1], r"2 prompts but 3 labels"),
        ([], r"2 prompts but 0 labels"),
        (torch.tensor([1]), r"2 prompts but 1 labels"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_labels_that_are_no_class_a_prompt_are_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        check_labels(given, 2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**53), 2**53), min_size=1, max_size=20))
def test_the_container_of_integers_does_not_matter(values: list[int]) -> None:
    makers: list[Callable[[list[int]], Any]] = [list, tuple, np.array, torch.tensor, lambda v: np.array(v, dtype=np.float64)]
    for make in makers:
        assert check_labels(make(values), len(values)).tolist() == values


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([3, -1, 3], [-1, 3]), ([True, False], [False, True]), (["yes", "no", "maybe"], ["maybe", "no", "yes"])],
)
def test_classes_are_sorted_so_that_the_second_is_positive(labels: list[Any], classes: list[Any]) -> None:
    assert check_classes(check_labels(labels, len(labels))).tolist() == classes


def test_a_single_class_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match="all labels are 'yes'; a probe needs examples of at least two classes"):
        check_classes(np.array(["yes", "yes"]))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0, 1], [1]], True),
        (([0, 1], (1,)), True),
        ([np.array([0, 1]), torch.tensor([1])], True),
        ([["yes"], ["no", "no"]], True),
        (np.zeros((2, 3)), True),
        (torch.zeros(2, 3), True),
        ([0, 1], False),
        (["yes", "no"], False),
        ([[0, 1], 1], False),
        ([np.int64(1), np.array(0)], False),
        ([torch.tensor(1), torch.tensor(0)], False),
        (np.zeros(2), False),
        (torch.zeros(2), False),
        (np.zeros((2, 3, 1)), False),
        ([], False),
        ("yes", False),
        (None, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_token_labels_are_told_from_prompt_labels(labels: Any, expected: bool) -> None:
    assert are_token_labels(labels) is expected


def test_token_labels_become_one_array_a_prompt() -> None:
    arrays = check_token_labels([[0, 1], np.array([1.0]), torch.tensor([0, 0, 1])], [2, 1, 3])
    assert [array.tolist() for array in arrays] == [[0, 1], [1], [0, 0, 1]]
    assert {array.dtype for array in arrays} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1]], r"2 prompts but 1 sequences of token labels"),
        ([[0, 1], [1, 0]], r"labels\[1\] has 2 token labels, but prompt 1 has 3 tokens that count.*include_bos"),
        ([[0, 1], [0, 1, 0, 1]], r"labels\[1\] has 4 token labels"),
        ([[0, 1], []], r"labels\[1\] has 0 token labels"),
        ([[0, 1], np.array([[0, 1, 1]])], r"labels\[1\] has 3 token labels"),
        ([[0, 1], [0, 0.5, 1]], r"labels\[1\] holds 0\.5"),
        ([[0, 1], [0, None, 1]], r"labels\[1\] holds values of type NoneType, int"),
        ([[0, 1], ["a", "b", "c"]], r"the token labels mix types \(\['U', 'i'\]\)"),
        ([[0, 1], [True, False, True]], r"the token labels mix types \(\['b', 'i'\]\)"),
        ([[0, 1], "abc"], r"labels\[1\] is 'abc'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_token_labels_that_do_not_line_up_name_the_prompt(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        check_token_labels(labels, [2, 3])
