"""Where activations come from: a model that TransformerLens runs, or one that a vLLM engine runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from torch import Tensor

from lmprobe_tl.batch_pooling import Strategy
from lmprobe_tl.errors import InputError
from lmprobe_tl.hook_points import HookPoints, context_length, end_of_sequence_ids, load_model, resolve_hook_points
from lmprobe_tl.tokens import bos_id, check_batching, token_budget
from lmprobe_tl.weights_fingerprint import weights_sha256

Engine: TypeAlias = Literal["transformer_lens", "vllm"]
ENGINES = ("transformer_lens", "vllm")
# The classes of running engines, known by their methods: importing them needs vLLM.
_RUNNING = {"ActivationEngine": "pooled", "ProbedLLM": "replace_probes"}
PooledBatch: TypeAlias = tuple[list[int], dict[str, list[Tensor]]]  # indices of rows; by hook name a tensor a pooling

_MOST_ROWS = 256  # of a forward pass, where its tokens are given and its rows are not
_bare_models: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class LensSource:
    """A model of TransformerLens, loaded where its name is given."""

    engine: Engine = "transformer_lens"

    def __init__(self, model: Any, hook_points: HookPoints) -> None:
        self.model = load_model(model)
        self.hook_names = resolve_hook_points(self.model, hook_points)

    def batching(self, max_tokens: int | None, max_rows: int | None) -> tuple[int, int | None]:
        """Tokens and rows of one forward pass, at most."""
        found = token_budget(self.model, max_tokens)
        check_batching(max_rows, found)
        return found, max_rows

    @property
    def dtype(self) -> str:
        return model_dtype(self.model)

    def weights_sha256(self) -> str:
        return weights_sha256(self.model)

    def versions(self) -> dict[str, str]:
        """Of software beside that of `package_versions`."""
        return {}


class EngineSource:
    """A model that vLLM runs. `model` is its copy without weights, for tokenizer and config: so that the same prompts become
    the same tokens, and hook points have the same names.

    given: a name, a folder, or an ActivationEngine. An engine of a name is started when it is first needed, and stopped by
    `close`.
    """

    engine: Engine = "vllm"

    def __init__(self, given: Any, hook_points: HookPoints, max_tokens: int | None, max_rows: int | None) -> None:
        check_installed()
        self._given, self._owns = given, running_kind(given) is None
        self._options = engine_options(max_tokens, max_rows, is_running=not self._owns)
        self._running: Any = None if self._owns else given
        if self._owns:
            self.model = bare_model(given)
            self.hook_names = resolve_hook_points(self.model, hook_points)
            from lmprobe_tl.vllm.engine import check_readable

            for name in self.hook_names:
                check_readable(name)
            return
        self.model = bare_model_of(given)
        everything = isinstance(hook_points, str) and hook_points == "all"
        self.hook_names = resolve_hook_points(self.model, list(given.hook_points) if everything else hook_points)
        given.check_hook_points(self.hook_names)

    @property
    def running(self) -> Any:
        """The engine itself."""
        if self._running is None:
            from lmprobe_tl.vllm.engine import ActivationEngine

            self._running = ActivationEngine(_engine_name(self._given), self.hook_names, **self._options)
        return self._running

    def batching(self, max_tokens: int | None, max_rows: int | None) -> tuple[int, int | None]:
        """Tokens and rows of one forward pass, at most: what the engine was started with."""
        return self.running.batching

    @property
    def dtype(self) -> str:
        return self.running.dtype

    def weights_sha256(self) -> str:
        return self.running.weights_sha256()

    def versions(self) -> dict[str, str]:
        return {"vllm": self.running.version}

    def pooled(
        self, rows: Sequence[Sequence[int]], poolings: Sequence[Strategy], *, include_bos: bool, progress: bool | None
    ) -> Iterator[PooledBatch]:
        """Activations of the rows, group after group."""
        return self.running.pooled(
            rows,
            self.hook_names,
            poolings,
            include_bos=include_bos,
            bos_token_id=bos_id(self.model),
            eos_ids=end_of_sequence_ids(self.model),
            progress=progress,
        )

    def close(self) -> None:
        if self._owns and self._running is not None:
            self._running.close()


@contextmanager
def activation_source(
    model: Any,
    hook_points: HookPoints,
    engine: Engine | None = None,
    *,
    max_tokens: int | None = None,
    max_rows: int | None = None,
) -> Iterator[LensSource | EngineSource]:
    """The source of a model's activations. engine: None for what the model tells, an engine or a model."""
    if chosen_engine(model, engine) == "transformer_lens":
        yield LensSource(model, hook_points)
        return
    source = EngineSource(model, hook_points, max_tokens, max_rows)
    try:
        yield source
    finally:
        source.close()


