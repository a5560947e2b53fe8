"""All that this package knows of vLLM's insides. When vLLM changes, this is the folder to repair.

Validated with the versions from OLDEST to below NEXT. What is read: the worker classes, the scheduler's output,
the order of requests in a batch of either model runner, the groups of the KV cache, the sampled tokens of a step, how
request ids are extended; and in `blocks`, the modules of decoder models.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmprobe_tl.errors import EngineError, InputError
from lmprobe_tl.vllm.steps import CacheLayout, NewRequest, ReturningRequest, Step

try:
    import vllm
except ImportError as error:
    raise EngineError(f"vLLM cannot be imported ({error}); install it: pip install 'lmprobe-tl[vllm]'.") from error

OLDEST, NEXT = (0, 32), (0, 34)
_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.gguf"]


def check_version() -> None:
    """EngineError for a vLLM that this file was not written for."""
    found = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    if not OLDEST <= found < NEXT:
        low, high = (".".join(map(str, one)) for one in (OLDEST, NEXT))
        raise EngineError(f"vLLM is {vllm.__version__}; probes run inside vllm>={low},<{high}. Install one of these.")


def check_arguments(arguments: Mapping[str, Any], taken: Collection[str]) -> None:
    """InputError for arguments that an engine does not have, or that its caller has given already."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {*EngineArgs.__dataclass_fields__, *inspect.signature(LLM.__init__).parameters} - {"self", "kwargs"}
    for name in arguments:
        if name in taken:
            raise InputError(f"{name!r} is among the engine's arguments, but it is set already; leave it out.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{name!r} is no argument of an engine of vLLM {version()}.{meant}")


def version() -> str:
    return str(vllm.__version__)


def worker_base() -> type[Any]:
    """The worker class of this machine's platform."""
    check_version()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def refuse_unsupported(config: Any) -> None:
    """EngineError naming a setting of the engine under which scores would be missing or wrong."""
    from vllm import envs

    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    refused = {
        "speculative decoding (speculative_config)": config.speculative_config is not None,
        "a KV connector (kv_transfer_config), which fills the cache without a forward pass": config.kv_transfer_config
        is not None,
        "context parallelism": max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        "data parallelism in one engine (data_parallel_size)": parallel.data_parallel_size > 1,
        "micro-batches (enable_dbo, ubatch_size)": bool(parallel.use_ubatching),
        "request ids that are not made unique (VLLM_DISABLE_REQUEST_ID_RANDOMIZATION)": bool(
            envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION
        ),
        "prompts as embeddings, whose length no output tells (enable_prompt_embeds)": model.enable_prompt_embeds,
        "a prefill that keeps tokens from late layers (kv_sharing_fast_prefill)": cache.kv_sharing_fast_prefill,
        f"the runner {model.runner_type!r}": model.runner_type != "generate",
    }
    for what, is_set in refused.items():
        if is_set:
            raise EngineError(f"probes do not run in an engine with {what}: their scores would be wrong. Start it without.")


@dataclass(frozen=True)
class Sizes:
    """Of an engine: width of the residual stream, layers, and the most tokens that one forward pass has, pads included."""

    d_model: int
    n_layers: int
    max_tokens: int
    dtype: torch.dtype
    bos_token_id: int | None


def sizes_of(config: Any) -> Sizes:
    scheduler, model = config.scheduler_config, config.model_config
    captured = getattr(config.compilation_config, "max_cudagraph_capture_size", None) or 0
    return Sizes(
        d_model=model.get_hidden_size(),
        n_layers=model.get_total_num_hidden_layers(),
        max_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, captured),
        dtype=model.dtype,
        bos_token_id=getattr(model.hf_text_config, "bos_token_id", None),
    )


# --- a step ------------------------------------------------------------------------------------------------------------


def step_of(output: Any) -> Step:
    cached = output.scheduled_cached_reqs
    starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    resumed, grown = [], []
    for request_id, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        if request_id in cached.resumed_req_ids:
            tokens = cached.all_token_ids.get(request_id)
            n_tokens = None if tokens is None else len(tokens)
            resumed.append(ReturningRequest(request_id, blocks, computed, n_tokens))
        elif blocks is not None:
            grown.append((request_id, blocks))
    new = [_new_request(data) for data in output.scheduled_new_reqs]
    starts.update({one.request_id: one.n_cached for one in new})
    copies = [(copy.src_block_id, copy.dst_block_id) for copy in getattr(output, "kv_cache_block_copies", None) or ()]
    return Step(
        output.total_num_scheduled_tokens,
        output.num_scheduled_tokens,
        starts,
        new,
        resumed,
        grown,
        list(output.finished_req_ids),
        copies,
    )


def _new_request(data: Any) -> NewRequest:
    params = data.sampling_params
    return NewRequest(
        data.req_id,
        data.prompt_token_ids or (),
        data.num_computed_tokens,
        data.block_ids,
        getattr(params, "extra_args", None) or {},
        getattr(params, "eos_token_id", None),
        None if data.prefill_token_ids is None else len(data.prefill_token_ids),
    )


