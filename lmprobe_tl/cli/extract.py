"""`lmprobe-tl extract` and `merge`: activations of a file of prompts in a folder, in any number of processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from lmprobe_tl.cli.data_files import read_prompts
from lmprobe_tl.cli.options import (
    BatchOption,
    BosOption,
    EngineArgsOption,
    EngineOption,
    HookPointsOption,
    ModelOption,
    check_engine_options,
    check_store_folder,
    opened,
    parse_hook_points,
    parse_names,
)
from lmprobe_tl.errors import InputError


def extract(
    prompts: Annotated[
        str, typer.Argument(help="Prompts: .txt (one a line), .jsonl, .csv, or - for lines of standard input.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the activations; an interrupted run goes on there.")],
    model: ModelOption = None,
    hook_points: HookPointsOption = "all",
    pooling: Annotated[
        str, typer.Option("--pooling", help="One or several of last_token, mean, first_token, max, min, eos, all.")
    ] = "last_token",
    dtype: Annotated[str, typer.Option("--dtype", help="On disk: float32, float16 or bfloat16.")] = "float32",
    shard: Annotated[
        str | None, typer.Option("--shard", help="i/n: this process is the i-th of n, from 0 to n - 1.")
    ] = None,
    keep_tokens: Annotated[
        bool, typer.Option("--keep-tokens", help="Store the token ids too, from which the text can be read.")
    ] = False,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    max_tokens_per_batch: BatchOption = None,
    bos: BosOption = None,
    engine: EngineOption = "transformer_lens",
    engine_args: EngineArgsOption = None,
) -> None:
    """Write pooled activations of prompts to a folder, from which probes are fitted and layers compared."""
    part = _parsed_shard(shard)
    check_store_folder(out, "--out")
    texts, poolings = read_prompts(prompts, text_column), parse_names(pooling)
    from lmprobe_tl.batch_pooling import activation_poolings
    from lmprobe_tl.store.record import DTYPES

    activation_poolings(poolings)  # raises before the model is loaded
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype!r}; expected {', '.join(map(repr, DTYPES))}.")
    arguments = check_engine_options(engine, engine_args, max_tokens_per_batch)
    points = parse_hook_points(hook_points)
    from lmprobe_tl.store.writing import extract_to_store

    with opened(model, engine, arguments, "ActivationEngine", hook_points=points) as loaded:
        store = extract_to_store(
            loaded,
            texts,
            out,
            points,
            poolings,
            engine=engine,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            shard=part,
            keep_tokens=keep_tokens,
            max_tokens_per_batch=max_tokens_per_batch,
            prepend_bos=bos,
        )
    print(store)


def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write: a new one, or one of the parts.")],
    parts: Annotated[list[Path], typer.Argument(help="Folders that processes with --shard wrote.")],
) -> None:
    """Put together the folders that `extract --shard` wrote on several machines."""
    from lmprobe_tl.store.merging import merge_stores

    print(merge_stores(out, parts))


def _parsed_shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(f"--shard is {text!r}; expected i/n with i from 0 to n - 1, such as 0/8 for the first of eight.")
    return int(found[1]), int(found[2])
