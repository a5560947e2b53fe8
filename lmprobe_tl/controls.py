"""What a probe has to beat: baselines without its activations, without its labels, or without its direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import make_classifier, own_pooling
from lmprobe_tl.estimators.baselines import RandomDirectionClassifier, make_length_classifier, shares_by_group
from lmprobe_tl.estimators.ccs import CcsClassifier
from lmprobe_tl.estimators.fitting import logits_of, probabilities_of
from lmprobe_tl.estimators.pairs import last_step
from lmprobe_tl.judged_probe import JudgedProbe
from lmprobe_tl.labelled_prompts import LabelledPrompts
from lmprobe_tl.labels import are_token_labels
from lmprobe_tl.probe import Probe
from lmprobe_tl.recipe import Recipe
from lmprobe_tl.scored import Scored
from lmprobe_tl.sweep_examples import SweepExamples, sweep_examples
from lmprobe_tl.token_bag import make_token_bag

Array = NDArray[Any]

EMBEDDING = "blocks.0.hook_resid_pre"
_SIGNLESS = "the votes of pairs decided the sign of 'ccs': an AUROC far below 0.5 here tells as much as one above"
_NEEDS_TRAINING = "needs the training prompts (train)"


@dataclass(frozen=True, eq=False)
class Control:
    """Scores of a control on the judged examples, several where chance has a part in it. note: how it was made, where that
    was not from the training prompts."""

    draws: tuple[Scored, ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class ControlSetting:
    """What controls are made from. given: the judged prompts, judged: what the probe says of them; train: the training
    prompts, if they are known."""

    probe: JudgedProbe
    given: LabelledPrompts
    judged: Scored
    train: LabelledPrompts | None
    n_draws: int
    random_state: int | None

    @cached_property
    def judged_examples(self) -> SweepExamples:
        """Labels, tokens and prompt of each judged example."""
        return self._examples(self.given)

    @cached_property
    def known_examples(self) -> SweepExamples:
        """The same of the training prompts, or of the judged ones where there are no others."""
        return self._examples(self.known()[0])

    @cached_property
    def recipe(self) -> Recipe:
        """The probe's own, with what it learns from extracted."""
        return Recipe(self.probe.recipe, *self.known())

    def _examples(self, of: LabelledPrompts) -> SweepExamples:
        rows, include_bos = self.probe.rows(of.prompts), self.probe.recipe.include_bos
        per_token = self.judged.level == "token"
        if are_token_labels(of.labels) and not per_token:
            raise _ImpossibleError("the training labels are of tokens, and prompts are judged")
        return sweep_examples(self.probe.model, rows, of.labels, None, per_token=per_token, include_bos=include_bos)

    def known(self) -> tuple[LabelledPrompts, str]:
        """What to fit the few numbers of a control on that knows nearly nothing: in its favour, on the judged prompts
        themselves where there are no others; and the note that says so."""
        if self.train is not None:
            return self.train, ""
        return self.given, "fitted on the judged prompts themselves, in its favour"

    def scored(self, classifier: Any, features: Array) -> Scored:
        """What a fitted classifier says of features [n_examples ...] of the judged examples."""
        judged = self.judged
        truth = np.array([*judged.classes])[judged.labels]
        logits, probabilities = logits_of(classifier, features), probabilities_of(classifier, features)
        found = Scored.of(truth, logits, probabilities, judged.prompts, classifier.classes_.tolist(), judged.level)
        return found.with_classes(judged.classes)

    def seeds(self) -> list[Any]:
        return np.random.SeedSequence(self.random_state).generate_state(self.n_draws).tolist()


class _ImpossibleError(InputError):
    """A control that these data do not allow."""


def run_controls(setting: ControlSetting, names: Sequence[str]) -> tuple[dict[str, Control], dict[str, str]]:
    """The controls by name, and why the others were left out."""
    found: dict[str, Control] = {}
    left_out: dict[str, str] = {}
    refits: dict[str, _Refit] = {}
    for name in names:
        try:
            if name in _REFITS:
                refits[name] = _REFITS[name](setting)
            else:
                found[name] = _CONTROLS[name](setting)
        except InputError as error:
            left_out[name] = str(error)
    # Those of one recipe are scored together, so that the model runs once.
    for recipe in {id(one.recipe): one.recipe for one in refits.values()}.values():
        probes = {name: one.probes for name, one in refits.items() if one.recipe is recipe}
        fitted = [probe for several in probes.values() for probe in several]
        classifiers = [probe.classifier_ for probe in fitted]
        judged = iter(fitted[0].judged_with(classifiers, setting.given.prompts, setting.given.labels))
        for name, several in probes.items():
            draws = tuple(next(judged).with_classes(setting.judged.classes) for _ in several)
            found[name] = Control(draws, recipe.note)
    return {name: found[name] for name in names if name in found}, left_out


