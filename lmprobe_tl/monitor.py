"""Probes as hooks: live scores of one or many probes, while the model runs or generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lmprobe_tl.errors import InputError, MonitorError, ProbeNeverFiredError
from lmprobe_tl.forward_watch import check_is_watched
from lmprobe_tl.generate_call import ignores
from lmprobe_tl.hook_points import (
    ForwardCall,
    HookHandle,
    add_hook,
    cache_of,
    logits_of,
    search_in_progress,
)
from lmprobe_tl.live.events import EventReporter
from lmprobe_tl.live.passes import LivePasses, inside_callback
from lmprobe_tl.live.records import Alarm, Escalate, OnCrossing, OnToken
from lmprobe_tl.live.residual_basis import BasisCheck
from lmprobe_tl.live.rows import RowEnds, check_padding, row_ends
from lmprobe_tl.live.run import LiveRun
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.tokens import bos_id
from lmprobe_tl.weights import ProbeWeights

# As a logit it leaves no other token a chance at any temperature in use, and every float type can hold it.
_FORCED_LOGIT = 1e4


class Monitor:
    """Live scores of attached probes. Made by `attach_probes`; readable after the block, too.

    Every forward pass of the model adds the positions that it saw first, by absolute position: a prompt at once or in
    chunks, one token a step with a KV cache, the whole prefix again without. A pass that starts over with other tokens
    begins a new run, a generation of its own. `runs` holds all of them; the methods here read the last one. Generations may
    take turns (generators, for instance): a run is known by its KV cache.

    Callbacks may call the model, as a judge with another probe does; passes inside a callback are not scored.

    Threads: passes of different threads belong to different runs and never mix, where the model itself can be called from
    several threads (`hf_generate` can, `generate` cannot). Reading is safe at any time, from any thread.
    """

    def __init__(
        self,
        model: Any,
        probes: Sequence[ProbeWeights],
        on_token: OnToken | None = None,
        ends: RowEnds | None = None,
        *,
        stop: bool = False,
        on_crossing: OnCrossing | None = None,
        escalate: Mapping[str, Escalate] | None = None,
        keep_scores: bool = True,
    ) -> None:
        self.plan = ScoringPlan(probes, escalate)
        self._bos, self._ends = bos_id(model), ends or row_ends(model)
        self._pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
        self._criteria_ignored = ignores(model, "stopping_criteria")
        self._on_token, self._on_crossing, self._escalate = on_token, on_crossing, dict(escalate or {})
        self._stop, self._keep_scores = _can_stop(stop, self.plan, self._ends), keep_scores
        judged = any(cascade.judge is not None for cascade in self._escalate.values())
        self._asks = on_token is not None or on_crossing is not None or judged
        self._handles: dict[str, HookHandle] = {}
        self._reporters: dict[int, EventReporter] = {}
        self._fired: set[str] = set()
        self._basis = BasisCheck(model, probes)
        self._passes = LivePasses(self._new_run)

    def _new_run(self, index: int) -> LiveRun:
        return LiveRun(self.plan, self._bos, self._ends, keep_scores=self._keep_scores, index=index)

    @property
    def runs(self) -> list[LiveRun]:
        """The generations so far, each with the same methods for reading, in the order in which they began."""
        return self._passes.runs

    # --- reading ---

    def token_scores(self, name: str) -> list[Tensor]:
        """Logits of a probe, one 1-D tensor a row with one entry a scored position ([n n_classes] with several classes).

        Every real position that a hook saw, the prompt's included; pads and positions after a row's end never appear. The
        last token that `generate` samples is never seen by the model, and so has no score.
        """
        return self._last_run(name).token_scores(name)

    def running_scores(self, name: str, unit: str | None = None) -> list[Tensor]:
        """The probe's inference pooling of all positions so far, after each position; NaN before the first that counts.

        unit: 'probability' or 'logit' of a probe with two classes; None is what its pooling runs in.
        """
        return self._last_run(name).running_scores(name, unit)

    def alarms(self) -> list[tuple[Alarm, ...]]:
        """For each row the first position at which each probe's running score reached its threshold."""
        return self._last_run(None).alarms()

    def tokens(self) -> list[Tensor]:
        """Token ids of the scored positions, one 1-D tensor a row."""
        return self._last_run(None).tokens()

    @property
    def events(self) -> tuple[Alarm, ...]:
        """Every crossing of every run so far, in the order in which they happened: alarms, and what a cascade deferred."""
        for run in self.runs:
            run.collect()
            run.check()
        return tuple(event for run in self.runs for event in run.events)

    def _last_run(self, name: str | None) -> LiveRun:
        if name is not None and name not in self.plan.probes:
            raise InputError(f"no probe {name!r} is attached; attached are {list(self.plan.probes)}.")
        self._check_fired(self._passes.thread.call is not None)  # another thread's pass may be on its way
        return self.runs[-1]

    def stopping_criteria(self) -> Any:
        """For `model.generate(stopping_criteria=...)`: a row is done once a probe's running score has reached its threshold.

        The criterion is asked after a token was sampled, so the row's output ends one token after the one that crossed.
        `attach_probes(..., stop=True)` acts before. InputError where the model's generate takes no criteria.
        """
        _check_has_threshold(self.plan)
        if self._criteria_ignored:
            raise InputError(
                "this model's generate has no argument stopping_criteria, and a HookedTransformer's would pass over one. "
                "attach_probes and monitored_generate end rows by an EOS token with stop=True; where the model has none, "
                "pass attach_probes(..., eos_token_id=...), the same as to generate."
            )
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
        run = self._passes.thread.run
        if run is None or not run.n_columns:
            raise ProbeNeverFiredError("the stopping criterion was asked, but the attached model has not run. " + _REPLACED)
        return run

    # --- while the model runs ---

    def begin_run(self, *, again: bool = False) -> None:
        """Keep the next forward pass apart from the last run, even where it extends its tokens.

        again: it repeats the rows of the last run with more tokens; crossings and tokens that were told are not told anew.
        """
        before = self._passes.thread.run
        run = self._passes.begin_run()
        if again and before is not None:
            run.repeats = before
            if before.index in self._reporters:
                self._reporters[run.index] = self._reporters[before.index]

    def attach(self, model: Any) -> None:
        """Put a hook on every hook point that the probes read."""
        for hook_name in self.plan.hooks:
            check_is_watched(model, hook_name)
            self._handles[hook_name] = add_hook(model, hook_name, partial(self.on_activations, hook_name))

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()

    def before_forward(self, call: ForwardCall) -> None:
        lost = [name for name, handle in self._handles.items() if not handle.is_attached]
        if lost:
            raise MonitorError(
                f"the hooks of the attached probes on {lost} were removed (by reset_hooks(), for instance), so what follows "
                "would not be scored. Attach the probes again after whatever removes hooks."
            )
        thread = self._passes.thread
        if thread.is_telling:
            return
        thread.end_call()
        run = self._passes.run_of(call)
        if not run.n_columns:
            self._check_new_run(call)
        thread.call = call

    def on_activations(self, hook_name: str, activations: Tensor) -> None:
        thread = self._passes.thread
        call, run = thread.call, thread.run
        if thread.is_telling:
            return
        if call is None or run is None or activations.shape[:2] != call.tokens.shape:
            expected = None if call is None else tuple(call.tokens.shape)
            raise MonitorError(
                f"hook point {hook_name!r} fired with activations of shape {tuple(activations.shape)} in "
                "a forward pass on tokens "
                f"of shape {expected}; expected [batch pos d_model] of the same batch and positions."
            )
        self._basis.check(hook_name, activations, call)
        self._fired.add(hook_name)
        skip = run.n_columns - call.start
        new = activations[:, skip:] if skip else activations
        thread.partials[hook_name] = self.plan.hooks[hook_name].partial_readings(new)
        if len(thread.partials) == len(self.plan.hooks):
            partials = [thread.partials[name] for name in self.plan.hooks]
            run.add(call, self.plan.combine(partials, call.tokens.device))
            thread.end_call()
            if self._asks:
                thread.is_telling = True
                try:
                    with inside_callback():
                        self._tell(run)
                finally:
                    thread.is_telling = False

    def _tell(self, run: LiveRun) -> None:
        for event in run.collect():
            cascade = self._escalate.get(event.probe)
            if event.verdict == "deferred" and cascade is not None and cascade.judge is not None:
                event = run.judge(event, bool(cascade.judge(event, run.tokens()[event.row])))
            if self._on_crossing is not None:
                self._on_crossing(event)
        if self._on_token is not None:
            self._reporters.setdefault(run.index, EventReporter(self._on_token)).report(run)

    def after_forward(self, output: Any) -> None:
        thread = self._passes.thread
        if thread.is_telling:
            return
        if thread.call is not None:
            missing = [name for name in self.plan.hooks if name not in thread.partials]
            thread.call = None
            raise ProbeNeverFiredError(
                f"hook points {missing} did not fire in a forward pass, so probes {self._reading(missing)} "
                f"saw no activation of it. {_REPLACED}"
            )
        run = thread.run
        if run is None:
            return
        self._passes.bind_cache(run, cache_of(output))
        logits = logits_of(output) if self._stop else None
        if logits is not None:
            # In place, as the tensor goes on to the sampler; one number a row, as the vocabulary is large.
            logits[:, -1, self._ends.end_ids[0]].masked_fill_(run.force_rows().to(logits.device), _FORCED_LOGIT)

    # --- checks ---

    def _check_new_run(self, call: ForwardCall) -> None:
        search = search_in_progress()
        if search is not None:
            raise MonitorError(
                f"{search} reorders rows, takes tokens back or adds a text of its own, so live scores would belong to other "
                "texts. Generate by sampling or greedily while probes are attached, or score the finished text with "
                "score_prompts."
            )
        check_padding(call, self._pad)

    def _reading(self, hook_names: Sequence[str]) -> list[str]:
        return sorted(probe.name for probe in self.plan.probes.values() if set(hook_names) & set(probe.hook_points))

    def check_fired(self) -> None:
        """Raise ProbeNeverFiredError where a probe saw nothing, or not all of the last forward pass."""
        self._check_fired(self._passes.unfinished)

    def abandon(self) -> None:
        """An exception ended the block: what was scored up to the last whole forward pass can be read."""
        self._passes.abandon()

    def _check_fired(self, unfinished: bool) -> None:
        never = [name for name in self.plan.hooks if name not in self._fired]
        if never:
            raise ProbeNeverFiredError(
                f"probes {self._reading(never)} saw no activation: hook points {never} never fired. {_REPLACED}"
            )
        if unfinished or not self.runs[-1].n_columns:
            raise ProbeNeverFiredError(
                "the last forward pass did not reach all hook points of the attached probes. " + _REPLACED
            )


_REPLACED = (
    "Run the model inside the block (it must reach these layers: no early stop_at_layer), and attach after anything that "
    "replaces hook points (an SAE, an adapter) or resets hooks."
)


def _can_stop(stop: bool, plan: ScoringPlan, ends: RowEnds) -> bool:
    if not isinstance(stop, bool):
        raise InputError(f"stop is {stop!r}; expected True (a row ends where a probe reaches its threshold) or False.")
    if stop:
        _check_has_threshold(plan)
    if stop and not ends.end_ids:
        raise InputError(
            "stop=True ends a row by an end-of-sequence token, and this model has none; pass eos_token_id=..., the same as "
            "to generate, or use monitor.stopping_criteria()."
        )
    return stop


def _check_has_threshold(plan: ScoringPlan) -> None:
    if not plan.watches.lines:
        raise InputError("no attached probe has two classes, and only these have a threshold to stop at.")
