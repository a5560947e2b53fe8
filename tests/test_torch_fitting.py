"""Fitting with torch as a user meets it: threads, fits that are broken off or learn nothing, few examples, containers."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lmprobe_tl import Probe
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import (
    AttentionClassifier,
    LayerStackClassifier,
    MlpClassifier,
    PolynomialClassifier,
    SoftmaxClassifier,
    TokenSequences,
    make_classifier,
)
from lmprobe_tl.estimators import threads as threads_module
from lmprobe_tl.estimators import training as training_module
from lmprobe_tl.estimators.threads import training_threads
from lmprobe_tl.estimators.token_scaling import token_scaling
from lmprobe_tl.estimators.training import split

CPU = torch.device("cpu")
QUICK = {"max_epochs": 3, "random_state": 0, "device": "cpu"}


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def sequences(n: int = 30, d: int = 4, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    arrays = [rng.standard_normal((rng.integers(1, 8), d)) + 2 * label for label in labels]
    return arrays, labels


# --- Threads


def test_small_steps_take_one_thread_and_the_number_before_comes_back(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, one_epoch = [], training_module._one_epoch

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        return one_epoch(*arguments)

    monkeypatch.setattr(training_module, "_one_epoch", watched)
    arrays, labels = sequences()
    features = np.stack([array.mean(axis=0) for array in arrays])
    for classifier, X in [(AttentionClassifier, arrays), (MlpClassifier, features), (PolynomialClassifier, features)]:
        classifier(**QUICK).fit(X, labels)
        assert torch.get_num_threads() == 3
        assert set(seen) == {1}
        seen.clear()
    monkeypatch.setattr(threads_module, "ELEMENTS_OF_ONE_THREAD", 4 * sum(map(len, arrays)) - 1)
    AttentionClassifier(**QUICK).fit(arrays, labels)
    assert set(seen) == {3}
    AttentionClassifier(batch_tokens=10, **QUICK).fit(arrays, labels)
    assert seen[-1] == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, None])
def test_the_number_of_threads_comes_back_after_an_exception(
    three_threads: None, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    inside = []

    def broken(*_):
        inside.append(torch.get_num_threads())
        if error is not None:
            raise error
        return math.nan

    monkeypatch.setattr(training_module, "_one_epoch", broken)
    with pytest.raises(error or InputError):
        AttentionClassifier(**QUICK).fit(*sequences())
    assert inside == [1]
    assert torch.get_num_threads() == 3


def test_large_steps_and_other_devices_keep_the_threads(three_threads: None) -> None:
    for step, device, expected in [
        (threads_module.ELEMENTS_OF_ONE_THREAD, CPU, 1),
        (threads_module.ELEMENTS_OF_ONE_THREAD + 1, CPU, 3),
        (1, torch.device("cuda"), 3),
    ]:
        with training_threads(step, device):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3


FIT = """
import warnings
import numpy as np
import torch
from lmprobe_tl.estimators import AttentionClassifier, TokenSequences
rng, labels = np.random.default_rng(0), np.arange(64) % 2
tokens = TokenSequences(rng.standard_normal((64 * 200, 48), dtype=np.float32), np.arange(65) * 200)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    fitted = AttentionClassifier(max_epochs=2, validation_fraction=0, random_state=0, device="cpu").fit(tokens, labels)
"""


def test_results_are_equal_in_another_process_with_another_number_of_threads(three_threads: None) -> None:
    here: dict[str, Any] = {}
    exec(FIT, here)
    there = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1){FIT}print(fitted.head_.direction.tobytes().hex())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here["fitted"].head_.direction.tobytes().hex()


# --- Fits that are broken off, and those that learn nothing


def test_a_fit_that_is_broken_off_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, labels = sequences()
    fresh = AttentionClassifier(**QUICK)
    fitted = clone(fresh).fit(arrays, labels)
    before = fitted.decision_function(arrays), fitted.history_

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_module, "_one_epoch", interrupted)
    for classifier in (fresh, fitted):
        with pytest.raises(KeyboardInterrupt):
            classifier.fit(arrays, ["b" if label else "a" for label in labels])
    np.testing.assert_array_equal(fitted.decision_function(arrays), before[0])
    assert fitted.history_ is before[1]
    assert fitted.classes_.tolist() == [0, 1]
    with pytest.raises(NotFittedError):
        fresh.predict(arrays)


@pytest.mark.parametrize("classifier", [AttentionClassifier(), SoftmaxClassifier(), MlpClassifier(), PolynomialClassifier()])
def test_a_start_that_no_epoch_improved_is_no_silent_result(classifier) -> None:
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    features = rng.standard_normal((60, 3)) + 4 * labels[:, None]
    held = split(labels, None, 0.2, np.random.RandomState(0).randint(2**31 - 1))[1]
    features[held] = 4 - features[held]  # the other way round
    classifier = clone(classifier).set_params(random_state=0, device="cpu", max_epochs=3)
    with pytest.warns(
        ConvergenceWarning, match=rf"{type(classifier).__name__} has learnt nothing: in \d epochs.*12 .* of 60"
    ):
        classifier.fit(features, labels)
    features[held] = 4 - features[held]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.fit(features, labels)
        classifier.set_params(validation_fraction=0, max_epochs=1).fit(rng.standard_normal((60, 30)), labels)


# --- Few examples


def test_groups_of_one_example_are_no_groups() -> None:
    labels = np.array([0] * 9 + [1] * 2)
    for expected, found in zip(split(labels, None, 0.2, 3), split(labels, np.arange(11) * 7, 0.2, 3), strict=True):
        np.testing.assert_array_equal(expected, found)
    learnt, held = split(labels, np.arange(11), 0.2, 3)
    assert sorted([*learnt, *held]) == list(range(11))
    assert labels[held].tolist() == [0, 0, 1]


def test_a_class_in_few_groups_has_some_on_both_sides() -> None:
    labels, groups = np.arange(24) % 2, np.arange(24) // 2 % 3
    for seed in range(5):
        learnt, held = split(labels, groups, 0.2, seed)
        assert not set(groups[learnt]) & set(groups[held])
        assert set(labels[learnt]) == set(labels[held]) == {0, 1}
        assert len(held) == 8
    with pytest.raises(InputError, match="Nothing can be held out for early stopping: .* Or use validation_fraction=0"):
        split(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 3, 3]), 0.2, 0)


def test_probes_learn_from_four_prompts_and_say_why_not_from_two(gpt2: Tiny) -> None:
    prompts = ["the cat sat", "a dog ran", "the cat ran", "a dog sat"]
    probe = Probe(gpt2.bridge, 0, classifier=AttentionClassifier(**QUICK), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # two prompts are held out
        assert len(probe.fit(prompts, ["cat", "dog", "cat", "dog"]).predict(prompts)) == 4
        with pytest.raises(InputError, match=r"Class 'cat' has one example .*validation_fraction=0"):
            probe.fit(prompts[:2], ["cat", "dog"])
    alone = clone(probe).set_params(classifier__validation_fraction=0, classifier__max_epochs=40)
    assert alone.fit(prompts[:2], [True, False]).predict(prompts[:2]).tolist() == [True, False]


# --- Inside a probe


def test_a_search_over_a_probe_reaches_the_classifier(gpt2: Tiny) -> None:
    prompts = [f"the {word} sat on it" for word in ("cat", "dog", "rain", "house") * 4]
    labels = [0, 1] * 8
    given = AttentionClassifier(n_heads=3, **QUICK)
    probe = Probe(gpt2.bridge, 0, classifier=given, progress=False)
    grid = {"classifier__n_heads": [1, 2], "classifier__learning_rate": [0.01], "hook_points": [0, 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = GridSearchCV(probe, grid, cv=2).fit(prompts, labels).best_estimator_
    assert best.classifier_.head_.n_heads in (1, 2)
    assert best.classifier_.learning_rate == 0.01
    assert given.get_params()["n_heads"] == 3
    assert not hasattr(given, "head_")


def test_a_sequence_classifier_is_not_given_pooled_activations_by_another_one() -> None:
    attention = AttentionClassifier()
    for wrapper, place in [
        (make_pipeline(StandardScaler(), attention), "attentionclassifier"),
        (GridSearchCV(attention, {"n_heads": [1, 2]}), "estimator"),
        (LayerStackClassifier(base=attention), "base"),
    ]:
        message = rf"AttentionClassifier learns from token sequences, but {type(wrapper).__name__} .*'{place}'.*search over"
        with pytest.raises(InputError, match=message):
            make_classifier(wrapper, None)
    make_classifier(GridSearchCV(MlpClassifier(), {"n_hidden": [1, 2]}), None)
    make_classifier(make_pipeline(StandardScaler(), LogisticRegression()), None)


# --- Inputs


def test_containers_and_dtypes_teach_the_same() -> None:
    arrays, labels = sequences()
    arrays = [array.astype(np.float16).astype(np.float64) for array in arrays]
    expected = AttentionClassifier(**QUICK).fit(arrays, labels).decision_function(arrays)
    as_objects = np.empty(len(arrays), dtype=object)
    as_objects[:] = arrays
    halves = TokenSequences(
        torch.from_numpy(np.concatenate(arrays)).half(), np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    )
    for X in (as_objects, tuple(arrays), [torch.from_numpy(array).half() for array in arrays], halves):
        found = AttentionClassifier(**QUICK).fit(X, labels).decision_function(X)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    names = np.array(["no", "yes"])[labels]
    for y, classes in [(names, ["no", "yes"]), (labels.astype(bool), [False, True]), (list(names), ["no", "yes"])]:
        fitted = AttentionClassifier(**QUICK).fit(arrays, y)
        assert fitted.classes_.tolist() == classes
        np.testing.assert_array_equal(fitted.decision_function(arrays), expected)


def test_what_is_no_list_of_arrays_is_named() -> None:
    arrays, labels = sequences()
    equal = np.ones((30, 3, 4))
    for X, message in [
        (equal, r"X has shape \(30, 3, 4\); expected a list of arrays \[n_tokens_i d\]. Give list\(X\)"),
        (torch.from_numpy(equal), r"X has shape \(30, 3, 4\)"),
        ([array.tolist() for array in arrays], "Sequence 0 is list of shape"),
    ]:
        with pytest.raises(InputError, match=message):
            AttentionClassifier(**QUICK).fit(X, labels)
    for parameters, message in [
        ({"device": "meta"}, "device is 'meta', where torch cannot compute here"),
        ({"weight_decay": math.inf}, "weight_decay is inf; expected a finite number"),
        ({"validation_fraction": math.nan}, "validation_fraction is nan"),
    ]:
        with pytest.raises(InputError, match=message):
            AttentionClassifier(**{**QUICK, **parameters}).fit(arrays, labels)
    with pytest.raises(InputError, match=r"labels hold one class with weight: \[0\]"):
        AttentionClassifier(**QUICK).fit(arrays, labels, sample_weight=1.0 - labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_scaling_changes_no_data_and_finds_what_is_not_finite(dtype: torch.dtype) -> None:
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept, whole = values.clone(), TokenSequences(values, np.arange(51))
    token_scaling(whole, np.ones(50), standardize=True)
    assert torch.equal(values, kept)
    for bad in (math.nan, math.inf, -math.inf):
        values[17, 1] = bad
        for standardize in (True, False):
            with pytest.raises(InputError, match="first at token 0 of sequence 17"):
                token_scaling(whole, np.ones(50), standardize=standardize)
