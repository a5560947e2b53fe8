"""The estimator: its contract, its labels, its poolings, and that the file says what the estimator says."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, WORDS, Tiny
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from lmprobe_tl import Probe, extract_activations, load_probe
from lmprobe_tl.errors import (
    EmptyMaskError,
    InputError,
    NonlinearClassifierError,
    PoolingMismatchWarning,
    UnknownHookPointError,
)
from lmprobe_tl.probe_file import load_probe as load_probe_file

CHOICES = WORDS.split()


def make_prompts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(CHOICES, generator.integers(2, 9))) for _ in range(count)]


PROMPTS = make_prompts(40)
LABELS = [int("cats" in prompt or "dogs" in prompt or "music" in prompt) for prompt in PROMPTS]
COLOURS = [("red", "green", "blue")[len(prompt.split()) % 3] for prompt in PROMPTS]


def make_probe(tiny: Tiny, **options: Any) -> Probe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoolingMismatchWarning)
        return Probe(tiny.bridge, **{"hook_points": 2, "random_state": 0, **options})


# --- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convert", "classes"),
    [
        (lambda labels: labels, [0, 1]),
        (lambda labels: [bool(label) for label in labels], [False, True]),
        (lambda labels: ["yes" if label else "no" for label in labels], ["no", "yes"]),
        (lambda labels: np.array(labels), [0, 1]),
        (lambda labels: np.array(labels, dtype=np.float32), [0, 1]),
        (lambda labels: torch.tensor(labels), [0, 1]),
        (lambda labels: torch.tensor(labels, dtype=torch.bool), [False, True]),
        (lambda labels: np.array(["yes" if label else "no" for label in labels], dtype=object), ["no", "yes"]),
    ],
)
def test_every_kind_of_labels_gives_the_same_probe(llama: Tiny, convert: Any, classes: list[Any]) -> None:
    expected = make_probe(llama).fit(PROMPTS, LABELS).decision_function(PROMPTS[:5])
    probe = make_probe(llama).fit(PROMPTS, convert(LABELS))
    assert probe.classes_.tolist() == classes
    assert probe.weights_.labels == tuple(classes)
    assert [type(label) for label in probe.weights_.labels] == [type(label) for label in classes]
    np.testing.assert_allclose(probe.decision_function(PROMPTS[:5]), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5] + [1.0] * 39, "0.5"),
        ([float("nan")] + [1.0] * 39, "nan"),
        ([1] * 40, "at least two classes"),
        ([0, 1] * 10, "40 prompts but 20 labels"),
        ([None] + [1] * 39, "NoneType"),
        (["a"] + [1] * 39, "int, str"),
        (np.zeros((40, 2)), "train_pooling"),
        ("01" * 20, "expected one int, bool or str a prompt"),
    ],
)
def test_labels_that_mean_nothing_are_refused_before_the_model_runs(
    llama: Tiny, labels: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmprobe_tl.forward_batches.run_to_hook_points", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        make_probe(llama).fit(PROMPTS, labels)


def test_one_string_is_not_a_list_of_characters(llama: Tiny) -> None:
    with pytest.raises(InputError, match=r"one string .* not a list"):
        make_probe(llama).fit("the cat", LABELS)
    fitted = make_probe(llama).fit(PROMPTS, LABELS)
    for method in (fitted.predict, fitted.predict_proba, fitted.decision_function):
        with pytest.raises(InputError, match="one string"):
            method("the cat")


def test_unknown_labels_at_evaluation_are_named(llama: Tiny) -> None:
    probe = make_probe(llama).fit(PROMPTS, LABELS)
    with pytest.raises(InputError, match=r"holds 7, but the probe knows only \[0, 1\]"):
        probe.evaluate(PROMPTS, [7] * 40)


# --- scikit-learn's contract -------------------------------------------------------------------------------------------


def test_constructor_stores_parameters_untouched(llama: Tiny) -> None:
    classifier, hooks = LogisticRegression(C=0.5), [1, "blocks.2.hook_resid_pre"]
    probe = make_probe(llama, hook_points=hooks, classifier=classifier)
    assert probe.classifier is classifier
    assert probe.hook_points is hooks
    assert probe.get_params(deep=False)["model"] is llama.bridge
    probe.fit(PROMPTS, LABELS)
    assert not hasattr(classifier, "coef_")
    assert probe.hook_points is hooks


def test_clone_shares_the_model_and_forgets_what_was_learnt(llama: Tiny) -> None:
    probe = make_probe(llama, classifier=LogisticRegression(C=0.5), inference_pooling="score:max").fit(PROMPTS, LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the original warned of its poolings already
        copy = clone(probe)
    assert copy.model is llama.bridge
    assert copy.classifier is not probe.classifier
    assert copy.classifier.C == 0.5
    assert not hasattr(copy, "classifier_")
    with pytest.raises(NotFittedError):
        copy.predict(PROMPTS)


def test_set_params_reaches_the_classifier(llama: Tiny) -> None:
    probe = make_probe(llama, classifier=LogisticRegression()).set_params(classifier__C=0.25, hook_points=1)
    assert probe.classifier.C == 0.25
    assert probe.fit(PROMPTS, LABELS).hook_names_ == ("blocks.1.hook_resid_post",)
    with pytest.raises(ValueError, match="Invalid parameter"):
        probe.set_params(clasifier=1)


def test_grid_search_shares_the_model(llama: Tiny) -> None:
    probe = make_probe(llama, classifier=make_pipeline(StandardScaler(), LogisticRegression()), pooling="mean")
    search = GridSearchCV(
        probe, {"hook_points": [0, 2], "classifier__logisticregression__C": [0.01, 1.0]}, cv=2, error_score="raise"
    )
    search.fit(PROMPTS, LABELS)
    assert search.best_estimator_.model is llama.bridge
    assert len(search.cv_results_["params"]) == 4
    assert search.score(PROMPTS, LABELS) == search.best_estimator_.score(PROMPTS, LABELS)


def test_fit_returns_self_and_a_second_fit_forgets_the_first(llama: Tiny) -> None:
    probe = make_probe(llama)
    assert probe.fit(PROMPTS, LABELS) is probe
    first = probe.weights_
    probe.fit(PROMPTS, [1 - label for label in LABELS])
    assert not torch.equal(probe.weights_.direction, first.direction)
    again = make_probe(llama).fit(PROMPTS, LABELS)
    assert torch.equal(again.weights_.direction, first.direction)


def test_fit_contrast_is_fit_with_labels(llama: Tiny) -> None:
    positive = [prompt for prompt, label in zip(PROMPTS, LABELS, strict=True) if label]
    negative = [prompt for prompt, label in zip(PROMPTS, LABELS, strict=True) if not label]
    contrast = make_probe(llama).fit_contrast(positive, negative)
    plain = make_probe(llama).fit(negative + positive, [0] * len(negative) + [1] * len(positive))
    assert torch.equal(contrast.weights_.direction, plain.weights_.direction)
    assert contrast.classes_.tolist() == [0, 1]


# --- against scikit-learn and Hugging Face -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fit_equals_scikit_learn_on_hugging_face_hidden_states(all_tiny: dict[str, Tiny], name: str) -> None:
    tiny = all_tiny[name]
    probe = make_probe(tiny).fit(PROMPTS, LABELS)
    rows = extract_activations(tiny.bridge, PROMPTS, 2).tokens
    hidden = torch.stack([tiny.hidden(row, 2)[-1] for row in rows])
    if name in ("gpt2", "neox"):  # LayerNorm: the mean over d_model is no part of what a block reads
        hidden = hidden - hidden.mean(dim=-1, keepdim=True)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000, tol=1e-8)).fit(
        hidden.double(), LABELS
    )
    np.testing.assert_allclose(probe.decision_function(PROMPTS), reference.decision_function(hidden.double()), atol=1e-4)
    np.testing.assert_allclose(probe.predict_proba(PROMPTS), reference.predict_proba(hidden.double()), atol=1e-4)
    assert probe.predict(PROMPTS).tolist() == reference.predict(hidden.double()).tolist()
    assert probe.score(PROMPTS, LABELS) == reference.score(hidden.double(), LABELS)


@pytest.mark.parametrize("hook_points", [0, -1, [1, 3], ["blocks.2.hook_resid_pre", 0], "all"])
def test_weights_say_what_the_probe_says_at_any_hook_points(tiny: Tiny, hook_points: Any) -> None:
    probe = make_probe(tiny, hook_points=hook_points).fit(PROMPTS, LABELS)
    acts = extract_activations(tiny.bridge, PROMPTS, hook_points)
    assert probe.weights_.hook_points == acts.hook_points
    assert probe.weights_.direction.shape == (1, D_MODEL * len(acts.hook_points))
    expected = probe.decision_function(PROMPTS)
    np.testing.assert_allclose(probe.weights_.logits(acts.concatenated()), expected, rtol=1e-4, atol=1e-4)


def test_three_classes(tiny: Tiny) -> None:
    probe = make_probe(tiny, pooling="mean").fit(PROMPTS, COLOURS)
    assert probe.classes_.tolist() == ["blue", "green", "red"]
    proba = probe.predict_proba(PROMPTS)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    acts = extract_activations(tiny.bridge, PROMPTS, 2, "mean").concatenated()
    np.testing.assert_allclose(probe.weights_.probabilities(acts), proba, atol=1e-4)
    evaluation = probe.evaluate(PROMPTS, COLOURS, n_bootstrap=20)
    assert evaluation.tpr_at_fpr is None
    assert 0.5 < evaluation.auroc.value <= 1


@pytest.mark.parametrize(
    "classifier",
    [
        *["lda", "mass_mean", "mass_mean_whitened", "ridge"],
        *[LinearSVC(), make_pipeline(StandardScaler(), LogisticRegressionCV(cv=3))],
    ],
)
def test_other_linear_classifiers_save_and_reload(llama: Tiny, classifier: Any, tmp_path: Any) -> None:
    probe = make_probe(llama, classifier=classifier).fit(PROMPTS, LABELS)
    loaded = load_probe(probe.save(tmp_path / "probe.safetensors"))
    acts = extract_activations(llama.bridge, PROMPTS, 2).concatenated()
    np.testing.assert_allclose(loaded.logits(acts), probe.decision_function(PROMPTS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "classifier",
    [RandomForestClassifier(10, random_state=0), KNeighborsClassifier(3), GaussianNB()],
    ids=lambda c: type(c).__name__,
)
def test_a_nonlinear_classifier_predicts_but_is_refused_when_saved(llama: Tiny, classifier: Any, tmp_path: Any) -> None:
    probe = make_probe(llama, classifier=classifier).fit(PROMPTS, LABELS)
    assert probe.predict_proba(PROMPTS).shape == (40, 2)
    with pytest.raises(NonlinearClassifierError, match=type(classifier).__name__):
        probe.save(tmp_path / "probe.safetensors")
    with pytest.raises(NonlinearClassifierError):
        probe.to_weights()
    assert not list(tmp_path.iterdir())


# --- the residual basis ------------------------------------------------------------------------------------------------


def test_layernorm_probes_sum_to_zero_and_rmsnorm_probes_are_left_alone(all_tiny: dict[str, Tiny]) -> None:
    for name, tiny in all_tiny.items():
        weights = make_probe(tiny, hook_points=[1, 2]).fit(PROMPTS, LABELS).weights_
        sums = weights.direction.reshape(2, D_MODEL).sum(dim=1).abs()
        if name in ("gpt2", "neox"):
            assert weights.spec.residual_basis == "any"
            assert sums.max() < 1e-5
        else:
            assert weights.spec.residual_basis == "raw"
            assert sums.max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen3"])
def test_raw_centred_and_hugging_face_scores_agree(all_tiny: dict[str, Tiny], name: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    tiny = all_tiny[name]
    processed = TransformerBridge.boot_transformers(str(tiny.folder), device="cpu")
    processed.enable_compatibility_mode()
    for trained_on in (tiny.bridge, processed):
        probe = Probe(trained_on, 2, "mean", random_state=0).fit(PROMPTS, LABELS)
        weights = probe.weights_
        raw = extract_activations(tiny.bridge, PROMPTS, 2, "mean").concatenated()
        other = extract_activations(processed, PROMPTS, 2, "mean").concatenated()
        rows = extract_activations(tiny.bridge, PROMPTS, 2).tokens
        first = 0 if tiny.tokenizer.bos_token_id != rows[0][0] else 1
        hugging_face = torch.stack([tiny.hidden(row, 2)[first:].mean(dim=0) for row in rows])
        scores = [weights.logits(activations) for activations in (raw, other, hugging_face)]
        for one in scores[1:]:
            torch.testing.assert_close(one, scores[0], rtol=1e-4, atol=1e-4)
        # The control: the two models do differ where they may.
        assert torch.allclose(raw, other, atol=1e-4) == (name in ("llama", "qwen3"))


# --- pooling -----------------------------------------------------------------------------------------------------------


def test_a_mismatch_of_poolings_warns_once_and_early(llama: Tiny) -> None:
    with pytest.warns(PoolingMismatchWarning, match=r"'last_token'.*'score:max'"):
        Probe(llama.bridge, 2, inference_pooling="score:max")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Probe(llama.bridge, 2, "mean")


@pytest.mark.parametrize(
    "options",
    [{"pooling": "meen"}, {"pooling": "max"}, {"train_pooling": "score:mean"}, {"pooling": lambda x: x}],
)
def test_an_invalid_pooling_is_an_error_in_the_constructor(llama: Tiny, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="(?i)pooling"):
        Probe(llama.bridge, 2, **options)


def test_everything_else_is_checked_in_fit(llama: Tiny) -> None:
    probe = make_probe(llama, hook_points="blocks.2.hook_resid_pots", classifier="logistic", batch_size=0)
    with pytest.raises(UnknownHookPointError, match="Closest: 'blocks.2.hook_resid_post'"):
        probe.fit(PROMPTS, LABELS)
    with pytest.raises(InputError, match="logistic_regression"):
        probe.set_params(hook_points=2).fit(PROMPTS, LABELS)
    with pytest.raises(InputError, match="batch_size"):
        probe.set_params(classifier="mass_mean").fit(PROMPTS, LABELS)


def token_probabilities(tiny: Tiny, probe: Probe, prompt: str) -> torch.Tensor:
    """Probability of the positive class at each token but BOS, from Hugging Face's hidden states and the probe's weights."""
    row = extract_activations(tiny.bridge, [prompt], 2).tokens[0]
    return probe.weights_.probabilities(tiny.hidden(row, 2))[int(row[0] == tiny.tokenizer.bos_token_id) :]


@pytest.mark.parametrize(
    ("strategy", "reduce"),
    [
        ("score:max", lambda p: p.max()),
        ("max", lambda p: p.max()),
        ("score:min", lambda p: p.min()),
        ("score:mean", lambda p: p.mean()),
        ("score:last_token", lambda p: p[-1]),
        ("score:rolling_max(3)", lambda p: p.logit().unfold(0, min(3, len(p)), 1).mean(dim=1).max().sigmoid()),
    ],
)
def test_score_pooling_equals_a_plain_loop(tiny: Tiny, strategy: str, reduce: Any) -> None:
    probe = make_probe(tiny, inference_pooling=strategy, batch_size=3).fit(PROMPTS, LABELS)
    expected = [float(reduce(token_probabilities(tiny, probe, prompt))) for prompt in PROMPTS[:10]]
    proba = probe.predict_proba(PROMPTS[:10])
    np.testing.assert_allclose(proba[:, 1], expected, atol=1e-4)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    np.testing.assert_allclose(1 / (1 + np.exp(-probe.decision_function(PROMPTS[:10]))), expected, atol=1e-4)
    assert probe.predict(PROMPTS[:10]).tolist() == [int(value >= 0.5) for value in expected]


def test_pooling_all_gives_one_score_a_token(tiny: Tiny) -> None:
    probe = make_probe(tiny, pooling="all", batch_size=4).fit(PROMPTS, LABELS)
    proba = probe.predict_proba(PROMPTS[:7])
    for row, prompt in enumerate(PROMPTS[:7]):
        expected = token_probabilities(tiny, probe, prompt)
        np.testing.assert_allclose(proba[row, : len(expected)], expected, atol=1e-4)
        assert np.isnan(proba[row, len(expected) :]).all()
    assert [len(row) for row in probe.predict(PROMPTS[:7])] == (~np.isnan(proba)).sum(axis=1).tolist()


def test_training_on_all_tokens_uses_each_real_token_once_and_no_pad(tiny: Tiny) -> None:
    probe = make_probe(tiny, pooling="all", classifier=LogisticRegression(C=0.1, max_iter=5000)).fit(PROMPTS, LABELS)
    rows = extract_activations(tiny.bridge, PROMPTS, 2).tokens
    skip = int(rows[0][0] == tiny.tokenizer.bos_token_id)
    assert len(probe.groups_) == sum(len(row) - skip for row in rows) == probe.training_.n_examples
    assert probe.groups_.tolist() == [index for index, row in enumerate(rows) for _ in row[skip:]]
    hidden = torch.cat([tiny.hidden(row, 2)[skip:] for row in rows])
    if probe.weights_.spec.normalization == "layernorm":
        hidden = hidden - hidden.mean(dim=-1, keepdim=True)
    reference = LogisticRegression(C=0.1, max_iter=5000).fit(hidden.double(), np.array(LABELS)[probe.groups_])
    np.testing.assert_allclose(probe.classifier_.coef_, reference.coef_, atol=1e-3)


def test_token_labels(tiny: Tiny) -> None:
    acts = extract_activations(tiny.bridge, PROMPTS, 2, "all")
    lengths = np.diff(acts.offsets.numpy())
    # The truth is a function of the activation, so a probe for each token can learn it.
    truth = (acts.concatenated()[:, 3] > acts.concatenated()[:, 3].median()).int()
    labels = [row.tolist() for row in truth.split(lengths.tolist())]
    probe = make_probe(tiny, pooling="all", classifier=LogisticRegression(C=10, max_iter=5000)).fit(PROMPTS, labels)
    evaluation = probe.evaluate(PROMPTS, labels, n_bootstrap=20)
    assert evaluation.level == "token"
    assert evaluation.n_examples == lengths.sum()
    assert evaluation.n_prompts == 40
    assert evaluation.auroc.value > 0.95
    shuffled = [np.random.default_rng(row).integers(0, 2, length).tolist() for row, length in enumerate(lengths)]
    assert abs(probe.evaluate(PROMPTS, shuffled, n_bootstrap=20).auroc.value - 0.5) < 0.1
    labels[3] = labels[3][:-1]
    with pytest.raises(InputError, match=rf"labels\[3\] has {lengths[3] - 1} token labels, but prompt 3 has {lengths[3]}"):
        probe.fit(PROMPTS, labels)
    with pytest.raises(InputError, match="token labels need 'all'"):
        make_probe(tiny).fit(PROMPTS, labels)


def test_token_labels_judge_tokens_whatever_the_inference_pooling(llama: Tiny) -> None:
    lengths = np.diff(extract_activations(llama.bridge, PROMPTS, 2, "all").offsets.numpy())
    labels = [[row % 2] * length for row, length in enumerate(lengths)]
    by_token = make_probe(llama, pooling="all").fit(PROMPTS, LABELS).evaluate(PROMPTS, labels, n_bootstrap=10)
    by_max = make_probe(llama, train_pooling="all", inference_pooling="score:max").fit(PROMPTS, LABELS)
    assert by_max.evaluate(PROMPTS, labels, n_bootstrap=10) == by_token
    assert by_max.evaluate(PROMPTS, LABELS, n_bootstrap=10).level == "prompt"


def test_equal_prompt_weight(llama: Tiny) -> None:
    prompts, labels = [*PROMPTS[:10], " ".join(CHOICES * 2)], [*LABELS[:10], 1]
    options = {"pooling": "all", "classifier": LogisticRegression(C=0.1, max_iter=5000)}
    plain = make_probe(llama, **options).fit(prompts, labels)
    equal = make_probe(llama, equal_prompt_weight=True, **options).fit(prompts, labels)
    acts = extract_activations(llama.bridge, prompts, 2, "all")
    lengths = np.diff(acts.offsets.numpy())
    y = np.repeat(labels, lengths)
    reference = LogisticRegression(C=0.1, max_iter=5000)
    weight = np.repeat(1 / lengths, lengths)
    reference.fit(acts.concatenated().double(), y, sample_weight=weight * len(weight) / weight.sum())
    np.testing.assert_allclose(equal.classifier_.coef_, reference.coef_, atol=1e-3)
    assert np.abs(plain.classifier_.coef_ - equal.classifier_.coef_).max() > 1e-2
    with pytest.raises(InputError, match="no sample weights"):
        make_probe(llama, pooling="all", classifier=KNeighborsClassifier(), equal_prompt_weight=True).fit(prompts, labels)


def test_equal_prompt_weight_changes_nothing_where_prompts_are_equally_long(llama: Tiny) -> None:
    prompts = [torch.randint(3, 300, (6,), generator=torch.Generator().manual_seed(row)) for row in range(12)]
    plain = make_probe(llama, pooling="all").fit(prompts, [0, 1] * 6)
    equal = make_probe(llama, pooling="all", equal_prompt_weight=True).fit(prompts, [0, 1] * 6)
    torch.testing.assert_close(equal.weights_.direction, plain.weights_.direction, rtol=1e-3, atol=1e-5)


def test_a_search_inside_the_classifier_never_parts_a_prompt(llama: Tiny) -> None:
    seen: list[tuple[Any, Any]] = []

    class Recorder(GridSearchCV):
        def fit(self, X: Any, y: Any) -> Any:
            seen.extend(self.cv)
            return super().fit(X, y)

    probe = make_probe(llama, pooling="all", classifier=Recorder(LogisticRegression(), {"C": [0.1, 1]}, cv=3))
    probe.fit(PROMPTS, LABELS)
    assert len(seen) == 3
    for train, test in seen:
        assert not set(probe.groups_[train]) & set(probe.groups_[test])


def test_custom_pooling_trains_and_predicts_but_cannot_be_saved(llama: Tiny, tmp_path: Any) -> None:
    def middle(activations: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        where = attention_mask.long().cumsum(dim=1)
        half = (where[:, -1:] + 1) // 2
        return activations[((where == half) & attention_mask).nonzero(as_tuple=True)]

    probe = make_probe(llama, pooling=middle).fit(PROMPTS, LABELS)
    row = extract_activations(llama.bridge, [PROMPTS[0]], 2).tokens[0]
    hidden = llama.hidden(row, 2)[1:]
    expected = probe.classifier_.decision_function(hidden[(len(hidden) + 1) // 2 - 1][None].double())
    np.testing.assert_allclose(probe.decision_function(PROMPTS[:1]), expected, atol=1e-4)
    with pytest.raises(InputError, match=r"middle.*holds no code"):
        probe.save(tmp_path / "probe.safetensors")


def test_a_prompt_without_tokens_is_named(llama: Tiny) -> None:
    with pytest.raises(EmptyMaskError, match="prompt 2") as caught:
        make_probe(llama, pooling="mean").fit(["a", "b", "", "c"], [0, 1, 0, 1])
    assert caught.value.rows == [2]


# --- evaluation and file -----------------------------------------------------------------------------------------------


def test_noise_labels_give_chance_on_new_prompts(llama: Tiny) -> None:
    noise = np.random.default_rng(3).integers(0, 2, 400)
    prompts = make_prompts(400, seed=5)
    probe = make_probe(llama).fit(prompts[:200], noise[:200])
    evaluation = probe.evaluate(prompts[200:], noise[200:], n_bootstrap=200)
    assert evaluation.auroc.low < 0.5 < evaluation.auroc.high
    # The twin that must find something: the same labels, with a last word that tells.
    telling = [prompt + (" cats" if label else " rain") for prompt, label in zip(prompts, noise, strict=True)]
    evaluation = make_probe(llama).fit(telling[:200], noise[:200]).evaluate(telling[200:], noise[200:])
    assert evaluation.auroc.low > 0.8


def test_evaluation_is_a_frozen_record(llama: Tiny) -> None:
    evaluation = make_probe(llama).fit(PROMPTS, LABELS).evaluate(PROMPTS, LABELS, fpr=0.1, n_bootstrap=50)
    assert (evaluation.n_prompts, evaluation.level, evaluation.fpr, evaluation.n_bootstrap) == (40, "prompt", 0.1, 50)
    for interval in (evaluation.auroc, evaluation.accuracy, evaluation.tpr_at_fpr):
        assert interval.low <= interval.value <= interval.high
    with pytest.raises(dataclasses.FrozenInstanceError):
        evaluation.fpr = 0.5


def test_save_equals_weights_save_and_keeps_metrics(llama: Tiny, tmp_path: Any) -> None:
    probe = make_probe(llama, name="animals").fit(PROMPTS, LABELS)
    evaluation = probe.evaluate(PROMPTS, LABELS, n_bootstrap=20)
    plain = probe.save(tmp_path / "a.safetensors").read_bytes()
    assert plain == probe.weights_.save(tmp_path / "b.safetensors").read_bytes()
    assert plain == make_probe(llama, name="animals").fit(PROMPTS, LABELS).save(tmp_path / "c.safetensors").read_bytes()
    loaded = load_probe_file(probe.save(tmp_path / "d.safetensors", evaluation=evaluation))
    assert loaded.spec.metrics["auroc"].value == evaluation.auroc.value
    assert loaded.spec.metrics["tpr_at_fpr_0.01"].n == 40
    assert loaded.name == "animals"
    assert loaded.spec.training.n_prompts == 40
    assert loaded.spec.training.class_counts == (LABELS.count(0), LABELS.count(1))
    assert loaded.spec.model.id == "tiny-llama"  # a name, never a path
    assert str(llama.folder.parent).encode() not in (tmp_path / "d.safetensors").read_bytes()


def test_certain_probabilities_do_not_hide_the_ranking(llama: Tiny) -> None:
    """With huge logits all probabilities are 0 or 1; metrics still rank by what the classifier says.

    The factor is a power of two, so that prompts whose scores differ by rounding alone keep their order.
    """
    probe = make_probe(llama, inference_pooling="score:max").fit(PROMPTS, LABELS)
    before = probe.evaluate(PROMPTS, LABELS, fpr=0.3, n_bootstrap=10)
    final = probe.classifier_.steps[-1][1]
    final.coef_, final.intercept_ = final.coef_ * 2.0**20, final.intercept_ * 2.0**20
    assert np.isin(probe.predict_proba(PROMPTS), (0, 1)).all()
    after = probe.evaluate(PROMPTS, LABELS, fpr=0.3, n_bootstrap=10)
    assert after.auroc == before.auroc
    assert after.tpr_at_fpr == before.tpr_at_fpr


def test_weights_follow_parameters_that_change_after_fit(llama: Tiny) -> None:
    probe = make_probe(llama).fit(PROMPTS, LABELS)
    assert probe.weights_.name == "probe"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe.set_params(name="new", inference_pooling="score:max")
    assert probe.weights_.name == "new"
    assert probe.weights_.spec.pooling.inference == "score:max"


def test_a_forest_that_is_certain_gives_finite_scores(llama: Tiny) -> None:
    probe = make_probe(
        llama, train_pooling="all", inference_pooling="score:softmax(2)", classifier=KNeighborsClassifier(1)
    ).fit(PROMPTS, LABELS)
    assert np.isfinite(probe.decision_function(PROMPTS)).all()
    assert np.isfinite(probe.predict_proba(PROMPTS)).all()


def test_metrics_of_tokens_say_so_in_the_file(llama: Tiny) -> None:
    probe = make_probe(llama, pooling="all").fit(PROMPTS, LABELS)
    evaluation = probe.evaluate(PROMPTS, LABELS, n_bootstrap=10)
    records = evaluation.records()
    assert set(records) == {"token_auroc", "token_accuracy", "token_tpr_at_fpr_0.01"}
    assert records["token_auroc"].n == evaluation.n_examples > 40
    too_few = probe.evaluate(PROMPTS[:1], [[0, 1] + [0] * (len(probe.predict(PROMPTS[:1])[0]) - 2)])
    assert too_few.auroc.low is None
    assert too_few.records()["token_auroc"].confidence is None


def test_pooling_that_depends_on_centring_is_refused_when_saved(gpt2: Tiny, llama: Tiny) -> None:
    probe = make_probe(gpt2, inference_pooling="activation:max").fit(PROMPTS, LABELS)
    assert probe.predict_proba(PROMPTS).shape == (40, 2)
    with pytest.raises(InputError, match="LayerNorm"):
        probe.to_weights()
    assert make_probe(llama, inference_pooling="activation:max").fit(PROMPTS, LABELS).to_weights().name == "probe"


def test_activations_that_are_all_the_same_teach_nothing(llama: Tiny) -> None:
    with pytest.raises(InputError, match="sees nothing but BOS"):
        make_probe(llama, pooling="first_token").fit(PROMPTS, LABELS)
    make_probe(llama, pooling="first_token", prepend_bos=False).fit(PROMPTS, LABELS)
