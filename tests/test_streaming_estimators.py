"""Named classifiers fitted in passes over blocks: any blocks give what all examples at once give to scikit-learn."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import CLASSIFIERS, MassMeanClassifier, linear_rule, make_classifier
from lmprobe_tl.estimators import streaming as streaming_module
from lmprobe_tl.estimators.blocks import Block, Moments, Passes, standard_deviation
from lmprobe_tl.estimators.fitting import fit_classifier
from lmprobe_tl.estimators.streaming import can_stream, fit_blocks

NAMES = sorted(filter(can_stream, CLASSIFIERS))
WEIGHTED = [name for name in NAMES if name != "lda"]
# The largest difference of decisions, whose spread is about one. Two fits end in a search, which stops near its optimum.
TOLERANCES = {
    "lda": 1e-9,
    "ridge": 1e-9,
    "logistic_regression": 1e-6,
    "mass_mean": 1e-6,
    "mass_mean_whitened": 1e-6,
}
CLASSES = {2: np.array([False, True]), 3: np.array(["blue", "green", "red"])}


def examples(n_classes: int = 2, n: int = 90, n_features: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [n n_features], correlated, of unequal units, one of them constant; and uneven class indices [n]."""
    rng = np.random.default_rng(seed)
    classes = np.minimum(rng.integers(0, n_classes + 1, n), n_classes - 1)
    classes[: 2 * n_classes] = np.arange(2 * n_classes) % n_classes
    centres = np.random.default_rng(7).normal(0, 0.8, (n_classes, n_features))
    features = (centres[classes] + rng.standard_normal((n, n_features))) @ (np.eye(n_features) + 0.3)
    features = features * np.geomspace(0.1, 10, n_features) + 3.0
    features[:, 1] = 0.1  # the sum of n of these is not n times 0.1
    return features, classes


def cut(features: np.ndarray, classes: np.ndarray, weight: np.ndarray | None, sizes: list[int]) -> list[Block]:
    """Blocks of these sizes, the last one of what is left."""
    ends = np.minimum(np.cumsum([0, *sizes, len(features)]), len(features))
    return [Block(features[a:b], classes[a:b], None if weight is None else weight[a:b]) for a, b in pairwise(ends)]


def fit_cut(name: str, features: Any, classes: Any, weight: Any = None, sizes: Any = (7, 0, 1, 30)) -> Any:
    blocks = cut(features, classes, weight, list(sizes))
    return fit_blocks(name, make_classifier(name, 0), lambda: blocks, CLASSES[int(classes.max()) + 1])


def tight(classifier: Any) -> Any:
    """scikit-learn's logistic regression, converged as far as it goes; others as they are."""
    if "logisticregression" not in getattr(classifier, "named_steps", {}):
        return classifier
    return classifier.set_params(logisticregression__tol=1e-12, logisticregression__max_iter=100_000)


def fit_at_once(name: str, features: np.ndarray, classes: np.ndarray, weight: np.ndarray | None = None) -> Any:
    labels = CLASSES[int(classes.max()) + 1][classes]
    return fit_classifier(tight(make_classifier(name, 0)), features, labels, sample_weight=weight)


def learnt(classifier: Any) -> dict[str, Any]:
    """What was learnt, by step and name: all that ends in one underscore, but for how the search went."""
    steps = classifier.named_steps.items() if hasattr(classifier, "named_steps") else [("", classifier)]
    return {
        f"{step}.{name}": value
        for step, one in steps
        for name, value in vars(one).items()
        if not name.startswith("_") and name.endswith("_") and name != "n_iter_"
    }


# --- As scikit-learn


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("name", "weighted"), [*[(name, False) for name in NAMES], *[(name, True) for name in WEIGHTED]])
def test_blocks_give_what_all_examples_at_once_give(name: str, n_classes: int, weighted: bool) -> None:
    features, classes = examples(n_classes)
    weight = np.random.default_rng(1).uniform(0, 3, len(classes)) if weighted else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit_cut(name, features, classes, weight)
    expected = fit_at_once(name, features, classes, weight)
    assert set(learnt(found)) == set(learnt(expected))
    if name == "lda":
        assert found.get_feature_names_out().tolist() == expected.get_feature_names_out().tolist()
    for key, value in learnt(expected).items():
        if isinstance(value, (str, np.ndarray)) and np.asarray(value).dtype.kind in "bUi":
            assert np.array_equal(learnt(found)[key], value), key
        else:
            np.testing.assert_allclose(learnt(found)[key], value, rtol=1e-5, atol=1e-7, err_msg=key)
    fresh, _ = examples(n_classes, seed=1)
    np.testing.assert_allclose(found.decision_function(fresh), expected.decision_function(fresh), atol=TOLERANCES[name])
    assert found.predict(fresh).tolist() == expected.predict(fresh).tolist()
    if name != "ridge":
        np.testing.assert_allclose(found.predict_proba(fresh), expected.predict_proba(fresh), atol=TOLERANCES[name])
    if weighted:  # the control: the weights say something
        assert (
            np.abs(found.decision_function(fresh) - fit_cut(name, features, classes).decision_function(fresh)).max() > 1e-2
        )


