"""Hook points by name: which a model has, hooks of our own on them, and forward passes that stop at the last wanted one.

Beside `forward_watch`, `generate_call` and `special_tokens` the only file that knows how TransformerLens models are built: a
TransformerBridge of version 3.9 or 4, or a HookedTransformer of 3.9, told apart by what they have. It imports
TransformerLens just to load a model by name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmprobe_tl.errors import InputError, MonitorError, UnknownHookPointError
from lmprobe_tl.forward_watch import ForwardCall as ForwardCall
from lmprobe_tl.forward_watch import ForwardWatch as ForwardWatch
from lmprobe_tl.forward_watch import cache_mark as cache_mark
from lmprobe_tl.forward_watch import cache_of as cache_of
from lmprobe_tl.forward_watch import logits_of as logits_of
from lmprobe_tl.forward_watch import search_in_progress as search_in_progress
from lmprobe_tl.probe_spec import ModelRecord, Normalization
from lmprobe_tl.special_tokens import end_of_sequence_ids as end_of_sequence_ids

HookPoints = int | str | Sequence[int | str]

_LAYER = re.compile(r"^blocks\.(\d+)\.")
_NORMALIZATIONS: dict[str, Normalization] = {"LN": "layernorm", "LNPre": "layernorm", "RMS": "rmsnorm", "RMSPre": "rmsnorm"}
# Of what a config holds, the entries that shape the residual stream. Paths, devices and dtypes stay out, and so does the
# context length, which HookedTransformer cuts to 2048 to save memory.
_FINGERPRINT_KEYS = (
    "d_model", "n_layers", "n_heads", "d_head", "d_mlp", "d_vocab", "act_fn", "architecture",
    "normalization_type", "positional_embedding_type", "parallel_attn_mlp",
)  # fmt: skip
# Centred streams measure 1e-7, raw ones 0.01 and more.
_CENTRED_BELOW = 1e-4


# --- the model ---------------------------------------------------------------------------------------------------------


def load_model(model: Any, *, weights: bool = True) -> Any:
    """The model itself, or one loaded by TransformerLens from a name or a local Hugging Face folder.

    weights=False: for its tokenizer, config and hook points alone; its parameters take no memory, and it cannot run.
    """
    if not isinstance(model, (str, Path)):
        if not isinstance(getattr(model, "hook_dict", None), Mapping):
            raise InputError(
                f"a {type(model).__name__} has no hook points (no 'hook_dict'). Expected a "
                "TransformerLens TransformerBridge, "
                "a model with the same hook surface, or the name or folder of a model to load."
            )
        return model
    from transformer_lens.model_bridge import TransformerBridge

    folder = Path(model).expanduser()
    looks_local = isinstance(model, Path) or folder.is_absolute() or model.startswith(".")
    if looks_local and not folder.is_dir():
        raise InputError(
            f"there is no model folder {str(model)!r}; expected a Hugging Face folder with config.json and weights."
        )
    name = str(folder) if looks_local else str(model)
    try:
        if weights:
            return TransformerBridge.boot_transformers(name)
        with torch.device("meta"):
            return TransformerBridge.boot_transformers(name, load_weights=False)
    except Exception as error:  # damaged files raise errors of all kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        also = "" if folder.is_dir() else " (there is no local folder of that name either)"
        raise InputError(f"TransformerLens cannot load the model {str(model)!r}{also}: {reason}") from error


def layer_count(model: Any) -> int:
    return int(model.cfg.n_layers)


def width(model: Any) -> int:
    """d_model of the model."""
    return int(model.cfg.d_model)


def context_length(model: Any) -> int | None:
    """Longest sequence that the model takes, or None where its config does not say."""
    n_ctx = getattr(model.cfg, "n_ctx", None)
    return int(n_ctx) if isinstance(n_ctx, int) and n_ctx > 0 else None


def vocabulary_size(model: Any) -> int | None:
    """How many token ids the model knows, or None where its config does not say."""
    size = getattr(model.cfg, "d_vocab", None)
    return int(size) if isinstance(size, int) and size > 0 else None


def normalization(model: Any) -> Normalization:
    """'layernorm', 'rmsnorm' or 'unknown': whether subtracting a token's mean from the residual stream changes the model."""
    return _NORMALIZATIONS.get(getattr(model.cfg, "normalization_type", None) or "", "unknown")


def device_of(model: Any) -> torch.device:
    """Where tokens go in: the device of the model's first parameter."""
    return next(model.parameters()).device


def model_record(model: Any) -> ModelRecord:
    """Identity of a model for a probe file: its name (never a path), and a fingerprint of its architecture."""
    config = {key: _plain(getattr(model.cfg, key, None)) for key in _FINGERPRINT_KEYS}
    # The same facts in HookedTransformer's words: another key, and 'LNPre' where the norm's weights were folded away.
    config["architecture"] = config["architecture"] or _plain(getattr(model.cfg, "original_architecture", None))
    norm = config["normalization_type"]
    config["normalization_type"] = norm.removesuffix("Pre") if isinstance(norm, str) else norm
    name = str(getattr(model.cfg, "model_name", None) or "unnamed")
    if Path(name).is_absolute() or name.startswith("."):
        name = Path(name).name
    fingerprint = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    return ModelRecord(id=name, revision=None, config_fingerprint=fingerprint)


