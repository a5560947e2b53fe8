"""Stacking over layers: a plain loop, the folds, where it helps, and that one rule says it all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import D_MODEL, Tiny
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, ShuffleSplit, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from lmprobe_tl import Probe, attach_probes, extract_activations, extract_to_store, load_probe, sweep
from lmprobe_tl.errors import InputError, NonlinearClassifierError
from lmprobe_tl.estimators import LayerStackClassifier, linear_rule, make_classifier
from lmprobe_tl.estimators.fitting import fit_classifier
from lmprobe_tl.estimators.layer_stack import with_n_blocks
from lmprobe_tl.metrics import auroc

BASE = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000)


def layers(n: int = 200, strengths: Any = (0, 2, 0, 2), width: int = 10, seed: int = 0, n_classes: int = 2) -> Any:
    """Features [n n_layers * width] of layers whose classes lie `strengths` standard deviations apart, and labels [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    features = rng.standard_normal((n, len(strengths), width))
    for layer, strength in enumerate(strengths):
        features[np.arange(n), layer, labels] += strength
    return features.reshape(n, -1), labels


# --- The contract and a plain loop


def conformance_checks() -> Any:
    """scikit-learn's own checks; that of array API input needs an environment variable before scikit-learn is imported."""
    for estimator, check in estimator_checks_generator(LayerStackClassifier(1, BASE, cv=2)):
        if check.func.__name__ != "check_array_api_input":
            yield pytest.param(estimator, check, id=check.func.__name__)


@pytest.mark.parametrize(("estimator", "check"), list(conformance_checks()))
def test_the_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_one_rule_says_what_a_plain_loop_says(n_classes: int, weighted: bool) -> None:
    features, labels = layers(n_classes=n_classes)
    weight = np.random.default_rng(0).uniform(0.5, 2, 200) if weighted else None
    stack = LayerStackClassifier(4, BASE, cv=3).fit(features, labels, sample_weight=weight)
    weight = np.ones(200) if weight is None else weight
    held_out, in_use, fresh = [], [], layers(seed=1, n_classes=n_classes)[0]
    for layer in range(4):
        block = features[:, layer * 10 : (layer + 1) * 10]
        logits = np.zeros((200, n_classes))
        for train, test in StratifiedKFold(3).split(block, labels):
            fitted = clone(BASE).fit(block[train], labels[train], sample_weight=weight[train])
            logits[test] = fitted.decision_function(block[test]).reshape(len(test), -1)
        held_out.append(logits[:, : 1 if n_classes == 2 else n_classes])
        whole = clone(BASE).fit(block, labels, sample_weight=weight)
        in_use.append(whole.decision_function(fresh[:, layer * 10 : (layer + 1) * 10]).reshape(200, -1))
    scaler = StandardScaler().fit(np.hstack(held_out), sample_weight=weight)
    final = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(np.hstack(held_out)), labels, sample_weight=weight)
    expected = final.decision_function(scaler.transform(np.hstack(in_use)))
    np.testing.assert_allclose(stack.decision_function(fresh), expected, atol=1e-4)
    assert stack.coef_.shape == (1 if n_classes == 2 else 3, 40)
    np.testing.assert_allclose(linear_rule(stack, features).direction, stack.coef_)
    # The control: had the layers been judged on what they learnt from, another rule would come out.
    pairs = zip(stack.estimators_, np.split(features, 4, axis=1), strict=True)
    logits = [one.decision_function(block).reshape(200, -1) for one, block in pairs]
    sure = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(np.hstack(logits), labels)
    assert np.abs(sure[-1].coef_ - final.coef_).max() > 0.05


def test_a_named_base_is_what_it_is_by_itself() -> None:
    features, labels = layers()
    for name in ("logistic_regression", "mass_mean", "ridge", "lda"):
        stack = LayerStackClassifier(4, name).fit(features, labels)
        alone = fit_classifier(make_classifier(name, None), features[:, :10], labels)
        np.testing.assert_allclose(
            stack.estimators_[0].decision_function(features[:, :10]), alone.decision_function(features[:, :10]), atol=2e-3
        )


# --- Where it helps