def check_controls(controls: Any, *, has_groups: bool) -> list[str]:
    """Names of the wanted controls; InputError for an unknown name, or one twice."""
    known = [*_CONTROLS, *_REFITS]
    if controls is None:
        return []
    if isinstance(controls, str) and controls == "default":
        return [name for name in CONTROLS if name != "group" or has_groups]
    listed = [controls] if isinstance(controls, str) else list(controls)
    for name in listed:
        if name not in known:
            raise InputError(f"control {name!r} is unknown; expected 'default', None, or names among {', '.join(CONTROLS)}.")
        if listed.count(name) > 1:
            raise InputError(f"controls names {name!r} more than once; give each of them once.")
    return listed


# --- controls that see no activation -------------------------------------------------------------------------------------


def _bag_of_words(setting: ControlSetting) -> Control:
    """TF-IDF and logistic regression on token ids, in any order."""
    if setting.train is None:
        raise _ImpossibleError(_NEEDS_TRAINING)
    train = setting.known_examples
    bag = make_token_bag(setting.random_state).fit(train.documents, train.labels)
    return Control((setting.scored(bag, setting.judged_examples.documents),))


def _length(setting: ControlSetting) -> Control:
    """Logistic regression on the number of tokens; of a token on its place and the length of its prompt."""
    train, note = setting.known_examples, setting.known()[1]
    classifier = make_length_classifier().fit(_lengths(train), train.labels)
    return Control((setting.scored(classifier, _lengths(setting.judged_examples)),), note)


def _lengths(examples: SweepExamples) -> Array:
    if examples.level == "prompt":
        return np.array([[len(document)] for document in examples.documents], dtype=np.float64)
    counts = np.bincount(examples.prompts)
    places = np.concatenate([np.arange(1, count + 1) for count in counts])
    return np.stack([places, counts[examples.prompts]], axis=1).astype(np.float64)


def _group(setting: ControlSetting) -> Control:
    """The shares of the classes in the training prompts of the same group."""
    if setting.given.groups is None:
        raise _ImpossibleError("needs groups")
    if setting.train is None:
        raise _ImpossibleError(_NEEDS_TRAINING)
    if setting.train.groups is None:
        raise _ImpossibleError("needs the groups of the training prompts (train)")
    if not set(setting.given.groups.tolist()) & set(setting.train.groups.tolist()):
        raise _ImpossibleError("no group of the judged prompts is among the training prompts")
    train, judged = setting.known_examples, setting.judged
    places = {label: at for at, label in enumerate(judged.classes)}
    labels = np.array([places[label] for label in train.labels.tolist()])
    groups = setting.given.groups[judged.prompts]
    shares = shares_by_group(labels, setting.train.groups[train.prompts], groups, len(judged.classes))
    with np.errstate(divide="ignore"):
        scores = np.log(shares[:, 1]) - np.log(shares[:, 0]) if judged.is_binary else shares
    return Control((replace(judged, scores=scores, probabilities=shares),))


# --- controls made by the probe's own recipe -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Refit:
    """Fitted probes that differ in their classifiers alone, all made by one recipe."""

    probes: list[Probe]
    recipe: Recipe


def _shuffled_labels(setting: ControlSetting) -> _Refit:
    """The probe refitted on permuted training labels."""
    if setting.train is None:
        raise _ImpossibleError(_NEEDS_TRAINING)
    return _Refit([setting.recipe.fitted(shuffle_seed=seed) for seed in setting.seeds()], setting.recipe)


def _random_direction(setting: ControlSetting) -> _Refit:
    """Directions at the probe's hook points that nobody learnt."""
    classifiers = [RandomDirectionClassifier(seed) for seed in setting.seeds()]
    recipe = setting.recipe
    if own_pooling(setting.probe.recipe.classifier) is not None:  # of the mean, where the probe reduces the tokens itself
        of_the_mean = {"classifier": classifiers[0], "pooling": "mean", "train_pooling": None, "inference_pooling": None}
        recipe = Recipe(clone(setting.probe.recipe).set_params(**of_the_mean), *setting.known())
    return _Refit([recipe.fitted(classifier=one) for one in classifiers], recipe)


def _layer_0(setting: ControlSetting) -> _Refit:
    """The probe's recipe on the embedding, which the first block is still to read."""
    if setting.train is None:
        raise _ImpossibleError(_NEEDS_TRAINING)
    if setting.probe.hook_names == (EMBEDDING,):
        raise _ImpossibleError("the probe itself reads the embedding")
    unfitted = clone(setting.probe.recipe).set_params(hook_points=EMBEDDING)
    learner = last_step(make_classifier(unfitted.classifier, unfitted.random_state))
    recipe = Recipe(unfitted, setting.train, _SIGNLESS if isinstance(learner, CcsClassifier) else "")
    return _Refit([recipe.fitted()], recipe)


_CONTROLS: dict[str, Callable[[ControlSetting], Control]] = {
    "bag_of_words": _bag_of_words,
    "length": _length,
    "group": _group,
}
_REFITS: dict[str, Callable[[ControlSetting], _Refit]] = {
    "shuffled_labels": _shuffled_labels,
    "random_direction": _random_direction,
    "layer_0": _layer_0,
}
CONTROLS = ("bag_of_words", "layer_0", "length", "group", "random_direction", "shuffled_labels")
DRAWN = ("random_direction", "shuffled_labels")  # whose metrics are means over several draws
