"""Sweeps against a plain loop, with planted signals and shuffled labels, and what must not influence the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sweep_data import in_another_order, noise, with_a_word

import lmprobe_tl.sweep_run as sweep_module
from lmprobe_tl import Probe, attach_probes, extract_activations, load_probe, sweep
from lmprobe_tl.errors import EmptyMaskError, InputError, StoreError
from lmprobe_tl.estimators.fitting import logits_of
from lmprobe_tl.metrics import bootstrap_interval
from lmprobe_tl.splits import held_out, selection_splits
from lmprobe_tl.sweep_examples import SweepExamples, sweep_examples
from lmprobe_tl.sweep_judge import _mean_auroc
from lmprobe_tl.tokens import tokenize_prompts

QUICK: dict[str, Any] = {"n_bootstrap": 20, "progress": False}
Split = tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, all_tiny: dict[str, Tiny]) -> Any:
    """One with LayerNorm and one with RMSNorm."""
    return all_tiny[request.param].bridge


def split_of(model: Any, prompts: list[str], labels: Any, *, groups: Any = None, per_token: bool = False) -> Split:
    """Indices of the selection's and of the test's examples, and the splits that a sweep makes by default."""
    examples = examples_of(model, prompts, labels, groups=groups, per_token=per_token)
    selection, test = held_out(examples.labels, examples.groups, 0.25, 0)
    return selection, test, selection_splits(examples.labels[selection], examples.groups[selection], 5, 0)


def examples_of(
    model: Any, prompts: list[str], labels: Any, *, groups: Any = None, per_token: bool = False
) -> SweepExamples:
    rows = tokenize_prompts(model, prompts)
    return sweep_examples(model, rows, labels, groups, per_token=per_token, include_bos=False)


def features_of(model: Any, prompts: list[str], layer: int, pooling: str) -> np.ndarray:
    values = extract_activations(model, prompts, layer, pooling).values[f"blocks.{layer}.hook_resid_post"].numpy()
    is_layernorm = model.cfg.normalization_type.startswith("LN")
    return (values - values.mean(axis=1, keepdims=True) if is_layernorm else values).astype(np.float64)


def plain_auroc(labels: np.ndarray, fitted: Any, values: np.ndarray) -> float:
    if len(fitted.classes_) == 2:
        return float(roc_auc_score(labels, fitted.decision_function(values)))
    return float(roc_auc_score(labels, fitted.predict_proba(values), multi_class="ovr", average="macro"))


def are_the_same(one: Probe, other: Probe) -> bool:
    a, b = one.weights_, other.weights_
    return torch.equal(a.direction, b.direction) and torch.equal(a.intercept, b.intercept) and a.spec == b.spec


# --- signals and controls ------------------------------------------------------------------------------------------------


def test_a_planted_signal_is_found_and_a_bag_of_tokens_finds_it_too(model: Any) -> None:
    prompts, labels = with_a_word(64)
    result = sweep(model, prompts, labels, classifiers=["logistic_regression", "ridge", "lda"], **QUICK)
    assert len(result.rows) == 4 * 2 * 3
    assert result.best_.validation.value > 0.99
    assert result.best_.pooling == "last_token"
    assert result.test.auroc.value > 0.99
    assert result.baseline.value > 0.95 and result.baseline_test.value > 0.95
    assert not result.beats_baseline
    assert (result.n_selection, result.n_test, result.level) == (48, 16, "prompt")


def test_what_the_order_of_tokens_says_beats_a_bag_of_them(model: Any) -> None:
    prompts, labels = in_another_order(64)
    result = sweep(model, prompts, labels, poolings="last_token", n_bootstrap=100, progress=False)
    assert result.test.auroc.value > 0.99
    assert result.baseline_test.value < 0.75
    assert result.beats_baseline


def test_shuffled_labels_give_chance_where_they_are_tested_and_more_where_they_were_chosen(llama: Tiny) -> None:
    prompts, labels = with_a_word(60)
    found = [
        sweep(
            llama.bridge,
            prompts,
            np.random.default_rng(seed).permutation(labels),
            classifiers=["ridge", "mass_mean", "lda"],
            random_state=seed,
            n_bootstrap=40,
            progress=False,
        )
        for seed in range(5)
    ]
    tested = [result.test.auroc for result in found]
    assert abs(np.mean([one.value for one in tested]) - 0.5) < 0.1
    assert sum(one.low is not None and one.high is not None and one.low <= 0.5 <= one.high for one in tested) >= 4
    assert np.mean([result.best_.validation.value - result.test.auroc.value for result in found]) > 0.04
    assert not any(result.beats_baseline for result in found)


def test_the_test_prompts_choose_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels and other activations of the test prompts move nothing but what is said of them."""
    prompts, labels = with_a_word(48)
    prompts, truth = prompts + [" ".join(words) for words in noise(5, 16)], np.array([*labels, *[0, 1] * 8])
    parts = np.arange(48), np.arange(48, 64)
    monkeypatch.setattr(sweep_module, "held_out", lambda *_: parts)  # which stratifies by the labels that change here
    settings = {**QUICK, "classifiers": ["logistic_regression", "lda"]}
    before = sweep(model, prompts, truth, **settings)

    extract = sweep_module.extract_poolings

    def corrupted(*arguments: Any, **named: Any) -> Any:
        found = extract(*arguments, **named)
        for one in found.values():
            for values in one.values.values():
                values[parts[1]] = 1e4 * torch.randn(values[parts[1]].shape, generator=torch.Generator().manual_seed(0))
        return found

    monkeypatch.setattr(sweep_module, "extract_poolings", corrupted)
    truth[parts[1]] = 1 - truth[parts[1]]
    after = sweep(model, prompts, truth, **settings)
    assert after.rows == before.rows
    assert after.best_ == before.best_
    assert after.baseline == before.baseline
    assert after.test != before.test and after.baseline_test != before.baseline_test
    assert are_the_same(before.probe_, after.probe_)


