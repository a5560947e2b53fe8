"""A probe on prompts of other kinds than it was trained on, against held-out prompts of its own kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmprobe_tl.bootstrap import Resamples, check_bootstrap
from lmprobe_tl.errors import InputError
from lmprobe_tl.judged_probe import judged_probe
from lmprobe_tl.labelled_prompts import check_known, labelled_prompts
from lmprobe_tl.measures import FPRS, check_fprs, differences_of, measures_of, sampled_metrics
from lmprobe_tl.probe_report import ShiftPart, ShiftReport
from lmprobe_tl.tokens import Truncation


def evaluate_shift(
    probe: Any,
    held_out: Sequence[Any],
    shifted: Mapping[str, Sequence[Any]],
    *,
    model: Any = None,
    fprs: Sequence[float] = FPRS,
    n_bootstrap: int = 1000,
    confidence: float = 0.95,
    random_state: int | None = 0,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncation: Truncation = None,
    max_tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> ShiftReport:
    """Metrics on each set of prompts, and how far they drop against the probe's own held-out part. A set of a single class
    has an accuracy alone.

    held_out: (prompts, labels) from where the training prompts come, none of them a training prompt. shifted: (prompts,
    labels) by name. Each set has resamples of its own, so a drop is a difference of independent data. The rest as in
    `evaluate_probe`.

    >>> evaluate_shift(probe, (test_prompts, test_labels), {"forum": (others, their_labels)}).table()  # doctest: +SKIP
    """
    check_bootstrap(n_bootstrap, confidence)
    check_fprs(fprs)
    if not isinstance(shifted, Mapping) or not shifted:
        raise InputError("shifted is no dictionary of names with (prompts, labels), or an empty one.")
    sets = {name: _pair(pair, f"shifted[{name!r}]") for name, pair in shifted.items()}
    own = _pair(held_out, "held_out")
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
    check_known(own.labels, subject.classes, "held_out")
    for name, one in sets.items():
        check_known(one.labels, subject.classes, f"shifted[{name!r}]", needs="one class")
    parts = [subject.judged(one.prompts, one.labels) for one in (own, *sets.values())]
    samples, resamples = [], []
    for at, part in enumerate(parts):
        seed = None if random_state is None else random_state + at  # or equal sizes would be drawn alike
        drawn = Resamples.drawn(part.labels, part.prompts, n_bootstrap=n_bootstrap, confidence=confidence, random_state=seed)
        resamples.append(drawn)
        samples.append(sampled_metrics(part, drawn, fprs))

    def part_report(at: int) -> ShiftPart:
        drops = {} if at == 0 else differences_of(samples[0], samples[at], resamples[0], resamples[at])
        return ShiftPart(
            n_prompts=parts[at].n_prompts,
            n_examples=len(parts[at].labels),
            metrics=measures_of(samples[at], resamples[at]),
            drops=drops,
        )

    return ShiftReport(
        probe=subject.name,
        held_out=part_report(0),
        shifted={name: part_report(at) for at, name in enumerate(sets, start=1)},
        level=parts[0].level,
        confidence=confidence,
        n_bootstrap=n_bootstrap,
        random_state=random_state,
    )


def _pair(pair: Any, name: str) -> Any:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"{name} is no pair; expected (prompts, labels).")
    return labelled_prompts(*pair)