def _plain(value: Any) -> str | int | float | bool | None:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# --- names -------------------------------------------------------------------------------------------------------------


def resolve_hook_points(model: Any, hook_points: HookPoints) -> tuple[str, ...]:
    """Full names of the wanted hook points, in the order given; 'all' is every `hook_resid_post`.

    An int is a layer, short for `blocks.{i}.hook_resid_post`; negatives count from the end.
    Raises UnknownHookPointError with the closest name, InputError for an empty or repeated selection.
    """
    if hasattr(hook_points, "tolist"):  # numpy and torch
        hook_points = hook_points.tolist()
    if isinstance(hook_points, str) and hook_points == "all":
        hook_points = range(layer_count(model))
    expected = "expected a layer, a hook name, a list of these, or 'all'"
    if not isinstance(hook_points, (int, str, Sequence)):
        raise InputError(f"hook_points is {hook_points!r}; {expected}.")
    wanted = [hook_points] if isinstance(hook_points, (int, str)) else list(hook_points)
    if not wanted:
        raise InputError(f"hook_points is empty; {expected}.")
    names = tuple(_full_name(model, one) for one in wanted)
    _refuse_repeated(model, names)
    return names


def _refuse_repeated(model: Any, names: Sequence[str]) -> None:
    points, seen = model.hook_dict, dict[int, str]()
    for name in names:
        twin = seen.setdefault(id(points[name]), name)
        if twin != name:
            raise InputError(f"hook_points names {twin!r} and {name!r}, which are the same hook point; give one of them.")
    if len(set(names)) < len(names):
        raise InputError(f"hook_points names {max(names, key=names.count)!r} more than once.")


def _full_name(model: Any, hook_point: int | str) -> str:
    layers = layer_count(model)
    hook_point = hook_point.item() if hasattr(hook_point, "item") else hook_point
    if isinstance(hook_point, bool) or not isinstance(hook_point, (int, str)):
        raise InputError(f"{hook_point!r} is no hook point; expected a layer (int), a hook name, or 'all'.")
    if isinstance(hook_point, int):
        if not -layers <= hook_point < layers:
            raise UnknownHookPointError(
                f"layer {hook_point} does not exist: this model has {layers} layers (0 to {layers - 1}, or -{layers} to -1)."
            )
        hook_point = f"blocks.{hook_point % layers}.hook_resid_post"
    if hook_point not in model.hook_dict:
        raise UnknownHookPointError(unknown_hook_point(model, hook_point))
    return hook_point


def unknown_hook_point(model: Any, name: str) -> str:
    """What to tell of a hook point that the model does not have."""
    inside = next((other for other in model.hook_dict if other.startswith(f"{name}.")), None)
    if inside is not None and name.rpartition(".")[2].startswith("hook_"):
        return (
            f"this model has another module in the place of hook point {name!r}, with hook points of its own such as "
            f"{inside!r}: an attached SAE or adapter. Take it off first (model.reset_saes() for SAEs)."
        )
    close = difflib.get_close_matches(name, list(model.hook_dict), n=1, cutoff=0.5)
    closest = f" Closest: {close[0]!r}." if close else ""
    return f"this model ({layer_count(model)} layers) has no hook point {name!r}.{closest} All names: model.hook_dict"


def layer_of(hook_name: str) -> int | None:
    """Layer that a hook name belongs to, None for one outside the blocks."""
    found = _LAYER.match(hook_name)
    return int(found.group(1)) if found else None


# --- hooks of our own --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HookHandle:
    """One hook of ours on one hook point; `remove` takes away exactly that one, twice is harmless."""

    hook_point: Any
    entry: Any

    @property
    def is_attached(self) -> bool:
        """Whether the hook is still there; `reset_hooks()` takes it away, for instance."""
        return self.entry.hook.id in self.hook_point._forward_hooks

    def remove(self) -> None:
        self.entry.hook.remove()
        if self.entry in self.hook_point.fwd_hooks:
            self.hook_point.fwd_hooks.remove(self.entry)


def add_hook(model: Any, hook_name: str, callback: Callable[[Tensor], None]) -> HookHandle:
    """Call `callback(activations [batch pos d_model])` whenever the hook point fires; the activations are left as they
    are."""
    return _add_hook(model.hook_dict[hook_name], callback)


def add_editing_hook(model: Any, hook_name: str, callback: Callable[[Tensor], Tensor | None]) -> HookHandle:
    """Put what `callback(activations [batch pos d_model])` returns in the place of the activations, for what follows in the
    model and for hooks added later; None leaves them."""
    hook_point = model.hook_dict[hook_name]

    def edit(activations: Tensor, hook: Any) -> Tensor | None:
        return callback(activations)

    entry = hook_point.add_hook(edit) or hook_point.fwd_hooks[-1]
    return HookHandle(hook_point, entry)


