"""Probes inside vLLM: the same files, scored in the compiled graph while it serves; and activations to train them on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmprobe_tl.vllm.engine import ActivationEngine
    from lmprobe_tl.vllm.offline import ProbedLLM
    from lmprobe_tl.vllm.online_engine import ProbedAsyncLLM
    from lmprobe_tl.vllm.probes import engine_kwargs
    from lmprobe_tl.vllm.results import ProbeResult

_HOMES = {
    "ActivationEngine": "engine",
    "ProbeResult": "results",
    "ProbedAsyncLLM": "online_engine",
    "ProbedLLM": "offline",
    "engine_kwargs": "probes",
}

__all__ = ["ActivationEngine", "ProbeResult", "ProbedAsyncLLM", "ProbedLLM", "engine_kwargs"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
