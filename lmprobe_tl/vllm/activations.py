"""A worker that hands over activations: rows of forward passes to prompts, chunks put together, pooled where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lmprobe_tl.batch_pooling import BatchPooler
from lmprobe_tl.errors import EngineError
from lmprobe_tl.forward_batches import Batch
from lmprobe_tl.tokens import batches_by_length, pad_rows, without_bos
from lmprobe_tl.vllm import _compat, wire
from lmprobe_tl.vllm._compat.blocks import decoder_blocks
from lmprobe_tl.vllm.hooks import STALE_GRAPH, StaticHooks
from lmprobe_tl.vllm.steps import CacheLayout, Step
from lmprobe_tl.vllm.structure import Structure

ROW = "lmprobe_row"  # key of a request's extra_args: which prompt of the group it is


@dataclass
class OpenPrompt:
    """A prompt on its way. chunks: activations [n d_model] by hook name of its first n_held tokens, in the model's dtype."""

    row: int
    tokens: list[int]
    chunks: list[dict[str, Tensor]] = field(default_factory=list)
    n_held: int = 0


class ActivationBook:
    """The pooled activations of a group of prompts, from the steps in which their tokens are computed.

    wanted: the poolings. max_tokens: of one batch of pooling, pads included.
    """

    def __init__(self, wanted: wire.Collect, max_tokens: int, device: torch.device) -> None:
        ids = SimpleNamespace(cfg=SimpleNamespace(eos_token_id=tuple(wanted.eos_ids)))  # all that a pooler asks of a model
        self._poolers = [
            BatchPooler(ids, name if name == "all" else f"activation:{name}", include_bos=include_bos)
            for name, include_bos in wanted.poolings
        ]
        self._bos, self._max_tokens, self._device = wanted.bos_token_id, max_tokens, device
        self._hook_names = wanted.hook_points
        self._open: dict[str, OpenPrompt] = {}
        self._pooled: dict[
            str, list[dict[int, Tensor]]
        ] = {}  # hook name -> of each pooling, row -> [d_model] or [n d_model]
        self._rows: set[int] = set()

    def end_step(self, step: Step, order: Sequence[str], outputs: Mapping[str, Tensor]) -> None:
        """outputs: by hook name [max_tokens d_model], the step's tokens first, request after request as in `order`."""
        outputs = {name: rows for name, rows in outputs.items() if name in self._hook_names}
        for new in step.new:
            if ROW in new.options and new.request_id not in self._open:
                self._open[new.request_id] = OpenPrompt(int(new.options[ROW]), list(new.prompt_token_ids))
        begin, whole = 0, []
        for request_id in order:
            count, start = step.counts[request_id], step.starts[request_id]
            prompt = self._open.get(request_id)
            if prompt is not None and start == 0 and count == len(prompt.tokens):
                whole.append((prompt, begin))
            elif prompt is not None:
                self._add_chunk(prompt, start, {name: rows[begin : begin + count] for name, rows in outputs.items()})
                if prompt.n_held >= len(prompt.tokens):
                    joined = {name: torch.cat([chunk[name] for chunk in prompt.chunks]) for name in outputs}
                    self._pool([(prompt, 0)], joined)
            begin += count
        for members in batches_by_length([len(prompt.tokens) for prompt, _ in whole], max_tokens=self._max_tokens):
            self._pool([whole[index] for index in members], outputs)
        for request_id in [name for name, prompt in self._open.items() if prompt.row in self._rows]:
            del self._open[request_id]

    def _add_chunk(self, prompt: OpenPrompt, start: int, rows: Mapping[str, Tensor]) -> None:
        if start > prompt.n_held:
            raise EngineError(
                f"tokens {prompt.n_held} to {start - 1} of prompt {prompt.row} were not computed by this engine."
            )
        if start < prompt.n_held:  # it was pushed out of the cache, and begins anew
            prompt.chunks = [{name: torch.cat([one[name] for one in prompt.chunks])[:start] for name in rows}]
        prompt.chunks.append({name: values.clone() for name, values in rows.items()})  # the next step overwrites them
        prompt.n_held = start + len(next(iter(rows.values())))

    def _pool(self, prompts: list[tuple[OpenPrompt, int]], outputs: Mapping[str, Tensor]) -> None:
        """prompts: with where each begins in outputs [n_tokens d_model]."""
        rows = [prompt.tokens for prompt, _ in prompts]
        tokens, mask = pad_rows(rows, pad_token_id=0, device=self._device)
        batch = Batch(list(range(len(rows))), tokens, mask, without_bos(tokens, mask, self._bos))
        begins = torch.tensor([begin for _, begin in prompts], device=self._device)
        places = (begins[:, None] + torch.arange(tokens.shape[1], device=self._device)) * mask
        counted = [batch.mask(sees_bos).sum(dim=1).tolist() for sees_bos in (False, True)]
        for name, values in outputs.items():
            activations = values[places]
            kept = self._pooled.setdefault(name, [{} for _ in self._poolers])
            for pooler, found in zip(self._poolers, kept, strict=True):
                pooled = pooler(activations, batch).cpu()
                parts = pooled.split(counted[pooler.sees_bos]) if pooler.keeps_tokens else pooled.unbind()
                found.update({prompt.row: part for (prompt, _), part in zip(prompts, parts, strict=True)})
        self._rows.update(prompt.row for prompt, _ in prompts)

    def taken(self, n_rows: int) -> dict[str, list[bytes]]:
        """By hook name float32 activations of each pooling, row after row from 0 on. EngineError where one is missing."""
        missing = sorted(set(range(n_rows)) - self._rows)
        if missing:
            raise EngineError(
                f"the engine never computed {len(missing)} of {n_rows} prompts, the first of them {missing[0]}."
            )
        return {
            name: [torch.cat([found[row].reshape(-1) for row in range(n_rows)]).numpy().tobytes() for found in kept]
            for name, kept in self._pooled.items()
        }


