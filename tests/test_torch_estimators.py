"""Classifiers trained with torch: formulas against plain loops, training, early stopping, and what they find."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import estimator_checks_generator

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import ragged, torch_classifier, training
from lmprobe_tl.estimators.fitted_head import FittedHead, fitted_head
from lmprobe_tl.estimators.mass_mean import MassMeanClassifier
from lmprobe_tl.estimators.ragged import Segments
from lmprobe_tl.estimators.sequence_classifiers import (
    SEQUENCE_CLASSIFIERS,
    AttentionClassifier,
    MultiMaxClassifier,
    RollingAttentionClassifier,
    SoftmaxClassifier,
    WindowedClassifier,
)
from lmprobe_tl.estimators.token_scaling import token_scaling
from lmprobe_tl.estimators.token_sequences import TokenSequences
from lmprobe_tl.estimators.vector_classifiers import VECTOR_CLASSIFIERS, MlpClassifier, PolynomialClassifier
from lmprobe_tl.heads import ReadoutHead, SequenceHead, polynomial_orders
from lmprobe_tl.metrics import auroc
from lmprobe_tl.reductions import reduce_batch

QUICK = {"max_epochs": 4, "learning_rate": 0.02, "random_state": 0, "device": "cpu"}
SEQUENCE = [
    AttentionClassifier(n_heads=2, **QUICK),
    MultiMaxClassifier(n_heads=3, **QUICK),
    RollingAttentionClassifier(n_heads=2, window=3, **QUICK),
    SoftmaxClassifier(temperature=2.0, **QUICK),
    WindowedClassifier(window=3, temperature=0.5, **QUICK),
]
VECTOR = [MlpClassifier(n_hidden=5, **QUICK), PolynomialClassifier(degree=3, rank=2, **QUICK)]


def name_of(classifier):
    return type(classifier).__name__


def sequences(n=40, d=5, seed=0, shift=2.0, longest=9, signal=1):
    """A few tokens of each positive are shifted; features have units and origins of their own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    arrays = []
    for label in labels:
        tokens = rng.standard_normal((rng.integers(signal, longest + 1), d))
        at = rng.integers(len(tokens) - signal + 1)
        tokens[at : at + signal, 0] += shift * label
        arrays.append((tokens * np.linspace(0.5, 3, d) + 2).astype(np.float32))
    return arrays, labels


