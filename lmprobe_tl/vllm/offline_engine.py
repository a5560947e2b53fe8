"""A `vllm.LLM` and its end: what engines for scores and for activations have in common."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from lmprobe_tl.errors import EngineError
from lmprobe_tl.vllm import _compat


class OfflineEngine:
    """An engine that is at hand as `.llm` until it is closed, at the latest by the end of a `with` block."""

    llm: Any = None

    @property
    def _config(self) -> Any:
        return self.llm.llm_engine.vllm_config

    @property
    def dtype(self) -> str:
        """In which the model computes: 'bfloat16', 'float32' or 'float16'."""
        return str(self._config.model_config.dtype).removeprefix("torch.")

    def _check_open(self) -> None:
        if self.llm is None:
            raise EngineError("this engine is closed; start another one.")

    def _call(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        """Outputs of `LLM.generate` or `LLM.chat`. After an error or an interrupt nothing of the call runs on, as vLLM would
        have it: what is left would be among the outputs of the next call."""
        self._check_open()
        try:
            return getattr(self.llm, method)(*arguments, **options)
        except BaseException:
            _compat.abort_all(self.llm)
            raise

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        if self.llm is not None:
            _compat.shut_down(self.llm)
            self.llm = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
