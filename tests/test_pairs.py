"""Classifiers of contrast pairs: which examples make a pair, PCA of the differences, and contrast-consistent search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.special import expit, logit
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from lmprobe_tl import Probe, attach_probes, extract_activations, extract_to_store, load_probe, sweep
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import CcsClassifier, PcaClassifier, linear_rule, make_classifier
from lmprobe_tl.estimators import pairs as pairs_module
from lmprobe_tl.estimators.ccs import _penalised, check_truth, contrast_loss
from lmprobe_tl.estimators.pairs import PairedClassifier, learns_from_pairs, pair_rows
from lmprobe_tl.metrics import auroc

CLASSIFIERS: list[Any] = [PcaClassifier(), CcsClassifier(random_state=0)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def stacked(negative: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([negative, positive]), np.repeat([0, 1], len(negative))


# --- Which examples make a pair


def test_pairs_go_by_order_or_by_key() -> None:
    classes, rows = pair_rows(["yes", "no", "no", "yes"])
    assert classes.tolist() == ["no", "yes"]
    assert rows.tolist() == [[1, 0], [2, 3]]
    assert pair_rows(["yes", "no", "no", "yes"], ["a", "b", "a", "b"])[1].tolist() == [[2, 0], [1, 3]]


@pytest.mark.parametrize(
    ("labels", "keys", "message"),
    [
        ([0, 1, 1, 0, 1, 1], None, r"there are 2 and 4 of them: rows 4, 5 have no partner"),
        ([0, 1, 0], None, r"row 2 has no partner"),
        ([0, 1, 2], None, r"hold 3 classes"),
        ([1, 1], None, r"hold 1 class\."),
        ([0, 1, 0, 1], [5, 5, 6, 7], r"pair 6 holds 1 and 0 of them: rows 2, 3 have not exactly one partner"),
        ([0, 1, 0, 1, 0], list("aabba"), r"pair 'a' holds 2 and 1 of them: rows 0, 1, 4 have"),
        ([0, 1], [1], r"shape \(1,\), expected .* \(2,\)"),
        ([0] * 15 + [1], None, r"rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more have"),
    ],
)
def test_rows_without_a_partner_are_named(labels: Any, keys: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair_rows(np.array(labels), keys)
    with pytest.raises(InputError, match=message):
        PcaClassifier().fit(np.random.default_rng(0).standard_normal((len(labels), 3)), labels, keys)


@settings(max_examples=30)
@given(st.permutations(range(12)))
def test_with_keys_the_order_of_examples_does_not_matter(order: list[int]) -> None:
    features, labels = stacked(*np.random.default_rng(0).normal(size=(2, 6, 4)) + np.array([[[0.0]], [[1.0]]]))
    keys = np.tile(np.arange(6), 2)
    for classifier in CLASSIFIERS:
        expected = clone(classifier).fit(features, labels, keys)
        found = clone(classifier).fit(features[order], labels[order], keys[order])
        np.testing.assert_allclose(found.coef_, expected.coef_, rtol=1e-3, atol=1e-4)
    assert clone(classifier).fit(features, labels, keys).coef_.tolist() == expected.coef_.tolist()


# --- scikit-learn's contract


def conformance_checks() -> Any:
    """scikit-learn's own checks. Contrast-consistent search must not find what tells the classes apart, as one of them
    demands; that of array API input needs an environment variable before scikit-learn is imported."""
    for classifier in CLASSIFIERS:
        for estimator, check in estimator_checks_generator(classifier):
            name = check.func.__name__
            is_left_out = name == "check_classifiers_train" and isinstance(classifier, CcsClassifier)
            if name != "check_array_api_input" and not is_left_out:
                yield pytest.param(estimator, check, id=f"{type(classifier).__name__}, {name}")


@pytest.mark.parametrize(("estimator", "check"), list(conformance_checks()))
def test_the_scikit_learn_contract(estimator: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks draw classes of unequal size, so that here examples without a partner are left out."""

    def forgiving(labels: Any, pairs: Any = None) -> Any:
        classes, index = np.unique(labels, return_inverse=True)
        sides = [np.flatnonzero(index == side) for side in (0, 1)]
        n_pairs = min(map(len, sides))
        if len(classes) != 2 or not n_pairs:
            return pair_rows(labels, pairs)
        return classes, np.column_stack([side[:n_pairs] for side in sides])

    monkeypatch.setattr(pairs_module, "pair_rows", forgiving)
    check(estimator)