def vectors(n=60, d=5, n_classes=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    features = rng.standard_normal((n, d)) + np.random.default_rng(9).standard_normal((n_classes, d))[labels]
    return features * np.linspace(0.5, 3, d) + 2, labels


# --- Formulas, by plain loops over lists of numbers


def attention_by_hand(queries, values):
    total = 0.0
    for head in range(len(values[0])):
        weights = [math.exp(query[head]) for query in queries]
        total += sum(w * value[head] for w, value in zip(weights, values, strict=True)) / sum(weights)
    return total


def windows_by_hand(tokens, window):
    return [tokens] if len(tokens) < window else [tokens[at : at + window] for at in range(len(tokens) - window + 1)]


def readings_by_hand(head, tokens):
    return [
        [float(row @ x + b) for row, b in zip(head.direction, head.intercept, strict=True)] for x in tokens.astype(float)
    ]


def means_by_hand(classifier, readings):
    return [sum(r[0] for r in part) / len(part) for part in windows_by_hand(readings, classifier.window)]


def logit_by_hand(classifier, tokens):
    head = classifier.head_
    readings = readings_by_hand(head, tokens)
    if isinstance(classifier, SoftmaxClassifier):
        return attention_by_hand([[r[0] / classifier.temperature] for r in readings], readings)
    if isinstance(classifier, WindowedClassifier):
        return max(means_by_hand(classifier, readings))
    if head.kind == "multimax":
        return sum(max(r[h] for r in readings) for h in range(head.n_heads))
    parts = windows_by_hand(readings, head.window) if head.kind == "rolling_attention" else [readings]
    n = head.n_heads
    return max(attention_by_hand([r[:n] for r in part], [r[n:] for r in part]) for part in parts)


def bce(logit, label):
    return math.log1p(math.exp(-logit if label else logit))


def loss_by_hand(classifier, tokens, label):
    if not isinstance(classifier, WindowedClassifier):
        return bce(logit_by_hand(classifier, tokens), label)
    means = means_by_hand(classifier, readings_by_hand(classifier.head_, tokens))
    weights = [math.exp(mean / classifier.temperature) for mean in means]
    return sum(w * bce(mean, label) for w, mean in zip(weights, means, strict=True)) / sum(weights)


def with_random_head(classifier, seed, d=4, scale=1.0):
    """As if fitted, with any numbers."""
    rng = np.random.default_rng(seed)
    design = classifier._design()
    n = design.n_queries + design.n_values
    made = clone(classifier)
    made.classes_, made.n_features_in_ = np.array([0, 1]), d
    made.head_ = FittedHead(
        kind=design.kind,
        direction=rng.standard_normal((n, d)) * scale,
        intercept=rng.standard_normal(n),
        n_heads=design.n_heads,
        window=design.window,
        own_pooling=design.own_pooling,
    )
    return made


def by_heads(head, arrays, junk):
    """What heads.py and reductions.py make of padded rows with gaps, where pads hold junk."""
    longest = max(map(len, arrays)) + 2
    rows = torch.full((len(arrays), longest, head.direction.shape[1]), junk, dtype=torch.float64)
    mask = torch.zeros(len(arrays), longest, dtype=torch.bool)
    for row, array in enumerate(arrays):
        places = torch.randperm(longest, generator=torch.Generator().manual_seed(row))[: len(array)].sort().values
        rows[row, places], mask[row, places] = torch.as_tensor(array, dtype=torch.float64), True
    readings = rows @ torch.from_numpy(head.direction).T + torch.from_numpy(head.intercept)
    readings = torch.where(mask[..., None], readings, 0.0)
    if head.kind == "linear":
        name, parameter = head.own_pooling.removeprefix("score:").removesuffix(")").split("(")
        parameter = int(parameter) if name == "rolling_max" else float(parameter)
        return reduce_batch(readings[..., 0], name, parameter, mask).numpy()
    return SequenceHead(head.kind, head.n_heads, head.window).batch(readings, mask[..., None])[:, 0].numpy()


@pytest.mark.parametrize("classifier", SEQUENCE, ids=name_of)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), longest=st.integers(1, 12), scale=st.sampled_from([0.1, 1.0, 8.0]))
@settings(max_examples=20, deadline=None)
def test_decisions_equal_the_plain_loop_and_the_heads(classifier, seed, n, longest, scale):
    fitted = with_random_head(classifier, seed, scale=scale)
    arrays = [array for array, _ in zip(*sequences(n, d=4, seed=seed, longest=longest), strict=True)]
    found = fitted.decision_function(arrays)
    np.testing.assert_allclose(found, [logit_by_hand(fitted, array) for array in arrays], rtol=1e-9, atol=1e-9)
    for junk in (math.nan, 1e30):
        np.testing.assert_allclose(by_heads(fitted_head(fitted), arrays, junk), found, rtol=1e-5, atol=1e-5)
    alone = np.concatenate([fitted.decision_function([token[None] for token in array]) for array in arrays])
    np.testing.assert_allclose(np.concatenate(fitted.token_logits(arrays)), alone, rtol=1e-9, atol=1e-9)
    assert [len(logits) for logits in fitted.token_logits(arrays)] == [len(array) for array in arrays]


