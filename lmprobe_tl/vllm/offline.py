"""`vllm.LLM` with probes: the same calls, and each request's scores with its output."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.errors import EngineError, InputError
from lmprobe_tl.given_probes import as_probes
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm import wire
from lmprobe_tl.vllm.probes import (
    check_agreement,
    check_fits_model,
    check_loaded,
    engine_kwargs,
    load_message,
)
from lmprobe_tl.vllm.results import probe_result, set_result
from lmprobe_tl.vllm.runtime import WANTS_SCORES, WANTS_STOP
from lmprobe_tl.vllm.wire import Scores
from lmprobe_tl.weights import ProbeWeights

_ROWS_AT_ONCE = 256


class ProbedLLM:
    """An engine that scores every token with the probes while it generates, in the compiled graph.

    model, vllm_args: as for `vllm.LLM`, which stays at hand as `.llm`. probes: files, weights or fitted probes. capacity:
    columns to reserve at each hook point for `replace_probes`.

    Raises EngineError for a setting under which scores would be wrong, IncompatibleProbeError for probes of another model.

        with ProbedLLM("meta-llama/Llama-3.1-8B", probes=["deceit.safetensors"], tensor_parallel_size=2) as engine:
            for output in engine.generate(prompts, SamplingParams(max_tokens=200), stop=True):
                print(output.probe_scores["deceit"], output.alarms)
    """

    def __init__(self, model: Any, *, probes: Any, capacity: int | None = None, **vllm_args: Any) -> None:
        weights = as_probes(probes)
        arguments = engine_kwargs(weights, capacity=capacity, **vllm_args)
        from vllm import LLM

        self.llm = LLM(str(model), **arguments)
        try:
            self._agreed = False
            self._load(weights)
        except BaseException:
            self.close()
            raise

    def _load(self, weights: Any) -> None:
        self._tokenizer = None if self._config.model_config.skip_tokenizer_init else self.llm.get_tokenizer()
        check_fits_model(weights, self._config, self._tokenizer)
        plan = ScoringPlan(weights)
        message = load_message(plan, getattr(self._tokenizer, "bos_token_id", None))
        on_last_stage = check_loaded(self.llm.collective_rpc("lmprobe_load", args=(message,)), plan)
        self._can_stop = on_last_stage and getattr(self._tokenizer, "eos_token_id", None) is not None
        self._plan = plan  # not before the workers have taken it: a refusal leaves the probes that are there

    @property
    def _config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    def replace_probes(self, probes: Any) -> None:
        """Score with other probes from now on, without compiling anew: at the same hook points, within the capacity.

        The prefix cache is emptied, since it holds tokens that they have not scored.
        """
        self._load(as_probes(probes))
        self.llm.reset_prefix_cache()

    def generate(self, prompts: Any, sampling_params: Any = None, *, stop: bool = False, **options: Any) -> list[Any]:
        """`LLM.generate`, whose outputs also have what the probes say: see `ProbeResult` for the attributes.

        Of a request with several completions (`n`), each of `output.outputs` has them, and the request those of its first.
        stop: end a request at its first alarm. The token that was sampled in that step gives way to the end-of-sequence
        token, so none is generated after the alarm. InputError where the request ignores that token.
        """
        return self._run(self.llm.generate, prompts, sampling_params, stop, options)

    def chat(self, messages: Any, sampling_params: Any = None, *, stop: bool = False, **options: Any) -> list[Any]:
        """`LLM.chat`, with the same attributes."""
        return self._run(self.llm.chat, messages, sampling_params, stop, options)

    def _run(self, call: Any, prompts: Any, sampling_params: Any, stop: bool, options: dict[str, Any]) -> list[Any]:
        sampling = self.llm.get_default_sampling_params() if sampling_params is None else sampling_params
        listed = sampling if isinstance(sampling, Sequence) else [sampling]
        marked = [marked_sampling(one, stop, self._can_stop) for one in listed]
        outputs = call(prompts, marked if isinstance(sampling, Sequence) else marked[0], **options)
        every = marked if len(marked) == len(outputs) else marked * len(outputs)
        self._attach(outputs, every, stop)
        return outputs

    @property
    def probes(self) -> list[ProbeWeights]:
        """Those that it scores with."""
        return list(self._plan.probes.values())

    @property
    def model(self) -> str:
        return str(self._config.model_config.model)

    @property
    def dtype(self) -> str:
        """In which the model computes: 'bfloat16', 'float32' or 'float16'."""
        return str(self._config.model_config.dtype).removeprefix("torch.")

    @property
    def longest_prompt(self) -> int:
        """With room for the one token that is always generated."""
        return self._config.model_config.max_model_len - 1

    def sequence_maxima(
        self, rows: Sequence[Sequence[int]], name: str, unit: str, *, progress: bool | None = None
    ) -> Tensor:
        """The running maximum of a binary probe's live score over each row of token ids, [n_rows] float32.

        unit: 'logit' or 'probability'. NaN for a row in which nothing counts. EngineError for one with a token that has no
        score.
        """
        from vllm import SamplingParams

        params = marked_sampling(SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), False, self._can_stop)
        maxima = torch.full((len(rows),), torch.nan)
        hidden = None if progress is None else not progress
        with tqdm(total=len(rows), desc="scores", unit="prompt", disable=hidden, leave=False) as bar:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                group = [list(row) for row in rows[start : start + _ROWS_AT_ONCE]]
                outputs = self.llm.generate([{"prompt_token_ids": row} for row in group], params, use_tqdm=False)
                for index, (row, found) in enumerate(
                    zip(group, self._take(outputs, [params] * len(group)), strict=True), start
                ):
                    maxima[index] = self._maximum(found.get(0), len(row), name)
                bar.update(len(group))
        return self._plan.reductions[name].in_unit(maxima, unit)

    def _maximum(self, scores: Scores | None, n_tokens: int, name: str) -> float:
        """Of the values of the probe's online reduction."""
        found = None if scores is None else scores.arrays()
        if found is None or len(found[0]) != n_tokens or not np.isfinite(found[0]).all():
            raise EngineError(f"a token of a prompt of {n_tokens} has no score, so its running maximum is not known.")
        counted = found[1][:, self._plan.columns[name]]
        counted = counted[~np.isnan(counted) & (counted != -np.inf)]
        return float(counted.max()) if len(counted) else math.nan

    def _attach(self, outputs: Sequence[Any], sampling: Sequence[Any], stop: bool) -> None:
        for row, (output, found) in enumerate(zip(outputs, self._take(outputs, sampling), strict=True)):
            attach_results(self._plan, output, found, row=row, stop=stop, end=getattr(self._tokenizer, "eos_token_id", None))

    def _take(self, outputs: Sequence[Any], sampling: Sequence[Any]) -> list[dict[int, Scores]]:
        """Of each request, its completions' scores by index."""
        if not self._agreed:
            answers = self.llm.collective_rpc("lmprobe_state")
            check_agreement([wire.decode(answer, wire.State) for answer in answers])
            self._agreed = True
        wanted = [(output.request_id, params.n) for output, params in zip(outputs, sampling, strict=True)]
        answers = self.llm.collective_rpc("lmprobe_take", args=(wire.encode(wire.Take(wanted)),))
        (answer,) = [found for found in answers if found is not None]
        return wire.decode(answer, wire.Taken).answers

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        from lmprobe_tl.vllm import _compat

        if getattr(self, "llm", None) is not None:
            _compat.shut_down(self.llm)
            self.llm = None

    def __enter__(self) -> ProbedLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def marked_sampling(params: Any, stop: bool, can_stop: bool) -> Any:
    """A copy of vLLM's sampling parameters that tells the worker what to do with the request's scores."""
    if stop and not can_stop:
        raise EngineError(
            "stop=True needs an end-of-sequence token, and the probes on the last pipeline stage, which samples the tokens; "
            "use a tokenizer that has one, and probes of later layers or fewer stages."
        )
    if stop and params.ignore_eos:
        raise InputError("stop=True ends a request by its end-of-sequence token, but ignore_eos is set; leave it out.")
    if stop and params.min_tokens:
        raise InputError(
            f"stop=True ends a request at once, but min_tokens={params.min_tokens} has vLLM go on; leave it out."
        )
    marked = copy.copy(params)
    marked.extra_args = {**(params.extra_args or {}), WANTS_SCORES: True, WANTS_STOP: stop}
    return marked


def attach_results(
    plan: ScoringPlan, output: Any, found: dict[int, Scores], *, row: int, stop: bool, end: int | None
) -> None:
    """Give vLLM's output of a request the attributes of its `ProbeResult`s."""
    prompt = list(output.prompt_token_ids or ())
    for completion in output.outputs:
        tokens = [*prompt, *completion.token_ids]
        result = probe_result(plan, found.get(completion.index), tokens, row=row, n_prompt=len(prompt), stops=stop, end=end)
        set_result(completion, result)
    if output.outputs:
        first = min(output.outputs, key=lambda one: one.index)
        set_result(output, first)
