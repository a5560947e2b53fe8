"""`lmprobe-tl eval`: how good a probe file is on labelled prompts, against controls, by group, and on other text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprobe_tl.cli.data_files import has_column, read_columns, read_labelled
from lmprobe_tl.cli.options import (
    BatchOption,
    BosOption,
    ModelOption,
    ProbeArgument,
    check_folder_of,
    load_or_demo,
    parse_names,
)
from lmprobe_tl.errors import InputError


def evaluate(
    probe: ProbeArgument,
    prompts: Annotated[
        Path, typer.Option("--prompts", help="Labelled prompts that the probe was not trained on: .jsonl or .csv.")
    ],
    model: ModelOption = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="The labelled prompts that it was trained on, for the controls.")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", help="Column, such as the source or the language, to evaluate by.")
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option("--shift", metavar="NAME=FILE", help="Labelled prompts of another kind; may be given several times."),
    ] = None,
    controls: Annotated[
        str,
        typer.Option(
            "--controls",
            help="default, none, or some of bag_of_words, layer_0, length, group, random_direction, shuffled_labels.",
        ),
    ] = "default",
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random directions, and shuffles of the labels.")] = 10,
    resamples: Annotated[int, typer.Option("--resamples", min=1, help="Resamples of prompts for the intervals.")] = 1000,
    out: Annotated[Path | None, typer.Option("--json", help="File for the whole record (.json).")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Keep the score of every token in the record, too.")] = False,
    page: Annotated[
        Path | None, typer.Option("--report", help="File for a page with tables, pictures and coloured texts (.html).")
    ] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Where the label stands.")] = "label",
    max_tokens_per_batch: BatchOption = None,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the resamples and the random controls.")] = 0,
) -> None:
    """Evaluate a probe file on labelled prompts: metrics with intervals, and controls that it has to beat."""
    from lmprobe_tl.probe_file import load_probe

    weights = load_probe(probe)
    for option, path, suffix in (("--json", out, ".json"), ("--report", page, ".html")):
        if path is not None and path.suffix.lower() != suffix:
            raise InputError(f"{option} is {str(path)!r}; expected a name ending in {suffix}.")
        if path is not None:
            check_folder_of(path, option)
    if tokens and out is None:
        raise InputError("--tokens is of the record; name its file with --json, too.")
    files = _shifted_files(shift or [])

    def labelled(path: Path) -> tuple[list[Any], list[Any]]:
        texts, labels = read_labelled(path, text_column, label_column)
        return texts, _as_labels(labels, weights.labels) if path.suffix.lower() == ".csv" else labels

    # Everything that can fail without the model does so before it is loaded.
    given, groups = labelled(prompts), None if group is None else read_columns(prompts, group)[0]
    taught: Any = None if train is None else labelled(train)
    if train is not None and group is not None and has_column(train, group):
        taught = (*taught, read_columns(train, group)[0])
    shifted = {name: labelled(path) for name, path in files.items()}
    from lmprobe_tl.controls import check_controls
    from lmprobe_tl.labelled_prompts import check_known, labelled_prompts
    from lmprobe_tl.probe_evaluation import evaluate_probe
    from lmprobe_tl.shift import evaluate_shift

    names = "default" if controls == "default" else [] if controls == "none" else parse_names(controls)
    check_controls(names, has_groups=group is not None)
    needs: list[tuple[Path, Any, Any]] = [(prompts, given, "two classes")]
    needs += [(train, taught, "all classes")] if train is not None else []
    for path, one, need in [*needs, *((files[name], shifted[name], "one class") for name in files)]:
        check_known(labelled_prompts(one[0], one[1]).labels, weights.labels, str(path), needs=need)
    settings: dict[str, Any] = {
        "model": load_or_demo(model),
        "n_bootstrap": resamples,
        "random_state": seed,
        "prepend_bos": bos,
        "max_tokens_per_batch": max_tokens_per_batch,
    }
    report = evaluate_probe(
        weights,
        *given,
        train=taught,
        controls=names,
        groups=groups,
        n_draws=draws,
        keep_tokens=tokens or page is not None,
        **settings,
    )
    if shifted:
        report = report.with_shift(evaluate_shift(weights, given, shifted, **settings))
    print(report.table())
    written = []
    if out is not None:
        (report if tokens else report.without_texts()).save(out)
        written.append(f"{out}: the whole record")
    if page is not None:
        from lmprobe_tl.report_page import save_report

        save_report(report, page, probe=weights)
        written.append(f"{page}: the report")
    if written:
        print("\n" + "\n".join(written))


def _shifted_files(options: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise InputError(f"--shift is {option!r}; expected NAME=FILE, such as forum=forum.jsonl.")
        if name in files:
            raise InputError(f"--shift names {name!r} more than once; give each name once.")
        files[name] = Path(path)
    return files


def _as_labels(texts: Sequence[Any], labels: Sequence[Any]) -> list[Any]:
    """The probe's labels that a CSV file, which has only text, spells so."""
    spelt = {str(label): label for label in labels}
    return [spelt.get(text, text) for text in texts]