def batch_order(runner: Any) -> list[str]:
    """Requests in the order of their tokens in the forward pass that was just run."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)  # of the second runner; the first keeps one for good
    if batch is None:
        batch = runner.input_batch
    return list(batch.req_ids)


def end_requests(output: Any, ends: Mapping[str, int]) -> Any:
    """The same output of a step, in which the named requests sampled the given tokens, which end them."""
    for request_id, token in ends.items():
        index = output.req_id_to_index.get(request_id)
        if index is not None and index < len(output.sampled_token_ids) and len(output.sampled_token_ids[index]):
            output.sampled_token_ids[index] = [token]
            if output.logprobs is not None:
                output.logprobs = _logprobs_of_end(output.logprobs, index, token)
    return output


def _logprobs_of_end(found: Any, index: int, token: int) -> Any:
    """Log probabilities of a step, first of the sampled token and then of the most likely ones, with `token` as the sampled
    one of a request. The server looks for it there. Where it is not among the most likely, its own is not known: -inf."""
    row = index if found.cu_num_generated_tokens is None else found.cu_num_generated_tokens[index]
    tokens, values, ranks = (part.copy() for part in found[:3])
    places = (tokens[row, 1:] == token).nonzero()[0]
    if tokens[row, 0] != token:
        tokens[row, 0] = token
        values[row, 0] = values[row, 1 + places[0]] if len(places) else float("-inf")
        ranks[row] = 1 + places[0] if len(places) else 0
    return found._replace(logprob_token_ids=tokens, logprobs=values, sampled_token_ranks=ranks)


def is_pending(output: Any) -> bool:
    """Whether a step's output is still on the device (async scheduling)."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    return isinstance(output, AsyncModelRunnerOutput)


def pending_output(inner: Any, finish: Callable[[Any], Any]) -> Any:
    """`inner`, an output still on the device, with `finish` applied once it has arrived."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    class Finished(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            return finish(inner.get_output())

    return Finished()


# --- the KV cache, ranks and names -------------------------------------------------------------------------------------


def cache_layout(kv_cache_config: Any) -> CacheLayout | None:
    """None for a model without full attention, whose cache forgets early tokens."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs

    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        inner = next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if isinstance(inner, FullAttentionSpec) and not getattr(group, "is_eagle_group", False):
            return CacheLayout(index, spec.block_size, kv_cache_config.num_blocks)
    return None


@dataclass(frozen=True)
class Ranks:
    """Of this worker: tensor and pipeline rank, and whether it is on the last pipeline stage."""

    tensor: int
    pipeline: int
    is_last_stage: bool


def ranks() -> Ranks:
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    pipeline = get_pp_group()
    return Ranks(get_tp_group().rank_in_group, pipeline.rank_in_group, pipeline.is_last_rank)


def client_names(request_id: str) -> Iterator[tuple[str, int, bool]]:
    """What a client may call the request with this internal id: (name, index of the completion, is one of several).

    vLLM adds eight hex digits, and before them the number of the completion where there are several.
    """
    found = re.fullmatch(r"((?:(\d+)_)?(.+))-[0-9a-f]{8}", request_id)
    if found is not None:
        yield found[1], 0, False
        if found[2] is not None:
            yield found[3], int(found[2]), True


# --- an engine for prompts alone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSettings:
    """Of a model that is yet to be loaded: its layers, the longest prompt that an engine of it can take, the dtype of its
    files (None where its config does not say)."""

    n_layers: int
    longest_prompt: int
    dtype: torch.dtype | None


def model_settings(model: str, arguments: Mapping[str, Any]) -> ModelSettings:
    """arguments: those that an engine is to be started with."""
    from vllm.engine.arg_utils import EngineArgs

    known = {name: value for name, value in arguments.items() if name in EngineArgs.__dataclass_fields__}
    config = EngineArgs(model=model, **known).create_model_config()
    # One token more than the context is room for the one that is sampled. 'longrope' would compute something else with it.
    rope = str(getattr(config.hf_text_config, "rope_parameters", None))
    longest = config.max_model_len - ("longrope" in rope)
    dtypes = [getattr(one, "dtype", None) for one in (config.hf_text_config, config.hf_config)]
    found = next((one for one in dtypes if isinstance(one, torch.dtype)), None)
    return ModelSettings(config.get_total_num_hidden_layers(), longest, found)


@contextmanager
def longer_context_allowed() -> Iterator[None]:
    """For an engine that is started in the block, to take a context of one token more.

    An engine refuses a prompt that fills its context, since it wants to sample a token after it. That token never enters
    the model, so no position beyond the true context is computed.
    """
    before = os.environ.get(_LONGER)
    os.environ[_LONGER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LONGER]
        else:
            os.environ[_LONGER] = before


def weight_files(config: Any) -> list[Path]:
    """The files that an engine has its weights from, by name. EngineError where these cannot be told."""
    model, load = config.model_config, config.load_config
    folder = Path(model.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=load.download_dir,
                allow_patterns=_WEIGHTS,
                local_files_only=True,
            )
        )
    for pattern in _WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise EngineError(f"{str(folder)!r} has no weights ({', '.join(_WEIGHTS)}), so which they are cannot be recorded.")


def abort_all(llm: Any) -> None:
    """End all requests of an offline engine, whose outputs nobody waits for."""
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)


def shut_down(llm: Any) -> None:
    """Stop an offline engine, in this process or its own, and let go of its memory and groups."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


# --- the server --------------------------------------------------------------------------------------------------------


def is_authorised(app: Any, scope: Mapping[str, Any]) -> bool:
    """Whether the server's own check of API keys, in the layers of an ASGI application, lets a request through.

    Middlewares that are named on the command line run before it.
    """
    from starlette.datastructures import Headers
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    while app is not None:
        if isinstance(app, AuthenticationMiddleware):
            return app.verify_token(Headers(raw=list(scope["headers"])))
        app = getattr(app, "app", None)
    return True