# --- PCA of differences


def lopsided_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose mean difference is along axis 0, with wider spread of the differences along axis 1."""
    rng = np.random.default_rng(0)
    negative = rng.standard_normal((300, 16))
    differences = rng.standard_normal((300, 16)) * 0.5
    differences[:, 0] += 5.0
    differences[:, 1] *= 5.0
    return negative, negative + differences


def test_the_direction_is_that_of_a_plain_loop_and_not_of_a_centred_pca() -> None:
    negative, positive = lopsided_pairs()
    fitted = PcaClassifier().fit(*stacked(negative, positive))
    vector = np.ones(16)
    for _ in range(200):  # power iteration
        total = np.zeros(16)
        for one, other in zip(negative, positive, strict=True):
            total += ((other - one) @ vector) * (other - one)
        vector = total / np.linalg.norm(total)
    votes = sum(1 if (other - one) @ vector > 0 else -1 for one, other in zip(negative, positive, strict=True))
    vector *= np.sign(votes)
    assert cosine(fitted.coef_[0], vector) == pytest.approx(1.0, abs=1e-9)
    share = ((positive - negative) @ vector) ** 2
    assert fitted.share_ == pytest.approx(share.sum() / ((positive - negative) ** 2).sum())
    mean = (positive - negative).mean(axis=0)
    centred = PCA(1).fit(positive - negative).components_[0]
    assert cosine(fitted.coef_[0], mean) > 0.99
    assert abs(cosine(centred, mean)) < 0.05  # the control: centring takes away what tells the classes apart


def test_scale_and_intercept_are_those_of_a_logistic_regression_on_the_projections() -> None:
    rng = np.random.default_rng(1)
    negative = rng.standard_normal((4000, 6)) + 40.0
    positive = negative + rng.standard_normal((4000, 6)) * 0.5
    positive[:, 2] += 1.5
    features, labels = stacked(negative, positive)
    fitted = PcaClassifier().fit(features, labels)
    projections = features @ fitted.coef_[0] / np.linalg.norm(fitted.coef_)
    reference = LogisticRegression(C=np.inf, tol=1e-8).fit(projections[:, None], labels)
    np.testing.assert_allclose(fitted.predict_proba(features), reference.predict_proba(projections[:, None]), atol=2e-3)


def test_wide_and_narrow_features_give_the_same_direction() -> None:
    """The one from the Gram matrix of pairs, the other from that of features."""
    negative, positive = lopsided_pairs()
    fitted = PcaClassifier().fit(*stacked(negative, positive))
    basis = np.linalg.qr(np.random.default_rng(3).standard_normal((400, 16)))[0]
    wide = PcaClassifier().fit(*stacked(negative @ basis.T, positive @ basis.T))
    np.testing.assert_allclose(wide.coef_ @ basis, fitted.coef_, atol=1e-8)
    assert wide.share_ == pytest.approx(fitted.share_)


def test_the_sign_is_that_of_the_vote_even_against_the_mean() -> None:
    differences = np.array([[1.0]] * 7 + [[-9.0]] * 2)
    fitted = PcaClassifier().fit(*stacked(np.zeros((9, 1)), differences))
    assert differences.mean() < 0 < fitted.coef_[0, 0]
    assert PcaClassifier().fit(*stacked(np.zeros((9, 1)), -differences)).coef_[0, 0] < 0
    tied = np.array([[1.0], [-3.0]])
    assert PcaClassifier().fit(*stacked(np.zeros((2, 1)), tied)).coef_[0, 0] < 0


def test_pairs_of_equals_teach_nothing() -> None:
    with pytest.raises(InputError, match="two examples of each pair are equal"):
        PcaClassifier().fit(np.ones((6, 3)), [0, 1] * 3)


@settings(max_examples=20)
@given(st.integers(-3, 3), st.floats(-10, 10))
def test_unit_and_origin_do_not_matter(exponent: int, offset: float) -> None:
    negative, positive, _ = truth_pairs(40, seed=3)
    features, labels = stacked(negative, positive)
    moved = (features + offset) * 10.0**exponent
    for classifier, tolerance in zip(CLASSIFIERS, (1e-6, 5e-3), strict=True):
        expected = clone(classifier).fit(features, labels).predict_proba(features)
        np.testing.assert_allclose(clone(classifier).fit(moved, labels).predict_proba(moved), expected, atol=tolerance)


# --- Contrast-consistent search

TRUTH, SIDE, TOPIC, N_FEATURES = 3, 5, 7, 24


def truth_pairs(n_pairs: int, *, seed: int = 0, share: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negatives, positives [n_pairs n_features] and which positives are true: truth along axis 3, what tells the sides apart
    along 5, and along 7 a topic, shared by both and wider than all else."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n_pairs) < share
    shared = rng.standard_normal((n_pairs, N_FEATURES))
    sides = [shared + 0.7 * rng.standard_normal((n_pairs, N_FEATURES)) for _ in range(2)]
    topic = rng.standard_normal(n_pairs) * 8
    for side, sign in zip(sides, (-1, 1), strict=True):
        side[:, TRUTH] = sign * np.where(truth, 2.0, -2.0) + 0.7 * rng.standard_normal(n_pairs)
        side[:, SIDE] += sign * 5.0
        side[:, TOPIC] += topic
    return sides[0], sides[1], truth


def is_true(truth: np.ndarray) -> np.ndarray:
    """Of each row of negatives and then positives."""
    return np.concatenate([~truth, truth])


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_truth_is_found_without_labels_up_to_sign(share: float) -> None:
    negative, positive, truth = truth_pairs(300, share=share)
    features, labels = stacked(negative, positive)
    fitted = CcsClassifier(random_state=0).fit(features, labels)
    assert abs(fitted.coef_[0]).argmax() == TRUTH
    assert abs(fitted.coef_[0, TRUTH]) / np.linalg.norm(fitted.coef_) > 0.95
    fitted.orient(truth)
    fresh_negative, fresh_positive, fresh_truth = truth_pairs(300, seed=1, share=share)
    fresh, _ = stacked(fresh_negative, fresh_positive)
    assert auroc(is_true(fresh_truth), fitted.decision_function(fresh)) > 0.97
    assert (fitted.predict(fresh) == is_true(fresh_truth)).mean() > 0.9  # one rule serves both sides
    # Controls: what tells the sides apart and what both share is not found, and other methods find just that.
    assert abs(fitted.coef_[0, [SIDE, TOPIC]]).max() / np.linalg.norm(fitted.coef_) < 0.15
    assert abs(cosine(PcaClassifier().fit(features, labels).coef_[0], np.eye(N_FEATURES)[SIDE])) > 0.95
    assert abs(PCA(1).fit(features).components_[0, TOPIC]) > 0.95


def test_without_partners_there_is_no_truth_to_find() -> None:
    negative, positive, truth = truth_pairs(300)
    order = np.random.default_rng(0).permutation(300)
    fitted = CcsClassifier(random_state=0).fit(*stacked(negative[order], positive))
    assert fitted.loss_ > CcsClassifier(random_state=0).fit(*stacked(negative, positive)).loss_ + 0.02
    # Shuffled sides: what tells them apart is the most consistent direction that is left.
    swapped = np.random.default_rng(1).random(300)[:, None] < 0.5
    features, labels = stacked(np.where(swapped, positive, negative), np.where(swapped, negative, positive))
    found = CcsClassifier(random_state=0).fit(features, labels)
    assert abs(found.coef_[0]).argmax() == SIDE
    assert abs(auroc(is_true(truth), found.decision_function(stacked(negative, positive)[0])) - 0.5) < 0.1


def test_shuffled_labels_give_chance() -> None:
    rng = np.random.default_rng(0)
    negative, positive = rng.standard_normal((2, 200, 20))  # no class differs from another
    fresh, labels = stacked(*rng.standard_normal((2, 2000, 20)))
    fitted = PcaClassifier().fit(*stacked(negative, positive))
    assert abs(auroc(labels, fitted.decision_function(fresh)) - 0.5) < 0.05
    truth = rng.random(200) < 0.5
    fitted = CcsClassifier(random_state=0).fit(*stacked(negative, positive)).orient(truth)
    assert abs(auroc(labels, fitted.decision_function(fresh)) - 0.5) < 0.05


def test_the_loss_is_that_of_a_plain_loop_and_its_gradient_is_right() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((2, 50))
    expected = 0.0
    for minus, plus in zip(*probabilities, strict=True):
        expected += (plus - (1 - minus)) ** 2 + min(plus, minus) ** 2
    assert contrast_loss(*probabilities) == pytest.approx(expected / 50)
    examples, weights = rng.standard_normal((20, 4)), rng.standard_normal(4)
    loss = [lambda w: _penalised(w, examples, 0.3)[0], lambda w: _penalised(w, examples, 0.3)[1]]
    assert check_grad(*loss, weights) < 1e-6
    p = expit(examples @ weights).reshape(2, 10)
    assert loss[0](weights) == pytest.approx(contrast_loss(*p) + 0.15 * (weights**2).sum())


def found_weights(fitted: CcsClassifier, examples: np.ndarray, unit: float) -> np.ndarray:
    """The weights as the search found them: turned over for its sign, a rule has another loss, since min(p+, p-) has."""
    weights = fitted.coef_[0] * unit
    losses = [contrast_loss(*expit(sign * examples @ weights).reshape(2, -1)) for sign in (1, -1)]
    return weights * (1, -1)[int(np.abs(np.array(losses) - fitted.loss_).argmin())]


def test_the_fitted_rule_is_an_optimum_of_the_stated_problem_and_uses_the_midpoint() -> None:
    negative, positive, _ = truth_pairs(100)
    fitted = CcsClassifier(l2=0.02, random_state=0).fit(*stacked(negative, positive))
    own = [side - side.mean(axis=0) for side in (negative, positive)]
    unit = np.sqrt(np.mean([((b - a) / 2) @ ((b - a) / 2) for a, b in zip(*own, strict=True)]))
    examples = np.concatenate(own) / unit
    weights = found_weights(fitted, examples, unit)
    assert fitted.loss_ == pytest.approx(contrast_loss(*expit(examples @ weights).reshape(2, -1)), rel=1e-6)
    best = _penalised(weights, examples, 0.02)[0]
    assert np.abs(_penalised(weights, examples, 0.02)[1]).max() < 1e-3
    for seed in range(5):  # no other start of ours finds a better one, nor does a small step
        step = 0.05 * np.random.default_rng(seed).standard_normal(len(weights))
        assert _penalised(weights + step, examples, 0.02)[0] > best
    midpoint = (negative.mean(axis=0) + positive.mean(axis=0)) / 2
    assert fitted.decision_function(midpoint[None])[0] == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(fitted.pair_gaps_, (own[1] - own[0]) @ fitted.coef_[0])


def test_more_restarts_never_give_a_greater_loss_and_the_seed_decides() -> None:
    features, labels = stacked(*truth_pairs(30)[:2])

    def penalised(n_restarts: int) -> float:
        fitted = CcsClassifier(n_restarts=n_restarts, l2=1e-3, random_state=5).fit(features, labels)
        own = np.concatenate([side - side.mean(axis=0) for side in np.split(features, 2)])
        unit = np.sqrt((((own[30:] - own[:30]) / 2) ** 2).sum(axis=1).mean())
        return _penalised(found_weights(fitted, own / unit, unit), own / unit, 1e-3)[0]

    losses = [penalised(n) for n in (1, 3, 12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]  # restarts do help here
    one, two = (CcsClassifier(random_state=3).fit(features, labels) for _ in range(2))
    assert one.coef_.tobytes() == two.coef_.tobytes()
    assert CcsClassifier(random_state=4, n_restarts=1).fit(features, labels).coef_.tobytes() != one.coef_.tobytes()


def test_more_features_than_examples() -> None:
    negative, positive, truth = truth_pairs(40)
    basis = np.linalg.qr(np.random.default_rng(3).standard_normal((200, N_FEATURES)))[0]
    narrow = CcsClassifier(random_state=0).fit(*stacked(negative, positive)).orient(truth)
    wide = CcsClassifier(random_state=0).fit(*stacked(negative @ basis.T, positive @ basis.T)).orient(truth)
    np.testing.assert_allclose(np.abs(cosine(wide.coef_[0] @ basis, narrow.coef_[0])), 1.0, atol=1e-2)
    outside = wide.coef_[0] - basis @ (basis.T @ wide.coef_[0])
    assert np.abs(outside).max() < 1e-9


def test_labels_decide_the_sign() -> None:
    negative, positive, truth = truth_pairs(100)
    fitted = CcsClassifier(random_state=0).fit(*stacked(negative, positive))
    features, _ = stacked(negative, positive)
    assert auroc(is_true(truth), fitted.orient(truth).decision_function(features)) > 0.95
    before = fitted.coef_.copy()
    assert fitted.orient(truth) is fitted
    assert (fitted.coef_ == before).all()
    assert (fitted.orient(~truth).coef_ == -before).all()
    assert auroc(is_true(truth), fitted.decision_function(features)) < 0.05


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([True] * 4, "all 4 pairs the positive is the true one"),
        ([0, 0, 0, 0], "all 4 pairs the negative is the true one"),
        ([0, 1, 1], "expected 4 of True or False"),
        ([0, 1, 2, 1], "expected 4 of True or False"),
        (["a", "b", "a", "b"], "expected 4 of True or False"),
    ],
)
def test_a_truth_that_decides_nothing_is_refused(truth: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_truth(truth, 4)


@pytest.mark.parametrize(
    "options", [{"l2": 0}, {"l2": np.inf}, {"n_restarts": 0}, {"n_restarts": 2.5}, {"n_restarts": True}]
)
def test_unusable_parameters_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        CcsClassifier(**options).fit(*stacked(*truth_pairs(10)[:2]))


def test_pairs_that_differ_by_a_constant_hold_no_truth() -> None:
    negative = np.random.default_rng(0).standard_normal((10, 4))
    with pytest.raises(InputError, match="no truth to find"):
        CcsClassifier().fit(*stacked(negative, negative + 3.0))


# --- In a probe

TAILS = ("cats", "rain")


def contrast_prompts(count: int, seed: int = 0) -> tuple[list[str], list[str], np.ndarray]:
    """Positives, negatives and truth; 'cats' at the end of a text is true, and 'a'/'the' before it tells the side."""
    rng = np.random.default_rng(seed)
    starts = [" ".join(rng.choice(["light", "and", "music", "dogs", "sun"], 3)) for _ in range(count)]
    truth = rng.random(count) < 0.5
    positive = [f"{start} the {TAILS[int(not is_so)]}" for start, is_so in zip(starts, truth, strict=True)]
    negative = [f"{start} a {TAILS[int(is_so)]}" for start, is_so in zip(starts, truth, strict=True)]
    return positive, negative, truth


@pytest.mark.parametrize("name", ["pca", "ccs"])
def test_what_is_saved_and_runs_live_says_what_the_probe_says(tiny: Tiny, name: str, tmp_path: Any) -> None:
    positive, negative, truth = contrast_prompts(30)
    probe = Probe(tiny.bridge, [1, 3], classifier=name, random_state=0, progress=False)
    probe.fit_contrast(positive, negative, truth=truth if name == "ccs" else None)
    weights = load_probe(probe.save(tmp_path / "p.safetensors"))
    assert weights.spec.training.classifier == name
    expected = probe.decision_function(positive)
    found = extract_activations(tiny.bridge, positive, [1, 3], progress=False)
    np.testing.assert_allclose(weights.logits(found.concatenated()), expected, rtol=1e-3, atol=1e-3)
    with attach_probes(tiny.bridge, [weights]) as monitor:
        tiny.bridge(np_tokens(found.tokens[0]))
        assert monitor.token_scores("probe")[0][-1].item() == pytest.approx(expected[0], abs=2e-3)


def np_tokens(row: list[int]) -> Any:
    import torch

    return torch.tensor([row])


def test_in_a_probe_ccs_finds_the_truth_without_labels_and_pca_with(llama: Tiny) -> None:
    positive, negative, truth = contrast_prompts(60)
    fresh_positive, fresh_negative, fresh_truth = contrast_prompts(40, seed=1)
    fresh, labels = [*fresh_negative, *fresh_positive], is_true(fresh_truth).astype(int)
    ccs = Probe(llama.bridge, 2, classifier="ccs", random_state=0, progress=False)
    ccs.fit_contrast(positive, negative, truth=truth)
    assert ccs.evaluate(fresh, labels, n_bootstrap=20).auroc.value > 0.95
    turned = Probe(llama.bridge, 2, classifier="ccs", random_state=0, progress=False)
    turned.fit_contrast(positive, negative, truth=~truth)
    np.testing.assert_allclose(turned.decision_function(fresh), -ccs.decision_function(fresh))
    pca = Probe(llama.bridge, 2, classifier="pca", progress=False)
    true = [p if is_so else n for p, n, is_so in zip(positive, negative, truth, strict=True)]
    false = [n if is_so else p for p, n, is_so in zip(positive, negative, truth, strict=True)]
    pca.fit_contrast(true, false)
    assert pca.evaluate(fresh, labels, n_bootstrap=20).auroc.value > 0.95


@pytest.mark.parametrize("name", ["pca", "ccs"])
def test_labels_pair_by_order_within_the_classes(llama: Tiny, name: str) -> None:
    positive, negative, _ = contrast_prompts(12)
    probes = [Probe(llama.bridge, 2, classifier=name, random_state=0, progress=False) for _ in range(2)]
    expected = probes[0].fit_contrast(positive, negative).weights_.direction
    mixed = [prompt for pair in zip(positive, negative, strict=True) for prompt in pair]
    found = probes[1].fit(mixed, ["yes", "no"] * 12).weights_.direction
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)
    store_probe = Probe(llama.bridge, 2, classifier=name, random_state=0, progress=False)
    wrong = store_probe.fit(mixed[2:] + mixed[:2], ["yes", "no"] * 12)  # the same pairs in another order
    np.testing.assert_allclose(wrong.weights_.direction, expected, rtol=2e-2, atol=1e-3)


def test_a_store_gives_the_same_probe(llama: Tiny, tmp_path: Any) -> None:
    positive, negative, _ = contrast_prompts(12)
    prompts, labels = [*negative, *positive], [0] * 12 + [1] * 12
    store = extract_to_store(llama.bridge, prompts, tmp_path / "store", 2, ["last_token", "all"], progress=False)
    for name in ("pca", "ccs"):
        probe = Probe(llama.bridge, 2, classifier=name, random_state=0, progress=False)
        stored = clone(probe).fit_store(store, labels).decision_function(prompts)
        np.testing.assert_allclose(stored, probe.fit(prompts, labels).decision_function(prompts), atol=1e-3)
        with pytest.raises(InputError, match="tokens have no partner"):
            Probe(llama.bridge, 2, "all", classifier=name).fit_store(store, labels)


@pytest.mark.parametrize(
    ("classifier", "options", "counts", "truth", "message"),
    [
        ("pca", {}, (5, 4), None, "positive has 5 prompts and negative 4, but PcaClassifier learns from pairs"),
        (make_pipeline(StandardScaler(), PcaClassifier()), {}, (4, 5), None, "positive has 4 prompts and negative 5"),
        ("ccs", {"pooling": "all"}, (4, 4), None, "tokens have no partner"),
        ("ccs", {}, (4, 4), [True] * 4, "all 4 pairs the positive"),
        ("ccs", {}, (4, 4), [True, False], "expected 4 of True or False"),
        ("mass_mean", {}, (4, 4), [True, False] * 2, "MassMeanClassifier takes positive to be what it shall find"),
    ],
)
def test_what_makes_no_pairs_is_refused_before_the_model_runs(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, classifier: Any, options: Any, counts: Any, truth: Any, message: str
) -> None:
    monkeypatch.setattr("lmprobe_tl.forward_batches.run_to_hook_points", lambda *_: pytest.fail("the model ran"))
    positive, negative, _ = contrast_prompts(5)
    with pytest.raises(InputError, match=message):
        Probe(llama.bridge, 2, classifier=classifier, **options).fit_contrast(
            positive[: counts[0]], negative[: counts[1]], truth=truth
        )
    if counts[0] != counts[1]:
        with pytest.raises(InputError, match="no partner"):
            Probe(llama.bridge, 2, classifier=classifier, **options).fit(positive, [0, 0, 1, 1, 1])


def test_a_sweep_would_part_pairs(llama: Tiny) -> None:
    with pytest.raises(InputError, match="PcaClassifier learns from pairs of prompts, and a sweep's splits would part them"):
        sweep(llama.bridge, ["a", "b"] * 10, [0, 1] * 10, classifiers=["lda", "pca"])


def test_pipelines_and_names_are_known_to_need_pairs() -> None:
    pipeline = make_pipeline(StandardScaler(), make_pipeline(StandardScaler(), CcsClassifier(random_state=0)))
    assert learns_from_pairs(pipeline)
    assert learns_from_pairs(make_classifier("pca", None))
    assert not learns_from_pairs(make_classifier("lda", None))
    assert make_classifier("ccs", 7).random_state == 7
    features, labels = stacked(*truth_pairs(20)[:2])
    for classifier in (pipeline, make_classifier("pca", None), make_classifier("ccs", 0)):
        rule = linear_rule(classifier.fit(features, labels), features)
        np.testing.assert_allclose(rule.logits(features)[:, 0], classifier.decision_function(features), atol=1e-7)
        np.testing.assert_allclose(
            logit(classifier.predict_proba(features)[:, 1]), classifier.decision_function(features), atol=1e-6
        )
    with pytest.raises(NotImplementedError):
        PairedClassifier().fit(features, labels)