@pytest.mark.parametrize("classifier", SEQUENCE, ids=name_of)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), longest=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_training_losses_equal_the_plain_loop(classifier, seed, n, longest):
    fitted = with_random_head(classifier, seed)
    arrays, labels = sequences(n, d=4, seed=seed, longest=longest)
    whole = TokenSequences.of(arrays)
    readings = torch_classifier.readings_of(fitted.head_, whole, 0, len(whole.values))
    losses = fitted._losses(readings, Segments(torch.from_numpy(whole.lengths)), torch.from_numpy(labels).double())
    expected = [loss_by_hand(fitted, array, label) for array, label in zip(arrays, labels, strict=True)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-9)


def held_out_of(labels, share=0.2, random_state=0):
    return training.split(labels, None, share, np.random.RandomState(random_state).randint(2**31 - 1))[1]


@pytest.mark.parametrize("classifier", SEQUENCE, ids=name_of)
def test_what_is_learnt_is_the_best_epoch_with_the_scaling_folded_in(classifier):
    """The loss that training saw, in its scaled space, is that of the result on the raw examples held out."""
    arrays, labels = sequences()
    arrays = [array * 100 + 30 for array in arrays]
    fitted = clone(classifier).set_params(learning_rate=0.5, max_epochs=12, patience=6).fit(arrays, labels)
    losses = [epoch.validation_loss for epoch in fitted.history_]
    assert fitted.validation_loss_ == min(losses) == losses[fitted.best_epoch_]
    assert fitted.best_epoch_ < fitted.n_epochs_ == len(losses) - 1
    assert losses[-1] > fitted.validation_loss_ + 0.01
    expected = np.mean([loss_by_hand(fitted, arrays[at], labels[at]) for at in held_out_of(labels)])
    assert fitted.validation_loss_ == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("classifier", SEQUENCE, ids=name_of)
def test_gradients_of_the_ragged_forms_are_right(classifier):
    design = classifier._design()
    segments = Segments(torch.tensor([4, 1, 2, 7]))
    readings = torch.randn(
        14, design.n_queries + design.n_values, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    targets = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: classifier._losses(r, segments, targets), readings)
    assert torch.autograd.gradcheck(lambda r: classifier._logits(r, segments), readings)


def test_mlp_and_polynomial_equal_their_formulas_and_heads():
    features, labels = vectors()
    for n_classes in (2, 3):
        features, labels = vectors(n_classes=n_classes)
        mlp = clone(VECTOR[0]).fit(features, labels)
        head = fitted_head(mlp)
        hidden = np.maximum(features @ head.direction.T + head.intercept, 0)
        logits = hidden @ head.readout.T + head.readout_intercept
        np.testing.assert_allclose(mlp.decision_function(features), logits[:, 0] if n_classes == 2 else logits, atol=1e-9)
        np.testing.assert_allclose(mlp.predict_proba(features).sum(axis=1), 1)
        at = held_out_of(labels)
        both = np.column_stack([np.zeros(len(features)), logits]) if n_classes == 2 else logits
        loss = -log_softmax(both, axis=1)[at, labels[at]].mean()
        assert mlp.validation_loss_ == pytest.approx(loss, abs=1e-5)
        assert head.own_pooling is None
    features, labels = vectors()
    polynomial = clone(VECTOR[1]).fit(features, labels)
    head = fitted_head(polynomial)
    readings = torch.from_numpy(features @ head.direction.T + head.intercept)
    for degree in (1, 2, 3):
        orders = polynomial_orders(degree, rank=2)
        n = len(orders)
        by_loop = [
            sum(a * float(r) ** int(k) for a, r, k in zip(head.readout[0], row, orders, strict=False)) for row in readings
        ] + head.readout_intercept
        found = polynomial.decision_function(features, degree=degree)
        np.testing.assert_allclose(found, by_loop, rtol=1e-9, atol=1e-9)
        torch_head = ReadoutHead(1, torch.from_numpy(head.readout[:, :n]), torch.from_numpy(head.readout_intercept), orders)
        np.testing.assert_allclose(torch_head.token_logits(readings[:, :n])[:, 0], found, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, polynomial.decision_function(features))
    at = held_out_of(labels)
    loss = np.mean([bce(logit, label) for logit, label in zip(found[at], labels[at], strict=True)])
    assert polynomial.validation_loss_ == pytest.approx(loss, abs=1e-5)