def test_lda_refuses_weights_in_blocks_as_at_once() -> None:
    features, classes = examples()
    for fit in (fit_cut, fit_at_once):
        with pytest.raises(InputError, match=r"LinearDiscriminantAnalysis takes no sample weights.*equal_prompt_weight=Fal"):
            fit("lda", features, classes, np.ones(len(classes)))


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0, "auto"])
def test_every_shrinkage_is_that_of_scikit_learn(shrinkage: Any, n_classes: int) -> None:
    features, classes = examples(n_classes)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    found = fit_blocks("lda", lda, lambda: cut(features, classes, None, [11, 1]), np.arange(n_classes))
    expected = clone(lda).fit(features, classes)
    np.testing.assert_allclose(found.covariance_, expected.covariance_, atol=1e-11)
    np.testing.assert_allclose(found.decision_function(features), expected.decision_function(features), atol=1e-9)
    if shrinkage is not None and shrinkage != 0.0:
        plain = LinearDiscriminantAnalysis(solver="lsqr").fit(features, classes)
        assert np.abs(found.decision_function(features) - plain.decision_function(features)).max() > 1e-3


def test_lda_of_one_feature_of_a_lone_example_and_of_fewer_examples_than_features() -> None:
    rng = np.random.default_rng(0)
    for n_features, class_sizes in [(1, [6, 5]), (4, [1, 9]), (30, [7, 8]), (30, [2, 8, 5])]:
        classes = np.repeat(np.arange(len(class_sizes)), class_sizes)
        features = rng.standard_normal((len(classes), n_features)) + classes[:, None]
        expected = make_classifier("lda", 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # scikit-learn warns of the class of one example
            expected.fit(features, classes)
        found = fit_cut("lda", features, classes, None, [3])
        np.testing.assert_allclose(found.decision_function(features), expected.decision_function(features), atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_is_a_fitted_classifier(name: str) -> None:
    features, classes = examples()
    given = make_classifier(name, 0)
    found = fit_blocks(name, given, lambda: cut(features, classes, None, [40]), CLASSES[2])
    check_is_fitted(found)
    assert not learnt(given)  # it was cloned
    assert found.n_features_in_ == features.shape[1]
    assert found.classes_.dtype == bool
    np.testing.assert_allclose(
        linear_rule(found, features).logits(features)[:, 0], found.decision_function(features), atol=1e-9
    )
    with pytest.raises(ValueError, match="expecting 5 features"):
        found.predict(features[:, :4])
    again = tight(clone(found)).fit(features, CLASSES[2][classes])
    np.testing.assert_allclose(again.decision_function(features), found.decision_function(features), atol=TOLERANCES[name])


def test_the_ridge_penalty_is_that_of_logistic_regression_at_its_start() -> None:
    """One Newton step of the penalised log loss from zero, on even classes, is twice the ridge solution."""
    features, _ = examples(n=80)
    classes = np.arange(80) % 2
    scaled = StandardScaler().fit_transform(features)
    penalty = 1 / make_classifier("logistic_regression", 0)[-1].C
    step = np.linalg.solve(scaled.T @ scaled / 4 + penalty * np.eye(5), scaled.T @ (classes - 0.5))
    ridge = make_classifier("ridge", 0).fit(features, classes)[-1]
    np.testing.assert_allclose(step, 2 * ridge.coef_.ravel(), rtol=1e-10, atol=1e-15)
    other = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100)).fit(features, classes)[-1]
    assert np.abs(step - 2 * other.coef_.ravel()).max() > 1e-3