def test_it_beats_the_best_single_layer_where_the_signals_are_in_different_ones() -> None:
    strengths = (0, 1.2, 0, 1.2, 0, 1.2)
    features, labels = layers(300, strengths)
    fresh, truth = layers(4000, strengths, seed=1)
    stack = LayerStackClassifier(6).fit(features, labels)
    single = [
        auroc(truth, one.decision_function(block))
        for one, block in zip(stack.estimators_, np.split(fresh, 6, axis=1), strict=True)
    ]
    found = auroc(truth, stack.decision_function(fresh))
    assert found > max(single) + 0.05
    weights = np.abs(stack.combiner_[-1].coef_[0])
    assert weights[1::2].min() > 2 * weights[::2].max()  # and it knows which layers say something
    # The control: with one layer that says it all, there is nothing to gain.
    features, labels = layers(300, (0, 2, 0))
    fresh, truth = layers(4000, (0, 2, 0), seed=1)
    stack = LayerStackClassifier(3).fit(features, labels)
    alone = auroc(truth, stack.estimators_[1].decision_function(fresh[:, 10:20]))
    assert auroc(truth, stack.decision_function(fresh)) == pytest.approx(alone, abs=0.01)


def test_a_layer_of_noise_alone_may_count_negatively() -> None:
    """Where two layers share their noise, one without the signal tells that of the other."""
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 2, 600), rng.standard_normal((600, 10))
    first, second = noise + 0.2 * rng.standard_normal((2, 600, 10))
    first[:, 0] += labels
    second[:, 0] += 0.3 * labels
    features = np.hstack([first, second])
    stack = LayerStackClassifier(2, BASE).fit(features[:300], labels[:300])
    assert stack.combiner_[-1].coef_[0, 1] < 0 < stack.combiner_[-1].coef_[0, 0]
    alone = auroc(labels[300:], stack.estimators_[0].decision_function(first[300:]))
    assert auroc(labels[300:], stack.decision_function(features[300:])) > alone + 0.05


def test_shuffled_labels_give_chance() -> None:
    features, labels = layers(400)
    fresh, truth = layers(4000, seed=1)
    rng = np.random.default_rng(5)
    shuffled = [rng.permutation(labels) for _ in range(12)]
    found = [auroc(truth, LayerStackClassifier(4).fit(features, y).decision_function(fresh)) for y in (labels, *shuffled)]
    assert found[0] > 0.9
    assert abs(np.mean(found[1:]) - 0.5) < 0.1


# --- Folds and parameters


def test_folds_never_part_a_group() -> None:
    features, labels = layers(60)
    groups = np.repeat(np.arange(20), 3)
    labels = np.repeat(labels[:20], 3)
    stack = fit_classifier(LayerStackClassifier(4, cv=4), features, labels, groups=groups)
    assert len(stack.cv) == 4
    for train, test in stack.cv:
        assert not set(groups[train]) & set(groups[test])
    by_hand = list(GroupKFold(4).split(features, labels, groups))
    assert LayerStackClassifier(4, cv=by_hand).fit(features, labels).coef_.shape == (1, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_blocks": None}, "n_blocks is None; expected the number of layers"),
        ({"n_blocks": 0}, "n_blocks is 0"),
        ({"n_blocks": True}, "n_blocks is True"),
        ({"n_blocks": 2.0}, "n_blocks is 2.0"),
        ({"n_blocks": 3}, "40 features cannot be split into n_blocks=3 layers"),
        ({"cv": 20}, r"smallest class has 1. examples, fewer than the cv=20 folds"),
        ({"cv": ShuffleSplit(2, random_state=0)}, "does not hold every one of the 30 examples out exactly once"),
        ({"cv": [(np.arange(1), np.arange(30))]}, "has a fold without class [01] to learn from"),
        ({"base": "logistic"}, "Closest: 'logistic_regression'"),
    ],
)
def test_unusable_parameters_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerStackClassifier(**{"n_blocks": 4, **options}).fit(*layers(30))


def test_a_base_without_a_linear_rule_is_refused() -> None:
    with pytest.raises(NonlinearClassifierError, match="KNeighborsClassifier"):
        LayerStackClassifier(4, KNeighborsClassifier()).fit(*layers(60))
    with pytest.raises(InputError, match="no sample weights"):
        LayerStackClassifier(4, KNeighborsClassifier()).fit(*layers(60), sample_weight=np.ones(60))