def running_kind(model: Any) -> str | None:
    """The class of a running engine; None for a model, or the name of one."""
    known = hasattr(model, "longest_prompt")
    return next((kind for kind, method in _RUNNING.items() if known and hasattr(model, method)), None)


def model_dtype(model: Any) -> str:
    """In which a model of TransformerLens computes, such as 'float32'."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def check_engine(engine: Any) -> None:
    if engine not in (None, *ENGINES):
        raise InputError(f"engine is {engine!r}; expected {' or '.join(map(repr, ENGINES))}.")


def check_installed() -> None:
    """EngineError where vLLM is missing, or is not a version that probes know."""
    from lmprobe_tl.vllm._compat import check_version

    check_version()


def check_engine_arguments(arguments: Mapping[str, Any], taken: Collection[str]) -> None:
    """Before an engine is started with them: EngineError without vLLM, InputError for unknown ones and those in `taken`."""
    check_installed()
    from lmprobe_tl.vllm._compat import check_arguments

    check_arguments(arguments, taken)


def chosen_engine(model: Any, engine: Any, kind: str = "ActivationEngine") -> Engine:
    """InputError for an engine that does not exist, or not with this model, or a running one that is not of the wanted
    kind."""
    check_engine(engine)
    found = running_kind(model)
    if found is not None:
        if engine == "transformer_lens":
            raise InputError("engine is 'transformer_lens', but the model is a vLLM engine; leave engine out.")
        if found != kind:
            raise InputError(f"the model is a running {found}; expected {_a(kind)}, or the name or folder of a model.")
        return "vllm"
    if engine == "vllm" and not isinstance(model, (str, Path)):
        raise InputError(
            f"engine is 'vllm', but the model is a {type(model).__name__}; expected the name or folder of a model, or "
            f"{_a(kind)}."
        )
    return engine or "transformer_lens"


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "AEIO" else f"a {kind}"


def bare_model(model: str | Path, longest_prompt: int | None = None) -> Any:
    """The TransformerLens model without its weights, for its tokenizer, config and hook points.

    longest_prompt: of the engine; None asks vLLM. Prompts beyond it, or beyond the model's context, are too long.
    """
    bare = load_model(model, weights=False)
    if longest_prompt is None:
        from lmprobe_tl.vllm.engine import longest_prompt_of

        longest_prompt = longest_prompt_of(_engine_name(model))
    bare.cfg.n_ctx = min(context_length(bare) or longest_prompt, longest_prompt)
    return bare


def bare_model_of(engine: Any) -> Any:
    """The bare model of a running engine, made once."""
    if engine not in _bare_models:
        _bare_models[engine] = bare_model(engine.model, engine.longest_prompt)
    return _bare_models[engine]


def _engine_name(model: str | Path) -> str:
    return str(Path(model).expanduser()) if isinstance(model, Path) or model.startswith("~") else model


def engine_options(max_tokens: int | None, max_rows: int | None, *, is_running: bool) -> dict[str, int]:
    """In vLLM's words. InputError for any where the engine is running."""
    check_batching(max_rows, 1 if max_tokens is None else max_tokens)
    if is_running and not (max_tokens is max_rows is None):
        raise InputError(
            "max_tokens_per_batch and batch_size belong to an engine that is yet to be started; this one has "
            "max_num_batched_tokens and max_num_seqs of its own. Leave them out."
        )
    options = {}
    if max_tokens is not None:
        options = {"max_num_batched_tokens": max_tokens, "max_num_seqs": min(max_rows or _MOST_ROWS, max_tokens)}
    elif max_rows is not None:
        options = {"max_num_seqs": max_rows}
    return options
