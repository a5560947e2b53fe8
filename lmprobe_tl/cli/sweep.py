"""`lmprobe-tl sweep`: which layer, pooling and classifier reads a file of labelled prompts best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprobe_tl.cli.data_files import read_labelled
from lmprobe_tl.cli.options import (
    BatchOption,
    BosOption,
    HookPointsOption,
    ModelOption,
    check_folder_of,
    check_store_folder,
    load_or_demo,
    parse_hook_points,
    parse_names,
)
from lmprobe_tl.errors import InputError


def sweep(
    data: Annotated[Path, typer.Argument(help="Labelled prompts: .jsonl or .csv with a text and a label column.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Probe file for the best (.safetensors).")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="File for all combinations (.csv).")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture of AUROC by layer (.png, .svg or .pdf).")] = None,
    model: ModelOption = None,
    hook_points: HookPointsOption = "all",
    pooling: Annotated[
        str, typer.Option("--pooling", help="One or several of last_token, mean, first_token, eos; or all, alone.")
    ] = "last_token,mean",
    classifier: Annotated[
        str,
        typer.Option(
            "--classifier",
            help="One or several of logistic_regression, ridge, lda, mass_mean, mass_mean_whitened, mlp, polynomial.",
        ),
    ] = "logistic_regression",
    folds: Annotated[int, typer.Option("--folds", min=2, help="Folds of the validation.")] = 5,
    test_share: Annotated[
        float,
        typer.Option("--test-share", help="Share of the prompts, at most 0.5, that chooses nothing and judges the best."),
    ] = 0.25,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder for the activations: kept, resumed, read a layer at a time.")
    ] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Where the label stands.")] = "label",
    max_tokens_per_batch: BatchOption = None,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the splits and the classifiers.")] = 0,
) -> None:
    """Compare layers, poolings and classifiers, and judge the best on prompts that did not choose it."""
    for option, path, suffixes in (
        ("--out", out, (".safetensors",)),
        ("--table", table, (".csv",)),
        ("--plot", plot, (".png", ".svg", ".pdf")),
    ):
        if path is not None and path.suffix.lower() not in suffixes:
            raise InputError(f"{option} is {str(path)!r}; expected a name ending in {' or '.join(suffixes)}.")
        if path is not None:
            check_folder_of(path, option)
    if store is not None:
        check_store_folder(store, "--store")
    prompts, labels = read_labelled(data, text_column, label_column)
    if plot is not None:
        from lmprobe_tl.plots.sweep import pyplot

        pyplot().switch_backend("agg")  # raises where it is missing, before the model is loaded
    if table is not None:
        from lmprobe_tl.sweep_result import pandas

        pandas()
    from lmprobe_tl.sweep_run import check_sweep
    from lmprobe_tl.sweep_run import sweep as run_sweep

    poolings, classifiers = parse_names(pooling), parse_names(classifier)
    check_sweep(len(prompts), labels, poolings, classifiers, folds, test_share)
    loaded = load_or_demo(model)

    result = run_sweep(
        loaded,
        prompts,
        labels,
        parse_hook_points(hook_points),
        poolings,
        classifiers,
        validation=folds,
        test_share=test_share,
        store=store,
        max_tokens_per_batch=max_tokens_per_batch,
        prepend_bos=bos,
        random_state=seed,
        name="probe" if out is None else out.stem,
    )
    print(result)
    if table is not None:
        result.to_frame().to_csv(table, index=False)
    if plot is not None:
        result.plot(plot)
    if out is not None:
        print(f"{result.probe_.save(out, evaluation=result.test)}: the best, trained on {result.n_selection} prompts")
