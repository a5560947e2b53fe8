"""Probes that are not linear, or that reduce the tokens themselves: from prompts to the file and back to the same scores."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from lmprobe_tl import Probe, evaluate_probe, extract_activations, extract_to_store, load_probe, monitored_generate
from lmprobe_tl.errors import CalibrationWarning, InputError, NonlinearClassifierError, PoolingMismatchWarning
from lmprobe_tl.estimators import SEQUENCE_CLASSIFIERS, SequenceClassifier, make_classifier
from lmprobe_tl.estimators.sequence_classifiers import AttentionClassifier, WindowedClassifier
from lmprobe_tl.estimators.vector_classifiers import MlpClassifier
from lmprobe_tl.scoring import score_prompts, sequence_maxima

WORDS = ("cats", "dogs", "music", "the", "a", "short", "line", "writes", "one", "more", "and", "then")
QUICK = {"max_epochs": 3, "random_state": 0}


def make_prompts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(2, 12))) for _ in range(count)]


PROMPTS = make_prompts(40)
LABELS = [int("cats" in prompt or "music" in prompt) for prompt in PROMPTS]
NEW = make_prompts(12, seed=1)
KINDS = {
    "attention": "attention",
    "multimax": "multimax",
    "rolling_attention": "rolling_attention",
    "softmax": "linear",
    "windowed": "linear",
    "mlp": "mlp",
    "polynomial": "polynomial",
}


def quick_probe(tiny: Tiny, name: str, **options: Any) -> Probe:
    """As by name, with a few epochs."""
    vectors = {"pooling": "mean"} if name in ("mlp", "polynomial") else {}
    named = Probe(tiny.bridge, **{"hook_points": 2, "classifier": name, "random_state": 0, **vectors, **options})
    return named.set_params(classifier=make_classifier(name, 0).set_params(max_epochs=3))


@pytest.mark.parametrize("name", KINDS)
def test_the_file_scores_as_the_estimator_does(tiny: Tiny, name: str, tmp_path: Path) -> None:
    probe = quick_probe(tiny, name, hook_points=[1, 2]).fit(PROMPTS, LABELS)
    expected = probe.decision_function(NEW)
    assert expected.std() > 0.0
    path = probe.save(tmp_path / "probe.safetensors")
    weights = load_probe(path)
    assert weights.spec.kind == KINDS[name]
    found = score_prompts(tiny.bridge, NEW, weights)["probe"]
    is_logit = weights.spec.pooling.inference.startswith("score:")
    np.testing.assert_allclose(found.scores if is_logit else torch.logit(found.scores.double()), expected, atol=1e-4)
    probabilities = probe.predict_proba(NEW)
    np.testing.assert_allclose(probabilities[:, 1], 1 / (1 + np.exp(-expected)), atol=1e-6)
    assert probe.predict(NEW).tolist() == (expected > 0).astype(int).tolist()


@pytest.mark.parametrize("name", KINDS)
def test_every_token_has_the_logit_of_itself_alone(llama: Tiny, name: str) -> None:
    probe = quick_probe(llama, name).fit(PROMPTS, LABELS)
    rows = score_prompts(llama.bridge, NEW[:3], probe.weights_)["probe"].token_logits
    activations = extract_activations(llama.bridge, NEW[:3], hook_points=2, pooling="all", include_bos=True)
    alone = probe.classifier_.decision_function(activations.concatenated().numpy())
    np.testing.assert_allclose(torch.cat(rows), alone, atol=1e-4)


@pytest.mark.parametrize("name", ["attention", "rolling_attention", "windowed", "mlp"])
def test_live_scores_of_a_generation_are_those_of_its_text(llama: Tiny, name: str) -> None:
    weights = quick_probe(llama, name).fit(PROMPTS, LABELS).weights_.with_threshold(0.9999)
    (result,) = monitored_generate(llama.bridge, [NEW[0]], weights, max_new_tokens=6, do_sample=False, score_last_token=True)
    again = score_prompts(llama.bridge, [result.tokens], weights)["probe"]
    torch.testing.assert_close(result.running["probe"][-1], again.scores[0], rtol=1e-4, atol=1e-5)
    highest = sequence_maxima(llama.bridge, [result.tokens], weights)
    assert result.maxima["probe"] == pytest.approx(float(highest[0]), abs=1e-4)


def test_thresholds_are_calibrated_for_every_kind(llama: Tiny) -> None:
    negatives = make_prompts(70, seed=5)
    for name in KINDS:
        probe = quick_probe(llama, name).fit(PROMPTS, LABELS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # some of these short texts are the same to some probes
            probe.calibrate([text for text in negatives if text not in PROMPTS], fpr=0.1, delta=0.1)
        threshold = probe.weights_.threshold
        assert threshold is not None
        own = {"attention": "the attention logit", "rolling_attention": "the rolling attention logit", "mlp": "mean"}
        assert name not in own or threshold.statistic == f"running maximum of {own[name]}"
        maxima = sequence_maxima(llama.bridge, negatives, probe.weights_)
        assert (maxima.double().numpy() >= threshold.value).mean() <= 0.1


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_store_gives_the_probe_that_its_prompts_give(llama: Tiny, name: str, tmp_path: Path) -> None:
    pooling = "all" if name in SEQUENCE_CLASSIFIERS else "mean"
    extract_to_store(llama.bridge, PROMPTS, tmp_path / "store", hook_points=[2], pooling=pooling)
    probe, again = quick_probe(llama, name).fit(PROMPTS, LABELS), quick_probe(llama, name)
    again.fit_store(tmp_path / "store", LABELS)
    np.testing.assert_allclose(again.decision_function(NEW), probe.decision_function(NEW), atol=1e-4)
    assert again.training_.data_sha256 == probe.training_.data_sha256


def test_equal_prompts_are_not_learnt_from_and_held_out(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fit(self: Any, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Any:
        seen["groups"] = groups
        raise InterruptedError

    monkeypatch.setattr(SequenceClassifier, "fit", fit)
    with pytest.raises(InterruptedError):
        Probe(llama.bridge, 2, classifier="attention").fit(["cats", "dogs", "cats", "a line"], [1, 0, 1, 0])
    groups = seen["groups"].tolist()
    assert groups[0] == groups[2] and len(set(groups)) == 3


def test_trained_on_tokens_an_mlp_keeps_prompts_together(llama: Tiny) -> None:
    probe = Probe(llama.bridge, 2, pooling="all", classifier=MlpClassifier(**QUICK)).fit(PROMPTS, LABELS)
    assert probe.weights_.spec.kind == "mlp" and len(probe.groups_) == probe.training_.n_examples


def test_another_reduction_at_inference(llama: Tiny) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoolingMismatchWarning)  # it was trained through a reduction of token logits
        probe = Probe(llama.bridge, 2, classifier=WindowedClassifier(**QUICK), inference_pooling="score:ema_max(0.2)")
    spec = probe.fit(PROMPTS, LABELS).weights_.spec
    assert (spec.pooling.train, spec.pooling.inference) == ("score:rolling_max(16)", "score:ema_max(0.2)")
    expected = score_prompts(llama.bridge, NEW, probe.weights_)["probe"].scores
    np.testing.assert_allclose(probe.decision_function(NEW), expected, atol=1e-4)


def test_parameters_are_kept_and_cloned(llama: Tiny) -> None:
    probe = Probe(llama.bridge, 2, classifier="attention")
    assert probe.pooling is None and probe.poolings() == ("sequence", "sequence")
    assert "pooling='sequence'" in repr(probe)
    assert clone(probe).poolings() == ("sequence", "sequence")
    assert Probe(llama.bridge).poolings() == ("last_token", "last_token")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifier": "attention", "pooling": "mean"}, "pooling is 'mean'; expected None, since attention reduces"),
        ({"classifier": "multimax", "train_pooling": "all"}, "train_pooling is 'all'; expected None"),
        (
            {"classifier": AttentionClassifier(), "inference_pooling": "score:max"},
            "inference_pooling is 'score:max'; expected",
        ),
        (
            {"classifier": "softmax", "inference_pooling": "mean"},
            r"None \('score:softmax\(5\)'\) or another reduction",
        ),
        ({"classifier": "mlp", "pooling": "sequence"}, "Unknown pooling"),
    ],
)
def test_a_pooling_that_does_not_go_with_the_classifier_is_named(llama: Tiny, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Probe(llama.bridge, 2, **options)


@pytest.mark.parametrize(("fitted", "later"), [("logistic_regression", "attention"), ("attention", "logistic_regression")])
def test_a_classifier_set_after_fit_reads_nothing_that_another_learnt(llama: Tiny, fitted: str, later: str) -> None:
    probe = quick_probe(llama, "attention") if fitted == "attention" else Probe(llama.bridge, 2)
    probe.fit(PROMPTS, LABELS).set_params(classifier=later)
    for use in (lambda: probe.predict(NEW), lambda: probe.weights_):
        with pytest.raises(InputError, match=f"classifier is now {later}, .* call fit again"):
            use()
    assert len(probe.fit(PROMPTS, LABELS).predict(NEW)) == len(NEW)


def test_labels_must_suit_the_kind(llama: Tiny) -> None:
    with pytest.raises(InputError, match="token labels need 'all'"):
        Probe(llama.bridge, 2, classifier="attention").fit(["cats", "dogs"], [[1], [0]])
    with pytest.raises(InputError, match=r"(?i)two classes|classes"):
        Probe(llama.bridge, 2, classifier="attention").fit(PROMPTS, [at % 3 for at in range(40)])


def test_a_nonlinear_classifier_names_the_kinds_that_can_be_saved(llama: Tiny) -> None:
    from sklearn.neural_network import MLPClassifier

    probe = Probe(llama.bridge, 2, classifier=MLPClassifier((4,), max_iter=5)).fit(PROMPTS, LABELS)
    with pytest.raises(NonlinearClassifierError, match="'mlp'"):
        probe.weights_  # noqa: B018


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("name", ["attention", "windowed", "mlp"])
def test_a_probe_of_any_kind_is_evaluated_with_its_controls(llama: Tiny, name: str, from_file: bool, tmp_path: Path) -> None:
    probe = quick_probe(llama, name).fit(PROMPTS, LABELS)
    options: dict[str, Any] = {"train": (PROMPTS, LABELS), "n_bootstrap": 50, "n_draws": 2}
    judged, truth = make_prompts(40, seed=7), []
    truth = [int("cats" in prompt or "music" in prompt) for prompt in judged]
    if from_file:
        # by name: a file holds no parameters of the classifier
        probe.set_params(classifier=name)
        report = evaluate_probe(probe.save(tmp_path / "probe.safetensors"), judged, truth, model=llama.bridge, **options)
    else:
        report = evaluate_probe(probe, judged, truth, **options)
    assert set(report.controls) == {"bag_of_words", "layer_0", "length", "random_direction", "shuffled_labels"}
    expected = roc_auc_score(truth, probe.decision_function(judged))
    assert report.metrics["auroc"].value == pytest.approx(expected, abs=1e-3)
