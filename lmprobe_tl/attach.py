"""Probes onto a model, for as long as a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lmprobe_tl.compatibility import check_compatible
from lmprobe_tl.errors import InputError, MonitorError
from lmprobe_tl.given_probes import as_probes
from lmprobe_tl.hook_points import ForwardWatch, load_model
from lmprobe_tl.live.records import Escalate, OnCrossing, OnToken
from lmprobe_tl.live.rows import row_ends
from lmprobe_tl.monitor import Monitor
from lmprobe_tl.weights import ProbeWeights


def _check_no_dropout(model: Any) -> None:
    """A model in training mode drops activations at random, and the scores would be of these."""
    module = getattr(model, "original_model", model)
    if any(isinstance(part, torch.nn.Dropout) and part.training and part.p > 0 for part in module.modules()):
        raise MonitorError(
            "the model is in training mode, and its dropout would make scores random; call model.eval() first."
        )


@contextmanager
def attach_probes(
    model: Any,
    probes: Any,
    *,
    on_token: OnToken | None = None,
    stop: bool = False,
    on_crossing: OnCrossing | None = None,
    escalate: Escalate | Mapping[str, Escalate] | None = None,
    keep_scores: bool = True,
    strict: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[Monitor]:
    """Score every token that the model processes inside the block; the hooks live exactly as long as the block.

    probes: `ProbeWeights`, a fitted `Probe`, the path of a probe file, or a list of these, under distinct names.
    stop: a row ends where its running score reaches a probe's threshold. The forward pass that sees the crossing gives its
    next token to EOS (that logit is raised in the model's output), so that nothing follows the token that crossed.
    on_crossing: called once a row and probe with an `Alarm`, when it happens. escalate: a cascade of two thresholds with a
    judge, for the one probe or by name of several. on_token: called for each newly scored token.
    keep_scores: False keeps alarms, tokens and maxima alone, for runs without end.
    strict: an error instead of a ModelMismatchWarning where a probe file names another model or tokenizer. eos_token_id:
    what ends a generated row, where that is not the model's own: the ids that generation is given, or [] where it goes on
    (`stop_at_eos=False`).

    Without on_token, on_crossing and a judge no step waits for the device, stops included; scores stay there until they are
    read. (Without a KV cache each step compares its prefix with the last one's, which does wait.)

    Raises IncompatibleProbeError before anything runs (or in the first forward pass, for another residual basis),
    ProbeNeverFiredError where a probe saw nothing of a forward pass, and MonitorError where scores would be wrong.

    >>> with attach_probes(model, [weights]) as monitor:  # doctest: +SKIP
    ...     model.generate(tokens, attention_mask=mask)
    >>> monitor.token_scores("deceit")[0]  # doctest: +SKIP
    tensor([-3.1, -2.7, 0.4])
    """
    model = load_model(model)
    loaded = as_probes(probes)
    check_compatible(model, loaded, strict=strict)
    _check_no_dropout(model)
    monitor = Monitor(
        model,
        loaded,
        on_token,
        row_ends(model, eos_token_id),
        stop=stop,
        on_crossing=on_crossing,
        escalate=_cascades(escalate, loaded),
        keep_scores=keep_scores,
    )
    with ExitStack() as stack:
        stack.callback(ForwardWatch(model, monitor.before_forward, monitor.after_forward).remove)
        stack.callback(monitor.detach)
        monitor.attach(model)
        try:
            yield monitor
        except BaseException:
            monitor.abandon()
            raise
        monitor.check_fired()
        for run in monitor.runs:
            run.check()


def _cascades(escalate: Any, probes: Sequence[ProbeWeights]) -> dict[str, Escalate]:
    binary = [weights.name for weights in probes if weights.is_binary]
    if escalate is None:
        return {}
    if isinstance(escalate, Escalate):
        if len(binary) != 1:
            raise InputError(f"escalate is one Escalate for the probes {binary}; expected a dict by name of the probe.")
        return {binary[0]: escalate}
    wrong = not isinstance(escalate, Mapping) or not all(isinstance(one, Escalate) for one in escalate.values())
    if wrong or not set(escalate) <= set(binary):
        raise InputError(
            f"escalate is {escalate!r}; expected an Escalate, or a dict of these by name of a probe with two classes: "
            f"{binary}."
        )
    return dict(escalate)