# --- against a plain loop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 3])
def test_each_row_is_what_a_plain_loop_over_layers_and_folds_gives(model: Any, n_classes: int) -> None:
    prompts = [" ".join(words) for words in noise(1, 60)]
    labels = [sum(word in text for word in ("rain", "light")) % n_classes for text in prompts]
    labels = [f"class {label}" for label in labels]
    classifiers = {
        "logistic_regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000, tol=1e-9)),
        "LogisticRegression(max_iter=1000)": LogisticRegression(max_iter=1000),
    }
    given = ["logistic_regression", LogisticRegression(max_iter=1000)]
    result = sweep(model, prompts, labels, [0, -1], ["mean", "last_token"], given, **QUICK)
    selection, test, splits = split_of(model, prompts, labels)
    truth = np.array(labels)
    rows = iter(result.rows)
    for layer in (0, 3):
        for pooling in ("mean", "last_token"):
            values = features_of(model, prompts, layer, pooling)
            chosen, classes = values[selection], truth[selection]
            for name, classifier in classifiers.items():
                folds = [plain_auroc(classes[v], classifier.fit(chosen[t], classes[t]), chosen[v]) for t, v in splits]
                row = next(rows)
                assert (row.hook_point, row.layer) == (f"blocks.{layer}.hook_resid_post", layer)
                assert (row.pooling, row.classifier) == (pooling, name)
                assert row.validation.value == pytest.approx(np.mean(folds), abs=1e-12)
                if row == result.best_:
                    fitted = classifier.fit(chosen, classes)
                    assert result.test.auroc.value == pytest.approx(plain_auroc(truth[test], fitted, values[test]))
                    assert result.test.accuracy.value == pytest.approx(fitted.score(values[test], truth[test]))
    assert next(rows, None) is None
    assert result.best_.validation.value == max(row.validation.value for row in result.rows)


