"""`lmprobe-tl fit`: train a probe on a file of labelled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprobe_tl.cli.data_files import read_labelled
from lmprobe_tl.cli.options import (
    BatchOption,
    BosOption,
    HookPointsOption,
    ModelOption,
    check_folder_of,
    load_or_demo,
    parse_hook_points,
)
from lmprobe_tl.errors import InputError


def fit(
    data: Annotated[Path, typer.Argument(help="Labelled prompts: .jsonl or .csv with a text and a label column.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Probe file to write (.safetensors).")],
    model: ModelOption = None,
    hook_points: HookPointsOption = "-2",
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="last_token, mean, first_token, eos or all. By default last_token, or what the classifier does itself.",
            show_default=False,
        ),
    ] = None,
    inference_pooling: Annotated[
        str | None, typer.Option("--inference-pooling", help="Another pooling for use, as score:max.")
    ] = None,
    classifier: Annotated[
        str,
        typer.Option(
            "--classifier",
            help="logistic_regression, ridge, lda, mass_mean, mass_mean_whitened, mlp, polynomial, stacking (over several "
            "hook points), (on pairs, the i-th prompt of each label) pca or ccs, or (on all tokens, with no --pooling) "
            "attention, multimax, rolling_attention, softmax or windowed.",
        ),
    ] = "logistic_regression",
    name: Annotated[str | None, typer.Option("--name", help="Name of the probe; by default that of the file.")] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Where the label stands.")] = "label",
    test_share: Annotated[
        float, typer.Option("--test-share", min=0, max=0.9, help="Share of the prompts held out to evaluate; 0 for none.")
    ] = 0.2,
    max_tokens_per_batch: BatchOption = None,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the split and the classifier.")] = 0,
) -> None:
    """Train a probe on labelled prompts and save it."""
    prompts, labels = read_labelled(data, text_column, label_column)
    if out.suffix != ".safetensors":
        raise InputError(f"--out is {str(out)!r}; a probe file ends in .safetensors.")
    check_folder_of(out)
    train, test = _split(labels, test_share, seed)
    from lmprobe_tl.estimators import make_classifier
    from lmprobe_tl.estimators.pairs import learns_from_pairs
    from lmprobe_tl.probe import Probe
    from lmprobe_tl.probe_poolings import probe_poolings

    made = make_classifier(classifier, seed)  # these raise before the model is loaded
    probe_poolings(classifier, pooling, None, inference_pooling)
    if learns_from_pairs(made) and test:
        raise InputError(
            f"classifier {classifier!r} learns from pairs, which a share held out would part. Pass --test-share 0."
        )

    probe = Probe(
        load_or_demo(model),
        parse_hook_points(hook_points),
        pooling,
        inference_pooling=inference_pooling,
        classifier=classifier,
        max_tokens_per_batch=max_tokens_per_batch,
        prepend_bos=bos,
        random_state=seed,
        name=name or out.stem,
    )
    probe.fit([prompts[index] for index in train], [labels[index] for index in train])
    evaluation = None
    if test:
        evaluation = probe.evaluate([prompts[index] for index in test], [labels[index] for index in test])
    path = probe.save(out, evaluation=evaluation)
    print(f"{path}: probe {probe.name!r} at {', '.join(probe.hook_names_)}, trained on {len(train)} prompts")
    for metric, record in (evaluation.records() if evaluation else {}).items():
        interval = "" if record.low is None else f" [{record.low:.3f}, {record.high:.3f}]"
        print(f"{metric}: {record.value:.3f}{interval} on {len(test)} held-out prompts")


def _split(labels: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, with the same share of each class."""
    everything = list(range(len(labels)))
    from lmprobe_tl.labels import are_token_labels, check_classes, check_labels

    classes = None if are_token_labels(labels) else check_labels(labels, len(labels))
    if classes is not None:
        check_classes(classes)
    if share == 0:
        return everything, []
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(everything, test_size=share, random_state=seed, stratify=classes)
    except ValueError as error:
        raise InputError(
            f"cannot hold out {share:g} of {len(labels)} prompts ({error}). Pass --test-share 0, or more data."
        ) from error
    return train, test
