"""Hooks that become a part of the compiled graph: probe columns of each token of a forward pass, in a buffer that stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmprobe_tl.errors import EngineError
from lmprobe_tl.live.scoring_plan import ScoringPlan
from lmprobe_tl.vllm._compat import Sizes
from lmprobe_tl.vllm._compat.blocks import input_reader, output_reader
from lmprobe_tl.vllm.structure import ResidualPoint, Structure

STALE_GRAPH = (
    "A compiled graph was loaded that does not have it: delete vLLM's compile cache (VLLM_CACHE_ROOT, ~/.cache/vllm), or "
    "start with VLLM_DISABLE_COMPILE_CACHE=1."
)


class StaticHook:
    """One hook point's weights and output, at addresses that never change, as compiled graphs need them.

    output: [max_tokens columns], float32 partial readings, or with mode 'activations' [max_tokens d_model] in the model's
    dtype. fires: [1] int64, how many forward passes have written it.
    """

    def __init__(self, columns: int, sizes: Sizes, fires: Tensor, *, keep_activations: bool) -> None:
        self.fires, device = fires, fires.device
        if keep_activations:
            self.output = torch.zeros(sizes.max_tokens, sizes.d_model, dtype=sizes.dtype, device=device)
            return
        self.weight = torch.zeros(sizes.d_model, columns, device=device)
        self.bias = torch.zeros(columns, device=device)
        self.output = torch.zeros(sizes.max_tokens, columns, device=device)

    def set_weights(self, weight: Tensor, bias: Tensor) -> None:
        """weight [d_model n] and bias [n] of the first n columns; the others become 0."""
        self.weight.zero_()
        self.bias.zero_()
        self.weight[:, : weight.shape[1]] = weight
        self.bias[: len(bias)] = bias


def _scoring(hook: StaticHook) -> Any:
    weight, bias, output, fires = hook.weight, hook.bias, hook.output, hook.fires

    # No annotations and no branches on shapes here: this is traced into the model's graph.
    def score(residual):  # type: ignore[no-untyped-def]
        output.narrow(0, 0, residual.shape[0]).copy_(torch.addmm(bias, residual.float(), weight))
        fires.add_(1)

    return score


def _keeping(hook: StaticHook) -> Any:
    output, fires = hook.output, hook.fires

    def keep(residual):  # type: ignore[no-untyped-def]
        output.narrow(0, 0, residual.shape[0]).copy_(residual)
        fires.add_(1)

    return keep


class StaticHooks:
    """The hooks of all hook points whose blocks are on this worker. To be installed before the model is compiled."""

    def __init__(self, layers: Mapping[int, nn.Module], structure: Structure, sizes: Sizes, device: torch.device) -> None:
        self.structure = structure
        self.by_name: dict[str, StaticHook] = {}
        self.fires = torch.zeros(len(structure.columns), dtype=torch.int64, device=device)
        for name, columns in structure.columns.items():
            point = ResidualPoint.of(name, sizes.n_layers)
            if max(point.layer, 0) not in layers:
                continue  # on another pipeline stage
            keeps = structure.mode == "activations"
            fires = self.fires[len(self.by_name)].unsqueeze(0)
            hook = StaticHook(columns, sizes, fires, keep_activations=keeps)
            use = _keeping(hook) if keeps else _scoring(hook)
            if point.layer < 0:
                _hook_input(layers[0], use)
            else:
                _hook_output(layers[point.layer], use)
            self.by_name[name] = hook

    def set_weights(self, plan: ScoringPlan) -> None:
        for name, hook in self.by_name.items():
            if name in plan.hooks:
                hook.set_weights(plan.hooks[name].weight, plan.hooks[name].bias)

    def partials(self, plan: ScoringPlan, n_tokens: int) -> list[Tensor]:
        """Partial readings of the last forward pass by hook point of the plan, each [1 n_tokens columns], not copied."""
        found = [(self.by_name[name].output, len(hook.bias)) for name, hook in plan.hooks.items()]
        return [output[:n_tokens, :columns].unsqueeze(0) for output, columns in found]

    def counts(self) -> list[int]:
        """How many forward passes each hook has seen."""
        return self.fires[: len(self.by_name)].tolist()

    def check_boot(self, *, warmed_up: bool) -> None:
        """EngineError where warming up ran the model without the hooks."""
        if warmed_up and self.by_name and not self.fires.any():
            raise EngineError(f"the model was warmed up without the probes' hooks. {STALE_GRAPH}")
        self.check_fired()

    def check_fired(self) -> None:
        """EngineError where the model has run without some of the hooks."""
        fires = self.counts()
        if any(fires) and not all(fires):
            silent = list(self.by_name)[fires.index(0)]
            raise EngineError(f"the model ran without the probes' hook at {silent!r}. {STALE_GRAPH}")


def _hook_output(layer: nn.Module, use: Any) -> None:
    read = output_reader(layer)

    def after(module, args, output):  # type: ignore[no-untyped-def]
        use(read(output))

    layer.register_forward_hook(after)


def _hook_input(layer: nn.Module, use: Any) -> None:
    read = input_reader(layer)

    def before(module, args, kwargs):  # type: ignore[no-untyped-def]
        use(read(args, kwargs))

    layer.register_forward_pre_hook(before, with_kwargs=True)