def test_one_split_by_a_share(llama: Tiny) -> None:
    prompts, labels = with_a_word(40, seed=3)
    result = sweep(llama.bridge, prompts, labels, 1, "mean", [RidgeClassifier()], validation=0.25, **QUICK)
    examples = examples_of(llama.bridge, prompts, labels)
    selection, _ = held_out(examples.labels, examples.groups, 0.25, 0)
    train, validate = held_out(examples.labels[selection], examples.groups[selection], 0.25, 0)
    values, truth = features_of(llama.bridge, prompts, 1, "mean")[selection], np.array(labels)[selection]
    fitted = RidgeClassifier().fit(values[train], truth[train])
    assert result.rows[0].validation.value == pytest.approx(plain_auroc(truth[validate], fitted, values[validate]))
    assert result.validation == 0.25


@pytest.mark.parametrize("labelled", ["prompts", "tokens"])
def test_every_token_an_example(model: Any, labelled: str) -> None:
    prompts, labels = with_a_word(32, seed=2)
    rows = tokenize_prompts(model, prompts)
    bos = model.tokenizer.bos_token_id
    counts = [len(row) - (row[0] == bos) for row in rows]
    given: Any = labels
    if labelled == "tokens":
        given = [[token % 2 for token in row[len(row) - count :]] for row, count in zip(rows, counts, strict=True)]
    result = sweep(model, prompts, given, [0, 2], ["all"], [RidgeClassifier()], **QUICK)
    truth = np.concatenate(given) if labelled == "tokens" else np.repeat(labels, counts)
    selection, test, splits = split_of(model, prompts, given, per_token=True)
    owners = np.repeat(np.arange(32), counts)
    assert not set(owners[selection]) & set(owners[test])
    for layer, row in zip((0, 2), result.rows, strict=True):
        values, classes = features_of(model, prompts, layer, "all")[selection], truth[selection]
        folds = [plain_auroc(classes[v], RidgeClassifier().fit(values[t], classes[t]), values[v]) for t, v in splits]
        assert row.validation.value == pytest.approx(np.mean(folds), abs=1e-12)
    assert (result.level, result.n_selection, result.n_test) == ("token", 24, 8)
    assert (result.test.n_prompts, result.test.n_examples) == (8, len(test))
    chosen = sorted(set(owners[selection].tolist()))
    expected = Probe(model, result.best_.hook_point, "all", classifier=RidgeClassifier(), random_state=0)
    expected.fit([prompts[index] for index in chosen], [given[index] for index in chosen])
    assert are_the_same(result.probe_, expected)
    assert result.probe_.groups_.tolist() == expected.groups_.tolist()


def test_a_resample_that_lost_a_class_in_every_fold_is_no_auroc_of_a_half() -> None:
    columns = np.array([[0, -1.0], [0, 1.0], [1, -1.0], [1, 1.0]])
    labels = np.array([0, 1, 0, 1])
    assert _mean_auroc(labels, columns) == 1.0
    assert _mean_auroc(labels, columns, np.array([1, 1, 2, 0])) == 1.0  # by the fold that is left
    assert np.isnan(_mean_auroc(labels, columns, np.array([2, 0, 0, 2])))
    found = bootstrap_interval(_mean_auroc, [*labels] * 5, np.tile(columns, (5, 1)), n_bootstrap=50)
    assert found.low == 1.0


