"""Layers, poolings and classifiers compared on one extraction: chosen on some prompts, judged on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lmprobe_tl.activation_store import ActivationStore
from lmprobe_tl.artefact import pooling_name
from lmprobe_tl.batch_pooling import activation_poolings
from lmprobe_tl.errors import InputError
from lmprobe_tl.estimators import LayerStackClassifier, make_classifier, own_pooling
from lmprobe_tl.estimators.pairs import last_step, learns_from_pairs
from lmprobe_tl.extraction import extract_poolings
from lmprobe_tl.features import are_constant, constant_error
from lmprobe_tl.forward_batches import centred
from lmprobe_tl.hook_points import HookPoints, layer_of, load_model, normalization, resolve_hook_points
from lmprobe_tl.labels import are_token_labels, check_classes, check_labels
from lmprobe_tl.metrics import check_bootstrap
from lmprobe_tl.pooling import resolve_pooling
from lmprobe_tl.probe import Probe
from lmprobe_tl.provenance import classifier_name
from lmprobe_tl.splits import check_share, check_validation, held_out, selection_splits
from lmprobe_tl.store.writing import extract_to_store
from lmprobe_tl.sweep_examples import sweep_examples
from lmprobe_tl.sweep_judge import SweepJudge
from lmprobe_tl.sweep_result import SweepResult, SweepRow
from lmprobe_tl.token_bag import make_token_bag
from lmprobe_tl.tokens import (
    Prompt,
    Truncation,
    check_prompts,
    tokenize_prompts,
)


def sweep(
    model: Any,
    prompts: Sequence[Prompt],
    labels: Any,
    hook_points: HookPoints = "all",
    poolings: Sequence[str] = ("last_token", "mean"),
    classifiers: Sequence[Any] = ("logistic_regression",),
    *,
    groups: Sequence[Any] | None = None,
    validation: int | float = 5,
    test_share: float = 0.25,
    store: str | Path | None = None,
    prepend_bos: bool | None = None,
    include_bos: bool = False,
    max_length: int | None = None,
    truncation: Truncation = None,
    max_tokens_per_batch: int | None = None,
    n_bootstrap: int = 200,
    confidence: float = 0.95,
    random_state: int | None = 0,
    name: str = "probe",
    progress: bool | None = None,
) -> SweepResult:
    """Fit a probe for each hook point, pooling and classifier, choose the best, and evaluate it where it chose nothing.

    labels: as in `Probe.fit`. poolings: named ones for training; 'all' makes every token an example and stands alone.
    classifiers: names or scikit-learn classifiers. groups: one value a prompt; prompts of one group are never parted. Equal
    prompts never are, either.
    validation: a number of folds, or a share of the selection prompts to validate on. test_share: of all prompts. A share
    is one of round(1 / share) parts, at most 0.5.
    store: a folder for the activations, which are then read a layer at a time; without it all layers are in memory at once.
    n_bootstrap, confidence: of the intervals, by bootstrap over groups. name: of the best probe.

    A cross-validation inside a classifier parts no group either. A combination whose activations are all the same, such as
    'first_token' behind a BOS, scores 0.5 and is never the best.

    Raises InputError for what cannot be used, and where a class is in too few groups to be split, before the model runs;
    and where no combination has activations that differ.

    >>> result = sweep(model, prompts, labels)  # doctest: +SKIP
    >>> print(result)  # doctest: +SKIP
    >>> result.probe_.save("best.safetensors", evaluation=result.test)  # doctest: +SKIP
    """
    prompts = check_prompts(prompts)
    poolings, classifiers = check_sweep(len(prompts), labels, poolings, classifiers, validation, test_share)
    check_bootstrap(n_bootstrap, confidence)
    model = load_model(model)
    names = resolve_hook_points(model, hook_points)
    rows = tokenize_prompts(model, prompts, prepend_bos=prepend_bos, max_length=max_length, truncation=truncation)
    examples = sweep_examples(model, rows, labels, groups, per_token=poolings == ["all"], include_bos=include_bos)
    selection, test = held_out(examples.labels, examples.groups, test_share, random_state)
    splits = selection_splits(examples.labels[selection], examples.groups[selection], validation, random_state)
    judge = SweepJudge(examples, selection, test, splits, n_bootstrap, confidence, random_state)

    settings: dict[str, Any] = {
        "include_bos": include_bos,
        "max_tokens_per_batch": max_tokens_per_batch,
        "progress": progress,
    }
    if store is None:
        features = _in_memory(model, rows, names, poolings, **settings)
    else:
        tokens: dict[str, Any] = {"prepend_bos": prepend_bos, "max_length": max_length, "truncation": truncation}
        written = extract_to_store(model, prompts, store, names, poolings, **tokens, **settings)
        features = _from_store(written, centre=normalization(model) == "layernorm")

    found: list[SweepRow] = []
    usable: list[int] = []
    combinations = [(hook_name, pooling) for hook_name in names for pooling in poolings]
    hidden = None if progress is None else not progress
    with tqdm(total=len(combinations) * len(classifiers), desc="sweep", unit="fit", disable=hidden, leave=False) as bar:
        for hook_name, pooling in combinations:
            values = features(hook_name, pooling)[selection]
            is_blind = are_constant(values)
            for classifier in classifiers:
                if is_blind:
                    interval = judge.blind()
                else:
                    usable.append(len(found))
                    interval = judge.validated(classifier, values)
                found.append(SweepRow(hook_name, layer_of(hook_name), pooling, classifier_name(classifier), interval))
                bar.update()
    if not usable:
        raise constant_error(poolings[0])
    at = max(usable, key=lambda index: found[index].validation.value)  # the first of equals
    best, classifier = found[at], classifiers[at % len(classifiers)]
    values = features(best.hook_point, best.pooling)
    fitted = judge.fitted(classifier, values)
    probe = Probe(
        model,
        best.hook_point,
        best.pooling,
        classifier=classifier,
        include_bos=include_bos,
        prepend_bos=prepend_bos,
        max_length=max_length,
        truncation=truncation,
        max_tokens_per_batch=max_tokens_per_batch,
        progress=progress,
        random_state=random_state,
        name=name,
    )
    examples.teach(probe, model, fitted, values, selection)
    bag = make_token_bag(random_state)
    return SweepResult(
        rows=tuple(found),
        best_=best,
        test=judge.tested(fitted, values, best.pooling),
        baseline=judge.validated(bag, examples.documents[selection]),
        baseline_test=judge.tested(judge.fitted(bag, examples.documents), examples.documents, "none").auroc,
        level=examples.level,
        validation=validation,
        n_selection=len(np.unique(examples.prompts[selection])),
        n_test=len(np.unique(examples.prompts[test])),
        random_state=random_state,
        probe_=probe,
    )


def check_sweep(
    n_prompts: int, labels: Any, poolings: Any, classifiers: Any, validation: int | float, test_share: float
) -> tuple[list[str], list[Any]]:
    """Poolings and classifiers as lists; InputError for what is known to be wrong before there is a model."""
    listed, poolings = _listed(classifiers, "classifiers"), _checked_poolings(poolings)
    for classifier in listed:
        _check_alone(make_classifier(classifier, None))
        if own_pooling(classifier) is not None:
            raise InputError(
                f"classifiers has {classifier_name(classifier)!r}, which reads all tokens of a prompt; a sweep compares "
                "classifiers of pooled activations. Fit it by Probe(..., classifier=...) at the hook point that wins."
            )
        if isinstance(classifier, str) and listed.count(classifier) > 1:
            raise InputError(f"classifiers names {classifier!r} more than once; give each of them once.")
    check_validation(validation)
    check_share(test_share)
    if are_token_labels(labels):
        if poolings != ["all"]:
            raise InputError("labels has one sequence a prompt; token labels need poolings=['all'].")
    else:
        check_classes(check_labels(labels, n_prompts))
    return poolings, listed


def _check_alone(classifier: Any) -> None:
    """InputError for a classifier that needs more than some of the prompts, at one hook point."""
    name = type(last_step(classifier)).__name__
    if learns_from_pairs(classifier):
        raise InputError(f"{name} learns from pairs of prompts, and a sweep's splits would part them; fit a Probe with it.")
    if isinstance(last_step(classifier), LayerStackClassifier):
        raise InputError(
            f"{name} joins several hook points, and a sweep judges each by itself; fit a Probe with it at those that a "
            "sweep finds good."
        )


def _listed(values: Any, name: str) -> list[Any]:
    listed = list(values) if isinstance(values, (list, tuple)) else [values]
    if not listed:
        raise InputError(f"{name} is empty; expected at least one.")
    return listed


def _checked_poolings(poolings: Any) -> list[str]:
    listed = _listed(poolings, "poolings")
    for one in listed:
        if callable(one):
            raise InputError(f"pooling {pooling_name(one)!r} is a function; a sweep takes named poolings.")
        resolve_pooling(train_pooling=one, inference_pooling=one)
    activation_poolings(listed)
    if "all" in listed and len(listed) > 1:
        raise InputError(
            f"poolings is {listed}; with 'all' each token is an example, so that its scores compare with no other's. Sweep "
            "'all' alone."
        )
    return listed


Features = Callable[[str, str], NDArray[np.float64]]  # (hook name, pooling) -> [n_examples d_model]


def _in_memory(model: Any, rows: list[list[int]], names: Sequence[str], poolings: list[str], **settings: Any) -> Features:
    found = extract_poolings(model, rows, names, poolings, centre=normalization(model) == "layernorm", **settings)
    return lambda hook_name, pooling: found[pooling].values[hook_name].numpy().astype(np.float64)


def _from_store(store: ActivationStore, *, centre: bool) -> Features:
    def read(hook_name: str, pooling: str) -> NDArray[np.float64]:
        values = store.values(hook_name, pooling)
        return (centred(values) if centre else values).numpy().astype(np.float64)

    return read
