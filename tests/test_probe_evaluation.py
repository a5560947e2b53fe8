"""Evaluations: controls that find what they should, groups, shift, and a record that is saved and read back."""

from __future__ import annotations

import dataclasses
import json
import random
import unicodedata
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny
from live_reference import make_head_probe, make_probe
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sweep_data import NOISE, in_another_order, noise, with_a_word

from lmprobe_tl import Probe, ProbeReport, ShiftReport, evaluate_probe, evaluate_shift, load_probe
from lmprobe_tl.controls import CONTROLS
from lmprobe_tl.errors import InputError, PoolingMismatchWarning
from lmprobe_tl.judged_probe import _recipe_of
from lmprobe_tl.measures import Difference, Measure
from lmprobe_tl.probe_evaluation import _above_chance
from lmprobe_tl.probe_report import ControlReport
from lmprobe_tl.probe_spec import TrainingRecord
from lmprobe_tl.report_table import _control_lines
from lmprobe_tl.verdict import verdict

QUICK: dict[str, Any] = {"n_bootstrap": 100, "n_draws": 8}
Data = tuple[list[str], list[Any]]


def of_other_lengths(n_prompts: int, seed: int = 0) -> Data:
    """Noise of 2 to 5 words where the label is 0, of 6 to 9 where it is 1."""
    rng = random.Random(seed)
    labels = [at % 2 for at in range(n_prompts)]
    return [" ".join(rng.choices(NOISE, k=rng.randint(2, 5) + 4 * label)) for label in labels], labels


def of_chance(n_prompts: int, seed: int = 0) -> Data:
    return [" ".join(words) for words in noise(seed, n_prompts)], [at % 2 for at in range(n_prompts)]


def fitted(tiny: Tiny, data: Data, **options: Any) -> Probe:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoolingMismatchWarning)
        return Probe(tiny.bridge, **{"hook_points": 2, "random_state": 0, **options}).fit(*data)


def evaluated(tiny: Tiny, make: Any, n: int = 60, **options: Any) -> ProbeReport:
    train, test = make(n, 0), make(n, 1)
    pooling = "mean" if make is in_another_order else "last_token"
    return evaluate_probe(fitted(tiny, train, pooling=pooling), *test, train=train, **{**QUICK, **options})


# --- controls ------------------------------------------------------------------------------------------------------------


def test_where_words_decide_the_verdict_names_the_bag_of_words(llama: Tiny) -> None:
    report = evaluated(llama, with_a_word)
    assert report.metrics["auroc"].value > 0.95
    assert report.controls["bag_of_words"].metrics["auroc"].value == 1.0
    assert not report.controls["bag_of_words"].is_beaten and not report.controls["layer_0"].is_beaten
    assert report.conclusion == "does not beat its controls"
    difference = report.controls["bag_of_words"].differences["auroc"]
    told = f"AUROC {report.metrics['auroc'].value:.3f} against 1.000, difference {difference.value:.3f} ["
    assert f"The probe does not beat the bag of words: {told}" in report.verdict
    assert "The probe does not beat the embedding (layer 0)" in report.verdict
    assert "length alone" not in report.verdict


def test_where_order_decides_a_probe_beats_every_control(llama: Tiny) -> None:
    train, test = in_another_order(100, 0), in_another_order(100, 1)
    report = evaluate_probe(fitted(llama, train, pooling="mean"), *test, train=train, **QUICK)
    assert report.metrics["auroc"].value > 0.95
    assert report.controls["bag_of_words"].metrics["auroc"].value < 0.7
    assert report.controls["layer_0"].metrics["auroc"].value < 0.7
    assert list(report.controls) == sorted(set(CONTROLS) - {"group"}) and report.left_out == {}
    assert all(one.is_beaten for one in report.controls.values())
    assert report.conclusion == "beats its controls"
    assert report.verdict.startswith("The probe beats every control that ran (5) on AUROC.")


def test_where_length_decides_the_verdict_names_length(llama: Tiny) -> None:
    report = evaluated(llama, of_other_lengths, controls=["length"])
    assert report.controls["length"].metrics["auroc"].value > 0.95
    assert report.conclusion == "does not beat its controls"
    assert "does not beat length alone" in report.verdict
    fair = evaluated(llama, in_another_order, controls=["length"])
    assert abs(fair.controls["length"].metrics["auroc"].value - 0.5) < 0.2
    assert fair.controls["length"].is_beaten


def test_nothing_to_find_is_no_better_than_chance(llama: Tiny) -> None:
    report = evaluated(llama, of_chance)
    assert report.conclusion == "does not beat its controls"
    assert "The probe is not clearly above chance" in report.verdict
    assert not any(one.is_beaten for one in report.controls.values())