def test_intervals_are_over_groups(llama: Tiny) -> None:
    """Copies of a prompt are no evidence that one of them would not be."""
    prompts, labels = with_a_word(24, seed=4)
    prompts, labels = prompts + [f"{prompt} cats" for prompt in prompts], labels * 2
    groups = [*range(24)] * 2
    result = sweep(llama.bridge, prompts, labels, 1, "mean", groups=groups, n_bootstrap=50, progress=False)
    examples = examples_of(llama.bridge, prompts, labels, groups=groups)
    selection, test, _ = split_of(llama.bridge, prompts, labels, groups=groups)
    values = features_of(llama.bridge, prompts, 1, "mean")
    own = result.probe_.classifier_
    expected = bootstrap_interval(
        lambda truth, scores, sample_weight=None: roc_auc_score(truth, scores, sample_weight=sample_weight),
        np.array(labels)[test],
        logits_of(own, values[test]),
        groups=examples.groups[test],
        n_bootstrap=50,
    )
    assert result.test.auroc.n == len(set(examples.groups[test])) == 6
    assert (result.test.auroc.low, result.test.auroc.high) == pytest.approx((expected.low, expected.high))
    assert result.rows[0].validation.n == len(set(examples.groups[selection])) == 18
    assert (result.test.n_prompts, result.n_test, result.n_selection) == (12, 12, 36)


# --- the best probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", ["logistic_regression", "mass_mean"])
def test_the_best_probe_is_one_that_was_fitted_on_the_selection(model: Any, classifier: str, tmp_path: Path) -> None:
    prompts, labels = with_a_word(40, seed=6)
    result = sweep(model, prompts, labels, [1, 2], classifiers=[classifier], name="best", **QUICK)
    selection, test, _ = split_of(model, prompts, labels)
    expected = Probe(
        model, result.best_.hook_point, result.best_.pooling, classifier=classifier, random_state=0, name="best"
    ).fit([prompts[index] for index in selection], [labels[index] for index in selection])
    paths = [probe.save(tmp_path / f"{at}.safetensors") for at, probe in enumerate((result.probe_, expected))]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    unseen, truth = [prompts[index] for index in test], [labels[index] for index in test]
    assert np.array_equal(result.probe_.decision_function(unseen), expected.decision_function(unseen))
    assert result.probe_.evaluate(unseen, truth).auroc.value == result.test.auroc.value
    assert result.probe_.evaluate(unseen, truth).accuracy.value == result.test.accuracy.value

    saved = load_probe(result.probe_.save(tmp_path / "best.safetensors", evaluation=result.test))
    assert saved.spec.metrics["auroc"].value == result.test.auroc.value
    with attach_probes(model, [saved]) as monitor:
        model(torch.tensor([tokenize_prompts(model, unseen)[0]]))
    logits = monitor.token_scores("best")[0]
    if result.best_.pooling == "last_token":
        assert logits[-1] == pytest.approx(result.probe_.decision_function(unseen[:1])[0], abs=1e-3)
    assert len(logits) == len(tokenize_prompts(model, unseen)[0])


