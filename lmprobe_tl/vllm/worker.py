"""The worker class that vLLM is told to use: its own, with probes as a part of the model's graph."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmprobe_tl.errors import EngineError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.probe_file import probe_from_bytes
from lmprobe_tl.vllm import _compat, wire
from lmprobe_tl.vllm._compat.blocks import decoder_blocks
from lmprobe_tl.vllm.activations import WorkerActivations
from lmprobe_tl.vllm.hooks import StaticHooks
from lmprobe_tl.vllm.publisher import ScorePublisher
from lmprobe_tl.vllm.runtime import RequestScores, ScoreBook
from lmprobe_tl.vllm.steps import CacheLayout, Step
from lmprobe_tl.vllm.structure import Structure

_FIRST_READINGS = 16  # readings of the first step, on which all tensor ranks must agree


class ProbeWorker(_compat.worker_base()):  # type: ignore[misc]
    """`worker_cls` of an engine with probes. Methods named `lmprobe_...` are called by `collective_rpc`."""

    _lmprobe: WorkerProbes | WorkerActivations | None = None

    def load_model(self, *arguments: Any, **options: Any) -> None:
        _compat.refuse_unsupported(self.vllm_config)
        super().load_model(*arguments, **options)
        keeps = Structure.from_config(self.vllm_config.additional_config).mode == "activations"
        self._lmprobe = (WorkerActivations if keeps else WorkerProbes)(self.vllm_config, self.model_runner, self.device)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self._installed.layout = _compat.cache_layout(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self._installed.check_boot(warmed_up=bool(getattr(times, "language_model", 0.0)))
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        step = self._installed.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._installed.end_step(step)
        return self._installed.with_ends(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._installed.with_ends(super().sample_tokens(grammar_output))

    @property
    def _installed(self) -> WorkerProbes | WorkerActivations:
        if self._lmprobe is None:
            raise EngineError("the model is not loaded.")
        return self._lmprobe

    @property
    def _probes(self) -> WorkerProbes:
        if not isinstance(self._lmprobe, WorkerProbes):
            raise EngineError("this engine was started for activations; start another one for probes.")
        return self._lmprobe

    @property
    def _activations(self) -> WorkerActivations:
        if not isinstance(self._lmprobe, WorkerActivations):
            raise EngineError("this engine was started for probes; start an ActivationEngine for activations.")
        return self._lmprobe

    # --- remote calls: bytes in, bytes out ---

    def lmprobe_load(self, payload: bytes) -> bytes:
        """Take these probes instead of those before. Returns the hook points that are on this worker."""
        return self._probes.load(payload)

    def lmprobe_take(self, payload: bytes) -> bytes | None:
        """The scores of requests that are over; None from a worker that keeps none."""
        return self._probes.take(payload)

    def lmprobe_publish(self, payload: bytes) -> None:
        """Send the scores of each step to an address, and keep none of finished requests."""
        self._probes.publish(payload)

    def lmprobe_state(self) -> bytes:
        """Counts and sizes, and some of the first readings, on which all tensor ranks must agree."""
        return self._probes.state()

    def lmprobe_collect(self, payload: bytes) -> None:
        """Keep the activations of the next group of prompts."""
        self._activations.collect(payload)

    def lmprobe_collected(self, payload: bytes) -> bytes | None:
        """The pooled activations of the group; None from a worker that keeps none."""
        return self._activations.collected(payload)


class WorkerProbes:
    """The probes of one worker: hooks in its model, and on the rank that reports, the scores of its requests."""

    def __init__(self, config: Any, runner: Any, device: torch.device) -> None:
        self.structure = Structure.from_config(config.additional_config)
        self.layout: CacheLayout | None = None
        self._sizes, self._runner = _compat.sizes_of(config), runner
        blocks = decoder_blocks(runner.get_model(), self._sizes.n_layers, self._sizes.dtype)
        self._hooks = StaticHooks(blocks, self.structure, self._sizes, device)
        self._ranks = _compat.ranks()
        self._device = device
        self._book: ScoreBook | None = None
        self._fired = np.zeros(len(self._hooks.by_name), dtype=np.int64)
        self._first_readings: list[float] | None = None
        self._n_steps = 0
        self._ends: dict[str, tuple[int, int]] = {}  # step of the alarm, and token that ends the request
        self._plan: ScoringPlan | None = None
        self._publisher: ScorePublisher | None = None
        self._lock = threading.Lock()  # outputs of asynchronous steps arrive on another thread
        self._waiting: deque[tuple[int, Step, _OnItsWay | None]] = deque()

    @property
    def reports(self) -> bool:
        """Whether this worker keeps scores: the first tensor rank of the stage that has the hook points."""
        return bool(self._hooks.by_name) and self._ranks.tensor == 0

    def check_boot(self, *, warmed_up: bool) -> None:
        """EngineError where warming up ran the model without the hooks."""
        self._hooks.check_boot(warmed_up=warmed_up)

    def load(self, payload: bytes) -> bytes:
        message = wire.decode(payload, wire.Load)
        plan = ScoringPlan([probe_from_bytes(one) for one in message.probes])
        self.structure.check_fits(plan)
        here = [name for name in plan.hooks if name in self._hooks.by_name]
        if here and len(here) < len(plan.hooks):
            raise EngineError(
                "the probes read hook points on several pipeline stages; use probes that read those of one stage alone."
            )
        with self._lock:
            self._drain(wait_for=self._n_steps)
            self._plan, self._first_readings = None, None
            if here:
                self._hooks.set_weights(plan)
                self._plan = plan
            self._ends = {}
            keep = self._publisher is None
            self._book = ScoreBook(plan, self.layout, message.bos_token_id, keep_finished=keep) if self.reports else None
        return wire.encode(wire.Loaded(here if self.reports else [], self._ranks.is_last_stage))

    # --- steps ---

    def begin_step(self, scheduler_output: Any) -> Step | None:
        return None if self._plan is None else _compat.step_of(scheduler_output)

    def end_step(self, step: Step | None) -> None:
        """After the forward pass: have its readings copied to the host, and work on those that have arrived."""
        if step is None or self._plan is None or not (self.reports or self._first_readings is None):
            return
        scored = None
        if step.n_tokens:
            readings = self._plan.combine(self._hooks.partials(self._plan, step.n_tokens), self._device)[0]
            scored = _OnItsWay(_compat.batch_order(self._runner), readings, self._hooks.fires)
        with self._lock:
            self._n_steps += 1
            self._waiting.append((self._n_steps, step, scored))
            self._drain(wait_for=0)

    def _drain(self, *, wait_for: int) -> None:
        """Work on the steps whose readings have arrived, in order; wait for those up to number `wait_for`."""
        while self._waiting:
            number, step, scored = self._waiting[0]
            if number > wait_for and scored is not None and not scored.has_arrived():
                return
            self._waiting.popleft()
            if self._book is not None:
                if self._publisher is not None and step.finished:
                    self._publisher.publish(self._book, step.finished, finished=True)
                self._book.begin_step(step)
            if scored is None:
                continue
            readings, fires = scored.arrived()
            if (fires[: len(self._hooks.by_name)] <= self._fired).any():
                readings = np.full_like(readings, np.nan)  # a graph without the hook ran: what the buffer holds is old
            self._fired = fires[: len(self._hooks.by_name)]
            if self._first_readings is None:
                self._first_readings = readings.ravel()[:_FIRST_READINGS].tolist()
            if self._book is not None:
                self._book.end_step(step, scored.order, readings)
                for request_id, token in self._book.ends.items():
                    self._ends.setdefault(request_id, (number, token))
                self._ends = {name: end for name, end in self._ends.items() if name in self._book.ends}
                if self._publisher is not None:
                    self._publisher.publish(self._book, scored.order)

    def with_ends(self, output: Any) -> Any:
        """The output of the latest step, in which alarmed requests end."""
        if output is None or self._book is None:
            return output
        number = self._n_steps
        if _compat.is_pending(output):
            return _compat.pending_output(output, lambda arrived: self._ended(arrived, number))
        return self._ended(output, number)

    def _ended(self, output: Any, number: int) -> Any:
        with self._lock:
            # not for a later step, whose forward pass may have only begun
            self._drain(wait_for=number)
            ends = {name: token for name, (since, token) in self._ends.items() if since <= number}
        return _compat.end_requests(output, ends) if ends else output

    # --- answers ---

    def take(self, payload: bytes) -> bytes | None:
        if self._book is None:
            return None
        with self._lock:
            self._drain(wait_for=self._n_steps)
            held: dict[tuple[str, bool], dict[int, str]] = {}  # internal ids by the client's name; looked through once
            for request_id in self._book.request_ids:
                for name, index, of_several in _compat.client_names(request_id):
                    held.setdefault((name, of_several), {})[index] = request_id
            answers = []  # of an offline engine, which has nothing else running when it asks
            for name, n in wire.decode(payload, wire.Take).requests:
                found = held.get((name, n > 1), {})
                answers.append({index: _as_wire(self._book.take(request_id)) for index, request_id in found.items()})
            self._book.drop_finished()
        return wire.encode(wire.Taken(answers))

    def publish(self, payload: bytes) -> None:
        if not self.reports:
            return
        address = wire.decode(payload, wire.Publish).address
        with self._lock:
            self._drain(wait_for=self._n_steps)
            old, self._publisher = self._publisher, None
            if old is not None:
                old.close()
            self._publisher = None if address is None else ScorePublisher(address)
            if self._book is not None:
                self._book.keep_finished = self._publisher is None

    def state(self) -> bytes:
        with self._lock:
            self._drain(wait_for=self._n_steps)
            book = self._book
            held = (0, 0, 0) if book is None else book.n_held
            counts = (0, 0, 0) if book is None else (book.n_scored, book.n_unknown, book.n_alarms)
        return wire.encode(wire.State(*counts, *held, self._first_readings or []))


class _OnItsWay:
    """Readings [n_tokens n_readings] and counters of a step, being copied to the host."""

    def __init__(self, order: list[str], readings: Tensor, fires: Tensor) -> None:
        self.order, self._event = order, None
        if readings.device.type == "cpu":
            self._readings, self._fires = readings.clone(), fires.clone()
            return
        self._readings = torch.empty(readings.shape, dtype=readings.dtype, pin_memory=True).copy_(
            readings, non_blocking=True
        )
        self._fires = torch.empty(fires.shape, dtype=fires.dtype, pin_memory=True).copy_(fires, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def has_arrived(self) -> bool:
        return self._event is None or self._event.query()

    def arrived(self) -> tuple[np.ndarray, np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return self._readings.numpy(), self._fires.numpy()


def _as_wire(scores: RequestScores | None) -> wire.Scores:
    assert scores is not None
    crossings = [(one.line, one.position, one.logit, one.value) for one in scores.crossings]
    return wire.Scores(scores.start, len(scores.logits), scores.logits.tobytes(), scores.values.tobytes(), crossings)