class WorkerActivations:
    """The hooks of one worker, which keep activations, and on the first tensor rank the book of those that are wanted."""

    def __init__(self, config: Any, runner: Any, device: torch.device) -> None:
        self.structure = Structure.from_config(config.additional_config)
        self.layout: CacheLayout | None = None
        self._sizes, self._runner, self._device = _compat.sizes_of(config), runner, device
        blocks = decoder_blocks(runner.get_model(), self._sizes.n_layers, self._sizes.dtype)
        self._hooks = StaticHooks(blocks, self.structure, self._sizes, device)
        self._reports = bool(self._hooks.by_name) and _compat.ranks().tensor == 0
        self._book: ActivationBook | None = None
        self._fired: list[int] = []
        self._stale = False

    def check_boot(self, *, warmed_up: bool) -> None:
        """EngineError where warming up ran the model without the hooks."""
        self._hooks.check_boot(warmed_up=warmed_up)

    def begin_step(self, scheduler_output: Any) -> Step | None:
        return None if self._book is None else _compat.step_of(scheduler_output)

    def end_step(self, step: Step | None) -> None:
        if self._book is None or step is None or not step.n_tokens:
            return
        fires = self._hooks.counts()
        self._stale |= any(now <= before for now, before in zip(fires, self._fired, strict=True))
        self._fired = fires
        outputs = {name: hook.output for name, hook in self._hooks.by_name.items()}
        self._book.end_step(step, _compat.batch_order(self._runner), outputs)

    def with_ends(self, output: Any) -> Any:
        """As it came: no prompt ends early here."""
        return output

    # --- remote calls ---

    def collect(self, payload: bytes) -> None:
        """Begin with the next group of prompts; what is held of another is dropped."""
        self._fired, self._stale, self._book = self._hooks.counts(), False, None
        if self._reports:
            self._book = ActivationBook(wire.decode(payload, wire.Collect), self._sizes.max_tokens, self._device)

    def collected(self, payload: bytes) -> bytes | None:
        """The pooled activations of the group; None from a worker that keeps none."""
        if self._book is None:
            return None
        if self._stale:
            raise EngineError(f"the model ran without the hooks that keep activations. {STALE_GRAPH}")
        book, self._book = self._book, None
        return wire.encode(wire.Collected(book.taken(wire.decode(payload, wire.CollectedRequest).n_rows)))