def check_carries_stream(model: Any, hook_name: str) -> None:
    """Raise InputError for a hook point at which a change would not enter the residual stream, though its name says so.

    On a TransformerBridge `hook_resid_mid` is another name of what the second norm reads: a change there reaches the MLP,
    and the stream flows past it.
    """
    canonical = getattr(model.hook_dict[hook_name], "name", hook_name)
    if hook_name.endswith(".hook_resid_mid") and canonical and not canonical.endswith(".hook_resid_mid"):
        block = hook_name.removesuffix(".hook_resid_mid")
        raise InputError(
            f"{hook_name!r} is {canonical!r} on this model: a change there reaches the MLP alone, not the residual stream. "
            f"Use '{block}.hook_attn_out' (what attention adds to the stream), '{block}.hook_resid_post', or, where the MLP "
            f"alone is meant, {canonical!r}."
        )


def _add_hook(hook_point: Any, callback: Callable[[Tensor], None]) -> HookHandle:
    def read_only(activations: Tensor, hook: Any) -> None:
        callback(activations)

    entry = hook_point.add_hook(read_only) or hook_point.fwd_hooks[-1]
    return HookHandle(hook_point, entry)


def hooked_by_others(model: Any) -> list[str]:
    """Names of the hook points with hooks on them, beside those by which TransformerLens makes one point repeat another."""
    return [
        name
        for name, point in model.hook_dict.items()
        if any(not _is_built_in(one) for one in getattr(point, "fwd_hooks", ()))
    ]


def _is_built_in(entry: Any) -> bool:
    # BERT's MLP is no module of its own there: hooks on its two halves call `mlp.hook_in` and `mlp.hook_out`.
    return str(getattr(getattr(entry, "user_hook", None), "__module__", "")).startswith("transformer_lens.")


@contextmanager
def hooks_on(model: Any, callbacks: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hooks that live as long as the block, also when it ends in an exception."""
    with ExitStack() as stack:
        points = model.hook_dict  # made anew whenever it is asked for
        for hook_name, callback in callbacks.items():
            stack.callback(_add_hook(points[hook_name], callback).remove)
        yield


# --- forward passes ----------------------------------------------------------------------------------------------------


@contextmanager
def inference_mode(model: Any) -> Iterator[None]:
    """No gradients and no dropout; afterwards each module is in training mode or not, as it was."""
    training = [module for module in _modules_of(model, getattr(model, "original_model", model)) if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _modules_of(*owners: nn.Module) -> Iterator[nn.Module]:
    """Each module once. `modules()` takes nine times as long, a millisecond, and this is done for every batch."""
    waiting: list[nn.Module | None] = list(owners)
    seen = set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            waiting.extend(module._modules.values())
            yield module


class _AllSeen(Exception):  # noqa: N818 (a signal, not an error)
    """Raised inside a forward pass once every wanted hook point has fired."""


def run_to_hook_points(
    model: Any, tokens: Tensor, attention_mask: Tensor, callbacks: Mapping[str, Callable[[Tensor], None]]
) -> None:
    """One forward pass that ends at the last of the wanted hook points: no later layer, LM head, gradients or dropout.

    tokens, attention_mask: [batch pos]. Each callback gets its activations [batch pos d_model] once.
    """
    waiting = set(callbacks)

    def seen(hook_name: str, activations: Tensor) -> None:
        callbacks[hook_name](activations)
        waiting.discard(hook_name)
        if not waiting:
            raise _AllSeen

    bound = {name: _bind(seen, name) for name in callbacks}
    # A cache of keys and values would only fill memory here.
    options = {"use_cache": False} if hasattr(model, "original_model") else {}
    with inference_mode(model), hooks_on(model, bound):
        try:
            model(tokens, attention_mask=attention_mask, **options)
        except _AllSeen:
            return
    raise MonitorError(
        f"hook points {sorted(waiting)} did not fire in the forward pass; an attached SAE or adapter may replace them."
    )


def _bind(function: Callable[[str, Tensor], None], hook_name: str) -> Callable[[Tensor], None]:
    return lambda activations: function(hook_name, activations)


def forward_once(model: Any, tokens: Tensor, attention_mask: Tensor) -> None:
    """A plain forward pass without gradients or dropout, for hooks that are attached already.

    tokens, attention_mask: [batch pos].
    """
    options = {"use_cache": False} if hasattr(model, "original_model") else {}
    with inference_mode(model):
        model(tokens, attention_mask=attention_mask, **options)


# --- the residual basis ------------------------------------------------------------------------------------------------


def is_centred(activations: Tensor) -> bool:
    """Whether every token's activation has mean zero, as in a LayerNorm model whose writing weights were centred.

    activations: [n d_model]. Measured on the activations, since no flag of the model tells it reliably.
    """
    values = activations.float()
    spread = values.std(dim=-1, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    # bfloat16 rounds each entry, which leaves a mean of about eps / sqrt(d_model) behind.
    rounding = torch.finfo(activations.dtype).eps if activations.dtype in (torch.bfloat16, torch.float16) else 0.0
    return bool((values.mean(dim=-1).abs() / spread).max() < _CENTRED_BELOW + rounding)