# --- Training


@pytest.mark.parametrize("classifier", SEQUENCE + VECTOR, ids=name_of)
def test_a_seed_fixes_the_result_and_leaves_other_generators_alone(classifier):
    data = sequences() if classifier in SEQUENCE else vectors()
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1]
    first = clone(classifier).fit(*data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    torch.rand(100)
    np.random.rand(100)
    with torch.inference_mode():
        again = clone(classifier).fit(*data)
    np.testing.assert_array_equal(again.head_.direction, first.head_.direction)
    assert again.history_[1:] == first.history_[1:]
    other = clone(classifier).set_params(random_state=1).fit(*data)
    assert np.abs(other.head_.direction - first.head_.direction).max() > 1e-4
    assert clone(classifier).set_params(random_state=None).fit(*data).head_.direction.shape == first.head_.direction.shape


def test_polynomials_are_trained_order_by_order():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 3))
    labels = (features[:, 0] + 2 * features[:, 1] * features[:, 2] > 0).astype(int)
    polynomial = PolynomialClassifier(degree=3, rank=4, random_state=0, learning_rate=0.02, max_epochs=40).fit(
        features, labels
    )
    low = PolynomialClassifier(degree=1, rank=4, random_state=0, learning_rate=0.02, max_epochs=40).fit(features, labels)
    np.testing.assert_array_equal(polynomial.decision_function(features, degree=1), low.decision_function(features))
    by_order = [min(e.validation_loss for e in polynomial.history_ if e.stage == order) for order in (1, 2, 3)]
    starts = [epoch.validation_loss for epoch in polynomial.history_ if epoch.epoch == 0]
    assert starts[1:] == pytest.approx(by_order[:2], abs=1e-6)
    assert by_order[2] <= by_order[1] < by_order[0] - 0.1
    assert auroc(labels, polynomial.decision_function(features)) > auroc(labels, low.decision_function(features)) + 0.1
    with pytest.raises(InputError, match="trained up to degree 3"):
        polynomial.decision_function(features, degree=4)


@pytest.mark.parametrize("classifier", [SEQUENCE[0], VECTOR[0]], ids=name_of)
def test_no_group_is_on_both_sides(classifier, monkeypatch):
    seen = []

    def keep(parameters, losses, data, schedule, **_):
        seen.append(data)
        return (training.Epoch(1, 0, math.nan, 1.0),)

    for module in ("sequence_classifier", "vector_classifiers"):
        monkeypatch.setattr(f"lmprobe_tl.estimators.{module}.minimise", keep)
    X, labels = sequences(80) if classifier is SEQUENCE[0] else vectors(80)
    groups = np.arange(80) // 8
    for random_state in range(5):
        clone(classifier).set_params(random_state=random_state).fit(X, labels, groups=groups)
        data = seen.pop()
        assert not set(groups[data.learnt]) & set(groups[data.held])
        assert sorted([*data.learnt, *data.held]) == list(range(80))
        assert 8 <= len(data.held) <= 24
        assert set(labels[data.held]) == {0, 1}
    clone(classifier).fit(X, labels)
    assert set(groups[seen[0].learnt]) & set(groups[seen[0].held])


