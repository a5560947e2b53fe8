"""A worker that ships activations to the client instead of scores, as a probe outside the engine needs them."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from lmprobe_tl.vllm import _compat
from lmprobe_tl.vllm._compat.blocks import decoder_blocks, output_reader


class ShippingWorker(_compat.worker_base()):  # type: ignore[misc]
    """Copies one block's output of each step to the host, request by request, and hands it over pickled."""

    def load_model(self, *arguments: Any, **options: Any) -> None:
        super().load_model(*arguments, **options)
        sizes = _compat.sizes_of(self.vllm_config)
        blocks = decoder_blocks(self.model_runner.get_model(), sizes.n_layers, sizes.dtype)
        block = blocks[sizes.n_layers // 2]
        read = output_reader(block)
        self._shipped: dict[str, list[torch.Tensor]] = {}
        self._latest = torch.empty(0)

        def keep(module: Any, arguments: Any, output: Any) -> None:
            self._latest = read(output)

        block.register_forward_hook(keep)

    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            start = 0
            for name in _compat.batch_order(self.model_runner):
                count = scheduler_output.num_scheduled_tokens[name]
                self._shipped.setdefault(name, []).append(self._latest[start : start + count].cpu().clone())
                start += count
        return output

    def take_shipped(self) -> bytes:
        taken, self._shipped = self._shipped, {}
        return pickle.dumps({name: torch.cat(parts) for name, parts in taken.items()})
