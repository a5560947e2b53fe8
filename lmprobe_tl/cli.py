"""The command `lmprobe-tl`: demo, fit, calibrate, score, generate, inspect."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lmprobe_tl.errors import InputError, LmprobeError, LmprobeWarning
from lmprobe_tl.records import read_labelled, read_prompts, read_standard_input, write_records

app = typer.Typer(
    name="lmprobe-tl",
    help="Train probes on a language model's residual stream and score every token live.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Name or local folder of a model; without it, the embedded demo model.")
]
ProbeArgument = Annotated[Path, typer.Argument(help="A probe file (.safetensors).")]
BosOption = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="Prepend BOS; by default as the model (fit) or the probe file says.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts in one forward pass.")]


def main() -> None:
    """Entry point: errors that are the user's to mend are one line on stderr and exit code 2."""
    warnings.showwarning = _one_line_warning  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except typer.Exit as stop:
        status = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (LmprobeError, OSError) as error:
        status = _fail(str(error))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the command line's own
            raise
        status = _fail(error.format_message())
    if status == 130:
        print("lmprobe-tl: interrupted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> int:
    print(f"lmprobe-tl: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _one_line_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, LmprobeWarning) or category.__name__ == "ConvergenceWarning":
        print(f"lmprobe-tl: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _hush() -> None:
    """Loading a model prints bars and notes of its own; they are no news here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _load(model: str | None) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _hush()
    if model is None:
        from lmprobe_tl.demo import load_demo_model

        return load_demo_model()
    from lmprobe_tl.hook_points import load_model

    return load_model(model)


@app.command(short_help="Run the whole job on the embedded model, without network.")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the probe file and the report.")] = Path("lmprobe-demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampled text.")] = 0,
) -> None:
    """Fit, evaluate, save, reload, attach and generate with live scores, on the embedded model and without network."""
    console = Console(highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    _hush()
    from lmprobe_tl.demo.main_job import run_demo
    from lmprobe_tl.report import write_report
    from lmprobe_tl.terminal import TokenPrinter

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    def show_generation(weights: Any, tokenizer: Any) -> TokenPrinter:
        say("")
        return TokenPrinter(console, weights, tokenizer)

    result = run_demo(out, say=say, show_generation=show_generation, seed=seed)
    report = write_report(result, out / "report.html")
    say("")
    say(f"probe file  {result.probe_file}")
    say(f"report      {report}")


@app.command()
def fit(
    data: Annotated[Path, typer.Argument(help="Labelled prompts: .jsonl or .csv with a text and a label column.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Probe file to write (.safetensors).")],
    model: ModelOption = None,
    hook_points: Annotated[
        str, typer.Option("--hook-points", help="A layer, a hook name, several with commas between, or 'all'.")
    ] = "-2",
    pooling: Annotated[str, typer.Option("--pooling", help="last_token, mean, first_token, eos or all.")] = "last_token",
    inference_pooling: Annotated[
        str | None, typer.Option("--inference-pooling", help="Another pooling for use, as score:max.")
    ] = None,
    classifier: Annotated[
        str, typer.Option("--classifier", help="logistic_regression or mass_mean.")
    ] = "logistic_regression",
    name: Annotated[str | None, typer.Option("--name", help="Name of the probe; by default that of the file.")] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Where the label stands.")] = "label",
    test_share: Annotated[
        float, typer.Option("--test-share", min=0, max=0.9, help="Share of the prompts held out to evaluate; 0 for none.")
    ] = 0.2,
    batch_size: BatchOption = 8,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the split and the classifier.")] = 0,
) -> None:
    """Train a probe on labelled prompts and save it."""
    prompts, labels = read_labelled(data, text_column, label_column)
    if out.suffix != ".safetensors":
        raise InputError(f"--out is {str(out)!r}; a probe file ends in .safetensors.")
    _check_folder_of(out)
    train, test = _split(labels, test_share, seed)
    from lmprobe_tl.probe import Probe

    probe = Probe(
        _load(model),
        _parse_hook_points(hook_points),
        pooling,
        inference_pooling=inference_pooling,
        classifier=classifier,
        batch_size=batch_size,
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


@app.command()
def calibrate(
    probe: ProbeArgument,
    negatives: Annotated[
        str, typer.Argument(help="Harmless texts, one a sequence: .txt (one a line), .jsonl, .csv, or - for standard input.")
    ],
    positives: Annotated[
        str | None, typer.Option("--positives", help="Texts with what the probe looks for, to report its recall.")
    ] = None,
    fpr: Annotated[float, typer.Option("--fpr", help="Share of harmless sequences that may raise a false alarm.")] = 0.01,
    delta: Annotated[float, typer.Option("--delta", help="pac: the chance that more do is at most this.")] = 0.05,
    method: Annotated[
        str, typer.Option("--method", help="pac, conformal (holds on average) or empirical (no promise for new text).")
    ] = "pac",
    min_recall: Annotated[
        float | None, typer.Option("--min-recall", help="Fail where the recall on --positives is lower.")
    ] = None,
    probability: Annotated[
        bool, typer.Option("--probability", help="Fit calibrated probabilities too (needs --positives).")
    ] = False,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Probe file to write; by default back into PROBE.")] = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    batch_size: BatchOption = 8,
    bos: BosOption = None,
) -> None:
    """Set the threshold of a probe file for live use, with a stated guarantee on false alarms."""
    from lmprobe_tl.calibrate_command import calibrate_file
    from lmprobe_tl.live_calibration import CalibrationGoal

    lines = calibrate_file(
        probe,
        negatives,
        positives,
        CalibrationGoal(fpr, delta, method, min_recall, probability),
        load_model=lambda: _load(model),
        out=out,
        text_column=text_column,
        batch_size=batch_size,
        prepend_bos=bos,
    )
    print("\n".join(lines))


@app.command()
def score(
    probe: ProbeArgument,
    prompts: Annotated[
        str, typer.Argument(help="Prompts: .txt (one a line), .jsonl, .csv, or - for lines of standard input.")
    ],
    model: ModelOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write, .jsonl or .csv; by default JSONL to the terminal.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Add the logit of every token (JSONL).")] = False,
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text stands.")] = "text",
    batch_size: BatchOption = 8,
    bos: BosOption = None,
) -> None:
    """Score prompts with a probe file."""
    from lmprobe_tl.probe_file import load_probe

    weights = load_probe(probe)
    texts = read_prompts(prompts, text_column)
    if out is not None and out.suffix.lower() not in (".jsonl", ".csv"):
        raise InputError(f"--out is {str(out)!r}; expected a name ending in .jsonl or .csv.")
    if out is not None:
        _check_folder_of(out)
    if tokens and out is not None and out.suffix.lower() == ".csv":
        raise InputError("--tokens needs JSONL; name a file ending in .jsonl, or leave --out away.")
    from lmprobe_tl.scoring import score_prompts

    found = score_prompts(_load(model), texts, weights, batch_size=batch_size, prepend_bos=bos)[weights.name]
    flagged = [None] * len(texts) if found.flagged is None else found.flagged.tolist()
    rows = zip(texts, found.scores, found.token_logits, flagged, strict=True)
    records = [_score_record(weights, *row) for row in rows]
    if not tokens:
        for record in records:
            del record["token_logits"]
    write_records(records, out)


@app.command()
def generate(
    probe: ProbeArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or - for standard input.")],
    model: ModelOption = None,
    stop: Annotated[bool, typer.Option("--stop", help="End at the first token that reaches the threshold.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of the continuation.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.8,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="Probability that raises the alarm, instead of the file's."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the text; by default another each time.")] = None,
    bos: BosOption = None,
) -> None:
    """Continue a prompt with every token coloured by its own score, and flagged tokens between marks.

    The alarm watches the running score, which pools the tokens so far as the probe file says; a line below the text shows
    it. In a pipe, with NO_COLOR or with TERM=dumb the text comes without colours.
    """
    from lmprobe_tl.probe_file import load_probe

    weights = load_probe(probe)
    if not weights.is_binary:
        raise InputError(f"probe {weights.name!r} has {len(weights.labels)} classes; a live display needs one with two.")
    if threshold is not None:
        weights = weights.with_threshold(threshold)
    text = read_standard_input() if prompt == "-" else prompt
    loaded = _load(model)
    import torch

    from lmprobe_tl.generation import monitored_generate
    from lmprobe_tl.terminal import TokenPrinter

    torch.seed() if seed is None else torch.manual_seed(seed)
    sampling: dict[str, Any] = {"temperature": temperature} if temperature > 0 else {"do_sample": False}
    with TokenPrinter(Console(highlight=False), weights, loaded.tokenizer) as printer:
        result = monitored_generate(
            loaded,
            [text],
            [weights],
            max_new_tokens=max_new_tokens,
            stop=stop,
            on_token=printer,
            score_last_token=True,
            prepend_bos=bos,
            **sampling,
        )[0]
        printer.finish(result.stopped_by)


@app.command()
def inspect(probe: ProbeArgument) -> None:
    """Print what is in a probe file."""
    from lmprobe_tl.probe_file import load_probe
    from lmprobe_tl.probe_summary import probe_summary

    rows = probe_summary(load_probe(probe))
    widest = max(len(key) for key in rows)
    for key, value in rows.items():
        print(f"{key:<{widest}}  {value}")


def _parse_hook_points(text: str) -> Any:
    def one(part: str) -> int | str:
        return int(part) if re.fullmatch(r"-?[0-9]+", part) else part

    parts = [part.strip() for part in text.split(",") if part.strip()]
    return "all" if parts == ["all"] else [one(part) for part in parts]


def _check_folder_of(out: Path) -> None:
    folder = out.resolve().parent
    if not folder.is_dir():
        raise InputError(f"--out is {str(out)!r}, but there is no folder {str(folder)!r}.")


def _split(labels: Sequence[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, with the same share of each class."""
    everything = list(range(len(labels)))
    if share == 0:
        return everything, []
    from sklearn.model_selection import train_test_split

    from lmprobe_tl.labels import are_token_labels, check_labels

    classes = None if are_token_labels(labels) else check_labels(labels, len(labels))
    try:
        train, test = train_test_split(everything, test_size=share, random_state=seed, stratify=classes)
    except ValueError as error:
        raise InputError(
            f"cannot hold out {share:g} of {len(labels)} prompts ({error}). Pass --test-share 0, or more data."
        ) from error
    return train, test


def _score_record(weights: Any, text: str, score: Any, token_logits: Any, flagged: bool | None) -> dict[str, Any]:
    record: dict[str, Any] = {"text": text, "score": score.tolist()}
    if weights.is_binary:
        from lmprobe_tl.live_reduction import live_reduction

        record |= {"unit": live_reduction(weights).unit, "flagged": flagged}
    else:
        record["label"] = weights.labels[int(score.argmax())]
    return record | {"token_logits": token_logits.tolist()}


if __name__ == "__main__":
    main()
