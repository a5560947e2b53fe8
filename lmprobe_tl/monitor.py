"""Probes as hooks: live scores of one or many probes, while the model runs or generates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.errors import (
    IncompatibleProbeError,
    InputError,
    ModelMismatchWarning,
    MonitorError,
    ProbeNeverFiredError,
)
from lmprobe_tl.hook_points import (
    ForwardCall,
    add_hook,
    is_centred,
    layer_count,
    load_model,
    model_record,
    normalization,
    unknown_hook_point,
    watch_forward,
    width,
)
from lmprobe_tl.live_events import EventReporter, OnToken
from lmprobe_tl.live_run import Alarm, LiveRun, RowEnds, row_ends
from lmprobe_tl.probe_file import load_probe
from lmprobe_tl.scoring_plan import ScoringPlan
from lmprobe_tl.tokens import bos_id, tokenizer_record
from lmprobe_tl.weights import SUM_TOLERANCE, ProbeWeights


class Monitor:
    """Live scores of attached probes. Made by `attach_probes`; readable after the block, too.

    Every forward pass of the model adds the positions that it saw first, by absolute position: a prompt at once or in
    chunks, one token a step with a KV cache, the whole prefix again without. A pass that starts over with other tokens
    begins a new run; the methods read the last one. Beam search is not for a Monitor: it reorders rows inside the cache,
    where no hook sees it.
    """

    def __init__(
        self, model: Any, probes: Sequence[ProbeWeights], on_token: OnToken | None = None, ends: RowEnds | None = None
    ) -> None:
        self.plan = ScoringPlan(probes)
        self.runs: list[LiveRun] = []
        self._bos, self._ends = bos_id(model), ends or row_ends(model)
        self._pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
        self._on_token = on_token
        self._reporter = EventReporter(on_token) if on_token else None
        self._call: ForwardCall | None = None
        self._partials: dict[str, Tensor] = {}
        self._fired: set[str] = set()
        # With RMSNorm there is one basis. Else: hook points known to be raw, and how many tokens looked centred at others.
        self._one_basis = normalization(model) == "rmsnorm"
        self._known_raw: set[str] = set()
        self._looked_centred: dict[str, int] = {}

    # --- reading ---

    def token_scores(self, name: str) -> list[Tensor]:
        """Logits of a probe, one 1-D tensor a row with one entry a scored position ([n n_classes] with several classes).

        Every real position that a hook saw, the prompt's included; pads and positions after a row's end never appear. The
        last token that `generate` samples is never seen by the model, and so has no score.
        """
        return self._last_run(name).row_logits(name)

    def running_scores(self, name: str, unit: str | None = None) -> list[Tensor]:
        """The probe's inference pooling of all positions so far, after each position; NaN before the first that counts.

        unit: 'logit' or 'probability' for a probe with two classes. Logits tell very confident scores apart where
        probabilities are all 1; those of a mean of probabilities cannot, and are infinite there. None: the pooling's own.
        """
        run = self._last_run(name)
        if unit is not None and (unit not in ("logit", "probability") or not self.plan.probes[name].is_binary):
            raise InputError(f"unit is {unit!r}; expected 'logit' or 'probability' for a probe with two classes, or None.")
        return run.row_running(name, unit)

    def alarms(self) -> list[tuple[Alarm, ...]]:
        """For each row the first position at which each probe's running score reached its threshold."""
        return self._last_run(None).row_alarms()

    def tokens(self) -> list[Tensor]:
        """Token ids of the scored positions, one 1-D tensor a row."""
        return self._last_run(None).row_tokens()

    def _last_run(self, name: str | None) -> LiveRun:
        if name is not None and name not in self.plan.probes:
            raise InputError(f"no probe {name!r} is attached; attached are {list(self.plan.probes)}.")
        self._check_fired()
        return self.runs[-1]

    def stopping_criteria(self) -> Any:
        """For `model.generate(stopping_criteria=...)`: a row is done once a probe's running score has reached its threshold.

        The criterion is asked after a token was sampled, so the row's output ends one token after the one that crossed.
        """
        if not any(probe.is_binary for probe in self.plan.probes.values()):
            raise InputError("no attached probe has two classes, and only these have a threshold to stop at.")
        from transformers import StoppingCriteria, StoppingCriteriaList

        monitor = self

        class StopAtThreshold(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
                done = monitor._current_run().stop_rows().to(input_ids.device)
                if done.shape != input_ids.shape[:1]:
                    raise MonitorError(f"{done.shape[0]} rows were scored, but generate asks about {input_ids.shape[0]}.")
                return done

        return StoppingCriteriaList([StopAtThreshold()])

    def _current_run(self) -> LiveRun:
        if not self.runs or not self.runs[-1].n_columns:
            raise ProbeNeverFiredError("the stopping criterion was asked, but the attached model has not run. " + _REPLACED)
        return self.runs[-1]

    # --- while the model runs ---

    def begin_run(self) -> None:
        """Keep the next forward pass apart from the last run, even where it extends its tokens; `on_token` goes on where it
        was."""
        self.runs.append(LiveRun(self.plan, self._bos, self._ends))

    def before_forward(self, call: ForwardCall) -> None:
        self._partials = {}
        if not self.runs or (call.start == 0 and self.runs[-1].n_columns and not self.runs[-1].extends(call)):
            self.begin_run()
            self._reporter = EventReporter(self._on_token) if self._on_token else None
        if not self.runs[-1].n_columns:
            self._check_padding(call)
        self.runs[-1].new_columns(call)
        self._call = call

    def on_activations(self, hook_name: str, activations: Tensor) -> None:
        call = self._call
        if call is None or activations.shape[:2] != call.tokens.shape:
            expected = None if call is None else tuple(call.tokens.shape)
            raise MonitorError(
                f"hook point {hook_name!r} fired with activations of shape {tuple(activations.shape)} in "
                "a forward pass on tokens "
                f"of shape {expected}; expected [batch pos d_model] of the same batch and positions."
            )
        self._check_basis(hook_name, activations, call)
        self._fired.add(hook_name)
        new = activations[:, self.runs[-1].new_columns(call) :]
        self._partials[hook_name] = self.plan.hooks[hook_name].partial_logits(new)
        if len(self._partials) == len(self.plan.hooks):
            partials = [self._partials[name] for name in self.plan.hooks]
            self.runs[-1].add(call, self.plan.combine(partials, call.tokens.device))
            self._call, self._partials = None, {}
            if self._reporter is not None:
                self._reporter.report(self.runs[-1])

    def _check_padding(self, call: ForwardCall) -> None:
        """A padded prompt without a mask: its pads would be scored as tokens."""
        if call.attention_mask is not None or self._pad is None:
            return
        # Padding makes rows equally long, so that some rows have none of it. A BOS with the pad's id begins all rows.
        edges = call.tokens[:, [0, -1]] == self._pad
        padded = (edges.any(dim=0) & ~edges.all(dim=0)).any()
        if padded:
            raise MonitorError(
                f"some rows begin or end with the pad token (id {self._pad}), and the model was called without an attention "
                "mask, so pads cannot be told from tokens. Pass attention_mask=..., all ones where these are tokens. (For "
                "strings, model.generate and score_prompts make a mask; model(...) does not.)"
            )

    def _check_basis(self, hook_name: str, activations: Tensor, call: ForwardCall) -> None:
        """Until a hook point is known to carry the raw stream: a probe for that must not read a centred one."""
        if self._one_basis or hook_name in self._known_raw:
            return
        mask = torch.ones_like(call.tokens) if call.attention_mask is None else call.attention_mask[:, call.start :]
        real = activations[mask.to(activations.device).bool()]
        raw = [probe.name for probe in self.plan.probes.values() if _needs_raw(probe, hook_name)]
        if not raw or (len(real) and not is_centred(real)):
            self._known_raw.add(hook_name)
            return
        # A single token may have a mean of zero by chance: with a d_model of thousands it is one in a few hundred.
        seen = self._looked_centred.get(hook_name, 0) + len(call.tokens[mask.bool()].unique())
        self._looked_centred[hook_name] = seen
        if seen > 1:
            raise IncompatibleProbeError(
                f"probe {raw[0]!r} was trained on the raw residual stream, and this model carries the "
                "centred one (x - mean(x)) at "
                f"{hook_name!r}: its scores would be wrong and cannot be corrected. Load the model "
                "without weight processing "
                "(no enable_compatibility_mode, no center_writing_weights), or train the probe on this model."
            )

    def _check_fired(self) -> None:
        never = [name for name in self.plan.hooks if name not in self._fired]
        if never:
            probes = sorted(p.name for p in self.plan.probes.values() if set(never) & set(p.hook_points))
            raise ProbeNeverFiredError(f"probes {probes} saw no activation: hook points {never} never fired. {_REPLACED}")
        if not self.runs[-1].n_columns:
            raise ProbeNeverFiredError(
                "the last forward pass did not reach all hook points of the attached probes. " + _REPLACED
            )


def _check_no_dropout(model: Any) -> None:
    """A model in training mode drops activations at random, and the scores would be of these."""
    module = getattr(model, "original_model", model)
    if any(isinstance(part, torch.nn.Dropout) and part.training and part.p > 0 for part in module.modules()):
        raise MonitorError(
            "the model is in training mode, and its dropout would make scores random; call model.eval() first."
        )


def _needs_raw(probe: ProbeWeights, hook_name: str) -> bool:
    """Whether the probe reads this hook point in the raw basis alone; where its direction sums to zero, any will do."""
    if hook_name not in probe.hook_points or probe.spec.residual_basis != "raw":
        return False
    direction = probe.direction_at(hook_name).double()
    return bool((direction.sum(dim=-1).abs() > SUM_TOLERANCE * direction.abs().sum(dim=-1)).any())


_REPLACED = (
    "Run the model inside the block (it must reach these layers: no early stop_at_layer), and attach after anything that "
    "replaces hook points (an SAE, an adapter) or resets hooks."
)


@contextmanager
def attach_probes(
    model: Any,
    probes: Any,
    *,
    on_token: OnToken | None = None,
    strict: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[Monitor]:
    """Score every token that the model processes inside the block; the hooks live exactly as long as the block.

    probes: `ProbeWeights`, a fitted `Probe`, the path of a probe file, or a list of these, under distinct names.
    on_token: called for each newly scored token (it waits for the device in every step). strict: an error instead of a
    ModelMismatchWarning where a probe file names another model or tokenizer. eos_token_id: what ends a generated row, where
    that is not the model's own: the ids that generation is given, or [] where it goes on (`stop_at_eos=False`).

    Raises IncompatibleProbeError before anything runs (or in the first forward pass, for another residual basis),
    ProbeNeverFiredError at the end of a block in which a probe saw nothing, and MonitorError where scores would be wrong.

    >>> with attach_probes(model, [weights]) as monitor:  # doctest: +SKIP
    ...     model.generate(tokens, attention_mask=mask)
    >>> monitor.token_scores("deceit")[0]  # doctest: +SKIP
    tensor([-3.1, -2.7, 0.4])
    """
    model = load_model(model)
    loaded = as_probes(probes)
    for weights in loaded:
        check_compatible(model, weights, strict=strict)
    _check_no_dropout(model)
    monitor = Monitor(model, loaded, on_token, row_ends(model, eos_token_id))
    with ExitStack() as stack:
        stack.callback(watch_forward(model, monitor.before_forward).remove)
        for hook_name in monitor.plan.hooks:
            stack.callback(add_hook(model, hook_name, partial(monitor.on_activations, hook_name)).remove)
        yield monitor
        monitor._check_fired()


def as_probes(probes: Any) -> list[ProbeWeights]:
    """One probe or a list of them, as `ProbeWeights` for the raw residual stream, under distinct names."""
    listed = list(probes) if isinstance(probes, (list, tuple)) else [probes]
    if not listed:
        raise InputError("no probe to attach: the list is empty.")
    loaded = [as_weights(probe).to_raw_basis() for probe in listed]
    names = [weights.name for weights in loaded]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"two probes are named {repeated[0]!r}, and the name is the key of the scores; use weights.renamed(...)."
        )
    return loaded


def as_weights(probe: Any) -> ProbeWeights:
    """The ProbeWeights of a probe given as such, as a fitted estimator, or as the path of its file."""
    if isinstance(probe, ProbeWeights):
        return probe
    if isinstance(probe, (str, Path)):
        return load_probe(probe)
    if hasattr(probe, "to_weights"):
        return probe.to_weights()
    raise InputError(
        f"{type(probe).__name__} is no probe; expected ProbeWeights, a fitted Probe, or the path of a probe file."
    )


def recorded_prepend_bos(probes: Sequence[ProbeWeights]) -> bool | None:
    """Whether the probes were trained with BOS prepended, None where they do not say; InputError where they differ."""
    recorded = {weights.spec.tokenizer.prepend_bos for weights in probes if weights.spec.tokenizer.fingerprint is not None}
    if len(recorded) > 1:
        raise InputError(
            "some of the probes were trained with a BOS token and some without; run them apart, or pass prepend_bos."
        )
    return recorded.pop() if recorded else None


def check_compatible(model: Any, weights: ProbeWeights, *, strict: bool = False) -> None:
    """Raise where a probe cannot score this model; warn, or raise if `strict`, where it was made with another one."""
    spec = weights.spec
    for hook_name in spec.hook_points:
        if hook_name not in model.hook_dict:
            raise IncompatibleProbeError(f"probe {spec.name!r} cannot be attached: {unknown_hook_point(model, hook_name)}")
    if spec.d_model != width(model):
        raise IncompatibleProbeError(
            f"probe {spec.name!r} expects d_model {spec.d_model}, but this model has {width(model)}. It was trained on "
            f"{spec.model.id if spec.model else 'another model'!r}; load that model."
        )
    if spec.n_layers is not None and spec.n_layers != layer_count(model):
        raise IncompatibleProbeError(
            f"probe {spec.name!r} was trained on a model of {spec.n_layers} layers, but this one has {layer_count(model)}."
        )
    for difference in _differences(model, weights):
        if strict:
            raise IncompatibleProbeError(f"probe {spec.name!r}: {difference}")
        warnings.warn(
            f"probe {spec.name!r}: {difference} Its scores may mean something else.", ModelMismatchWarning, stacklevel=5
        )


def _differences(model: Any, weights: ProbeWeights) -> Iterator[str]:
    there, here = weights.spec.model, model_record(model)
    if there is not None and there.config_fingerprint is not None and there.config_fingerprint != here.config_fingerprint:
        yield (
            f"trained on {there.id!r} (config {there.config_fingerprint}), "
            f"attached to {here.id!r} ({here.config_fingerprint})."
        )
    elif there is not None and there.id is not None and there.id != here.id:
        yield f"trained on {there.id!r}, attached to {here.id!r}, a model of the same shape."
    fingerprint = weights.spec.tokenizer.fingerprint if weights.spec.tokenizer else None
    if fingerprint is not None and getattr(model, "tokenizer", None) is not None:
        found = tokenizer_record(model, None).fingerprint
        if fingerprint != found:
            yield f"trained with another tokenizer (vocabulary {fingerprint}, here {found})."
