"""What several commands share: options, how a model is loaded, checks of paths."""

from __future__ import annotations

import json
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprobe_tl.errors import InputError

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Name or local folder of a model; without it, the embedded demo model.")
]
HookPointsOption = Annotated[
    str, typer.Option("--hook-points", help="A layer, a hook name, several with commas between, or 'all'.")
]
ProbeArgument = Annotated[Path, typer.Argument(help="A probe file (.safetensors).")]
BosOption = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="Prepend BOS; by default as the model (fit) or the probe file says.")
]
BatchOption = Annotated[
    int | None,
    typer.Option("--max-tokens-per-batch", min=1, help="Tokens in one forward pass, pads included: 1,024 on a CPU."),
]

EngineOption = Annotated[
    str, typer.Option("--engine", help="What runs the model: transformer_lens, or vllm where that is installed.")
]
EngineArgsOption = Annotated[
    str | None,
    typer.Option("--engine-args", help='Of vLLM, as JSON: \'{"dtype": "bfloat16", "tensor_parallel_size": 2}\'.'),
]


def check_engine_options(engine: str, engine_args: str | None, max_tokens_per_batch: int | None) -> dict[str, Any]:
    """Arguments for the engine. InputError for options that do not go together."""
    from lmprobe_tl.activation_source import check_engine

    check_engine(engine)
    if engine_args is None:
        return {}
    if engine != "vllm":
        raise InputError("--engine-args are vLLM's; give --engine vllm too.")
    try:
        found = json.loads(engine_args)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f'--engine-args is {engine_args!r}; expected a JSON object, such as \'{{"dtype": "bfloat16"}}\'.')
    if max_tokens_per_batch is not None:
        raise InputError("--max-tokens-per-batch beside --engine-args; give max_num_batched_tokens among these instead.")
    return found


def model_or_demo_name(model: str | None) -> str | Path:
    """For an engine, which loads it itself."""
    hush()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if model is not None:
        return model
    from lmprobe_tl.demo import MODEL_FOLDER

    return MODEL_FOLDER


def opened(model: str | None, engine: str, arguments: dict[str, Any], kind: str, **own: Any) -> AbstractContextManager[Any]:
    """A loaded model; for vLLM its name, or where there are arguments an engine, by its class in lmprobe_tl.vllm."""
    if engine != "vllm":
        return nullcontext(load_or_demo(model))
    name = model_or_demo_name(model)
    if not arguments:
        return nullcontext(name)
    from lmprobe_tl.activation_source import check_engine_arguments

    check_engine_arguments(arguments, ["model", *own])
    from lmprobe_tl import vllm

    return getattr(vllm, kind)(name, **own, **arguments)


def load_or_demo(model: str | None) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hush()
    if model is None:
        from lmprobe_tl.demo import load_demo_model

        return load_demo_model()
    from lmprobe_tl.hook_points import load_model

    return load_model(model)


def local_shape(model: str) -> tuple[int, int] | None:
    """Width and number of layers of a model whose configuration is on this machine, None where it is not or is unusual."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
        return config.hidden_size, config.num_hidden_layers
    except Exception:  # whatever is wrong with it, the engine says it better
        return None


def hush() -> None:
    """Loading a model prints bars and notes of its own; they are no news here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def parse_hook_points(text: str) -> Any:
    def one(part: str) -> int | str:
        return int(part) if re.fullmatch(r"-?[0-9]+", part) else part

    parts = [part.strip() for part in text.split(",") if part.strip()]
    return "all" if parts == ["all"] else [one(part) for part in parts]


def parse_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def check_store_folder(folder: Path, option: str) -> None:
    """Refuse early what `extract_to_store` refuses once the model is loaded: a folder that holds anything else."""
    if not folder.exists() or (folder / "manifest.json").is_file():
        return
    if not folder.is_dir() or any(item.name[0] != "." for item in folder.iterdir()):
        raise InputError(
            f"{option} is {str(folder)!r}, which exists and is no activation store; choose a new or an empty folder."
        )


def check_folder_of(out: Path, option: str = "--out") -> None:
    folder = out.resolve().parent
    if not folder.is_dir():
        raise InputError(f"{option} is {str(out)!r}, but there is no folder {str(folder)!r}.")