def test_a_linear_head_on_single_tokens_is_logistic_regression():
    features, labels = vectors(200, d=3)
    whole = {"validation_fraction": 0, "batch_tokens": 10**6, "weight_decay": 0, "max_epochs": 400, "learning_rate": 0.1}
    reference = LogisticRegression(C=np.inf).fit(features, labels)
    for classifier in (SoftmaxClassifier(**whole), WindowedClassifier(**whole), MultiMaxClassifier(n_heads=1, **whole)):
        classifier.fit(features, labels)
        np.testing.assert_allclose(classifier.head_.direction, reference.coef_, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(classifier.head_.intercept, reference.intercept_, rtol=1e-2, atol=1e-3)
        assert math.isnan(classifier.validation_loss_)
        assert classifier.best_epoch_ == classifier.n_epochs_ == 400


@pytest.mark.parametrize("classifier", SEQUENCE, ids=name_of)
def test_a_weight_of_two_is_two_copies_and_of_zero_none(classifier):
    arrays, labels = sequences(20)
    weight = np.arange(20) % 3  # unequal classes: the bias of equal ones has no gradient but rounding, which Adam scales up
    whole = clone(classifier).set_params(validation_fraction=0, batch_tokens=10**6, max_epochs=10)
    weighted = clone(whole).fit(arrays, labels, sample_weight=weight)
    copies = np.repeat(np.arange(20), weight)
    repeated = clone(whole).fit([arrays[at] for at in copies], labels[copies])
    np.testing.assert_allclose(weighted.decision_function(arrays), repeated.decision_function(arrays), atol=1e-3)
    assert (
        np.abs(clone(whole).fit(arrays, labels).decision_function(arrays) - weighted.decision_function(arrays)).max() > 0.02
    )


@pytest.mark.parametrize("classifier", SEQUENCE, ids=name_of)
def test_order_batch_mates_and_container_do_not_matter(classifier, monkeypatch):
    arrays, labels = sequences()
    joined = TokenSequences.of(arrays)
    fitted = clone(classifier).fit(arrays, labels)
    from_joined = clone(classifier).fit(joined, labels)
    np.testing.assert_array_equal(from_joined.head_.direction, fitted.head_.direction)
    whole = fitted.decision_function(joined)
    order = np.random.default_rng(0).permutation(len(arrays))
    np.testing.assert_allclose(fitted.decision_function([arrays[at] for at in order]), whole[order], atol=1e-12)
    alone = [fitted.decision_function([array])[0] for array in arrays]
    np.testing.assert_allclose(alone, whole, atol=1e-12)
    monkeypatch.setattr("lmprobe_tl.estimators.sequence_classifier.DECISION_TOKENS", 7)
    monkeypatch.setattr(torch_classifier, "READING_ELEMENTS", 8)
    np.testing.assert_allclose(fitted.decision_function(arrays), whole, atol=1e-12)
    half = TokenSequences(torch.from_numpy(np.asarray(joined.values)).half(), joined.offsets)
    np.testing.assert_allclose(fitted.decision_function(half), whole, atol=0.05)
    assert clone(classifier).fit(half, labels).n_features_in_ == 5


@settings(deadline=None, max_examples=10)
@given(exponent=st.integers(-6, 6), offset=st.floats(-30, 30))
@pytest.mark.parametrize("classifier", [SEQUENCE[0], VECTOR[1]], ids=name_of)
def test_unit_and_origin_do_not_matter(classifier, exponent, offset):
    X, labels = sequences(d=4) if classifier is SEQUENCE[0] else vectors(d=4)
    moved = [(x + np.float32(offset)) * np.float32(10.0**exponent) for x in X]
    expected = clone(classifier).fit(X, labels).decision_function(X)
    np.testing.assert_allclose(clone(classifier).fit(moved, labels).decision_function(moved), expected, atol=2e-3)


def test_scaling_is_that_of_plain_numpy_and_constant_features_take_no_part(monkeypatch):
    monkeypatch.setattr("lmprobe_tl.estimators.token_scaling.BLOCK_ELEMENTS", 30)
    arrays, labels = sequences()
    for array in arrays:
        array[:, 3] = 0.1
    weight = np.arange(40) % 3.0
    found = token_scaling(TokenSequences.of(arrays), weight, standardize=True)
    tokens, of_token = np.concatenate(arrays).astype(float), np.repeat(weight, [len(a) for a in arrays])
    mean = np.average(tokens, axis=0, weights=of_token)
    deviation = np.sqrt(np.average((tokens - mean) ** 2, axis=0, weights=of_token))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    varying = [0, 1, 2, 4]
    np.testing.assert_allclose(found.inverse[varying], 1 / deviation[varying], rtol=1e-12)
    assert found.inverse[3] == 0
    fitted = clone(SEQUENCE[0]).fit(arrays, labels)
    assert (fitted.head_.direction[:, 3] == 0).all()
    plain = clone(SEQUENCE[0]).set_params(standardize=False).fit(arrays, labels)
    assert (plain.head_.direction[2:, 3] != 0).all()


# --- What they find


@pytest.mark.filterwarnings("ignore:.* has learnt nothing:sklearn.exceptions.ConvergenceWarning")  # of shuffled labels
@pytest.mark.parametrize("name", [*SEQUENCE_CLASSIFIERS, *VECTOR_CLASSIFIERS])
def test_every_name_learns_and_shuffled_labels_teach_nothing(name):
    factory = {**SEQUENCE_CLASSIFIERS, **VECTOR_CLASSIFIERS}[name]
    if name in SEQUENCE_CLASSIFIERS:
        (X, labels), (fresh, fresh_labels) = (sequences(200, seed=seed, shift=4.0, longest=20, signal=4) for seed in (0, 1))
    else:
        (X, labels), (fresh, fresh_labels) = (vectors(200, seed=seed) for seed in (0, 1))
    classifier = factory(3)
    assert classifier.random_state == 3
    classifier.set_params(max_epochs=25, learning_rate=0.02, device="cpu")
    fitted = clone(classifier).fit(X, labels)
    assert auroc(fresh_labels, fitted.decision_function(fresh)) > 0.85
    loss, chance = [], []
    for seed in range(3):
        shuffled, fresh_shuffled = (np.random.default_rng(seed).permutation(part) for part in (labels, fresh_labels))
        of_noise = clone(classifier).fit(X, shuffled)
        loss.append(of_noise.validation_loss_)
        chance.append(auroc(fresh_shuffled, of_noise.decision_function(fresh)))
    assert np.mean(loss) > 0.63 > fitted.validation_loss_ + 0.05
    assert 0.42 < np.mean(chance) < 0.58


def test_attention_finds_one_token_among_many_where_the_mean_does_not():
    (arrays, labels), (fresh, fresh_labels) = (sequences(300, d=8, seed=s, shift=6.0, longest=120) for s in (0, 1))
    fitted = AttentionClassifier(n_heads=1, random_state=0, learning_rate=0.02, device="cpu").fit(arrays, labels)
    means, fresh_means = (np.stack([array.mean(axis=0) for array in part]) for part in (arrays, fresh))
    mean = LogisticRegression().fit(means, labels)
    assert auroc(fresh_labels, mean.decision_function(fresh_means)) < 0.75
    assert auroc(fresh_labels, fitted.decision_function(fresh)) > 0.95


@pytest.mark.parametrize(
    ("n_tokens", "expected"),
    [
        (64, {"mean": 0.908, "max": 0.862, "ema_max": 0.950, "rolling_max": 0.996, "softmax": 0.935}),
        (512, {"mean": 0.680, "max": 0.681, "ema_max": 0.869, "rolling_max": 0.978, "softmax": 0.777}),
        (4096, {"mean": 0.566, "max": 0.561, "ema_max": 0.739, "rolling_max": 0.937, "softmax": 0.620}),
    ],
)
def test_long_sequences_dilute_what_a_window_keeps(n_tokens, expected):
    """Ten tokens in a row, shifted by 1.5 deviations among tokens of N(0, 1); no model and no training.

    Each positive has the noise of a negative: an AUROC compares all with all, so that its value stays and its error shrinks.
    """
    generator = torch.Generator().manual_seed(n_tokens)
    n = 2000 if n_tokens == 4096 else 800
    scores = torch.randn(n, n_tokens, generator=generator).repeat(2, 1)
    starts = torch.randint(n_tokens - 9, (n, 1), generator=generator) + torch.arange(10)
    scores[:n].scatter_add_(1, starts, torch.full((n, 10), 1.5))
    labels = np.arange(2 * n) < n
    parameters = {"ema_max": 0.5, "rolling_max": 10, "softmax": 1.0}
    found = {
        name: auroc(
            labels, torch.cat([reduce_batch(part, name, parameters.get(name)) for part in scores.split(200)]).numpy()
        )
        for name in expected
    }
    assert found == pytest.approx(expected, abs=0.02)
    assert found["mean"] == pytest.approx(0.5 + 0.5 * math.erf(15 / math.sqrt(2 * n_tokens) / math.sqrt(2)), abs=0.005)
    if n_tokens == 4096:
        assert found["rolling_max"] >= 0.93
        assert found["mean"] <= 0.60


# --- The contract, and what is refused


def conformance_checks():
    """scikit-learn's own checks. Weights equal copies up to float32 alone, as the test above has it; array API input needs
    an environment variable before scikit-learn is imported."""
    whole = {"validation_fraction": 0, "batch_tokens": 10**6, "max_epochs": 8, "learning_rate": 0.1, "device": "cpu"}
    left_out = {"check_array_api_input", "check_sample_weight_equivalence_on_dense_data"}
    for classifier in SEQUENCE + VECTOR:
        for estimator, check in estimator_checks_generator(clone(classifier).set_params(**whole)):
            if check.func.__name__ not in left_out:
                yield pytest.param(estimator, check, id=f"{check.func.__name__}, {name_of(classifier)}")


@pytest.mark.parametrize(("estimator", "check"), list(conformance_checks()))
def test_they_keep_the_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classifier", [*SEQUENCE, VECTOR[1]], ids=name_of)
def test_three_classes_are_refused_by_name(classifier):
    features, labels = vectors(n_classes=3)
    with pytest.raises(InputError, match=rf"{name_of(classifier)} tells two classes apart, the labels hold 3: \[0 1 2\]"):
        clone(classifier).fit(features, labels)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0; expected a finite number above 0"),
        ({"weight_decay": -1}, "weight_decay is -1; expected a finite number, 0 or more"),
        ({"max_epochs": 1.5}, "max_epochs is 1.5; expected a whole number, 1 or more"),
        ({"patience": True}, "patience is True"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"validation_fraction": 0.9}, "validation_fraction is 0.9; expected a number from 0 to 0.5"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"device": "gpu"}, "device is 'gpu'; expected 'auto', 'cpu' or 'cuda'"),
        ({"learning_rate": 1e30}, r"loss became (nan|inf) in epoch \d: use a lower learning_rate"),
    ],
)
def test_unusable_parameters_are_named(parameters, message):
    with pytest.raises(InputError, match=message):
        clone(SEQUENCE[0]).set_params(**parameters).fit(*sequences())