def test_a_search_inside_a_classifier_parts_no_group(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, labels = with_a_word(36, seed=7)
    prompts, labels = prompts + prompts, labels * 2
    search = GridSearchCV(RidgeClassifier(), {"alpha": [1.0, 100.0]}, cv=3)
    result = sweep(llama.bridge, prompts, labels, 1, "mean", [search], **QUICK)
    examples = examples_of(llama.bridge, prompts, labels)
    groups = examples.groups[split_of(llama.bridge, prompts, labels)[0]]
    inner = result.probe_.classifier_.cv
    assert len(inner) == 3
    for train, validate in inner:
        assert not set(groups[train]) & set(groups[validate])
    assert search.cv == 3, "what was given stays as it was"


# --- stores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poolings", [["last_token", "mean"], ["all"]])
def test_with_a_store_the_result_is_the_same_and_nothing_is_computed_twice(
    model: Any, poolings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, labels = with_a_word(40, seed=8)
    passes: list[int] = []
    settings = {**QUICK, "hook_points": [0, 2], "poolings": poolings, "classifiers": ["lda"]}
    in_memory = sweep(model, prompts, labels, **settings)
    assert sweep(model, prompts, labels, store=tmp_path / "store", **settings) == in_memory
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        again = sweep(model, prompts, labels, store=tmp_path / "store", **settings)
        assert passes == []
        sweep(model, prompts, labels, **settings)
        assert passes, "without the store the model does run"
    finally:
        handle.remove()
    assert again == in_memory
    assert are_the_same(again.probe_, in_memory.probe_)
    with pytest.raises(StoreError, match="holds another extraction; wanted is hook_points"):
        sweep(model, prompts, labels, store=tmp_path / "store", **{**settings, "hook_points": [0, 1]})


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def test_activations_that_are_all_the_same_score_a_half_and_are_never_the_best(model: Any) -> None:
    """Behind a BOS the first token's activation is a constant, up to rounding that a classifier would blow up."""
    prompts, labels = with_a_word(40, seed=9)
    settings: dict[str, Any] = {**QUICK, "hook_points": [0, 1], "prepend_bos": True}
    shuffled = np.random.default_rng(1).permutation(labels)
    result = sweep(
        model, prompts, shuffled, poolings=["first_token", "mean"], classifiers=["mass_mean_whitened"], **settings
    )
    blind = [row.validation for row in result.rows if row.pooling == "first_token"]
    assert [(one.value, one.low, one.high) for one in blind] == [(0.5, 0.5, 0.5)] * 2
    assert result.best_.pooling == "mean"
    with pytest.raises(InputError, match="with pooling 'first_token' the activations of all prompts are the same"):
        sweep(model, prompts, labels, poolings=["first_token"], **settings)


TWO: dict[str, Any] = {"prompts": with_a_word(24)[0], "labels": with_a_word(24)[1]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompts": "a prompt"}, "not a list"),
        ({"labels": [0, 1]}, "24 prompts but 2 labels"),
        ({"labels": [1] * 24}, "examples of at least two classes"),
        ({"labels": [[0, 1]] * 24}, r"token labels need poolings=\['all'\]"),
        ({"poolings": []}, "poolings is empty"),
        ({"poolings": ["men"]}, "Unknown pooling strategy 'men'"),
        ({"poolings": ["max"]}, "train_pooling cannot be 'max'"),
        ({"poolings": ["mean", "mean"]}, "names 'mean' more than once"),
        ({"poolings": ["mean", "all"]}, "Sweep 'all' alone"),
        ({"poolings": [lambda activations, attention_mask: activations[:, 0]]}, "is a function"),
        ({"classifiers": []}, "classifiers is empty"),
        ({"classifiers": ["rigde"]}, "Closest: 'ridge'"),
        ({"classifiers": ["ridge", "ridge"]}, "names 'ridge' more than once"),
        ({"validation": 1}, "validation is 1"),
        ({"test_share": 0.6}, "0.6; expected a number above 0 and at most 0.5"),
        ({"n_bootstrap": 0}, "n_bootstrap >= 1"),
        ({"confidence": 1.0}, "confidence < 1"),
    ],
)
def test_what_is_wrong_without_a_model_is_said_before_there_is_one(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        sweep("./no-such-model", **{**TWO, **changed})


@pytest.mark.parametrize(
    ("changed", "says", "error"),
    [
        ({"hook_points": 9}, "layer 9 does not exist", InputError),
        ({"groups": [1, 2]}, "24 prompts but 2 groups", InputError),
        ({"groups": [0, 1] * 12}, "cannot be split into 4 parts|is in too few groups", InputError),
        ({"labels": [0] * 20 + [1] * 4}, "class 1 is in too few groups .* 5 parts", InputError),
        ({"prompts": [*TWO["prompts"][:23], ""]}, "no token counts in prompt 23", EmptyMaskError),
        ({"poolings": ["all"], "labels": [[0, 1]] * 24}, r"labels\[0\] has 2 token labels", InputError),
    ],
)
def test_what_is_wrong_with_the_model_s_tokens_is_said_before_it_runs(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], says: str, error: type[Exception]
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model ran")

    monkeypatch.setattr(sweep_module, "extract_poolings", never)
    arguments = {**TWO, **QUICK, **changed}
    with pytest.raises(error, match=says):
        sweep(llama.bridge, **arguments)
    with pytest.raises(AssertionError, match="the model ran"):
        sweep(llama.bridge, **TWO, **QUICK)