# --- Any blocks, any order, any weight


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 25), max_size=12),
    st.integers(2, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_cut_changes_nothing(
    name: str, sizes: list[int], n_classes: int, weighted: bool, by_class: bool, seed: int
) -> None:
    features, classes = examples(n_classes, n=60, seed=seed)
    weight = np.random.default_rng(seed).uniform(0.1, 2, 60) if weighted and name != "lda" else None
    if by_class:  # blocks that lack a class
        order = np.argsort(classes, kind="stable")
        features, classes, weight = features[order], classes[order], None if weight is None else weight[order]
    whole = fit_cut(name, features, classes, weight, [])
    parts = fit_cut(name, features, classes, weight, sizes)
    np.testing.assert_allclose(parts.decision_function(features), whole.decision_function(features), atol=TOLERANCES[name])


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["mass_mean", "mass_mean_whitened"]), st.integers(2, 3), st.integers(0, 1000))
def test_a_weight_is_a_number_of_copies(name: str, n_classes: int, seed: int) -> None:
    features, classes = examples(n_classes, n=40, seed=seed)
    weight = np.random.default_rng(seed).integers(0, 4, 40)
    weight[: 2 * n_classes] = 2
    weighted = fit_cut(name, features, classes, weight.astype(float))
    copied = fit_cut(name, np.repeat(features, weight, axis=0), np.repeat(classes, weight))
    np.testing.assert_allclose(weighted.decision_function(features), copied.decision_function(features), atol=1e-6)


@pytest.mark.parametrize("name", ["logistic_regression", "ridge"])
def test_a_weight_of_two_is_two_copies_of_every_example_or_of_standardised_ones(name: str) -> None:
    """The scaler counts examples, not weights, so that copies of some examples need features that it leaves alone."""
    features, classes = examples(n=60)
    twice = fit_cut(name, features, classes, np.full(60, 2.0))
    copied = fit_cut(name, np.tile(features, (2, 1)), np.tile(classes, 2))
    np.testing.assert_allclose(twice.decision_function(features), copied.decision_function(features), atol=1e-6)

    corners = np.tile([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], (4, 1))  # mean 0, variance 1, in each four
    classes = np.array([0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0])
    weight = np.repeat([2.0, 1.0, 2.0, 3.0], 4)
    repeated = np.repeat(np.arange(16), weight.astype(int))
    weighted = fit_cut(name, corners, classes, weight, [3, 4])
    copied = fit_cut(name, corners[repeated], classes[repeated])
    np.testing.assert_allclose(weighted.decision_function(corners), copied.decision_function(corners), atol=1e-6)
    assert (
        np.abs(weighted.decision_function(corners) - fit_cut(name, corners, classes).decision_function(corners)).max() > 1e-2
    )


# --- Digits