def test_only_what_asks_for_it_learns_the_number_of_hook_points() -> None:
    assert with_n_blocks(LayerStackClassifier(), 3).n_blocks == 3
    assert with_n_blocks(LayerStackClassifier(2), 3).n_blocks == 2
    assert with_n_blocks(make_pipeline(StandardScaler(), LayerStackClassifier()), 5)[-1].n_blocks == 5
    assert isinstance(with_n_blocks(LogisticRegression(), 3), LogisticRegression)


# --- In a probe

WORDS = ["cats", "dogs", "rain", "sun", "music", "light", "and", "the"]


def labelled(count: int = 40, seed: int = 0) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(seed)
    prompts = [" ".join(rng.choice(WORDS, rng.integers(3, 7))) for _ in range(count)]
    return prompts, [int("cats" in prompt or "sun" in prompt) for prompt in prompts]


def test_what_is_saved_and_runs_live_says_what_the_probe_says(tiny: Tiny, tmp_path: Any) -> None:
    import torch

    prompts, labels = labelled()
    probe = Probe(tiny.bridge, [0, 2, 3], "mean", classifier="stacking", random_state=0, progress=False)
    probe.fit(prompts, labels)
    assert probe.classifier_.n_blocks == 3
    assert [one.n_features_in_ for one in probe.classifier_.estimators_] == [D_MODEL] * 3
    weights = load_probe(probe.save(tmp_path / "p.safetensors"))
    assert weights.hook_points == probe.hook_names_
    expected = probe.decision_function(prompts)
    found = extract_activations(tiny.bridge, prompts, [0, 2, 3], "mean", progress=False)
    np.testing.assert_allclose(weights.logits(found.concatenated()), expected, rtol=1e-3, atol=1e-3)
    last = extract_activations(tiny.bridge, prompts[:1], [0, 2, 3], progress=False)
    with attach_probes(tiny.bridge, [weights]) as monitor:
        tiny.bridge(torch.tensor([last.tokens[0]]))
        live = monitor.token_scores("probe")[0][-1].item()
    assert live == pytest.approx(weights.logits(last.concatenated()).item(), abs=1e-4)


def test_a_probe_on_tokens_keeps_prompts_together_and_may_weigh_them_equally(llama: Tiny) -> None:
    prompts, labels = labelled(30)
    probe = Probe(llama.bridge, [1, 2], "all", classifier="stacking", equal_prompt_weight=True, progress=False)
    probe.fit(prompts, labels)
    assert probe.classifier_.cv
    for train, test in probe.classifier_.cv:
        assert not set(probe.groups_[train]) & set(probe.groups_[test])
    plain = Probe(llama.bridge, [1, 2], "all", classifier="stacking", progress=False).fit(prompts, labels)
    assert not np.allclose(plain.classifier_.coef_, probe.classifier_.coef_, rtol=1e-2)


def test_a_store_gives_the_same_probe(llama: Tiny, tmp_path: Any) -> None:
    prompts, labels = labelled()
    store = extract_to_store(llama.bridge, prompts, tmp_path / "store", [1, 2], ["mean"], progress=False)
    probe = Probe(llama.bridge, [1, 2], "mean", classifier="stacking", random_state=0, progress=False)
    stored = clone(probe).fit_store(store, labels).decision_function(prompts)
    np.testing.assert_allclose(stored, probe.fit(prompts, labels).decision_function(prompts), atol=1e-3)


def test_an_instance_is_cloned_and_stays_untouched(llama: Tiny) -> None:
    prompts, labels = labelled()
    stack = LayerStackClassifier(base="mass_mean", cv=3)
    probe = Probe(llama.bridge, "all", "mean", classifier=stack, progress=False).fit(prompts, labels)
    assert probe.classifier_.n_blocks == len(probe.hook_names_) == 4
    assert stack.n_blocks is None
    probe.set_params(hook_points=[0, 1]).fit(prompts, labels)
    assert probe.classifier_.n_blocks == 2


def test_a_sweep_judges_layers_one_by_one(llama: Tiny) -> None:
    prompts, labels = labelled()
    with pytest.raises(InputError, match="LayerStackClassifier joins several hook points"):
        sweep(llama.bridge, prompts, labels, classifiers=["stacking"])
