"""Ways to score test prompts after learning from training prompts, by name: the library's probes, and their rivals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.quality_features import POOLING, TOKENS, Task
from lmprobe_tl import Probe, ProbeWeights
from lmprobe_tl.estimators import make_classifier
from lmprobe_tl.heads import SequenceHead
from lmprobe_tl.hook_points import layer_count
from lmprobe_tl.metrics import auroc
from lmprobe_tl.pooling import reduce_scores
from lmprobe_tl.splits import selection_splits

Recipe = Callable[[Task], np.ndarray]  # scores [n_test], high for label 1

MAIN, BY_HAND, BASELINE, CONTROL = "logistic_regression", "scikit-learn by hand", "bag of words", "shuffled labels"
FOLDS = 5
C_OF_PROBES = 0.03  # of the library's logistic regression


def fitted_probe(task: Task, classifier: Any, layers: Any, labels: np.ndarray | None = None) -> Probe:
    """A probe fitted on the store of the training prompts."""
    probe = Probe(task.model, layers, POOLING, classifier=classifier, random_state=task.seed, **TOKENS)
    return probe.fit_store(task.stores[0], task.train.labels if labels is None else labels)


def saved_rule_scores(probe: Probe, task: Task, layers: Any) -> np.ndarray:
    """What the probe's artefact, as it would be saved, says of the stored activations of the test prompts."""
    return probe.weights_.logits(torch.from_numpy(task.features(layers)[1])).numpy()


def probe_on(classifier: str, layers: Callable[[Task], Any] = lambda task: task.layer) -> Recipe:
    return lambda task: saved_rule_scores(fitted_probe(task, classifier, layers(task)), task, layers(task))


def sequence_probe(classifier: str) -> Recipe:
    """A probe that learns from all tokens of a prompt, at the chosen layer, and reduces them itself."""

    def scores(task: Task) -> np.ndarray:
        train, test = task.token_stores
        probe = Probe(task.model, task.layer, classifier=classifier, random_state=task.seed, **TOKENS)
        weights = probe.fit_store(train, task.train.labels).weights_
        prompts = test.values(task.layer, "all").split(test.lengths().tolist())
        return np.array([prompt_logit(weights, tokens) for tokens in prompts])

    return scores


def prompt_logit(weights: ProbeWeights, tokens: torch.Tensor) -> float:
    """What a saved probe says of one prompt, [pos d_model]."""
    if isinstance(weights.head, SequenceHead):
        return weights.sequence_logits(tokens[None]).item()
    return reduce_scores(weights.logits(tokens[None]), weights.spec.pooling.inference).item()


def scikit_learn_by_hand(task: Task) -> np.ndarray:
    """On the same features, without this library: not even the mean over d_model is taken off."""
    train, test = task.features(task.layer)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=C_OF_PROBES, max_iter=2000, random_state=task.seed))
    return pipeline.fit(train, task.train.labels).decision_function(test)


def bag_of_words(task: Task) -> np.ndarray:
    """TF-IDF of words and logistic regression whose C is chosen by cross-validation, as no probe's is."""
    bag = make_pipeline(TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"), LogisticRegression(max_iter=2000))
    folds = selection_splits(task.train.labels, task.train.groups, FOLDS, task.seed)
    search = GridSearchCV(bag, {"logisticregression__C": [0.1, 1.0, 10.0, 100.0]}, scoring="roc_auc", cv=folds)
    return search.fit(task.train.texts, task.train.labels).decision_function(task.test.texts)


def shuffled_labels(task: Task) -> np.ndarray:
    """A probe that can have learnt nothing: 0.5 on the mean over sets, or the test prompts leak."""
    labels = np.random.default_rng(task.seed).permutation(task.train.labels)
    return saved_rule_scores(fitted_probe(task, MAIN, task.layer, labels), task, task.layer)


RECIPES: dict[str, Recipe] = {
    BASELINE: bag_of_words,
    MAIN: probe_on("logistic_regression"),
    BY_HAND: scikit_learn_by_hand,
    "middle layer": probe_on("logistic_regression", lambda task: task.middle),
    "all layers": probe_on("logistic_regression", lambda task: "all"),
    "mass_mean": probe_on("mass_mean"),
    "mass_mean_whitened": probe_on("mass_mean_whitened"),
    "lda": probe_on("lda"),
    "ridge": probe_on("ridge"),
    "mlp": probe_on("mlp"),
    "polynomial": probe_on("polynomial"),
    "stacking": probe_on("stacking", lambda task: "all"),
    "softmax": sequence_probe("softmax"),
    "windowed": sequence_probe("windowed"),
    "multimax": sequence_probe("multimax"),
    "attention": sequence_probe("attention"),
    "rolling_attention": sequence_probe("rolling_attention"),
    CONTROL: shuffled_labels,
}


def layer_scores(task: Task) -> list[float]:
    """AUROC of each layer's logistic regression, the mean over folds of the training prompts that part no group."""
    labels = task.train.labels
    folds = selection_splits(labels, task.train.groups, FOLDS, task.seed)
    found = []
    for layer in range(layer_count(task.model)):
        features = task.features(layer)[0]
        one_layer = []
        for train, validate in folds:
            fitted = make_classifier(MAIN, task.seed).fit(features[train], labels[train])
            one_layer.append(auroc(labels[validate], fitted.decision_function(features[validate])))
        found.append(float(np.mean(one_layer)))
    return found