def far_from_zero(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features with mean 1e4 and spread 0.1, class indices, and the same features about zero, exactly."""
    rng = np.random.default_rng(seed)
    classes = np.arange(400) % 2
    near = np.round((rng.standard_normal((400, 4)) + 0.7 * classes[:, None]) * 0.1 * 2**20) / 2**20  # no digit is lost below
    return near + 1e4, classes, near


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 90), max_size=9), st.integers(0, 50))
def test_moments_keep_their_digits_far_from_zero(sizes: list[int], seed: int) -> None:
    features, classes, near = far_from_zero(seed)
    weight = np.random.default_rng(seed).uniform(0.1, 2, 400)
    moments = Moments(2, with_scatter=True)
    for block in cut(features, classes, weight, sizes):
        moments.add(block)
    for index in (0, 1):
        member = classes == index
        np.testing.assert_allclose(moments.means[index], np.average(near[member], axis=0, weights=weight[member]) + 1e4)
        expected = np.cov(near[member].T, aweights=weight[member], ddof=0)
        np.testing.assert_allclose(moments.scatter[index] / moments.weight[index], expected, atol=1e-12)


def test_sums_of_squares_lose_their_digits_far_from_zero() -> None:
    """The control of the tests beside it."""
    features, _, near = far_from_zero()
    expected = near.var(axis=0)  # 0.01
    scaler = StandardScaler().fit(features)
    np.testing.assert_allclose(scaler.var_, expected, rtol=1e-10)
    for dtype, lost in [(np.float32, 1.0), (np.float64, 1e-8)]:
        rows = features.astype(dtype)
        naive = (rows**2).mean(axis=0, dtype=dtype) - rows.mean(axis=0, dtype=dtype) ** 2
        assert np.abs(naive / expected - 1).max() > lost


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_keep_their_digits_far_from_zero(name: str) -> None:
    features, classes, near = far_from_zero()
    found = fit_cut(name, features, classes).decision_function(features)
    exact = fit_cut(name, near, classes).decision_function(near)
    np.testing.assert_allclose(found, exact, atol=1e-7)
    np.testing.assert_allclose(found, fit_at_once(name, features, classes).decision_function(features), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_short_floats_are_added_up_in_float64(dtype: Any) -> None:
    features, classes = examples(n=60)
    single = features.astype(dtype)
    for name in NAMES:
        found, expected = (
            fit_cut(name, rows, classes).decision_function(features) for rows in (single, single.astype(float))
        )
        assert np.array_equal(found, expected)


@settings(deadline=None, max_examples=50)
@given(st.floats(-1e6, 1e6), st.integers(1, 300))
def test_equal_numbers_have_no_deviation(value: float, count: int) -> None:
    moments = Moments(1, with_scatter=True)
    for size in (count, 1, count):
        moments.add(Block(np.full((size, 1), value), np.zeros(size, dtype=np.int64)))
    variance = np.diag(moments.scatter[0]) / moments.weight[0]
    assert standard_deviation(variance, moments.means[0], 2 * count + 1) == 0.0
    assert standard_deviation(np.array([1e-6]), np.array([1e3]), 2 * count + 1) == 1e-3


# --- Passes


def test_few_passes_converge_where_features_are_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((4000, 60))
    features = latent * np.geomspace(1, 1e-2, 60) @ rng.standard_normal((60, 60))
    classes = (latent @ rng.standard_normal(60) + 5 * rng.standard_normal(4000) > 5).astype(np.int64)
    blocks = cut(features, classes, None, [1500, 1500])

    def count_passes() -> tuple[int, np.ndarray]:
        counted = CountedPasses(blocks)
        classifier = fit_blocks("logistic_regression", make_classifier("logistic_regression", 0), counted, CLASSES[2])
        return counted.count, classifier.decision_function(features)

    with_preconditioner, found = count_passes()
    monkeypatch.setattr(streaming_module, "WIDEST_PRECONDITIONER", 59)
    without, same = count_passes()
    np.testing.assert_allclose(found, same, atol=1e-5)
    np.testing.assert_allclose(
        found, fit_at_once("logistic_regression", features, classes).decision_function(features), atol=1e-5
    )
    assert with_preconditioner < 25 < 80 < without


class CountedPasses:
    def __init__(self, blocks: list[Block]) -> None:
        self.blocks, self.count = blocks, 0

    def __call__(self) -> list[Block]:
        self.count += 1
        return self.blocks


def test_the_preconditioner_takes_the_same_examples_from_any_blocks() -> None:
    features, classes = examples(n=1000)
    scaler = StandardScaler().fit(features)
    assert 1000 // (5 * streaming_module.EXAMPLES_PER_FEATURE) == 6  # of which every sixth is taken
    scaled = scaler.transform(features[::6])
    expected = np.linalg.cholesky(0.25 * scaled.T @ scaled / len(scaled) + 0.1 * np.eye(5))
    for sizes in ([], [1] * 20, [7, 0, 300, 5]):
        blocks = cut(features, classes, None, sizes)
        passes = Passes(lambda blocks=blocks: blocks, CLASSES[2])
        assert sum(len(block.features) for block in passes()) == 1000
        np.testing.assert_allclose(streaming_module._curvature_root(passes, scaler, 0.25, 0.1), expected, atol=1e-12)


def test_small_weights_are_no_reason_to_stop_early() -> None:
    features, classes = examples()
    small = make_classifier("logistic_regression", 0).set_params(logisticregression__C=0.03e6)
    blocks = cut(features, classes, np.full(len(classes), 1e-6), [30])
    found = fit_blocks("logistic_regression", small, lambda: blocks, CLASSES[2])
    expected = fit_cut("logistic_regression", features, classes)
    np.testing.assert_allclose(found.decision_function(features), expected.decision_function(features), atol=1e-6)


@pytest.mark.parametrize(("name", "passes"), [("ridge", 1), ("lda", 2), ("mass_mean", 2), ("mass_mean_whitened", 2)])
def test_the_other_fits_take_one_pass_or_two(name: str, passes: int) -> None:
    counted = CountedPasses(cut(*examples(), None, [30]))
    fit_blocks(name, make_classifier(name, 0), counted, CLASSES[2])
    assert counted.count == passes


def test_a_search_that_is_cut_short_warns() -> None:
    features, classes = examples()
    short = make_classifier("logistic_regression", 0).set_params(logisticregression__max_iter=2)
    with pytest.warns(ConvergenceWarning, match=r"not converged in 2 steps: .*ITERATIONS.*largest slope left"):
        fit_blocks("logistic_regression", short, lambda: cut(features, classes, None, [20]), CLASSES[2])


class LivingBlocks:
    """Blocks made when they are asked for; `most_alive` is the largest number of their features that existed at once."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks, self.most_alive = n_blocks, 0
        self._features: list[weakref.ref[np.ndarray]] = []

    def __call__(self) -> Iterator[Block]:
        for number in range(self.n_blocks):
            features, classes = examples(n=30, seed=number)
            self._features.append(weakref.ref(features))
            alive = sum(one() is not None for one in self._features)
            self.most_alive = max(self.most_alive, alive)
            yield Block(features, classes)


@pytest.mark.parametrize("name", NAMES)
def test_at_most_two_blocks_are_alive(name: str) -> None:
    gc.collect()
    gc.disable()  # no block waits for the collector
    try:
        living = LivingBlocks(12)
        fit_blocks(name, make_classifier(name, 0), living, CLASSES[2])
        assert 1 <= living.most_alive <= 2
        held = LivingBlocks(12)
        kept = list(held())  # the control: blocks that are held are counted
        assert held.most_alive == len(kept) == 12
    finally:
        gc.enable()


# --- Errors

GOOD = Block(np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(np.ones((2, 3)), np.array([0, 1])), r"block 1 have shape \(2, 3\), expected \[n_examples 2\]"),
        (Block(np.ones(2), np.array([0, 1])), r"block 1 have shape \(2,\)"),
        (Block(np.array([[1.0, np.nan]]), np.array([0])), "block 1 hold NaN or infinite"),
        (Block(np.ones((1, 2)), np.array([2])), "block 1 must be 1 indices from 0 to 1, got int64 .* from 2 to 2"),
        (Block(np.ones((1, 2)), np.array([-1])), "from -1 to -1"),
        (Block(np.ones((2, 2)), np.array([0])), r"2 indices .* shape \(1,\)"),
        (Block(np.ones((1, 2)), np.array([0.0])), "got float64"),
        (Block(np.ones((1, 2)), np.array([0]), np.array([-1.0])), "not negative, got .* from -1.0 to -1.0"),
        (Block(np.ones((1, 2)), np.array([0]), np.array([np.inf])), "1 finite numbers"),
        (Block(np.ones((1, 2)), np.array([0]), np.ones(2)), r"shape \(2,\)"),
    ],
)
def test_an_unusable_block_is_named(block: Block, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_blocks("mass_mean", MassMeanClassifier(), lambda: [GOOD, block], CLASSES[2])
    fit_blocks("mass_mean", MassMeanClassifier(), lambda: [GOOD, GOOD], CLASSES[2])


def test_classes_without_examples_are_named() -> None:
    weightless = Block(GOOD.features, np.full(4, 2), np.zeros(4))
    for blocks in ([GOOD], [GOOD, weightless], []):
        for name in WEIGHTED:
            with pytest.raises(InputError, match=f"No example of class '{'red' if blocks else 'blue'}'"):
                fit_blocks(name, make_classifier(name, 0), lambda blocks=blocks: blocks, CLASSES[3])
    with pytest.raises(InputError, match=r"at least two classes, got \['a'\]"):
        fit_blocks("ridge", make_classifier("ridge", 0), lambda: [GOOD], np.array(["a"]))
    with pytest.raises(InputError, match="2 examples of 2 classes show no variance"):
        fit_blocks("lda", make_classifier("lda", 0), lambda: [Block(np.eye(2), np.array([0, 1]))], CLASSES[2])


def used_up() -> Callable[[], Iterator[Block]]:
    iterator = iter([GOOD, GOOD])
    return lambda: iterator


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ridge"])  # which takes one pass
def test_an_iterator_that_is_used_up_is_no_pass(name: str) -> None:
    with pytest.raises(InputError, match="gave 0 examples, the first one 8. .* give all examples anew"):
        fit_blocks(name, make_classifier(name, 0), used_up(), CLASSES[2])


def test_passes_say_what_they_saw() -> None:
    passes = Passes(lambda: [Block(np.zeros((0, 0)), np.zeros(0, dtype=np.int64)), GOOD, GOOD], CLASSES[2])
    assert [len(block.features) for block in passes()] == [4, 4]  # without the empty one
    assert (passes.n_examples, passes.n_features, passes.class_weight.tolist()) == (8, 2, [4.0, 4.0])
    assert len(list(passes())) == 2


def test_names_that_stream() -> None:
    assert all(can_stream(name) for name in NAMES)
    assert not can_stream("svm")
    assert not can_stream(LogisticRegression())
    with pytest.raises(InputError, match="'svm' cannot be fitted in blocks. Those that can: 'lda', 'logistic_regression'"):
        fit_blocks("svm", LogisticRegression(), lambda: [GOOD], CLASSES[2])


def test_covariance_without_variance_is_refused_in_blocks_too() -> None:
    """0.1 is no binary fraction: its mean over 7 is another number, which is no variance."""
    features, classes = np.full((14, 2), 0.1), np.arange(14) % 2
    with pytest.raises(InputError, match="all examples are equal"):
        fit_cut("mass_mean_whitened", features, classes)
