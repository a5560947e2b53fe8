"""What this package knows of vLLM's models: their decoder blocks, and where the residual stream is between them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmprobe_tl.errors import EngineError

_OF_TRANSFORMERS = "vllm.model_executor.models.transformers"


def decoder_blocks(model: nn.Module, n_layers: int, dtype: torch.dtype) -> dict[int, nn.Module]:
    """The decoder's blocks by index, of this pipeline stage alone.

    dtype: in which the model computes. EngineError where the blocks cannot be told, or do not show the residual stream.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    find: Any = getattr(model, "get_language_model", None)
    text = model if find is None else find()
    lists = [module for module in text.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    found = [blocks for blocks in lists if any(_is_block(layer) for layer in blocks)]
    if len(found) != 1 or type(text).__module__.startswith(_OF_TRANSFORMERS):
        raise EngineError(
            f"the {n_layers} decoder blocks of {type(model).__name__} cannot be told from its other modules ({len(found)} "
            "lists of modules could be them), or are not vLLM's own, so no probe can be installed. Supported are standard "
            "decoder stacks: Llama, Qwen, Mistral, Gemma, GPT-2 and their kin."
        )
    if dtype == torch.float16 and any(getattr(layer, "routed_scaling_factor", 1.0) != 1.0 for layer in found[0]):
        raise EngineError(
            f"{type(model).__name__} scales its residual stream in float16, so probes would score something else. Start it "
            "with dtype='bfloat16'."
        )
    return {index: layer for index, layer in enumerate(found[0]) if not isinstance(layer, PPMissingLayer)}


def _is_block(module: nn.Module) -> bool:
    """Whether the module computes on hidden states, as a block does and a list of norms does not."""
    return "hidden_states" in inspect.signature(module.forward).parameters


def input_reader(block: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    """Finds the residual stream among a block's arguments, for the first block, which nothing has been added to."""
    place = list(inspect.signature(block.forward).parameters).index("hidden_states")

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[place]

    return read


def output_reader(block: nn.Module) -> Callable[[Any], Tensor]:
    """Finds the residual stream in what a block returns."""
    leaves_a_sum = leaves_its_sum_to_the_next(type(block))

    # No annotations here: this is traced into the model's graph.
    def read(output):  # type: ignore[no-untyped-def]
        if not isinstance(output, tuple):
            return output
        if not leaves_a_sum or output[1] is None:
            return output[0]
        return output[0] + output[1]

    return read


def leaves_its_sum_to_the_next(block: type[nn.Module]) -> bool:
    """Whether a block that returns a pair has yet to add the two up, as most do: the next one adds them, within its norm.

    Others (StableLM, Cohere, PhiMoE, EXAONE 4) return the whole stream and beside it a tensor that nobody reads: their
    `forward` takes no `residual`, or overwrites it first thing. EngineError where its source is not at hand.
    """
    if "residual" not in inspect.signature(block.forward).parameters:
        return False
    try:
        source = textwrap.dedent(inspect.getsource(block.forward))
    except OSError as error:
        raise EngineError(
            f"the source of {block.__name__} is not at hand, so what its blocks return cannot be told; install vLLM with it."
        ) from error
    (function,) = ast.parse(source).body
    for statement in function.body:  # type: ignore[attr-defined]
        uses = [node.ctx for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id == "residual"]
        if uses:
            return any(isinstance(use, ast.Load) for use in uses)
    return False
