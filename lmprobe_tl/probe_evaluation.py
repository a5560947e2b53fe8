"""Evaluate a probe on labelled prompts, against controls, by group, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprobe_tl.bootstrap import Resamples, centre_interval, check_bootstrap
from lmprobe_tl.controls import DRAWN, Control, ControlSetting, check_controls, run_controls
from lmprobe_tl.hook_points import model_record
from lmprobe_tl.judged_probe import JudgedProbe, inference_name, judged_probe
from lmprobe_tl.labelled_prompts import LabelledPrompts, check_known, labelled_prompts, training_prompts
from lmprobe_tl.labels import are_token_labels, check_classes
from lmprobe_tl.measures import (
    FPRS,
    Difference,
    Sampled,
    check_fprs,
    differences_of,
    mean_of,
    measures_of,
    sampled_auroc,
    sampled_metrics,
    sampled_share,
)
from lmprobe_tl.probe_report import ControlReport, ExampleRecord, GroupReport, ProbeReport
from lmprobe_tl.provenance import data_hash
from lmprobe_tl.scored import Scored
from lmprobe_tl.token_text import TokenText
from lmprobe_tl.tokens import Prompt, Truncation, check_count, row_digest
from lmprobe_tl.verdict import verdict

_LEAK_CONFIDENCE = 0.99  # two-sided: one sound probe in 200 is called leaky
_FEWEST_SHUFFLES = 8  # Shuffles of a sound probe may all end above 0.5: one time in 2^8 with so many.


def evaluate_probe(
    probe: Any,
    prompts: Sequence[Prompt],
    labels: Any,
    *,
    model: Any = None,
    train: Sequence[Any] | None = None,
    controls: str | Sequence[str] | None = "default",
    groups: Sequence[Any] | None = None,
    fprs: Sequence[float] = FPRS,
    n_draws: int = 10,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    random_state: int | None = 0,
    keep_tokens: bool = False,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> ProbeReport:
    """Metrics of a probe on prompts that it was not trained on, and whether it beats what needs no probe.

    probe: a fitted `Probe`; or `ProbeWeights` or a probe file, with `model`. labels: the probe's own, one a prompt; or one
    sequence a prompt, which judges each token, as inference pooling 'all' does. Intervals and differences come from
    resamples of whole prompts, the same for the probe and all controls.
    train: (prompts, labels) that the probe was trained on, or (prompts, labels, groups). groups: one value a prompt, such as
    its source; each group is evaluated by itself, and the worst is named.
    controls: 'default', None, or names among

    - 'bag_of_words': TF-IDF and logistic regression on token ids.
    - 'layer_0': the probe's recipe on the embedding, `blocks.0.hook_resid_pre`.
    - 'length': logistic regression on the number of tokens; of a token, its place and the length of its prompt.
    - 'group': the shares of the classes in the training prompts of the same group; by default where there are groups.
    - 'random_direction': the mean of `n_draws` directions at the probe's hook points, with sign and scale fitted.
    - 'shuffled_labels': the mean of `n_draws` refits on permuted training labels, which must fall to chance; with at
      least 8 of them, more than chance is called leakage.

    Those that need `train` are left out, by name, without it; 'length' and 'random_direction', which learn next to nothing,
    are then fitted on the judged prompts, in their favour. The verdict goes by AUROC.
    fprs: of `tpr_at_fpr`, without a value where there are too few negatives to resolve one. keep_tokens: keep the text of
    the prompts in pieces with the score of each, too. prepend_bos and the rest: as in `score_prompts`, for weights; a
    `Probe` has its own.

    Raises InputError for what cannot be used, before the model runs where that is possible.

    >>> report = evaluate_probe(probe, prompts, labels, train=(train_prompts, train_labels))  # doctest: +SKIP
    >>> print(report.table())  # doctest: +SKIP
    >>> report.verdict  # doctest: +SKIP
    'The probe does not beat the bag of words: AUROC 0.912 against 0.930, difference ...'
    """
    check_bootstrap(n_bootstrap, confidence)
    check_fprs(fprs)
    check_count("n_draws", n_draws)
    names = check_controls(controls, has_groups=groups is not None)
    given = labelled_prompts(prompts, labels, groups)
    taught = None if train is None else training_prompts(train)
    subject = judged_probe(
        probe,
        model,
        prepend_bos=prepend_bos,
        max_length=max_length,
        truncation=truncation,
        max_tokens_per_batch=max_tokens_per_batch,
        batch_size=batch_size,
        progress=progress,
    )
    check_known(given.labels, subject.classes, "labels")
    if taught is not None:
        check_known(taught.labels, subject.classes, "the training labels", needs="all classes")
    judged = subject.judged(given.prompts, given.labels)
    check_classes(judged.labels)
    drawing: dict[str, Any] = {"n_bootstrap": n_bootstrap, "confidence": confidence, "random_state": random_state}
    resamples = Resamples.drawn(judged.labels, judged.prompts, **drawing)
    samples = sampled_metrics(judged, resamples, fprs)
    metrics = measures_of(samples, resamples)

    found, left_out = run_controls(ControlSetting(subject, given, judged, taught, n_draws, random_state), names)
    reports = {name: _control_report(name, one, samples, resamples, fprs) for name, one in found.items()}
    by_group = {} if given.groups is None else _by_group(judged, given.groups, fprs, drawing)
    n_trained_on = _n_trained_on(subject, given, taught)
    worst, worst_by = _worst(by_group)
    conclusion, text = verdict(metrics["auroc"], reports, left_out, by_group, worst, n_trained_on, len(given.prompts))
    return ProbeReport(
        probe=subject.name,
        model=model_record(subject.model).id,
        hook_points=subject.hook_names,
        pooling="all" if judged.level == "token" else inference_name(subject),
        classes=subject.classes,
        level=judged.level,  # type: ignore[arg-type]
        n_prompts=len(given.prompts),
        n_examples=len(judged.labels),
        class_counts=tuple(np.bincount(judged.labels, minlength=len(subject.classes)).tolist()),
        n_train=None if taught is None else len(taught.prompts),
        n_trained_on=n_trained_on,
        metrics=metrics,
        controls=reports,
        left_out=left_out,
        groups=by_group,
        worst_group=worst,
        worst_by=worst_by,
        conclusion=conclusion,
        verdict=text,
        notes=(*subject.notes, *_notes(subject, given, taught)),
        n_bootstrap=n_bootstrap,
        n_draws=n_draws,
        confidence=confidence,
        random_state=random_state,
        examples=_examples(subject, given, judged, keep_tokens=keep_tokens),
    )


def _control_report(
    name: str, control: Control, probe: Mapping[str, Sampled], resamples: Resamples, fprs: Sequence[float]
) -> ControlReport:
    several = name in DRAWN
    if several:
        has_all = probe["auroc"].value is not None
        none = Sampled(None, None, probe["auroc"].note)
        areas = [sampled_auroc(one.labels, one.scores, resamples) if has_all else none for one in control.draws]
        hits = [sampled_share(one.predicted == one.labels, resamples) for one in control.draws]
        samples = {"auroc": mean_of(areas), "accuracy": mean_of(hits)}
    else:
        samples = sampled_metrics(control.draws[0], resamples, fprs, calibration=False)
        areas = []
    known = tuple(area.value for area in areas if area.value is not None)
    notes = [control.note] if control.note else []
    if name == "shuffled_labels" and len(control.draws) < _FEWEST_SHUFFLES:
        notes.append(f"too few draws to tell leakage; it takes {_FEWEST_SHUFFLES}")
    return ControlReport(
        metrics=measures_of(samples, resamples),
        differences=differences_of(probe, samples, resamples),
        draws=known,
        above_chance=_above_chance(known) if name == "shuffled_labels" else None,
        scores=() if several else _columns(control.draws[0].scores),
        note="; ".join(notes),
    )


def _above_chance(areas: Sequence[float]) -> Difference | None:
    """Mean AUROC less 0.5, with an interval over the draws: each permutation is a fresh draw, the prompts are given. No t
    interval: where one direction is strong, a shuffle decides but its sign, and AUROC is as far above 0.5 as below."""
    if len(areas) < _FEWEST_SHUFFLES:
        return None
    above = np.asarray(areas) - 0.5
    low, high = centre_interval(above, _LEAK_CONFIDENCE)
    return Difference(value=float(above.mean()), low=low, high=high, share_at_most_zero=float((above <= 0).mean()))


def _by_group(
    judged: Scored, groups: NDArray[Any], fprs: Sequence[float], drawing: Mapping[str, Any]
) -> dict[str, GroupReport]:
    found = {}
    for group in np.unique(groups).tolist():
        part = judged.of_prompts(groups == group)
        resamples = Resamples.drawn(part.labels, part.prompts, **drawing)
        metrics = measures_of(sampled_metrics(part, resamples, fprs), resamples)
        found[group] = GroupReport(n_prompts=part.n_prompts, n_examples=len(part.labels), metrics=metrics)
    return found


def _worst(groups: Mapping[str, GroupReport]) -> tuple[str | None, str | None]:
    """The group with the lowest metric, of those with an interval or else of all, and which metric; None where all are
    equal."""
    for metric in ("auroc", "accuracy"):
        values = {name: one.metrics[metric].value for name, one in groups.items()}
        known = {name: value for name, value in values.items() if value is not None}
        sure = {name: value for name, value in known.items() if groups[name].metrics[metric].low is not None} or known
        if len(known) > 1 and len(set(known.values())) == 1:
            return None, None
        if len(known) > 1:
            return min(sure, key=sure.__getitem__), metric
    return None, None


def _n_trained_on(subject: JudgedProbe, given: LabelledPrompts, taught: LabelledPrompts | None) -> int | None:
    known = subject.trained_on
    if known is None and taught is None:
        return None
    digests = set(known or ())
    if taught is not None:
        digests |= {row_digest(row) for row in subject.rows(taught.prompts)}
    return sum(row_digest(row) in digests for row in subject.rows(given.prompts))


def _notes(subject: JudgedProbe, given: LabelledPrompts, taught: LabelledPrompts | None) -> list[str]:
    digests = [row_digest(row) for row in subject.rows(given.prompts)]
    n_repeated = len(digests) - len(set(digests))
    notes = []
    if n_repeated:
        notes.append(f"{n_repeated:,} of the judged prompts repeat another, so intervals are too narrow")
    if taught is not None and subject.training is not None:
        labels = taught.labels
        per_token = subject.recipe.poolings()[0] == "all"
        rows = subject.rows(taught.prompts)
        if are_token_labels(labels):
            labels = np.concatenate([np.asarray(part) for part in labels])
        elif per_token:
            labels = np.repeat(labels, [len(row) for row in subject.counted(rows)])
        if data_hash([row_digest(row) for row in rows], labels) != subject.training.data_sha256:
            notes.append("the training prompts given are not exactly those that the probe was trained on")
    return notes


def _examples(subject: JudgedProbe, given: LabelledPrompts, judged: Scored, *, keep_tokens: bool) -> ExampleRecord:
    texts: list[tuple[str, ...]] | None = None
    scores: list[tuple[float, ...]] | None = None
    rows = subject.counted(subject.rows(given.prompts))
    if keep_tokens and judged.is_binary:
        texts, scores = [], []
        for row, logits in zip(rows, subject.token_logits(given.prompts), strict=True):
            pieces = _pieces(subject.model.tokenizer, row, logits)
            texts.append(tuple(text for text, _ in pieces))
            scores.append(tuple(score for _, score in pieces))
    probabilities = judged.probabilities[:, 1] if judged.is_binary else judged.probabilities
    return ExampleRecord(
        labels=tuple(judged.labels.tolist()),
        scores=_columns(judged.scores),
        probabilities=_columns(probabilities),
        prompts=tuple(judged.prompts.tolist()),
        groups=None if given.groups is None else tuple(given.groups.tolist()),
        n_tokens=tuple(map(len, rows)),
        texts=None if texts is None else tuple(texts),
        token_scores=None if scores is None else tuple(scores),
    )


def _pieces(tokenizer: Any, row: list[int], logits: NDArray[Any]) -> list[tuple[str, float]]:
    if tokenizer is None:
        return [(str(token), float(score)) for token, score in zip(row, logits, strict=True)]
    text = TokenText(tokenizer)
    found: list[tuple[str, float] | None] = []
    for token, score in zip(row, logits.tolist(), strict=True):
        if special := _special(tokenizer, token):
            found += [text.rest(), (special, score)]
        else:
            found.append(text.add(token, score))
    return [piece for piece in [*found, text.rest()] if piece is not None]


def _special(tokenizer: Any, token: int) -> str:
    """How a special token, such as those of a chat template, is written; nothing for any other token."""
    return (
        "" if tokenizer.decode([token], skip_special_tokens=True) else tokenizer.decode([token], skip_special_tokens=False)
    )


def _columns(values: NDArray[Any]) -> tuple[tuple[float, ...], ...]:
    """[n_outputs][n_examples] of values [n_examples] or [n_examples n_outputs]."""
    return tuple(tuple(column) for column in (values[None] if values.ndim == 1 else values.T).tolist())
