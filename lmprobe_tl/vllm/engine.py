"""An engine for activations: prompts in, pooled residual streams out, a group at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmprobe_tl.batch_pooling import BatchPooler, Strategy, activation_strategy
from lmprobe_tl.errors import EngineError, InputError
from lmprobe_tl.forward_batches import Batch
from lmprobe_tl.tokens import without_bos
from lmprobe_tl.vllm import _compat, wire
from lmprobe_tl.vllm.activations import ROW
from lmprobe_tl.vllm.offline_engine import OfflineEngine
from lmprobe_tl.vllm.structure import CONFIG_KEY, WORKER_CLASS, ResidualPoint, Structure

# Of a group of prompts: what a worker holds of it, and sends at once. Enough to keep an engine's batch full.
_GROUP_BYTES, _GROUP_PROMPTS = 256 * 2**20, 1024
_FIXED = {"worker_cls": WORKER_CLASS, "enable_prefix_caching": False, "skip_tokenizer_init": True}


class ActivationEngine(OfflineEngine):
    """A vLLM engine whose compiled graph keeps the residual stream of every token, for `extract_activations` and
    `extract_to_store`, several calls of them.

    model: a name or a local folder. hook_points: layers or names of residual streams between blocks, or 'all', the output of
    each block. vllm_args: as for `vllm.LLM`, which stays at hand as `.llm`; max_model_len is the longest prompt,
    and dtype, unless it is given, that of the model's files (vLLM would compute in bfloat16 what is stored in float32).

    Raises EngineError for a setting that cannot be, InputError for a hook point that an engine does not have.

        with ActivationEngine("meta-llama/Llama-3.1-8B", [12, 16], dtype="bfloat16") as engine:
            store = extract_to_store(engine, prompts, "activations", pooling=["mean", "last_token"])
    """

    def __init__(self, model: str | Path, hook_points: Any = "all", **vllm_args: Any) -> None:
        _compat.check_version()
        self.model = str(model)
        for key, value in _FIXED.items():
            if vllm_args.get(key, value) != value:
                raise EngineError(f"{key} is {vllm_args[key]!r}; an engine for activations needs {value!r}. Leave it out.")
        settings = _compat.model_settings(self.model, vllm_args)
        self.longest_prompt = settings.longest_prompt
        self.hook_points = hook_names(hook_points, settings.n_layers)
        if settings.dtype is not None and vllm_args.get("dtype", "auto") == "auto":
            vllm_args["dtype"] = settings.dtype  # vLLM's own choice turns float32 into bfloat16
        others = dict(vllm_args.get("additional_config") or {})
        if CONFIG_KEY in others:
            raise EngineError(f"additional_config has {CONFIG_KEY!r} already; leave it out.")
        structure = Structure(dict.fromkeys(self.hook_points, 1), "activations")
        arguments = vllm_args | _FIXED | {"additional_config": others | structure.to_config()}
        from vllm import LLM

        with _compat.longer_context_allowed():
            self.llm = LLM(self.model, **arguments | {"max_model_len": self.longest_prompt + 1})
        sizes = _compat.sizes_of(self._config)
        self.d_model, self.n_layers = sizes.d_model, sizes.n_layers

    @property
    def version(self) -> str:
        """Of vLLM."""
        return _compat.version()

    @property
    def batching(self) -> tuple[int, int]:
        """Tokens and prompts that one forward pass has at most, on which the last digits depend."""
        scheduler = self._config.scheduler_config
        return scheduler.max_num_batched_tokens, scheduler.max_num_seqs

    def weights_sha256(self) -> str:
        """SHA-256 of the files that the weights come from, with how they are read.

        Not of the parameters in memory: engines fuse, pack and split these, each platform in its own way.
        """
        config = self._config
        digest = hashlib.sha256(f"{config.model_config.quantization} {config.load_config.load_format};".encode())
        for path in _compat.weight_files(config):
            digest.update(f"{path.name} {path.stat().st_size};".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    # --- prompts ---

    def pooled(
        self,
        rows: Sequence[Sequence[int]],
        hook_points: Sequence[str],
        poolings: Sequence[Strategy],
        *,
        include_bos: bool,
        bos_token_id: int | None,
        eos_ids: Sequence[int],
        progress: bool | None = None,
    ) -> Iterator[tuple[list[int], dict[str, list[Tensor]]]]:
        """Activations of rows of token ids, group after group: the indices of its rows, and by hook name a tensor for each
        pooling, float32 [n_rows d_model], or of 'all' [n_tokens d_model].

        A pooling that is a function is called here, with one row at a time. progress: as in `extract_activations`.
        """
        self._check_open()
        self.check_hook_points(hook_points)
        named = [(activation_strategy(one), include_bos) for one in poolings if not callable(one)]
        asked = named + [("all", True)] * any(map(callable, poolings))
        message = wire.Collect(list(hook_points), asked, bos_token_id, list(eos_ids))
        hidden = None if progress is None else not progress
        with tqdm(total=len(rows), desc="activations", unit="prompt", disable=hidden, leave=False) as bar:
            for indices in self._groups(rows, len(hook_points), asked):
                group = [list(rows[index]) for index in indices]
                found = self._collect(group, message)
                yield (
                    indices,
                    {name: _in_order(found[name], poolings, group, include_bos, bos_token_id) for name in hook_points},
                )
                bar.update(len(indices))

    def check_hook_points(self, names: Sequence[str]) -> None:
        """InputError for a hook point that this engine does not keep."""
        for name in names:
            if name not in self.hook_points:
                raise InputError(
                    f"hook point {name!r} is not one of those that this engine was started with: "
                    f"{', '.join(self.hook_points)}. Start it with all that are wanted."
                )

    def _groups(
        self, rows: Sequence[Sequence[int]], n_hook_points: int, asked: list[tuple[str, bool]]
    ) -> Iterator[list[int]]:
        vectors = sum(name != "all" for name, _ in asked)
        per_token = len(asked) - vectors
        group: list[int] = []
        size = 0
        for index, row in enumerate(rows):
            more = (vectors + per_token * len(row)) * n_hook_points * self.d_model * 4
            if group and (size + more > _GROUP_BYTES or len(group) == _GROUP_PROMPTS):
                yield group
                group, size = [], 0
            group.append(index)
            size += more
        if group:
            yield group

    def _collect(self, rows: list[list[int]], message: wire.Collect) -> dict[str, list[Tensor]]:
        from vllm import SamplingParams

        self.llm.collective_rpc("lmprobe_collect", args=(wire.encode(message),))
        options = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "ignore_eos": True}
        sampling = [SamplingParams(**options, extra_args={ROW: index}) for index in range(len(rows))]
        self._call("generate", [{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        request = wire.encode(wire.CollectedRequest(len(rows)))
        answers = self.llm.collective_rpc("lmprobe_collected", args=(request,))
        found: dict[str, list[Tensor]] = {}
        for answer in answers:  # of each pipeline stage those of its blocks
            values = {} if answer is None else wire.decode(answer, wire.Collected).values
            found |= {name: [self._tensor(part) for part in parts] for name, parts in values.items()}
        return found

    def _tensor(self, payload: bytes) -> Tensor:
        return torch.from_numpy(np.frombuffer(payload, dtype=np.float32).reshape(-1, self.d_model).copy())


def longest_prompt_of(model: str) -> int:
    """Tokens of the longest prompt that an engine of this model takes."""
    _compat.check_version()
    return _compat.model_settings(model, {}).longest_prompt


def hook_names(hook_points: Any, n_layers: int) -> tuple[str, ...]:
    """Full names of the wanted hook points; InputError for one that an engine does not have."""
    hook_points = hook_points.tolist() if hasattr(hook_points, "tolist") else hook_points
    if isinstance(hook_points, str) and hook_points == "all":
        hook_points = range(n_layers)
    listed = [hook_points] if isinstance(hook_points, (int, str)) else list(hook_points)
    names = []
    for one in listed:
        if (
            isinstance(one, bool)
            or not isinstance(one, (int, str))
            or (isinstance(one, int) and not -n_layers <= one < n_layers)
        ):
            raise InputError(f"{one!r} is no hook point of a model with {n_layers} layers; expected a layer or a hook name.")
        names.append(f"blocks.{one % n_layers}.hook_resid_post" if isinstance(one, int) else one)
    if not names or len(set(names)) < len(names):
        raise InputError(f"hook_points is {hook_points!r}; expected distinct layers or hook names, at least one, or 'all'.")
    for name in names:
        check_readable(name, n_layers)
    return tuple(names)


def check_readable(name: str, n_layers: int | None = None) -> None:
    """InputError for a hook point whose activations no engine shows."""
    try:
        ResidualPoint.of(name, n_layers)
    except ValueError as error:
        raise InputError(str(error)) from error


def _in_order(
    found: list[Tensor], poolings: Sequence[Strategy], rows: list[list[int]], include_bos: bool, bos_token_id: int | None
) -> list[Tensor]:
    """A tensor for each pooling; found: of those with a name, and where there are functions, every token's last."""
    named = iter(found)
    return [_called(one, found[-1], rows, include_bos, bos_token_id) if callable(one) else next(named) for one in poolings]


def _called(
    function: Strategy, activations: Tensor, rows: list[list[int]], include_bos: bool, bos_token_id: int | None
) -> Tensor:
    """activations: [n_tokens d_model], of all rows. Returns [n_rows d_model]."""
    pooler = BatchPooler(None, function, include_bos=include_bos)
    pooled = []
    for row, values in zip(rows, activations.split([len(row) for row in rows]), strict=True):
        tokens = torch.tensor([row])
        mask = torch.ones_like(tokens)
        pooled.append(pooler(values[None], Batch([0], tokens, mask, without_bos(tokens, mask, bos_token_id))))
    return torch.cat(pooled)
