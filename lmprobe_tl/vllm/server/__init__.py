"""Probes in vLLM's OpenAI server: its own, with `--middleware lmprobe_tl.vllm.server.ProbeMiddleware`."""

from lmprobe_tl.vllm.server.middleware import ProbeMiddleware

__all__ = ["ProbeMiddleware"]