def test_the_bag_of_words_is_scikit_learns_on_token_ids(llama: Tiny) -> None:
    train, test = of_other_lengths(60, 0), of_other_lengths(60, 1)
    report = evaluate_probe(fitted(llama, train), *test, train=train, controls=["bag_of_words", "length"], **QUICK)

    def documents(texts: list[str]) -> list[str]:
        return [" ".join(map(str, llama.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]

    vectorizer = TfidfVectorizer(token_pattern=r"\d+", sublinear_tf=True)
    bag = LogisticRegression(C=10.0, max_iter=2000, random_state=0)
    bag.fit(vectorizer.fit_transform(documents(train[0])), train[1])
    expected = bag.decision_function(vectorizer.transform(documents(test[0])))
    np.testing.assert_allclose(report.controls["bag_of_words"].scores[0], expected, rtol=1e-6, atol=1e-9)
    assert report.controls["bag_of_words"].metrics["auroc"].value == pytest.approx(roc_auc_score(test[1], expected))
    lengths = [len(document.split()) for document in documents(test[0])]
    assert report.controls["length"].metrics["auroc"].value == pytest.approx(roc_auc_score(test[1], lengths))


def test_layer_0_is_the_same_recipe_on_the_embedding(llama: Tiny) -> None:
    train, test = in_another_order(40, 0), in_another_order(40, 1)
    options = {"pooling": None, "train_pooling": "mean", "inference_pooling": "score:max", "classifier": "lda"}
    report = evaluate_probe(fitted(llama, train, **options), *test, train=train, controls="layer_0", **QUICK)
    own = fitted(llama, train, **{**options, "hook_points": "blocks.0.hook_resid_pre"})
    np.testing.assert_allclose(report.controls["layer_0"].scores[0], own.decision_function(test[0]), rtol=1e-6, atol=1e-9)
    same = evaluate_probe(own, *test, train=train, controls="layer_0", **QUICK)
    assert same.left_out == {"layer_0": "the probe itself reads the embedding"}


@pytest.mark.parametrize("inference", ["mean", "score:max", "all"])
def test_shuffled_labels_and_random_directions_are_refits_that_one_can_make_by_hand(llama: Tiny, inference: str) -> None:
    train, test = with_a_word(30, 0), with_a_word(24, 1)
    options = {"train_pooling": "all" if inference == "all" else "mean", "inference_pooling": inference}
    probe = fitted(llama, train, **options)
    names = ["shuffled_labels", "random_direction"]
    report = evaluate_probe(probe, *test, train=train, controls=names, n_bootstrap=20, n_draws=3, random_state=5)
    seeds = np.random.SeedSequence(5).generate_state(3).tolist()
    shuffled, directions = report.controls["shuffled_labels"], report.controls["random_direction"]
    for at, seed in enumerate(seeds):
        wrong = np.random.default_rng(seed).permutation(train[1])
        again = fitted(llama, (train[0], wrong), **options)
        assert shuffled.draws[at] == pytest.approx(again.evaluate(*test, n_bootstrap=1).auroc.value, abs=1e-9)
    assert shuffled.metrics["auroc"].value == pytest.approx(np.mean(shuffled.draws))
    assert len(set(directions.draws)) == 3 and all(area >= 0.2 for area in directions.draws)


class KnowsTheAnswer(ClassifierMixin, BaseEstimator):
    """Reads a direction that it was given, whatever the labels."""

    def __init__(self, direction: Any) -> None:
        self.direction = direction

    def fit(self, features: Any, labels: Any) -> KnowsTheAnswer:
        self.classes_ = np.unique(labels)
        return self

    def decision_function(self, features: Any) -> Any:
        return features @ np.array(self.direction)

    def predict(self, features: Any) -> Any:
        return self.classes_[(self.decision_function(features) > 0).astype(int)]


def test_the_open_sign_of_ccs_is_noted(llama: Tiny) -> None:
    train, test = in_another_order(60, 0), with_a_word(40, 1)
    for name, says in (("ccs", "an AUROC far below 0.5 here tells as much as one above"), ("mass_mean", "")):
        probe = fitted(llama, train, pooling="mean", classifier=name)
        report = evaluate_probe(probe, *test, train=train, controls=["layer_0"], **QUICK)
        assert report.controls["layer_0"].note.endswith(says) and bool(report.controls["layer_0"].note) is bool(says)


def test_shuffled_labels_that_do_not_fall_to_chance_are_leakage(llama: Tiny) -> None:
    train, test = with_a_word(60, 0), with_a_word(60, 1)
    honest = fitted(llama, train)
    probe = fitted(llama, train, classifier=KnowsTheAnswer(honest.weights_.direction[0].tolist()))
    report = evaluate_probe(probe, *test, train=train, controls=["shuffled_labels"], **QUICK)
    assert report.conclusion == "leakage"
    reached = report.metrics["auroc"].value
    assert reached > 0.95
    assert report.verdict == (
        f"Leakage: fitted on shuffled labels, the probe still reaches an AUROC of {reached:.3f}, where chance is 0.5. "
        "Something beside the training labels tells it the answers."
    )
    fair = evaluate_probe(honest, *test, train=train, controls=["shuffled_labels"], **QUICK)
    assert fair.conclusion != "leakage" and fair.controls["shuffled_labels"].above_chance.low < 0


def test_sound_probes_are_rarely_called_leaky() -> None:
    rng = np.random.default_rng(0)
    for n_draws in (8, 10, 30):
        assert sum(_above_chance(rng.normal(0.5, 0.12, n_draws)).is_above_zero for _ in range(1000)) < 13, n_draws
    # One strong direction, on which a shuffle decides but the sign, as mass_mean often has it.
    signs = np.where(rng.random((1000, 30)) < 0.5, -1, 1) * rng.normal(0.48, 0.005, (1000, 30)) + 0.5
    for n_draws in (3, 5, 8, 10, 30):
        found = [_above_chance(areas[:n_draws]) for areas in signs]
        assert sum(one is not None and one.is_above_zero for one in found) < 13, n_draws
    assert _above_chance(signs[0, :7]) is None
    assert sum(_above_chance(rng.normal(0.7, 0.12, 10)).is_above_zero for _ in range(100)) > 90


def test_judged_prompts_that_were_trained_on_are_leakage(llama: Tiny) -> None:
    train, test = with_a_word(40, 0), with_a_word(40, 1)
    mixed = (test[0][:-4] + train[0][:4], test[1][:-4] + train[1][:4])
    probe = fitted(llama, train)
    for one, given in ((probe, None), (probe.weights_, train)):
        model = None if one is probe else llama.bridge
        report = evaluate_probe(one, *mixed, model=model, train=given, controls=None, **QUICK)
        assert report.n_trained_on == 4 and report.conclusion == "leakage"
        assert "4 of the 40 judged prompts are training prompts too" in report.verdict
        assert evaluate_probe(one, *test, model=model, train=given, controls=None, **QUICK).n_trained_on == 0
    assert evaluate_probe(probe.weights_, *mixed, model=llama.bridge, controls=None, **QUICK).n_trained_on is None


def test_without_training_prompts_what_needs_them_is_left_out_by_name(llama: Tiny) -> None:
    train, test = of_other_lengths(60, 0), of_other_lengths(60, 1)
    report = evaluate_probe(fitted(llama, train), *test, **QUICK)
    assert report.left_out == dict.fromkeys(
        ["bag_of_words", "layer_0", "shuffled_labels"], "needs the training prompts (train)"
    )
    assert set(report.controls) == {"length", "random_direction"}
    assert "verdict: does not beat its controls (2 of 5 ran)" in report.table()
    assert {one.note for one in report.controls.values()} == {"fitted on the judged prompts themselves, in its favour"}
    assert "Nothing is known of the bag of words, the embedding (layer 0), shuffled labels" in report.verdict
    assert report.controls["length"].metrics["auroc"].value > 0.95
    none = evaluate_probe(fitted(llama, train), *test, controls=None, **QUICK)
    assert (none.conclusion, none.controls) == ("undecided", {})


def test_judged_prompts_that_repeat_are_noted(llama: Tiny) -> None:
    train, test = with_a_word(40, 0), with_a_word(40, 1)
    probe = fitted(llama, train)
    assert evaluate_probe(probe, *test, controls=None, **QUICK).notes == ()
    twice = evaluate_probe(probe, test[0] + test[0][:3], test[1] + test[1][:3], controls=None, **QUICK)
    assert twice.notes == ("3 of the judged prompts repeat another, so intervals are too narrow",)


def test_few_shuffles_say_that_they_cannot_tell_leakage(llama: Tiny) -> None:
    for n_draws, note in ((7, "too few draws to tell leakage; it takes 8"), (8, "")):
        report = evaluated(llama, with_a_word, controls=["shuffled_labels"], n_draws=n_draws)
        assert report.controls["shuffled_labels"].note == note
        assert (report.controls["shuffled_labels"].above_chance is None) is bool(note)


@pytest.mark.parametrize(
    ("share", "n_bootstrap", "says"),
    [(0.0, 1000, "<0.001"), (0.0, 100, "<0.010"), (0.0, 10**6, "<0.001"), (0.01, 100, "0.010"), (0.5, 1000, "0.500")],
)
def test_no_resample_at_zero_is_not_a_chance_of_zero(share: float, n_bootstrap: int, says: str) -> None:
    one = Measure(value=0.8, low=0.7, high=0.9, n=40)
    difference = Difference(value=0.3, low=0.1, high=0.4, share_at_most_zero=share)
    control = ControlReport(metrics={"auroc": one}, differences={"auroc": difference})
    assert _control_lines({"length": control}, {}, n_bootstrap)[1].split()[-1] == says


@pytest.mark.parametrize(("high", "says"), [(0.1, "may tell as much"), (-0.1, "tells as much"), (0.0, "tells as much")])
def test_a_control_tells_as_much_only_where_the_probe_is_not_above_it(high: float, says: str) -> None:
    one = Measure(value=0.8, low=0.7, high=0.9, n=40)
    difference = Difference(value=high - 0.1, low=-0.3, high=high, share_at_most_zero=0.8)
    bag = ControlReport(metrics={"auroc": one}, differences={"auroc": difference})
    conclusion, text = verdict(one, {"bag_of_words": bag}, {}, {}, None, 0, 40)
    assert conclusion == "does not beat its controls" and f"Which words a text holds {says}" in text


def test_too_few_prompts_leave_it_undecided(llama: Tiny) -> None:
    train, test = in_another_order(60, 0), in_another_order(8, 1)
    probe = fitted(llama, train, pooling="mean")
    report = evaluate_probe(probe, *test, train=train, controls=["bag_of_words", "length"], **QUICK)
    assert report.conclusion == "undecided"
    assert report.verdict.startswith("Too few prompts to tell whether the probe beats the bag of words, length alone")


# --- groups --------------------------------------------------------------------------------------------------------------


def test_a_group_that_leaks_does_not_hide_the_others(llama: Tiny) -> None:
    def mixed(seed: int) -> tuple[list[str], list[int], list[str]]:
        easy, hard = with_a_word(60, seed), of_chance(60, seed + 10)
        return easy[0] + hard[0], easy[1] + hard[1], ["easy"] * 60 + ["hard"] * 60

    train, test = mixed(0), mixed(1)
    report = evaluate_probe(fitted(llama, train[:2]), *test[:2], groups=test[2], train=train[:2], **QUICK)
    assert report.metrics["auroc"].low > 0.6
    assert (report.worst_group, report.worst_by) == ("hard", "auroc")
    assert report.groups["easy"].metrics["auroc"].low > 0.9
    assert "In the group 'hard' the probe is not clearly above chance" in report.verdict
    assert report.left_out == {"group": "needs the groups of the training prompts (train)"}
    alone = evaluate_probe(fitted(llama, train[:2]), test[0][60:], test[1][60:], controls=None, **QUICK)
    assert alone.metrics["auroc"] == report.groups["hard"].metrics["auroc"]
    assert (report.groups["hard"].n_prompts, report.groups["hard"].n_examples) == (60, 60)


def test_of_groups_that_are_equal_none_is_the_worst(llama: Tiny) -> None:
    train, test = with_a_word(60, 0), with_a_word(60, 1)
    twice, groups = (test[0] * 2, test[1] * 2), ["a"] * 60 + ["b"] * 60
    report = evaluate_probe(fitted(llama, train), *twice, controls=None, groups=groups, **QUICK)
    assert len({one.metrics["auroc"].value for one in report.groups.values()}) == 1
    assert (report.worst_group, report.worst_by) == (None, None)
    assert "worst" not in report.table()


def test_a_group_that_gives_the_label_away_is_a_control(llama: Tiny) -> None:
    train, test = with_a_word(60, 0), with_a_word(60, 1)
    sources = [("forum" if label else "news") if at % 10 else "mixed" for at, label in enumerate(train[1])]
    report = evaluate_probe(fitted(llama, train), *test, groups=sources, train=(*train, sources), controls="group", **QUICK)
    assert report.controls["group"].metrics["auroc"].value > 0.9
    own = [("forum" if label else "news") for label in test[1]]
    report = evaluate_probe(fitted(llama, train), *test, groups=own, train=(*train, sources), controls="group", **QUICK)
    assert "does not beat the group alone" in report.verdict
    assert "No group holds both classes" in report.verdict
    assert report.groups["forum"].metrics["auroc"].note == "no prompt of class 0"
    assert report.worst_by == "accuracy"
    others = [f"other {source}" for source in own]
    report = evaluate_probe(fitted(llama, train), *test, groups=others, train=(*train, sources), controls="group", **QUICK)
    assert report.left_out == {"group": "no group of the judged prompts is among the training prompts"}


# --- what a probe comes as, and what is judged ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train_pooling", "inference_pooling"),
    [
        ("gpt2", "last_token", "last_token"), ("gpt2", "mean", "mean"), ("llama", "mean", "score:max"),
        ("llama", "mean", "score:mean"), ("llama", "mean", "score:ema_max(0.5)"), ("llama", "first_token", "first_token"),
        ("llama", "all", "all"),
    ],
)  # fmt: skip
def test_weights_give_what_the_estimator_gives(
    all_tiny: dict[str, Tiny], name: str, train_pooling: str, inference_pooling: str
) -> None:
    tiny = all_tiny[name]
    train, test = of_other_lengths(40, 0), of_other_lengths(30, 1)
    if train_pooling == "first_token":
        train, test = ((_with_first_word(*one), one[1]) for one in (train, test))
    # no BOS, or 'first_token' would see nothing else
    options = {"train_pooling": train_pooling, "inference_pooling": inference_pooling, "prepend_bos": False}
    probe = fitted(tiny, train, **options)
    evaluate = partial(evaluate_probe, train=train, keep_tokens=True, n_draws=2, n_bootstrap=20)
    expected, found = evaluate(probe, *test), evaluate(probe.weights_, *test, model=tiny.bridge)
    assert (found.level, found.pooling, found.n_examples) == (expected.level, expected.pooling, expected.n_examples)
    np.testing.assert_allclose(found.examples.scores, expected.examples.scores, atol=2e-4, rtol=2e-4)
    assert dataclasses.replace(found.examples, scores=(), probabilities=(), token_scores=None) == dataclasses.replace(
        expected.examples, scores=(), probabilities=(), token_scores=None
    )
    for these, those in zip(found.examples.token_scores, expected.examples.token_scores, strict=True):
        np.testing.assert_allclose(these, those, atol=2e-4, rtol=2e-4)
    for metric, one in expected.metrics.items():
        assert found.metrics[metric].value == pytest.approx(one.value, abs=2e-3), metric
    assert found.notes == ()
    for control in ("bag_of_words", "layer_0", "shuffled_labels"):
        value = expected.controls[control].metrics["auroc"].value
        assert found.controls[control].metrics["auroc"].value == pytest.approx(value, abs=1e-6)


def _with_first_word(texts: list[str], labels: list[Any]) -> list[str]:
    return [f"{'cats' if label else 'dogs'} {text}" for text, label in zip(texts, labels, strict=True)]


def test_a_file_gives_what_its_weights_give(llama: Tiny, tmp_path: Path) -> None:
    train, test = with_a_word(30, 0), with_a_word(30, 1)
    weights = fitted(llama, train).weights_
    found = [
        evaluate_probe(one, *test, model=llama.bridge, train=train, **QUICK)
        for one in (weights, weights.save(tmp_path / "p.safetensors"), str(tmp_path / "p.safetensors"))
    ]
    assert found[0] == found[1] == found[2]


def test_the_metrics_are_those_of_evaluate(llama: Tiny) -> None:
    train, test = in_another_order(60, 0), of_other_lengths(60, 3)
    probe = fitted(llama, train, hook_points=[1, 2])
    report = evaluate_probe(probe, *test, controls=None, fprs=(0.1,), n_bootstrap=200, random_state=3)
    evaluation = probe.evaluate(*test, fpr=0.1, n_bootstrap=200, random_state=3)
    for name, interval in (
        ("auroc", evaluation.auroc),
        ("accuracy", evaluation.accuracy),
        ("tpr_at_fpr_0.1", evaluation.tpr_at_fpr),
    ):
        one = report.metrics[name]
        assert (one.value, one.low, one.high) == pytest.approx((interval.value, interval.low, interval.high))
    assert set(evaluation.records()) < set(report.records())
    assert report.records()["auroc"] == evaluation.records()["auroc"]


def test_the_metrics_go_into_the_probe_file(llama: Tiny, tmp_path: Path) -> None:
    train, test = with_a_word(40, 0), with_a_word(40, 1)
    probe = fitted(llama, train)
    report = evaluate_probe(probe, *test, controls=None, **QUICK)
    saved = load_probe(probe.save(tmp_path / "p.safetensors", evaluation=report))
    assert saved.spec.metrics == report.records()
    assert set(saved.spec.metrics) == {"auroc", "auprc", "accuracy", "calibration_error", "brier"}
    with pytest.raises(InputError, match="evaluation is a str; expected what `evaluate` or `evaluate_probe` returned"):
        probe.save(tmp_path / "q.safetensors", evaluation="good")  # type: ignore[arg-type]


def test_tokens_are_judged_where_tokens_have_labels(llama: Tiny) -> None:
    def data(seed: int) -> tuple[list[str], list[list[int]]]:
        texts = in_another_order(30, seed)[0]
        rows = [llama.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return texts, [[int(token % 2) for token in row] for row in rows]

    train, test = data(0), data(1)
    probe = fitted(llama, train, pooling="all", hook_points=0)
    report = evaluate_probe(probe, *test, train=train, **QUICK)
    n_tokens = sum(len(row) for row in test[1])
    assert (report.level, report.n_prompts, report.n_examples) == ("token", 30, n_tokens)
    assert report.metrics["auroc"].n == 30, "prompts are resampled, not tokens"
    assert report.controls["bag_of_words"].metrics["auroc"].value > 0.99, "a token's id says its parity"
    assert report.conclusion == "does not beat its controls"
    assert set(report.records()) >= {"token_auroc", "token_brier"}
    assert f"30 prompts, {n_tokens} tokens" in report.table()
    pooled = evaluate_probe(
        fitted(llama, train, pooling="all", inference_pooling="mean"), *with_a_word(30), train=train, **QUICK
    )
    assert pooled.left_out["bag_of_words"] == "the training labels are of tokens, and prompts are judged"
    assert {"layer_0", "shuffled_labels", "random_direction"} <= set(pooled.controls)


def test_several_classes_have_what_is_defined_for_them(llama: Tiny) -> None:
    def data(seed: int) -> Data:
        labels = [("red", "green", "blue")[at % 3] for at in range(60)]
        words = {"red": "cats", "green": "dogs", "blue": "music"}
        return [" ".join([*text, words[label]]) for text, label in zip(noise(seed, 60), labels, strict=True)], labels

    train, test = data(0), data(1)
    probe = fitted(llama, train)
    report = evaluate_probe(probe, *test, train=train, keep_tokens=True, **QUICK)
    expected = roc_auc_score(test[1], probe.predict_proba(test[0]), multi_class="ovr", average="macro")
    assert report.metrics["auroc"].value == pytest.approx(expected)
    assert report.metrics["accuracy"].low is not None
    assert report.metrics["auprc"].note == "defined for two classes; there are 3"
    assert len(report.examples.scores) == len(report.examples.probabilities) == 3 and report.examples.texts is None
    assert set(report.controls) == set(CONTROLS) - {"group"}
    weighed = evaluate_probe(probe.weights_, *test, model=llama.bridge, controls=None, **QUICK)
    np.testing.assert_allclose(weighed.examples.scores, report.examples.scores, atol=1e-5)
    assert ProbeReport.from_json(report.to_json()) == report
    assert_readable(report.table())


def test_a_class_without_a_judged_prompt_leaves_no_auroc(llama: Tiny) -> None:
    def of_three(n: int, seed: int, n_classes: int) -> Data:
        ends, labels = ("more", "cats", "dogs"), [at % n_classes for at in range(n)]
        return [" ".join([*words, ends[label]]) for words, label in zip(noise(seed, n), labels, strict=True)], labels

    train = of_three(60, 0, 3)
    report = evaluate_probe(fitted(llama, train), *of_three(40, 1, 2), train=train, **QUICK)
    assert report.verdict == "There is no AUROC to go by: no prompt of class 2."
    assert (report.conclusion, report.metrics["auroc"].value) == ("undecided", None)
    assert report.metrics["accuracy"].value > 0.8 and "auroc=none" in repr(report)
    assert report.controls["shuffled_labels"].metrics["auroc"].note == "no prompt of class 2"
    assert report.controls["shuffled_labels"].metrics["accuracy"].value < 0.7
    assert ProbeReport.from_json(report.to_json()) == report


def test_labels_of_a_file_may_stand_in_any_order(llama: Tiny) -> None:
    """The second label is the positive one, and not the greater one."""
    train, test = with_a_word(60, 0), of_other_lengths(60, 1)
    weights = fitted(llama, train).weights_
    turned = dataclasses.replace(weights, spec=dataclasses.replace(weights.spec, labels=("yes", "no")))
    plain = evaluate_probe(weights, *test, model=llama.bridge, train=train, **QUICK)
    words = {0: "yes", 1: "no"}
    of_words = [[words[label] for label in one[1]] for one in (train, test)]
    report = evaluate_probe(turned, test[0], of_words[1], model=llama.bridge, train=(train[0], of_words[0]), **QUICK)
    for name, one in plain.metrics.items():
        assert one.value is None or report.metrics[name].value == pytest.approx(one.value, abs=1e-6), name
    for name in ("auroc", "auprc", "accuracy"):
        for control in ("bag_of_words", "length", "layer_0"):
            expected = plain.controls[control].metrics[name].value
            assert report.controls[control].metrics[name].value == pytest.approx(expected, abs=1e-3), (control, name)


def test_a_classifier_without_a_linear_rule_is_evaluated_too(llama: Tiny) -> None:
    train, test = with_a_word(40, 0), with_a_word(40, 1)
    forest = RandomForestClassifier(20, random_state=0)
    report = evaluate_probe(fitted(llama, train, classifier=forest), *test, train=train, **QUICK)
    assert report.metrics["auroc"].value > 0.9 and set(report.controls) == set(CONTROLS) - {"group"}


def test_notes_say_what_had_to_be_guessed(llama: Tiny) -> None:
    train, test = with_a_word(40, 0), with_a_word(40, 1)
    weights = fitted(llama, train).weights_
    evaluate = partial(evaluate_probe, **QUICK, controls=["length"], model=llama.bridge)
    assert evaluate(weights, *test, train=train).notes == ()
    other = evaluate(weights, *test, train=with_a_word(40, 7)).notes
    assert other == ("the training prompts given are not exactly those that the probe was trained on",)
    by_hand = dataclasses.replace(weights, spec=dataclasses.replace(weights.spec, training=None))
    assert evaluate(by_hand, *test).notes == (
        "the probe file names no classifier, so controls are fitted with logistic_regression",
    )


@pytest.mark.parametrize("classifier", ["softmax", "attention", "logistic_regression"])
def test_a_file_whose_classifier_and_poolings_disagree_is_judged_with_a_note(llama: Tiny, classifier: str) -> None:
    """Another inference pooling is one call away, and a file may name any classifier."""
    train, test = with_a_word(40, 0), with_a_word(40, 1)
    weights = fitted(llama, train).weights_
    training = dataclasses.replace(weights.spec.training, classifier=classifier)
    pooling = dataclasses.replace(weights.spec.pooling, train="score:softmax(5)" if classifier == "softmax" else "mean")
    spec = dataclasses.replace(weights.spec, training=training, pooling=pooling)
    moved = dataclasses.replace(weights, spec=spec).with_inference_pooling("mean")
    report = evaluate_probe(moved, *test, model=llama.bridge, controls=["random_direction"], **QUICK)
    notes = (
        ()
        if classifier == "logistic_regression"
        else (
            f"the probe file names the classifier {classifier}, which does not go with its poolings, so controls are fitted "
            "with logistic_regression",
        )
    )
    assert report.notes == notes and "random_direction" in report.controls


@pytest.mark.parametrize(
    ("kind", "controls"), [("mlp", "mlp"), ("attention", "attention"), ("linear", "logistic_regression")]
)
def test_controls_of_an_own_classifier_are_fitted_with_that_of_the_kind(kind: str, controls: str) -> None:
    weights = make_probe() if kind == "linear" else make_head_probe(kind)
    training = TrainingRecord(
        data_sha256="0" * 64, n_prompts=2, n_examples=2, class_counts=(1, 1), classifier="MyClassifier"
    )
    classifier, _, notes = _recipe_of(
        dataclasses.replace(weights, spec=dataclasses.replace(weights.spec, training=training))
    )
    assert classifier == controls
    assert notes == (f"the probe file names the classifier MyClassifier, so controls are fitted with {controls}",)


def test_the_record_depends_on_the_seed_alone(llama: Tiny) -> None:
    first, again = (evaluated(llama, of_chance, 30) for _ in range(2))
    assert first == again
    assert first.to_json() == again.to_json()
    other = evaluated(llama, of_chance, 30, random_state=1)
    assert other.metrics["auroc"].value == first.metrics["auroc"].value
    assert other.metrics["auroc"].low != first.metrics["auroc"].low


# --- the record and its table ----------------------------------------------------------------------------------------------


def width(text: str) -> int:
    return len(text) + sum(unicodedata.east_asian_width(char) in "WF" for char in text)


def assert_readable(table: str) -> None:
    for line in table.splitlines():
        assert width(line) <= 80, line
        assert line == line.rstrip() and line.isprintable()


def whole_report(tiny: Tiny) -> ProbeReport:
    train, test = of_other_lengths(40, 0), of_other_lengths(40, 1)
    names = ["english", "a source with quite a long name", "日本語の文章とそのほかのもの", "bell\x07"]
    groups = [names[at // 2 % 4] for at in range(40)]
    probe = fitted(tiny, train, name="a name that goes on and on " * 4, hook_points=[0, 1, 2, 3])
    report = evaluate_probe(probe, *test, train=(*train, groups), groups=groups, keep_tokens=True, **QUICK)
    return report.with_shift(
        evaluate_shift(probe, test, {"日本語": with_a_word(30), "one": (["rain"] * 6, [1] * 6)}, n_bootstrap=50)
    )


def test_a_record_is_read_back_as_it_was(llama: Tiny, tmp_path: Path) -> None:
    report = whole_report(llama)
    text = report.to_json()
    assert ProbeReport.from_json(text) == report
    assert json.loads(text)["kind"] == "ProbeReport"
    path = report.save(tmp_path / "report.json")
    assert ProbeReport.from_json(path.read_text()) == report
    assert ShiftReport.from_json(report.shift.to_json()) == report.shift
    assert ProbeReport.from_json(text).table() == report.table()


def test_the_record_holds_all_that_a_plot_needs(llama: Tiny) -> None:
    report = whole_report(llama)
    examples, test = report.examples, of_other_lengths(40, 1)
    assert list(examples.labels) == test[1] and examples.prompts == tuple(range(40))
    assert roc_auc_score(examples.labels, examples.scores[0]) == pytest.approx(report.metrics["auroc"].value)
    losses = (np.array(examples.probabilities[0]) - examples.labels) ** 2
    assert losses.mean() == pytest.approx(report.metrics["brier"].value)
    assert ["".join(pieces) for pieces in examples.texts] == test[0]
    assert [len(pieces) for pieces in examples.texts] == [len(scores) for scores in examples.token_scores]
    assert set(examples.groups) == set(report.groups)
    for name in ("bag_of_words", "length", "layer_0"):
        auroc = report.controls[name].metrics["auroc"].value
        assert roc_auc_score(examples.labels, report.controls[name].scores[0]) == pytest.approx(auroc)


def test_tables_fit_a_terminal_and_name_everything(llama: Tiny) -> None:
    report = whole_report(llama)
    table = report.table()
    assert_readable(table)
    assert_readable(report.shift.table())
    for word in ["AUROC", "AUPRC", "accuracy", "TPR at FPR 1 %", "TPR at FPR 0.1 %", "calibration error", "Brier score"]:
        assert word in table
    for word in [
        *CONTROLS,
        "english",
        "a source with qui...",
        "bell\\x07",
        "日本語",
        "verdict:",
        "worst by AUROC:",
        "held out",
    ]:
        assert word in table, word
    auroc = report.metrics["auroc"]
    assert f"  AUROC                 {auroc.value:.3f}  [{auroc.low:.3f}, {auroc.high:.3f}]" in table
    difference = report.controls["bag_of_words"].differences["auroc"]
    assert f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" in table
    assert " ".join(report.verdict.split()) in " ".join(table.split())
    assert str(report) == table and report.conclusion in repr(report)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no ProbeReport: the text is no JSON"),
        ("[]", "its kind is a list"),
        ('{"kind": "ShiftReport"}', "its kind is 'ShiftReport'"),
        ('{"kind": "ProbeReport", "format_version": 1}', "probe is missing"),
        ('{"kind": "ProbeReport", "extra": 1}', "'extra' (value 1) is an unknown key"),
    ],
)
def test_what_is_no_record_is_named(text: str, says: str) -> None:
    with pytest.raises(InputError) as raised:
        ProbeReport.from_json(text)
    assert says in str(raised.value)


def test_a_record_of_another_version_or_with_wrong_values_is_refused(llama: Tiny) -> None:
    data = json.loads(evaluated(llama, of_chance, 20, controls=None).to_json())
    for change, says in [
        ({"format_version": 2}, "format_version is 2; expected 1"),
        ({"n_prompts": "many"}, "n_prompts is 'many'"),
        ({"conclusion": "great"}, "conclusion is 'great'"),
        ({"metrics": {"auroc": {"value": None, "low": None, "high": None, "n": 3, "note": ""}}}, "why there is no value"),
    ]:
        with pytest.raises(InputError) as raised:
            ProbeReport.from_json(json.dumps({**data, **change}))
        assert says in str(raised.value)


# --- shift ---------------------------------------------------------------------------------------------------------------


def test_shift_shows_where_a_probe_breaks_and_where_not(llama: Tiny) -> None:
    train, own, alike = with_a_word(60, 0), with_a_word(60, 1), with_a_word(60, 2)
    turned = (alike[0], [1 - label for label in alike[1]])
    probe = fitted(llama, train)
    sets = {"alike": alike, "turned": turned, "chance": of_chance(60, 3)}
    shift = evaluate_shift(probe, own, sets, n_bootstrap=200)
    assert list(shift.shifted) == sorted(sets)
    assert shift.shifted["turned"].metrics["auroc"].value < 0.05
    assert shift.shifted["turned"].drops["auroc"].value > 0.95 and shift.shifted["turned"].drops["auroc"].is_above_zero
    assert shift.shifted["chance"].drops["auroc"].is_above_zero
    assert not shift.shifted["alike"].drops["auroc"].is_above_zero
    assert shift.held_out.metrics == evaluate_probe(probe, *own, controls=None, n_bootstrap=200).metrics
    single = evaluate_shift(probe, own, {"ones": (own[0][1::2], [1] * 30)}, n_bootstrap=20).shifted["ones"]
    assert single.metrics["accuracy"].value > 0.8 and single.metrics["auroc"].note == "no prompt of class 0"
    assert "auroc" not in single.drops
    assert "turned" in shift.table() and str(shift) == shift.table()
    weighed = evaluate_shift(probe.weights_, own, sets, model=llama.bridge, n_bootstrap=200)
    for name, part in shift.shifted.items():
        assert weighed.shifted[name].metrics["auroc"].value == pytest.approx(part.metrics["auroc"].value, abs=1e-6)


def test_drops_of_equal_data_are_those_of_independent_data(llama: Tiny) -> None:
    """The same prompts twice: the drop is 0, and its interval is that of two draws and not of one."""
    train, own = of_other_lengths(60, 0), of_chance(80, 1)
    shift = evaluate_shift(fitted(llama, train), own, {"again": own}, n_bootstrap=400)
    drop, auroc = shift.shifted["again"].drops["auroc"], shift.held_out.metrics["auroc"]
    assert drop.value == 0 and drop.low < 0 < drop.high
    assert (drop.high - drop.low) / (auroc.high - auroc.low) == pytest.approx(np.sqrt(2), rel=0.25)


# --- what cannot be --------------------------------------------------------------------------------------------------------


def shown(call: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(InputError) as raised:
        call(*arguments, **named)
    return str(raised.value)


def test_what_cannot_be_used_is_named(llama: Tiny) -> None:
    train, test = with_a_word(20, 0), with_a_word(20, 1)
    probe = fitted(llama, train)
    weights, evaluate = probe.weights_, partial(evaluate_probe, **QUICK)
    cases: Sequence[tuple[str, Any]] = [
        ("control 'bag' is unknown; expected 'default', None, or names among bag_of_words", {"controls": ["bag"]}),
        ("controls names 'length' more than once", {"controls": ["length", "length"]}),
        ("20 prompts but 3 groups; expected one a prompt", {"groups": ["a"] * 3}),
        ("train is a str of another form; expected (prompts, labels)", {"train": "train.jsonl"}),
        ("the training labels: none is 1, which the probe knows", {"train": (train[0], [0] * 20)}),
        ("the training labels: 2 is no label of the probe; expected those of [0, 1]", {"train": (train[0], [0, 2] * 10)}),
        ("n_draws is 0; expected", {"n_draws": 0}),
        ("Expected n_bootstrap >= 1", {"n_bootstrap": 0}),
        ("expected false positive rates", {"fprs": (0.1, 0.1)}),
        ("model: a fitted Probe has its own", {"model": llama.bridge}),
        ("prepend_bos, max_length: a fitted Probe has its own", {"prepend_bos": True, "max_length": 4}),
    ]
    for says, change in cases:
        message = shown(evaluate_probe, probe, *test, **{**QUICK, **change})
        assert says in message or ("all are 0" in message and "none is 1" in says), message
    assert "ProbeWeights comes without a model; pass model=" in shown(evaluate, weights, *test)
    assert "'x.safetensors' comes without a model" in shown(evaluate, "x.safetensors", *test)
    assert "is not fitted; call fit first" in shown(evaluate, Probe(llama.bridge, 1), *test)
    assert "int is no probe" in shown(evaluate, 3, *test, model=llama.bridge)
    assert "labels: all are 1; an evaluation needs examples of at least two classes" in shown(
        evaluate, probe, test[0], [1] * 20
    )
    assert "labels: 'a' is no label of the probe" in shown(evaluate, probe, test[0], ["a", "b"] * 10)
    assert "20 prompts but 2 labels" in shown(evaluate, probe, test[0], [0, 1])
    assert "20 prompts but 2 sequences of token labels" in shown(evaluate, probe, test[0], [[0], [1]])
    assert "shifted is no dictionary" in shown(evaluate_shift, probe, test, {})
    assert "shifted['b'] is no pair" in shown(evaluate_shift, probe, test, {"b": test[0]})
    assert "shifted['b']: 7 is no label of the probe" in shown(evaluate_shift, probe, test, {"b": (test[0], [7] * 20)})
    assert "held_out is no pair" in shown(evaluate_shift, probe, test[0], {"b": test})