VECTOR_CLASSES = (MlpClassifier, PolynomialClassifier)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (AttentionClassifier(n_heads=2**13 + 1), "n_heads is 8193; expected a whole number from 1 to 8192"),
        (MultiMaxClassifier(n_heads=2**14 + 1), "n_heads is 16385; expected a whole number from 1 to 16384"),
        (
            RollingAttentionClassifier(n_heads=2, window=2**16 + 1),
            "window is 65537; expected a whole number from 1 to 65536",
        ),
        (WindowedClassifier(window=2**18 + 1), "window is 262145; expected a whole number from 1 to 262144"),
        (SoftmaxClassifier(temperature=1e-12), "temperature=1e-12, expected a finite number, 1e-09 or more"),
        (MlpClassifier(n_hidden=2**14 + 1), "n_hidden is 16385; expected a whole number from 1 to 16384"),
        (PolynomialClassifier(degree=3, rank=2**13), "rank is 8192; expected a whole number from 1 to 8191"),
    ],
)
def test_what_no_probe_file_can_hold_is_not_trained(classifier, message):
    with pytest.raises(InputError, match=message):
        classifier.fit(*(vectors() if type(classifier) in VECTOR_CLASSES else sequences()))


def test_unusable_inputs_are_named():
    arrays, labels = sequences()
    fitted = clone(SEQUENCE[0]).fit(arrays, labels)
    spoilt = [array.copy() for array in arrays]
    spoilt[7][0, 2] = np.nan
    cases = [
        (lambda: fitted.fit(spoilt, labels), "NaN or infinite values, first at token 0 of sequence 7"),
        (lambda: fitted.decision_function(spoilt), "first at token 0 of sequence 7"),
        (lambda: fitted.decision_function([np.ones((2, 3))]), "X has 3 features, but AttentionClassifier is expecting 5"),
        (lambda: fitted.fit(arrays, labels[1:]), "40 sequences and y 39 labels"),
        (lambda: fitted.fit(arrays, labels, groups=labels[1:]), r"groups has shape \(39,\)"),
        (lambda: fitted.fit(arrays, np.arange(40) == 0), "Class True has one example.*validation_fraction=0"),
        (lambda: fitted.fit([*arrays[1:], np.ones((0, 5))], labels), r"Sequence 39 is ndarray of shape \(0, 5\)"),
        (lambda: fitted.fit([*arrays[1:], np.ones((2, 4))], labels), "Sequence 39 has 4 features a token, the first 5"),
        (lambda: TokenSequences(np.ones((3, 2)), [0, 1, 1, 3]), "Sequence 1 has 0 tokens"),
        (lambda: TokenSequences(np.ones((3, 2)), [0, 2]), r"number of tokens \(3\)"),
        (lambda: TokenSequences(np.ones((3, 2), dtype=int), [0, 3]), "values must be floats"),
        (lambda: TokenSequences(np.ones((3, 2)), [0.0, 3.0]), "offsets must be whole numbers"),
        (lambda: fitted_head(MassMeanClassifier().fit(*vectors())), "MassMeanClassifier has no head"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(NotFittedError):
        AttentionClassifier().decision_function(arrays)


def test_fitted_heads_say_what_reduces_their_tokens():
    arrays, labels = sequences()
    own = [fitted_head(clone(classifier).fit(arrays, labels)).own_pooling for classifier in SEQUENCE]
    assert own == ["sequence"] * 3 + ["score:softmax(2)", "score:rolling_max(3)"]
    assert SoftmaxClassifier(temperature=0.7)._design().own_pooling == "score:softmax(0.7)"
    attention = fitted_head(clone(SEQUENCE[0]).fit(arrays, labels))
    assert (attention.intercept[:2] == 0).all()
    assert attention.intercept[2] != 0
    assert replace(attention, n_heads=1).n_heads == 1


def test_sequences_can_be_read_one_by_one_and_share_memory():
    values = np.arange(10.0).reshape(5, 2)
    values.flags.writeable = False
    whole = TokenSequences(values, torch.tensor([0, 2, 5]))
    assert [part.shape for part in whole] == [(2, 2), (3, 2)]
    assert (whole[-1] == values[2:]).all()
    assert np.shares_memory(whole.values, values)
    assert whole.tensor.data_ptr() == values.ctypes.data
    with pytest.raises(IndexError):
        whole[2]


def test_attention_of_ragged_rows_survives_large_queries():
    query = torch.tensor([[500.0], [-500.0], [-1000.0], [-1001.0]], dtype=torch.float64)
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    found = ragged.attention(query, values, Segments(torch.tensor([2, 2])))
    assert found[:, 0].tolist() == pytest.approx([1.0, 3 + 1 / (1 + math.e)])
